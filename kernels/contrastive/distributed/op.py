"""CLIP's and SigLIP's losses over the processes of a group: argument checks, autograd, declarations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Implementation, Operator, Size, UnsupportedError
from mmfuse.kernels._runtime.arguments import check, one_of, scalar
from mmfuse.kernels._runtime.dispatch import forced_backend
from mmfuse.kernels._runtime.registration import differentiable_once, without_autocast
from mmfuse.kernels.contrastive import op
from mmfuse.kernels.contrastive.arguments import features, needs_gradient, weights_of
from mmfuse.kernels.contrastive.backends import TEMPLATE
from mmfuse.kernels.contrastive.distributed import reference
from mmfuse.kernels.contrastive.distributed.exchange import EXCHANGES, Gather, RingExchange
from mmfuse.kernels.contrastive.distributed.peers import Peers, agree_on_sizes, members, refuse
from mmfuse.kernels.contrastive.distributed.reference import Mode
from mmfuse.kernels.contrastive.normalisers import (
    merged,
    negative_log_prob,
    normaliser,
    over_their_sum,
    times,
    weighed,
)

GradScale = Literal["open_clip", "true"]
DistImpl = Literal["bidir", "shift", "reduce", "gather"]


def _implementations(fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> list[Implementation]:
    kernels = {"triton": [TEMPLATE["triton"].module]}
    implementations = [
        Implementation(name, function=partial(fused, name), kernels=kernels.get(name, ())) for name in TEMPLATE
    ]
    return [*implementations, Implementation("torch", function=plain)]


def _pairs(peers: Peers | None) -> int | None:
    return None if peers is None else max(peers.sizes) * peers.total


# the most rows of a rank times all ranks' rows; what was measured with 2 ranks on 2 cores holds for all
_SIZE = Size("pairs", _pairs, columns=lambda image: image.shape[1], alike=True)


def _nonzero(number: Tensor) -> Tensor:
    """Where 0, a number next to it: one can divide by it, and what it multiplies vanishes all the same."""
    return torch.where(number == 0, 1e-30, number)


# --- CLIP ------------------------------------------------------------------------------------------------------------


class _Clip(torch.autograd.Function):
    """Each rank's own rows against all texts, once. Columns are whole after an exchange of O(N) numbers."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, peers: Peers, mode: Mode, backend: str) -> Tensor:
        exchange = (RingExchange if mode.ring else Gather)(peers)
        stats = TEMPLATE[backend].stats
        with without_autocast(image):
            ys: list[Tensor] = []
            found = []
            for y, at in exchange.blocks(text):
                # the own texts first; where there are no positives, the diagonal is beside the block
                found.append(stats(image, y, scale, len(y) if at is None else at, mode.save))
                if exchange.keeps or not ys:
                    ys.append(y)
            row_maxima, row_sums, col_maxima, col_sums, (positive, *_), logits = zip(*found, strict=True)
            row_max, row_sum = merged(row_maxima, row_sums)
            diag = scale * positive
            # the columns of all ranks: their largest logit, then the negatives' and the positive's share of the sum
            col_max, col_sum = exchange.whole(*col_maxima), exchange.whole(*col_sums)
            own = exchange.whole(diag, *(torch.full_like(m, -torch.inf) for m in col_maxima[1:]))
            kappa = peers.max_(torch.maximum(col_max, own))
            negatives, positives = peers.sum_(
                torch.stack([col_sum * torch.exp(col_max - kappa), torch.exp(own - kappa)])
            )
            row = negative_log_prob(row_max, row_sum, diag)
            column = negative_log_prob(exchange.by_block(kappa)[0], exchange.by_block(negatives)[0], diag)
            loss = (times(mode.w_image, row) + times(mode.w_text, column)).sum() / mode.divisor
            if not mode.local_loss:
                peers.sum_(loss)
        ctx.settings = exchange, mode, backend
        ctx.save_for_backward(image, text, scale, row_max, row_sum, diag, kappa, negatives, positives, *logits, *ys)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Clip._gradients(ctx, g)
        return differentiable_once("distributed_clip_loss", grads, ctx.saved_tensors[:3])

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        exchange, mode, backend = ctx.settings
        x, _, scale, row_max, row_sum, diag, kappa, negatives, positives, *kept = ctx.saved_tensors
        need_x, need_y, need_s = ctx.needs_input_grad[:3]
        peers = exchange.peers
        with without_autocast(x):
            z = negatives + positives
            rho, a, miss = normaliser(row_max, row_sum, diag)
            w_image, w_text, total = over_their_sum(mode.w_image, mode.w_text)
            (rho, a), (kappa, b) = weighed(w_image, rho, a), weighed(w_text, kappa, 1 / z)
            # P_ii - 1 without cancellation, likewise the columns
            d = times(-w_image, miss) + times(-w_text, exchange.by_block(negatives / z)[0])

            # the ranks' upstream gradients may differ: row i and column j belong to a rank each
            ranks = peers.each(g.to(scale.dtype) * (total / mode.divisor))
            if mode.local_loss:
                alpha = _nonzero(ranks.abs().max())
                share = ranks / alpha
                own = share[peers.rank]
                a, b, d = a * own, b * exchange.spread(share), d * own
            else:
                alpha = _nonzero(ranks.sum() if mode.gather_with_grad else ranks.abs().max())

            def grad(y: Tensor, a: Tensor, b: Tensor, kappa: Tensor, at: int, u: Tensor, *needs: bool) -> Any:
                args = (x, y, scale, alpha, a, rho, b, kappa, d, 0.0, at, u, None, None, *needs)
                return TEMPLATE[backend].grad(*args, wide=True)

            bs, kappas = exchange.by_block(b), exchange.by_block(kappa)
            logits, ys = kept[: len(bs)], kept[len(bs) :]
            dx = torch.zeros(x.shape if need_x else 0, dtype=scale.dtype, device=x.device)
            ds, no_rows = torch.zeros_like(scale), torch.zeros_like(a)
            split = need_s and mode.local_loss and mode.split_scale
            of_columns = scale.new_zeros(peers.size)

            def of_block(i: int, y: Tensor) -> Tensor:
                b, kappa, u = bs[i], kappas[i], logits[i]
                dx_part, dy, ds_part = grad(y, a, b, kappa, len(y) if i else 0, u, need_x, need_y, need_s)
                if need_x:
                    dx.add_(dx_part)
                if need_s:
                    ds.add_(ds_part)
                for r, cols in exchange.columns(i) if split and i else ():
                    # int16 logits are in steps of the whole block's
                    floats = u.dim() == 2 and u.is_floating_point()
                    part = u[:, cols].contiguous() if floats else scale.new_empty(0)
                    at = len(bs[i][cols])
                    of_columns[r] += grad(y[cols], no_rows, b[cols], kappa[cols], at, part, False, False, True)[2]
                return dy

            dy = exchange.gradients(ys, of_block, need_y)
            if not mode.local_loss and not mode.gather_with_grad:
                factor = ranks[peers.rank] / alpha
                dx, dy = (t * factor if need else t for t, need in ((dx, need_x), (dy, need_y)))
            if need_s and not mode.local_loss:
                ds = peers.sum_(ds / alpha) * ranks[peers.rank]
            elif split:
                # open_clip's scale gets the rows and the columns of this rank's positives, not the rows of all columns
                ds = ds - of_columns.sum() + peers.sum_(of_columns)[peers.rank]
        grads = ((t if need else None) for t, need in ((dx.to(x.dtype), need_x), (dy, need_y), (ds, need_s)))
        return (*grads, None, None, None)


