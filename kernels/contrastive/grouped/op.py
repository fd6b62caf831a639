"""The public function of grouped losses: argument checks, autograd, and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import only_named_in_the_interpreter
from mmfuse.kernels.contrastive.arguments import features, weights_of
from mmfuse.kernels.contrastive.backends import (
    no_reason,
    reasons_against_chunked,
    reasons_against_cpu,
    reasons_against_cuda,
    reasons_against_triton,
)
from mmfuse.kernels.contrastive.normalisers import above, normaliser
from mmfuse.kernels.contrastive.op import clip_loss, steps_aside, units

# the gradient matrix of a group is one square of the template
_LARGEST = 8192


def _fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    sizes: list[int],
    dims: list[int],
    w_image: float,
    w_text: float,
    normalize: bool,
    need_image: list[bool],
    need_text: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mmfuse.kernels.contrastive.grouped import kernel

    x, y, x_inv, y_inv = units(image, text, scale, normalize)
    row_max, row_sum, col_max, col_sum, positive = kernel.stats(x, y, scale, sizes, dims)
    diag = torch.cat([s * u for s, u in zip(scale, positive.split(sizes), strict=True)])
    loss = w_image * above(row_max, row_sum, diag) + w_text * above(col_max, col_sum, diag)
    losses = torch.stack([part.mean() for part in loss.split(sizes)])
    found = torch.stack([row_max, row_sum, col_max, col_sum, diag])
    if x_inv is None or y_inv is None:  # an output may not alias an input
        return losses, found, image.new_empty(0), text.new_empty(0), diag.new_empty(0), diag.new_empty(0)
    return losses, found, x, y, x_inv, y_inv


def _fwd_fake(image, text, scale, sizes, dims, w_image, w_text, normalize, *_):  # type: ignore[no-untyped-def]
    r, new = image.shape[0], scale.new_empty
    unit = (torch.empty_like(image), torch.empty_like(text)) if normalize else (image.new_empty(0), text.new_empty(0))
    inverse = (new(r), new(r)) if normalize else (new(0), new(0))
    return new(len(sizes)), new((5, r)), *unit, *inverse


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, *ctx.options = inputs
    _, found, x, y, x_inv, y_inv = output
    x, y = (x, y) if x_inv.numel() else (image, text)
    ctx.save_for_backward(x, y, scale, found, x_inv, y_inv)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 10
    sizes, dims, w_image, w_text, _, need_image, need_text = ctx.options
    needs = ctx.needs_input_grad[:3]
    need_image, need_text = [n and needs[0] for n in need_image], [n and needs[1] for n in need_text]
    grads = grouped_bwd(g, *ctx.saved_tensors, sizes, dims, w_image, w_text, need_image, need_text, needs[2])
    return (*(d if need else None for d, need in zip(grads, needs, strict=True)), *[None] * 7)


def _bwd(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    found: Tensor,
    x_inv: Tensor,
    y_inv: Tensor,
    sizes: list[int],
    dims: list[int],
    w_image: float,
    w_text: float,
    need_image: list[bool],
    need_text: list[bool],
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from mmfuse.kernels.contrastive.grouped import kernel

    row_max, row_sum, col_max, col_sum, diag = found
    rho, a, miss = normaliser(row_max, row_sum, diag)
    kappa, b, col_miss = normaliser(col_max, col_sum, diag)
    alpha = torch.stack([part / max(size, 1) for part, size in zip(g.to(scale.dtype), sizes, strict=True)])
    d = -w_image * miss - w_text * col_miss
    inv, other_inv = (x_inv, y_inv) if x_inv.numel() else (None, None)
    weighted = (scale, alpha, w_image * a, rho, w_text * b, kappa, d)
    return kernel.grad(x, y, *weighted, sizes, dims, inv, other_inv, need_image, need_text, need_scale)


def _bwd_fake(g, x, y, scale, found, x_inv, y_inv, sizes, dims, w_image, w_text, need_image, need_text, need_scale):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if any(need_image) else 0),
        y.new_empty(y.shape if any(need_text) else 0),
        scale.new_empty(scale.shape if need_scale else 0),
    )


grouped_bwd = register("grouped_clip_bwd", _bwd, _bwd_fake)
grouped_fwd = register("grouped_clip_fwd", _fwd, _fwd_fake, setup_context=_setup, backward=_backward)


def _one_launch(
    images: list[Tensor], texts: list[Tensor], scales: list[Tensor], w_image: float, w_text: float, normalize: bool
) -> Tensor:
    sizes, dims = [len(t) for t in images], [t.shape[1] for t in images]
    graph = torch.is_grad_enabled()
    needs = ([graph and t.requires_grad for t in side] for side in (images, texts))
    x, y = (torch.cat([F.pad(t, (0, max(dims) - t.shape[1])) for t in side]) for side in (images, texts))
    return grouped_fwd(x, y, torch.stack(scales), sizes, dims, w_image, w_text, normalize, *needs)[0]


def _one_by_one(
    backend: str,
    images: list[Tensor],
    texts: list[Tensor],
    scales: list[Tensor],
    w_image: float,
    w_text: float,
    normalize: bool,
) -> Tensor:
    options: dict[str, Any] = {"weights": (w_image, w_text), "normalize": normalize, "backend": backend}
    return torch.stack([clip_loss(*group, **options) for group in zip(images, texts, scales, strict=True)])


def _reasons_against_triton(image: Tensor, text: Tensor) -> list[str]:
    large = len(image) > _LARGEST
    return reasons_against_triton(image) + ([f"a group has {len(image)} rows, more than {_LARGEST}"] if large else [])


def _largest(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`reasons` of the group with the most rows."""

    def of(images: Sequence[Tensor] | Tensor, texts: Sequence[Tensor] | Tensor, *_: object) -> list[str]:
        if isinstance(images, Tensor):
            return reasons(images, texts)
        sizes = [len(image) for image in images]
        at = sizes.index(max(sizes))
        return reasons(images[at], texts[at])

    return of


