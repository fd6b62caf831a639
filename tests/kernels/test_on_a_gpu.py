"""What the interpreter cannot show, for every operator that is measured: CUDA graphs, tensors of 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmfuse.bench.cases import Case, everything
from mmfuse.kernels._runtime import UnsupportedError

pytestmark = pytest.mark.gpu
CASES = {case.name: case for case in everything()}

# one tensor or more of each has over 2^31 elements: features, logits that are kept, or what is made in between
LARGE: dict[str, dict[str, int]] = {
    "nearest_code": {"N": 2**26 + 8, "K": 64, "D": 32},
    "clip": {"N": 47000, "D": 64},
    "grouped_clip": {"N": 47000, "D": 64},
    "max_query": {"B": 24000, "N": 96000, "Q": 2, "D": 16},
    "queue_itc": {"B": 8, "M": 2**23 + 8, "D": 256},
    "topk": {"B": 16, "N": 2**22 + 8, "D": 512},
    "embed_text": {"B": 64, "L": 64, "V": 2**22 + 8, "D": 512},
    "select_head": {"B": 8200, "L": 257, "D": 1024, "O": 16},
    "packed": {"B": 16384, "L": 256, "G": 16, "D": 16},
    "masked_loss": {"B": 15000, "S": 224},
    "position": {"G": 14, "H": 1500, "D": 1024},
    "patch_embed_train": {"B": 15000, "S": 224, "P": 14, "D": 16},
    "multiway": {"B": 15000, "S": 224, "L": 8, "D": 16},
    "mini_pointnet": {"B": 260, "G": 512, "D": 16},
}


def results(case: Case, inputs: tuple[Any, ...], **how: Any) -> list[Tensor]:
    """The outputs, and the gradients of all inputs that have one."""
    found = case.ours(*inputs, **how)
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    outputs = [t.detach() for t in tree_leaves(found)]
    return [*outputs, *torch.autograd.grad(found, leaves)] if "fwd+bwd" in case.modes else outputs


def inputs_for(case: Case, backend: str, shape: dict[str, int], dtype: torch.dtype) -> tuple[Any, ...]:
    try:
        case.chosen(case.inputs(torch.device("cuda"), dtype, **case.small), backend)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return case.inputs(torch.device("cuda"), dtype, **shape)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_in_a_cuda_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = inputs_for(case, backend, case.small, torch.bfloat16)
    want = results(case, inputs, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(case, inputs, backend=backend)
    for t in got:
        t.zero_()
    graph.replay()
    for output, (a, b) in zip(case.outputs, zip(got, want, strict=True), strict=True):
        assert torch.equal(a, b), output


@pytest.mark.parametrize("name", LARGE)
def test_beyond_2_31_elements(name: str) -> None:
    case = CASES[name]
    inputs = inputs_for(case, "triton", LARGE[name], torch.bfloat16)
    options = {"save": "store"} if "save" in case.options else {}
    got = results(case, inputs, backend="triton", **options)
    implementations = case.providers
    want = results(case, inputs, backend="chunked" if "mmfuse-chunked" in implementations else "torch")
    for output, a, b in zip(case.outputs, got, want, strict=True):
        if not a.is_floating_point():
            assert (a == b).float().mean() > 0.99, output
            continue
        # an address that has wrapped around is no rounding error
        assert torch.dist(a.float(), b.float()) <= 0.02 * torch.linalg.vector_norm(b.float()), output
