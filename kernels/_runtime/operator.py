"""The declaration of an operator: what torch and the tools want of it derives from here.

    CLIP = Operator(
        "clip_loss",
        forward=_forward,            # (passes, image, text, scale, ...) -> Outputs
        backward=_backward,          # (passes, g, image, scale, row_max, ..., needs) -> {"image": dx, "text": dy, ...}
        fake=_fake,                  # the forward's outputs, empty
        differentiable=("image", "text", "scale"),
        implementations=[
            Implementation("cpu", passes=...),
            Implementation("torch", function=reference.clip_loss),
        ],
        size=Size("pairs", lambda image, text: image.shape[0] * text.shape[0]),
        example=lambda x, **how: clip_loss(x, x, 1.0, **how),
    )
    CLIP(image, text, scale, ..., backend=None)

Every function of a declaration names what it looks at. The forward's parameters are the operator's arguments; one that
is a dataclass travels as its fields, and one that is a `Sequence[Tensor]` has a gradient for each. The backward asks
for arguments and outputs of the forward, and these are what is saved; for `g`, the gradient of the first output, or
`g_<output>`; and for `<argument>_shape` of an argument that need not be saved. Both may ask for `passes`, what an
implementation computes with, and `needs`, a flag for each differentiable argument, in a list for a list. Reasons and
the size ask for the arguments that they depend on.
"""

from __future__ import annotations

import logging
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mmfuse.kernels._runtime import configs, dispatch
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dispatch import UnsupportedError
from mmfuse.kernels._runtime.dtypes import dtype_name
from mmfuse.kernels._runtime.library import failure
from mmfuse.kernels._runtime.reasons import against, transforming
from mmfuse.kernels._runtime.registration import register, without_autocast
from mmfuse.kernels._runtime.signature import Signature, asking, grouped, hints_of, is_tensor

logger = logging.getLogger("mmfuse")

Reason = Callable[..., "str | None"]

_OPERATORS: dict[str, Operator] = {}


class Deferred:
    """An object that is made on first use: a module that imports triton, or the functions of a compiled part."""

    def __init__(self, make: str | Callable[[], Any]):
        self._make, self.module = make, make if isinstance(make, str) else None

    def __getattr__(self, name: str) -> Any:
        made = import_module(self._make) if isinstance(self._make, str) else self._make()
        setattr(self, name, getattr(made, name))
        return getattr(made, name)


class Implementation:
    """One way to compute an operator.

    Args:
        name: "cuda", "triton", "cpu", "slices", "chunked" or "torch": the device and the dtypes that it is for.
        passes: what the operator's forward and backward compute with.
        function: in place of passes, a function of the operator's arguments that torch differentiates and traces.
        against: functions that say why it cannot run; None: it can.
        kernels: modules of the Triton kernels that it launches, if its passes are not deferred to one.
        traceable: the passes are launches and torch operations: where a GPU compiles them, torch.compile and
            AOTInductor take the kernels into their graph.
    """

    def __init__(
        self,
        name: str,
        *,
        passes: Any = None,
        function: Callable[..., Any] | None = None,
        against: Sequence[Reason] = (),
        kernels: Sequence[str] = (),
        traceable: bool = False,
    ):
        self.name, self.passes, self.function, self.traceable = name, passes, function, traceable
        self.against = against
        deferred = passes.module if isinstance(passes, Deferred) else None
        self.kernels = tuple(kernels) or ((deferred,) if deferred else ())
        self.op: Any = None  # as registered with torch, where there are passes


@dataclass(frozen=True)
class OpSpec:
    """How an operator leaves PyTorch: as a node of the ONNX domain "mmfuse", with a function of standard operators.

    The node's inputs are the operator's tensors that are given, its attributes the other arguments, its outputs those
    of the formula. The function is the formula, or `body`, in ONNX's operators.

    Args:
        onnx_name: of the node, of no operator of ONNX or of a runtime: parsers look at the name and not at the domain.
        body: a function of the operator's arguments in plain torch, where ONNX or a runtime cannot hold the formula.
        launches: the same by operators that are one launch each, as TensorRT's plugins are; None for arguments of which
            the operator is one itself, or has no such form.
        tolerances: for a dtype's name, (absolute, relative) difference from the formula that a runtime may show.
    """

    onnx_name: str
    body: Callable[..., Any] | None = None
    launches: Callable[..., Any] | None = None
    tolerances: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"float32": (1e-5, 1e-4), "float16": (5e-3, 5e-3), "bfloat16": (4e-2, 4e-2)}
    )


