"""The figures of docs/reliability.md: `pytest tests --record FILE` keeps what a run did, and this puts it on the page.

python tests/reliability.py FILE
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
RECORD = PAGE.with_suffix(".json")
BEGIN, END = "<!-- written by tests/reliability.py -->\n", "<!-- end -->\n"

# what is promised, and the tests that hold it; a test counts for the first that it lies in
AREAS = {
    "Second derivatives, forward mode and `torch.func`": ["tests/kernels/test_transforms.py"],
    "Properties of drawn calls (each a test of up to 200 draws), planted faults": ["tests/fuzz/"],
    "Numerics, determinism, strides, empty tensors, graphs of each operator": ["tests/kernels/"],
    "The compiled part called with what does not fit, and as another copy": ["tests/csrc/"],
    "Tools: each rule of `accelerate` under each tool": ["tests/fused/test_tools.py"],
    "Upstream code that changed is noticed": ["tests/fused/test_upstream.py"],
    "Models and losses of other libraries, accelerated": ["tests/fused/"],
    "Reference models and the official implementations' numbers": ["tests/models/", "tests/goldens/"],
    "Several processes": ["tests/distributed/"],
    "Export, command line, packaging, documentation": ["tests/"],
}
_PACKAGES = ("torch", "transformers", "timm", "open_clip_torch", "vector-quantize-pytorch", "peft", "accelerate")


def record(stats: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Of pytest's reports by outcome: how many passed and were skipped in each area, and beside which packages."""
    counts = {area: {"passed": 0, "skipped": 0, "failed": 0} for area in AREAS}
    for outcome in ("passed", "skipped", "failed"):
        for report in stats.get(outcome, ()):
            area = next(a for a, paths in AREAS.items() if report.nodeid.startswith(tuple(paths)))
            counts[area][outcome] += 1
    machine = {"python": platform.python_version(), "cpu": platform.machine()}
    return {"machine": machine, "packages": {p: version(p) for p in _PACKAGES}, "tests": counts}


def figures(found: Mapping[str, Any]) -> str:
    """The table of a record."""
    packages = ", ".join(f"{name} {v}" for name, v in found["packages"].items())
    rows = [f"| {a} | {c['passed']} | {c['skipped']} | {c['failed']} |" for a, c in found["tests"].items()]
    head = ["| | passed | skipped | failed |", "|---|---|---|---|"]
    return "\n".join([f"Python {found['machine']['python']}, {packages}:", "", *head, *rows]) + "\n"


def written(page: str, found: Mapping[str, Any]) -> str:
    """The page with the table of a record."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + figures(found) + END + rest.split(END)[1]


if __name__ == "__main__":
    latest = json.loads(Path(sys.argv[1]).read_text())
    RECORD.write_text(json.dumps(latest, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), latest))
