"""What `accelerate()` puts on an instance: a method with fused code, and the way back to the class's own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from mmfuse.fused.acceleration.plain import FusedMethod, Snapshot, is_fused
from mmfuse.fused.acceleration.rules import RULES, Rule, asked
from mmfuse.kernels._runtime import UnsupportedError

# how a module is copied: what is fused is bound to the copy, or not in it
_REPLICATE, _REDUCE = "_replicate_for_data_parallel", "__reduce_ex__"
_GRAPH = "the graph that is made cannot hold fused operators"
_LAST = "Call accelerate() last, and mmfuse.decelerate(model) before another tool"


class Fused(FusedMethod):
    """A module's method with fused code. It follows its module through deepcopy and pickle.

    Where a child is no longer plain, the class's own method runs, and a warning names the child once.
    """

    def __init__(self, rule: Rule, module: nn.Module, options: dict[str, Any]) -> None:
        self.rule, self.module, self.options = rule, module, options
        self._function = resolve_name(rule.forward)
        self._snapshot: Snapshot | None = None
        self._said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if args and isinstance(args[0], nn.Module):  # some tools bind what they find to its module once more
            module, args = args[0], args[1:]
        own = getattr(type(module), self.rule.method)
        given = (*args, *kwargs.values())
        if not self.fused or any(map(_without_values, given)):
            return own(module, *args, **kwargs)
        if why := (_GRAPH if _for_others() else self._why_not(module)):
            self._say(why, module, given)
            return own(module, *args, **kwargs)
        if given and self._aside(module, args, kwargs):
            return own(module, *args, **kwargs)
        return self._function(module, *args, **kwargs, **self.options)

    def _why_not(self, module: nn.Module) -> str | None:
        if torch.compiler.is_compiling():
            return self.rule.why_not_now(module)
        snapshot = self._snapshot
        if snapshot is None or snapshot.module is not module or not snapshot.holds() or self._changed(module):
            if why := self.rule.why_not_now(module):
                return why
            self._snapshot = Snapshot(module, self.rule.children)
        return None

    def _aside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.rule.aside(module, *args, **kwargs)

    def _changed(self, module: nn.Module) -> bool:
        """Whether a method of the instance, or an option of its children, speaks against it by now."""
        return (self.rule.why_overridden(module) or asked(self.rule.reason_against, module)) is not None

    def _say(self, why: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        name = f"{type(module).__name__}.{self.rule.method}"
        if self.options and any(isinstance(t, Tensor) and t.dtype == torch.uint8 for t in given):
            raise UnsupportedError(f"{name} takes no bytes, as its class's own code has to run: {why}. {_LAST}")
        if why != _GRAPH and why not in self._said and not torch.compiler.is_compiling():
            self._said.add(why)
            warnings.warn(f"{name} is not fused, its class's own code runs: {why}. {_LAST}", stacklevel=3)

    @property
    def _own(self) -> Any:
        return getattr(type(self.module), self.rule.method)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own.__get__(self.module))

    # torch.fx and torch.export look into the function
    @property
    def __globals__(self) -> dict[str, Any]:
        return self._own.__globals__

    @property
    def __code__(self) -> Any:
        return self._own.__code__

    @property
    def _torchscript_modifier(self) -> Any:
        name = f"{type(self.module).__name__}.{self.rule.method}"
        way_out = "mmfuse.decelerate(model) first, or use torch.export"
        raise RuntimeError(f"torch.jit cannot follow {name} after accelerate(): {way_out}")

    def __getstate__(self) -> dict[str, Any]:
        return {"target": self.rule.target, "module": self.module, "options": self.options, "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        (rule,) = (r for r in RULES if r.target == state["target"])
        Fused.__init__(self, rule, state["module"], state["options"])
        self.fused = state["fused"]


def _for_others() -> bool:
    """Whether a graph is made that cannot hold fused operators."""
    # the exporter that does not trace compiles; to ask it takes longer than all else that a call looks at
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _without_values(given: Any) -> bool:
    return isinstance(given, Proxy) or (isinstance(given, Tensor) and given.is_meta)


def swap(rule: Rule, module: nn.Module, options: dict[str, Any]) -> Callable[[], None]:
    """Replace the method of `module`, and return the function that puts it back."""
    fused = Fused(rule, module, options)
    setattr(module, rule.method, fused)
    setattr(module, _REPLICATE, partial(_replica, module))
    setattr(module, _REDUCE, partial(_reduced, module))

    def undo() -> None:
        present = vars(module).get(rule.method)
        if present is fused:
            delattr(module, rule.method)
            _tidy(module)
        elif present is not None:
            name = f"{type(module).__name__}.{rule.method}"
            raise RuntimeError(f"{name} was replaced after accelerate(): undo that first")

    return undo


def carried(method: Any) -> Fused | None:
    """The fused method that `method` is, or is bound or wrapped, or None."""
    while method is not None and not isinstance(method, Fused):
        method = getattr(method, "__func__", None) or getattr(method, "__wrapped__", None)
    return method if is_fused(method) else None


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate()` has replaced a method in `model`."""
    return any(carried(method) is not None for m in model.modules() for method in vars(m).values() if callable(method))


def decelerate(model: nn.Module) -> None:
    """Put back all that `accelerate()` replaced in `model`, in place. It takes no report.

    Copies and loaded pickles of an accelerated model are accelerated as well: this is their way back. Methods that
    other tools have wrapped since stay wrapped, around the class's own.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    for module in model.modules():
        for wrapped in _put_back(module):
            wrapped.fused = False


def _put_back(module: nn.Module) -> list[Fused]:
    """The methods that `module` has itself; those that another tool has wrapped are returned."""
    own, wrapped = vars(module), []
    for name, method in list(own.items()):
        fused = carried(method) if callable(method) else None
        if fused is None:
            continue
        if fused not in (method, getattr(method, "__func__", None)):
            wrapped.append(fused)
        elif name == fused.rule.method:
            del own[name]
        else:  # a tool keeps it, to call it or to put it back
            own[name] = getattr(type(module), fused.rule.method).__get__(module)
    _tidy(module)
    return wrapped


def _tidy(module: nn.Module) -> None:
    own = vars(module)
    if not any(isinstance(method, Fused) for method in own.values()):
        own.pop(_REPLICATE, None)
        own.pop(_REDUCE, None)


def _replica(module: nn.Module) -> nn.Module:
    """A replica for nn.DataParallel, with its class's own methods: a fused one would read the original's weights."""
    replica = type(module)._replicate_for_data_parallel(module)
    _put_back(replica)
    return replica


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For copy and pickle: the module without its fused methods, which are made again for the other one."""
    reduced: Any = type(module).__reduce_ex__(module, protocol)
    create, args, state, *rest = reduced
    fused = {name: f for name, f in state.items() if isinstance(f, Fused) and name == f.rule.method}
    state = {name: value for name, value in state.items() if name not in (*fused, _REPLICATE, _REDUCE)}
    return _rebuilt, (create, args, [(f.rule.target, f.options) for f in fused.values()]), state, *rest


def _rebuilt(
    create: Callable[..., nn.Module], args: tuple[Any, ...], fused: list[tuple[str, dict[str, Any]]]
) -> nn.Module:
    module = create(*args)
    for target, options in fused:
        (rule,) = (r for r in RULES if r.target == target)
        swap(rule, module, options)
    return module
