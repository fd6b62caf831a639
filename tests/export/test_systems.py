"""Every reference system leaves at a small size, with free sizes, and onnxruntime computes what PyTorch does.

One of each kind here; all of them under `make test-export`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mmfuse.export import systems_cli
from mmfuse.export.served import SERVED, build, export_served
from mmfuse.models import list as systems

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
check = pytest.importorskip("mmfuse.export.check")

pytestmark = pytest.mark.xdist_group("export")

# routed experts, a Q-Former with texts, a temporal stem
KINDS = ("vlmo", "blip2", "imagebind/vision")
NAMES = tuple(SERVED) if os.environ.get("MMFUSE_EXPORT") == "all" else KINDS
# parts that no operator of ours is in
PLAIN = {"minigpt5/mapper", *(f"metatransformer/{name}" for name in ("time_series", "hyperspectral", "tabular"))}
LARGEST_DIFFERENCE = 1e-4  # of onnxruntime from PyTorch, relative to an output's largest


def test_every_system_is_served() -> None:
    assert {name.partition("/")[0] for name in SERVED} == set(systems())


def test_the_page_has_what_was_recorded() -> None:
    """Of every part; none has failed."""
    page = Path(__file__).parents[2] / "docs" / "systems.md"
    recorded = json.loads(page.with_suffix(".json").read_text())
    assert page.read_text() == systems_cli.page(recorded), "run `mmfuse export systems --out docs/systems.md`"
    assert recorded["rows"].keys() == SERVED.keys()
    assert all(row["ok"] for row in recorded["rows"].values())


def test_every_cloud_has_distances_of_its_own() -> None:
    """What Inductor once computed wrongly, for more clouds than one."""
    if os.environ.get("MMFUSE_EXPORT") != "all":
        pytest.skip("minutes of compilation: under `make test-export`")
    [row] = systems_cli.rows_of(["metatransformer/points"], ["aoti"])
    assert row["aoti"] == "yes"


@pytest.mark.parametrize("name", [name for name in SERVED if name not in NAMES or name == "clip"])
def test_a_part_runs_at_every_size(name: str) -> None:
    part = SERVED[name]
    module = part.module(build(name, part.tiny).eval())
    for sizes in part.sizes:
        with torch.no_grad():
            found = module(**part.inputs(module.model, sizes))
        found = (found,) if isinstance(found, torch.Tensor) else found
        assert len(found) == len(part.outputs)
        assert all(bool(t.isfinite().all()) for t in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_system_leaves(name: str, tmp_path: Path) -> None:
    report = check.check_onnx(export_served(name, tmp_path / "model.onnx", "tiny"))
    assert report["ok"], report["checks"] + report["outputs"]
    assert bool(report["ours"]) == (name not in PLAIN)
    for output in report["outputs"]:
        assert output["difference"] <= LARGEST_DIFFERENCE * output["scale"], output
