"""Compile Triton kernels for a GPU that is not here, and read what the compiler made of them.

Outside the interpreter only: `TRITON_INTERPRET=1` replaces the functions that would be compiled.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmfuse.kernels._runtime import sass

# opt-in shared memory per block, bytes (CUDA programming guide, technical specifications per compute capability)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


# what bounds are judged on, and the H100 (SXM) of the floors: its SMs issue 4 instructions of warps in a clock
BOUNDED = 90
_ISSUE, _FLOPS, _BYTES = 132 * 4 * 1.755e9, 989e12, 3.35e12


@dataclass(frozen=True)
class Work:
    """What one launch at a stated size does.

    Args:
        size: for a reader, e.g. `"32768 x 32768 x 768"`.
        unit: what instructions are counted by, e.g. `"logit"`.
        units: how many of them.
        bytes: read and written in global memory, each once.
        flops: of the products.
        outer: iterations of the outermost loop in each program, 0 where the FLOPs say how often loops go round.
    """

    size: str
    unit: str
    units: int
    programs: int
    bytes: int
    flops: int = 0
    outer: int = 0

    @classmethod
    def of_product(
        cls, unit: str, m: int, n: int, k: int, tile: dict[str, Any], itemsize: int,
        written: float = 0, operands: int = 1, products: int = 1, streamed: bool = False,
    ) -> Work:  # fmt: skip
        """Products of [m, k] and [n, k], in tiles of BLOCK_M x BLOCK_N.

        A program makes one tile, or if streamed a row of tiles. `operands` pairs are read, and `written` bytes pass for
        each number of the result.
        """
        tiles_m, tiles_n = -(-m // tile["BLOCK_M"]), -(-n // tile["BLOCK_N"])
        return cls(
            size=f"{m} x {n} x {k}",
            unit=unit,
            units=m * n,
            programs=tiles_m if streamed else tiles_m * tiles_n,
            bytes=operands * (m + n) * k * itemsize + int(m * n * written),
            flops=2 * m * n * k * products,
            outer=tiles_n if streamed else 0,
        )


@dataclass(frozen=True)
class Spec:
    """One compilation: a kernel with its signature, constants and launch options.

    Args:
        kernel: `"module:function"`.
        variant: what tells it from the kernel's other compilations, for a reader.
        signature: Triton type of each argument that is no constant, e.g. `{"x_ptr": "*bf16", "N": "i32"}`.
        constants: the `tl.constexpr` arguments.
        aligned: integer arguments known to be divisible by 16, as Triton finds at launch. Pointers always are.
        archs: compute capabilities it ships for, e.g. `(80, 90)`.
        dot: the instruction kind its matrix products must compile to: `"half"`, `"tf32"`, or None.
        double: whether float64 arithmetic is meant.
        work: what `outside` and `loop` of its bounds are counted by, and the floors.
        bounds: the most that `Facts.measures` may be on sm_90, by name. All have no spills and no narrow accesses.
            A `ledger.json` beside the kernel holds what is not there yet, and only falls.
    """

    kernel: str
    variant: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90, 100)
    dot: str | None = None
    double: bool = False
    work: Work | None = None
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel.split(':')[1]} {self.variant}".strip()


# launch settings that a kernel may have, with its variants at them
Candidate = tuple[dict[str, int], list[Spec]]


@dataclass(frozen=True)
class Facts:
    """What one compilation became."""

    registers: int
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    f64: int  # instructions
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions by kind: mma, wgmma, tcgen05
    code: sass.Reading = sass.NOTHING

    def measures(self, spec: Spec) -> dict[str, float]:
        """What a bound can be stated of.

        `spills`: bytes. `instructions`: in all. `narrow`: accesses to global memory of 1 or 2 bytes, on the common
        path. `product`: instructions of the main loop for each tensor-core instruction. With `spec.work`, instructions
        of a thread for each unit: `outside` the main loops, and in the main `loop`s.
        """
        found: dict[str, float] = {"spills": self.spills}
        found |= {"instructions": self.code.instructions, "narrow": self.code.narrow}
        products = [loop for loop in self.code.loops if loop.tensor_core]
        if products:
            found["product"] = sum(p.instructions for p in products) / sum(p.tensor_core for p in products)
        if spec.work and self._countable:
            threads = 32 * spec.num_warps * spec.work.programs
            found["outside"] = self.code.outside * threads / spec.work.units
            found["loop"] = self._looped(spec, spec.work) * threads / spec.work.units
        return {k: round(v, 2) for k, v in found.items()}

    def floors(self, spec: Spec) -> dict[str, float]:
        """Microseconds that `spec.work` takes an H100 at the least, by what bounds it: a model, no measurement."""
        if not spec.work or not self._countable:
            return {}
        issued = (self.code.outside + self._looped(spec, spec.work)) * spec.num_warps * spec.work.programs
        times = {"issue": issued / _ISSUE, "bytes": spec.work.bytes / _BYTES}
        # TF32 has half the rate
        times["flops"] = spec.work.flops * (2 if spec.dot == "tf32" else 1) / _FLOPS
        return {k: round(1e6 * v, 1) for k, v in times.items()}

    def _looped(self, spec: Spec, work: Work) -> float:
        """Instructions of a warp in the main loops."""
        outer = [loop for loop in self.code.loops if work.outer and loop.depth == 0]
        inner = [loop for loop in self.code.loops if loop not in outer]
        each = sum(loop.flops for loop in inner) * spec.num_warps * work.programs
        trips = work.flops / each if each else 0
        return sum(loop.instructions * work.outer for loop in outer) + sum(loop.instructions * trips for loop in inner)

    @property
    def _countable(self) -> bool:
        """Whether it is known how often the main loops go round: not without tensor cores, nor on sm_100."""
        return not self.code.loops or any(loop.flops for loop in self.code.loops)


def compiled_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 1,
    aligned: Iterable[str] = (),
    **options: Any,
) -> Any:
    """What Triton makes of a `triton.jit` function for compute capability `arch` (e.g. 90); no GPU is needed.

    Triton's cache makes a second call cheap.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    hinted = {n for n, kind in signature.items() if kind.startswith("*")} | set(aligned)
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in hinted},
    )
    options |= {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 1,
    aligned: Iterable[str] = (),
) -> Facts:
    """The facts of `compiled_for`."""
    compiled = compiled_for(kernel, signature, constants, arch, num_warps, num_stages, aligned)
    ptx = compiled.asm["ptx"]
    text = _disassembled(compiled.asm["cubin"])
    resources = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if resources is None:
        raise RuntimeError(f"cuobjdump reported no registers:\n{text}")
    return Facts(
        registers=int(resources[1]),
        spills=int(resources[2]),
        shared=compiled.metadata.shared,
        f64=len(re.findall(r"^\s*(?:@%?\w+\s+)?[a-z][\w.]*\.f64", ptx, re.M)),
        tensor_core={
            kind: n
            for kind, pattern in (("mma", "mma.sync"), ("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"))
            if (n := ptx.count(pattern))
        },
        code=sass.read(text),
    )


