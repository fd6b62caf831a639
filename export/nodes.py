"""Fused operators in an ONNX graph: each is a node of the domain "mmfuse" with a function of standard operators.

A runtime that has our kernel takes the node; any other puts the function in its place. While a graph is traced, `Nodes`
stands in for operators that have an `OpSpec`; functions are attached to the finished model, as optimisers would put
them in line.
"""

from __future__ import annotations

import builtins
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from mmfuse.kernels._runtime import Operator
from mmfuse.kernels._runtime.dispatch import exporting
from mmfuse.kernels._runtime.signature import is_list, is_tensor

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "mmfuse"
# where a size is known only when the model runs
_ANY_SIZE = 7


def formula(operator: Operator, args: Sequence[Any]) -> Any:
    """What stands for an operator that is taken apart."""
    return operator.formula(args)


@dataclass(frozen=True)
class Call:
    """The function that a node stands for: an operator, of what the node does not have as an input."""

    operator: Operator
    spec: TreeSpec
    leaves: Sequence[Any]  # constants; a Tensor or SymInt is an input, of which only kind and size matter
    name: str

    @property
    def given(self) -> list[Any]:
        return _inputs(self.leaves)

    def compute(self, given: Iterable[Any]) -> Any:
        """The operator, with other values of its inputs."""
        values = iter(given)
        leaves = [next(values) if isinstance(leaf, (Tensor, torch.SymInt)) else leaf for leaf in self.leaves]
        return self.operator.body(self.operator.signature.restore(tree_unflatten(leaves, self.spec)))

    def attributes(self) -> dict[str, Any]:
        """The operator's other arguments, as far as they are known before the model runs."""
        flat = tree_unflatten(list(self.leaves), self.spec)
        named = zip(self.operator.signature.flat, flat, strict=True)
        found = {name: _attribute(value) for name, value in named}
        own = {"plugin_namespace": DOMAIN, "plugin_version": "1", "operator": self.operator.name}
        return own | {name: value for name, value in found.items() if value is not None}


class NoFunction(Exception):
    """An operator whose formula cannot be a function for these arguments."""

    def __init__(self, operator: str, why: str):
        super().__init__(f"{operator}: {why}")
        self.operator, self.why = operator, why


@dataclass
class Nodes:
    """Stands in for operators while a graph is traced, and remembers what its nodes mean.

    Args:
        apart: operators that are taken apart all the same, and why.
        launches: whether an operator of several launches becomes operators of one each, where it can.
    """

    apart: dict[str, str] = field(default_factory=dict)
    launches: bool = False
    calls: dict[Any, Call] = field(default_factory=dict)
    taken: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __call__(self, operator: Operator, args: Sequence[Any]) -> Any:
        if operator.export is None or operator.name in self.apart:
            return operator.formula(args)
        if self.launches and (found := operator.launches(args)) is not None:
            return found
        leaves, spec = tree_flatten(list(operator.signature.flatten(args)))
        call = self._call(operator, leaves, spec)
        result = _empty(call, _inputs(leaves))
        outputs = _tensors(result)
        # an integer is an input like others
        given = [t if isinstance(t, Tensor) else torch.scalar_tensor(t, dtype=torch.int64) for t in _inputs(leaves)]
        domain_and_name, attributes = f"{DOMAIN}::{call.name}", call.attributes()
        sizes, dtypes = _sizes(leaves), [t.dtype for t in outputs]
        shapes = [[sizes.get(str(n), n) for n in t.shape] for t in outputs]
        if len(outputs) == 1:
            one = torch.onnx.ops.symbolic
            made = [one(domain_and_name, given, attributes, dtype=dtypes[0], shape=shapes[0], version=1)]
        else:
            several = torch.onnx.ops.symbolic_multi_out
            made = list(several(domain_and_name, given, attributes, dtypes=dtypes, shapes=shapes, version=1))
        if isinstance(result, Tensor):
            return made[0]
        left = iter(made)
        every = [next(left) if isinstance(t, Tensor) else t for t in result]
        return type(result)(*every) if hasattr(result, "_fields") else tuple(every)

    def _call(self, operator: Operator, leaves: Sequence[Any], spec: TreeSpec) -> Call:
        if wrong := [leaf for leaf in leaves if isinstance(leaf, (torch.SymFloat, torch.SymBool))]:
            raise TypeError(f"{operator.name} has {wrong[0]} among its arguments, expected it to be known or a tensor")
        key = (operator.name, str(spec), *_described(leaves))
        if key not in self.calls:
            name = f"{operator.export.onnx_name}{_optional(operator, tree_unflatten(leaves, spec))}"  # type: ignore[union-attr]
            self.taken[name] += 1
            number = self.taken[name]
            self.calls[key] = Call(operator, spec, leaves, name if number == 1 else f"{name}_{number}")
        return self.calls[key]


