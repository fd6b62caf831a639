"""Which node of a graph can leave float16's range, before any engine exists.

Functions are put in line and the graph is run in float32 on calibration inputs, with every value as an output. A node
can overflow if the bound of its largest magnitude exceeds 65504. The bound is the smaller of two: `MARGIN` times the
largest that was observed, as other inputs may be larger, and what its kind, its inputs' bounds and its weights allow,
as LayerNorm or Softmax do whatever comes in. Accumulation within a node is taken to be in float32, as runtimes do it,
but for sums of squares, which a norm's root hides.

Values at or below -1e30, among them -inf, are masks, and with float16's lowest number as a constant those about it:
they are no overflow, but what a row that is masked altogether becomes is told for each Softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmfuse.export.lint import LARGEST_HALF
from mmfuse.export.require import require

if TYPE_CHECKING:
    import numpy as np
    import onnx

MARGIN = 4.0
MASK, MASK_OF_HALF = -1e30, -6e4


class Range(NamedTuple):
    """Of a node's values."""

    node: str
    op: str
    observed: float  # the largest finite magnitude
    bound: float

    @property
    def overflows(self) -> bool:
        return not self.bound <= LARGEST_HALF


class Audit(NamedTuple):
    ranges: list[Range]  # in the order in which nodes run
    masked_rows: dict[str, str]  # of each Softmax behind a mask, what a row becomes that is masked altogether

    @property
    def first(self) -> Range | None:
        """The first node that can overflow."""
        return next((r for r in self.ranges if r.overflows), None)


def audit_float16(path: str | Path | onnx.ModelProto, inputs: Sequence[Mapping[str, np.ndarray]]) -> Audit:
    """Bounds of every node of a file, given inputs by name that are like those it will get.

    Raises:
        ValueError: no inputs.
        UnsupportedError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    import onnx
    from onnx import inliner

    if not inputs:
        raise ValueError("inputs is empty, expected at least one set of them")
    file = onnx.load(path) if isinstance(path, (str, Path)) else path
    graph = in_float32(inliner.inline_local_functions(file))
    constants = _constants(graph)
    lowest = min((float(t.min()) for t in constants.values() if t.dtype.kind == "f" and t.size), default=0.0)
    mask = MASK_OF_HALF if lowest == -LARGEST_HALF else MASK
    observed = _observe(graph, inputs, mask)
    bounds = {name: _largest(t, mask) for name, t in constants.items()}
    for value in graph.graph.input:
        bounds[value.name] = MARGIN * observed.get(value.name, math.inf)
    ranges = []
    for node in graph.graph.node:
        allowed = _ALLOWED.get(node.op_type, _anything)(node, bounds, constants)
        for name in node.output:
            if name in observed:
                bounds[name] = min(MARGIN * observed[name], allowed)
        found = [name for name in node.output if name in observed]
        if found and node.op_type != "Constant":
            largest = max(observed[name] for name in found)
            bound = max(_within(node, bounds[name]) for name in found)
            ranges.append(Range(node.name or found[0], node.op_type, largest, bound))
    return Audit(ranges, _masked_rows(graph, constants))


def _within(node: onnx.NodeProto, bound: float) -> float:
    """The largest number on the way to a node's result."""
    return bound * bound if node.op_type == "ReduceL2" else bound


# --- what a kind of node allows -------------------------------------------------------------------------------------

Bounds = Mapping[str, float]
Constants = Mapping[str, Any]


