"""Softmaxes over the negatives' (max m, sum l) and the positive, which keep their digits as the loss goes to 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfuse.kernels.contrastive.blocked import finite


def over_their_sum(w_image: float, w_text: float) -> tuple[float, float, float]:
    """The weights over their sum, by which G is of the size of a probability, as float16 needs it; and the sum."""
    total = w_image + w_text or 1.0
    return w_image / total, w_text / total, total


def merged(maxima: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(m, l) of the union of sets, from those of each."""
    parts = torch.stack(list(maxima))
    m = parts.amax(0)
    return m, (torch.stack(list(sums)) * torch.exp(parts - finite(m))).sum(0)


def negative_log_prob(m: Tensor, l: Tensor, diag: Tensor) -> Tensor:  # noqa: E741
    """rho - S_ii = log(1 + l e^(m - S_ii)), which keeps its digits down to a loss of 0, where a difference does not.

    NaN where S_ii is +inf, as that difference.
    """
    return torch.logaddexp(torch.log(l) + (m - diag), zero_below_inf(diag))


def zero_below_inf(x: Tensor) -> Tensor:
    """0, and NaN where x is +inf or NaN."""
    return x.clamp_min(0) * 0


def times(weight: float, t: Tensor) -> Tensor:
    """weight * t; 0 of a direction of weight 0, where NaN counts for nothing."""
    return weight * t if weight else torch.zeros_like(t)


def weighed(weight: float, r: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(r, weight / Z) of a direction: what is left of a weight of 0 is 0 e^(S - inf)."""
    return r if weight else torch.full_like(r, torch.inf), times(weight, inverse)


def normaliser(m: Tensor, l: Tensor, diag: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """(r, 1 / Z, 1 - P_ii): the softmax over the negatives and the positive is exp(S - r) / Z with r its maximum."""
    r = torch.maximum(m, diag)
    negatives = l * torch.exp(m - r)
    z = negatives + torch.exp(diag - r)
    return r, 1 / z, negatives / z


def column_normaliser(m: Tensor, l: Tensor, diag: Tensor, pairs: slice) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """(r, 1 / Z [N], 1 - Q_ii [b]); 1 / Z is 0 where there is no positive."""
    r, inverse = finite(m), torch.zeros_like(l)
    r[pairs], inverse[pairs], miss = normaliser(m[pairs], l[pairs], diag)
    return r, inverse, miss
