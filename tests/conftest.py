from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


from mmfuse.fused.acceleration.method import Fused  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="keep what ran, by area, as JSON")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (file := config.getoption("--record")) is not None:
        import reliability

        file.write_text(json.dumps(reliability.record(terminalreporter.stats)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    # what was imported stays: the collector need not walk it again and again
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


# `with torch.device(...)` knows constructors by identity: let it see the real ones before `_poison` replaces them
_device_constructors()


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


_aside = Fused._aside


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have small models, for which the class's own code is faster: the fused code is what they test."""
    monkeypatch.setattr(Fused, "_aside", lambda *_: False)


@pytest.fixture
def stepping_aside(_fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fused, "_aside", _aside)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (integers: their largest), so a kernel that leaves an element unwritten fails."""

    def poisoned(make):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            t = make(*args, **kwargs)
            if torch.compiler.is_compiling() or type(t) is not torch.Tensor or t.is_meta:
                return t
            if t.is_floating_point():
                return t.fill_(float("nan"))
            return t if t.dtype in (torch.bool,) or t.is_complex() else t.fill_(torch.iinfo(t.dtype).max)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
