"""Which rows of a stream belong to which expert, and which of them make up a sample."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime.arguments import check, check_range, constant, outside_a_trace, require_integer
from mmfuse.kernels._runtime.dispatch import forced_backend
from mmfuse.kernels._runtime.library import error_on, load
from mmfuse.kernels._runtime.reasons import transforming

_INTEGERS = (torch.int64, torch.int32)


class Part(NamedTuple):
    """Sequences of one length and one modality, [n, length, D] as an embedder gives them: a run of the stream."""

    expert: int
    sequences: int  # n
    length: int
    samples: Tensor | None = None  # int64 [n]: the sample of each, no two of them the same; None: 0 to n - 1
    kept: Tensor | None = None  # int64 [n]: rows that others attend to, the rest is padding; None: all
    place: int = 0  # of the first row in a table of relative positions


@dataclass(frozen=True)
class Reading:
    """The rows of B samples of K segments in reading order, in S places of each."""

    row: Tensor  # int64 [B, S]: of the stream; 0 behind the last
    place: Tensor  # int64 [T]: b S + s of each row of the stream
    segment: Tensor  # int64 [B, S]: which of the K it is of
    within: Tensor  # int64 [B, S]: its number there; 0 behind the last
    attended: Tensor  # bool [B, S]
    first: Tensor  # int64 [B, K]: the stream's row that a segment begins with
    lengths: Tensor  # int64 [B, K]: its rows
    kept: Tensor  # int64 [B, K]: those of them that are attended to, which come first
    full: bool  # every place is a row that is attended to, as the host knows
    in_order: bool  # the stream's rows are in reading order, as the host knows

    @staticmethod
    def of(first: Tensor, lengths: Tensor, rows: int, longest: int, full: bool, in_order: bool = False) -> Reading:
        """Of samples whose rows are all attended to."""
        first, lengths = first.contiguous(), lengths.contiguous()
        at, ends = torch.arange(longest, device=first.device), lengths.cumsum(1)
        segment = (at[None, :, None] >= ends[:, None, :]).sum(2)  # K behind the last row
        real = segment < ends.shape[1]
        segment = segment.clamp(max=ends.shape[1] - 1)
        within = (at - (ends - lengths).gather(1, segment)).where(real, 0)
        row = first.gather(1, segment) + within
        # what is behind the last row goes to a row that is cut off
        place = at.new_zeros(rows + 1).scatter_(
            0, row.where(real, rows).flatten(), torch.arange(row.numel(), device=at.device)
        )[:-1]
        return Reading(row.where(real, 0), place, segment, within, real, first, lengths, lengths, full, in_order)

    @functools.cached_property
    def alike(self) -> tuple[Tensor, Tensor, list[Reading]]:
        """Samples of the same lengths together, which the host has to read: (order, inverse, the rows of each group).

        Of what a group's samples share, `segment` and `within`, there is one row.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for sample, lengths in enumerate(self.lengths.tolist()):
            if any(lengths):
                groups.setdefault(tuple(lengths), []).append(sample)
        found = []
        with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
            for lengths, samples in groups.items():
                of, longest = torch.tensor(samples, device=self.row.device), sum(lengths)
                row, attended = (t[of, :longest] for t in (self.row, self.attended))
                segment, within = (t[of[:1], :longest] for t in (self.segment, self.within))
                place = torch.arange(row.numel(), device=row.device)
                first, counts, kept = (t[of] for t in (self.first, self.lengths, self.kept))
                full = bool(attended.all())
                found.append(Reading(row, place, segment, within, attended, first, counts, kept, full, in_order=True))
            order = torch.cat([of.row.flatten() for of in found])
            return order, _inverted(order), found

    def up_to(self, kept: Tensor) -> Reading:
        """The same, of whose segments only the first `kept` [B, K] rows are attended to."""
        if not (kept.is_cpu and outside_a_trace()):  # there it has been looked at
            kept = kept.minimum(self.lengths)
        kept = kept.contiguous()
        attended = self.attended & (self.within < kept.gather(1, self.segment))
        return dataclasses.replace(self, attended=attended, kept=kept, full=False)


_none = functools.partial(torch.zeros, dtype=torch.int64)


