"""The one rule for tolerance: no result may be much further from float64 than eager PyTorch's in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def error_and_bound(got: Tensor, eager: Tensor, exact: Tensor, slack: float = 2.0) -> tuple[float, float, float]:
    """(error of `got`, largest error allowed, error of `eager`), each the largest over the elements.

    `exact` is the float64 result on the same inputs. Allowed is `slack` times eager's error plus one ulp, in the dtype
    of `got`, of the result's largest magnitude (or the smallest normal number): what rounding alone may do. A NaN that
    float64 does not have, or the reverse, is an infinite error.
    """
    if got.numel() == 0:
        return 0.0, 0.0, 0.0
    if not torch.equal(got.isnan(), exact.isnan()):
        return torch.inf, 0.0, 0.0
    error, allowed = (torch.nan_to_num((t.double() - exact).abs()).max().item() for t in (got, eager))
    info = torch.finfo(got.dtype)
    floor = info.eps * torch.nan_to_num(exact.abs()).max().item() + info.tiny
    return error, slack * allowed + floor, allowed
