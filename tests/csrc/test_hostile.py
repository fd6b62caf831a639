"""No argument of a compiled operator ends the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfuse.kernels._runtime.library import load


def test_hostile_calls_end_no_process() -> None:
    if reason := load("cpu"):
        pytest.skip(reason)
    program = Path(__file__).with_name("hostile.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, done.stderr
