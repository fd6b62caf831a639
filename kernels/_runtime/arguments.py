"""Checks of arguments that the families share: an error names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.dtypes import accumulation_dtype, autocast_is_on, cast

PIXELS = "uint8 or a floating-point dtype"


def check(
    name: str,
    t: Any,
    shape: Sequence[int | str] | None = None,
    note: str = "",
    dtype: torch.dtype | Sequence[torch.dtype] | str = "a floating-point dtype",
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise unless `t` is a tensor of this shape, of this dtype, and on the device of another argument.

    Args:
        shape: sizes, or names of sizes that are free, e.g. ("B", 3).
        note: on the shape, e.g. ", one for each row of image".
        dtype: one, several, "a floating-point dtype", `PIXELS` or "integers".
        like: name and tensor of the other argument.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {type(t).__name__}, expected a tensor {_sizes(shape)}{note}")
    if shape is not None and shape != t.shape and not _fits(shape, t.shape):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {_sizes(shape)}{note}")
    if dtype == "integers":
        fits = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    elif isinstance(dtype, str):
        fits = t.is_floating_point() or (dtype == PIXELS and t.dtype == torch.uint8)
    else:
        dtype = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        fits = t.dtype in dtype
    if not fits:
        expected = dtype if isinstance(dtype, str) else " or ".join(map(str, dict.fromkeys(dtype)))
        raise TypeError(f"{name} has dtype {t.dtype}, expected {expected}")
    if like is not None and t.device != like[1].device:
        raise ValueError(f"{name} is on {t.device}, expected {like[1].device} as {like[0]}")


def _fits(shape: Sequence[int | str], sizes: Sequence[int]) -> bool:
    if len(shape) != len(sizes):
        return False
    # a loop: a generator costs as much as all else that is checked, and "strict" as much as the loop
    for expected, size in zip(shape, sizes):  # noqa: B905, SIM110
        if not isinstance(expected, str) and expected != size:
            return False
    return True


def _sizes(shape: Sequence[int | str] | None) -> str:
    return "" if shape is None else f"[{', '.join(map(str, shape))}]"


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What a matrix product of `t` rounds its operands to, where autocast is on; it leaves float64 alone."""
    if not torch._C._is_any_autocast_enabled():  # as a rule: to name a device takes longer
        return None
    on = autocast_is_on(t.device.type) and t.dtype != torch.float64
    return torch.get_autocast_dtype(t.device.type) if on else None


def norm_of(norm: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a LayerNorm as it is given."""
    try:
        weight, bias, eps = norm
    except (TypeError, ValueError):
        raise ValueError(f"norm is {norm!r}, expected (weight [D] or None, bias [D] or None, eps)") from None
    return weight, bias, real("norm's eps", eps)


def autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """As a matrix product would take them."""
    dtype = autocast_dtype(operands[0])
    return operands if dtype is None else tuple(cast(t, dtype) for t in operands)


def integers(name: str, ids: Tensor | None, rows: Tensor, of: str) -> Tensor:
    """Ids of the rows of `of`, int64 and contiguous."""
    check(name, ids, rows.shape[:1], f", one for each row of {of}", "integers", (of, rows))
    return cast(ids, torch.int64).contiguous()  # type: ignore[arg-type]


def require_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}, expected an integer")


def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a 0-d tensor."""
    if not torch.compiler.is_compiling():
        return torch.scalar_tensor(value, dtype=dtype, device=device)
    # as a factor it stays a variable of the graph; any other use compiles it anew for each value
    return torch.ones((), dtype=dtype, device=device) * value


def real(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r}, expected a number") from None


def scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a 0-d tensor in the accumulation dtype of `like`, keeping its graph."""
    acc = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        try:
            return number(value, acc, like.device)
        except (TypeError, RuntimeError):  # of what is no number, and of a complex one
            raise TypeError(f"{name} is {type(value).__name__}, expected a number or a tensor of one element") from None
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one element")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point dtype")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} as the features")
    return cast(value if value.dim() == 0 else value.reshape(()), acc)


def multiplier(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`scalar`, for a factor of logits: NaN if it is infinite, as in eager code, where terms of both signs meet."""
    if type(value) is float and not torch.compiler.is_compiling() and math.isfinite(value):
        return scalar(name, value, like)
    factor = scalar(name, value, like)
    # read where nothing has to wait for it
    plain = factor.is_cpu and type(value) in (Tensor, torch.nn.Parameter) and outside_a_trace()
    if plain and math.isfinite(factor.item()):
        return factor
    return torch.add(factor, factor, alpha=0)


def check_range(name: str, ids: Tensor, n: int, of: str, least: int = 0) -> None:
    """Raise unless least <= id < n; not sought on a GPU, which would wait, or in a trace."""
    if not ids.is_cpu or not outside_a_trace() or type(ids) is not Tensor or not ids.numel():
        return
    least_id, largest_id = ids.aminmax()
    low, high = int(least_id.item()), int(largest_id.item())
    if low < least or high >= n:
        wrong = low if low < least else high
        raise ValueError(f"{name} has {wrong}, expected {least} <= {name.removesuffix('s')} < {n}, {of}")


def constant(values: float | Iterable[float], device: torch.device) -> Tensor:
    """Numbers as a tensor [n] in float64, copied to the device once.

    A copy waits for the host, and cannot be captured in a CUDA graph.
    """
    given = (float(values),) if isinstance(values, (int, float)) else tuple(map(float, values))
    return _constant(given, device) if outside_a_trace() else torch.tensor(given, dtype=torch.float64, device=device)


@functools.lru_cache(256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode, and may be saved for a gradient then
        return torch.tensor(values, dtype=torch.float64, device=device)


def outside_a_trace() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
