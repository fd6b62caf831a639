"""The compile report: compiled outside the interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from mmfuse import kernels  # noqa: E402
from mmfuse.bench import compile_report, csrc_report  # noqa: E402
from mmfuse.kernels._runtime import UnsupportedError, aot, configs, operators, sass  # noqa: E402
from mmfuse.kernels._runtime.aot import Facts, Spec, Work, violations  # noqa: E402
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
    from mmfuse.kernels._runtime.aot import Spec, Work, compile_all, violations

    @triton.jit
    def copied(y_ptr, x_ptr, N):
        # N says nothing of alignment, so that the masked access is one number wide
        i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N), mask=i < N)

    @triton.jit
    def busy(y_ptr, x_ptr, N):
        i, k = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
        x, y = tl.load(x_ptr + i * 64 + k), tl.zeros((64, 64), tl.float32)
        for n in range(N):
            # what is done with each score takes far more instructions than its product
            score = tl.dot(x, x)
            y += tl.exp(score * n) * tl.exp(score + n)
        tl.store(y_ptr + i * 64 + k, y)

    @triton.jit
    def promoted(y_ptr, x_ptr, scale):
        i = tl.arange(0, 128)
        tl.store(y_ptr + i, tl.load(x_ptr + i) * scale)

    @triton.jit
    def greedy(y_ptr, x_ptr):
        i = tl.arange(0, 8192)
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
        half = {"y_ptr": "*bf16", "x_ptr": "*bf16"}
        numbers = Work("2^20", "number", units=1 << 20, programs=1 << 10, bytes=1 << 22)
        scores = Work.of_product("score", 64, 6400, 64, {"BLOCK_M": 64, "BLOCK_N": 64}, 2, streamed=True)
        specs = [
            Spec("probe:promoted", "", {**out, "scale": "fp64"}, {}),
            Spec("probe:promoted", "meant", {**out, "scale": "fp64"}, {}, double=True),
            Spec("probe:greedy", "", out, {}, num_warps=1),
            Spec("probe:small_dot", "", {**out, "x_ptr": "*fp16"}, {}, dot="half"),
            Spec("probe:broken", "", out, {}),
            Spec("probe:copied", "", half | {"N": "i32"}, {}),
            Spec("probe:copied", "aligned", half | {"N": "i32"}, {}, aligned=("N",), work=numbers,
                 bounds={"outside": 2.0, "instructions": 16}),
            Spec("probe:busy", "", {**out, "x_ptr": "*fp16", "N": "i32"}, {}, dot="half", work=scores,
                 bounds={"loop": 3.0, "product": 8.0}),
        ]
        for spec, arch, facts in compile_all([(spec, 90) for spec in specs]):
            why = facts if isinstance(facts, str) else violations(spec, arch, facts)
            more = {} if isinstance(facts, str) else facts.tensor_core | facts.code.accesses | facts.measures(spec)
            print(json.dumps([why, more]))
"""


def test_each_violation_is_found(tmp_path):
    (tmp_path / "probe.py").write_text(textwrap.dedent(KERNELS))
    found = outside(str(tmp_path / "probe.py"), path=str(tmp_path))
    assert found.returncode == 0, found.stderr
    results = map(json.loads, found.stdout.splitlines())
    promoted, meant, greedy, small_dot, broken, copied, aligned, busy = results
    assert len(promoted[0]) == 1 and promoted[0][0].endswith("float64 instructions")
    assert meant[0] == []
    assert len(greedy[0]) == 1 and greedy[0][0].startswith("spills")
    # 16 rows are too few for wgmma
    assert small_dot[0] == ["has no wgmma instruction"] and small_dot[1]["mma"] > 0
    assert "undefined" in broken[0]
    # eight numbers a thread
    assert copied[0] == ["narrow is 16, at most 0"] and copied[1]["LDG 2"] == copied[1]["STG 2"] == 8
    assert aligned[1]["LDG 16"] == aligned[1]["STG 16"] == 1
    assert [why.split(" is ")[0] for why in aligned[0]] == ["outside", "instructions"]
    assert [why.split(" is ")[0] for why in busy[0]] == ["loop", "product"]


