"""Registration of operators with torch, and loading of the compiled part."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmfuse.kernels._runtime.device import once

_PACKAGE = Path(__file__).resolve().parents[2]


def register(
    name: str,
    fn: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `fn` as `torch.ops.mmfuse.<name>` and return the function to call.

    `fake` gives the outputs' shapes; `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are as for
    `torch.library.register_autograd`. Plain eager calls skip the dispatcher, which costs more than a small kernel
    takes; compiling, exporting and transforms see the registered operator. Inside `fn` autocast is off: an operator
    chooses its own precision.
    """
    schema = torch.library.infer_schema(fn, mutates_args=())

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        kind = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(kind):
            return fn(*args)
        with torch.autocast(kind, enabled=False):
            return fn(*args)

    op = torch.library.custom_op(f"mmfuse::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    eager: Callable[..., Any] = run
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
        differentiate = backward

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = run(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                with torch.no_grad():
                    inputs = differentiate(ctx, *grads)
                return _differentiable_once(name, inputs) if torch.is_grad_enabled() else inputs

        eager = Eager.apply

    def call(*args: Any) -> Any:
        return eager(*args) if _plain(args) else op(*args)

    call.op = op  # type: ignore[attr-defined]  # the registered operator, for opcheck
    return call


def _differentiable_once(name: str, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same gradients, which raise when differentiated again instead of silently contributing nothing."""
    tensors = [g for g in grads if g is not None]
    refuse = torch._C._functions.DelayedError(f"mmfuse::{name} is differentiable once, not twice", len(tensors))
    guarded = refuse(*(g.detach().requires_grad_() for g in tensors))
    left = iter(guarded if isinstance(guarded, tuple) else (guarded,))
    return tuple(None if g is None else next(left) for g in grads)


def _plain(args: tuple[Any, ...]) -> bool:
    """Only real tensors, and nothing that traces or transforms is active."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(a) in (torch.Tensor, torch.nn.Parameter) for a in args if isinstance(a, torch.Tensor))
    )


@once
def load(part: str) -> str | None:
    """Load `mmfuse/_C_<part>.so`, once. Returns None, or the reason why its operators are not there."""
    path = _PACKAGE / "mmfuse" / f"_C_{part}.so"
    if not path.exists():  # installed: kernels/ lies inside the package
        path = _PACKAGE / f"_C_{part}.so"
    if not path.exists():
        return f"the compiled part _C_{part} was not built" + _why_not_built(path.parent, part)
    if part == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled part _C_{part} does not load beside torch {torch.__version__}: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What setup.py wrote when it built the compiled part; empty when it built nothing."""
    for folder in (_PACKAGE / "mmfuse", _PACKAGE):
        path = folder / "_build_info.json"
        if path.exists():
            return json.loads(path.read_text())
    return {}


def _why_not_built(folder: Path, part: str) -> str:
    reason = build_info().get("parts", {}).get(part, {}).get("reason")
    return f" ({reason})" if reason else ""