@dataclass(frozen=True)
class Routing:
    """Rows [T] of a stream in which those of an expert lie together, once per batch and for every layer.

    A run of rows has one expert. A sample is a list of segments at different rows, in reading order.

    Attributes:
        experts: E.
        runs: the expert of each run.
        offsets: int64 [runs + 1]: run r is the rows from offsets[r] up to offsets[r + 1].
        bounds: the same on the host; None where they are known to the device alone, for which the host does not wait.
        order: int64 [T]: the caller's row that each row of the stream is; None: they are in one order.
        inverse: int64 [T]: the stream's row that each of the caller's is.
        first: int64 [samples, K]: the first row of each segment of a sample; K is 0 where samples are not known.
        lengths: int64 [samples, K]: its rows; 0 where a sample has no such segment.
        kept: int64 [samples, K]: those of them that are attended to, which come first.
        places: of each segment's first row in a table of relative positions.
        sample: int64 [T]: the sample of each row.
        longest: rows that a sample has at most.
        span: places that a table of relative positions has at least.
        reading: the same row by row, None where samples are not known.
    """

    experts: int
    runs: tuple[int, ...]
    offsets: Tensor
    bounds: tuple[int, ...] | None
    order: Tensor | None = None
    inverse: Tensor | None = None
    first: Tensor = field(default_factory=lambda: _none((0, 0)))
    lengths: Tensor = field(default_factory=lambda: _none((0, 0)))
    kept: Tensor = field(default_factory=lambda: _none((0, 0)))
    places: tuple[int, ...] = ()
    sample: Tensor = field(default_factory=lambda: _none(0))
    longest: int = 0
    span: int = 0
    reading: Reading | None = None

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
        if not parts:
            raise ValueError("parts is empty, expected at least one")
        device, numbers = torch.device(device), [n for p in parts for n in (*p[:3], p.place)]
        plain = {type(n) for n in (experts, samples, *numbers)} <= {int, type(None)}
        if plain and outside_a_trace() and all(p.samples is None for p in parts):
            routing = _of_numbers(experts, samples, device, *numbers)
        else:
            routing = _of_parts(parts, experts, samples, device)
            on_host = routing.lengths.device.type == "cpu" and outside_a_trace()
            if on_host and int(routing.lengths.sum()) != routing.rows:
                raise ValueError("samples of a part has one twice, expected each once")
        padded = []
        for k, part in enumerate(parts):
            if part.kept is not None:
                check(f"parts[{k}].kept", part.kept, (part.sequences,), ", one for each sequence", torch.int64)
                # what the host knows to be whole needs no mask
                if not _whole(k, part, part.kept):
                    padded.append((k, part, part.kept))
        if not padded:
            return routing
        kept = routing.kept.clone()
        for k, part, of_part in padded:
            kept[slice(part.sequences) if part.samples is None else part.samples, k] = of_part
        return dataclasses.replace(routing, kept=kept, reading=routing.reading and routing.reading.up_to(kept))

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
        _require_count("samples", samples)
        _require_count("length", length)
        if not 0 <= split <= length:
            raise ValueError(f"split is {split}, expected 0 <= split <= {length}, the length")
        parts = [Part(0, samples, split), Part(1, samples, length - split, kept=kept)]
        return Routing.of(parts, 2, samples, device)

    @staticmethod
    def from_splits(
        splits: Tensor, length: int, kept: Tensor | None = None, device: torch.device | str | None = None
    ) -> Routing:
        """Of samples whose first `splits[b]` rows are expert 0's and whose others expert 1's; `pack` brings them there.

        Args:
            splits: int64 or int32 [B], from 0 to S. On a CPU the bounds are read, elsewhere nobody waits for them.
            length: S of the tensor [B, S, D] whose rows are packed.
            kept: int64 [B]: of expert 1's rows those that are no padding.
            device: where the stream is, by default as `splits`.
        """
        check("splits", splits, ("B",), "", _INTEGERS)
        _require_count("length", length)
        _check_range("splits", splits, length + 1, f"at most the length {length}")
        samples = len(splits)
        splits = splits.to(torch.int64)
        lengths = torch.stack([splits, length - splits])  # [2, B], expert by expert
        starts = torch.cat([splits.new_zeros(1), lengths.flatten().cumsum(0)])
        offsets = starts[[0, samples, 2 * samples]]
        bounds = _read(offsets)
        device = splits.device if device is None else device
        splits, lengths, starts, offsets = (t.to(device) for t in (splits, lengths, starts, offsets))
        first = starts[:-1].view(2, samples)
        at = torch.arange(length, device=device)
        inverse = torch.where(at < splits[:, None], first[0, :, None], (first[1] - splits)[:, None]) + at
        order = _inverted(inverse.flatten())
        if kept is not None:
            check("kept", kept, (samples,), ", one for each sample", torch.int64)
            check_range("kept", kept, length + 1, "the length, and 1")
            kept = kept.minimum(lengths[1])
        attended = lengths if kept is None else torch.stack([splits, kept])
        reading = Reading.of(first.t(), lengths.t(), len(order), length, True)
        return Routing(
            2, (0, 1), offsets, bounds, order, inverse.flatten(),
            first=first.t(), lengths=lengths.t(), kept=attended.t(), places=(0, 0), sample=order // max(1, length),
            longest=length, span=length,
            reading=reading if kept is None else reading.up_to(attended.t()),
        )  # fmt: skip

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, runs: Sequence[int], experts: int | None = None) -> Routing:
        """Of runs one after another; their samples are not known.

        Args:
            cu_seqlens: int64 or int32 [runs + 1], from 0 on: run r is the rows from cu_seqlens[r] up to
                cu_seqlens[r + 1], and the last is T. On a CPU they are read, elsewhere nobody waits for them.
            runs: the expert of each run.
            experts: E; by default one more than the largest of `runs`.
        """
        runs = tuple(runs)
        check("cu_seqlens", cu_seqlens, (len(runs) + 1,), ", one for each run and one more", _INTEGERS)
        experts = max(runs, default=0) + 1 if experts is None else experts
        bounds = _read(cu_seqlens)
        if bounds is not None and (bounds[0] != 0 or list(bounds) != sorted(bounds)):
            raise ValueError(f"cu_seqlens is {bounds}, expected numbers from 0 on that do not fall")
        return Routing(experts, _checked(runs, len(runs), experts), cu_seqlens.to(torch.int64), bounds)

    @staticmethod
    def from_ids(ids: Tensor, experts: int) -> Routing:
        """Of rows that each have an expert, in any order; `pack` sorts them. Their samples are not known.

        A stable counting sort: rows of an expert stay in their order.

        Args:
            ids: int64 or int32 [T], the expert of each row. One out of range raises on a CPU, and on a GPU when it next
                waits.
            experts: E.
        """
        check("ids", ids, ("T",), "", _INTEGERS)
        _require_count("experts", experts, 1)
        _check_range("ids", ids, experts, "the experts")
        offsets, order, inverse = _sorted(ids.to(torch.int64), experts)
        return Routing(experts, tuple(range(experts)), offsets, _read(offsets), order, inverse)

    def mapped(self, runs: Sequence[int], experts: int) -> Routing:
        """The same rows with another expert for each run: VLMo's layers differ in who takes the pairs."""
        return dataclasses.replace(self, runs=_checked(runs, len(self.runs), experts), experts=experts)

    def pack(self, x: Tensor) -> Tensor:
        """The stream of the caller's rows [T, ...]."""
        return _permuted(x, self.order, self.inverse)

    def unpack(self, x: Tensor) -> Tensor:
        """The caller's rows of the stream's [T, ...]."""
        return _permuted(x, self.inverse, self.order)

    @property
    def rows(self) -> int:
        """T."""
        return self._known()[-1]

    def slices(self) -> list[tuple[int, slice]]:
        """(expert, rows) of each run that has rows."""
        bounds = self._known()
        return [(e, slice(a, b)) for e, a, b in zip(self.runs, bounds, bounds[1:], strict=False) if a < b]

    def experts_of(self, rows: int) -> Tensor:
        """int64 [T]: the expert of each of T rows."""
        return experts_of(self.runs, self.offsets, rows)

    def _known(self) -> tuple[int, ...]:
        if self.bounds is None:
            raise ValueError(f"routing has its bounds on {self.offsets.device}, expected them on the host")
        return self.bounds


