"""The k largest scores of each query on the whole matrix: their meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype


def similarity_topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(queries.dtype)
    s = numbers(queries.to(acc) @ gallery.to(acc).t())
    value, index = s.sort(dim=1, descending=True, stable=True)
    return value[:, :k].contiguous(), index[:, :k].contiguous()


def numbers(s: Tensor) -> Tensor:
    """NaN and -inf as the lowest number."""
    lowest = torch.finfo(s.dtype).min
    return torch.where(s >= lowest, s, lowest)
