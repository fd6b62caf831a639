"""`mmfuse info` and `mmfuse explain` answer for every operator, with arguments of its own."""

from __future__ import annotations

import json

import pytest

import mmfuse
from mmfuse.cli import main
from mmfuse.kernels._runtime import operators


def test_info_knows_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["operators"].keys() == operators().keys()
    for name, implementations in facts["operators"].items():
        assert not all(implementations.values()), f"{name}: {implementations}"


def test_explain_takes_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--shape", "64x32"]) == 0
    assert callable(mmfuse.explain)  # which no module of that name may replace
    printed = capsys.readouterr().out
    assert all(f"{name}\n" in printed for name in operators()) and printed.count("->") == len(operators())


def test_info_says_how_to_get_what_was_not_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmfuse.info.build_info", lambda: {"parts": {"cpu": {"built": False, "reason": "pure"}}})
    main(["info"])
    assert capsys.readouterr().out.count("pip install --no-build-isolation .") == 3  # for a CPU, CUDA, onnxruntime
