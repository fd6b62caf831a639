"""Modality experts under DistributedDataParallel: an expert without rows has zeros, as its bucket needs a gradient."""

from __future__ import annotations

import pytest
import torch

import worlds
from distributed import experts


@pytest.mark.parametrize("splits", [[[5, 0], [2, 5]], [[5, 5]]], ids=["one modality each", "images alone"])
def test_ranks_without_a_modality(splits: list[list[int]]) -> None:
    model, last = experts.block(), len(splits) - 1
    for rank, split in enumerate(splits[last]):
        (experts.loss(model, last, rank, split) / 2).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for got in worlds.run(2, experts.trained, splits):
        torch.testing.assert_close(got, want)
    if splits == [[5, 5]]:
        assert all(not g[1].any() and g[0].any() for g in want.values())
