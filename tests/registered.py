"""The operators that torch knows, as a call of a public function comes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmfuse.kernels._runtime.operator import reached


def registered(call: Callable[[], Any], name: str | None = None) -> tuple[Any, tuple[Any, ...]]:
    """(torch's operator, its arguments) that a call comes to."""
    operator, args, backend = reached(call, name)
    op = operator.implementations[operator.choose(args, backend)].op
    flat = operator.signature.flatten(args)
    leaves = (flat[i] for i in operator.leaves)
    needs = [[t is not None and t.requires_grad for t in leaves]] if operator.wants_needs else []
    return op, (*flat, *needs)


def opcheck(call: Callable[[], Any], name: str | None = None, **options: Any) -> None:
    """`torch.library.opcheck` of the operator that a call comes to, forward and backward, on its arguments."""
    op, args = registered(call, name)
    torch.library.opcheck(op, args, **options)