def test_shared_memory_is_held_against_the_architecture():
    spec = Spec(f"{kernel.__name__}:f", "", {}, {})
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


DEFAULTS = {"arch": [90], "kernel": "", "json": False, "also": None, "tighten": False, "write": None, "plainest": False}


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """The report over results that are given to it; the ledger is `ledger.json` in tmp_path."""
    work = Work("4096 x 4096", "logit", units=1 << 24, programs=1 << 10, bytes=1 << 25)
    spec = Spec("m:_stats_fwd_kernel", "bf16", {}, {}, archs=(90,), work=work, bounds={"outside": 20.0})
    monkeypatch.setattr(aot, "ledger_path", lambda spec: tmp_path / "ledger.json")
    monkeypatch.setattr(compile_report, "ledger_path", lambda spec: tmp_path / "ledger.json")

    def run(facts: Facts | str, csrc: list | str = "nvcc is not on PATH", **options) -> int:
        aot._read_ledger.cache_clear()
        monkeypatch.setattr(compile_report, "INTERPRET", False)
        monkeypatch.setattr(compile_report, "triton_specs", lambda name: [spec] if name in spec.kernel else [])
        monkeypatch.setattr(compile_report, "compile_all", lambda jobs: [(s, arch, facts) for s, arch in jobs])
        monkeypatch.setattr(csrc_report, "resource_usage", lambda arch: csrc)
        return compile_report.run(Namespace(**DEFAULTS | options))

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


def test_the_plainest_of_each_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    specs = [Spec(f"m:{k}", variant, {}, {}) for k, variant in (("a", "bf16 ids"), ("a", "bf16"), ("b", ""))]
    clean, compiled = Facts(registers=32, spills=0, shared=0, f64=0), []

    def compile_all(jobs):
        for spec, arch in jobs:
            compiled.append((spec.kernel, spec.variant, arch))
            yield spec, arch, clean

    for module in (aot, compile_report):
        monkeypatch.setattr(module, "ledger_path", lambda spec: tmp_path / "ledger.json")
    aot._read_ledger.cache_clear()
    monkeypatch.setattr(compile_report, "INTERPRET", False)
    monkeypatch.setattr(compile_report, "triton_specs", lambda name: iter(specs))
    monkeypatch.setattr(compile_report, "compile_all", compile_all)
    monkeypatch.setattr(csrc_report, "resource_usage", lambda arch: "nvcc is not on PATH")
    assert compile_report.run(Namespace(**DEFAULTS | {"arch": [80, 90], "plainest": True})) == 0
    assert sorted(compiled) == [
        ("m:a", "bf16", 80), ("m:a", "bf16", 90), ("m:a", "bf16 ids", 90), ("m:b", "", 80), ("m:b", "", 90)
    ]  # fmt: skip
    compiled.clear()
    compile_report.print_rows("", plainest=True)
    assert sorted(compiled) == [("m:a", "bf16", 90), ("m:b", "", 90)]


def test_csrc_is_compiled_by_the_nvcc_of_the_build_for_plain_architectures(monkeypatch, tmp_path):
    for folder in ("home/bin", "path"):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert csrc_report._nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert csrc_report._nvcc() == str(tmp_path / "path" / "nvcc")

    asked: list[str] = []
    monkeypatch.setattr(csrc_report, "resource_usage", lambda arch: asked.append(arch) or [])
    compile_report._csrc_rows(90, "")
    assert asked == ["sm_90"]


def reading(instructions: int, narrow: int = 0) -> Facts:
    """A kernel of so many instructions in a thread, which makes 128 logits."""
    code = sass.Reading(instructions, instructions, (), {"STG 2": narrow} if narrow else {"STG 16": 1}, narrow)
    return Facts(registers=32, spills=0, shared=0, f64=0, code=code)


