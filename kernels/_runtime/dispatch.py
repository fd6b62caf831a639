"""Which implementation is named: by an argument, by a context, or by the environment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "slices", "chunked", "absorbed", "by_length", "torch")
_ENVIRONMENT = os.environ.get("MMFUSE_BACKEND") or None
_forced: ContextVar[str | None] = ContextVar("forced", default=_ENVIRONMENT)


class _Traced(threading.local):
    """The same in this thread, for Dynamo, which guards it but cannot read a context variable."""

    def __init__(self) -> None:
        self.name = _ENVIRONMENT
        self.export: Callable[[Any, Any], Any] | None = None


_traced = _Traced()


class UnsupportedError(NotImplementedError):
    """No implementation accepts these arguments; the message lists every reason."""


def check_name(name: str, others: Iterable[str] = ()) -> None:
    known = dict.fromkeys((*BACKENDS, *others))
    if name not in known:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(known)}")


def forced_backend() -> str | None:
    """The backend that `use_backend` or `MMFUSE_BACKEND` names at the moment."""
    return _traced.name if torch.compiler.is_compiling() else _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block with one implementation, e.g. `with use_backend("torch"):`.

    Stronger than the environment variable `MMFUSE_BACKEND`, weaker than an operator's `backend` argument. It holds in
    this thread and task alone; the backward uses what its forward did, wherever it runs.

    Raises:
        ValueError: `name` is not a backend.
        UnsupportedError: (from the operator) the implementation does not accept its arguments.
    """
    check_name(name)
    token, traced, _traced.name = _forced.set(name), _traced.name, name
    try:
        yield
    finally:
        _traced.name = traced
        _forced.reset(token)


def exported_by() -> Callable[[Any, Any], Any] | None:
    """What stands for operators in the graph that is being exported, or None."""
    return _traced.export


@contextmanager
def exporting(stand_in: Callable[[Any, Any], Any] | None) -> Iterator[None]:
    """While a graph is traced, `stand_in(operator, args)` takes the place of operators without a named backend."""
    before, _traced.export = _traced.export, stand_in
    try:
        yield
    finally:
        _traced.export = before
