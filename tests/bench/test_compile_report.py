"""The compile report: compiled outside the interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from importlib import import_module

import pytest

pytest.importorskip("triton")

from mmfuse.bench import compile_report, csrc_report  # noqa: E402
from mmfuse.kernels._runtime import UnsupportedError, aot, configs, operators  # noqa: E402
from mmfuse.kernels._runtime.aot import Facts, Spec, violations  # noqa: E402
from mmfuse.kernels.contrastive import kernel  # noqa: E402


def outside(*command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    # without nvcc: `make compile-report` has it compile the whole of csrc
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "PATH": "", "CUDA_HOME": ""}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)


def test_a_kernel_that_ships_is_clean_on_hopper():
    found = outside(
        "-m", "mmfuse.cli", "compile-report", "--json", "--arch", "sm_90", "--kernel", ":_grad_kernel bf16 dot"
    )
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads(found.stdout)
    (row,) = report["rows"]
    assert (row["kernel"], row["variant"], report["violations"]) == ("_grad_kernel", "bf16 dot", 0)
    assert row["tensor_core"]["wgmma"] > 0 and row["registers"] > 32
    assert row["shared"] > 65536 and row["f64"] == 0
    assert report["absent"] == ["csrc: nvcc is not on PATH"]


KERNELS = """
    import json
    import triton
    import triton.language as tl
    from mmfuse.kernels._runtime.aot import Spec, compile_all, violations

    @triton.jit
    def promoted(y_ptr, x_ptr, scale):
        i = tl.arange(0, 128)
        tl.store(y_ptr + i, tl.load(x_ptr + i) * scale)

    @triton.jit
    def greedy(y_ptr, x_ptr):
        i = tl.arange(0, 16384)
        x = tl.load(x_ptr + i)
        tl.store(y_ptr + i, x * tl.sum(x, axis=0))

    @triton.jit
    def small_dot(y_ptr, x_ptr):
        i, k = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        x = tl.load(x_ptr + i * 16 + k)
        tl.store(y_ptr + i * 16 + k, tl.dot(x, x))

    @triton.jit
    def broken(y_ptr, x_ptr):
        tl.store(y_ptr, undefined)

    if __name__ == "__main__":
        out = {"y_ptr": "*fp32", "x_ptr": "*fp32"}
        specs = [
            Spec("probe:promoted", "", {**out, "scale": "fp64"}, {}),
            Spec("probe:promoted", "meant", {**out, "scale": "fp64"}, {}, double=True),
            Spec("probe:greedy", "", out, {}, num_warps=1),
            Spec("probe:small_dot", "", {**out, "x_ptr": "*fp16"}, {}, dot="half"),
            Spec("probe:broken", "", out, {}),
        ]
        for spec, arch, facts in compile_all([(spec, 90) for spec in specs]):
            print(json.dumps(facts if isinstance(facts, str) else [violations(spec, arch, facts), facts.tensor_core]))
