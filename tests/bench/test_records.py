from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfuse.bench import plots, report, store
from mmfuse.bench.cases import Record


def _record(provider: str, n: int, p50: float, **more: object) -> Record:
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "device": "Some GPU",
        "torch": "2.13.0",
        "mmfuse": "0.1.0",
        "commit": "abc",
        "case": "clip",
        "shape": {"N": n, "D": 512},
        "dtype": "float32",
        "mode": "fwd+bwd",
        "provider": provider,
        "role": "provider",
        "status": "ok",
        "flags": [],
        "p20": 0.9 * p50,
        "p50": p50,
        "p80": 1.2 * p50,
        "memory": 4 * n * n,
        "tflops": 6e-9 * n * n * 512 / p50,
        "gbps": 1.0,
        "ceiling_tflops": 100.0,
        "ceiling_gbps": 1000.0,
        "anchor": "gemm3",
        "anchor_ms": p50 / 2,
        **more,
    }


def _untimed(provider: str, n: int, status: str, reason: str) -> Record:
    kept = ("time", "device", "torch", "mmfuse", "commit", "case", "shape", "dtype", "mode", "provider", "role")
    return {k: v for k, v in _record(provider, n, 1.0).items() if k in kept} | {"status": status, "reason": reason}


RECORDS = [
    r
    for n in (1024, 2048, 4096, 8192)
    for r in (
        _record("open_clip", n, 3e-6 * n**2),
        _record("mmfuse[store]", n, 1.5e-6 * n**2, memory=4096 * n),
        _record("gemm3", n, 1e-6 * n**2, role="anchor", memory=None, anchor=None),
        _untimed("inf_cl", n, "absent", "needs a CUDA device"),
    )
]


def test_round_trip(tmp_path: Path) -> None:
    device = torch.device("cpu")
    plain = [{k: v for k, v in r.items() if k not in ("time", "device")} for r in RECORDS]
    records = store.stamped(plain, device)
    path = store.append(tmp_path, "contrastive", records)
    assert path == tmp_path / store.slug(records[0]["device"]) / "contrastive.jsonl"
    assert store.read(path) == store.read(tmp_path) == records
    assert {"time", "device", "threads", "torch", "triton", "mmfuse", "commit", "driver"} <= set(records[0])
    again = [{**records[1], "p50": 7.0}]
    store.append(tmp_path, "contrastive", again)
    assert len(path.read_text().splitlines()) == len(records) + 1
    assert store.read(path) == [records[0], *records[2:], *again]


def test_slug() -> None:
    assert store.slug("NVIDIA H200") == "NVIDIA_H200"
    assert store.slug("Intel(R) Xeon(R) @ 2.8GHz, 2 threads") == "Intel_R_Xeon_R_2_8GHz_2_threads"


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0])
def test_exponent(p: float) -> None:
    x = [1024, 2048, 4096, 16384]
    found, factor = report.exponent(x, [3.0 * n**p for n in x])
    assert found == pytest.approx(p, abs=1e-9) and factor == pytest.approx(3.0)
    noisy, _ = report.exponent(x, [3.0 * n**p * (1 + 0.01 * (-1) ** i) for i, n in enumerate(x)])
    assert noisy == pytest.approx(p, abs=0.02)


def test_growth() -> None:
    assert list(report.growth_rows(RECORDS)) == [
        ("open_clip", "2.00", "2.00"),
        ("mmfuse[store]", "2.00", "1.00"),
        ("gemm3", "2.00", ""),
    ]
    assert not report.growth(RECORDS[:8], "p50"), "two sizes are no growth"
    wider = {**RECORDS[0], "shape": {"N": 512, "D": 64}}
    assert not report.growth([*RECORDS, wider], "p50"), "two dimensions vary"


def test_table() -> None:
    wrong = _untimed("mmfuse-cpu", 1024, "wrong", "d image: 5 times the error that is allowed")
    text = report.markdown([*RECORDS, {**wrong, "memory": 1 << 20}, _untimed("all", 16384, "skipped", "no time left")])
    assert text.startswith("### Some GPU; torch 2.13.0, mmfuse 0.1.0 (abc); 2026-01-02\n")
    assert "| 1024x512 | open_clip | 3.15 (2.83 to 3.77) | 1.00x | 2.00x gemm3 |" in text
    assert "| 8192x512 | mmfuse[store] | 101 (90.6 to 121) | 0.50x | 2.00x gemm3 |" in text
    assert "| 1024x512 | mmfuse-cpu |  |  |  |  |  |  | 1.00 MiB | WRONG: d image: 5 times" in text
    assert "| mmfuse[store] | 2.00 | 1.00 |" in text
    assert "- absent: inf_cl (needs a CUDA device)" in text
    assert "- skipped: clip 16384x512 (no time left)" in text
    assert "| inf_cl |" not in text


def test_without_the_baseline_there_is_no_ratio() -> None:
    text = report.markdown([_untimed("open_clip", 1024, "out of memory", "16 GiB"), _record("mmfuse", 1024, 2.0)])
    assert "of open_clip" in text
    assert "| 1024x512 | mmfuse | 2.00 (1.80 to 2.40) |  | 2.00x gemm3 |" in text
    assert "OUT OF MEMORY: 16 GiB" in text


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (0.01234, "0.0123"), (0, "0")])
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


def test_plot(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    plots.draw(RECORDS, tmp_path / "a" / "growth.png")
    plots.draw(RECORDS[:4], tmp_path / "bars.png")
    growth, bars = (image.imread(tmp_path / name) for name in ("a/growth.png", "bars.png"))
    assert growth.shape[0] > 1.8 * bars.shape[0], "growth has a row of its own"
    for pixels in (growth, bars):
        rgb = np.round(255 * pixels[..., :3]).astype(int)
        for color in ("#8c8c8c", "#0b5fa5", "#c9ccd1"):  # the baseline's bar, ours, the anchor's
            want = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (rgb == want).all(-1).sum() > 1000
        assert 0.02 < (rgb < 250).any(-1).mean() < 0.6
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw([_untimed("inf_cl", 64, "absent", "no")], tmp_path / "empty.png")


def test_records_are_json() -> None:
    (record,) = store.stamped([{"error": float("nan"), "distance": float("inf"), "p50": 1.5}], torch.device("cpu"))
    assert (record["error"], record["distance"], record["p50"]) == (None, None, 1.5)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
