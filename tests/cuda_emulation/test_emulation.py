"""csrc/cuda is run: the tests of its operators, and planted faults, in sessions of pytest on the emulated GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_emulation.build import compiler

TESTS = Path(__file__).parents[1]
# every test that names the `cuda` implementation of an operator
PARITY = [
    "csrc/test_ops.py",
    *(f"kernels/test_{name}.py" for name in ("contrastive", "few_query", "grouped", "patch", "points", "select_head")),
]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64" or not compiler(), reason="the emulator is for g++ on x86-64"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]


def library(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def session(*arguments: str | Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        # libasan knows where tensors end; exceptions need the other before it is loaded
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "cuda_emulation.plugin"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    # a report begins with what happened
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[:8000]


def test_parity() -> None:
    session("-k", "cuda", *(TESTS / file for file in PARITY))


def test_planted_faults_and_limits() -> None:
    session(*(Path(__file__).with_name(name) for name in ("faults.py", "limits.py")))
