"""Cross-entropy over a vocabulary straight from the hidden states: the logits of all tokens never exist at once."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Implementation, Operator, products
from mmfuse.kernels._runtime.arguments import autocast, check, one_of, real, require_integer
from mmfuse.kernels._runtime.dispatch import forced_backend
from mmfuse.kernels._runtime.dtypes import autocast_is_on, cast
from mmfuse.kernels._runtime.registration import differentiated_again, gradients_with_graph, without_autocast
from mmfuse.kernels.contrastive.cross_entropy import mean_cross_entropy

Teacher = tuple[Tensor, Tensor, "Tensor | None"]

# of a block of logits: it stays near the cache of a CPU, and fills a GPU
_BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    teacher: Teacher | None = None,
    alpha: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T + bias`, with hard labels and a teacher's soft ones.

        loss = (1 - alpha) CE(logits, labels) + alpha (-sum_v softmax(teacher logits)_v log_softmax(logits)_v)

    Masked language modelling and captioning have far more logits than anything else in a step (tokens x vocabulary).
    Here they are formed `chunk` tokens at a time, and their gradient is consumed where it arises: for "mean" and "sum"
    already in the forward (three matrix products in all, as without chunks), for "none" by forming them again.

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64.
        weight, bias: [V, D] and [V] in hidden's dtype.
        labels: [...] int64. Tokens labelled `ignore_index` count in nothing: on a CPU they are dropped first, on a GPU
            (where their number is not known without waiting for it) they contribute zero.
        label_smoothing: of the hard labels, as `F.cross_entropy` has it.
        reduction: "mean" over the tokens that count (NaN if none does, as `F.cross_entropy`), "sum", or "none".
        teacher: (hidden [..., D_t], weight [V, D_t], bias [V] or None) whose softmax is the soft target; no gradient.
        alpha: share of the soft target; without a teacher it must be 0.
        chunk: tokens per block; by default as many as give 32 MB (CPU) or 256 MB (GPU) of logits.
        backend: "torch" (the formula, all logits at once), "chunked", "liger" or "cut_cross_entropy". By default, on a
            GPU, one of the two packages if it is installed and does what is asked (neither takes a teacher, Liger no
            reduction="none", cut-cross-entropy no bias and no label smoothing), otherwise "chunked", or the formula
            where one block holds all tokens in float32 or float64.

    Returns:
        A scalar, or [...] for reduction="none" (0 at ignored tokens): float32, or float64 for float64.

    Logits, softmax and all sums are float32 (float64 for float64). Deterministic in "torch" and "chunked"; the two
    packages have their own numerics, and they wait for the device.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    _check(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction, teacher, alpha, chunk)
    if teacher is not None:
        hidden_m, weight_m, bias_m = teacher
        teacher = (
            (hidden_m.detach(), weight_m.detach(), bias_m if bias_m is None else bias_m.detach()) if alpha else None
        )
    aside = (backend or forced_backend()) != "chunked"
    given = (hidden, weight, labels, bias, ignore_index, label_smoothing, reduction, teacher, alpha, chunk, aside)
    return LINEAR_CROSS_ENTROPY(*given, backend=backend)


def _eager(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction, teacher, alpha):  # type: ignore[no-untyped-def]
    acc = torch.promote_types(hidden.dtype, torch.float32)
    counts = labels != ignore_index
    hidden, teacher = _counted(hidden, counts, teacher)
    logits = cast(F.linear(hidden, weight, _like(hidden, bias)), acc).flatten(0, -2)
    labels_ = labels.flatten()
    if teacher is None:
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        loss = F.cross_entropy(logits, labels_, **options)
        return loss.view(labels.shape) if reduction == "none" else loss
    loss = F.cross_entropy(
        logits, labels_, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    soft = F.linear(*teacher).to(acc).flatten(0, -2).softmax(-1)
    loss = (1 - alpha) * loss - alpha * (soft * logits.log_softmax(-1)).sum(-1)
    return _reduce(torch.where(counts.flatten(), loss, 0), counts, reduction, labels.shape)


def _of_all(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The mean over tokens all of which count, without a teacher."""
    logits = F.linear(hidden, weight, _like(hidden, bias))
    return mean_cross_entropy(logits, labels, torch.promote_types(hidden.dtype, torch.float32), **options)


