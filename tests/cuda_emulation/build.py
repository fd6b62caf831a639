"""Builds csrc/cuda as operators of CPU tensors: a library that is kept in build/ while its sources stay."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("emulator")
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"),
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]
# a call before every access to memory
SEEN = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]

LAUNCH = re.compile(r"(\w+(?:<[\w, ]*>)?)<<<(.*?)>>>\(", re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
SHARED = re.compile(r"__shared__ (\w+) (\w+)((?:\[\w+\])+);")
# an operator of the CPU, in a namespace of the library
NAMES = {
    "torch::stable::accelerator::DeviceGuard": "emulation::DeviceGuard",
    ", CUDA, m)": ", CPU, m)",
}


def translated(text: str, namespace: str) -> str:
    """CUDA's own syntax as C++; all the rest of a source stays."""
    text = DYNAMIC.sub(r"auto* const \2 = static_cast<\1*>(emulation::dynamic_memory());", text)
    text = SHARED.sub(r"auto& \2 = emulation::shared<\1\3>(EMULATION_PLACE);", text)
    text = LAUNCH.sub(r"emulation::launch(\1, \2)(", text)
    for old, new in {**NAMES, "(mmfuse_cuda, ": f"({namespace}, "}.items():
        text = text.replace(old, new)
    assert "<<<" not in text and "__shared__" not in text
    return text


Sources = dict[str, str]


def build(namespace: str = "mmfuse_cuda", edit: Callable[[Sources], Sources] = lambda sources: sources) -> Path:
    """The library, whose operators are those of csrc/cuda as `torch.ops.<namespace>`."""
    # a header that is of instructions has its like in the emulator
    files = (f for f in sorted((ROOT / "csrc" / "cuda").iterdir()) if not (EMULATOR / f.name).exists())
    cuda = edit({f.name: f.read_text() for f in files})
    sources = {f"cuda/{name}": text for name, text in cuda.items()}
    sources |= {f.name: f.read_text() for f in (ROOT / "csrc").glob("*.h")}
    sources = {name: translated(text, namespace) for name, text in sources.items()}
    emulator = [f.read_text() for f in sorted(EMULATOR.iterdir())]
    made_of = [sources, emulator, FLAGS, SEEN, torch.__version__, compiler()]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    library = ROOT / "build" / "cuda_emulation" / key / f"_C_{namespace.removeprefix('mmfuse_')}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=library.parent) as temporary:
        making = Path(temporary)
        for name, text in sources.items():
            (making / name).parent.mkdir(exist_ok=True)
            (making / name).write_text(text)
        units = [(making / name, SEEN) for name in sources if name.endswith(".cu")]
        units.append((EMULATOR / "emulator.cpp", ["-O2"]))
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(lambda unit: _compiled(*unit, making / f"{unit[0].stem}.o"), units))
        torch_library = Path(torch.__file__).parent / "lib"
        linked = making / library.name
        _run(compiler(), "-shared", *objects, "-o", linked, f"-L{torch_library}", "-Wl,--no-as-needed", "-ltorch")
        os.replace(linked, library)  # another process may have made it, too
    return library


def compiler() -> str:
    return shutil.which("g++") or ""


def _compiled(source: Path, options: Sequence[str], out: Path) -> Path:
    include = Path(torch.__file__).parent / "include"
    _run(compiler(), *FLAGS, *options, f"-I{EMULATOR}", "-isystem", include, "-x", "c++", "-c", source, "-o", out)
    return out


def _run(*command: object) -> None:
    # the compiler needs no libasan
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")


if __name__ == "__main__":
    print(build())
