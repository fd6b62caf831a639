"""The public functions of codebooks: argument checks and declarations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, OpSpec, Size
from mmfuse.kernels._runtime.arguments import check, check_range, integers, one_of, require_integer
from mmfuse.kernels._runtime.dispatch import exported_by
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.codebook import blocked, reference

Metric = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation", "none"]


_NO_SCORE, _NO_MASK = (torch.empty(0, dtype=dtype) for dtype in (torch.float64, torch.bool))


def _compiled_argmax(
    z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None, exact: bool
) -> Tensor:
    z, weight = z.float().contiguous(), weight.float().contiguous()
    scale, bias = (_NO_SCORE if t is None else t for t in (scale, bias))
    mask = _NO_MASK if mask is None else mask.contiguous()
    codes = torch.empty(z.shape[0], dtype=torch.int64)
    torch.ops.mmfuse_cpu.code_argmax(z, weight, scale, bias, mask, codes)
    return codes


def _compiled_statistics(z: Tensor, codes: Tensor, K: int) -> tuple[Tensor, Tensor]:
    counts, sums = torch.empty(K), torch.empty(K, z.shape[1])
    torch.ops.mmfuse_cpu.code_statistics(z.float().contiguous(), codes, counts, sums)
    return counts, sums


_KERNEL = Deferred("mmfuse.kernels.codebook.kernel")
_COMPILED = SimpleNamespace(code_argmax=_compiled_argmax, code_statistics=_compiled_statistics)


def _double(z: Tensor) -> str | None:
    return "dtype is torch.float64" if z.dtype == torch.float64 else None


def _implementations(**of_torch: Any) -> list[Implementation]:
    return [
        Implementation("triton", passes=_KERNEL, against=[_double]),
        Implementation("cpu", passes=_COMPILED),
        Implementation("chunked", passes=blocked),
        Implementation("torch", **of_torch),
    ]


# --- the search -----------------------------------------------------------------------------------------------------


def _search(
    passes: Any,
    z: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    exact: bool,
) -> Tensor:
    return passes.code_argmax(z, weight, scale, bias, mask, exact)


# fewer elements of codes than this are packed in no time; measured on 2 cores with AVX-512 BF16
_PACKED_AT_ONCE = {torch.float32: 1 << 20, torch.float16: 1 << 20, torch.bfloat16: 1 << 18}


def _rows(z: Tensor, weight: Tensor) -> int | None:
    return None if weight.numel() < _PACKED_AT_ONCE.get(z.dtype, 0) else z.shape[0]


def _in_onnx(z: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """In the accumulation's dtype, as not every runtime has float64: the nearest up to the rounding of a score."""
    acc = accumulation_dtype(z.dtype)
    weight = weight.to(acc)
    s = z.to(acc) @ (weight if scale is None else weight * scale.to(acc)[:, None]).t()
    return reference.masked((s if bias is None else s + bias.to(acc)).argmax(1), mask)


NEAREST = Operator(
    "nearest_code",
    forward=_search,
    fake=lambda z: z.new_empty(z.shape[:1], dtype=torch.int64),
    implementations=_implementations(function=reference.code_argmax),
    # "chunked" does not pack the codes, which takes longer than few rows, and it multiplies bfloat16 at twice the speed
    size=Size("rows", _rows, columns=lambda z: z.shape[1]),
    example=lambda x, **how: nearest_code(x, x, **how),  # type: ignore[has-type]
    also={"linear_argmax": lambda x, **how: linear_argmax(x, x, **how)},  # type: ignore[has-type]
    export=OpSpec("MmfuseNearestCode", _in_onnx),
)


@torch.no_grad()
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
    exact: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The nearest row of a codebook to each row of z, as float64 would find it, without the matrix of distances.

    argmin_k |z - e_k|^2 = argmax_k <z, e_k> - |e_k|^2 / 2, or argmax_k <z, e_k> / max(|e_k|, 1e-12) for "cosine"
    (van den Oord et al. 2017, equation 1).

    Args:
        z: [N, D], float16, bfloat16, float32 or float64; any strides.
        codebook: [K, D], on the same device; its dtype may differ: both are then taken in the wider one.
        metric: "euclidean" or "cosine". A code of norm 0 has the cosine 0 with every row.
        mask: bool [N]; rows where it is False are not searched for, their code is -1.
        exact: codes that the fast products cannot tell from the nearest are scored again in float64. False leaves it
            out where that saves time; the code found is then nearest up to the rounding of a score.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [N] int64. Of codes that float64 cannot tell apart (duplicates) the first; as in torch.argmax, a NaN among the
        scores wins, so that a row of NaN gets code 0. A code that is not finite is found by the rows to which its score
        is NaN or the largest, and changes nothing for the others.

    Deterministic: two runs are equal. Not differentiable. Autocast does not round the arguments.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    z, codebook = _rows_and_codes(z, codebook)
    if mask is not None:
        check("mask", mask, z.shape[:1], ", one for each row", torch.bool, ("z", z))
    return NEAREST(z, codebook, *_score(codebook, metric), mask, exact, backend=backend)