def _counted(hidden: Tensor, counts: Tensor, teacher: Teacher | None) -> tuple[Tensor, Teacher | None]:
    """Zeros for the tokens that do not count: a gradient of 0 times NaN would be NaN, in weight, too."""
    counts = counts[..., None]
    masked = None if teacher is None else (torch.where(counts, teacher[0], 0), *teacher[1:])
    return torch.where(counts, hidden, 0), masked


def _reduce(loss: Tensor, counts: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return loss.view(shape)
    return loss.sum() / counts.sum() if reduction == "mean" else loss.sum()


# --- in blocks of tokens --------------------------------------------------------------------------------------------


def _chunked(  # type: ignore[no-untyped-def]
    hidden: Tensor, weight, labels, bias, ignore_index, label_smoothing, reduction, teacher, alpha, chunk, aside
):
    kind = hidden.device.type
    hidden, weight = autocast(hidden, weight)
    rows, flat = (hidden, labels) if hidden.dim() == 2 else (hidden.flatten(0, -2), labels.flatten())
    shape, total = labels.shape, flat.shape[0]
    counts = flat != ignore_index
    if teacher is not None:
        teacher = (teacher[0].flatten(0, -2), *teacher[1:])
    kept, on_host = None, kind == "cpu" and not torch.compiler.is_compiling()
    if on_host and not counts.all():
        kept = counts.nonzero().squeeze(1)
        rows, flat, counts = rows[kept], flat[kept], counts[kept]
        teacher = None if teacher is None else (teacher[0][kept], *teacher[1:])
    chunk = chunk or max(16, _BLOCK_BYTES.get(kind, 32 << 20) // (4 * max(1, weight.shape[0])))
    with without_autocast(hidden):
        # on a CPU eager's passes over 16 bits are faster for as long as they fit
        wide = hidden.dtype.itemsize >= 4
        if aside and rows.shape[0] <= (chunk if wide else 8 * chunk if kind == "cpu" else 0):
            # one block holds all: the same memory, and eager has fewer passes over the gradient of weight
            if on_host and teacher is None and reduction == "mean":
                of_labels = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
                loss = _of_all(rows, weight, flat, bias, **of_labels)
            else:
                loss = _eager(rows, weight, flat, bias, ignore_index, label_smoothing, reduction, teacher, alpha)
        else:
            options = (label_smoothing, alpha if teacher else 0.0, reduction, chunk, torch.is_grad_enabled())
            loss = _LinearCrossEntropy.apply(rows, weight, bias, flat.where(counts, 0), counts, teacher, options)
    if reduction == "none" and kept is not None:
        loss = loss.new_zeros(total).index_copy(0, kept, loss)
    return loss.view(shape) if reduction == "none" else loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, counts, teacher, options):  # type: ignore[no-untyped-def]
        *settings, reduction, chunk, grad_enabled = ctx.options = options
        sweep = partial(_sweep, settings=settings, chunk=chunk)
        needs = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        at_once = reduction != "none"
        acc = torch.promote_types(hidden.dtype, torch.float32)
        per_token = counts.to(acc)
        loss, *grads = sweep(hidden, weight, bias, labels, teacher, per_token, needs=needs if at_once else (False,) * 3)
        ctx.needs, ctx.sweep, ctx.teacher = needs, sweep, teacher
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        given = hidden, weight, bias, labels, per_token
        if not at_once:
            ctx.save_for_backward(*given)
            return loss
        count = per_token.sum() if reduction == "mean" else None
        # where nothing counts, the loss is NaN but the gradients are 0, as eager's
        ctx.save_for_backward(*given, *grads, None if count is None else 1 / count.clamp(min=1))
        return loss.sum() if count is None else loss.sum() / count

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, per_token, *kept = ctx.saved_tensors
        if differentiated_again(g):
            return (*_LinearCrossEntropy._of_formula(ctx, hidden, weight, bias, labels, per_token, g), *[None] * 4)
        if kept:
            *grads, mean = kept
            g = g if mean is None else g * mean
            grads = [None if d is None else g * d for d in grads]
        else:
            with without_autocast(hidden):
                _, *grads = ctx.sweep(hidden, weight, bias, labels, ctx.teacher, per_token * g, needs=ctx.needs)
        return (*(None if d is None else d.to(t) for d, t in zip(grads, ctx.dtypes, strict=True)), *[None] * 4)

    @staticmethod
    def _of_formula(ctx, hidden, weight, bias, labels, per_token, g):  # type: ignore[no-untyped-def]
        eps, alpha, reduction, *_ = ctx.options
        labels = labels.where(per_token > 0, -1)
        given = [hidden, weight, bias]

        def formula(*leaves: Tensor) -> list[Tensor]:
            of = iter(leaves)
            operands = [next(of) if need else t for t, need in zip(given, ctx.needs, strict=True)]
            return [_eager(operands[0], operands[1], labels, operands[2], -1, eps, reduction, ctx.teacher, alpha)]

        leaves = [t for t, need in zip(given, ctx.needs, strict=True) if need]
        found = iter(gradients_with_graph(formula, leaves, [g]))
        return [next(found) if need else None for need in ctx.needs]


def _sweep(hidden, weight, bias, labels, teacher, per_token, *, settings, chunk, needs):  # type: ignore[no-untyped-def]
    """(loss [n], d hidden, d weight, d bias) of sum_i per_token_i loss_i, over blocks of tokens."""
    eps, alpha = settings
    acc = per_token.dtype
    need_h, need_w, need_b = needs
    n, vocabulary = len(hidden), len(weight)
    loss = torch.zeros(n, dtype=acc, device=hidden.device)
    dh = torch.zeros(hidden.shape, dtype=acc, device=hidden.device) if need_h else None
    dw = None
    db = torch.zeros(vocabulary, dtype=acc, device=hidden.device) if need_b else None
    for i in range(0, n, chunk):
        part = slice(i, i + chunk)
        label, w = labels[part, None], per_token[part, None]
        of_part = None if teacher is None else (teacher[0][part], *teacher[1:])
        h, of_part = _counted(hidden[part], w[:, 0] != 0, of_part)
        log_p = _logits(h, weight, bias, acc).log_softmax(-1)
        value = (1 - eps) * log_p.gather(1, label).squeeze(1)
        if eps:
            value = value + eps * log_p.mean(-1)
        value = (1 - alpha) * value
        soft = None
        if of_part is not None:
            soft = _logits(*of_part, acc).softmax(-1)
            value = value + alpha * (soft * log_p).sum(-1)
        loss[part] = torch.where(w[:, 0] == 0, 0, -value)
        if not any(needs):
            continue
        # d loss / d logits = softmax - target, in place of the logits
        g = log_p.exp_()
        if eps:
            g -= (1 - alpha) * eps / vocabulary
        if soft is not None:
            g.sub_(soft, alpha=alpha)
        g.scatter_add_(1, label, torch.full_like(w, -(1 - alpha) * (1 - eps)))
        g *= w
        if db is not None:
            db += g.sum(0)
        g = g.to(hidden.dtype)
        if dh is not None:
            dh[part] = _product(g, weight, acc)
        if need_w and dw is None:
            dw = _product(g.t(), h, acc)
        elif need_w:
            _add_product(dw, g.t(), h)
    if need_w and dw is None:
        dw = torch.zeros(weight.shape, dtype=acc, device=hidden.device)
    return loss, dh, dw, db


def _product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    if left.dtype != acc and left.is_cuda:
        return torch.mm(left, right, out_dtype=acc)
    # a CPU's product of 16-bit operands is rounded to 16 bits, as eager's
    return products.mm(left, right).to(acc)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        products.add_mm_(total, left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    if hidden.dtype == acc or not hidden.is_cuda:
        return products.linear(hidden, weight, _like(hidden, bias)).to(acc)
    z = _product(hidden, weight.t(), acc)
    return z if bias is None else z.add_(bias)


def _like(hidden: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(hidden.dtype)


# --- other packages' kernels ----------------------------------------------------------------------------------------


def _liger(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction):  # type: ignore[no-untyped-def]
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        accum_dtype=torch.float32,
    )
    return loss.float().view(())


def _cut_cross_entropy(hidden, weight, labels, ignore_index, reduction):  # type: ignore[no-untyped-def]
    from cut_cross_entropy import linear_cross_entropy

    options = {"ignore_index": ignore_index, "reduction": reduction}
    # its default leaves out small probabilities
    loss = linear_cross_entropy(hidden.flatten(0, -2), weight, labels.flatten(), filter_eps=None, **options)
    return loss.float().view(labels.shape if reduction == "none" else ())


def _unusable(module: str, hidden: Tensor, teacher: Teacher | None) -> str | None:
    if not hidden.is_cuda:
        return f"hidden is on {hidden.device}, expected a CUDA device"
    if torch.compiler.is_compiling() or autocast_is_on("cuda"):
        return "it is called inside torch.compile or autocast"
    if find_spec(module) is None:
        return f"{module} is not installed"
    if hidden.dtype == torch.float64:
        return "hidden has dtype torch.float64"
    return None if teacher is None else "there is a teacher"


def _liger_lacks(reduction: str) -> str | None:
    return "reduction is 'none'" if reduction == "none" else None


def _cut_lacks(hidden: Tensor, bias: Tensor | None, label_smoothing: float) -> str | None:
    if bias is not None:
        return "there is a bias"
    if label_smoothing or hidden.dtype == torch.float32:
        return "label_smoothing is not 0, or hidden has dtype torch.float32"
    return None


def _example(x: Tensor, **how: Any) -> Tensor:
    return linear_cross_entropy(x, x, torch.arange(len(x), device=x.device), **how)


LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy",
    forward=_chunked,
    on="hidden",
    implementations=[
        Implementation("liger", function=_liger, against=[partial(_unusable, "liger_kernel"), _liger_lacks]),
        Implementation(
            "cut_cross_entropy",
            function=_cut_cross_entropy,
            against=[partial(_unusable, "cut_cross_entropy"), _cut_lacks],
        ),
        Implementation("chunked", function=_chunked),
        Implementation("torch", function=_eager),
    ],
    example=_example,
)


# --- arguments ------------------------------------------------------------------------------------------------------


def _check(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction, teacher, alpha, chunk):  # type: ignore[no-untyped-def]
    _check_head("hidden", hidden, "weight", weight, "bias", bias)
    check("labels", labels, hidden.shape[:-1], " as hidden", torch.int64, ("hidden", hidden))
    require_integer("ignore_index", ignore_index)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    for name, value in (("label_smoothing", label_smoothing), ("alpha", alpha)):
        if not 0 <= real(name, value) <= 1:
            raise ValueError(f"{name} is {value}, expected a number in [0, 1]")
    if teacher is None and alpha:
        raise ValueError(f"alpha is {alpha} without a teacher, expected 0")
    if teacher is not None:
        if not isinstance(teacher, (tuple, list)):
            raise TypeError(f"teacher is {type(teacher).__name__}, expected (hidden, weight, bias or None)")
        if len(teacher) != 3:
            raise ValueError(f"teacher has {len(teacher)} entries, expected (hidden, weight, bias or None)")
        _check_head("teacher's hidden", teacher[0], "teacher's weight", teacher[1], "teacher's bias", teacher[2])
        check("teacher's hidden", teacher[0], like=("hidden", hidden))
        if teacher[0].shape[:-1] != labels.shape or len(teacher[1]) != len(weight):
            raise ValueError(
                f"teacher has logits of shape {(*teacher[0].shape[:-1], len(teacher[1]))}, "
                f"expected {(*labels.shape, len(weight))}"
            )
    if chunk is not None:
        require_integer("chunk", chunk)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1")


def _check_head(name: str, hidden: Tensor, w_name: str, weight: Tensor, b_name: str, bias: Tensor | None) -> None:
    check(name, hidden)
    if hidden.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(hidden.shape)}, expected [..., D]")
    check(w_name, weight, ("V", hidden.shape[-1]), f" as {name} has features", like=(name, hidden))
    if bias is not None:
        check(b_name, bias, weight.shape[:1], f", one for each row of {w_name}", like=(name, hidden))
    if hidden.dtype != weight.dtype and not autocast_is_on(hidden.device.type):
        raise TypeError(f"{w_name} has dtype {weight.dtype}, expected {hidden.dtype} as {name}")
