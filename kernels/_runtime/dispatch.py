"""Choose an implementation of an operator, and say why the others were passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("mmfuse")

BACKENDS = ("cuda", "triton", "cpu", "chunked", "torch")
_OPERATORS: dict[str, Op] = {}
_forced: str | None = os.environ.get("MMFUSE_BACKEND") or None


class UnsupportedError(NotImplementedError):
    """No implementation accepts these arguments; the message lists every reason."""


@dataclass(frozen=True)
class Impl:
    """One implementation: `fn` computes, `reasons_against` says why it cannot (an empty list: it can).

    `steps_aside` says why a later one is the better choice, unless this one is named.
    """

    name: str
    fn: Callable[..., Any]
    reasons_against: Callable[..., list[str]]
    steps_aside: Callable[..., list[str]] = lambda *args: []


class Op:
    """An operator: its implementations in order of preference. The first without a reason against it runs.

    `example` makes arguments for `explain` out of features [N, D], for those who ask without arguments of their own.
    """

    def __init__(
        self,
        name: str,
        implementations: Sequence[Impl],
        example: Callable[[torch.Tensor], tuple[Any, ...]] = lambda features: (features, features),
    ):
        self.name, self.implementations, self.example = name, tuple(implementations), example
        self._told: set[str] = set()
        _OPERATORS[name] = self

    def explain(self, *args: Any) -> dict[str, list[str]]:
        """Each implementation's reasons not to run for these arguments, in order of preference."""
        return {i.name: i.reasons_against(*args) or i.steps_aside(*args) for i in self.implementations}

    def available(self, *args: Any) -> list[str]:
        """The implementations that run for these arguments when they are named."""
        return [i.name for i in self.implementations if not i.reasons_against(*args)]

    def select(self, *args: Any, backend: str | None = None) -> Impl:
        """The implementation to run: `backend` if named (argument, then context, then environment), else the first."""
        name = backend or _forced
        if name is not None:
            _check_name(name)
        candidates = [i for i in self.implementations if name in (None, i.name)]
        report: list[str] = []
        for impl in candidates:
            why = impl.reasons_against(*args) or (impl.steps_aside(*args) if name is None else [])
            if not why:
                if report and not torch.compiler.is_compiling():  # logging would break the graph
                    self._tell(impl.name, "; ".join(report))
                return impl
            report.append(f"{impl.name}: {', '.join(why)}")
        known = ", ".join(i.name for i in self.implementations)
        raise UnsupportedError(
            f"{self.name}: no implementation accepts these arguments\n  "
            + "\n  ".join(report or [f"{name}: not an implementation of {self.name} (there are {known})"])
        )

    def _tell(self, chosen: str, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.info("%s: using %s (%s)", self.name, chosen, why)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")


def operators() -> dict[str, Op]:
    """Every operator by name."""
    import mmfuse.kernels  # noqa: F401  (registers them)

    return dict(_OPERATORS)


def forced_backend() -> str | None:
    """The backend that `use_backend` or `MMFUSE_BACKEND` names at the moment."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block with one implementation, e.g. `with use_backend("torch"):`.

    Stronger than the environment variable `MMFUSE_BACKEND`, weaker than an operator's `backend` argument.

    Raises:
        ValueError: `name` is not a backend.
        UnsupportedError: (from the operator) the implementation does not accept its arguments.
    """
    global _forced
    _check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(op: str | Callable[..., Any], *args: Any) -> str:
    """A table of an operator's implementations for these arguments: which one runs, and why not the others.

    Args:
        op: an operator's name or its public function, e.g. `"clip_loss"` or `mmfuse.clip_loss`.
        args: the tensors it would be called with.
    """
    name = op if isinstance(op, str) else op.__name__
    known = operators()
    if name not in known:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(known))}")
    lines, chosen = [name], False
    for impl, why in known[name].explain(*args).items():
        mark = "  " if why or chosen else "->"
        chosen = chosen or not why
        lines.append(f" {mark} {impl:8} {'; '.join(why) or 'accepts these arguments'}")
    return "\n".join(lines)
