"""The one rule for tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, name: str = "result", slack: float = 2.0) -> None:
    """`got` is at most `slack` times as far from the float64 result as eager PyTorch in the same dtype is.

    The floor is one ulp, in the result's dtype, of the result's largest magnitude (or the smallest normal number):
    what rounding alone may do.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN where there is none in float64, or the reverse"
    error, allowed = (torch.nan_to_num((t.double() - exact).abs()).max() for t in (got, eager))
    info = torch.finfo(got.dtype)
    floor = info.eps * torch.nan_to_num(exact.abs()).max() + info.tiny
    bound = slack * allowed + floor
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g} (eager's own error {allowed:.3g})"
