from __future__ import annotations

import argparse
import json

import pytest

from mmfuse.models import cli


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--json") == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["vit-l-14-336"] == {
        "model": "clip",
        "preset": "vit-l-14-336",
        "embed_dim": 768,
        "resolution": 336,
        "parameters": 427_944_193,
        "paper": "arXiv:2103.00020",
    }


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any({"clip", "rn50", "1024", "224", "102,007,137"} <= set(line.split()) for line in lines)
