"""The public losses against a momentum queue: argument checks, autograd, and choice of implementation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import INTERPRET, only_named_in_the_interpreter
from mmfuse.kernels.contrastive.arguments import autocast, check_features, integers, require_integer, scalar
from mmfuse.kernels.contrastive.backends import no_reason, reasons_against_chunked, reasons_against_triton
from mmfuse.kernels.contrastive.negatives import Draw
from mmfuse.kernels.contrastive.negatives.op import OTHER_DIRECTION, draw_op, seed_of
from mmfuse.kernels.contrastive.queue import blocked, reference


def _scan(
    backend: str, x: Tensor, x_m: Tensor | None, keys: Tensor, queues: list[Tensor], *options: Any, see: Any = None
) -> tuple[Tensor, Tensor]:
    """(row [W, B], g [W, B, D]) of W directions, as `blocked.scan` has them of one; `see` also gets the direction."""
    if backend == "triton":
        from mmfuse.kernels.contrastive.queue import kernel

        return kernel.scan(x, x_m, keys, queues, *options)
    scan: Any = blocked.scan
    rows, grads = [], []
    for way, queue in enumerate(queues):
        teacher = None if x_m is None else x_m[way]
        row, g = scan(x[way], teacher, keys[way], queue, *options, see and partial(see, way))
        rows.append(row)
        grads.append(g)
    return torch.stack(rows), torch.stack(grads)


def _reasons_against_triton(query: Tensor, *keys: Any) -> list[str]:
    why = reasons_against_triton(query)
    # accumulators of D columns stay in registers
    widest = 256 if any(t.dtype == torch.float32 for t in (query, *keys[:2])) else 512
    if query.shape[1] > widest:
        why.append(f"{query.shape[1]} features per row, above {widest}")
    if query.dtype == torch.float32 and not INTERPRET and not _tf32():
        why.append("float32 products without TF32 do not fit its registers")
    return why


# on a CPU eager is faster below so many keys: few are over before the blocks have begun, and it multiplies in bfloat16.
# Measured on one core with AVX-512 BF16
_EAGER_KEYS = {
    "queue_itc_loss": {torch.float32: 1024, torch.float64: 1024, torch.bfloat16: 65536},
    "moco_loss": {torch.float32: 2048, torch.float64: 2048, torch.bfloat16: 1 << 62},
}


def _aside(name: str, query: Tensor, *keys: Any) -> list[str]:
    least = _EAGER_KEYS[name].get(query.dtype, 0) if query.device.type == "cpu" else 0
    few = sum(len(k) for k in keys[:2]) < least
    return [f"eager is faster for less than {least} keys in {str(query.dtype)[6:]}"] if few else []


@torch.compiler.assume_constant_result
def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _loss_and_grads(x: Tensor, temp: Tensor, row: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dtau) for g = tau d(row)/dx. S is homogeneous in x / tau: dtau = -<x, dx> / tau."""
    loss = row.mean(-1)
    if g.shape != x.shape:
        return loss, temp.new_empty(0), temp.new_empty(0)
    dx = g / (max(1, x.shape[-2]) * temp)
    return loss, dx, -(x * dx).sum((-2, -1), dtype=torch.float64).to(temp.dtype) / temp


