"""The recipe for an operator in CONTRIBUTING.md, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mmfuse", "bench", "export", "models", "fused", "kernels")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (root / "tests" / "kernels").mkdir(parents=True)
    for name in ("conftest.py", "judge.py", "registered.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests")
    shutil.copy(ROOT / "pyproject.toml", root)
    files = re.findall(r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert len(files) == 6
    for name, text in files:
        assert not (root / name).exists()
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def run(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_its_test_passes(checkout: Path) -> None:
    assert re.search(r"^9 passed", run(checkout, "pytest", "-q", "tests/kernels/test_swish.py"), re.M)


def test_the_commands_know_it(checkout: Path) -> None:
    explained = json.loads(run(checkout, "mmfuse.cli", "explain", "swish", "--json"))["swish"]
    assert list(explained) == ["triton", "torch"] and explained["torch"] == []
    rows = [json.loads(line) for line in run(checkout, "mmfuse.cli", "verify", "swish", "--json").splitlines()]
    assert {r["backend"] for r in rows} == {"triton"} and all(r["holds"] for r in rows)
    table = run(checkout, "mmfuse.cli", "bench", "swish", "--sizes", "2000")
    assert "eager" in table and "mmfuse" in table
    listed = "from mmfuse.bench.compile_report import triton_specs; print([s.variant for s in triton_specs('swish')])"
    done = subprocess.run(
        [sys.executable, "-c", listed],
        cwd=checkout,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "['bf16 gradient']", done.stderr[-2000:]
