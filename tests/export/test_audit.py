"""The audit of float16's range finds what overflows, and nothing in graphs where nothing does."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmfuse.export import export_onnx, export_served
from mmfuse.export.served import build, served

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
inliner = pytest.importorskip("onnx.inliner")
pytest.importorskip("onnxscript")
audit = pytest.importorskip("mmfuse.export.audit")

pytestmark = pytest.mark.xdist_group("export")

WIDTH, HEADS, LENGTH = 32, 4, 6


class Block(nn.Module):
    """A transformer's layer with a mask, and a unit vector of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.where(kept, 0.0, -10000.0)[:, None, None].to(x.dtype)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        mean = x.mean(1)
        return mean / mean.norm(dim=-1, keepdim=True)


def given(seed: int, batch: int = 3) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(batch, LENGTH, generator=draw) > 0.3
    kept[:, 0] = True
    return {"x": torch.randn(batch, LENGTH, WIDTH, generator=draw).numpy(), "kept": kept.numpy()}


CALIBRATION = [given(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": Block()})["a"]
    path = tmp_path_factory.mktemp("audit") / "block.onnx"
    inputs = {name: torch.from_numpy(t) for name, t in given(0).items()}
    return onnx.load(export_onnx(model, inputs, path, dynamic={"x": {0: "batch"}, "kept": {0: "batch"}}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return onnx.load(export_served("clip", tmp_path_factory.mktemp("audit") / "clip.onnx", "tiny"))


@cache
def pairs(seed: int, batch: int = 3) -> dict[str, Any]:
    """Images and texts for it."""
    part = served("clip")
    sizes = {"image_batch": batch, "text_batch": batch}
    return {name: t.numpy() for name, t in part.inputs(build("clip", part.tiny), sizes, seed).items()}


def test_a_clean_graph_passes(clean: Any) -> None:
    found = audit.audit_float16(clean, CALIBRATION)
    assert found.first is None and len(found.ranges) > 20
    assert list(found.masked_rows.values()) == ["uniform (masked with -10000)"]


def test_in_float16_too(clean: Any) -> None:
    half = copy.deepcopy(clean)
    for t in half.graph.initializer:
        values = onnx.numpy_helper.to_array(t)
        if values.dtype == np.float32:
            t.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), t.name))
    half.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    assert audit.audit_float16(half, CALIBRATION).first is None


def test_inputs_are_asked_for(clean: Any) -> None:
    with pytest.raises(ValueError, match="inputs is empty"):
        audit.audit_float16(clean, [])


# --- injected overflows: what may be injected where is drawn here, without a look at the audit -----------------------


def scaled_weight(graph: Any, draw: random.Random) -> None:
    """Some matrix or vector of weights is far too large."""
    weights = [t for t in graph.initializer if t.dims and t.data_type == onnx.TensorProto.FLOAT]
    weights = [t for t in weights if np.prod(t.dims) >= WIDTH]
    t = draw.choice(weights)
    factor = 10 ** draw.uniform(6, 8)
    values = onnx.numpy_helper.to_array(t).astype(np.float64) * factor
    t.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), t.name))


def inserted(op: str) -> Any:
    """Behind some node, an operation that makes it large, and one that takes it back."""

    def edit(graph: Any, draw: random.Random) -> None:
        floating = [
            n for n in graph.node if n.op_type in ("MatMul", "Add", "Gelu", "LayerNormalization", "Mul", "Softmax")
        ]
        node = draw.choice(floating)
        at = list(graph.node).index(node)
        name, grown, back = node.output[0], f"grown_{at}", f"back_{at}"
        value = {"Mul": 10 ** draw.uniform(7, 9), "Add": 10 ** draw.uniform(5.2, 7), "Div": 10 ** -draw.uniform(7, 9)}[
            op
        ]
        inverse = {"Mul": "Div", "Add": "Sub", "Div": "Mul"}[op]
        graph.initializer.append(onnx.helper.make_tensor(f"by_{at}", onnx.TensorProto.FLOAT, [], [value]))
        for later in list(graph.node)[at + 1 :]:
            later.input[:] = [back if i == name else i for i in later.input]
        graph.node.insert(at + 1, onnx.helper.make_node(inverse, [grown, f"by_{at}"], [back], name=f"undo_{at}"))
        graph.node.insert(at + 1, onnx.helper.make_node(op, [name, f"by_{at}"], [grown], name=f"inject_{at}"))

    return edit


def powered(graph: Any, draw: random.Random) -> None:
    """A high power of activations."""
    node = draw.choice([n for n in graph.node if n.op_type in ("LayerNormalization", "MatMul")])
    at, name = list(graph.node).index(node), node.output[0]
    exponent = float(draw.choice([24, 32, 40]))
    graph.initializer.append(onnx.helper.make_tensor(f"by_{at}", onnx.TensorProto.FLOAT, [], [exponent]))
    graph.initializer.append(onnx.helper.make_tensor(f"two_{at}", onnx.TensorProto.FLOAT, [], [3.0]))
    graph.node.insert(at + 1, onnx.helper.make_node("Pow", [f"tripled_{at}", f"by_{at}"], [f"power_{at}"]))
    graph.node.insert(at + 1, onnx.helper.make_node("Mul", [name, f"two_{at}"], [f"tripled_{at}"]))
    graph.output.append(onnx.helper.make_tensor_value_info(f"power_{at}", onnx.TensorProto.FLOAT, None))


INJECTIONS = (scaled_weight, inserted("Mul"), inserted("Add"), inserted("Div"), powered)


def really_overflows(file: Any, feed: dict[str, Any]) -> bool:
    """Whether some value but a mask's leaves float16's range on inputs that the audit is not given."""
    watched = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(file))
    floating = [v for v in watched.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    watched.graph.output.extend(v for v in floating)
    names = [v.name for v in watched.graph.output]
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, feed)
    return any(t.dtype == np.float32 and not (np.abs(t[~(t < -1e30)]) <= 65504).all() for t in found)


def test_a_hundred_injected_overflows(clean: Any, clip: Any) -> None:
    draw, missed = random.Random(0), []
    for graph, draws, injections in ((clean, given, 60), (clip, pairs, 40)):
        calibration, feed = [draws(seed) for seed in range(3)], draws(99, batch=8)
        assert audit.audit_float16(graph, calibration).first is None and not really_overflows(graph, feed)
        while injections:
            file = copy.deepcopy(graph)
            edit = draw.choice(INJECTIONS)
            edit(file.graph, draw)
            if not really_overflows(file, feed):
                continue
            injections -= 1
            if audit.audit_float16(file, calibration).first is None:
                missed.append(edit.__qualname__)
    assert len(missed) <= 5, missed


def test_the_first_node_is_named(clean: Any) -> None:
    file = copy.deepcopy(clean)
    inserted("Mul")(file.graph, random.Random(1))
    first = audit.audit_float16(file, CALIBRATION).first
    assert first is not None and first.node.startswith("inject_") and first.observed > 65504
