"""csrc/README.md has every operator."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from mmfuse.kernels._runtime.library import load

CSRC = Path(__file__).parents[2] / "csrc"
TABLE = runpy.run_path(str(CSRC / "table.py"))


def test_the_readme_has_the_table() -> None:
    expected = TABLE["BEGIN"] + TABLE["table"]() + TABLE["END"]
    assert expected in (CSRC / "README.md").read_text(), "run `python csrc/table.py`"


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_the_table_has_what_the_library_registers(part: str) -> None:
    reason = load(part)
    if reason:
        pytest.skip(reason)
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"mmfuse_{part}::")]
    rows = [row for row in TABLE["table"]().splitlines() if f"_C_{part}.so" in row]
    listed = [f"mmfuse_{part}::{name}" for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[2])]
    assert sorted(listed) == sorted(registered)
