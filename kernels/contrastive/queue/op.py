"""The public losses against a momentum queue: argument checks and declarations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, Size
from mmfuse.kernels._runtime.arguments import autocast, check, integers, number, require_integer, scalar
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dtypes import cast
from mmfuse.kernels.contrastive.negatives.op import NEGATIVES, OTHER_DIRECTION, seed_of
from mmfuse.kernels.contrastive.normalisers import zero_below_inf
from mmfuse.kernels.contrastive.queue import blocked, reference
from mmfuse.kernels.contrastive.queue.blocked import Directions

_KERNEL = Deferred("mmfuse.kernels.contrastive.queue.kernel")
_NONE = torch.empty(0)


def _too_wide(given: Directions) -> str | None:
    # accumulators of D columns stay in registers
    width = given.query.shape[-1]
    widest = 256 if any(t.dtype == torch.float32 for t in (given.query, given.keys, given.queue)) else 512
    return f"{width} features per row, above {widest}" if width > widest else None


def _without_tf32(given: Directions) -> str | None:
    if given.query.dtype != torch.float32 or INTERPRET or _tf32():
        return None
    return "float32 products without TF32 do not fit its registers"


@torch.compiler.assume_constant_result
def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _loss_and_grads(given: Directions, row: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dtau) for g = tau d(row)/dx. S is homogeneous in x / tau: dtau = -<x, dx> / tau."""
    x, temp, loss = given.query, given.temp, row.mean(-1)
    if g.shape != x.shape:
        return loss, temp.new_empty(0), temp.new_empty(0)
    dx = g / (max(1, x.shape[-2]) * temp)
    return loss, dx, -(x * dx).sum((-2, -1), dtype=torch.float64).to(temp.dtype) / temp


def _empty_loss_and_grads(given: Directions, needs: Any) -> tuple[Tensor, Tensor, Tensor]:
    new, shape = given.temp.new_empty, given.query.shape
    return new(shape[0]), new(shape if any(needs) else 0), new(shape[0] if any(needs) else 0)


