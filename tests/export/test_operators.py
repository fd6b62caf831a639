"""Every operator that a model calls leaves as a node whose function computes what it computes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmfuse
from every_operator import DYNAMIC, Everything, inputs
from mmfuse import fused
from mmfuse.export import export_onnx, plugins
from mmfuse.export.lint import lint
from mmfuse.kernels._runtime import operators
from mmfuse.kernels.text import embed_pair

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
inliner = pytest.importorskip("onnx.inliner")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.xdist_group("export")

# why an operator has no node
WITHOUT = {
    **dict.fromkeys(
        (
            "clip_loss", "siglip_loss", "distill_clip_loss", "distributed_clip_loss", "distributed_siglip_loss",
            "global_contrastive_loss", "grouped_clip_loss", "queue_itc_loss", "moco_loss", "masked_patch_loss",
            "linear_cross_entropy",
        ),
        "a loss",
    ),
    "hard_negatives": "draws for training",
    "code_statistics": "moves a codebook in training",
    "vector_quantize": "its codes come from nearest_code; what follows is the loss and a gather",
    "mini_pointnet_training": "statistics of a batch in training",
    "farthest_points": "a loop as long as the result, which ONNX would have unrolled",
    "ball_query": "a comparison and a TopK",
    "group_points": "a gather",
}  # fmt: skip


def test_every_operator_has_a_node_or_a_reason() -> None:
    assert fused.linear_cross_entropy  # declares its operator
    every = {op.name: op for op in operators().values()}
    without = {name for name, op in every.items() if op.export is None}
    assert without == WITHOUT.keys(), "give it an OpSpec, or the reason why it has none"
    names = [op.export.onnx_name for op in every.values() if op.export is not None]
    assert len(set(names)) == len(names) and all(name.startswith("Mmfuse") for name in names)
    assert not set(names) & {schema.name for schema in onnx.defs.get_all_schemas()}


@pytest.fixture(scope="module")
def model() -> Everything:
    return Everything().eval()


@pytest.fixture(scope="module")
def path(model: Everything, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(model, inputs(), tmp_path_factory.mktemp("all") / "all.onnx", dynamic=DYNAMIC)


def run(path: Path, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    taken = {i.name for i in session.get_inputs()}
    found = session.run(names, {name: t.numpy() for name, t in given.items() if name in taken})
    return {name: torch.from_numpy(t) for name, t in zip(names, found, strict=True)}


def facts(file: Any) -> dict[str, str]:
    return {p.key.removeprefix("mmfuse."): p.value for p in file.metadata_props}


def judge(name: str, got: torch.Tensor, own: torch.Tensor, true: torch.Tensor) -> None:
    assert got.shape == own.shape and got.dtype == own.dtype, name
    if not got.is_floating_point():
        assert torch.equal(got, own), name
        return
    error, allowed = ((t.double() - true).abs().max() for t in (got, own))
    ulp = torch.finfo(torch.float32).eps * true.abs().max()
    assert error <= 2 * allowed + 4 * ulp, f"{name}: {error} against {allowed}"


def test_every_node_has_a_plugin_or_a_reason() -> None:
    exported = {op.name for op in operators().values() if op.export is not None}
    plugin, none = plugins.PLUGINS, plugins.WITHOUT
    assert plugin.keys() | none.keys() == exported and not plugin.keys() & none.keys()
    page = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.M))
    assert said == {name: f"no: {none[name]}" if name in none else "yes" for name in exported}


def test_a_norm_before_a_product_has_no_plugin(path: Path) -> None:
    linears = [node for node in plugins.nodes_of(path) if node.operator == "routed_linear"]
    normed = [node for node in linears if "gammas" in node.inputs]
    assert len(linears) == 2 and len(normed) == 1
    with pytest.raises(mmfuse.UnsupportedError, match="has a norm before its product"):
        plugins.PLUGINS["routed_linear"](normed[0])


def test_functions_compute_what_the_operators_do(model: Everything, path: Path) -> None:
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    present = {next(a.s.decode() for a in n.attribute if a.name == "operator") for n in file.graph.node if n.domain}
    declared = {op.name for op in operators().values() if op.export is not None}
    # as these have: test_nodes_of_any_length
    assert declared - present == {"embed_pair", "patch_embed_packed"}
    assert lint(file, facts(file)) == []
    exact = copy.deepcopy(model).double()
    for sizes in ({}, {"batch": 1, "length": 7, "rows": 2}, {"batch": 4, "length": 3, "rows": 9}):
        given = inputs(**sizes, seed=1)
        found = run(path, given)
        with torch.no_grad():
            eager = model(**given)
            true = exact(**{n: t.double() if t.is_floating_point() else t for n, t in given.items()})
        for name, own in eager.items():
            judge(name, found[name], own, true[name])


def test_a_function_in_line_is_the_formula(path: Path) -> None:
    file = inliner.inline_local_functions(onnx.load(path))
    assert not file.functions and {n.domain for n in file.graph.node} == {""}
    assert [f.rule for f in lint(file, facts(file))] and {f.rule for f in lint(file, facts(file))} == {"kept_nodes"}


class Pair(nn.Module):
    """An image's and a text's tokens by one operator."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"weight": (16, 3, 8, 8), "bias": (16,), "cls_token": (16,), "position": (7, 16), "table": (40, 16)}
        shapes["text_position"] = (12, 16)
        self.given = nn.ParameterDict({name: torch.randn(s, generator=draw) for name, s in shapes.items()})

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": embed_pair(pixels, ids, mean=(0.4, 0.5, 0.6), std=0.25, **self.given)}