def _fused_clip(backend: str, image: Tensor, text: Tensor, scale: Tensor, peers: Peers, mode: Mode) -> Tensor:
    if mode.gather_with_grad or not mode.local_loss:
        return _Clip.apply(image, text, scale, peers, mode, backend)
    # the other ranks' features are constants: two losses of one direction, the images under way during the first
    texts, images = (peers.gathering(t.detach()) for t in (text, image))
    kept: dict[str, Any] = {"save": "recompute"}
    if mode.save:
        kept = {"save": "store", "store_budget": 0 if mode.save == "int16" else 1 << 62}
    losses = []
    for own, others, w in ((image, texts, mode.w_image), (text, images, mode.w_text)):
        all_ranks = others()
        if len(own):
            at = peers.own.start
            losses.append(op.clip_loss(own, all_ranks, scale, weights=(w, 0.0), row_offset=at, backend=backend, **kept))
    return losses[0] + losses[1] if losses else (image.sum() + text.sum()).to(scale.dtype) * scale


DISTRIBUTED_CLIP: Operator = Operator(
    "distributed_clip_loss",
    forward=reference.clip_loss,
    implementations=_implementations(_fused_clip, reference.clip_loss),
    size=_SIZE,
    # outside of a group
    example=lambda x, **how: DISTRIBUTED_CLIP(x, x, x.new_ones(()), None, None, **how),
)