"""


def test_each_violation_is_found(tmp_path):
    (tmp_path / "probe.py").write_text(textwrap.dedent(KERNELS))
    found = outside(str(tmp_path / "probe.py"), path=str(tmp_path))
    assert found.returncode == 0, found.stderr
    promoted, meant, greedy, small_dot, broken = map(json.loads, found.stdout.splitlines())
    assert len(promoted[0]) == 1 and promoted[0][0].endswith("float64 instructions")
    assert meant == [[], {}]
    assert len(greedy[0]) == 1 and greedy[0][0].startswith("spills")
    # 16 rows are too few for wgmma
    assert small_dot[0] == ["has no wgmma instruction"] and small_dot[1]["mma"] > 0
    assert "undefined" in broken


def test_shared_memory_is_held_against_the_architecture():
    spec = Spec("m:f", "", {}, {})
    facts = Facts(registers=32, spills=0, shared=200_000, f64=0)
    assert violations(spec, 90, facts) == []
    assert violations(spec, 80, facts) == ["needs 200000 bytes of shared memory, sm_80 has 166912"]


def test_every_dot_says_what_it_must_compile_to():
    specs = list(kernel.aot_specs())
    dots = [s for s in specs if "PRECISION" in s.constants and not s.constants.get("SAVED")]
    assert {s.dot for s in dots if "fp32" not in s.variant} == {"half"}
    assert {s.dot for s in dots if "tf32" in s.variant} == {"tf32"}
    assert {aot.tensor_core_kind("half", arch) for arch in (80, 90, 100)} == {"mma", "wgmma", "tcgen05"}
    # each dtype and each kernel is there for each architecture
    for arch in (80, 90, 100):
        for name in ("_stats_fwd_kernel", "_grad_kernel", "_sigmoid_fwd_kernel"):
            dtypes = {s.variant.split()[0] for s in specs if arch in s.archs and s.kernel.endswith(":" + name)}
            assert dtypes == {"bf16", "fp16", "fp32-tf32", "fp32-ieee"}


def test_every_operator_with_a_triton_implementation_ships_kernels():
    with_triton = [name for name, op in operators().items() if "triton" in op.implementations]
    assert len(with_triton) > 10
    for name in with_triton:
        kernels = operators()[name].implementations["triton"].kernels
        assert kernels and all(list(import_module(module).aot_specs()) for module in kernels), name


@pytest.fixture
def pretend(monkeypatch):
    """The report over results that are given to it."""
    spec = Spec("m:_stats_fwd_kernel", "bf16", {}, {}, archs=(90,))

    def run(facts: Facts | str, csrc: list | str = "nvcc is not on PATH", **options) -> int:
        monkeypatch.setattr(compile_report, "INTERPRET", False)
        monkeypatch.setattr(compile_report, "triton_specs", lambda name: [spec] if name in spec.kernel else [])
        monkeypatch.setattr(compile_report, "compile_all", lambda jobs: [(s, arch, facts) for s, arch in jobs])
        monkeypatch.setattr(csrc_report, "resource_usage", lambda arch: csrc)
        return compile_report.run(Namespace(**{"arch": [90], "kernel": "", "json": False} | options))

    return run


def test_exit_code_and_text(pretend, capsys):
    clean = Facts(registers=32, spills=0, shared=0, f64=0)
    assert pretend(clean) == 0
    printed = capsys.readouterr().out
    assert "nvcc is not on PATH" in printed and "1 compilations, 0 with violations" in printed
    assert pretend(Facts(registers=255, spills=24, shared=0, f64=0)) == 1
    assert "sm_90 _stats_fwd_kernel bf16: spills 24 bytes per thread" in capsys.readouterr().out
    assert pretend("CompilationError: no") == 1
    usage = {"kernel": "logit_stats", "registers": 40, "spills": 8, "smem": 0}
    assert pretend(clean, csrc=[usage]) == 1
    assert pretend(clean, csrc=[usage | {"spills": 0}], json=True) == 0


def test_unknown_names_are_refused(pretend, monkeypatch):
    clean = Facts(registers=32, spills=0, shared=0, f64=0)
    with pytest.raises(ValueError, match="--arch is 75, expected some of 80, 90, 100"):
        pretend(clean, arch=[75])
    with pytest.raises(ValueError, match="--kernel is 'conv'"):
        pretend(clean, csrc=[], kernel="conv")
    monkeypatch.undo()
    monkeypatch.setattr(compile_report, "INTERPRET", True)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        compile_report.run(Namespace(arch=[90], kernel="", json=False))


def test_tuned_tables(tmp_path, monkeypatch):
    import torch

    folder = tmp_path / "contrastive" / "configs"
    folder.mkdir(parents=True)
    tile = kernel._TILES["half"][9]["stats"] | {"num_stages": 4}
    table = {"arch": 90, "configs": {"stats/bfloat16/1024": tile}}
    (folder / "NVIDIA_H200.json").write_text(json.dumps(table))
    monkeypatch.setattr(configs, "_ROOT", tmp_path)
    monkeypatch.setattr(configs, "gpu_name", lambda index: "NVIDIA_H200")
    configs.tables.cache_clear()
    try:
        gpu = torch.device("cuda", 0)
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 768) == tile
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 1024) == tile
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 1025) is None
        assert configs.tuned("contrastive", torch.device("cpu"), "stats", "bfloat16", 768) is None
        tuned = [s for s in kernel.aot_specs() if s.num_stages == 4 and s.archs == (90,)]
        assert {s.variant for s in tuned} == {"bf16", "bf16 odd D", "bf16 int16", "bf16 keyed int16"}
    finally:
        configs.tables.cache_clear()


def test_a_key_rounds_sizes_up():
    assert [configs.key("k", n) for n in (1, 2, 3, 768, 1024)] == ["k/1", "k/2", "k/4", "k/1024", "k/1024"]
