"""No child of a reference model is passed over in silence: its hook is called, or the model refuses it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mmfuse.export.served import SERVED, build
from mmfuse.kernels._runtime import UnsupportedError

KINDS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return torch.stack([o.square().sum() for o in outputs if o.is_floating_point()]).sum()


@pytest.mark.parametrize("name", [name for name in SERVED if name != "vqkd"])  # its codes have no gradient
def test_a_hook_is_called_or_refused(name: str) -> None:
    served = SERVED[name]
    model = build(name.partition("/")[0], served.configuration("tiny")).eval().requires_grad_()
    part, inputs = served.module(model).eval(), served.inputs(model)
    loss(part(**inputs)).backward()
    own = dict(model.named_parameters())  # what is tied, once
    # the first of each kind that has a part in the outputs, but for what torch's own attention reads
    children = {
        re.sub(r"\d+", "N", path): child
        for path, child in reversed(list(model.named_modules()))
        if isinstance(child, KINDS) and not isinstance(child, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if f"{path}.weight" in own and child.weight.grad is not None and child.weight.grad.any()
    }
    assert children
    called: set[str] = set()
    for path, child in children.items():
        with torch.no_grad(), child.register_forward_hook(lambda *of, path=path: called.add(path)):
            try:
                part(**inputs)
            except UnsupportedError as error:
                assert "has hooks" in str(error), path
            else:
                assert path in called
