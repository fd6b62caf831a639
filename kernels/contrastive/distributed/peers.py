"""The processes of a group, the rows that each holds, and the few exchanges that the distributed losses make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# under their newer names where there are such
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Peers:
    """Rank `rank` of `size` holds `sizes[rank]` rows of the global batch; the ranks' rows follow each other."""

    group: Any
    rank: int
    size: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        return self.rows_of(self.rank)

    def rows_of(self, rank: int) -> slice:
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    @property
    def _even(self) -> bool:
        return len(set(self.sizes)) == 1

    def chunks(self, k: int) -> list[Peers]:
        """Every rank's rows in k parts, those of `Tensor.tensor_split`."""
        return [replace(self, sizes=tuple((n + k - 1 - i) // k for n in self.sizes)) for i in range(k)]

    def among(self, own: Tensor, others: Tensor) -> Tensor:
        """The rows of all ranks, from this rank's and the others'."""
        before, after = others.tensor_split([self.own.start])
        return torch.cat([before, own, after])

    def apart(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows and the others', of the rows of all ranks."""
        before, own, after = t.tensor_split([self.own.start, self.own.stop])
        return own, torch.cat([before, after])

    def gather(self, t: Tensor) -> Tensor:
        """The rows of all ranks [N, ...]: t [b, ...] is this rank's part."""
        return self.gathering(t)()

    def gathering(self, t: Tensor, own: bool = True) -> Callable[[], Tensor]:
        """Begin to gather the rows of all ranks, or of the others; the call of what is returned waits for them."""
        if self.size == 1:
            return lambda: t if own else t[:0]
        longest = max(self.sizes)
        part = t.contiguous()
        if len(part) < longest:  # equal parts are what every backend can gather
            part = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        out = part.new_empty(self.size * longest, *part.shape[1:])
        with self.waiting("gathering the features"):
            work = _gather_into(out, part, group=self.group, async_op=True)

        def arrived() -> Tensor:
            with self.waiting("gathering the features"):
                work.wait()
            if own and self._even:
                return out
            starts = range(0, len(out), max(1, longest))
            rows = [out[i : i + n] for i, n in zip(starts, self.sizes, strict=True)]
            return torch.cat(rows if own else rows[: self.rank] + rows[self.rank + 1 :])

        return arrived

    def scatter_sum(self, t: Tensor) -> Tensor:
        """This rank's rows [b, ...] of the sum over ranks of t [N, ...]."""
        return self.scattering(t)()

    def scattering(self, t: Tensor) -> Callable[[], Tensor]:
        """Begin `scatter_sum`; the call of what is returned waits for it."""
        if self.size == 1:
            return lambda: t
        longest, (own, rest) = max(self.sizes), (self.sizes[self.rank], t.shape[1:])
        if not self._even:
            parts = t.split(self.sizes)
            t = torch.cat([torch.cat([p, p.new_zeros(longest - len(p), *rest)]) for p in parts])
        out = t.new_empty(longest, *rest)
        with self.waiting("summing the gradients"):
            work = _scatter_into(out, t.contiguous(), group=self.group, async_op=True)

        def arrived() -> Tensor:
            with self.waiting("summing the gradients"):
                work.wait()
            return out[:own]

        return arrived

    def sum_(self, t: Tensor) -> Tensor:
        return self._reduce(t, dist.ReduceOp.SUM, "summing over the ranks")

    def max_(self, t: Tensor) -> Tensor:
        return self._reduce(t, dist.ReduceOp.MAX, "taking the maximum over the ranks")

    def _reduce(self, t: Tensor, how: Any, what: str) -> Tensor:
        if self.size > 1:
            with self.waiting(what):
                dist.all_reduce(t, how, group=self.group)
        return t

    def each(self, number: Tensor) -> Tensor:
        """One number of every rank [W]."""
        if self.size == 1:
            return number.reshape(1)
        out = number.new_empty(self.size)
        with self.waiting("gathering a number of each rank"):
            _gather_into(out, number.reshape(1), group=self.group)
        return out

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each rank [W] as one of each row [N]."""
        return torch.cat([number.expand(n) for number, n in zip(numbers.unbind(), self.sizes, strict=True)])

    def waiting(self, what: str) -> Any:
        return _waiting(what, self.rank, self.size)


@contextmanager
def _waiting(what: str, rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what}: rank {rank} of {size} waited in vain; another process has died, does not take part in this step, "
            f"or needed longer than the group's timeout ({error})"
        ) from error


# --- before anything else: do the ranks agree? ------------------------------------------------------------------------

# what the ranks tell each other travels as an index into this
_WORDS: tuple[bool | str, ...] = (
    *(False, True, "float16", "bfloat16", "float32", "float64", "clip_loss", "siglip_loss"),
    *("open_clip", "true", "bidir", "shift", "reduce", "gather", "ring"),
    *("", "cuda", "triton", "cpu", "chunked", "torch"),
)
_HEADER = 13  # integers: whether the arguments fit, rows, features per row, and settings


def members(group: Any) -> tuple[int, int]:
    """(rank, number of ranks) of this process in `group`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group is a group that this process is not in")
    return rank, dist.get_world_size(group)


def refuse(group: Any) -> None:
    """Tell the others that this rank's arguments do not fit, so that they need not wait for it."""
    _exchange(group, [False])


def agree_on_sizes(group: Any, image: Tensor, sizes: Sequence[int] | None, settings: dict[str, bool | str]) -> Peers:
    """Exchange the number of rows, and make sure that everything else agrees: a dozen integers, once.

    With `sizes` nothing is exchanged, nor checked. Where only a GPU can exchange, the host waits for it, in a stream of
    its own: not for the work that is queued. A graph that is being captured cannot wait, and needs `sizes`.

    Raises:
        ValueError: naming what differs, on every rank; or `sizes` does not fit.
        RuntimeError: another rank's arguments do not fit, or it does not answer within the group's timeout.
    """
    rank, size = members(group)
    if sizes is not None:
        if len(sizes) != size or sizes[rank] != len(image):
            raise ValueError(f"sizes is {list(sizes)}, expected {size} numbers with {len(image)} at rank {rank}")
        return Peers(group, rank, size, tuple(sizes))
    settings = {"dtype": str(image.dtype).removeprefix("torch."), **settings}
    if size == 1:
        return Peers(group, rank, size, (len(image),))
    if image.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("sizes is None, expected the ranks' numbers of rows: a captured graph cannot ask for them")
    told = _exchange(group, [True, *image.shape, *map(_WORDS.index, settings.values())])
    if refused := [r for r in range(size) if not told[r][0]]:
        raise RuntimeError(f"rank {refused[0]}'s arguments do not fit (it says why): no rank computes a loss")
    names = ("rows", "features per row", *settings)
    for i, name in enumerate(names[1:], 2):
        for r in range(size):
            if told[r][i] != told[0][i]:
                here, there = (told[q][i] if i == 2 else _WORDS[told[q][i]] for q in (0, r))
                raise ValueError(f"{name}: {here} at rank 0 but {there} at rank {r}, expected the same at every rank")
    return Peers(group, rank, size, tuple(row[1] for row in told))


def _exchange(group: Any, header: Sequence[int]) -> list[list[int]]:
    rank, size = members(group)
    on_host = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu" if on_host else "cuda")
    with nullcontext() if on_host else torch.cuda.stream(torch.cuda.Stream()):
        told = torch.tensor([*header, *[0] * (_HEADER - len(header))]).to(device)
        out = told.new_empty(size * _HEADER)
        with _waiting("comparing the arguments", rank, size):
            _gather_into(out, told, group=group)
        return out.view(size, _HEADER).tolist()
