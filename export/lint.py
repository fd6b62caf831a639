"""Rules by which every runtime reads a file as it was meant. Each comes from a failure that was seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mmfuse.export.nodes import DOMAIN

if TYPE_CHECKING:
    import onnx

LARGEST_HALF = 65504.0
NEWEST_OPSET = {"trt": 24, "trt-rtx": 24}
# beyond ONNX's own; TensorRT's parser looks at these names in any domain
TENSORRT_NAMES = frozenset(
    [
        "BatchedNMS_TRT",
        "BatchedNMSDynamic_TRT",
        "BiasGelu",
        "CustomQKVToContextPluginDynamic",
        "CustomSkipLayerNormPluginDynamic",
        "EfficientNMS_TRT",
        "FastGelu",
        "FusedConv",
        "GroupNormalizationPlugin",
        "GroupQueryAttention",
        "InstanceNormalization_TRT",
        "LayerNorm",
        "MultiHeadAttention",
        "MultiscaleDeformableAttnPlugin_TRT",
        "PriorBox_TRT",
        "QuickGelu",
        "ROIAlign_TRT",
        "RotaryEmbedding",
        "ScatterElements",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Swish",
        "TRT_Attention",
        "TRT_FP8DequantizeLinear",
        "TRT_FP8QuantizeLinear",
        "TRT_INT4DequantizeLinear",
        "TRT_INT4QuantizeLinear",
        "TRT_KVCacheUpdate",
        "TRT_MoE",
    ]
)


class Finding(NamedTuple):
    rule: str
    where: str
    what: str


def lint(file: onnx.ModelProto, facts: Mapping[str, str]) -> list[Finding]:
    """What breaks a rule in a file with the facts that `export_onnx` recorded."""
    return [Finding(rule.__name__, *found) for rule in RULES for found in rule(file, facts)]


Found = Iterator[tuple[str, str]]


def own_name(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """The name of a node of ours is no operator's: TensorRT would take a builtin for it, silently."""
    import onnx

    builtin = {schema.name for schema in onnx.defs.get_all_schemas()} | TENSORRT_NAMES
    names = {n.op_type for n in every_node(file) if n.domain == DOMAIN} | {f.name for f in file.functions}
    yield from ((name, "is the name of a builtin operator") for name in sorted(names & builtin))
    counts = Counter(f.name for f in file.functions)
    yield from ((name, f"names {n} functions") for name, n in counts.items() if n > 1)


