from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmfuse.bench import clock, memory, runner
from mmfuse.bench import row as rows
from mmfuse.bench.cases import Case, Record, find
from mmfuse.bench.row import Row
from mmfuse.bench.runner import InProcess, Isolated, holds, measure

CPU = torch.device("cpu")


def _eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return find("clip").providers["eager"](CPU, image.dtype)(image, text, scale)


def _with(**providers: Callable[..., Tensor]) -> Case:
    """The clip case with providers of the test's own; `ours_x` stands for mmfuse-x."""
    case = find("clip")
    mine = {n.replace("ours_", "mmfuse-"): (lambda device, dtype, fn=fn: fn) for n, fn in providers.items()}
    return dataclasses.replace(case, peers={"eager": case.peers["eager"], **mine})


def _measure(case: Case, n: int = 48) -> dict[str, Record]:
    row = Row(case, {"N": n, "D": 32}, CPU, torch.float32, "fwd+bwd")
    return {r["provider"]: r for r in measure(row, list(case.peers), InProcess(), lambda *_: None, limit=0.05)}


def _no_attraction(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return _eager(image, text.roll(1, 0), scale)


@pytest.mark.parametrize(
    "fn",
    [
        lambda *a: _eager(*a) * (1 + 1e-4),
        lambda *a: _eager(*a) * float("nan"),
        lambda image, text, scale: _eager(image, text.detach(), scale) + 0 * text.sum(),
        _no_attraction,
    ],
    ids=["a little off", "NaN", "one tower's gradient is missing", "other positives"],
)
def test_a_wrong_implementation_is_not_timed(fn: Callable[..., Tensor]) -> None:
    found = _measure(_with(ours_wrong=fn))
    assert found["mmfuse-wrong"]["status"] == "wrong"
    assert "p50" not in found["mmfuse-wrong"]
    assert "times the error that is allowed" in found["mmfuse-wrong"]["reason"]
    assert "p50" in found["eager"]
    assert not holds(list(found.values()))


@pytest.mark.parametrize("fn", [lambda *a: _eager(*a) * 1.1, lambda *a: _eager(*a) * float("nan"), _no_attraction])
def test_a_wrong_peer_is_not_timed(fn: Callable[..., Tensor]) -> None:
    found = _measure(_with(peer=fn))
    assert found["peer"]["status"] == "wrong" and "p50" not in found["peer"]
    assert "away from the definition" in found["peer"]["reason"]
    assert not holds(list(found.values()))


def test_a_peer_may_round_and_may_lack_a_gradient() -> None:
    def rounded(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return _eager(image, text, scale.detach()) * (1 + 1e-4)

    found = _measure(_with(peer=rounded))
    assert found["peer"]["status"] == "ok" and found["peer"]["p20"] <= found["peer"]["p50"] <= found["peer"]["p80"]
    assert found["peer"]["flags"][0] == "no d logit_scale"
    assert holds(list(found.values()))


def test_what_cannot_run_is_listed_with_its_reason() -> None:
    def breaks(*args: Tensor) -> Tensor:
        raise RuntimeError("a kernel of another architecture\nand its trace")

    def exhausts(*args: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def misses(*args: Tensor) -> Tensor:
        raise ModuleNotFoundError("No module named 'cutlass'")

    case = _with(breaks=breaks, exhausts=exhausts, misses=misses)
    absent = lambda device, dtype: (_ for _ in ()).throw(SystemError("built for another torch"))  # noqa: E731
    case = dataclasses.replace(case, peers={**case.peers, "absent": absent})
    found = _measure(case)
    assert {n: (r["status"], r["reason"]) for n, r in found.items() if "reason" in r} == {
        "breaks": ("failed", "a kernel of another architecture"),
        "exhausts": ("out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        "misses": ("absent", "No module named 'cutlass'"),
        "absent": ("absent", "built for another torch"),
    }
    assert holds(list(found.values()))
    assert not holds([{**found["breaks"], "provider": "mmfuse-triton"}])


def test_a_definition_that_does_not_fit_is_replaced_by_a_smaller_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows._JUDGED, "cpu", 32)

    def small_only(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        if len(image) > 32:
            raise MemoryError
        return _eager(image, text, scale)

    case = _with(peer=_eager, wrong=lambda *a: _eager(*a) * 1.1)
    case = dataclasses.replace(case, peers={**case.peers, "eager": lambda device, dtype: small_only})
    found = _measure(case)
    assert [found[n]["status"] for n in ("eager", "peer", "wrong")] == ["out of memory", "ok", "wrong"]
    assert "at 32x32" in found["wrong"]["reason"]


def test_impossible_speed_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "ceilings", lambda device, dtype: (1.0, 1.0))
    assert _measure(_with())["eager"]["flags"] == ["faster than the measured ceilings"]


def test_rounds() -> None:
    assert runner._rounds(1e-4, 20) == 25
    assert runner._rounds(4, 20) == 5
    assert runner._rounds(12, 20) == 3
    assert runner._rounds(50, 20) == 2


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "prober", lambda device: InProcess())
    case = find("siglip")
    jobs = [(case, {"N": n, "D": 32}, ["eager"]) for n in (32, 4096)]
    first, second = runner.run(jobs, CPU, torch.float32, "fwd", lambda *_: None, budget=1e-3)
    assert "p50" in first[0]
    assert [(r["status"], r["shape"]["N"]) for r in second] == [("skipped", 4096)]
    assert "are left" in second[0]["reason"]


def test_a_case_keeps_to_its_share_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "prober", lambda device: InProcess())
    case = _with(ours_a=_eager, ours_b=_eager)
    jobs = [(case, {"N": n, "D": 32}, list(case.peers)) for n in (32, 48)]
    monkeypatch.setattr(clock, "ceilings", lambda device, dtype: (1.0, 1.0))
    now = iter(range(10**6))  # every look at the clock takes a second
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(now)))
    found = list(runner.run(jobs, CPU, torch.float32, "fwd", lambda *_: None, budget=4.0, share=True))
    records = {r["provider"]: r for r in found[0]}
    # late, and yet a baseline and ours are there
    assert records["mmfuse-b"]["status"] == "skipped" and records["mmfuse-b"]["reason"] == "no time is left"
    assert records["eager"]["samples"] == records["mmfuse-a"]["samples"] == 1
    assert holds(found[0])


