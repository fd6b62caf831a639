"""The examples run as they are, and reach what they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDED = {"open_clip_training": ("open_clip", "sklearn"), "retrieval": ("sklearn",), "timm_bytes": ("timm", "skimage")}


def _output(name: str, tmp_path: Path) -> str:
    for package in NEEDED[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    # nothing is downloaded, and no interpreter or named implementation decides what runs
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSE_BACKEND")}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    run = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_short() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert sorted(lines) == sorted(NEEDED)
    assert max(lines.values()) <= 40


def test_open_clip_trains_as_before(tmp_path: Path) -> None:
    output = _output("open_clip_training", tmp_path)
    assert "accelerate(ModuleList): 2 replaced" in output
    found = re.findall(r"(before|after): last loss ([\d.]+), accuracy on new digits ([\d.]+)", output)
    (_, loss, accuracy), (_, fused_loss, fused_accuracy) = found
    assert float(fused_loss) == pytest.approx(float(loss), abs=0.02)
    assert min(float(accuracy), float(fused_accuracy)) > 0.5, "chance is 0.1"


def test_timm_learns_from_bytes(tmp_path: Path) -> None:
    output = _output("timm_bytes", tmp_path)
    assert "accelerate(VisionTransformer): 2 replaced" in output
    accuracy, difference = map(float, re.findall(r"(?:accuracy|difference from timm on floats) (\S+)", output))
    assert accuracy > 0.5, "the commonest photograph has a share of 0.3"
    assert difference < 1e-4


def test_reranking_improves_retrieval(tmp_path: Path) -> None:
    first, second = map(float, re.findall(r"R@1 (\S+)", _output("retrieval", tmp_path)))
    assert 0.8 < first < second - 0.02
