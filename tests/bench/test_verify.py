from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mmfuse.bench import verify
from mmfuse.bench.cases import Check
from mmfuse.cli import main
from mmfuse.kernels._runtime import operators
from mmfuse.kernels.qformer.arguments import Outputs
from mmfuse.kernels.qformer.compiled import CPU


def test_every_operator_is_verified() -> None:
    assert {check.op for check in verify.checks()} == set(operators())


@pytest.mark.parametrize("check", verify.checks(), ids=lambda check: f"{check.op} {check.name}")
def test_every_check_runs(check: Check) -> None:
    inputs = check.inputs(torch.device("cpu"))
    exact = check.run({k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, "torch")
    assert exact and all(t.dtype == torch.float64 and t.isfinite().all() for t in exact.values())


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_DRAWS", 2)
    assert main(["verify", "siglip_loss", "--json", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["quantity"] for r in rows} == {"loss", "d image", "d text", "d scale", "d bias"}
    assert {"float32", "bfloat16", "float16"} == {r["dtype"] for r in rows} and "chunked" in {
        r["backend"] for r in rows
    }
    assert all(r["error"] <= r["allowed"] for r in rows) and any(r["eager"] > 0 for r in rows)


def test_a_wrong_gradient_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    right = next(c for c in verify.checks() if c.op == "clip_loss")

    def wrong(inputs: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
        out = right.run(inputs, backend)
        return {**out, "d text": out["d text"] * (1 if backend == "torch" else 1.01)}

    monkeypatch.setattr(verify, "checks", lambda: [replace(right, run=wrong)])
    monkeypatch.setattr(verify, "DTYPES", {"float32": torch.float32})
    assert main(["verify", "--device", "cpu"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WORSE")]
    assert bad and all("d text" in line for line in bad)


def test_every_implementation_for_a_cpu_is_verified() -> None:
    """Those that are a forward alone, too."""
    verified: set[tuple[str, str]] = set()
    with torch.no_grad():
        for check in verify.checks():
            inputs = check.inputs(torch.device("cpu"))
            verified |= {(check.op, name) for name in verify._backends(check, inputs, torch.float32)}
    for name, operator in operators().items():
        left = {i for i in operator.implementations if i in ("cpu", "slices", "chunked") and (name, i) not in verified}
        assert not left, f"{name}: no check runs {left}"


def test_a_wrong_forward_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an implementation that has no backward, so that no gradient may be asked of it."""
    attend = CPU.attend

    def wrong(*given: Any) -> Outputs:
        found = attend(*given)
        found.o[0, -1] *= 1.01
        return found

    monkeypatch.setattr(CPU, "attend", wrong)
    monkeypatch.setattr(verify, "DTYPES", {"float32": torch.float32})
    rows = list(verify.verify("few_query_attention"))
    assert {row.quantity for row in rows if row.backend == "cpu"} == {"o"}
    assert {row.backend for row in rows if not row.holds} == {"cpu"}


def test_without_a_check_it_is_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.cases, "checks", lambda: [])
    assert [check.op for check in verify.checks()] == list(operators())
    rows = list(verify.verify("vector_quantize"))
    assert {row.quantity for row in rows} == {"result 0", "result 1", "result 2", "d features"}
    assert {row.backend for row in rows} >= {"chunked"} and all(row.holds for row in rows)


def test_unknown_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nope"]) == 2
    told = capsys.readouterr().err
    assert "expected one of " in told and ", clip_loss, " in told
