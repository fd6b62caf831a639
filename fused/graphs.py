"""A whole encoder at fixed shapes as one CUDA graph: inference of a small batch costs no launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmfuse.kernels._runtime.arguments import check

_ON = "cuda"


def captured(fn: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """`fn(*inputs)`, without gradients, as a function of such inputs that replays a CUDA graph.

    Args:
        fn: a module or function of tensors, e.g. a `QFormer` from images to states. It waits for nothing on the host
            and makes everything on the inputs' device. Weights are read where they lie at each call; a module goes to
            `eval()` first.
        inputs: examples, whose shapes and dtypes are those of every call.

    Returns:
        A function of as many tensors. Its results are new ones; it is not for several threads or streams at a time.

    Raises:
        ValueError, TypeError: an input is not on a CUDA device, or one of a call is not as the example.
    """
    for i, t in enumerate(inputs):
        check(f"inputs[{i}]", t)
        if t.device.type != _ON:
            raise ValueError(f"inputs[{i}] is on {t.device}, expected a {_ON} device")
    held = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and workspaces made outside of a graph
            fn(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = fn(*held)

    def replay(*given: Tensor) -> Any:
        if len(given) != len(held):
            raise TypeError(f"{len(given)} inputs, expected {len(held)}")
        for i, (t, into) in enumerate(zip(given, held, strict=True)):
            check(f"inputs[{i}]", t, into.shape, ", as the example's", into.dtype, ("the example", into))
            into.copy_(t)
        graph.replay()
        return tree_map_only(Tensor, Tensor.clone, results)

    return replay
