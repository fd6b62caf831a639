"""`mmfuse bench aside`: which rows there are, and when one holds."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmfuse.bench.cases import everything
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
