"""What the README and the documentation show is what one gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest

import mmfuse
import reliability
from mmfuse.bench import report, store
from mmfuse.bench.cases import Record
from mmfuse.cli import main
from mmfuse.fused.acceleration.rules import RULES
from mmfuse.kernels._runtime.library import load

ROOT = Path(__file__).parents[1]
README, DOCS, RECORDS = ROOT / "README.md", ROOT / "docs", ROOT / "bench" / "results"
PAGES = sorted(DOCS.rglob("*.md"))
FAMILIES = sorted((ROOT / "kernels").rglob("README.md"))
# with operators that `mmfuse` does not have, and without a list of them
ELSEWHERE = [
    "contrastive.global_contrastive_loss",
    "contrastive.matryoshka_clip_loss",
    "codebook.code_statistics",
    "codebook.fsq",
    "codebook.lfq_entropy",
    "codebook.linear_argmax",
]


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    ("page", "package"), [("README", "open_clip"), ("docs/index", ""), ("docs/accelerate", "timm")]
)
def test_code_prints_what_is_shown(page: str, package: str) -> None:
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if page == "docs/index" and (missing := load("cpu")):
        pytest.skip(missing)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    code = [body for language, body in blocks if language == "python"]
    shown = [body for language, body in blocks if not language]
    assert code and shown
    beside = "from mmfuse._compat import allow_torchvision; allow_torchvision()"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSE_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([beside, *code])], capture_output=True, text=True, env=env, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    # from which size on depends on the CPU
    printed, shown = (re.sub(r"(fewer than) \d+", r"\1 N", text) for text in (done.stdout, "".join(shown)))
    assert printed == shown


def test_the_benchmarks_are_those_of_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--from", str(RECORDS), "--report", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == ""
    written = (tmp_path / "page.md").read_text()
    assert written == (DOCS / "benchmarks.md").read_text(), (
        "run `mmfuse bench --from bench/results --report docs/benchmarks.md`"
    )


def test_the_headlines_are_those_of_the_records() -> None:
    records = {(r["case"], r["mode"], report.size(r), r["provider"]): r for r in store.read(RECORDS)}
    loss, eager_loss = (records["clip", "fwd+bwd", "16384x512", p] for p in ("mmfuse[recompute]", "open_clip"))
    stem, eager_stem = (records["patch_embed", "fwd", "32x224x16x768", p] for p in ("mmfuse", "eager"))
    text = " ".join(README.read_text().split())
    assert f"takes {_cost(loss)}; open_clip takes {_cost(eager_loss)}." in text
    assert f"in {_cost(stem)}; in eager PyTorch it takes {_cost(eager_stem)}." in text
    for record in (loss, eager_loss, stem, eager_stem):
        device, threads = record["device"].split(", ")
        assert f"{device} with {threads} and torch {record['torch']}, in {record['dtype']}" in text


def _cost(record: Record) -> str:
    return f"{report.number(record['p50'])} ms and {report.memory(record['memory'])}"


def test_links_lead_somewhere() -> None:
    for page in (README, *ROOT.glob("[A-Z]*.md"), *FAMILIES, ROOT / "models" / "README.md", *PAGES):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_every_public_name_has_a_reference() -> None:
    entries = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(entries) == len(set(entries))
    documented = [resolve_name(entry) for entry in entries]
    public = [f"mmfuse.{name}" for name in mmfuse.__all__] + [f"mmfuse.kernels.{name}" for name in ELSEWHERE]
    for package in ("kernels.points", "kernels.text", "kernels.head", "fused", "models", "export"):
        public += [f"mmfuse.{package}.{name}" for name in resolve_name(f"mmfuse.{package}").__all__]
    assert [name for name in public if resolve_name(name) not in documented] == []


def test_every_family_has_a_page() -> None:
    for readme in FAMILIES:
        path = readme.relative_to(ROOT)
        assert f'--8<-- "{path}"' in (DOCS / path.parent / "index.md").read_text()


def test_every_rule_of_accelerate_is_listed() -> None:
    text = (DOCS / "accelerate.md").read_text()
    for rule in RULES:
        name = rule.target.split(":")[1]
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert any(f"`{rule.op}`" in row for row in rows), f"no row has {name} and {rule.op}"


def test_the_figures_are_those_of_the_record() -> None:
    found = json.loads(reliability.RECORD.read_text())
    page = reliability.PAGE.read_text()
    assert page == reliability.written(page, found)
    assert found["tests"].keys() == reliability.AREAS.keys()
    assert not any(counts["failed"] for counts in found["tests"].values())