@dataclass(frozen=True)
class Size:
    """How much a call is: by it, tables of what was measured say whether an implementation pays (`configs.py`).

    Args:
        unit: what is counted.
        of: how many. None: whatever a table says, no implementation steps aside for another.
        kind: what the least size is of, a dtype's name, or one with more after a hyphen, "float32-ids"; by default the
            dtype of the argument that decides.
        columns: what the least size depends on besides.
        alike: ranks on several machines have to choose alike, whatever tables these have.
    """

    unit: str
    of: Callable[..., int | None]
    kind: Callable[..., str] | None = None
    columns: Callable[..., int] | None = None
    alike: bool = False


class Operator:
    """An operator, called with the arguments of its forward. The first implementation without a reason against it runs.

    Args:
        name: that of its public function. With a leading underscore it is a part of another operator, and not listed.
        forward, backward, fake: see above.
        differentiable: the arguments that may have a gradient.
        implementations: in order of preference.
        example: calls the public function with arguments made of features [N, D], for those who have none of their own.
        also: other public functions that come to it, each with its example.
        on: the argument whose device and dtype decide, or a function that finds it; by default the first tensor.
        instead: outputs for which, where they are empty, an argument stands: {"x": "image"}.
        size: by which implementations step aside for a later one, as tables have it.
        export: how it leaves PyTorch; without one its formula does, operation by operation.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        implementations: Sequence[Implementation],
        backward: Callable[..., Mapping[str, Any]] | None = None,
        fake: Callable[..., Any] | None = None,
        differentiable: Sequence[str] = (),
        example: Callable[..., Any] | None = None,
        also: Mapping[str, Callable[..., Any]] | None = None,
        on: str | Callable[..., Tensor] | None = None,
        instead: Mapping[str, str] | None = None,
        size: Size | None = None,
        export: OpSpec | None = None,
    ):
        self.name, self.backward = name, backward
        self.examples: dict[str, Any] = {name: example} | dict(also or {})
        self.instead, self.differentiable, self.export = dict(instead or {}), tuple(differentiable), export
        hints = hints_of(forward)
        self.wants_needs, _ = hints.pop("needs", None) is not None, hints.pop("passes", None)
        self.signature = Signature(hints)
        self.leaves = [self.signature.at[n] for n in differentiable]
        self.Needs: Any = namedtuple("Needs", differentiable)  # type: ignore[misc]  # noqa: PYI024
        result = get_type_hints(forward).get("return")
        self.Outputs = result if hasattr(result, "_fields") else None
        self.outputs = list(result._fields) if self.Outputs else ["out"]  # type: ignore[union-attr]
        own = (None, None) if export is None else (export.body, export.launches)
        self._body, self._launches = (None if of is None else asking(of, self.signature.names) for of in own)
        if both := set(self.outputs) & set(self.signature.flat):
            raise TypeError(f"{name} has {', '.join(both)} both as an argument and as an output")
        names = self.signature.names
        on = on or next(n for n, hint in hints.items() if is_tensor(hint))
        at = 0 if callable(on) else names.index(on)
        self._on = asking(on, names) if callable(on) else lambda args: args[at]
        self._forward = asking(forward, (*names, "passes", "needs"))
        self._fake = None if fake is None else asking(fake, (*names, "needs"))
        self.implementations = {i.name: i for i in implementations}
        self._names = tuple(self.implementations)
        self._run: dict[str, Callable[[Sequence[Any]], Any]] = {}
        self._reasons: dict[str, list[Callable[[Sequence[Any]], Any]]] = {}
        for i in implementations:
            self._run[i.name] = register(self, i) if i.function is None else asking(i.function, names)
            self._reasons[i.name] = [asking(reason, names) for reason in i.against]
        # where its public function stands, too
        self._module, self._told = (example or forward).__module__, set[str]()
        self.family = self._module.removeprefix("mmfuse.kernels.").split(".")[0]
        self.unit = size.unit if size else None
        if size is not None:
            self._size = asking(size.of, names)
            self._kind = asking(size.kind, names) if size.kind else None
            self._alike = size.alike
            self._columns = asking(size.columns, names) if size.columns else None
            configs.declare(name, [i.name for i in implementations])
        if not name.startswith("_"):
            _OPERATORS.update(dict.fromkeys(self.examples, self))

    def __call__(self, *args: Any, backend: str | None = None, **named: Any) -> Any:
        if named:
            args = (*args, *(named[n] for n in self.signature.names[len(args) :]))
        if torch.compiler.is_compiling():
            if backend is None and (stand_in := dispatch.exported_by()) is not None:
                return stand_in(self, args)
        elif (tell := _asked.get()) is not None:
            tell(self, args, backend or dispatch.forced_backend())
        return self._run[self.choose(args, backend)](args)

    def choose(self, args: Sequence[Any], backend: str | None = None) -> str:
        """The implementation that runs: `backend` if named (argument, then context, then environment), else the first.

        Raises:
            UnsupportedError: there is none; the message has every reason.
        """
        name, x = backend or dispatch.forced_backend(), self._on(args)
        if name is not None:
            dispatch.check_name(name, self.implementations)
            why = [f"not an implementation of {self.name} (there are {', '.join(self.implementations)})"]
            if name in self.implementations:
                why = self.reasons_against(name, args)
            if why:
                raise self._unsupported({name: why})
            return name
        compiling = torch.compiler.is_compiling()
        size, kind, columns = self.measured(args) if self.unit else (None, "", 0)
        of = _candidates if compiling or transforming() else _known_candidates
        for i, steps in of(self, x.device, x.dtype, kind):
            if steps and configs.unreached(steps, size, columns):
                continue
            if self._accepts(i, args):
                # logging would break a graph
                if not compiling and logger.isEnabledFor(logging.INFO):
                    self._tell(i, args)
                return i
        raise self._unsupported(self.explain(args))

    def _unsupported(self, reasons: Mapping[str, list[str]]) -> UnsupportedError:
        every = "\n  ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
        error = UnsupportedError(f"{self.name}: no implementation accepts these arguments\n  {every}")
        failed = [f for name, why in reasons.items() if "does not load" in "".join(why) and (f := failure(name))]
        if failed:
            error.__cause__ = failed[0]
        return error

    def _accepts(self, name: str, args: Sequence[Any]) -> bool:
        # a loop: one reason is enough, and a generator costs as much as most of them
        for ask in self._reasons[name]:  # noqa: SIM110
            if ask(args) is not None:
                return False
        return True

    def _other_reasons(self, name: str, args: Sequence[Any]) -> list[str]:
        return [why for ask in self._reasons[name] if (why := ask(args)) is not None]

    def _better(self, name: str, x: Tensor, size: tuple[int | None, str, int] | None) -> str | None:
        """Why a later implementation is the better choice for a call of this size, unless this one is named."""
        if name == "triton" and INTERPRET:
            return "Triton's interpreter runs only where it is named"
        return self.aside(name, x.device, *size) if size else None

    def measured(self, args: Sequence[Any]) -> tuple[int | None, str, int]:
        """(size, kind, columns) of a call, by which a table says whether an implementation pays."""
        kind = self._kind(args) if self._kind else dtype_name(self._on(args).dtype)
        return self._size(args), kind, self._columns(args) if self._columns else 0

    def aside(self, name: str, device: torch.device, size: int | None, kind: str, columns: int = 0) -> str | None:
        """Why calls of this size are not for an implementation."""
        if (step := self.below(name, device, size, kind, columns)) is None:
            return None
        _, least = step
        return f"a later one is faster {f'for fewer than {least} {self.unit} ' if least else ''}in {kind}"

    def below(
        self, name: str, device: torch.device, size: int | None, kind: str, columns: int = 0
    ) -> tuple[int, int | None] | None:
        """The step of a table that such a call does not reach."""
        return configs.unreached(self.steps(name, device, kind), size, columns)

    def steps(self, name: str, device: torch.device, kind: str) -> configs.Steps:
        """From which sizes on an implementation is taken."""
        # the last one steps aside for none
        last = not self.unit or name == self._names[-1]
        return () if last else configs.least(self.family, self.name, name, device, kind, self._alike)

    def reasons_against(self, name: str, args: Sequence[Any]) -> list[str]:
        """Why an implementation cannot run for these arguments."""
        x = self._on(args)
        return against(name, x.device, x.dtype) + self._other_reasons(name, args)

    def explain(self, args: Sequence[Any]) -> dict[str, list[str]]:
        """Each implementation's reasons not to run for these arguments, in order of preference."""
        x, size = self._on(args), self.measured(args) if self.unit else None
        better = {i: self._better(i, x, size) for i in self.implementations}
        return {i: self.reasons_against(i, args) or ([why] if why else []) for i, why in better.items()}

    def available(self, args: Sequence[Any]) -> list[str]:
        """The implementations that run for these arguments when they are named."""
        return [i for i in self.implementations if not self.reasons_against(i, args)]

    def of_example(self, name: str, features: Tensor) -> Sequence[Any]:
        """The arguments that the example of a public function comes to."""
        return reached(lambda: self.examples[name](features), self.name)[1]

    def function(self, name: str) -> Callable[..., Any]:
        """The public function of this name, which stands beside the declaration."""
        return getattr(sys.modules[self._module], name)

    def compute(self, implementation: Implementation, args: Sequence[Any], needs: Sequence[bool]) -> Any:
        """The forward with an implementation's passes, outside of autograd and autocast."""
        with without_autocast(self._on(args)):
            flags = self._named(args, needs) if self.wants_needs else needs
            return self._forward((*args, implementation.passes, flags))

    def formula(self, args: Sequence[Any]) -> Any:
        """The operator in plain torch, which differentiates, batches and transforms it as it likes."""
        plain = self.implementations["torch"]
        return self._run["torch"](args) if plain.function else self._forward((*args, plain.passes, ()))

    def body(self, args: Sequence[Any]) -> Any:
        """What the function of its ONNX node computes, in plain torch."""
        return self.formula(args) if self._body is None else self._body(args)

    def launches(self, args: Sequence[Any]) -> Any:
        """The operator by others that are one launch each, or None."""
        return None if self._launches is None else self._launches(args)

    def empty(self, args: Sequence[Any], needs: Sequence[bool]) -> Any:
        """The forward's outputs without their numbers."""
        return self._fake((*args, self._named(args, needs)))  # type: ignore[misc]

    def _named(self, args: Sequence[Any], needs: Sequence[bool]) -> Any:
        if not needs:
            return needs
        flat = self.signature.flatten(args)
        return self.Needs(*grouped(needs, (flat[i] for i in self.leaves)))

    def _tell(self, chosen: str, args: Sequence[Any]) -> None:
        why = "; ".join(f"{i}: {', '.join(why)}" for i, why in self.explain(args).items() if why)
        if why and why not in self._told:
            self._told.add(why)
            logger.info("%s: using %s (%s)", self.name, chosen, why)


