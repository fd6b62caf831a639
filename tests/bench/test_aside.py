"""`mmfuse bench aside`: which rows there are, and when one holds."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import profiler

from mmfuse.bench.cases import Case, everything
from mmfuse.bench.row import Row
from mmfuse.bench.suites import aside


@pytest.mark.parametrize(
    ("eager", "ours", "holds"), [(1.0, 1.04, True), (1.0, 1.06, False), (1e-5, 6e-5, True), (1e-5, 8e-5, False)]
)
def test_when_a_row_holds(
    eager: float, ours: float, holds: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
        first(), second()
        return eager, ours

    monkeypatch.setattr(aside, "_paired", timed)
    threads = torch.get_num_threads()
    failed = aside.run(Namespace(dtype="float32", cases="topk,timm 8 x 32", json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert torch.get_num_threads() == threads and {row["threads"] for row in rows} == {1, 2}
    assert {row["row"].split()[0] for row in rows} >= {"topk"}
    assert all(row["holds"] == holds for row in rows) and failed == (not holds)


def test_sizes_are_those_of_cases() -> None:
    dims = {case.name: case for case in everything()}
    for name, sizes in aside.AWKWARD.items():
        assert all(dims[name].shape(size) for size in sizes)


# operations of a small call beyond those of the eager code: what is asked for besides, and views
_OTHERS = 12
_BEYOND = {"quantizer": 15}
# whole models, which put rows in the order of their attention, and project keys and values of all layers at once
_BEYOND |= {"qformer": 20, "qformer_windows": 27, "qformer_rerank": 52, "qformer_stage1": 21}


def _operations(call: Callable[[], Any]) -> int:
    """Those that Python calls; what they come to is not counted."""
    call()
    with profiler.profile() as seen:
        call()
    return sum(event.cpu_parent is None for event in seen.function_events)


@pytest.mark.parametrize("case", everything(), ids=lambda case: case.name)
def test_operations_of_a_small_call(case: Case) -> None:
    """Where a call takes as long as its dispatch, checks and choices must not be made of tensors."""
    row = Row(case, case.small, torch.device("cpu"), torch.float32, "fwd")
    eager, ours = (_operations(lambda n=name: row.call(n)) for name in (case.definitions[0], "mmfuse"))
    assert ours <= eager + _BEYOND.get(case.name, _OTHERS)