def _sizes(leaves: Iterable[Any]) -> dict[str, Any]:
    """The inputs' sizes that are formulas of others, asked of them: torch's tracer forms no product of three sizes."""
    every = [(t, i, n) for t in leaves if isinstance(t, Tensor) for i, n in enumerate(t.shape)]
    formulas = {str(n): (t, i) for t, i, n in every if isinstance(n, torch.SymInt) and n.node.expr.args}
    return {n: torch.ops.aten.sym_size.int(*where) for n, where in formulas.items()}


def _inputs(leaves: Iterable[Any]) -> list[Any]:
    return [leaf for leaf in leaves if isinstance(leaf, (Tensor, torch.SymInt))]


def _optional(operator: Operator, flat: Sequence[Any]) -> str:
    """The given ones of the inputs that may be missing: a node has no optional inputs, other ones have another name."""
    words = []
    for (name, hint), value in zip(operator.signature.flat.items(), flat, strict=True):
        if is_list(hint) and len(value):
            words.append(f"{name}{len(value)}")
        elif is_tensor(hint) and hint is not Tensor and value is not None:
            words.append(name)
    return "".join(f"_{word}" for word in words)


def _described(leaves: Iterable[Any]) -> Iterable[Any]:
    """What a function depends on: of sizes that are not known, which of them are equal."""
    seen: dict[str, str] = {}

    def size(n: Any) -> Any:
        return seen.setdefault(str(n), f"s{len(seen)}") if isinstance(n, torch.SymInt) else n

    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield leaf.dtype, tuple(map(size, leaf.shape))
        else:
            yield size(leaf) if isinstance(leaf, torch.SymInt) else (type(leaf), repr(leaf))


def _attribute(value: Any) -> Any:
    """As ONNX has attributes, or None."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if not isinstance(value, (list, tuple)) or not len(value):
        return None
    leaves, _ = tree_flatten(value)
    if any(isinstance(leaf, (Tensor, torch.SymInt)) for leaf in leaves):
        return None
    flat = all(isinstance(v, (int, float)) for v in value) or all(isinstance(v, str) for v in value)
    return list(value) if flat else json.dumps(value)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in ((result,) if isinstance(result, Tensor) else result) if isinstance(t, Tensor)]


def _empty(call: Call, given: Sequence[Any]) -> Any:
    """The outputs without their numbers; nothing of it is traced."""
    mode = detect_fake_mode(given)
    assert mode is not None  # a graph is being traced
    with _disable_current_modes(), mode, torch.no_grad(), exporting(formula):
        # functional tensors are made anew as fake ones
        given = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), list(given))
        return call.compute(given)


# --- functions ------------------------------------------------------------------------------------------------------


class _Body(nn.Module):
    def __init__(self, call: Call):
        super().__init__()
        self._call = call

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        return tuple(_tensors(self._call.compute(given)))


def attach(model: onnx_ir.Model, nodes: Nodes, opset: int) -> None:
    """Give every node of `nodes` in `model` its function. Last of all: optimisers put functions in line.

    Raises:
        NoFunction: an operator's formula has none for its arguments.
    """
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    calls = {call.name: call for call in nodes.calls.values() if call.name in used}
    for call in calls.values():
        try:
            function = _function(call, opset)
        except Exception as error:  # torch has many
            raise NoFunction(call.operator.name, reason(error)) from error
        model.functions[function.identifier()] = function


def _function(call: Call, opset: int) -> onnx_ir.Function:
    """A node's function at the model's opset; its names are of its own, as parsers may take an outer tensor's."""
    import onnx_ir as ir

    given, free = _samples(call)
    program = traced(_Body(call), given, {"given": free})
    for outer, inner in zip(call.given, placeholders(program), strict=True):
        if not isinstance(outer, Tensor):
            continue
        if any(is_free(wide) and not is_free(narrow) for wide, narrow in zip(outer.shape, inner.shape, strict=True)):
            raise ValueError(f"the formula takes {tuple(inner.shape)} and no other sizes")
    graph = translated(program, given, opset=opset).graph
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value}, num_outputs=1)
        constant.outputs[0].type, constant.outputs[0].shape = value.type, value.shape
        graph.initializers.pop(name)
        graph.insert_before(graph[0], constant) if len(graph) else graph.append(constant)
        value.replace_all_uses_with(constant.outputs[0], replace_graph_outputs=True)
    for i, output in enumerate(graph.outputs):
        if output.is_graph_input() or any(output is other for other in graph.outputs[:i]):
            identity = ir.node("Identity", [output])
            graph.append(identity)
            graph.outputs[i] = identity.outputs[0]
    _rename(graph, call)
    return ir.Function(DOMAIN, call.name, graph=graph, attributes=[])