def _of_parts(parts: Sequence[Part], experts: int, samples: int | None, device: torch.device) -> Routing:
    """Of parts, whatever padding they have."""
    _require_count("experts", experts, 1)
    for k, part in enumerate(parts):
        for name in ("expert", "sequences", "length", "place"):
            _require_count(f"parts[{k}].{name}", getattr(part, name))
    samples = max(p.sequences for p in parts) if samples is None else samples
    _require_count("samples", samples)
    for k, part in enumerate(parts):
        if not 0 <= part.expert < experts:
            raise ValueError(f"parts[{k}] has expert {part.expert}, expected 0 <= expert < {experts}")
        if part.samples is not None:
            check(f"parts[{k}].samples", part.samples, (part.sequences,), ", one for each sequence", torch.int64)
            check_range(f"parts[{k}].samples", part.samples, samples, "the number of samples")
        elif part.sequences > samples:
            raise ValueError(
                f"parts[{k}] has {part.sequences} sequences, expected at most {samples}, one for each sample"
            )
    first, lengths = (torch.zeros((samples, len(parts)), dtype=torch.int64, device=device) for _ in range(2))
    bounds, sample = [0], []
    for k, part in enumerate(parts):
        at = torch.arange(part.sequences, device=device) if part.samples is None else part.samples
        sample.append(at.repeat_interleave(part.length))
        first[at, k] = bounds[-1] + part.length * torch.arange(part.sequences, device=device)
        lengths[at, k] = part.length
        bounds.append(bounds[-1] + part.sequences * part.length)
    longest = sum(p.length for p in parts)
    full = bool(bounds[-1] == samples * longest)
    in_order = full and len(parts) == 1 and parts[0].samples is None
    runs, places = tuple(p.expert for p in parts), tuple(p.place for p in parts)
    return Routing(
        experts, runs, torch.tensor(bounds, device=device), tuple(bounds),
        first=first, lengths=lengths, kept=lengths, places=places, sample=torch.cat(sample), longest=longest,
        span=max(p.place + p.length for p in parts),
        reading=Reading.of(first, lengths, bounds[-1], longest, full, in_order),
    )  # fmt: skip