def _backward(g: Tensor, d_query: Tensor, d_temp: Tensor, query_dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients are there: scale them."""
    return {"query": (g[:, None, None] * d_query).to(query_dtype), "temp": (g * d_temp).sum()}


# --- ALBEF ----------------------------------------------------------------------------------------------------------


class ItcOutputs(NamedTuple):
    loss: Tensor  # [W]
    d_query: Tensor = _NONE  # [W, B, D] the gradients for g = 1, empty where none is needed
    d_temp: Tensor = _NONE  # [W]
    drawn: Tensor = _NONE  # [W, B, k]


def _itc_forward(
    passes: Any, given: Directions, k: int, mixture: float, seeds: Tensor | None, needs: Any
) -> ItcOutputs:
    if seeds is None:
        row, g = passes.scan(given, True, any(needs))
        drawn = _empty_draws(given, k)
    else:
        row, g, drawn = passes.scan_and_draw(given, any(needs), k, mixture, seeds)
    return ItcOutputs(*_loss_and_grads(given, row, g), drawn)


def _empty_draws(given: Directions, k: int) -> Tensor:
    return given.query.new_empty((*given.query.shape[:2], k), dtype=torch.int64)


def _itc_fake(given: Directions, k: int, needs: Any) -> ItcOutputs:
    return ItcOutputs(*_empty_loss_and_grads(given, needs), _empty_draws(given, k))


def _itc_reference(given: Directions, k: int, mixture: float, seeds: Tensor | None) -> ItcOutputs:
    loss = reference.queue_itc_loss(given)
    if seeds is None:
        return ItcOutputs(loss)
    with torch.no_grad():
        return ItcOutputs(loss, drawn=given.drawn(partial(NEGATIVES, backend="torch"), k, mixture, seeds))


QUEUE_ITC = Operator(
    "queue_itc_loss",
    forward=_itc_forward,
    backward=_backward,
    fake=_itc_fake,
    differentiable=("query", "temp"),
    on=lambda given: given.query,
    implementations=[
        Implementation("triton", passes=_KERNEL, against=[_too_wide, _without_tf32]),
        Implementation("chunked", passes=blocked),
        Implementation("torch", function=_itc_reference),
    ],
    size=Size("keys", lambda given: given.keys.shape[1] + given.queue.shape[0]),
    example=lambda x, **how: queue_itc_loss(x, x, x, 1.0, **how),
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

    Deterministic: two runs are equal bitwise. Differentiable in query and temp; keys, queue and query_m get no
    gradient, as in the official code.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    way = _way(alpha, ids, ("query_m", query_m), query=query, keys=keys, queue=queue)
    seeds = seed_of(seed, query).reshape(1) if negatives else None
    of_keys = ids if key_ids is None else key_ids
    losses, drawn = _itc([way], temp, alpha, (ids, of_keys, queue_ids), (negatives, mixture, seeds), backend)
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
    losses, drawn = _itc(ways, temp, alpha, (ids, ids, queue_ids), (negatives, mixture, seeds), backend)
    losses = losses.unbind()
    return (*losses, *drawn.unbind()) if negatives else losses


_Way = tuple[Tensor, Tensor | None, Tensor, Tensor]


def _way(alpha: float, ids: Tensor | None, teacher: tuple[str, Tensor | None], **features: Tensor) -> _Way:
    """(query, query_m, keys, queue) of one direction, from query, keys and queue under the caller's names."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, expected a number in [0, 1]")
    query, keys, queue = _features(**features)
    first, second, _ = features
    if ids is None and keys.shape[0] < query.shape[0]:
        least = f"expected at least the {query.shape[0]} of {first}, or ids"
        raise ValueError(f"{second} has {keys.shape[0]} rows, {least}")
    name, query_m = teacher
    if not alpha:
        return query, None, keys, queue
    if query_m is None:
        raise ValueError(f"alpha is {alpha} and {name} is None, expected the teacher's queries [B, D]")
    check(name, query_m, query.shape, f" as {first}", _dtypes_beside(query), (first, query))
    return query, cast(query_m, query.dtype), keys, queue


def _itc(
    ways: list[_Way],
    temp: Tensor | float,
    alpha: float,
    ids: tuple[Tensor | None, ...],
    draws: tuple[int, float, Tensor | None],
    backend: str | None,
) -> Any:
    """(losses [W], draws [W, B, k]) for the ids of queries, keys and queue, and draws (number, mixture, seeds [W])."""
    queries, teachers, keys, queues = zip(*ways, strict=True)
    temp = scalar("temp", temp, queries[0])
    if ids[0] is not None:
        of = (("ids", queries[0], "query"), ("key_ids", keys[0], "keys"), ("queue_ids", queues[0], "queue"))
        ids = tuple(integers(name, t, rows, whose) for t, (name, rows, whose) in zip(ids, of, strict=True))
    elif any(t is not None for t in ids):
        raise ValueError("key_ids and queue_ids are given and ids is not, expected all of them")
    negatives, mixture, seeds = draws
    require_integer("negatives", negatives)
    if negatives < 0:
        raise ValueError(f"negatives is {negatives}, expected a number of draws per row")
    if not 0.0 <= mixture < math.inf:
        raise ValueError(f"mixture is {mixture}, expected a finite number >= 0")
    # as a number it would be compiled anew for each value, and it is warmed up step by step
    weight = number(alpha, temp.dtype, temp.device)
    teacher = None if teachers[0] is None else _stacked(teachers)
    other_queue = queues[1] if len(queues) == 2 else None
    given = Directions(_stacked(queries), _stacked(keys), queues[0], temp, weight, teacher, other_queue, *ids)
    found = QUEUE_ITC(given, negatives, float(mixture), seeds, backend=backend)
    return found.loss, found.drawn


def _stacked(ways: tuple[Tensor, ...]) -> Tensor:
    return ways[0].unsqueeze(0) if len(ways) == 1 else torch.stack(ways)


# --- MoCo -----------------------------------------------------------------------------------------------------------


class MocoOutputs(NamedTuple):
    loss: Tensor  # [1]
    d_query: Tensor = _NONE  # [1, B, D] the gradients for g = 1, empty where none is needed
    d_temp: Tensor = _NONE  # [1]


def _moco_forward(passes: Any, given: Directions, key: Tensor, needs: Any) -> MocoOutputs:
    rho, o = passes.scan(given, False, any(needs))
    own = (given.query.to(given.temp.dtype) * key).sum(-1) / given.temp
    # log(e^rho + e^own) - own keeps its digits down to a loss of 0 as log(1 + e^(rho - own))
    # NaN where that is inf - inf
    zero = zero_below_inf(own)
    row = torch.logaddexp(rho - own, zero)
    if any(needs):
        # a queue whose logits are all -inf has no mean
        o = o.masked_fill((rho == -torch.inf)[..., None], 0)
        o = (torch.sigmoid(rho - own) + zero)[..., None] * (o - key)
    return MocoOutputs(*_loss_and_grads(given, row, o))


MOCO = Operator(
    "moco_loss",
    forward=_moco_forward,
    backward=_backward,
    fake=lambda given, needs: MocoOutputs(*_empty_loss_and_grads(given, needs)),
    differentiable=("query", "temp"),
    implementations=[
        Implementation("triton", passes=_KERNEL, against=[_too_wide, _without_tf32], traceable=True),
        Implementation("chunked", passes=blocked),
        Implementation(
            "torch",
            function=lambda given, key: MocoOutputs(
                reference.moco_loss(given.query[0], key, given.queue, given.temp)[None]
            ),
        ),
    ],
    size=Size("keys", lambda given: given.query.shape[1] + given.queue.shape[0]),
    example=lambda x, **how: moco_loss(x, x, x, 1.0, **how),
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

    Deterministic: two runs are equal bitwise. Differentiable in query and temp; key and queue get no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    query, key, queue = _features(query=query, key=key, queue=queue)
    check("key", key, query.shape, " as query")
    temp = scalar("temp", temp, query)
    given = Directions(query[None], queue[None, :0], queue, temp, torch.zeros_like(temp))
    return MOCO(given, key.to(query.dtype), backend=backend).loss[0]


# --- arguments ------------------------------------------------------------------------------------------------------


def _features(**named: Tensor) -> tuple[Tensor, ...]:
    """The features, which go by the first of them: theirs is its dtype, or float32 beside 16 bits."""
    (first, query), *others = named.items()
    check(first, query, ("B", "D"))
    if query.shape[1] == 0:
        raise ValueError(f"{first} has shape {tuple(query.shape)}, expected at least one feature per row")
    (query,) = autocast(query)
    shape, note = ("N", query.shape[1]), f", as many features per row as {first}"
    dtypes, like = _dtypes_beside(query), (first, query)
    for name, t in others:
        check(name, t, shape, note, dtypes, like)
    return query, *(t for _, t in others)


def _dtypes_beside(query: Tensor) -> torch.dtype | tuple[torch.dtype, ...]:
    return (query.dtype, torch.float32) if query.dtype.itemsize == 2 else query.dtype
