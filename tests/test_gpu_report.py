"""`make gpu-report` without a GPU: every end of a test and of a step is told, and nothing that was known is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu_report

pytestmark = pytest.mark.skipif(gpu_report.GPU, reason="the report itself is what runs on a GPU")

ROOT = Path(__file__).parents[1]
PLANTED = "tests/planted_ends.py"


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = (sys.executable, "tests/gpu_report.py", "--out", str(out), "--jobs", "2", *options)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_every_end_is_told(tmp_path: Path) -> None:
    report = start(tmp_path, "--tests", PLANTED, "--budget", "2000")
    printed, _ = report.communicate(timeout=900)
    assert report.returncode == 1  # three of the tests fail
    assert printed == (tmp_path / "report.txt").read_text()
    assert "6 passed" in printed and "1 skipped" in printed and "3 failed" in printed and "0 did not run" in printed
    assert "FAILED tests/planted_ends.py::test_triton_fails" in printed and "the numbers differ" in printed
    assert "FAILED tests/planted_ends.py::test_triton_ends_its_process" in printed and "crashed" in printed
    assert "FAILED tests/planted_ends.py::test_triton_hangs" in printed
    assert "another_kind" not in printed
    record = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])
    assert record["case"] == "clip" and f"{record['provider']} " in printed
    assert "=== info" in (tmp_path / "log.txt").read_text()


def test_a_report_that_is_killed_tells_what_it_knows(tmp_path: Path) -> None:
    report = start(tmp_path, "--tests", PLANTED, "--budget", "2000")
    while not (tmp_path / "triton.jsonl").exists() and report.poll() is None:
        time.sleep(0.2)
    report.send_signal(signal.SIGTERM)
    printed, _ = report.communicate(timeout=60)
    assert report.returncode == 1
    assert "info                       passed" in printed and "triton                     running" in printed
    assert "did not run" in printed and "left out by the budget: bench clip" in printed


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    report = start(tmp_path, "--budget", "0.01")
    printed, _ = report.communicate(timeout=60)
    assert report.returncode == 0  # nothing failed, for nothing came to an end
    assert "info                       out of time" in printed
    assert "left out by the budget: triton, bench clip" in printed


def test_each_headline_is_a_case_that_is_measured() -> None:
    from mmfuse.bench import cases

    for suite, name, size in gpu_report.HEADLINES[True]:
        case = next(case for case in cases.suite(suite) if case.name == name)
        assert case.shape(size) in case.cuda
