"""The public losses against a momentum queue: argument checks, autograd, and choice of implementation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Impl, Op, register
from mmfuse.kernels._runtime.device import INTERPRET, only_named_in_the_interpreter
from mmfuse.kernels.contrastive.arguments import autocast, check_features, integers, scalar
from mmfuse.kernels.contrastive.backends import no_reason, reasons_against_chunked, reasons_against_triton
from mmfuse.kernels.contrastive.negatives import Draw
from mmfuse.kernels.contrastive.negatives.op import draw_op, seed_of
from mmfuse.kernels.contrastive.queue import blocked, reference


def _scan(backend: str) -> Any:
    if backend == "triton":
        from mmfuse.kernels.contrastive.queue import kernel

        return kernel.scan
    return blocked.scan


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
    dx = g / (max(1, len(x)) * temp)
    dtemp = -(x * dx).sum(dtype=torch.float64).to(temp.dtype) / temp if g.dim() == 2 else temp.new_empty(0)
    return row.mean(), dx, dtemp


def _fake_loss_and_grads(x: Tensor, temp: Tensor, need: bool) -> tuple[Tensor, Tensor, Tensor]:
    new = temp.new_empty
    return new(()), new(x.shape if need else 0), new(() if need else 0)


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
        grads[0] = (g * dx).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grads[at_temp] = g * dtemp if ctx.needs_input_grad[at_temp] else None
    return tuple(grads)


# --- ALBEF ----------------------------------------------------------------------------------------------------------


def _itc_fwd(
    query: Tensor,
    query_m: Tensor | None,
    keys: Tensor,
    queue: Tensor,
    temp: Tensor,
    alpha: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    k: int,
    mixture: float,
    seed: Tensor | None,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (query, query_m, keys, queue, temp, alpha, ids, key_ids, queue_ids, True, need)
    drawn = query.new_empty((len(query), k), dtype=torch.int64)
    if seed is None:
        row, g = _scan(backend)(*options)
    elif backend == "triton":
        row, g = _scan(backend)(*options)
        drawn = _draw_apart(backend, query, keys, temp, ids, key_ids, k, mixture, seed)
    else:
        own, other = _masked_ids(query, keys, ids, key_ids)
        draw, one = Draw(len(query), k, seed, temp.dtype, mixture=mixture), torch.ones_like(temp)

        def see(s: Tensor, first: int) -> None:
            draw.add(s[:, : len(keys)], one, own[first : first + len(s)], other, row=first)

        row, g = blocked.scan(*options, see)
        drawn = draw.result().clone()
    return *_loss_and_grads(query, temp, row, g), drawn


def _masked_ids(query: Tensor, keys: Tensor, ids: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if ids is not None and key_ids is not None:
        return ids, key_ids
    return torch.arange(len(query), device=query.device), torch.arange(len(keys), device=query.device)


def _draw_apart(
    backend: str, query: Tensor, keys: Tensor, temp: Tensor, ids: Tensor | None, key_ids: Tensor | None, *draw: Any
) -> Tensor:
    """The same draws from a pass of their own over the K keys."""
    k, mixture, seed = draw
    masks = _masked_ids(query, keys, ids, key_ids)
    return draw_op(query, keys.to(query.dtype), 1 / temp, *masks, seed, k, 0, mixture, False, backend)[0]


def _itc_fwd_fake(  # type: ignore[no-untyped-def]
    query, query_m, keys, queue, temp, alpha, ids, key_ids, queue_ids, k, mixture, seed, need, backend
):
    drawn = query.new_empty((query.shape[0], k), dtype=torch.int64)
    return *_fake_loss_and_grads(query, temp, need), drawn


queue_itc_fwd = register(
    "queue_itc_fwd", _itc_fwd, _itc_fwd_fake, setup_context=_setup, backward=partial(_backward, 14, 4)
)


def _fused_itc(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    query, query_m, keys, queue, temp, alpha, *options = args
    need = torch.is_grad_enabled() and (query.requires_grad or temp.requires_grad)
    # as a number it would be compiled anew for each value, and it is warmed up step by step
    alpha = torch.ones_like(temp) * alpha if query_m is not None else torch.zeros_like(temp)
    loss, _, _, drawn = queue_itc_fwd(query, query_m, keys, queue, temp, alpha, *options, need, backend)
    return loss, drawn


def _reference_itc(*args: Any) -> tuple[Tensor, Tensor | None]:
    *options, k, mixture, seed = args
    query, _, keys, _, temp, _, ids, key_ids, _ = options
    loss = reference.queue_itc_loss(*options)
    with torch.no_grad():
        given = (query.detach(), keys.detach(), temp.detach(), ids, key_ids, k, mixture, seed)
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
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, expected a number in [0, 1]")
    if alpha and query_m is None:
        raise ValueError(f"alpha is {alpha} and query_m is None, expected the teacher's queries [B, D]")
    query, keys, queue = _features(query, keys=keys, queue=queue)
    temp = scalar("temp", temp, query)
    teacher = None
    if alpha and query_m is not None:
        (teacher,) = _features(query, query_m=query_m)[1:]
        if teacher.shape != query.shape:
            raise ValueError(f"query_m has shape {tuple(teacher.shape)}, expected {tuple(query.shape)} as query")
        teacher = teacher.to(query.dtype)
    if ids is None:
        if key_ids is not None or queue_ids is not None:
            raise ValueError("key_ids and queue_ids are given and ids is not, expected all of them")
        if len(keys) < len(query):
            raise ValueError(f"keys has {len(keys)} rows, expected at least the {len(query)} of query, or ids")
    else:
        key_ids = ids if key_ids is None else key_ids
        ids = integers("ids", ids, query, "query")
        key_ids, queue_ids = (
            integers("key_ids", key_ids, keys, "keys"),
            integers("queue_ids", queue_ids, queue, "queue"),
        )
    if negatives < 0:
        raise ValueError(f"negatives is {negatives}, expected a number of draws per row")
    if not 0.0 <= mixture < math.inf:
        raise ValueError(f"mixture is {mixture}, expected a finite number >= 0")
    at = seed_of(seed, query) if negatives else None
    impl = QUEUE_ITC.select(query, keys, queue, backend=backend)
    loss, drawn = impl.fn(
        query, teacher, keys, queue, temp, float(alpha), ids, key_ids, queue_ids, negatives, float(mixture), at
    )
    return (loss, drawn) if negatives else loss


# --- MoCo -----------------------------------------------------------------------------------------------------------


def _moco_fwd(
    query: Tensor, key: Tensor, queue: Tensor, temp: Tensor, need: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rho, o = _scan(backend)(query, None, queue[:0], queue, temp, torch.zeros_like(temp), None, None, None, False, need)
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
    query, key, queue = _features(query, key=key, queue=queue)
    if key.shape != query.shape:
        raise ValueError(f"key has shape {tuple(key.shape)}, expected {tuple(query.shape)} as query")
    impl = MOCO.select(query, key, queue, backend=backend)
    return impl.fn(query, key.to(query.dtype), queue, scalar("temp", temp, query))


# --- arguments ------------------------------------------------------------------------------------------------------


def _features(query: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
    for name, t in {"query": query, **others}.items():
        check_features(name, t)
        if t.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected at least one feature per row")
        if t.shape[1] != query.shape[1]:
            raise ValueError(f"{name} has {t.shape[1]} features per row, expected {query.shape[1]} as in query")
        if t.device != query.device:
            raise ValueError(f"{name} is on {t.device}, expected {query.device} as query")
    (query,) = autocast(query)
    for name, t in others.items():
        if t.dtype != query.dtype and not (t.dtype == torch.float32 and query.dtype.itemsize == 2):
            raise TypeError(f"{name} has dtype {t.dtype}, expected {query.dtype} as query, or float32 beside 16 bits")
    return (query, *others.values())
