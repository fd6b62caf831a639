"""Loading the compiled part: another copy of it in the process, and one that does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfuse.kernels._runtime.library import load

LOAD = "from mmfuse.kernels._runtime.library import failure, load; print(load('cpu')); print(repr(failure('cpu')))"
CALL = "import mmfuse; x = torch.eye(2); print(mmfuse.clip_loss(x, x, 1.0, backend='cpu').item())"


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {program}"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    if reason := load("cpu"):
        pytest.skip(reason)
    (library,) = (p for p in torch.ops.loaded_libraries if Path(p).name == "_C_cpu.so")
    return Path(shutil.copy(library, tmp_path))


def test_a_copy_is_used_and_another_build_is_refused(copy: Path) -> None:
    first = f"torch.ops.load_library({str(copy)!r}); "
    assert float(run(first + CALL)) < 1
    with copy.open("ab") as file:  # behind what the loader reads
        file.write(b" ")
    said = run(first + LOAD)
    assert f"registered in this process already, by {copy}, which is another build" in said
    # the package's own library is left aside
    assert run(LOAD, MMFUSE_LIBRARY_DIR=str(copy.parent)) == "None\nNone\n"


def test_the_linker_says_why(tmp_path: Path) -> None:
    Path(tmp_path, "_C_cpu.so").write_text("no library")
    said = run(LOAD, MMFUSE_LIBRARY_DIR=str(tmp_path))
    assert "does not load beside torch" in said and "file too short" in said and "OSError" in said.splitlines()[1]
    assert "was not built" in run(LOAD, MMFUSE_LIBRARY_DIR=str(tmp_path / "nowhere"))
