"""Which implementation is named: by an argument, by a context, or by the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

BACKENDS = ("cuda", "triton", "cpu", "chunked", "torch")
_forced: str | None = os.environ.get("MMFUSE_BACKEND") or None


class UnsupportedError(NotImplementedError):
    """No implementation accepts these arguments; the message lists every reason."""


def check_name(name: str, others: Iterable[str] = ()) -> None:
    known = dict.fromkeys((*BACKENDS, *others))
    if name not in known:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(known)}")


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
    check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