def test_peak_memory() -> None:
    kept, peak = memory.peak(lambda: torch.ones(32 << 18), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert kept.numel() == 32 << 18
    assert abs(peak - (32 << 20)) < 4 << 20
    _, transient = memory.peak(lambda: torch.ones(32 << 18).sum(), CPU)
    assert transient is not None and abs(transient - (32 << 20)) < 4 << 20


def test_guard() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory.guard(), pytest.raises(RuntimeError) as error:
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        torch.zeros(1 << 45, dtype=torch.int8)
    assert rows._out_of_memory(error.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_isolated_probe_sees_the_matrix_of_logits() -> None:
    n = 1024
    row = Row(find("clip"), {"N": n, "D": 32}, CPU, torch.float32, "fwd+bwd")
    with Isolated() as probes:
        eager = probes.probe(row, "eager")
        torch_ = probes.probe(row, "mmfuse-torch")
        absent = probes.probe(row, "inf_cl")
    assert (eager["status"], torch_["status"], absent["status"]) == ("ok", "ok", "absent")
    if eager["memory"] is not None:
        # two matrices of logits, two of log-probabilities
        assert 3 * 4 * n * n < eager["memory"] < 6 * 4 * n * n


def test_rounds_interleave_the_providers() -> None:
    calls: list[str] = []

    def logged(name: str) -> Callable[..., Tensor]:
        def fn(*args: Tensor) -> Tensor:
            calls.append(name)
            return _eager(*args)

        return fn

    found = _measure(_with(a=logged("a"), b=logged("b")))
    rounds = found["a"]["samples"]
    assert rounds == found["b"]["samples"] >= 3
    assert calls[-2 * rounds :] == ["a", "b"] * rounds


def test_a_failure_while_timing_ends_only_its_own_row() -> None:
    left = iter([True] * 4)  # two of the probe and, on an idle machine, two of the warming

    def tires(*args: Tensor) -> Tensor:
        if not next(left, False):
            raise RuntimeError("out of memory")
        return _eager(*args)

    found = _measure(_with(tires=tires, peer=_eager))
    assert found["tires"]["status"] == "out of memory" and "p50" not in found["tires"]
    assert "p50" in found["peer"] and "p50" in found["eager"]


def test_a_probe_that_ends_its_process_is_survived() -> None:
    row = Row(find("siglip"), {"N": 32, "D": 16}, CPU, torch.float32, "fwd")
    with Isolated() as probes:
        (process,) = probes._pool._processes.values()
        process.kill()
        process.join()
        assert probes.probe(row, "eager")["status"] == "out of memory"
        assert probes.probe(row, "eager")["status"] == "ok"
