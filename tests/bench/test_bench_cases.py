from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmfuse.bench import suites as folder
from mmfuse.bench.cases import Case, everything, find, label, suite, suite_module, suites
from mmfuse.bench.inputs import ramp
from mmfuse.bench.providers import then
from mmfuse.bench.row import Row
from mmfuse.bench.runner import InProcess, measure

CASES = list(everything())
PROVIDERS = [(case.name, provider) for case in CASES for provider in case.providers]


def _second(case: Case) -> str:
    """What runs on every device, or what is chosen."""
    return "mmfuse-chunked" if "mmfuse-chunked" in case.providers else "mmfuse"


@pytest.mark.parametrize(("case", "provider"), PROVIDERS, ids=lambda v: v)
def test_every_provider_agrees_or_says_why_not(
    case: str, provider: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = find(case)
    if provider == "compile" and case != "clip":
        # traced as ever; that the generated code runs too is shown by one, for it takes half a minute
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = Row(of, of.small, torch.device(device), torch.float32, of.modes[0]).probe(provider)
    if found["status"] == "absent":
        assert found["reason"]
        pytest.skip(f"{provider}: {found['reason']}")
    assert found["status"] == "ok", found.get("reason")
    if provider.startswith("mmfuse") and "-" in provider:
        assert found["options"]["backend"] == provider.split("[")[0].removeprefix("mmfuse-")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_alone(case, device: str) -> None:  # type: ignore[no-untyped-def]
    row = Row(case, case.small, torch.device(device), torch.float32, "fwd")
    for provider in (case.definitions[0], "mmfuse", _second(case)):
        assert row.probe(provider)["status"] == "ok"
        assert all(t is not None and not t.requires_grad for t in row.call(provider))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_16_bit(case, dtype: torch.dtype, device: str) -> None:  # type: ignore[no-untyped-def]
    row = Row(case, case.small, torch.device(device), dtype, case.modes[0])
    second = _second(case)
    if case.op == "token_attention" and dtype == torch.float16:
        second = "mmfuse"  # weights are not absorbed in it
    for provider in (case.definitions[0], second):
        found = row.probe(provider)
        assert found["status"] == "ok", found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_registry_is_complete(case) -> None:  # type: ignore[no-untyped-def]
    cpu = torch.device("cpu")
    assert case is find(case.name)
    assert case.definitions[0] in case.providers
    assert set(case.default(cpu, torch.float32)) <= set(case.providers)
    assert any(p in case.definitions for p in case.default(cpu, torch.float32)), "no baseline"
    assert case.default(cpu, torch.float32)[-1] == _second(case)
    for mode in case.modes:
        assert all(case.anchor(p, mode) in case.anchors for p in case.providers)
        for shapes in case.shapes.values():
            assert shapes and all(case.shape(label(s)) == s for s in shapes)
            assert shapes == sorted(shapes, key=lambda s: case.flops(mode, **s))
        assert case.flops(mode, **shapes[0]) > 0 and case.bytes(mode, 4, **shapes[0]) > 0
    if "fwd+bwd" in case.modes:
        assert len(case.outputs) == 1 + sum(t.requires_grad for t in case.inputs(cpu, torch.float32, **case.small))


def test_quack_gets_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of its product: A [T, K], B [L, K, N] by rows; A [M, T], B [T, N] by columns; int32 bounds."""
    from mmfuse.bench.suites import multiway

    def gemm(a, b, bias=None, cu_seqlens_m=None, cu_seqlens_k=None):  # type: ignore[no-untyped-def]
        (bounds,) = (t for t in (cu_seqlens_m, cu_seqlens_k) if t is not None)
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == a.shape[bounds is cu_seqlens_k]
        parts = bounds.diff().tolist()
        if bounds is cu_seqlens_k:
            assert bias is None
            return torch.stack([x @ y for x, y in zip(a.split(parts, 1), b.split(parts), strict=True)])
        rows = [x @ y for x, y in zip(a.split(parts), b, strict=True)]
        return torch.cat([y if bias is None else y + bias[i] for i, y in enumerate(rows)])

    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", SimpleNamespace(gemm=gemm))
    case = find("routed_ffn")
    given = case.inputs(torch.device("cpu"), torch.float32, **case.small)
    leaves = [t for t in given if t.requires_grad]
    found = [
        torch.autograd.grad(fn(*given), leaves)
        for fn in (multiway._quack(), then(ramp, multiway.ffn))  # type: ignore[attr-defined]
    ]
    torch.testing.assert_close(*found)


def test_anchors_are_timed_beside_the_providers() -> None:
    case = find("clip")
    row = Row(case, case.small, torch.device("cpu"), torch.float32, "fwd+bwd")
    names = ["eager", "mmfuse-chunked[store]", "mmfuse-chunked[recompute]"]
    records = {r["provider"]: r for r in measure(row, names, InProcess(), lambda *_: None, limit=0.1)}
    assert [records[n]["anchor"] for n in names] == ["gemm3", "gemm3", "gemm4"]
    assert records["gemm3"]["role"] == "anchor" and records["gemm3"]["p50"] == records["eager"]["anchor_ms"]
    product = row.call("gemm4")[0]
    torch.testing.assert_close(product, row.inputs[0] @ row.inputs[1].T)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_anchors_compute_the_same_twice(case, device: str) -> None:  # type: ignore[no-untyped-def]
    square = {"N": 32, "D": 32} if case.name == "clip" else case.small  # where results have the operands' shape
    row = Row(case, square, torch.device(device), torch.float32, case.modes[0])
    for name in case.anchors:
        first = row.call(name)[0].clone()
        assert first.numel() and torch.equal(row.call(name)[0], first)


@pytest.mark.parametrize("size", ["64", "64x32x1", "64x0", "ax32", "-1x32"])
def test_sizes_are_checked(size: str) -> None:
    with pytest.raises(ValueError, match="expected NxD"):
        find("clip").shape(size)


def test_suites() -> None:
    assert [c.name for c in suite("contrastive")][:2] == ["clip", "siglip"]
    assert suite("max-batch") == []
    with pytest.raises(ValueError, match="expected one of .*contrastive-dist"):
        suite("nothing")


def test_a_new_suite_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    (tmp_path / "one_more.py").write_text(
        "import dataclasses\n"
        "from mmfuse.bench.suites.contrastive import CASES, CHECKS\n"
        "CASES, CHECKS = [dataclasses.replace(CASES[0], name='again')], CHECKS[:1]\n"
    )
    assert "one-more" in suites() and find("again").providers.keys() == find("clip").providers.keys()
    assert [check.op for check in suite_module("one-more").CHECKS] == ["clip_loss"]