@functools.lru_cache(64)
def _of_numbers(experts: int, samples: int | None, device: torch.device, *numbers: int) -> Routing:
    """`_of_parts` of what the host knows, checked and made once: it costs more than a small layer."""
    every = zip(*[iter(numbers)] * 4, strict=True)
    parts = [Part(expert, sequences, length, place=place) for expert, sequences, length, place in every]
    with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
        return _of_parts(parts, experts, samples, device)


def _whole(k: int, part: Part, kept: Tensor) -> bool:
    """Whether the host knows that nothing of a part is padding. What it can see is in range."""
    if not (kept.is_cpu and outside_a_trace() and kept.numel()):
        return False
    least, most = map(int, kept.aminmax())
    if least < 0 or most > part.length:
        check_range(f"parts[{k}].kept", kept, part.length + 1, "the length, and 1")
    return least == part.length == most


def _permuted(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    if order is None or inverse is None:
        return x
    if len(x) != len(order):
        raise ValueError(f"x has {len(x)} rows, expected {len(order)} as routing")
    return taken(x, order, inverse)


def taken(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x's rows in `order`, where each row of x has its place in `inverse`; other places have no gradient."""
    if transforming() or not (x.requires_grad and torch.is_grad_enabled()):
        return x.index_select(0, order)
    return _Permute.apply(x, order, inverse)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient's are in the first one again, without a sum over indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        order, inverse = ctx.saved_tensors
        return taken(g, inverse, order), None, None


def experts_of(runs: Sequence[int], offsets: Tensor, rows: int) -> Tensor:
    """int64 [T]: the expert of each of T rows."""
    at = torch.arange(rows, device=offsets.device)
    run = torch.bucketize(at, offsets[1:], right=True).clamp(max=len(runs) - 1)
    return constant(runs, at.device).long()[run]


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, order, inverse) of a stable counting sort."""
    if _compiled(ids, experts):
        offsets, order, inverse = ids.new_empty(experts + 1), torch.empty_like(ids), torch.empty_like(ids)
        part = torch.ops.mmfuse_cuda if ids.is_cuda else torch.ops.mmfuse_cpu
        part.route(offsets, order, inverse, ids.contiguous(), experts)
        return offsets, order, inverse
    member = ids[:, None] == torch.arange(experts, device=ids.device)
    counts = member.cumsum(0)  # [T, E]
    total = counts[-1:].sum(0)
    offsets = torch.cat([total.new_zeros(1), total.cumsum(0)])
    inverse = (counts + offsets[:-1]).gather(1, ids[:, None])[:, 0] - 1
    return offsets, _inverted(inverse), inverse


def _compiled(ids: Tensor, experts: int) -> bool:
    """Whether csrc sorts, of plain tensors of up to 16 experts."""
    part = ids.device.type
    if part not in ("cpu", "cuda") or type(ids) is not Tensor or experts > 16 or not outside_a_trace():
        return False
    return forced_backend() in (None, part) and load(part) is None and (part == "cpu" or error_on(ids.device) is None)


def _inverted(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _read(offsets: Tensor) -> tuple[int, ...] | None:
    return tuple(offsets.tolist()) if offsets.device.type == "cpu" and outside_a_trace() else None


def _checked(runs: Sequence[int], count: int, experts: int) -> tuple[int, ...]:
    for value in (*runs, experts):
        require_integer("experts or one of runs", value)
    if len(runs) != count or not all(0 <= e < experts for e in runs):
        raise ValueError(f"runs is {tuple(runs)}, expected {count} experts from 0 to {experts - 1}")
    return tuple(runs)


def _require_count(name: str, value: Any, least: int = 0) -> None:
    require_integer(name, value)
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


def _check_range(name: str, ids: Tensor, n: int, of: str) -> None:
    """Raise unless 0 <= id < n; on a GPU the device does, and nobody waits."""
    check_range(name, ids, n, of)
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < n)).all(), f"{name} is out of range, expected 0 to {n - 1}")
