"""The one rule for tolerance, as a check."""

from __future__ import annotations

from torch import Tensor

from mmfuse.kernels._runtime.numerics import error_and_bound


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, name: str = "result", slack: float = 2.0) -> None:
    """`got` is at most `slack` times as far from the float64 result as eager is, plus one ulp of its scale."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    error, bound, allowed = error_and_bound(got, eager, exact, slack)
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g} (eager's own error {allowed:.3g})"
