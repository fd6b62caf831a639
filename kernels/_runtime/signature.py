"""What a function of a declaration asks for, by the names of its parameters."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from torch import Tensor


def asking(fn: Callable[..., Any], names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """`fn` of values in the order of `names`, of which it gets those that its parameters name; `**others` are all."""
    names, parameters = list(names), inspect.signature(fn).parameters
    at = {n: names.index(n) for n in parameters if n in names}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            at = {n: i for i, n in enumerate(names)}
        elif name not in names and parameter.default is parameter.empty:
            raise TypeError(f"{fn} asks for {name}, expected some of {', '.join(names)}")
    if list(parameters)[: len(at)] != list(at) or any(parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in at):
        return lambda values: fn(**{name: values[i] for name, i in at.items()})
    if len(at) == 1:
        (only,) = at.values()
        return lambda values: fn(values[only])
    order = list(at.values())
    if order and order == list(range(order[0], order[-1] + 1)):  # side by side
        first, end = order[0], order[-1] + 1
        return lambda values: fn(*values[first:end])
    return lambda values: fn(*[values[i] for i in order])


def hints_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter, in order."""
    hints = get_type_hints(fn)
    return {name: hints.get(name) for name in inspect.signature(fn).parameters}


def is_tensor(hint: Any) -> bool:
    return bool(hint in (Tensor, Tensor | None))


def is_list(hint: Any) -> bool:
    """Of tensors, such as a weight for each expert."""
    return bool(hint == Sequence[Tensor])


def spread(values: Iterable[Any]) -> list[Any]:
    """The values, those of lists one by one."""
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,))]


def grouped(values: Iterable[Any], like: Iterable[Any]) -> list[Any]:
    """Values that were spread, in lists as those of `like`."""
    left = iter(values)
    return [[next(left) for _ in t] if isinstance(t, (list, tuple)) else next(left) for t in like]


class Signature:
    """Arguments with their types, and how they travel through torch: of a dataclass, the fields that it is made of."""

    def __init__(self, hints: Mapping[str, Any]):
        self.names = list(hints)
        self.objects: dict[str, tuple[Any, list[str]]] = {}
        self.flat: dict[str, Any] = {}
        for name, hint in hints.items():
            if dataclasses.is_dataclass(hint):
                of = get_type_hints(hint)
                fields = [f.name for f in dataclasses.fields(hint) if f.init]
                self.objects[name] = (hint, fields)
                self.flat |= {f: of[f] for f in fields}
            else:
                self.flat[name] = hint
        self.at = {name: i for i, name in enumerate(self.flat)}
        self.tensors = [i for i, hint in enumerate(self.flat.values()) if is_tensor(hint) or is_list(hint)]
        self.lists = any(map(is_list, self.flat.values()))

    def picked(self, flat: Sequence[Any], at: Sequence[int]) -> list[Any]:
        """Flat arguments by their places, those of lists one by one."""
        values = [flat[i] for i in at]
        return spread(values) if self.lists else values

    def flatten(self, args: Sequence[Any]) -> Sequence[Any]:
        if not self.objects:
            return args
        flat: list[Any] = []
        for name, arg in zip(self.names, args, strict=True):
            flat += [getattr(arg, f) for f in self.objects[name][1]] if name in self.objects else [arg]
        return flat

    def restore(self, flat: Sequence[Any]) -> Sequence[Any]:
        if not self.objects:
            return flat
        values = dict(zip(self.flat, flat, strict=True))
        made = {n: kind(**{f: values[f] for f in fields}) for n, (kind, fields) in self.objects.items()}
        return [made[n] if n in made else values[n] for n in self.names]
