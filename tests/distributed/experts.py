"""What each rank runs in the test of modality experts: a rank may have images alone, or texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmfuse.fused.multiway import MultiwayBlock
from mmfuse.kernels import Routing


def block() -> MultiwayBlock:
    torch.manual_seed(0)
    return MultiwayBlock(2, 8, 2, 16).double()


def loss(model: torch.nn.Module, step: int, rank: int, split: int) -> Tensor:
    torch.manual_seed(10 * step + rank)
    return model(torch.randn(15, 8, dtype=torch.float64), Routing.from_split(3, 5, split)).square().sum()


def trained(rank: int, size: int, splits: list[list[int]]) -> dict[str, Tensor]:
    """Gradients of the last of some steps; nobody looks for parameters without a part in the loss."""
    model = DistributedDataParallel(block())
    for step, of_ranks in enumerate(splits):
        model.zero_grad()
        loss(model, step, rank, of_ranks[rank]).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}
