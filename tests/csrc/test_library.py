"""Loading the compiled part: another copy of it in the process, and one that does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfuse.kernels._runtime import reasons
from mmfuse.kernels._runtime.library import load

anew = load.__wrapped__  # type: ignore[attr-defined]


def test_a_copy_is_used_and_another_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := load("cpu"):
        pytest.skip(reason)
    (library,) = (p for p in torch.ops.loaded_libraries if Path(p).name == "_C_cpu.so")
    copy = Path(shutil.copy(library, tmp_path))
    monkeypatch.setenv("MMFUSE_LIBRARY_DIR", str(tmp_path))
    assert anew("cpu") is None
    with copy.open("ab") as file:  # behind what a loader reads
        file.write(b" ")
    assert f"{copy} are registered in this process already, by {library}, which is another build" in anew("cpu")
    copy.unlink()
    assert "_C_cpu was not built" in anew("cpu")


def test_the_linker_says_why(tmp_path: Path) -> None:
    Path(tmp_path, "_C_cpu.so").write_text("no library")
    program = "from mmfuse.kernels._runtime.library import failure, load; print(load('cpu')); raise failure('cpu')"
    environment = os.environ | {"MMFUSE_LIBRARY_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert "does not load beside torch" in done.stdout and "file too short" in done.stdout
    assert "OSError" in done.stderr and "file too short" in done.stderr
    program = "import mmfuse, torch; x = torch.zeros(2, 2); mmfuse.clip_loss(x, x, 1.0, backend='cpu')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert "direct cause" in done.stderr and done.stderr.index("file too short") < done.stderr.index("UnsupportedError")


def test_a_gpu_without_code_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "load", lambda part: None)
    monkeypatch.setattr(reasons, "error_on", lambda device: f"no code for {device}" if device.index == 1 else None)
    for index, why in ((0, []), (1, ["no code for cuda:1"])):
        assert reasons._against("cuda", torch.device("cuda", index), torch.float32) == why