@torch.compiler.disable
def distributed_clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    group: Any = None,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    grad_scale: GradScale = "open_clip",
    weights: tuple[float, float] = (0.5, 0.5),
    sizes: Sequence[int] | None = None,
    dist_impl: Literal["gather", "ring"] = "gather",
    save: op.Save = "auto",
    store_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """CLIP's symmetric cross-entropy over the pairs of all processes of a group; each computes its own rows, once.

    L = sum_i w_r (rho_i - S_ii) + w_c (kappa_i - S_ii) over all N pairs of the group or the b of this rank, divided by
    their number (Radford et al. 2021, figure 3; the modes are those of `open_clip.loss.ClipLoss`). The texts are
    gathered, in parts, while the own texts and earlier parts are computed; the columns' log-sum-exps are merged over
    ranks from O(N) numbers; the texts' gradients are summed at their ranks, in the same parts, while the others and the
    own are computed. 8 b N D operations of multiply-adds per rank, 6 where the logits are kept.

    Args:
        image: [b, D] of this rank, float16, bfloat16, float32 or float64; any strides. b may differ by rank, and be 0.
        text: [b, D], same dtype and device. Row i pairs with row i of `image`.
        logit_scale: the multiplier, already exponentiated: a float, or a tensor of one element. The same on all ranks.
            One that is not finite gives NaN.
        group: a process group that this process is in; None is the default group.
        local_loss: return this rank's part of the loss, not the loss of the global batch.
        gather_with_grad: the features of a rank get the gradient of every rank's loss, not of its own alone.
        grad_scale: "open_clip": value and gradients are on every rank those of `ClipLoss(local_loss, gather_with_grad)`
            on the same features. "true": `gather_with_grad` does not matter, and the mean over ranks of the parameters'
            gradients (what DistributedDataParallel makes) is the gradient of the global batch's loss.
        weights: (w_r, w_c) of the image-to-text and the text-to-image direction.
        sizes: every rank's b, where it is known: nothing is exchanged to learn it, and nothing compared. The host then
            waits for nothing, and a CUDA graph can be captured.
        dist_impl: "gather": every rank has all texts, N D elements, and all gradients of them on their way. "ring": the
            texts go around in the forward, and once more with their gradients, 2 blocks of either at a time: half as
            many bytes more. Not for `local_loss` alone, whose two losses need all features.
        save, store_budget: as in `mmfuse.clip_loss`, for the b x N logits; "auto" keeps none with "ring".
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features). With `local_loss` and unequal b: for "open_clip"
        the mean over this rank's own pairs (0 without any), as its code would give, so that the mean over the W ranks
        weighs the pairs of small ranks more; for "true" W / N times their sum, so that the mean is the global loss.

    Every rank of the group has to call this, and backward, the same number of times and in the same order; the factor
    that the loss is multiplied with may differ by rank. With "open_clip", `local_loss` and `gather_with_grad`, a
    gradient of `logit_scale` costs 2 b (N - b) D more operations (none if float logits are kept) for open_clip's split
    over ranks, whose mean is that of "true". Deterministic as far as the group's reductions are: nothing is summed in
    the order in which it arrives. Differentiable once in image, text and logit_scale. Under torch.compile the graph
    breaks around the call.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs between ranks; the message names it.
        RuntimeError: another rank's arguments do not fit, or it did not answer within the group's timeout.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    with _telling(group, sizes):
        image, text, scale = features(image, text, logit_scale, None)
        check("text", text, image.shape, ", as image: row i of both is a pair")
        w = weights_of(weights)
        one_of("grad_scale", grad_scale, get_args(GradScale))
        one_of("save", save, get_args(op.Save))
        one_of("dist_impl", dist_impl, ("gather", "ring"))
        true = grad_scale == "true"
        local_loss = bool(local_loss)
        gather_with_grad = bool(gather_with_grad) or true or members(group)[1] == 1  # alone, there is nothing to gather
        ring = dist_impl == "ring"
        if ring and local_loss and not gather_with_grad:
            raise ValueError("dist_impl is 'ring', expected 'gather' for local_loss without gather_with_grad")
        DISTRIBUTED_CLIP.choose((image, text, scale, None, None), backend)
    settings = {"grad_scale": grad_scale, "local_loss": local_loss, "gather_with_grad": gather_with_grad}
    given = {"image": image, "text": text, "logit_scale": scale}
    peers = _agree(group, sizes, backend, given, loss="clip_loss", dist_impl=dist_impl, **settings)
    divisor: float = max(1, peers.total)
    if local_loss:
        divisor = divisor / peers.size if true else max(1, len(image))
    save = "recompute" if ring and save == "auto" else save
    kept = op.kept_logits(save, store_budget, image, peers.total) if needs_gradient(image, text, scale) else ""
    split_scale = not true and peers.size > 1
    mode = Mode(local_loss, gather_with_grad, split_scale, float(divisor), *w, kept, ring)
    # the choice is the same on all ranks, now that they are known
    return DISTRIBUTED_CLIP(image, text, scale, peers, mode, backend=backend)


def _agree(
    group: Any, sizes: Sequence[int] | None, backend: str | None, features: dict[str, Tensor], **settings: bool | str
) -> Peers:
    """The ranks' numbers of rows; what their collectives depend on is the same."""
    wanted: dict[str, bool | str] = {f"gradient of {name}": needs_gradient(t) for name, t in features.items()}
    settings |= {"backend": backend or forced_backend() or ""}
    return agree_on_sizes(group, features["image"], sizes, wanted | settings)


