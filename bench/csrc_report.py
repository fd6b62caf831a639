"""What nvcc's assembler says about the compiled part's kernels: registers, spills and shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_CSRC = Path(__file__).resolve().parents[1] / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resource_usage(arch: str) -> list[dict[str, Any]] | str:
    """Compile every kernel of csrc/cuda for `arch` (such as "sm_90"); needs nvcc, and no GPU.

    Returns one dict per kernel with its name, its registers per thread, and its spills and static shared memory
    (smem) in bytes; or the reason why there is no answer. Raises RuntimeError when a file does not compile.
    """
    nvcc = _nvcc()
    if nvcc is None:
        return "nvcc is not on PATH"
    sources = sorted(_CSRC.glob("cuda/*.cu"))
    if not sources:
        return "csrc/ is in the source checkout only"
    include = Path(torch.__file__).parent / "include"
    output = ""
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            command = [nvcc, *_FLAGS, f"-arch={arch}", "-Xptxas=-v", "-isystem", str(include)]
            command += ["-cubin", str(source), "-o", f"{folder}/{source.stem}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
            output += done.stderr
    kernels = [
        {
            "kernel": _readable(m["kernel"], nvcc),
            "registers": int(m["registers"]),
            "spills": int(m["stores"]) + int(m["loads"]),
            "smem": int(smem[1]) if (smem := re.search(r"(\d+) bytes smem", m["rest"])) else 0,
        }
        for m in _KERNEL.finditer(output)
    ]
    if len(kernels) != output.count("Compiling entry function"):
        raise RuntimeError(f"ptxas's output is not as expected:\n{output}")
    return kernels


def _nvcc() -> str | None:
    # in the build's order
    home = os.environ.get("CUDA_HOME")
    places = ["nvcc", "/usr/local/cuda/bin/nvcc"] if home is None else [f"{home}/bin/nvcc", "nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def _readable(symbol: str, nvcc: str) -> str:
    """`grad_kernel<true, float, __half, SoftmaxGrad<float>>` for a mangled name."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt") or str(Path(nvcc).with_name("cu++filt"))
    try:
        name = subprocess.run([demangler, symbol], capture_output=True, text=True, check=True).stdout.strip()
    except OSError:
        return symbol
    name = re.sub(r"mmfuse::|<unnamed>::|\(anonymous namespace\)::|^void |_INTERNAL\w+::|\(\w+\)(?=\d)", "", name)
    return (name[: name.rindex("(")] if name.endswith(")") else name).replace("> >", ">>")
