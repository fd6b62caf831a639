from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from mmfuse.bench import cases, cli, plots, runner, store
from mmfuse.bench.cases import label
from mmfuse.cli import main

TINY = ("bench", "contrastive", "--device", "cpu", "--sizes", "48x32", "--providers", "eager,mmfuse-chunked[store]")


def _args(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_measures_records_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "plot.png"
    assert main([*TINY, "--json", "--out", str(tmp_path), "--plot", str(image)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["case"], r["provider"]) for r in printed if r["role"] == "provider"] == [
        ("clip", "eager"),
        ("clip", "mmfuse-chunked[store]"),
        ("siglip", "eager"),
    ]
    assert all(r["status"] == "ok" and r["p50"] > 0 and r["torch"] == torch.__version__ for r in printed)
    assert image.read_bytes().startswith(b"\x89PNG")
    (kept,) = tmp_path.rglob("*.jsonl")
    assert kept.name == "contrastive.jsonl" and store.read(kept) == printed

    assert main(["bench", "--from", str(kept)]) == 0
    table = capsys.readouterr().out
    assert "mmfuse-chunked[store]" in table and "1.00x" in table and "48x32" in table
    assert main(["bench", "--from", str(kept), "--markdown"]) == 0
    assert "| 48x32 | eager |" in capsys.readouterr().out
    assert main(["bench", "--from", str(kept), "--cases", "siglip", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        record for record in printed if record["case"] == "siglip"
    ]
    assert main(["bench", "--from", str(kept), "--cases", "clap"]) == 2
    assert "--cases has 'clap'" in capsys.readouterr().err


def test_exit_code_tells_of_a_wrong_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"case": "clip", "shape": {"N": 4, "D": 4}, "dtype": "float32", "mode": "fwd", "provider": "mmfuse"}
    wrong |= {"role": "provider", "status": "wrong", "reason": "loss: 3 times the error that is allowed"}
    path = store.append(tmp_path, "contrastive", store.stamped([wrong], torch.device("cpu")))
    assert main(["bench", "--from", str(path)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "clip: sizes 512x512" in out and "siglip: sizes" in out
    assert "absent: needs a CUDA device" in out and "measured by default" in out


def test_jobs() -> None:
    cpu, float32 = torch.device("cpu"), torch.float32
    jobs = list(cli._jobs(_args(), cpu, float32))
    assert {(case.name, label(shape)) for case, shape, _ in jobs} == {
        (case.name, label(shape)) for case in cases.everything() for shape in case.shapes["cpu"][:1]
    }
    flops = [case.flops("fwd+bwd", **shape) for case, shape, _ in jobs]
    assert flops == sorted(flops)
    everything = list(cli._jobs(_args("all"), cpu, float32))
    assert len(everything) > len(jobs)
    picked = list(cli._jobs(_args("contrastive", "--cases", "clip", "--providers", "mmfuse-cpu,eager"), cpu, float32))
    assert {name for _, _, names in picked for name in names} == {
        "eager",
        "mmfuse-cpu",
        "mmfuse-cpu[store]",
        "mmfuse-cpu[recompute]",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--providers", "eagre"), "--providers has 'eagre'"),
        (("--cases", "clap"), "--cases has 'clap'"),
        (("--sizes", "64"), "size is '64', expected NxD"),
        (("--from", "nothing.jsonl"), "--from is 'nothing.jsonl'"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "contrastive", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_modules_stay_importable_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'mmfuse\[bench\]'"):
        plots.draw([], tmp_path / "x.png")
    assert runner.holds([])
