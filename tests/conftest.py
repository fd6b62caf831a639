from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
# what the user has tuned does not count
os.environ["MMFUSE_TUNED"] = ""


from mmfuse.fused.acceleration.method import Fused  # noqa: E402
from mmfuse.kernels._runtime import configs  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="keep what ran, by area, as JSON")
    parser.addoption("--results", type=Path, metavar="FILE", help="keep each test's outcome at once, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--results")) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Results(file))
    if GPU and hasattr(config, "workerinput"):
        config.pluginmanager.register(_Context())


class _Results:
    """What was collected and how each test ended, written as it is known: a run that is ended leaves what it did."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def _write(self, **line: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._write(collected=list(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            lines = report.longreprtext.strip().splitlines() if report.failed else []
            error = lines[-1] if lines else ""
            self._write(test=report.nodeid, outcome=report.outcome, error=error, seconds=round(report.duration, 2))


class _Context:
    """An illegal memory access breaks CUDA for its process: the worker ends, and another takes the tests to come."""

    def pytest_runtest_logfinish(self) -> None:
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (file := config.getoption("--record")) is not None:
        import reliability

        file.write_text(json.dumps(reliability.record(terminalreporter.stats)))


# each takes a minute: they come first, so that no process is left with one when the others are done
_LONG = ("test_demo.py", "test_emulation.py", "test_examples.py", "test_gpu_report.py", "test_recipe.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
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
def taken_from() -> Iterator[Callable[..., None]]:
    """Sets from which sizes on implementations are taken, in place of tables: from any, or as a function says."""
    with pytest.MonkeyPatch.context() as patch:

        def change(steps: Callable[..., configs.Steps] = lambda *of: ()) -> None:
            patch.setattr(configs, "least", steps)
            configs.forget()

        yield change
    configs.forget()


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


@pytest.fixture
def equal_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of equal rows are equal wherever these stand, as on a GPU.

    Triton's interpreter takes numpy's, which on some processors are not: on these, duplicates differ in a last digit.
    """
    if GPU:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    own = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return own(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


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

    # a process group that begins makes Dynamo forget the functions that it knows by identity: it has to meet real ones
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