def _candidates(
    operator: Operator, device: torch.device, dtype: torch.dtype, kind: str
) -> list[tuple[str, configs.Steps]]:
    """The implementations for a device and a dtype, and from which sizes on each is taken."""
    names = [i for i in operator.implementations if not (i == "triton" and INTERPRET) and not against(i, device, dtype)]
    return [(i, operator.steps(i, device, kind)) for i in names]


_known_candidates = configs.until_forgotten(_candidates)


def operators() -> dict[str, Operator]:
    """Every operator by name."""
    import mmfuse.kernels  # noqa: F401  (declares them)

    return dict(_OPERATORS)


# --- which implementation would run ---------------------------------------------------------------------------------

_asked: ContextVar[Callable[[Operator, Sequence[Any], str | None], None] | None] = ContextVar("asked", default=None)


class _Answer(BaseException):
    """Leaves a public function where it has come to its operator."""


def reached(call: Callable[[], Any], name: str | None = None) -> tuple[Operator, Sequence[Any], str | None]:
    """(operator, arguments, backend) that a call comes to, at the operator `name` or the first; it is not computed."""
    found: list[Any] = []

    def stop(*answer: Any) -> None:
        if name in (None, answer[0].name):
            found.append(answer)
            raise _Answer

    before = _asked.set(stop)
    try:
        call()
    except _Answer:
        return found[0]
    finally:
        _asked.reset(before)
    raise ValueError(f"{call} came to no operator" + ("" if name is None else f" {name}"))