def has_function(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """Every node of ours has a function, and tells its plugin's name."""
    functions = {(f.domain, f.name) for f in file.functions}
    for node in every_node(file):
        if node.domain != DOMAIN:
            continue
        if (node.domain, node.op_type) not in functions and facts.get("mode") != "custom":
            yield node.name or node.op_type, f"{node.op_type} has no function"
        given = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
        if given.get("plugin_namespace") != DOMAIN or "plugin_version" not in given:
            yield node.name or node.op_type, f"{node.op_type} has no plugin_namespace {DOMAIN!r} with a plugin_version"


def one_opset(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """A function is of the model's opset, or tools that put it in line refuse."""
    opset = opset_of(file)
    for f in file.functions:
        if (own := opset_of(f)) != opset:
            yield f.name, f"is of opset {own}, the model of {opset}"


def every_input(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """A node gives each input of its function."""
    inputs = {(f.domain, f.name): len(f.input) for f in file.functions}
    for node in every_node(file):
        n = inputs.get((node.domain, node.op_type))
        if n is not None and (len(node.input) != n or not all(node.input)):
            yield node.name or node.op_type, f"{node.op_type} has {sum(map(bool, node.input))} inputs, expected {n}"


def own_values(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """Names in a function are its own: parsers have taken an outer tensor of the same name."""
    outer = {name for n in file.graph.node for name in n.output} | {t.name for t in file.graph.initializer}
    outer |= {v.name for v in file.graph.input}
    for f in file.functions:
        names = [*f.input, *(name for n in f.node for name in n.output if name)]
        if wrong := [name for name in names if not name.startswith(f"{f.name}__") or name in outer]:
            yield f.name, f"has a value {wrong[0]!r}, expected {f.name}__..."


def typed_constants(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """A constant of a function has the dtype of what it meets."""
    for f in file.functions:
        cast = {n.input[0] for n in f.node if n.op_type == "CastLike"}
        for n in f.node:
            untyped = n.op_type == "Constant" and n.attribute[0].name in ("value_float", "value_floats")
            if untyped and n.output[0] not in cast:
                yield f.name, f"{n.output[0]} is float32 whatever the model's dtype"


def in_range(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """No mask is infinite, nor a constant beyond float16 in such a file; one -inf may stand for what is no number."""
    import numpy as np

    for name, tensor in constants(file):
        values = tensor()
        if values is None or values.dtype.kind != "f" or not values.size:
            continue
        with np.errstate(all="ignore"):
            largest = np.abs(values.astype(np.float64)).max()
        if not np.isfinite(largest):
            if values.size > 1:
                yield name, "is not finite"
        elif facts.get("dtype") == "float16" and largest > LARGEST_HALF:
            yield name, f"has {largest:g}, float16 ends at {LARGEST_HALF:g}"


def decomposed_attention(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """TensorRT builds ONNX's Attention in 16 bits alone."""
    if facts.get("target") in NEWEST_OPSET and facts.get("dtype") == "float32":
        yield from ((n.name, "is Attention in float32") for n in every_node(file) if n.op_type == "Attention")


def known_opset(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    newest = NEWEST_OPSET.get(facts.get("target", ""), 25)
    if (opset := opset_of(file)) > newest:
        yield "opset", f"is {opset}, the target reads up to {newest}"


def plain_attention(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """TensorRT's Attention has 4 dimensions, one output and no cache."""
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*file.graph.value_info, *file.graph.input)}
    for n in every_node(file):
        if n.op_type != "Attention" or n.domain:
            continue
        if any(ranks.get(name, 4) != 4 for name in n.input[:3]) or len([o for o in n.output if o]) > 1:
            yield n.name, "is an Attention of other than 4 dimensions or with more than one output"


def kept_nodes(file: onnx.ModelProto, facts: Mapping[str, str]) -> Found:
    """No optimiser has put functions in line since."""
    written = json.loads(facts.get("operators", "{}"))
    present = Counter(n.op_type for n in every_node(file) if n.domain == DOMAIN)
    for name, n in written.items():
        if present[name] != n:
            yield name, f"has {present[name]} nodes, {n} were written: an optimiser put its function in line"


RULES = (
    own_name,
    has_function,
    one_opset,
    every_input,
    own_values,
    typed_constants,
    in_range,
    decomposed_attention,
    known_opset,
    plain_attention,
    kept_nodes,
)


def every_node(file: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Of the graph, of graphs within nodes and of functions."""
    todo = [*file.graph.node, *(n for f in file.functions for n in f.node)]
    while todo:
        node = todo.pop()
        yield node
        for a in node.attribute:
            for graph in (*([a.g] if a.HasField("g") else []), *a.graphs):
                todo += graph.node


def opset_of(of: Any) -> int:
    return next((o.version for o in of.opset_import if o.domain in ("", "ai.onnx")), 0)


def constants(file: onnx.ModelProto) -> Iterator[tuple[str, Any]]:
    """(name, a function that reads it) of all; None where it lies in another file."""
    from onnx.numpy_helper import to_array

    def reading(t: Any) -> Any:
        return lambda: None if t.external_data else to_array(t)

    yield from ((t.name, reading(t)) for t in file.graph.initializer)
    for n in every_node(file):
        for a in n.attribute:
            if n.op_type in ("Constant", "ConstantOfShape") and a.name == "value":
                yield n.output[0], reading(a.t)