def _rename(graph: onnx_ir.Graph, call: Call) -> None:
    flat = tree_unflatten(list(call.leaves), call.spec)
    formal: list[str] = []
    for name, value in zip(call.operator.signature.flat, flat, strict=True):
        inputs = [v for v in tree_flatten(value)[0] if isinstance(v, (Tensor, torch.SymInt))]
        formal += [name] if len(inputs) == 1 else [f"{name}_{i}" for i in range(len(inputs))]
    values = dict(zip(graph.inputs, formal, strict=True))
    values |= dict(zip(graph.outputs, call.operator.outputs, strict=False))
    for i, node in enumerate(graph.all_nodes()):
        node.name = f"{call.name}__{node.op_type}_{i}"
        for j, output in enumerate(node.outputs):
            if output not in values:
                values[output] = f"{i}_{j}"
    for value, name in values.items():
        value.name = f"{call.name}__{name}"


def _samples(call: Call) -> tuple[tuple[Any, ...], Any]:
    """Inputs for a trace of the function, and which of their sizes are free."""
    auto = torch.export.Dim.AUTO
    given: list[Any] = []
    free: list[Any] = []
    for leaf in call.given:
        if isinstance(leaf, torch.SymInt):
            given.append(_hint(leaf))
            free.append(torch.export.Dim.DYNAMIC)
        else:
            given.append(torch.zeros([_hint(n) for n in leaf.shape], dtype=leaf.dtype))
            free.append({i: auto for i, n in enumerate(leaf.shape) if isinstance(n, torch.SymInt)})
    return tuple(given), tuple(free)


def is_free(n: Any) -> bool:
    """Whether a size is known only when the model runs."""
    return isinstance(n, torch.SymInt) and n.node.maybe_as_int() is None


def _hint(n: int | torch.SymInt) -> int:
    if not isinstance(n, torch.SymInt):
        return n
    return n.node.hint if n.node.has_hint() else _ANY_SIZE


# --- torch's exporter -----------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]  # which warn of what they leave as it is
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own calls
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason(error: BaseException) -> str:
    """The reason at the bottom of a chain of exceptions, which torch wraps in many lines of its own."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _len_of_any_size() -> Iterator[None]:
    """`len(t)` of a tensor is its first size, which may be free; Python's own would make a number of it."""
    own = builtins.len
    builtins.len = lambda of: of.shape[0] if isinstance(of, Tensor) and of.dim() else own(of)
    try:
        yield
    finally:
        builtins.len = own


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules in its own."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before


def traced(
    model: nn.Module, inputs: Sequence[Any], dynamic_shapes: Any, nodes: Nodes | None = None
) -> torch.export.ExportedProgram:
    """The graph of a module in evaluation; operators are nodes, or taken apart."""
    with _quiet(), _len_of_any_size(), exporting(nodes or formula):
        return torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic_shapes, strict=False)


def placeholders(program: torch.export.ExportedProgram) -> list[Any]:
    """What a program is given, with the sizes that it has found."""
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    return [values[name] for name in program.graph_signature.user_inputs]


def translated(
    program: torch.export.ExportedProgram, inputs: Sequence[Any], *, opset: int, **names: Any
) -> onnx_ir.Model:
    how = {"dynamo": True, "opset_version": opset, "verbose": False, **names}
    with _quiet(), exporting(formula):
        if any(isinstance(t, FakeTensor) for t in program.state_dict.values()):
            done = torch.onnx.export(program, tuple(inputs), optimize=False, **how)
            assert done is not None
            _weights_as_inputs(done.model.graph)
            done.optimize()
        else:
            done = torch.onnx.export(program, tuple(inputs), **how)
    assert done is not None
    for node in done.model.graph.all_nodes():
        # names of this machine's folders, and what torch alone knows
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]
    return done.model


def _weights_as_inputs(graph: onnx_ir.Graph) -> None:
    """Of weights without numbers, which no optimiser can read and no file hold; shared ones are one."""
    first: dict[int, Any] = {}
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, FakeTensor):
            continue
        del graph.initializers[name]
        if (same := first.setdefault(id(raw), value)) is not value:
            value.replace_all_uses_with(same)
            continue
        value.const_value = None
        graph.inputs.append(value)