class Packed(nn.Module):
    """Patches of images of any sizes, whose positions are resampled to each."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"weight": (16, 12), "bias": (16,), "table": (4, 4, 16)}
        self.given = nn.ParameterDict({name: torch.randn(s, generator=draw) for name, s in shapes.items()})

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = mmfuse.patch_embed_packed(patches, grids, mean=0.5, std=0.5, **self.given)
        return {"tokens": found.tokens, "cu_seqlens": found.cu_seqlens, "ids": found.ids}


def pairs(batch: int, length: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(batch)
    pixels = torch.randint(0, 256, (batch, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return {"pixels": pixels, "ids": torch.randint(0, 40, (batch, length), generator=draw)}


def packed(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows = sum(h * w for h, w in grids)
    return {
        "patches": torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)),
        "grids": torch.tensor(grids),
    }


@pytest.mark.parametrize(
    ("make", "samples", "dynamic"),
    [
        (Pair, [pairs(3, 5), pairs(1, 10), pairs(4, 2)], {"pixels": {0: "batch"}, "ids": {0: "batch", 1: "length"}}),
        (
            Packed,
            [packed((2, 3), (4, 5)), packed((1, 1)), packed((6, 2), (3, 3), (1, 4))],
            {"patches": {0: "rows"}, "grids": {0: "images"}},
        ),
    ],
)
def test_nodes_of_any_length(make: Any, samples: Any, dynamic: Any, tmp_path: Path) -> None:
    model = make().eval()
    path = export_onnx(model, samples[0], tmp_path / "node.onnx", dynamic=dynamic)
    file, exact = onnx.load(path), copy.deepcopy(model).double()
    assert [n.op_type for n in file.graph.node if n.domain] == [f.name for f in file.functions] and file.functions
    assert lint(file, facts(file)) == []
    for given in samples:
        found = run(path, given)
        with torch.no_grad():
            eager = model(**given)
            true = exact(**{n: t.double() if t.is_floating_point() else t for n, t in given.items()})
        for name, own in eager.items():
            judge(name, found[name], own, true[name])


# --- rules ----------------------------------------------------------------------------------------------------------


def broken(path: Path, edit: Any) -> set[str]:
    """The rules that a file breaks after an edit."""
    file = onnx.load(path)
    changed = edit(file) or {}
    return {found.rule for found in lint(file, facts(file) | changed)}


def first_node(file: Any) -> Any:
    return next(n for n in file.graph.node if n.domain)


def renamed(file: Any, name: str) -> None:
    node = first_node(file)
    function = next(f for f in file.functions if f.name == node.op_type)
    function.name = node.op_type = name


def without_function(file: Any) -> None:
    file.functions.pop()


def without_plugin(file: Any) -> None:
    node = first_node(file)
    kept = [a for a in node.attribute if a.name != "plugin_namespace"]
    del node.attribute[:]
    node.attribute.extend(kept)


def other_opset(file: Any) -> None:
    file.functions[0].opset_import[0].version = 17


def fewer_inputs(file: Any) -> None:
    first_node(file).input.pop()


def outer_name(file: Any) -> None:
    function = file.functions[0]
    old, new = function.input[0], file.graph.input[0].name
    function.input[0] = new
    for node in function.node:
        node.input[:] = [new if name == old else name for name in node.input]


def untyped(file: Any) -> None:
    function = file.functions[0]
    made = onnx.helper.make_node("Constant", [], [f"{function.name}__one"], value_float=1.0)
    function.node.insert(0, made)


def too_large(file: Any) -> dict[str, str]:
    file.graph.initializer.append(onnx.helper.make_tensor("big", onnx.TensorProto.FLOAT, [1], [70000.0]))
    return {"dtype": "float16"}


def infinite(file: Any) -> None:
    file.graph.initializer.append(onnx.helper.make_tensor("big", onnx.TensorProto.FLOAT, [2], [0.0, float("-inf")]))


def attention(file: Any) -> dict[str, str]:
    file.graph.node.append(onnx.helper.make_node("Attention", ["tokens"] * 3, ["a", "b"], name="attention"))
    return {"target": "trt"}


def new_opset(file: Any) -> dict[str, str]:
    for of in (file, *file.functions):
        next(o for o in of.opset_import if not o.domain).version = 25
    return {"target": "trt"}


@pytest.mark.parametrize(
    ("edit", "rules"),
    [
        (lambda file: renamed(file, "Relu"), {"own_name"}),
        (lambda file: renamed(file, "MultiHeadAttention"), {"own_name"}),
        (without_function, {"has_function"}),
        (without_plugin, {"has_function"}),
        (other_opset, {"one_opset"}),
        (fewer_inputs, {"every_input"}),
        (outer_name, {"own_values"}),
        (untyped, {"typed_constants"}),
        (too_large, {"in_range"}),
        (infinite, {"in_range"}),
        (attention, {"decomposed_attention", "plain_attention"}),
        (new_opset, {"known_opset"}),
    ],
)
def test_a_broken_rule_is_found(edit: Any, rules: set[str], path: Path) -> None:
    assert rules <= broken(path, edit)
