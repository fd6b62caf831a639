"""Every operator that makes tokens: one graph in torch.compile, an exported program of any batch size, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse import kernels
from mmfuse.kernels._runtime import operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def real(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def u8(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def upto(n: int, *shape: int) -> Tensor:
    return torch.randint(0, n, shape, device=DEVICE)


def some(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE) < 0.5


WIDTHS = ((6, 3), (8, 6), (10, 16), (12, 10))
torch.manual_seed(0)  # of the weights, which are drawn at import
LAYERS = [(real(out, into), real(out)) for out, into in WIDTHS]
HEAD = (torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 1e-6)
WEIGHT, TABLE, PROJECTION, EXPERTS = real(6, 3, 4, 4), real(9, 6), real(5, 8), real(2, 5, 8)
KEYS = real(2, 2, 8, 6)

# operator: a function of tensors whose first dimension is the batch (of a position table: is fixed), and such tensors
BIAS = real(2, 6, 6)
OPS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "patch_embed": (lambda x: kernels.patch_embed(x, WEIGHT, mean=0.5, std=0.25), lambda b: (u8(b, 3, 8, 12),)),
    "patch_embed_packed": (
        lambda x, grids: kernels.patch_embed_packed(x, grids, WEIGHT.flatten(1), table=TABLE, mean=0.5).tokens,
        lambda b: (real(b, 6, 48), torch.tensor([[2, 3], [1, 4], [3, 1], [2, 2], [0, 5]], device=DEVICE)[:b]),
    ),
    "masked_patch_loss": (
        lambda y, x, mask: kernels.masked_patch_loss(y, x, mask, patch=4, mean=(0.5, 0.4, 0.3)),
        lambda b: (real(b, 4, 48), u8(b, 3, 8, 8), some(b, 4)),
    ),
    "random_masking": (lambda noise: kernels.random_masking(noise, 4), lambda b: (torch.rand(b, 9, device=DEVICE),)),
    "nearest_code": (lambda z: kernels.nearest_code(z, TABLE, metric="cosine"), lambda b: (real(b, 6),)),
    "linear_argmax": (lambda x: kernels.codebook.linear_argmax(x, TABLE, TABLE[:, 0]), lambda b: (real(b, 6),)),
    "code_statistics": (lambda z, c: kernels.codebook.code_statistics(z, c, 5), lambda b: (real(b, 6), upto(5, b))),
    "vector_quantize": (
        lambda z, mask: kernels.vector_quantize(z, TABLE, metric="euclidean", gradient="rotation", mask=mask),
        lambda b: (real(b, 6), some(b)),
    ),
    "fsq": (lambda z: kernels.codebook.fsq(z, [8, 5, 5]), lambda b: (real(b, 3),)),
    "lfq_entropy": (lambda z: kernels.codebook.lfq_entropy(z), lambda b: (real(b, 4),)),
    "farthest_points": (lambda p: kernels.points.farthest_points(p, 4), lambda b: (real(b, 20, 3),)),
    "nearest_neighbors": (
        lambda q, p: kernels.points.nearest_neighbors(q, p, 4),
        lambda b: (real(b, 5, 3), real(b, 20, 3)),
    ),
    "ball_query": (lambda q, p: kernels.points.ball_query(q, p, 4, 0.9), lambda b: (real(b, 5, 3), real(b, 20, 3))),
    "group_points": (kernels.points.group_points, lambda b: (real(b, 20, 6), upto(20, b, 5, 4))),
    "mini_pointnet": (lambda x: kernels.points.mini_pointnet(x, LAYERS), lambda b: (real(b, 8, 3),)),
    "mini_pointnet_training": (
        lambda x: kernels.points.mini_pointnet_training(x, LAYERS, LAYERS[2][1]),
        lambda b: (real(b, 8, 3),),
    ),
    "embed_text": (lambda ids: kernels.text.embed_text(ids, TABLE), lambda b: (upto(9, b, 5),)),
    "embed_pair": (
        lambda x, ids: kernels.text.embed_pair(
            x, ids, weight=WEIGHT, position=TABLE, table=TABLE, text_position=TABLE, pad_mask=ids < 3
        ),
        lambda b: (real(b, 3, 8, 8), upto(9, b, 5)),
    ),
    "select_head": (
        lambda x, index: kernels.head.select_head(x, index, HEAD, PROJECTION),
        lambda b: (real(b, 7, 8), upto(7, b)),
    ),
    "routed_linear": (
        lambda x, ids: kernels.routed_linear(x, EXPERTS, None, kernels.Routing.from_ids(ids, 2)),
        lambda b: (real(b, 8), upto(2, b)),
    ),
    "routed_ffn": (
        lambda x, ids: kernels.routed_ffn(
            x, EXPERTS, None, EXPERTS.transpose(1, 2), None, kernels.Routing.from_ids(ids, 2)
        ),
        lambda b: (real(b, 8), upto(2, b)),
    ),
    "routed_layer_norm": (
        lambda x, ids: kernels.routed_layer_norm(x, EXPERTS[:, 0], EXPERTS[:, 1], kernels.Routing.from_ids(ids, 2)),
        lambda b: (real(b, 8), upto(2, b)),
    ),
    "packed_attention": (
        lambda q, k, v, splits: kernels.packed_attention(q, k, v, kernels.Routing.from_splits(splits, 6), bias=BIAS),
        lambda b: (*(real(6 * b, 2, 4) for _ in range(3)), upto(6, b)),
    ),
    "routed_rms_norm": (
        lambda x, ids: kernels.routed_rms_norm(x, EXPERTS[:, 0], kernels.Routing.from_ids(ids, 2)),
        lambda b: (real(b, 8), upto(2, b)),
    ),
    "project_kv": (
        lambda x: kernels.project_kv(x, KEYS, None, 2, (TABLE[0], TABLE[1], 1e-5)),
        lambda b: (real(b, 3, 6),),
    ),
    "few_query_attention": (
        lambda q, k, v, of: kernels.few_query_attention(q, k, v, of, return_lse=True),
        lambda b: (real(b, 2, 2, 4), real(b, 5, 2, 4), real(b, 5, 2, 4), upto(3, b)),
    ),
    "token_attention": (
        lambda q, x, lengths: kernels.token_attention(q, x, KEYS[0, 0], KEYS[0, 1], None, lengths, return_lse=True),
        lambda b: (real(b, 2, 2, 4), real(b, 5, 6), upto(6, b)),
    ),
    "interpolate_position": (
        lambda table: kernels.interpolate_position(table, (5, 7), "bicubic"),
        lambda b: (real(4, 4, 6),),
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_compiled_whole(op: str) -> None:
    function, make = OPS[op]
    data = make(3)
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*data)
    torch.testing.assert_close(got, function(*data))


# a program is for the routing's number of rows
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("routed", "packed_attention"))])
def test_exported_for_any_batch(op: str) -> None:
    function, make = OPS[op]

    class Module(nn.Module):
        def forward(self, *data: Tensor) -> Any:
            return function(*data)

    data = make(3)
    batches = (({0: torch.export.Dim.AUTO},) * len(data),)
    program = torch.export.export(Module(), data, dynamic_shapes=batches)
    larger = make(5)
    torch.testing.assert_close(program.module()(*larger), function(*larger))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_no_synchronisation(op: str) -> None:
    function, make = OPS[op]
    data = make(3)
    function(*data)  # numbers are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_operator_is_here() -> None:
    assert (set(operators()) & set(kernels.__all__)) - set(dir(kernels.contrastive)) <= set(OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on the device ends the process")
@pytest.mark.parametrize("index", [-1, 7])
def test_a_token_out_of_range_is_found_in_a_graph(index: int) -> None:
    """Not the last token for -1, as an index of plain torch would have it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, at: kernels.head.select_head(x, at, HEAD, PROJECTION), fullgraph=True)
    x, at = real(3, 7, 8), torch.full((3,), 6)
    torch.testing.assert_close(compiled(x, at), kernels.head.select_head(x, at, HEAD, PROJECTION))
    with pytest.raises(RuntimeError, match="index out of bounds|out of bounds"):
        compiled(x, torch.full((3,), index))
