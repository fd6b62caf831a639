"""The one rule for tolerance, as a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.numerics import error_and_bound

Results = dict[str, Tensor]


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, name: str = "result", slack: float = 2.0) -> None:
    """`got` is at most `slack` times as far from the float64 result as eager is, plus one ulp of its scale."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, expected {eager.dtype}"
    error, bound, allowed = error_and_bound(got, eager, exact, slack)
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g} (eager's own error {allowed:.3g})"


def judge(draws: Iterable[tuple[Results, Results, Results]]) -> None:
    """Each result (ours, eager's, in float64) over all draws: in one, eager's error may be nothing by luck."""
    ours, eager, exact = zip(*draws, strict=True)
    for name in exact[0]:
        got, plain, truth = (torch.stack([r[name] for r in side]) for side in (ours, eager, exact))
        if got.dtype != torch.float64:
            assert_no_worse(got, plain, truth, name)
        else:  # there is nothing more exact: what is left is the order of the sums
            size = truth[truth.isfinite()].abs().sum().item() / max(1, truth.numel())
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-13 * (1 + size), msg=lambda m, n=name: f"{n}: {m}")


def compared(
    run: Callable[[Any, str], Results],
    draw: Callable[[], Any],
    backend: str,
    dtype: torch.dtype = torch.float32,
    draws: int = 4,
) -> Iterator[tuple[Results, Results, Results]]:
    """`run(given, backend)` of an implementation, of the reference, and of the reference in float64."""
    assert backend != "torch", "the reference is compared with a formula, not with itself"
    # the interpreter runs a Triton program in Python
    for _ in range(draws // 2 if backend == "triton" and INTERPRET else draws):
        given = cast(draw(), dtype)
        yield run(given, backend), run(given, "torch"), run(cast(given, torch.float64), "torch")


def cast(given: Any, dtype: torch.dtype) -> Any:
    """The same numbers as leaves in `dtype`; integers stay."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