@torch.no_grad()
def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The largest output of a linear layer, argmax_k <x, w_k> + b_k, without its outputs: the codes of DALL-E's dVAE.

    (Ramesh et al. 2021: a token is the argmax of the encoder's last 1 x 1 convolution.)

    Args:
        x: [N, Din], float16, bfloat16, float32 or float64; any strides.
        weight: [K, Din], as a Linear's or a 1 x 1 convolution's; on the same device.
        bias: [K] or None.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [N] int64, as float64 would find them; ties and NaN as in `nearest_code`.

    Deterministic. Not differentiable. Raises as `nearest_code`.
    """
    x, weight = _rows_and_codes(x, weight, ("x", "weight"))
    if bias is not None:
        check("bias", bias, weight.shape[:1], ", one for each row of weight", like=("x", x))
        bias = cast(bias, _score_dtype(weight)).contiguous()
    return NEAREST(x, weight, None, bias, None, True, backend=backend)


def _score_dtype(codebook: Tensor) -> torch.dtype:
    """What scores are made in: float64, but in an exported graph, which has to run where there is none."""
    return torch.float64 if exported_by() is None else accumulation_dtype(codebook.dtype)


def _score(codebook: Tensor, metric: str) -> tuple[Tensor | None, Tensor | None]:
    """(scale, bias) [K] in float64 of the score scale_k <z, e_k> + bias_k."""
    one_of("metric", metric, get_args(Metric))
    dtype = _score_dtype(codebook)
    if metric == "euclidean":
        return None, codebook.to(dtype).square().sum(1).mul_(-0.5)
    norm = torch.linalg.vector_norm(codebook, dim=1, dtype=dtype)
    return norm.clamp_min_(1e-12).reciprocal_(), None


def _rows_and_codes(z: Tensor, codebook: Tensor, names: tuple[str, str] = ("z", "codebook")) -> tuple[Tensor, Tensor]:
    first, second = names
    check(first, z, ("N", "D"))
    check(second, codebook, ("K", z.shape[1]), f" as {first} has features", like=(first, z))
    if 0 in codebook.shape:
        raise ValueError(f"{second} has shape {tuple(codebook.shape)}, expected at least one code and one feature")
    if z.dtype == codebook.dtype:
        return z, codebook
    wide = torch.promote_types(z.dtype, codebook.dtype)
    return cast(z, wide), cast(codebook, wide)


# --- statistics -----------------------------------------------------------------------------------------------------


_NUMBERS = Size("numbers", lambda z: z.numel())


class Statistics(NamedTuple):
    counts: Tensor  # [K]
    sums: Tensor  # [K, D]


def _statistics(passes: Any, z: Tensor, codes: Tensor, K: int) -> Statistics:
    return Statistics(*passes.code_statistics(z, codes, K))


def _statistics_fake(z: Tensor, K: int) -> Statistics:
    acc = accumulation_dtype(z.dtype)
    return Statistics(z.new_empty(K, dtype=acc), z.new_empty((K, z.shape[1]), dtype=acc))


STATISTICS = Operator(
    "code_statistics",
    forward=_statistics,
    fake=_statistics_fake,
    implementations=_implementations(passes=reference),
    size=_NUMBERS,
    example=lambda x, **how: code_statistics(x, torch.arange(len(x), device=x.device), len(x), **how),  # type: ignore[has-type]
)


@torch.no_grad()
def code_statistics(z: Tensor, codes: Tensor, K: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """How many rows have each code, and their sum: what moving averages and a codebook's gradient are made of.

    Args:
        z: [N, D], float16, bfloat16, float32 or float64; any strides.
        codes: integers [N]; a row whose code is outside 0 .. K - 1 counts for none.
        K: the number of codes.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        counts [K] and sums [K, D] in float32 (float64 for float64). No one-hot matrix and no atomics: rows are put in
        the order of their codes and summed in that order, so two runs are equal bitwise.

    Not differentiable. Raises as `nearest_code`.
    """
    check("z", z, ("N", "D"))
    codes = integers("codes", codes, z, "z")
    require_integer("K", K)
    if K < 1:
        raise ValueError(f"K is {K}, expected at least one code")
    counts, sums = STATISTICS(z, codes, K, backend=backend)
    return counts, sums


# --- quantization ---------------------------------------------------------------------------------------------------


class Assigned(NamedTuple):
    z_q: Tensor  # [N, D]
    loss: Tensor
    share: Tensor  # 1 / (elements that count)


def _assign(
    z: Tensor, codebook: Tensor, codes: Tensor, beta: float, codebook_weight: float, gradient: str, masked: bool
) -> Assigned:
    check_range("codes", codes, len(codebook), "the rows of codebook", least=-1 if masked else 0)
    return Assigned(*blocked.assign(z, codebook, codes, beta, codebook_weight, gradient, masked))


def _assign_fake(z: Tensor) -> Assigned:
    acc = accumulation_dtype(z.dtype)
    return Assigned(z.new_empty(z.shape), z.new_empty((), dtype=acc), z.new_empty((), dtype=acc))


def _assign_backward(
    passes: Any,
    g: Tensor | None,
    g_loss: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    codes: Tensor,
    share: Tensor,
    beta: float,
    codebook_weight: float,
    gradient: str,
    masked: bool,
    needs: Any,
) -> dict[str, Tensor]:
    grads = {}
    step = None if g_loss is None else 2 * share * g_loss
    if needs.z:
        of_loss = None if step is None else beta * step
        grads["z"] = blocked.gradient_of_rows(g, of_loss, z, codebook, codes, gradient, masked)
    if needs.codebook:
        total = torch.zeros(codebook.shape, dtype=accumulation_dtype(z.dtype), device=z.device)
        if g is not None and gradient == "none":
            total += passes.code_statistics(g, codes, len(codebook))[1]
        if step is not None and codebook_weight:
            counts, sums = passes.code_statistics(z, codes, len(codebook))
            # 0 for a code without rows, also where it is not a number
            own = torch.where(counts[:, None] > 0, counts[:, None] * codebook, 0)
            total += codebook_weight * step * (own - sums)
        grads["codebook"] = total.to(codebook.dtype)
    return grads


QUANTIZE = Operator(
    "vector_quantize",
    forward=_assign,
    backward=_assign_backward,
    fake=_assign_fake,
    differentiable=("z", "codebook"),
    implementations=_implementations(function=reference.assign),
    # the rotation's gradient takes torch longer at any size
    size=Size("numbers", lambda z, gradient: None if gradient == "rotation" else z.numel()),
    example=lambda x, **how: vector_quantize(x, x, **how),
)


def assign_code(
    z: Tensor,
    codebook: Tensor,
    codes: Tensor,
    *,
    beta: float = 1.0,
    codebook_weight: float = 1.0,
    gradient: Gradient = "straight_through",
    masked: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`vector_quantize` of rows whose codes are known, with nothing normalised: (z_q [N, D], loss).

    masked: whether a code may be -1, for a row that has none.

    A code out of range is an error on a CPU and undefined on a GPU, which would have to wait for it.
    """
    z, codebook = _rows_and_codes(z, codebook)
    codes = integers("codes", codes, z, "z")
    one_of("gradient", gradient, get_args(Gradient))
    found = QUANTIZE(z, codebook, codes, float(beta), float(codebook_weight), gradient, masked, backend=backend)
    return found[0], found[1]


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    beta: float = 1.0,
    codebook_weight: float = 1.0,
    gradient: Gradient = "straight_through",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row replaced by its nearest code, with VQ-VAE's loss and a gradient through the choice.

    loss = codebook_weight mean (sg[z] - e)^2 + beta mean (z - sg[e])^2, sg: no gradient
    (van den Oord et al. 2017, equation 3, with the mean over elements that its implementations take).

    Args:
        z: [N, D], float16, bfloat16, float32 or float64; any strides.
        codebook: [K, D], on the same device.
        metric: "euclidean", or "cosine": rows and codes are divided by max(norm, 1e-12) first, and their gradients go
            through that.
        beta: the weight of the commitment term, whose gradient goes to z.
        codebook_weight: of the term whose gradient goes to the codebook; 0 for one that follows a moving average.
        gradient: what reaches z from z_q: "straight_through" passes it on (Bengio et al. 2013); "rotation" turns it as
            z was turned onto its code and stretches it by |e| / |z| (Fifty et al. 2024, section 4.2); z_q of a row of
            zeros, which has no direction, is its code too; "none" gives it to the codebook, as an embedding's.
        mask: bool [N]; where it is False z_q is 0, the code -1, and the loss and gradients do without the row.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        (z_q [N, D], codes [N] int64, loss in float32, or float64 for float64). The loss is 0 without rows. What is
        not a number in z is none in z_q, which is z + (e - z): with "rotation" the whole row, with "none" nothing.

    Deterministic: two runs are equal bitwise. Differentiable in z and codebook, whose gradient is a sum of
    `code_statistics`. Raises as `nearest_code`.
    """
    z, codebook = _rows_and_codes(z, codebook)
    codes = nearest_code(z, codebook, metric=metric, mask=mask, backend=backend)
    if metric == "cosine":
        acc, dtype = accumulation_dtype(z.dtype), z.dtype
        z, codebook = (F.normalize(t.to(acc), dim=1).to(dtype) for t in (z, codebook))
    z_q, loss = assign_code(
        z, codebook, codes, beta=beta, codebook_weight=codebook_weight, gradient=gradient, masked=mask is not None,
        backend=backend,
    )  # fmt: skip
    return z_q, codes, loss