def chosen(call: Callable[[], Any], name: str | None = None) -> str:
    """The implementation that a call of a public function runs.

    Raises:
        UnsupportedError: none accepts its arguments.
    """
    operator, args, backend = reached(call, name)
    return operator.choose(args, backend)


def explain(op: str | Callable[..., Any], *args: Any, **options: Any) -> str:
    """A table of an operator's implementations for a call: which one runs, and why not the others.

    Args:
        op: a public function such as `mmfuse.clip_loss`, or its name.
        args, options: what it would be called with. Nothing is computed.
    """
    if isinstance(op, str):
        known = operators()
        if op not in known:
            raise ValueError(f"op is {op!r}, expected one of {', '.join(sorted(known))}")
        op = known[op].function(op)
    function = op
    operator, given, _ = reached(lambda: function(*args, **options))
    return table(function.__name__, operator.explain(given))


def table(op: str, reasons: Mapping[str, list[str]]) -> str:
    """What `explain` says about an operator, from each implementation's reasons not to run."""
    chosen = next((name for name, why in reasons.items() if not why), None)
    rows = (
        f" {'->' if name == chosen else '  '} {name:8} {'; '.join(why) or 'accepts these arguments'}"
        for name, why in reasons.items()
    )
    return "\n".join([op, *rows])