def test_a_ledger_allows_what_it_says_and_falls(pretend, tmp_path, capsys, monkeypatch):
    path = tmp_path / "ledger.json"
    monkeypatch.setattr(compile_report, "_PROGRAM", "print([])")
    wide = reading(instructions=20 * 128)
    slow, narrow = reading(instructions=30 * 128), reading(instructions=10 * 128, narrow=64)
    assert pretend(wide) == 0
    assert pretend(slow) == 1 and "bf16: outside is 30, at most 20" in capsys.readouterr().out
    assert pretend(narrow) == 1 and "bf16: narrow is 64, at most 0" in capsys.readouterr().out
    path.write_text('{"_stats_fwd_kernel bf16": {"outside": 35, "narrow": 100, "instructions": 4000}}')
    assert pretend(slow) == pretend(narrow) == 0
    assert pretend(reading(instructions=32 * 128)) == 1
    assert "bf16: instructions is 4096, at most 4000" in capsys.readouterr().out
    assert pretend(slow, tighten=True, also=tmp_path) == 0
    assert json.loads(path.read_text()) == {
        "_stats_fwd_kernel bf16": {"outside": 30, "narrow": 0, "instructions": 3840}
    }
    assert pretend(narrow) == 1
    assert pretend(reading(instructions=31 * 128), tighten=True, also=tmp_path) == 1
    assert json.loads(path.read_text())["_stats_fwd_kernel bf16"]["outside"] == 30
    path.write_text('{"_stats_fwd_kernel bf16": {"prodcut": 20}}')
    assert pretend(wide) == 1


def test_every_entry_of_a_ledger_is_of_a_kernel_that_ships():
    entries: dict[Path, set[str]] = {}
    for spec in compile_report.triton_specs():
        if aot.BOUNDED in spec.archs:
            entries.setdefault(aot.ledger_path(spec), set()).add(spec.name)
    found = list((Path(kernels.__file__).parent).glob("**/ledger.json"))
    assert found
    for path in found:
        assert set(json.loads(path.read_text())) <= entries[path], path


def test_the_time_that_work_takes_at_least():
    work = Work.of_product("logit", 1024, 512, 256, {"BLOCK_M": 128, "BLOCK_N": 64}, itemsize=2, written=2)
    assert (work.size, work.units, work.programs) == ("1024 x 512 x 256", 1 << 19, 64)
    assert (work.flops, work.bytes) == (1 << 28, 2 * 1536 * 256 + 2 * (1 << 19))
    # four warps: a product of 128 x 64 x 16 in an iteration, 16 of them in all
    loop = sass.Loop(depth=0, instructions=40, tensor_core=2, flops=2 * 128 * 64 * 16 / 4)
    code = sass.Reading(1000, 360, (loop,), {}, 0)
    facts = Facts(registers=32, spills=0, shared=0, f64=0, code=code)
    spec = Spec("m:f", "", {}, {}, work=work, dot="half")
    assert facts.measures(spec) == {
        "spills": 0,
        "instructions": 1000,
        "narrow": 0,
        "product": 20,
        "outside": 5.62,
        "loop": 10,
    }
    floors = facts.floors(spec)
    assert floors["issue"] == round((360 + 16 * 40) * 4 * 64 / (132 * 4 * 1755), 1)
    assert floors["bytes"] == round(work.bytes / 3.35e6, 1) and floors["flops"] == round(work.flops / 989e6, 1)
    assert facts.floors(replace(spec, dot="tf32"))["flops"] == round(2 * work.flops / 989e6, 1)
    streamed = Work.of_product("score", 1024, 512, 256, {"BLOCK_M": 128, "BLOCK_N": 64}, itemsize=2, streamed=True)
    assert (streamed.programs, streamed.outer) == (8, 8)
    # the outer loop goes round 8 times, the products within it 16 times in each
    both = replace(code, loops=(sass.Loop(0, 100, 0, 0.0), replace(loop, depth=1)))
    threads = 32 * 4 * 8 / streamed.units
    found = replace(facts, code=both).measures(replace(spec, work=streamed))["loop"]
    assert found == round((8 * 100 + 8 * 16 * 40) * threads, 2)
    # FLOPs without tensor cores are not recognised
    scalar = replace(code, loops=(replace(loop, tensor_core=0, flops=0.0),))
    assert "loop" not in replace(facts, code=scalar).measures(spec)


