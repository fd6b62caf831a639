"""Which rows of a stream belong to which expert, and which of them make up a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime.arguments import check, require_integer


class Part(NamedTuple):
    """Sequences of one length and one modality, [n, length, D] as an embedder gives them: a run of the stream."""

    expert: int
    sequences: int  # n
    length: int
    samples: Tensor | None = None  # int64 [n]: the sample of each, no two of them the same; None: 0 to n - 1
    kept: Tensor | None = None  # int64 [n]: rows that others attend to, the rest is padding; None: all
    place: int = 0  # of the first row in a table of relative positions


@dataclass(frozen=True)
class Routing:
    """Rows [T] of a stream in which those of an expert lie together, once per batch and for every layer.

    A run of rows has one expert. A sample is a list of segments at different rows, in reading order.

    Attributes:
        experts: E.
        runs: the expert of each run.
        bounds: run r is the rows from bounds[r] up to bounds[r + 1].
        first: int64 [samples, K]: the first row of each segment of a sample.
        lengths: int64 [samples, K]: its rows; 0 where a sample has no such segment.
        kept: int64 [samples, K]: those of them that are attended to, which come first.
        places: of each segment's first row in a table of relative positions.
        sample: int64 [T]: the sample of each row.
        longest: rows that a sample has at most.
    """

    experts: int
    runs: tuple[int, ...]
    bounds: tuple[int, ...]
    first: Tensor
    lengths: Tensor
    kept: Tensor
    places: tuple[int, ...]
    sample: Tensor
    longest: int

    @staticmethod
    def of(
        parts: Sequence[Part], experts: int, samples: int | None = None, device: torch.device | str = "cpu"
    ) -> Routing:
        """The stream that parts make one after another; of a sample, what an earlier part has is read first.

        Args:
            parts: at least one.
            experts: E, more than any part's.
            samples: how many there are; by default as many as the largest part has sequences.
            device: where the stream is.
        """
        count = max(p.sequences for p in parts) if samples is None else samples
        shape = (count, len(parts))
        first, lengths, kept = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3))
        bounds, sample = [0], []
        for k, part in enumerate(parts):
            if not 0 <= part.expert < experts:
                raise ValueError(f"parts[{k}] has expert {part.expert}, expected 0 <= expert < {experts}")
            if part.samples is None and part.sequences > count:
                raise ValueError(
                    f"parts[{k}] has {part.sequences} sequences, expected at most {count}, one for each sample"
                )
            for name, t in (("samples", part.samples), ("kept", part.kept)):
                if t is not None:
                    check(f"parts[{k}].{name}", t, (part.sequences,), ", one for each sequence", torch.int64)
            at = torch.arange(part.sequences, device=device) if part.samples is None else part.samples
            sample.append(at.repeat_interleave(part.length))
            first[at, k] = bounds[-1] + part.length * torch.arange(part.sequences, device=device)
            lengths[at, k] = part.length
            kept[at, k] = part.length if part.kept is None else part.kept
            bounds.append(bounds[-1] + part.sequences * part.length)
        longest = sum(p.length for p in parts)
        runs, places = tuple(p.expert for p in parts), tuple(p.place for p in parts)
        return Routing(experts, runs, tuple(bounds), first, lengths, kept, places, torch.cat(sample), longest)

    @staticmethod
    def from_split(
        samples: int, length: int, split: int, kept: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Routing:
        """Of samples whose first `split` rows are expert 0's and whose others expert 1's, as torchscale splits them.

        Args:
            samples, length: B and S of the tensor [B, S, D] that is packed.
            split: from 0 to S.
            kept: int64 [B]: of expert 1's rows those that are no padding.
            device: where the stream is.
        """
        require_integer("split", split)
        if not 0 <= split <= length:
            raise ValueError(f"split is {split}, expected 0 <= split <= {length}, the length")
        parts = [Part(0, samples, split), Part(1, samples, length - split, kept=kept)]
        return Routing.of(parts, 2, samples, device)

    def mapped(self, runs: Sequence[int], experts: int) -> Routing:
        """The same rows with another expert for each run: VLMo's layers differ in who takes the pairs."""
        if len(runs) != len(self.runs) or not all(0 <= e < experts for e in runs):
            raise ValueError(f"runs is {tuple(runs)}, expected {len(self.runs)} experts from 0 to {experts - 1}")
        return dataclasses.replace(self, runs=tuple(runs), experts=experts)

    @property
    def rows(self) -> int:
        """T."""
        return self.bounds[-1]

    def slices(self) -> list[tuple[int, slice]]:
        """(expert, rows) of each run that has rows."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        return [(e, slice(a, b)) for e, (a, b) in zip(self.runs, pairs, strict=True) if a < b]