def _anything(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    return math.inf


def _one(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    return 1.0


def _of_inputs(combine: Callable[[list[float]], float]) -> Callable[..., float]:
    def allowed(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
        return combine([bounds.get(name, math.inf) for name in node.input if name])

    return allowed


def _first(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    return bounds.get(node.input[0], math.inf)


def _chosen(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    return max(bounds.get(name, math.inf) for name in node.input[1:])


def _layer_norm(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    """sqrt(D) |gamma| + |beta|: a row's largest, if all the others are equal."""
    if node.input[1] not in constants:
        return math.inf
    width = math.sqrt(constants[node.input[1]].size)
    return width * bounds[node.input[1]] + (bounds.get(node.input[2], math.inf) if len(node.input) > 2 else 0.0)


def _product(node: onnx.NodeProto, bounds: Bounds, constants: Constants) -> float:
    """Of an input's bound with the largest sum of a column of weights."""
    import numpy as np

    weight = constants.get(node.input[1])
    if weight is None or weight.ndim < 2 or node.op_type != "MatMul":
        return math.inf
    return bounds.get(node.input[0], math.inf) * float(np.abs(weight.astype(np.float64)).sum(-2).max())


_ALLOWED: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("Sigmoid", "Softmax", "Tanh", "Erf", "Sin", "Cos"), _one),
    **dict.fromkeys(
        (
            "Identity",
            "Transpose",
            "Reshape",
            "Slice",
            "Gather",
            "Expand",
            "Squeeze",
            "Unsqueeze",
            "Split",
            "Relu",
            "ReduceMean",
            "ReduceMax",
            "Flatten",
            "Cast",
        ),
        _first,
    ),  # fmt: skip
    "Where": _chosen,
    "Concat": _of_inputs(max),
    **dict.fromkeys(("Add", "Sub"), _of_inputs(sum)),
    "Mul": _of_inputs(math.prod),
    "LayerNormalization": _layer_norm,
    "MatMul": _product,
}


# --- what comes out -------------------------------------------------------------------------------------------------


def in_float32(file: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, computed in float32 where it is in 16 bits."""
    import numpy as np
    import onnx
    from onnx import TensorProto, numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(file)
    short = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

    def widened(t: onnx.TensorProto) -> None:
        if t.data_type in short:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float32), t.name))

    for tensor in copy.graph.initializer:
        widened(tensor)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type in short:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del copy.graph.value_info[:]
    for node in copy.graph.node:
        for a in node.attribute:
            if a.HasField("t"):
                widened(a.t)
            if node.op_type == "Cast" and a.name == "to" and a.i in short:
                a.i = TensorProto.FLOAT
    return copy


def _observe(file: onnx.ModelProto, inputs: Sequence[Mapping[str, np.ndarray]], mask: float) -> dict[str, float]:
    """The largest finite magnitude of every floating-point value; infinite where a number became none."""
    import numpy as np
    import onnx
    import onnxruntime

    typed = onnx.shape_inference.infer_shapes(file)
    floating = {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floating |= {v.name for v in typed.graph.output if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    asked = [name for node in file.graph.node for name in node.output if name in floating]
    present = {v.name for v in file.graph.output}
    watched = onnx.ModelProto()
    watched.CopyFrom(file)
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in asked if name not in present
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {i.name: i.type for i in session.get_inputs()}
    largest: dict[str, float] = {}
    for given in inputs:
        feed = {n: a.astype(np.float32) if taken[n] == "tensor(float)" else a for n, a in given.items() if n in taken}
        values = dict(feed) | dict(zip(asked, session.run(asked, feed), strict=True))
        for name, value in values.items():
            if value.dtype == np.float32:
                largest[name] = max(largest.get(name, 0.0), _largest(value, mask))
    return largest


def _largest(t: np.ndarray, mask: float) -> float:
    """The largest magnitude of what is above a mask's value; infinite for NaN and for +inf."""
    import numpy as np

    if t.dtype.kind != "f" or not t.size:
        return 0.0
    value = t.astype(np.float64)
    if np.isnan(value).any() or np.isposinf(value).any():
        return math.inf
    value = value[value > mask]
    return float(np.abs(value).max()) if value.size else 0.0


def _constants(file: onnx.ModelProto) -> dict[str, Any]:
    from onnx.numpy_helper import to_array

    found = {t.name: to_array(t) for t in file.graph.initializer}
    for node in file.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = to_array(node.attribute[0].t)
    return found


# --- masks ----------------------------------------------------------------------------------------------------------

_THROUGH = {"Add", "Where", "Expand", "Cast", "Reshape", "Unsqueeze", "Mul", "Slice", "Transpose", "Identity", "Trilu"}


def _masked_rows(file: onnx.ModelProto, constants: Constants) -> dict[str, str]:
    made = {name: node for node in file.graph.node for name in node.output}
    read: dict[str, list[Any]] = {}
    for node in file.graph.node:
        for name in node.input:
            read.setdefault(name, []).append(node)
    found = {}
    for node in file.graph.node:
        if node.op_type != "Softmax":
            continue
        lowest, todo, seen = 0.0, [node.input[0]], set[str]()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in constants and constants[name].dtype.kind == "f" and constants[name].size:
                lowest = min(lowest, float(constants[name].min()))
            elif name in made and made[name].op_type in _THROUGH:
                todo += made[name].input
        if lowest <= -1e4:
            guarded = any(n.op_type in ("IsNaN", "Where", "Mul") for n in read.get(node.output[0], ()))
            what = "0" if guarded else "NaN" if lowest == -math.inf else "uniform"
            found[node.name or node.output[0]] = f"{what} (masked with {lowest:g})"
    return found
