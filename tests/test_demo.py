"""`mmfuse demo --quick`: every part runs, parity holds, and the page holds it all."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mmfuse.cli import main

pytest.importorskip("rich")

SECTIONS = [
    "Environment",
    "What accelerate() replaced",
    "Images",
    "Training",
    "Captions",
    "Bytes to tokens",
    "Parity",
    "Benchmark",
    "Export",
]
FIGURES = ["images", "training", "digits", "benchmark"]


class Outline(HTMLParser):
    """The headings, images and references of a page, and the tags that are left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.images: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):  # type: ignore[no-untyped-def]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if tag == "img" else self.references).append(value)

    def handle_endtag(self, tag):  # type: ignore[no-untyped-def]
        assert self.open.pop() == tag

    def handle_data(self, data):  # type: ignore[no-untyped-def]
        if self.open and self.open[-1] == "h2":
            self.sections.append(data)


@pytest.fixture
def packages() -> None:
    from mmfuse import demo

    try:
        demo._require(*demo._NEEDED)
    except NotImplementedError as error:
        pytest.skip(str(error))


def test_quick(tmp_path: Path, packages: None) -> None:
    from PIL import Image

    out = tmp_path / "new" / "demo"
    # Triton's interpreter is the tests' own: whoever runs the demo has none
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mmfuse.cli", "demo", "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *claims, last = done.stdout.splitlines()
    assert last == str(out / "report.html")
    assert claims and all(line.startswith("holds  ") for line in claims), done.stdout

    text = (out / "report.html").read_text(encoding="utf-8")
    page = Outline(text)
    assert page.open == []
    assert page.sections == SECTIONS
    assert "FAIL" not in text
    assert f"all {len(claims)} claims hold" in text
    # self-contained: what it refers to is in it
    assert all(reference[1:] in re.findall('id="(.+?)"', text) for reference in page.references)
    assert len(page.images) == len(FIGURES)
    for name, source in zip(FIGURES, page.images, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert data == (out / f"{name}.png").read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.width > 600
        low, high = image.convert("L").getextrema()
        assert low < 100 < 200 < high
    assert (out / "clip.onnx").stat().st_size > 1e6


def test_a_claim_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmfuse.demo.page import Page

    page = Page(tmp_path)
    page.section("A <b> section")
    page.claim(True, "one")
    assert page.holds
    page.claim(False, "two & [three]")
    page.claim(True, "[red] " + " ".join(60 * ["long"]))
    page.table(("a", "b"), [("<x>", "1")])
    page.table(("c", "d"), [("y", "2")], folded="all & more")
    page.pre("text")
    assert not page.holds
    text = page.write(1.0).read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    assert outline.sections == ["A <b> section"]
    assert "1 of 3 claims FAIL" in text
    assert text.count("<details>") == 1 and "<summary>all &amp; more</summary>" in text
    assert text.count("two &amp; [three]") == 2
    assert capsys.readouterr().out.splitlines() == [
        "holds  one",
        "FAILS  two & [three]",
        "holds  [red] " + " ".join(60 * ["long"]),
    ]


def test_the_exit_code_follows_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmfuse.demo import export, numerics, speed, swap, training

    for part in (swap, training, numerics, speed):
        monkeypatch.setattr(part, "show", lambda page, settings: None)
    monkeypatch.setattr(export, "show", lambda page, model: page.claim(False, "no"))
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmfuse demo: PIL cannot be imported")
    assert line.endswith("pip install 'mmfuse[demo]'")


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], packages: None) -> None:
    (file := tmp_path / "file").touch()
    assert main(["demo", "--out", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mmfuse demo: --out is '{file}'")


def test_captions_become_ids() -> None:
    from mmfuse.demo import digits

    ids = digits.tokenize(digits.caption(i, d, t) for i in range(8) for d in range(10) for t in range(4))
    assert ids.shape == (320, digits.LENGTH)
    assert len(ids.unique(dim=0)) == 320
    end = digits.CONFIG["vocab_size"] - 1
    assert (ids == end).sum(1).eq(1).all()
    assert ids.max() == end


def test_eager_is_not_compared_with_itself(device: str) -> None:
    from mmfuse import demo

    assert demo._fused(torch.device(device), "clip_loss") != "torch"


def test_cost_of_a_step(packages: None) -> None:
    from mmfuse.demo import digits, training
    from mmfuse.fused import ClipLoss

    data, held_out = digits.load(torch.device("cpu"))
    assert (len(data.grey), len(held_out.grey)) == (1200, 597)
    milliseconds, _ = training.cost(ClipLoss(), data, batch=16, steps=1)
    assert float(milliseconds) > 0