_aside = _largest(partial(steps_aside, "clip_loss"))
GROUPED = Op(
    "grouped_clip_loss",
    [
        Impl("triton", _one_launch, _largest(_reasons_against_triton), _largest(only_named_in_the_interpreter)),
        Impl("cuda", partial(_one_by_one, "cuda"), _largest(reasons_against_cuda)),
        Impl("cpu", partial(_one_by_one, "cpu"), _largest(reasons_against_cpu), _aside),
        Impl("chunked", partial(_one_by_one, "chunked"), _largest(reasons_against_chunked), _aside),
        Impl("torch", partial(_one_by_one, "torch"), no_reason),
    ],
)


def grouped_clip_loss(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scales: Sequence[Tensor | float] | Tensor,
    *,
    normalize: bool = False,
    weights: tuple[float, float] = (0.5, 0.5),
    backend: str | None = None,
) -> Tensor:
    """`clip_loss` of several independent batches; on a GPU each kernel is launched once for all of them.

    For models with more than one contrastive problem per step: VLMo's two pairs of towers (Bao et al. 2022, section
    3.2), ImageBind's pairs of modalities, each with a scale of its own (Girdhar et al. 2023, equation 1).

    Args:
        images, texts: for each group [b_g, D_g] and [b_g, D_g], float16, bfloat16, float32 or float64, any strides; the
            same dtype and device in all groups, sizes as they come. Row i of an image pairs with row i of its text.
        logit_scales: for each group the multiplier, already exponentiated: floats or tensors of one element, or [G].
        normalize: divide each row by its L2 norm first, inside the operator.
        weights: (w_r, w_c) of the image-to-text and the text-to-image direction, of all groups.
        backend: "triton" (one launch; groups of at most 8192 rows), or one that takes the groups one by one: "cuda",
            "cpu", "chunked", "torch". By default the first that accepts the largest group.

    Returns:
        The losses [G], in float32 (float64 for float64 features).
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable once in all features and scales.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    given = [list(images), list(texts), list(logit_scales)]
    if not given[0] or len({len(t) for t in given}) != 1:
        raise ValueError(
            f"images, texts and logit_scales have {', '.join(str(len(t)) for t in given)} groups, expected as many of "
            "each, and at least one"
        )
    found = []
    for i, (image, text, scale) in enumerate(zip(*given, strict=True)):
        found.append(features(image, text, scale, 0, paired=False, names=(f"images[{i}]", f"texts[{i}]")))
        x, y = found[i][:2]
        if len(x) != len(y):
            raise ValueError(f"texts[{i}] has {len(y)} rows, expected {len(x)} as images[{i}]")
        if x.dtype != found[0][0].dtype:
            raise TypeError(f"images[{i}] has dtype {x.dtype}, expected {found[0][0].dtype} as images[0]")
        if x.device != found[0][0].device:
            raise ValueError(f"images[{i}] is on {x.device}, expected {found[0][0].device} as images[0]")
    w_image, w_text = weights_of(weights)
    sides = [list(side) for side in zip(*found, strict=True)]
    impl = GROUPED.select(*sides, backend=backend)
    return impl.fn(*sides, w_image, w_text, normalize)
