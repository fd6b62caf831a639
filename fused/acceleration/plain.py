"""Whether modules are plain: fused code reads their tensors and does not call them, so they may do nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

from mmfuse.kernels._runtime import UnsupportedError

M = TypeVar("M", bound=nn.Module)

# Paths below a module and the classes, as "module:Class", that a child there may have. In a path "*" is every child and
# "**" everything further down. Without classes, modules are called, but with other inputs than their hooks expect.
Children = Mapping[str, tuple[str, ...]]

# fake and functional tensors stand for ordinary ones while a graph is traced
_ORDINARY = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None)))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HOOKS_OF_ALL = tuple(getattr(_module, f"_global{name}") for name in _HOOKS)
_READ = "its tensors are read, it is not called"


def why_not_plain(module: nn.Module, children: Children) -> str | None:
    """Why the tensors of `module` and of `children` are not all that there is to them, or None."""
    if why := _unusual_tensor(module):
        return f"its {why}"
    if children and any(HOOKS_OF_ALL):
        return "hooks of all modules are registered, which fused code passes over"
    for path, child, classes in _found(module, children):
        if why := _why_child_not_plain(child, classes):
            return f"its {path} {why}"
    return None


def are_plain(classes: tuple[type, ...], *modules: nn.Module) -> bool:
    """Whether modules of these classes are no more than their tensors, which may be read in place of calls."""
    if any(HOOKS_OF_ALL):
        return False
    # a loop: a generator costs as much as all else that is asked
    for m in modules:  # noqa: SIM110
        if type(m) not in classes or _why_not_its_tensors(m) is not None:
            return False
    return True


def read(child: M) -> M:
    """A child of which the tensors are about to be read, in place of a call.

    Raises:
        UnsupportedError: a call does more than torch's own module: the child is an adapter, say, or has hooks.
    """
    cls = type(child)
    if not cls.__module__.startswith(("torch.", "mmfuse.")):  # parametrized ones are torch's: their tensors are whole
        raise UnsupportedError(f"a child is {_readable(_name(cls))}, expected one of torch.nn: {_READ}")
    if why := _why_child_not_plain(child, ()):
        raise UnsupportedError(f"a child, {cls.__name__}, {why}: {_READ}")
    if "forward" in child.__dict__:
        raise UnsupportedError(f"a child, {cls.__name__}, has a forward of its own: {_READ}")
    return child


def _why_child_not_plain(child: Any, classes: tuple[str, ...]) -> str | None:
    if classes and _name(type(child)) not in classes:
        return f"is {_readable(_name(type(child)))}, expected {' or '.join(_readable(c) for c in classes)}"
    if child is None:
        return None
    return _why_not_its_tensors(child) if classes else _why_hooked(child)


def _why_hooked(child: Any) -> str | None:
    # as attributes, on which torch.compile can guard
    if child._forward_pre_hooks or child._forward_hooks or child._backward_pre_hooks or child._backward_hooks:
        return "has hooks, which fused code passes over"
    return None


def _why_not_its_tensors(child: Any) -> str | None:
    if why := _why_hooked(child):
        return why
    if "forward" in child.__dict__ and not is_fused(child.__dict__["forward"]):
        return "has a forward of its own, which fused code passes over"
    if why := _unusual_tensor(child):
        return f"has {why}"
    return None


class FusedMethod:
    """What `accelerate()` puts in the place of a method."""

    fused = True  # until `decelerate()` meets it inside another tool's wrapper


def is_fused(method: Any) -> bool:
    return isinstance(method, FusedMethod) and method.fused


def _unusual_tensor(module: nn.Module) -> str | None:
    for tensors in (module._parameters, module._buffers):
        for name, t in tensors.items():
            if type(t) not in _ORDINARY:
                return f"{name} of class {type(t).__name__}, expected a Tensor or Parameter"
            if t is None:
                continue
            if t.is_meta:
                return f"{name} on the meta device, without values"
            if t.numel() == 0 or hasattr(t, "ds_id"):
                return f"{name} without its elements, as they are spread over processes"
    return None


def _found(module: nn.Module, children: Children) -> list[tuple[str, Any, tuple[str, ...]]]:
    """(path, child, classes) of all that is to be plain; a child that is missing is None, and no class of it fits."""
    found = []
    for path, classes in children.items():
        places: list[tuple[str, Any]] = [("", module)]
        for name in path.split("."):
            places = [place for at, m in places for place in _below(at, m, name)]
        found += [(at[1:], child, classes) for at, child in places]
    return found


def _below(path: str, module: Any, name: str) -> list[tuple[str, Any]]:
    if module is None:
        return [(f"{path}.{name}", None)]
    if name == "**":
        return [(f"{path}.{inner}", m) for inner, m in module.named_modules() if inner]
    inside = module._modules
    names = list(inside) if name == "*" else [name]
    return [(f"{path}.{inner}", inside.get(inner)) for inner in names]


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _readable(name: str) -> str:
    module, _, cls = name.partition(":")
    return "nothing" if cls == "NoneType" else f"{cls} ({module})"


class Snapshot:
    """A module and children that are plain, flat: that they still are takes a few microseconds to see."""

    def __init__(self, module: nn.Module, children: Children) -> None:
        self.module = module
        found = [(path, child, bool(classes)) for path, child, classes in _found(module, children) if child is not None]
        read = {path: child for path, child, is_read in found if is_read}
        self._read, self._classes = list(read.values()), [type(child) for child in read.values()]
        parents = [path.rpartition(".") for path in read]
        self._places = [module.get_submodule(parent)._modules for parent, _, _ in parents]
        self._names = [name for _, _, name in parents]
        self._states = [vars(child) for child in read.values()]
        self._forwards = [state.get("forward") for state in self._states]
        watched = {id(child): child for _, child, _ in found}.values()
        self._hooks = [vars(child)[name] for child in watched for name in _HOOKS]
        if watched:
            self._hooks += HOOKS_OF_ALL
        tensors = [kind for m in (module, *read.values()) for kind in (m._parameters, m._buffers)]
        self._tensors = [kind for kind in tensors if kind]

    def holds(self) -> bool:
        """Whether nothing has changed but the values, and the tensors are ordinary ones."""
        if any(self._hooks):
            return False
        # lists are equal where their elements are the same ones
        if list(map(type, self._read)) != self._classes:
            return False
        if list(map(dict.get, self._places, self._names)) != self._read:
            return False
        if list(map(dict.get, self._states, repeat("forward"))) != self._forwards:
            return False
        for t in chain.from_iterable(map(dict.values, self._tensors)):  # noqa: SIM110 (a generator takes twice as long)
            if t is not None and (type(t) not in _ORDINARY or t.is_meta):
                return False
        return True
