"""What `mmfuse bench` counts: the counts are those of the formulas, and the formulas those of this machine's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmfuse.cli
from mmfuse.bench.suites import contrastive_dist, max_batch


@pytest.mark.parametrize("size", [1, 2])
def test_counts_are_the_formulas(size: int) -> None:
    found = contrastive_dist._world(size, 8, 6)
    assert {provider.split("[")[0] for _, provider, *_ in found} >= {"mmfuse"}
    for loss, provider, flops, sends in found:
        assert (flops, pytest.approx(sends)) == contrastive_dist.expected(loss, provider, size, 8, 6), (loss, provider)


def test_counts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(contrastive_dist, "WORLDS", (1,))
    assert mmfuse.cli.main(["bench", "contrastive-dist", "--sizes", "4x3", "--json", "--out", str(tmp_path)]) == 0
    (kept,) = tmp_path.rglob("contrastive-dist.json")
    assert json.loads(kept.read_text())["counts"] == [*map(json.loads, capsys.readouterr().out.splitlines())]


def test_sizes_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert mmfuse.cli.main(["bench", "contrastive-dist", "--sizes", "8"]) != 0
    assert "pairs per rank x features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suite", "given"),
    [
        ("export", ["--list"]),
        ("generation", ["--dtype", "float32"]),
        ("max-batch", ["--from", "x"]),
        ("aside", ["--sizes", "8x8"]),
    ],
)
def test_other_options_are_refused(suite: str, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert mmfuse.cli.main(["bench", suite, *given]) != 0
    assert f"{given[0]} is given, expected only --" in capsys.readouterr().err


def test_largest_batch() -> None:
    for provider, formula in max_batch.FORMULAS.items():
        for world in (1, 8):
            n = max_batch.largest(provider, 24e9, world, 512)
            step = 1024 * world
            assert formula(n, n // world, 512) <= 24e9 < formula(n + step, (n + step) // world, 512)
    # 16 bytes for each pair of pairs
    assert max_batch.largest("open_clip", 80e9, 1, 512) == 68 * 1024


def test_memory_is_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert mmfuse.cli.main(["bench", "max-batch", "--sizes", "1536x128", "--json"]) == 0
    checks = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if "peak" in row]
    for check in checks:
        assert 0.5 * check["formula"] < check["peak"] <= 1.1 * check["formula"], check
