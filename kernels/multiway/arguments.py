"""The checked arguments of the routed operators, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mmfuse.kernels._runtime.arguments import check
from mmfuse.kernels.multiway.routing import Routing

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")


@dataclass
class Runs:
    """Which expert the rows of a stream have, as `Routing` says."""

    experts: Sequence[int]  # of each run
    bounds: Sequence[int] | None  # on the host, or known to the device alone
    offsets: Tensor  # int64 [runs + 1], the same on the device

    def slices(self) -> list[tuple[int, slice]]:
        """(expert, rows) of each run, where the host knows them; runs of one expert that lie together are one."""
        bounds, found = self.bounds or (), list[tuple[int, slice]]()
        for e, a, b in zip(self.experts, bounds, bounds[1:], strict=False):
            if found and found[-1][0] == e:
                found[-1] = e, slice(found[-1][1].start, b)
            else:
                found.append((e, slice(a, b)))
        return found

    def within(self, rows: slice) -> Runs:
        """The same of a part of the stream, where the host knows the bounds."""
        bounds = [min(max(b, rows.start), rows.stop) - rows.start for b in self.bounds or ()]
        return Runs(self.experts, bounds, self.offsets.clamp(rows.start, rows.stop) - rows.start)


@dataclass
class Linear:
    """An expert's product and what follows it at once. A list is of E tensors, or of one that has them all."""

    x: Tensor  # [T, K]
    weights: Sequence[Tensor]  # [N, K], or [2 N, K] where the activation is gated
    biases: Sequence[Tensor]  # [N] or [2 N]; none: no biases
    activation: str


@dataclass
class FFN:
    """Two products with an activation and a LayerNorm between them; lists as in `Linear`."""

    x: Tensor  # [T, K]
    weights_in: Sequence[Tensor]  # [F, K], or [2 F, K] where the activation is gated
    biases_in: Sequence[Tensor]
    inner_gammas: Sequence[Tensor]  # [F]; none: no norm
    inner_betas: Sequence[Tensor]
    weights_out: Sequence[Tensor]  # [N, F]
    biases_out: Sequence[Tensor]
    activation: str
    inner_eps: float


@dataclass
class Ending:
    """What follows the product: residual + row_scale scale y."""

    residual: Tensor | None  # [T, N]
    scale: Tensor | None  # [N]
    row_scale: Tensor | None  # [T]

    def within(self, rows: slice) -> Ending:
        residual, row_scale = (None if t is None else t[rows] for t in (self.residual, self.row_scale))
        return Ending(residual, self.scale, row_scale)


@dataclass
class Norm:
    """LayerNorm, or RMSNorm if it is not centred; lists as in `Linear`."""

    gammas: Sequence[Tensor]  # [D]; none: no norm
    betas: Sequence[Tensor]  # [D], or none
    centred: bool
    eps: float

    def of_runs(self, runs: Runs) -> Iterator[tuple[int, slice, Tensor | None, Tensor | None]]:
        """Expert, rows, gamma and beta of each run."""
        gamma, beta = by_expert(self.gammas, 1), by_expert(self.betas, 1)
        for e, rows in runs.slices():
            yield e, rows, gamma[e] if gamma else None, beta[e] if beta else None


class Attended(NamedTuple):
    """What attention computes of H heads."""

    out: Tensor  # [T, H d]
    row_max: Tensor  # [H, T] of the scores
    row_sum: Tensor  # [H, T] of exp(score - row_max); apart, both are exact to a rounding


def by_expert(parameters: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """An expert's parameter of `dim` dimensions each, out of a list of them or of one tensor that has them all."""
    if len(parameters) == 1 and parameters[0].dim() > dim:
        return parameters[0].unbind(0)
    return parameters


def flags_by_expert(needs: Sequence[bool], experts: int) -> Sequence[bool]:
    return list(needs) * experts if len(needs) == 1 else needs


def experts_of(
    name: str, given: Tensor | Sequence[Tensor], shape: Sequence[int | str], routing: Routing, x: Tensor
) -> list[Tensor]:
    """A parameter of the experts as a list: of one tensor, or of E tensors of that shape.

    The one is [E, *shape], or has the experts one after another in its first size: [E N, K], [E N].
    """
    e = routing.experts
    if isinstance(given, Tensor):
        flat = given.dim() == len(shape) and given.shape[0] % e == 0
        whole = given.unflatten(0, (e, -1)) if flat else given
        check(name, whole, (e, *shape), ", one for each expert", like=("x", x))
        return [whole]
    if not isinstance(given, (list, tuple)) or len(given) != e:
        what = f"{len(given)} of them" if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(f"{name} is {what}, expected a tensor or {e} tensors, one for each expert")
    first, like = given[0], ("x", x)
    check(f"{name}[0]", first, shape, ", one for each expert", like=like)
    for i, t in enumerate(given):
        if type(t) is not type(first) or t.shape != first.shape or t.dtype != first.dtype or t.device != x.device:
            check(f"{name}[{i}]", t, first.shape, ", one for each expert", like=like)
    return list(given)


def runs_of(routing: Routing, x: Tensor) -> Runs:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is {type(routing).__name__}, expected a Routing")
    if routing.bounds is not None and routing.bounds[-1] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, expected {routing.bounds[-1]} as routing")
    if routing.offsets.device != x.device:
        raise ValueError(f"routing is on {routing.offsets.device}, expected {x.device} as x")
    return Runs(routing.runs, routing.bounds, routing.offsets)
