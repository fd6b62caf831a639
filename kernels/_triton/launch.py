"""Launches of Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.device import INTERPRET


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, **arguments: Any) -> None:
    """Launch on the device of `on`, arguments by name; where torch traces, the launch becomes part of its graph."""
    if not INTERPRET and torch._C._len_torch_dispatch_stack():
        torch.library.wrap_triton(kernel)[grid](**arguments)
        return
    # a kernel reads memory: a negated view would be read without its sign
    arguments = {name: a.resolve_neg() if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with torch.cuda.device_of(on):
        kernel[grid](**arguments)
