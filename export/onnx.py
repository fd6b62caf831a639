"""PyTorch to one ONNX file that every runtime takes and that says what it holds."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

import mmfuse
from mmfuse.export.nodes import (
    DOMAIN,
    Nodes,
    NoFunction,
    attach,
    evaluated,
    is_free,
    placeholders,
    reason,
    traced,
    translated,
)
from mmfuse.export.require import require
from mmfuse.fused import decelerate
from mmfuse.fused.acceleration.method import is_accelerated
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.dtypes import dtype_name

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger("mmfuse")

Target = Literal["portable", "ort", "trt", "trt-rtx"]
Mode = Literal["functions", "decomposed", "custom"]

# From 23 on attention is one node, which TensorRT builds in 16 bits alone.
OPSETS = {
    "portable": {torch.float32: 18, torch.float16: 18, torch.bfloat16: 18},
    "ort": {torch.float32: 18, torch.float16: 18, torch.bfloat16: 18},
    "trt": {torch.float32: 18, torch.float16: 23, torch.bfloat16: 23},
    "trt-rtx": {torch.float32: 18, torch.float16: 23, torch.bfloat16: 23},
}
MODES = ("functions", "decomposed", "custom")
SINGLE_FILE_BYTES = 2_000_000_000  # protobuf ends at 2 GiB, and the graph needs its share


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    target: Target = "portable",
    mode: Mode = "functions",
    opset: int | None = None,
    outputs: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a module, in its own dtype and in evaluation mode, to an ONNX file. The module is left as it was.

    Any module: ours, those of other libraries, before or after `mmfuse.accelerate`. Each fused operator is a node
    `mmfuse::Mmfuse...` with its plugin's name among the attributes and a function of standard operators in the file,
    which a runtime without our kernel puts in its place. Weights above 2 GB go to `path` + ".data" beside it; shared
    ones are stored once. Of weights on the meta device the file has no numbers: they are inputs, behind the others.
    What is written appears complete or not at all.

    Args:
        inputs: of forward, by name or in order: tensors, or lists, tuples and dicts of them, which become inputs
            `name.0`, `name.key`; numbers, strings and None are part of the graph. They are samples: sizes that are
            free should be at least 2 and differ, and the values do not matter.
        dynamic: for an input's name, the dimensions that are free, each with a name: {"image": {0: "batch"}}. Equal
            names are one size. For a container, the dimensions of each of its tensors. By default none is.
        target: "portable" (opset 18); "ort": fused by `fuse_for_ort` where that is right and not slower, and else the
            portable file, with a warning in the log; "trt" or "trt-rtx" (opset 23 in 16 bits). TensorRT's plugins are
            one launch: for "trt" an operator of several becomes operators of one each, where it can.
        mode: "functions"; "decomposed": standard operators alone; "custom": nodes without functions, for a runtime
            that has our kernels.
        opset: in place of the target's.
        outputs: names; by default the keys of a dict or the fields of a named tuple, else "output" with a number.
        facts: to be recorded in the file's metadata, as `mmfuse.<key>`, beside the versions.

    Returns:
        The path.

    Raises:
        ValueError: an argument does not fit, or `path` cannot be written.
        TypeError: the model is no module, or its dtype is none of float32, float16 and bfloat16.
        UnsupportedError: onnx or onnxscript is missing, or a part of the model has no form in ONNX; the message names
            the module and the reason.
    """
    path = Path(path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    for name, value, known in (("target", target, tuple(OPSETS)), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    check_writable(path)
    require("onnx", "onnxscript")
    given = Given(model, inputs, dynamic or {})
    dtype = dtype_of(model, given.tensors)
    if opset is None:
        opset = OPSETS[target][dtype]
    program, apart = _exported(model, given, opset, mode, target == "trt", outputs)
    versions = {"version": mmfuse.__version__, "torch": torch.__version__}
    what = {"target": target, "mode": mode, "opset": opset, "dtype": dtype_name(dtype), "dynamic": given.said}
    ours = Counter(node.op_type for node in program.graph.all_nodes() if node.domain == DOMAIN)
    sha256 = None if any(t.is_meta for t in model.state_dict().values()) else fingerprint(model)
    holds = {"weights_sha256": sha256, "operators": json.dumps(ours), "apart": apart}
    found = versions | what | holds | dict(facts or {})
    program.metadata_props.update({f"mmfuse.{key}": str(fact) for key, fact in found.items() if fact is not None})
    _write(program, path)
    if target == "ort":
        from mmfuse.export.ort import fuse_for_ort  # which saves as this module does

        try:
            fused = fuse_for_ort(path)
            logger.log(logging.INFO if fused.kept else logging.WARNING, "%s: %s", path, fused)
        except (UnsupportedError, ValueError) as error:
            logger.warning("%s: the plain file: %s", path, error)
    return path


def check_writable(path: Path) -> None:
    """Before what takes long."""
    if path.is_dir():
        raise ValueError(f"path is {str(path)!r}, which is a folder, expected a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"path is {str(path)!r}, which cannot be written: {path.parent} is no folder to write in")


def _exported(
    model: nn.Module, given: Given, opset: int, mode: str, launches: bool, outputs: Sequence[str] | None
) -> tuple[onnx_ir.Model, str | None]:
    """The graph of a model with its functions, and what had to be taken apart, and why."""
    nodes = None if mode == "decomposed" else Nodes(launches=launches)
    while True:
        try:
            program = _program(model, given, opset, nodes, outputs)
            if nodes is not None and mode == "functions":
                attach(program, nodes, opset)
        except NoFunction as error:
            nodes = Nodes((nodes or Nodes()).apart | {error.operator: error.why}, launches)
        except UnsupportedError as error:
            if not is_accelerated(model):
                raise
            warnings.warn(f"fused code has no form in ONNX, its class's own code is exported: {error}", stacklevel=3)
            model = copy.deepcopy(model)
            decelerate(model)
            program, _ = _exported(model, given, opset, mode, launches, outputs)
            return program, str(error)
        else:
            why = "; ".join(f"{operator}: {why}" for operator, why in nodes.apart.items()) if nodes else None
            return program, why or None


def _program(
    model: nn.Module, given: Given, opset: int, nodes: Nodes | None, outputs: Sequence[str] | None
) -> onnx_ir.Model:
    """The graph of a model, without functions."""
    called = Called(on_cpu(_without_numbers(model)), given)
    with evaluated(called):
        try:
            program = traced(called, given.tensors, given.dynamic, nodes)
        except Exception as error:  # torch.export has many
            raise _unsupported(model, error, None) from error
        sizes = given.sizes(program)
        names = {"input_names": given.names, "output_names": called.output_names(outputs)}
        try:
            onnx = translated(program, given.tensors, opset=opset, **names)
        except torch.onnx.errors.OnnxExporterError as error:
            raise _unsupported(model, error, program) from error
    _outputs_alone(onnx)
    _name_sizes(onnx, sizes)
    _name_weights(onnx, given.names)
    return onnx


class Given:
    """The inputs of a model: which tensors there are, by what names, and of what sizes."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], dynamic: Mapping[str, Mapping[int, str]]
    ):
        if isinstance(inputs, Tensor) or not isinstance(inputs, (Mapping, Sequence)):
            raise TypeError(f"inputs is {type(inputs).__name__}, expected a mapping by name, or a sequence")
        self.by_name = isinstance(inputs, Mapping)
        if not isinstance(inputs, Mapping):
            known = list(inspect.signature(model.forward).parameters)
            inputs = dict(zip(known, inputs, strict=False))
        self.output_paths: list[str] = []
        self.leaves, self.spec = tree_flatten(dict(inputs))
        paths = [path for path, _ in tree_flatten_with_path(dict(inputs))[0]]
        named = [_dotted(path) for path in paths]
        self.at = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.names = [named[i] for i in self.at]
        self.tensors = [self.leaves[i].detach().cpu() for i in self.at]
        if not self.tensors:
            raise ValueError("inputs has no tensor, expected at least one")
        self.said = {name: dict(dims) for name, dims in dynamic.items()} or None
        top = [str(paths[i][0].key) for i in self.at]  # type: ignore[attr-defined]  # of a mapping
        for name, dims in dynamic.items():
            if name not in self.names and name not in top:
                raise ValueError(f"dynamic names {name!r}, expected one of the inputs {', '.join(self.names)}")
            for which, of, t in zip(self.names, top, self.tensors, strict=True):
                if wrong := [d for d in dims if name in (which, of) and not 0 <= d < t.dim()]:
                    raise ValueError(f"dynamic of {name!r} has axis {wrong[0]}, expected one of 0 to {t.dim() - 1}")
        # by a tensor's own name before its container's
        self.dims = [dynamic.get(which, dynamic.get(of, {})) for which, of in zip(self.names, top, strict=True)]
        # the names come later: torch would take them as a promise that no two of them have to be equal
        self.dynamic = {"given": tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in self.dims)}

    def arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        leaves = list(self.leaves)
        for i, t in zip(self.at, tensors, strict=True):
            leaves[i] = t
        return tree_unflatten(leaves, self.spec)

    def sizes(self, program: torch.export.ExportedProgram) -> dict[str, str]:
        """The name of each size that torch calls s0, s1, ...; raises where one that was to be free is none."""
        found: dict[str, str] = {}
        for name, dims, t in zip(self.names, self.dims, placeholders(program), strict=True):
            for axis, of in dims.items():
                n = t.shape[axis]
                if not is_free(n):
                    raise ValueError(
                        f"dynamic of {name!r} has axis {axis}, but the model takes {n} there and nothing else"
                    )
                found.setdefault(str(n), of)
        return found


class Called(nn.Module):
    """A model as a function of tensors to tensors, whatever containers it takes and returns."""

    def __init__(self, model: nn.Module, given: Given):
        super().__init__()
        self.model = model
        self._given = given

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        arguments = self._given.arguments(given)
        found = self.model(**arguments) if self._given.by_name else self.model(*arguments.values())
        if hasattr(found, "to_tuple") and isinstance(found, Mapping):  # transformers' outputs
            found = dict(found)
        elif hasattr(found, "_asdict"):
            found = found._asdict()
        leaves = [(path, t) for path, t in tree_flatten_with_path(found)[0] if isinstance(t, Tensor)]
        self._given.output_paths = [_dotted(path) for path, _ in leaves]  # torch undoes what is set on a module
        return tuple(t for _, t in leaves)

    def output_names(self, asked: Sequence[str] | None) -> list[str]:
        paths = self._given.output_paths
        if asked is not None:
            if len(asked) != len(paths):
                raise ValueError(f"outputs has {len(asked)} names, expected {len(paths)}, one for each tensor")
            return list(asked)
        bare = "output_{}" if len(paths) > 1 else "output"
        names = [bare.format(path) if not path or path.isdigit() else path for path in paths]
        # an output with an input's name would be that input
        return [f"{name}_out" if name in self._given.names else name for name in names]


def _dotted(path: Sequence[Any]) -> str:
    words = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
    return ".".join(map(str, words))


def dtype_of(model: nn.Module, tensors: Sequence[Tensor] = ()) -> torch.dtype:
    """What a model computes in: the dtype of most of its numbers."""
    counts: dict[torch.dtype, int] = {}
    for t in (*model.parameters(), *model.buffers()) or tensors:
        if t.is_floating_point():
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    dtype = max(counts, key=lambda d: counts[d]) if counts else torch.float32
    if dtype not in OPSETS["portable"]:
        raise TypeError(f"dtype is {dtype_name(dtype)}, expected float32, float16 or bfloat16")
    return dtype


def on_cpu(model: nn.Module) -> nn.Module:
    elsewhere = any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers()))
    return copy.deepcopy(model).cpu() if elsewhere else model


def _without_numbers(model: nn.Module) -> nn.Module:
    """The model, or where weights are on the meta device a copy that has torch's fake ones of the CPU instead."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_meta]
    if not tensors:
        return model
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        fake = [torch.empty_like(t, device="cpu") for t in tensors]
    pairs = zip(tensors, fake, strict=True)
    return copy.deepcopy(model, {id(t): nn.Parameter(f) if isinstance(t, nn.Parameter) else f for t, f in pairs})


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's state dict: names and bytes."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        if isinstance(t, Tensor):
            digest.update(name.encode())
            digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _outputs_alone(onnx: onnx_ir.Model) -> None:
    """Values inside have other names than outputs: torch calls one "linear" whatever an output is called."""
    outputs = {value.name for value in onnx.graph.outputs}
    inside = [value for node in onnx.graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    taken = outputs | {value.name for value in inside}
    for value in inside:
        if value.name in outputs:
            value.name = next(name for i in count() if (name := f"{value.name}_{i}") not in taken)


def _name_sizes(onnx: onnx_ir.Model, names: Mapping[str, str]) -> None:
    import onnx_ir as ir

    def named(n: Any) -> Any:
        if not isinstance(n, ir.SymbolicDim) or n.value is None:
            return n
        return ir.SymbolicDim(re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), n.value))

    nodes = [output for node in onnx.graph.all_nodes() for output in node.outputs]
    for value in (*onnx.graph.inputs, *onnx.graph.outputs, *nodes):
        if value.shape is not None:
            value.shape = ir.Shape([named(n) for n in value.shape])


def _name_weights(onnx: onnx_ir.Model, inputs: Sequence[str]) -> None:
    """Weights by their names in the model, and those that are shared once."""
    for value in onnx.graph.inputs[len(inputs) :]:
        value.name = str(value.name).removeprefix("model.")
    weights = onnx.graph.initializers
    first: dict[Any, Any] = {}
    for own, value in list(weights.items()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor) and raw.numel():
            key = (raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride())
            if key in first and not value.is_graph_output():
                value.replace_all_uses_with(first[key])
                del weights[own]
                continue
            first[key] = value
        if own.startswith("model."):
            name = own.removeprefix("model.")
            if name not in weights and all(name != v.name for v in (*onnx.graph.inputs, *onnx.graph.outputs)):
                value.name = name


def save(program: onnx_ir.Model, path: Path) -> None:
    """As one file, or with large weights in another beside it."""
    import onnx_ir as ir

    weights = [value.const_value for value in program.graph.initializers.values()]
    size = sum(weight.nbytes for weight in weights if weight is not None)
    ir.save(program, path, external_data=f"{path.name}.data" if size > SINGLE_FILE_BYTES else None)


def move(folder: Path, to: Path) -> None:
    """The files of `save`, in place of others: the weights before the graph that names them."""
    for file in sorted(folder.iterdir(), reverse=True):
        os.replace(file, to / file.name)


def _write(program: onnx_ir.Model, path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            save(program, Path(folder, path.name))
            move(Path(folder), path.parent)
    except OSError as error:
        raise ValueError(f"path is {str(path)!r}, which cannot be written: {error}") from error


def _unsupported(
    model: nn.Module, error: Exception, program: torch.export.ExportedProgram | None
) -> UnsupportedError | Exception:
    """What cannot be exported, with the module that it is in."""
    reasons, cause = [], error
    while cause is not None:
        reasons.append(str(cause))
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    where = ""
    # the exporter names what an operation was taken apart into
    programs = () if program is None else (program, program.run_decompositions())
    for node in (node for each in programs for node in each.graph.nodes):
        if node.op == "call_function" and any(str(node.target) in why or repr(node.target) in why for why in reasons):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            where = f" in {stack[-1][0].removeprefix('model.') or 'the model'}: {node.target}" if stack else ""
            break
    return UnsupportedError(f"{type(model).__name__} cannot be exported{where}: {reason(error)}")
