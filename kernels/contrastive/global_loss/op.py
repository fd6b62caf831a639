"""The public global contrastive loss: argument checks and declaration.

It is the template with normalisers from outside: a_i exp(S_ij - rho_i) = exp(S_ij - S_ii) / ((N - 1)(u_i + eps)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Operator
from mmfuse.kernels._runtime.arguments import check
from mmfuse.kernels.contrastive.arguments import features, needs_gradient
from mmfuse.kernels.contrastive.backends import of_template
from mmfuse.kernels.contrastive.blocked import finite
from mmfuse.kernels.contrastive.global_loss import reference
from mmfuse.kernels.contrastive.op import PAIRS, Pair, kept_logits, normalize_pair, normalize_pair_kept


class Outputs(NamedTuple):
    loss: Tensor
    new_log_u: Tensor  # [N]
    new_log_w: Tensor  # [N]
    normalisers: Tensor  # [5, N]: a, rho, b, kappa, and the sums of the rows and the columns of G
    logits: Tensor  # [N, N] as `save` says, or empty
    x: Tensor  # the features normalised, or empty where they were given so
    y: Tensor
    x_inv: Tensor  # one over their norms, or empty
    y_inv: Tensor


def _forward(
    passes: Any,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    log_u: Tensor,
    log_w: Tensor,
    gamma: float,
    eps: float,
    normalize: bool,
    save: str,
) -> Outputs:
    pair = normalize_pair(image, text, normalize)
    row_max, row_sum, col_max, col_sum, positive, logits = passes.stats(pair.x, pair.y, scale, 0, save)
    # float64 for the N exponents: one of 100 has 7e-6 for its last digit in float32
    diag = scale * positive.double()
    log_u, a = _weights(row_max, row_sum, diag, log_u, gamma, eps)
    log_w, b = _weights(col_max, col_sum, diag, log_w, gamma, eps)
    # g / (u + eps) + h / (w + eps), which are the sums of the rows and of the columns of G
    ratios = a * row_sum + b * col_sum
    loss = ratios.mean() / scale
    normalisers = torch.stack([a, finite(row_max), b, finite(col_max), ratios])
    return Outputs(loss, log_u, log_w, normalisers, logits, *normalize_pair_kept(pair, normalize))


def _weights(m: Tensor, l: Tensor, diag: Tensor, log_u: Tensor, gamma: float, eps: float) -> tuple[Tensor, Tensor]:  # noqa: E741
    """(new log u, a): a exp(S_ij - m) is exp(S_ij - S_ii) / ((N - 1)(u + eps)), of which l is the sum over a = 1."""
    most = m - diag - math.log(max(len(diag) - 1, 1))
    new = reference.moving_average(log_u.double(), most + torch.log(l.double()), gamma)
    a = torch.exp(most - reference.log_divisor(new, eps))
    return new.to(m.dtype), a.to(m.dtype)


def _fake(image: Tensor, text: Tensor, scale: Tensor, normalize: bool, save: str) -> Outputs:
    n, new = image.shape[0], scale.new_empty
    logits = new((n, n), dtype=torch.int16 if save == "int16" else scale.dtype) if save else new(0)
    kept = normalize_pair_kept(normalize_pair(image, text, normalize), normalize)
    return Outputs(new(()), new(n), new(n), new((5, n)), logits, *kept)


def _backward(
    passes: Any, g: Tensor, pair: Pair, scale: Tensor, normalisers: Tensor, logits: Tensor, gamma: float, needs: Any
) -> dict[str, Tensor]:
    # u >= gamma g: gamma G is bounded by 2, as float16 needs it
    alpha = g.to(scale.dtype) / (gamma * max(len(pair.x), 1) * scale)
    a, rho, b, kappa, ratios = normalisers
    weighted = (gamma * a, rho, gamma * b, kappa, -gamma * ratios)
    dx, dy, ds = passes.grad(pair.x, pair.y, scale, alpha, *weighted, 0.0, 0, logits, *pair.inverses, *needs)
    return {"image": dx, "text": dy, "scale": ds}


GLOBAL = Operator(
    "global_contrastive_loss",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=("image", "text", "scale"),
    instead={"x": "image", "y": "text"},
    implementations=of_template(lambda save, **given: reference.global_contrastive_loss(**given)),
    size=PAIRS,
    example=lambda x, **how: global_contrastive_loss(x, x, 1.0, x.new_zeros(len(x)), x.new_zeros(len(x)), 0.5, **how),
)


def global_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    log_u: Tensor,
    log_w: Tensor,
    gamma: float,
    *,
    eps: float = 1e-14,
    normalize: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's loss with the normalisers of the whole data set, which every sample estimates by a moving average.

    With S = s image @ text.T, g_i = mean_{j != i} exp(S_ij - S_ii) and u_i <- (1 - gamma) u_i + gamma g_i for the rows,
    h and w likewise for the columns (exp(S_ji - S_ii)):

    L = (1/s) mean_i(g_i / (u_i + eps) + h_i / (w_i + eps)), where u, w and the factor 1/s are constants to the gradient
    (SogCLR, Yuan et al. 2022; FastCLIP-v1, Wei et al. 2024). The gradient does not need a large batch; the value is no
    measure of progress: 2/s where u and w equal g and h. `mmfuse.fused.GlobalContrastiveLoss` keeps u and w.

    Args:
        image, text: [N, D], the same dtype (float16, bfloat16, float32 or float64) and device; any strides. Row i of
            `image` pairs with row i of `text`.
        logit_scale: s, the multiplier, already exponentiated: a float, or a tensor of one element. Its gradient is that
            of the formula with 1/s constant, as FastCLIP's `multiply_tau` has it.
        log_u, log_w: [N], log u and log w of these samples before the update; -inf (or NaN): not seen yet, u is then g.
        gamma: the weight of the new value, 0 < gamma <= 1.
        eps: added to u and w in the loss, not in what is returned.
        normalize: divide each row by its L2 norm first, inside the operator.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        (loss, log_u, log_w): the loss, a scalar, and the updated logarithms [N], without a graph, in float32 (float64
        for float64 features). A single pair has no negatives: its loss is 0.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    The logits are kept for the backward as `mmfuse.clip_loss` does it with save="auto". Deterministic: two runs are
    equal bitwise. Differentiable in image, text and logit_scale.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    image, text, scale = features(image, text, logit_scale, 0)
    check("text", text, image.shape, " as image")
    for name, t in (("log_u", log_u), ("log_w", log_w)):
        check(name, t, image.shape[:1], " as image has rows", like=("image", image))
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected a number in (0, 1]")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number >= 0")
    old = (t.detach().to(scale.dtype) for t in (log_u, log_w))
    save = kept_logits("auto", None, image, text.shape[0]) if needs_gradient(image, text, scale) else ""
    found = GLOBAL(image, text, scale, *old, float(gamma), float(eps), normalize, save, backend=backend)
    return found[:3]
