"""vector-quantize-pytorch's VectorQuantize and unilm's NormEMAVectorQuantizer on the fused search and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmfuse.fused.quantizer import missing_in_call, quantize
from mmfuse.kernels._runtime.dispatch import forced_backend


def forward(
    vq: Any,
    x: Tensor,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    lens: Tensor | None = None,
    topk: int | None = None,
    sample_codebook_temp: float | None = None,
    freeze_codebook: bool | None = None,
    return_loss_breakdown: bool = False,
    codebook_transform_fn: Callable | None = None,
    ema_update_weight: Tensor | None = None,
    accum_ema_update: bool = False,
    ema_update: bool | None = None,
) -> tuple[Any, ...]:
    """The module's forward; its own still runs where an argument needs all distances, or gathers updates."""
    call = {name: value for name, value in locals().items() if name != "vq"}
    if missing_in_call(vq, call) or vq._codebook.cluster_size.grad is not None:
        return type(vq).forward(vq, **call)
    return quantize(vq, x, mask, lens, freeze_codebook, return_loss_breakdown, ema_update)


def few_scores(vq: Any, x: Any = None, *_: Any, **__: Any) -> bool:
    """Whether there are so few rows and codes that the matrix of distances costs nothing, measured on a CPU."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or forced_backend() is not None:
        return False
    scores = x.numel() // vq.dim * vq.heads * vq.codebook_size
    return isinstance(scores, int) and scores < 1 << 17


def reason_against(vq: Any) -> str | None:
    """Why a VectorQuantize has to keep its own forward, or None."""
    book = vq._codebook
    options = {
        "samples its codes": book.gumbel_sample.keywords.get("stochastic"),
        "passes gradients to all codes": book.gumbel_sample.keywords.get("straight_through"),
        "has a cross-entropy commitment loss": vq.commitment_use_cross_entropy_loss,
        "has a diversity loss": vq.has_codebook_diversity_loss,
        "has an orthogonality loss": vq.has_codebook_orthogonal_loss,
        "reparametrizes directions": vq.directional_reparam,
        "has affine parameters": book.affine_param,
        "has a vq_bridge": book.vq_bridge is not None,
        "has an in-place optimizer": vq.in_place_codebook_optimizer is not None,
        "has sync_update_v": vq.sync_update_v > 0,
    }
    return next((f"it {why}" for why, on in options.items() if on), None)
