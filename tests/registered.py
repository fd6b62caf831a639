"""The operator that a call of a public function comes to: where it runs, what torch knows of it, what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mmfuse.kernels._runtime.operator import Operator, reached
from mmfuse.kernels._runtime.signature import spread


def backends(call: Callable[[], Any], name: str | None = None) -> list[str]:
    """The implementations that run for a call when they are named."""
    operator, args, _ = reached(call, name)
    return operator.available(args)


def reasons(call: Callable[[], Any], name: str | None = None) -> dict[str, list[str]]:
    """Each implementation's reasons not to run for a call."""
    operator, args, _ = reached(call, name)
    return operator.explain(args)


def registered(call: Callable[[], Any], name: str | None = None) -> tuple[Any, tuple[Any, ...]]:
    """(torch's operator, its arguments) that a call comes to."""
    operator, args, backend = reached(call, name)
    op = operator.implementations[operator.choose(args, backend)].op
    flat = operator.signature.flatten(args)
    leaves = spread(flat[i] for i in operator.leaves)
    needs = [[t is not None and t.requires_grad for t in leaves]] if operator.wants_needs else []
    return op, (*flat, *needs)


class _Calls(TorchDispatchMode):
    """Records the operators of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mmfuse":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def opcheck(call: Callable[[], Any], name: str | None = None, **options: Any) -> None:
    """`torch.library.opcheck` of the operator that a call comes to, forward and backward, on its arguments."""
    op, args = registered(call, name)
    torch.library.opcheck(op, args, **options)
    with _Calls() as calls:
        outputs = [t for t in tree_leaves(call()) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            return
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    backward = f"{op.name().split('.')[0]}_backward"
    given = [args for op, args in calls.found if op.name().split(".")[0] == backward]
    if backward.split("::")[1] in dir(torch.ops.mmfuse):
        assert given, f"{backward} was not called"
    for args in given:
        plain = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, args)
        torch.library.opcheck(getattr(torch.ops.mmfuse, backward.split("::")[1]).default, plain, **options)


def watched(monkeypatch: pytest.MonkeyPatch, operator: Operator, backend: str, *methods: str) -> list[list[int]]:
    """How many numbers each result has of every call of these methods of an implementation's passes."""
    implementation, seen = operator.implementations[backend], []
    inner = implementation.passes

    class Watched:
        def __getattr__(self, name: str) -> Any:
            method = getattr(inner, name)

            def call(*args: Any) -> Any:
                out = method(*args)
                seen.append([t.numel() for t in out])
                return out

            return call if name in methods else method

    monkeypatch.setattr(implementation, "passes", Watched())
    return seen