def _fake_loss_and_grads(x: Tensor, temp: Tensor, need: bool) -> tuple[Tensor, Tensor, Tensor]:
    new = temp.new_empty
    return new(x.shape[:-2]), new(x.shape if need else 0), new(x.shape[:-2] if need else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:3])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(inputs: int, at_temp: int, ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients are there: scale them."""
    grads: list[Tensor | None] = [None] * inputs
    if g is not None:
        dx, dtemp = ctx.saved_tensors
        grads[0] = (g[..., None, None] * dx).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grads[at_temp] = (g * dtemp).sum() if ctx.needs_input_grad[at_temp] else None
    return tuple(grads)


# --- ALBEF ----------------------------------------------------------------------------------------------------------


def _itc_fwd(
    query: Tensor,
    query_m: Tensor | None,
    keys: Tensor,
    queue: Tensor,
    other_queue: Tensor | None,
    temp: Tensor,
    alpha: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    k: int,
    mixture: float,
    seeds: Tensor | None,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one direction or two, query [W, B, D] and keys [W, K, D]: losses [W], their gradients, draws [W, B, k]."""
    queues = [queue] if other_queue is None else [queue, other_queue]
    options = (query, query_m, keys, queues, temp, alpha, ids, key_ids, queue_ids, True, need)
    drawn = query.new_empty((*query.shape[:2], k), dtype=torch.int64)
    if seeds is None:
        row, g = _scan(backend, *options)
    elif backend == "triton":
        row, g = _scan(backend, *options)
        drawn = _draw_apart(backend, query, keys, temp, ids, key_ids, k, mixture, seeds)
    else:
        own, other = _masked_ids(query, keys, ids, key_ids)
        one = torch.ones_like(temp)
        draws = [Draw(len(own), k, seed, temp.dtype, mixture=mixture) for seed in seeds]

        def see(way: int, s: Tensor, first: int) -> None:
            draws[way].add(s[:, : len(other)], one, own[first : first + len(s)], other, row=first)

        row, g = _scan(backend, *options, see=see)
        drawn = torch.stack([draw.result() for draw in draws])
    return *_loss_and_grads(query, temp, row, g), drawn


def _masked_ids(query: Tensor, keys: Tensor, ids: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if ids is not None and key_ids is not None:
        return ids, key_ids
    return torch.arange(query.shape[1], device=query.device), torch.arange(keys.shape[1], device=query.device)


def _draw_apart(
    backend: str, query: Tensor, keys: Tensor, temp: Tensor, ids: Tensor | None, key_ids: Tensor | None, *draw: Any
) -> Tensor:
    """The same draws from a pass of their own over the K keys."""
    k, mixture, seeds = draw
    masks = _masked_ids(query, keys, ids, key_ids)
    return torch.stack(
        [
            draw_op(x, y.to(x.dtype), 1 / temp, *masks, seed, k, 0, mixture, False, backend)[0]
            for x, y, seed in zip(query, keys, seeds, strict=True)
        ]
    )


def _itc_fwd_fake(  # type: ignore[no-untyped-def]
    query, query_m, keys, queue, other, temp, alpha, ids, key_ids, queue_ids, k, mixture, seeds, need, backend
):
    drawn = query.new_empty((*query.shape[:2], k), dtype=torch.int64)
    return *_fake_loss_and_grads(query, temp, need), drawn


queue_itc_fwd = register(
    "queue_itc_fwd", _itc_fwd, _itc_fwd_fake, setup_context=_setup, backward=partial(_backward, 15, 5)
)


def _fused_itc(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    query, query_m, keys, queues, temp, alpha, *options = args
    queue, other = (*queues, None)[:2]
    need = torch.is_grad_enabled() and (query.requires_grad or temp.requires_grad)
    # as a number it would be compiled anew for each value, and it is warmed up step by step
    alpha = torch.ones_like(temp) * alpha if query_m is not None else torch.zeros_like(temp)
    loss, _, _, drawn = queue_itc_fwd(query, query_m, keys, queue, other, temp, alpha, *options, need, backend)
    return loss, drawn


def _reference_itc(*args: Any) -> tuple[Tensor, Tensor | None]:
    query, query_m, keys, queues, temp, alpha, ids, key_ids, queue_ids, k, mixture, seeds = args
    teachers = [None] * len(query) if query_m is None else query_m
    options = (temp, alpha, ids, key_ids, queue_ids)
    ways = zip(query, teachers, keys, queues, strict=True)
    loss = torch.stack([reference.queue_itc_loss(*way, *options) for way in ways])
    with torch.no_grad():
        given = (query.detach(), keys.detach(), temp.detach(), ids, key_ids, k, mixture, seeds)
        return loss, _draw_apart("torch", *given) if k else None


QUEUE_ITC = Op(
    "queue_itc_loss",
    [
        Impl("triton", partial(_fused_itc, "triton"), _reasons_against_triton, only_named_in_the_interpreter),
        Impl("chunked", partial(_fused_itc, "chunked"), reasons_against_chunked, partial(_aside, "queue_itc_loss")),
        Impl("torch", _reference_itc, no_reason),
    ],
)


def queue_itc_loss(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    temp: Tensor | float,
    *,
    query_m: Tensor | None = None,
    alpha: float = 0.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    negatives: int = 0,
    mixture: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Any:
    """One direction of ALBEF's image-text contrastive loss: cross-entropy with soft targets over a momentum queue.

    L = mean_i sum_j T_ij (logsumexp_k S_ik - S_ij),  S = query @ [keys; queue].T / temp,
    T = alpha softmax(query_m @ [keys; queue].T / temp) + (1 - alpha) Y
    (Li et al. 2021, equations 1, 2 and 6; also BLIP). The keys are never concatenated with the queue, no B x (K + M)
    matrix is saved for the backward: the gradients are computed in the forward pass, and the backward scales them.

    Args:
        query: [B, D], float16, bfloat16, float32 or float64; any strides. The features with a gradient.
        keys: [K, D] momentum features of the other modality, in query's dtype or float32 (then rounded to query's, a
            block at a time). Without `ids`, key i is the positive of row i and K >= B; K may be larger, as after a
            gather.
        queue: [M, D] momentum features of earlier batches, dtype as for `keys`; any strides, fastest with unit stride
            along D. M may be 0.
        temp: the divisor, > 0: a float, or a tensor of one element.
        query_m: [B, D] the teacher's queries, the momentum features of query's modality. Needed if alpha > 0.
        alpha: in [0, 1], the weight of the soft targets. 0: the teacher is not computed.
        ids: [B] integers. Positives are then the keys with an equal id, 1 / count each. A row without any has no hard
            targets: its loss is that of the soft ones, nothing at alpha = 0.
        key_ids: [K], by default `ids`.
        queue_ids: [M], needed with `ids`. An id that occurs nowhere else, such as -100, marks what is empty.
        negatives: also draw so many hard negatives per row, among `keys`, from the logits of the same pass: what
            `mmfuse.hard_negatives(query, keys, 1 / temp, ...)` draws with the same ids and `mixture` and `seed`. Triton
            draws them from a pass of its own over the K keys.
        mixture, seed: as for `mmfuse.hard_negatives`.
        backend: "triton", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features), or with `negatives` a pair: the loss, and
        [B, negatives] int64, indices into `keys`, -1 where fewer are left.
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable once in query and temp; keys, queue and query_m get no
    gradient, as in the official code.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    way = _way(alpha, ids, ("query_m", query_m), query=query, keys=keys, queue=queue)
    at = seed_of(seed, query).reshape(1) if negatives else None
    losses, drawn = _itc([way], temp, alpha, ids, key_ids, queue_ids, negatives, mixture, at, backend)
    return (losses[0], drawn[0]) if negatives else losses[0]


def queue_itc_losses(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temp: Tensor | float,
    *,
    alpha: float = 0.0,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    negatives: int = 0,
    mixture: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`queue_itc_loss` of the images against the texts and of the texts against the images, in one launch on a GPU.

    Args:
        image, text: [B, D] with gradient, of the same dtype.
        image_m, text_m: [B, D] of the momentum encoders: the teacher's queries and the other direction's keys.
        image_queue, text_queue: [M, D], of the same dtype and strides.
        ids, queue_ids: [B] and [M], of both directions.
        seed: of the images' draws; the texts' have noise of their own, that of `seed ^ OTHER_DIRECTION`.
        The others are as for `queue_itc_loss`.

    Returns:
        (image to text, text to image), and with `negatives` also (texts [B, k] of the images, images [B, k] of the
        texts).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    ways = [
        _way(alpha, ids, ("image_m", image_m), image=image, text_m=text_m, text_queue=text_queue),
        _way(alpha, ids, ("text_m", text_m), text=text, image_m=image_m, image_queue=image_queue),
    ]
    for name, own, given, other in (
        ("text", text, "image", image), ("text_m", text_m, "image_m", image_m),
        ("text_queue", text_queue, "image_queue", image_queue),
    ):  # fmt: skip
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name} is {own.dtype} {tuple(own.shape)}, expected {other.dtype} {tuple(other.shape)} as {given}"
            )
    if text_queue.stride() != image_queue.stride():
        raise ValueError(
            f"text_queue has strides {text_queue.stride()}, expected {image_queue.stride()} as image_queue"
        )
    seeds = None
    if negatives:
        at = seed_of(seed, image)
        seeds = torch.stack((at, at ^ OTHER_DIRECTION))
    losses, drawn = _itc(ways, temp, alpha, ids, ids, queue_ids, negatives, mixture, seeds, backend)
    return (*losses, *drawn) if negatives else tuple(losses)


_Way = tuple[Tensor, Tensor | None, Tensor, Tensor]


def _way(alpha: float, ids: Tensor | None, teacher: tuple[str, Tensor | None], **features: Tensor) -> _Way:
    """(query, query_m, keys, queue) of one direction, from query, keys and queue under the caller's names."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, expected a number in [0, 1]")
    name, query_m = teacher
    if alpha and query_m is None:
        raise ValueError(f"alpha is {alpha} and {name} is None, expected the teacher's queries [B, D]")
    query, keys, queue = _features(**features)
    first, second, _ = features
    if ids is None and len(keys) < len(query):
        raise ValueError(f"{second} has {len(keys)} rows, expected at least the {len(query)} of {first}, or ids")
    if not alpha or query_m is None:
        return query, None, keys, queue
    query_m = _features(**{first: query, name: query_m})[1]
    if query_m.shape != query.shape:
        raise ValueError(f"{name} has shape {tuple(query_m.shape)}, expected {tuple(query.shape)} as {first}")
    return query, query_m.to(query.dtype), keys, queue


def _itc(
    ways: list[_Way],
    temp: Tensor | float,
    alpha: float,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    negatives: int,
    mixture: float,
    seeds: Tensor | None,
    backend: str | None,
) -> Any:
    """(losses [W], draws [W, B, k])"""
    queries, teachers, keys, queues = zip(*ways, strict=True)
    temp = scalar("temp", temp, queries[0])
    if ids is None:
        if key_ids is not None or queue_ids is not None:
            raise ValueError("key_ids and queue_ids are given and ids is not, expected all of them")
    else:
        key_ids = integers("key_ids", ids if key_ids is None else key_ids, keys[0], "keys")
        queue_ids = integers("queue_ids", queue_ids, queues[0], "queue")
        ids = integers("ids", ids, queries[0], "query")
    require_integer("negatives", negatives)
    if negatives < 0:
        raise ValueError(f"negatives is {negatives}, expected a number of draws per row")
    if not 0.0 <= mixture < math.inf:
        raise ValueError(f"mixture is {mixture}, expected a finite number >= 0")
    impl = QUEUE_ITC.select(queries[0], keys[0], queues[0], backend=backend)
    teacher = None if teachers[0] is None else _stacked(teachers)
    features, masks = (_stacked(queries), teacher, _stacked(keys), list(queues)), (ids, key_ids, queue_ids)
    return impl.fn(*features, temp, float(alpha), *masks, negatives, float(mixture), seeds)


def _stacked(ways: tuple[Tensor, ...]) -> Tensor:
    return ways[0].unsqueeze(0) if len(ways) == 1 else torch.stack(ways)


# --- MoCo -----------------------------------------------------------------------------------------------------------


def _moco_fwd(
    query: Tensor, key: Tensor, queue: Tensor, temp: Tensor, need: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    unused = (torch.zeros_like(temp), None, None, None)  # alpha and ids
    scanned = _scan(backend, query[None], None, queue[None, :0], [queue], temp, *unused, False, need)
    rho, o = (t[0] if len(t) else t for t in scanned)
    own = (query.to(temp.dtype) * key).sum(1) / temp
    # log(e^rho + e^own) - own keeps its digits down to a loss of 0 as log(1 + e^(rho - own))
    row = torch.logaddexp(rho - own, rho.new_zeros(()))
    g = torch.sigmoid(rho - own)[:, None] * (o - key) if need else o
    return _loss_and_grads(query, temp, row, g)


def _moco_fwd_fake(query, key, queue, temp, need, backend):  # type: ignore[no-untyped-def]
    return _fake_loss_and_grads(query, temp, need)


moco_fwd = register("moco_fwd", _moco_fwd, _moco_fwd_fake, setup_context=_setup, backward=partial(_backward, 6, 3))


def _fused_moco(backend: str, query: Tensor, key: Tensor, queue: Tensor, temp: Tensor) -> Tensor:
    need = torch.is_grad_enabled() and (query.requires_grad or temp.requires_grad)
    return moco_fwd(query, key, queue, temp, need, backend)[0]


MOCO = Op(
    "moco_loss",
    [
        Impl("triton", partial(_fused_moco, "triton"), _reasons_against_triton, only_named_in_the_interpreter),
        Impl("chunked", partial(_fused_moco, "chunked"), reasons_against_chunked, partial(_aside, "moco_loss")),
        Impl("torch", reference.moco_loss, no_reason),
    ],
)


def moco_loss(query: Tensor, key: Tensor, queue: Tensor, temp: Tensor | float, *, backend: str | None = None) -> Tensor:
    """MoCo's loss: each row's own key against a queue of negatives.

    L = mean_i (logsumexp(S_i+, S_i1, ..., S_iM) - S_i+),  S_i+ = <query_i, key_i> / temp,  S = query @ queue.T / temp
    (He et al. 2020, equation 1). The queue is not copied; the gradients are computed in the forward pass.

    Args:
        query: [B, D], float16, bfloat16, float32 or float64; any strides.
        key: [B, D] the momentum features of the same rows, in query's dtype or float32 (then rounded to query's).
        queue: [M, D], dtype as for `key`; any strides, fastest with unit stride along D.
        temp: the divisor, > 0: a float, or a tensor of one element.
        backend: "triton", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features).
        Under autocast, float32 features are rounded to the autocast dtype first, as a matrix product would.

    Deterministic: two runs are equal bitwise. Differentiable once in query and temp; key and queue get no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    query, key, queue = _features(query=query, key=key, queue=queue)
    if key.shape != query.shape:
        raise ValueError(f"key has shape {tuple(key.shape)}, expected {tuple(query.shape)} as query")
    impl = MOCO.select(query, key, queue, backend=backend)
    return impl.fn(query, key.to(query.dtype), queue, scalar("temp", temp, query))


# --- arguments ------------------------------------------------------------------------------------------------------


def _features(**named: Tensor) -> tuple[Tensor, ...]:
    """The features, which go by the first of them."""
    first, query = next(iter(named.items()))
    for name, t in named.items():
        check_features(name, t)
        if t.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected at least one feature per row")
        if t.shape[1] != query.shape[1]:
            raise ValueError(f"{name} has {t.shape[1]} features per row, expected {query.shape[1]} as in {first}")
        if t.device != query.device:
            raise ValueError(f"{name} is on {t.device}, expected {query.device} as {first}")
    (query,) = autocast(query)
    others = list(named.items())[1:]
    for name, t in others:
        if t.dtype != query.dtype and not (t.dtype == torch.float32 and query.dtype.itemsize == 2):
            raise TypeError(f"{name} has dtype {t.dtype}, expected {query.dtype} as {first}, or float32 beside 16 bits")
    return query, *(t for _, t in others)
