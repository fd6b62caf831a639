"""Compile Triton kernels for a GPU that is not here, and read what the compiler made of them.

Outside the interpreter only: `TRITON_INTERPRET=1` replaces the functions that would be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# opt-in shared memory per block, bytes (CUDA programming guide, technical specifications per compute capability)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


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


@dataclass(frozen=True)
class Facts:
    """What one compilation became."""

    registers: int
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    f64: int  # instructions
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions by kind: mma, wgmma, tcgen05


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 1,
    aligned: Iterable[str] = (),
) -> Facts:
    """Compile a `triton.jit` function for compute capability `arch` (e.g. 90); no GPU is needed.

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
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Facts(
        registers=registers,
        spills=stack,
        shared=compiled.metadata.shared,
        f64=len(re.findall(r"^\s*(?:@%?\w+\s+)?[a-z][\w.]*\.f64", ptx, re.M)),
        tensor_core={
            kind: n
            for kind, pattern in (("mma", "mma.sync"), ("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"))
            if (n := ptx.count(pattern))
        },
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread, by the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers:\n{report}")
    return int(found[1]), int(found[2])


def violations(spec: Spec, arch: int, facts: Facts) -> list[str]:
    """What a kernel that ships must not have."""
    why = []
    if facts.spills:
        why.append(f"spills {facts.spills} bytes per thread")
    if facts.shared > SHARED_LIMIT[arch]:
        why.append(f"needs {facts.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if facts.f64 and not spec.double:
        why.append(f"has {facts.f64} float64 instructions")
    wanted = tensor_core_kind(spec.dot, arch)
    if wanted and not facts.tensor_core.get(wanted):
        why.append(f"has no {wanted} instruction")
    return why


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