@contextmanager
def _telling(group: Any, sizes: Sequence[int] | None) -> Iterator[None]:
    """An error of this rank's arguments reaches the others before it is raised."""
    members(group)
    try:
        yield
    except (TypeError, ValueError, UnsupportedError):
        if sizes is None:
            refuse(group)
        raise


# --- SigLIP ----------------------------------------------------------------------------------------------------------


class _Siglip(torch.autograd.Function):
    """The loss and its gradients block by block as the other ranks' texts come; backward sends theirs home."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, exchange: Any, needs: Any, backend: str
    ) -> Tensor:
        need_x, need_y = needs
        sums = scale.new_zeros(3)
        dx = torch.zeros(image.shape if need_x else 0, dtype=scale.dtype, device=image.device)
        dys = []
        with without_autocast(image):
            for y, positives_at in exchange.blocks(text):
                paired = positives_at is not None
                loss, dx_part, dy, ds, db = TEMPLATE[backend].sigmoid(
                    image, y, scale, bias, positives_at or 0, not paired, None, None, need_x, need_y
                )
                sums += torch.stack([loss, ds, db])
                if need_x:
                    dx += dx_part
                dys.append(dy)
        loss, ds, db = sums.unbind()
        ctx.exchange, ctx.text_grad = exchange, need_y
        ctx.save_for_backward(image, text, scale, bias, dx, ds, db, *dys)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Siglip._gradients(ctx, g)
        return differentiable_once("distributed_siglip_loss", grads, ctx.saved_tensors[:4])

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        image, _, _, _, dx, ds, db, *dys = ctx.saved_tensors
        dy = ctx.exchange.home((g * dy).to(image.dtype) for dy in reversed(dys)) if ctx.text_grad else None
        x, _, s, b = ctx.needs_input_grad[:4]
        return (g * dx).to(image.dtype) if x else None, dy, g * ds if s else None, g * db if b else None, *[None] * 3


def _fused_siglip(
    backend: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, peers: Peers, dist_impl: str
) -> Tensor:
    needs = (needs_gradient(image), needs_gradient(text))
    return _Siglip.apply(image, text, scale, bias, EXCHANGES[dist_impl](peers), needs, backend)


DISTRIBUTED_SIGLIP: Operator = Operator(
    "distributed_siglip_loss",
    forward=reference.siglip_loss,
    implementations=_implementations(_fused_siglip, reference.siglip_loss),
    size=_SIZE,
    # outside of a group
    example=lambda x, **how: DISTRIBUTED_SIGLIP(x, x, x.new_ones(()), x.new_zeros(()), None, "bidir", **how),
)


@torch.compiler.disable
def distributed_siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: Any = None,
    dist_impl: DistImpl = "bidir",
    sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss of this rank's images and the texts of all processes of a group.

    L_r = (1/b) sum_i sum_j softplus(-z_ij S_ij) over this rank's b images and all N texts (Zhai et al. 2023, equation 1
    and section 3.3; value and gradients on every rank are those of `open_clip.loss.SigLipLoss`). With equal b the mean
    over ranks is the loss of the global batch, and the mean of the parameters' gradients is its gradient. Three matrix
    products, gradients in the forward; no block of logits outlives its pass, where open_clip keeps W of b x b.

    Args:
        image: [b, D] of this rank, float16, bfloat16, float32 or float64; any strides. b may differ by rank, and be 0.
        text: [b, D], same dtype and device. Row i pairs with row i of `image`.
        logit_scale: the multiplier, already exponentiated: a float, or a tensor of one element. The same on all ranks.
            One that is not finite gives NaN.
        logit_bias: a float, a tensor of one element, or None for 0. The same on all ranks.
        group: a process group that this process is in; None is the default group.
        dist_impl: how the texts travel, the next block under way while one is computed: around a ring in both
            directions ("bidir") or one ("shift"), each rank's in turn to all ("reduce"), or all at once ("gather").
        sizes: every rank's b, where it is known: nothing is exchanged to learn it, and nothing compared. The host then
            waits for nothing, and a CUDA graph can be captured.
        backend: "cuda", "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features). Memory beside the inputs: the texts' gradients
        [N, D], and one more block of texts ("gather": [N, D]).

    Every rank of the group has to call this, and backward, the same number of times and in the same order; the factor
    that the loss is multiplied with may differ by rank. Deterministic as far as the group's reductions are.
    Differentiable once. Under torch.compile the graph breaks around the call.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs between ranks; the message names it.
        RuntimeError: another rank's arguments do not fit, or it did not answer within the group's timeout.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    with _telling(group, sizes):
        image, text, scale = features(image, text, logit_scale, None)
        check("text", text, image.shape, ", as image: row i of both is a pair")
        bias = scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image)
        one_of("dist_impl", dist_impl, EXCHANGES)
        DISTRIBUTED_SIGLIP.choose((image, text, scale, bias, None, dist_impl), backend)
    given = {"image": image, "text": text, "logit_scale": scale}
    peers = _agree(group, sizes, backend, given, loss="siglip_loss", dist_impl=dist_impl)
    return DISTRIBUTED_SIGLIP(image, text, scale, bias, peers, dist_impl, backend=backend)