def test_another_triton_reports_too(pretend, tmp_path, monkeypatch, capsys):
    """A folder with a package of that name comes first for the process that compiles."""
    (tmp_path / "other" / "mmfuse_probe").mkdir(parents=True)
    (tmp_path / "other" / "mmfuse_probe" / "__init__.py").write_text("")
    row = compile_report.Row(90, "_stats_fwd_kernel", "bf16", 32, triton="3.6.0", violations=["spills"])
    program = f"import mmfuse_probe, json; print({json.dumps([asdict(row)])!r})"
    monkeypatch.setattr(compile_report, "_PROGRAM", program)
    assert pretend(reading(instructions=128), also=tmp_path / "other") == 1
    printed = capsys.readouterr().out
    assert "3.6.0" in printed and triton.__version__ in printed and "sm_90 _stats_fwd_kernel bf16: spills" in printed


def test_a_page_has_the_table(pretend, tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(f"# GPU\n\n{compile_report._BEGIN}\nold\n{compile_report._END}\n\nthe rest\n")
    assert pretend(reading(instructions=10 * 128), write=page) == 0
    text = page.read_text()
    assert text.startswith("# GPU\n") and text.endswith("\nthe rest\n") and "old" not in text
    cells = ["4096 x 4096", triton.__version__, "32", "global 16", "1280, 10 + 0 a logit", "issue 6, bytes 10, flops 0"]
    assert f"| `_stats_fwd_kernel bf16` | {' | '.join(cells)} |" in text
    page.write_text("# GPU\n")
    with pytest.raises(ValueError, match="--write is .*expected a page with the lines"):
        pretend(reading(instructions=128), write=page)


def test_unknown_names_are_refused(pretend, monkeypatch):
    clean = Facts(registers=32, spills=0, shared=0, f64=0)
    with pytest.raises(ValueError, match="--arch is 75, expected some of 80, 90, 100"):
        pretend(clean, arch=[75])
    with pytest.raises(ValueError, match="--tighten is given without --also"):
        pretend(clean, tighten=True)
    with pytest.raises(ValueError, match="--kernel is 'conv'"):
        pretend(clean, csrc=[], kernel="conv")
    monkeypatch.undo()
    monkeypatch.setattr(compile_report, "INTERPRET", True)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        compile_report.run(Namespace(**DEFAULTS))


def test_tuned_tables(tmp_path, monkeypatch):
    import torch

    folder = tmp_path / "contrastive" / "configs"
    folder.mkdir(parents=True)
    tile = kernel._TILES["half"][9]["stats"] | {"num_stages": 4}
    table = {"arch": 90, "configs": {"stats/bfloat16/1024": tile}}
    (folder / "NVIDIA_H200.json").write_text(json.dumps(table))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path)
    monkeypatch.setattr(configs, "device_name", lambda device: {"cuda": "NVIDIA H200"}.get(device.type, "a CPU"))
    configs.forget()
    try:
        gpu = torch.device("cuda", 0)
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 768) == tile
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 1024) == tile
        assert configs.tuned("contrastive", gpu, "stats", "bfloat16", 1025) is None
        assert configs.tuned("contrastive", torch.device("cpu"), "stats", "bfloat16", 768) is None
        tuned = [s for s in kernel.aot_specs() if s.num_stages == 4 and s.archs == (90,)]
        names = ("bf16", "bf16 odd D", "bf16 int16", "bf16 int16 odd N", "bf16 keyed int16")
        assert {s.variant for s in tuned} == set(names)
    finally:
        configs.forget()


def test_a_key_rounds_sizes_up():
    assert [configs.key("k", n) for n in (1, 2, 3, 768, 1024)] == ["k/1", "k/2", "k/4", "k/1024", "k/1024"]