def _disassembled(cubin: bytes) -> str:
    """Resources and machine code, by the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def violations(spec: Spec, arch: int, facts: Facts) -> list[str]:
    """What a kernel that ships must not have."""
    why, allowed = [], limits(spec) if arch == BOUNDED else {"spills": 0.0}
    if facts.spills > allowed.pop("spills"):
        why.append(f"spills {facts.spills} bytes per thread")
    if facts.shared > SHARED_LIMIT[arch]:
        why.append(f"needs {facts.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if facts.f64 and not spec.double:
        why.append(f"has {facts.f64} float64 instructions")
    wanted = tensor_core_kind(spec.dot, arch)
    if wanted and not facts.tensor_core.get(wanted):
        why.append(f"has no {wanted} instruction")
    if arch == BOUNDED:
        measures = facts.measures(spec)
        found = {k: measures.get(k, math.inf) for k in allowed}
        why += [f"{k} is {found[k]:g}, at most {most:g}" for k, most in allowed.items() if found[k] > most]
    return why


def limits(spec: Spec) -> dict[str, float]:
    """The spec's bounds, and what the ledger still allows beyond them."""
    stated = {"spills": 0.0, "narrow": 0.0} | spec.bounds
    still: dict[str, float] = ledger(spec).get(spec.name, {})
    return stated | {k: max(most, stated.get(k, 0.0)) for k, most in still.items()}


def ledger_path(spec: Spec) -> Path:
    module = import_module(spec.kernel.split(":")[0])
    return Path(str(module.__file__)).with_name("ledger.json")


def ledger(spec: Spec) -> dict[str, dict[str, float]]:
    """Kernel and variant: {measure: the most that it may be for now}."""
    return _read_ledger(ledger_path(spec))


@cache
def _read_ledger(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text()) if path.exists() else {}


def tensor_core_kind(dot: str | None, arch: int) -> str | None:
    """The tensor-core instruction that a matrix product should compile to."""
    return {8: "mma", 9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma") if dot else None


def compile_all(jobs: list[tuple[Spec, int]], workers: int | None = None) -> Iterator[tuple[Spec, int, Facts | str]]:
    """Compile in parallel processes, in order; a compilation that fails yields its error as text."""
    workers = workers or min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (spec, arch), facts in zip(jobs, pool.map(_compile, jobs), strict=True):
            yield spec, arch, facts


def _compile(job: tuple[Spec, int]) -> Facts | str:
    spec, arch = job
    # line numbers cost a tenth of the time and change no instruction
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    module, name = spec.kernel.split(":")
    kernel: Callable[..., Any] = getattr(import_module(module), name)
    try:
        return compile_for(kernel, spec.signature, spec.constants, arch, spec.num_warps, spec.num_stages, spec.aligned)
    except Exception as error:  # noqa: BLE001  the compiler raises its own kinds
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
