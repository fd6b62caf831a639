"""One import name over the repository's folders, and the optional compiled parts.

MMFUSE_BUILD_EXT=auto  build what this machine can (default): mmfuse/_C_cpu.so with torch and a C++ compiler,
                       mmfuse/_C_cuda.so with nvcc as well, mmfuse/_C_ort.so with onnxruntime's headers; a part that
                       fails is left out, with one line that says why
                 0     build nothing, and remove what an earlier build left
                 1     a part that fails is an error (without nvcc there is no CUDA part to fail, and without
                       MMFUSE_ORT_INCLUDE none for onnxruntime)
MMFUSE_CUDA_ARCHS      GPU architectures, default "80 90 100"; the last one's PTX is added, for GPUs to come
MMFUSE_ORT_INCLUDE     the folder of onnxruntime_c_api.h, for a library of operators that onnxruntime loads
CXX, CUDA_HOME         the compiler ("ccache g++"), and the toolkit (else nvcc of PATH, else /usr/local/cuda)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOTS = {
    "mmfuse": "mmfuse",
    "mmfuse.bench": "bench",
    "mmfuse.export": "export",
    "mmfuse.models": "models",
    "mmfuse.fused": "fused",
    "mmfuse.kernels": "kernels",
}
packages = {p for name, path in ROOTS.items() for p in (name, *(f"{name}.{q}" for q in find_packages(path)))}

MODE = os.environ.get("MMFUSE_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"MMFUSE_BUILD_EXT: expected auto, 0 or 1, got {MODE!r}")

# torch's stable ABI of 2.11: the parts load beside any later torch
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-trapping-math", "-Wall"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "--threads=0"]
CUDA_ARCHS = ["80", "90", "100"]
LAUNCHERS = ("ccache", "sccache", "distcc")


class NotBuilt(Exception):
    """Why a part is not built."""


class Missing(NotBuilt):
    """What the part is compiled with or for is not on this machine."""


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(str(error)) from error
    if done.returncode:
        output = (done.stderr + done.stdout).strip()
        if MODE == "1":
            print(*command, output, sep="\n", file=sys.stderr)
        first = next((line for line in output.splitlines() if "error" in line.lower()), output[-200:])
        raise NotBuilt(f"{Path(command[0]).name} failed: {first}")
    return done.stdout


def torch_root() -> Path:
    spec = importlib.util.find_spec("torch")  # not imported: only its headers and its library are of use
    if spec is None or spec.origin is None:
        raise NotBuilt(
            "torch is not where it was built: pip builds in an empty environment; beside an installed torch,"
            " `pip install --no-build-isolation` builds it"
        )
    return Path(spec.origin).parent


def torch_version() -> dict[str, object]:
    return {"torch": importlib.metadata.version("torch")}


def torch_flags(linker: str) -> list[str]:
    """libtorch is named although nothing is taken from it: it brings the libraries that hold the symbols."""
    root = torch_root()
    keep = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"{linker}--no-as-needed"]
    return ["-isystem", f"{root / 'include'}", f"-L{root / 'lib'}", *keep, "-ltorch"]


def compiler() -> list[str]:
    """The words of the C++ compiler's call."""
    cxx = shlex.split(os.environ.get("CXX", "")) or [p for p in (shutil.which("g++"), shutil.which("c++")) if p][:1]
    if not cxx:
        raise NotBuilt("no C++ compiler (g++, or CXX) is on PATH")
    return cxx


def build_cpu(sources: list[str], out: str) -> dict[str, object]:
    cxx = compiler()
    run(*cxx, *CPU_FLAGS, *DEFINES, "-shared", *sources, "-o", out, *torch_flags("-Wl,"))
    return torch_version() | {"compiler": run(*cxx, "--version").splitlines()[0], "flags": " ".join(CPU_FLAGS)}


def build_ort(sources: list[str], out: str) -> dict[str, object]:
    include = os.environ.get("MMFUSE_ORT_INCLUDE")
    if not include:
        raise Missing("MMFUSE_ORT_INCLUDE does not name the folder of onnxruntime's headers")
    header = Path(include, "onnxruntime_c_api.h")
    if not header.is_file():
        raise NotBuilt(f"MMFUSE_ORT_INCLUDE is {include!r}, which has no {header.name}")
    cxx = compiler()
    run(*cxx, *CPU_FLAGS, "-shared", "-isystem", include, *sources, "-o", out)
    version = re.search(r"#define ORT_API_VERSION (\d+)", header.read_text())
    facts = {"api": version and int(version[1]), "compiler": run(*cxx, "--version").splitlines()[0]}
    return facts | {"flags": " ".join(CPU_FLAGS)}


def nvcc() -> str:
    # in torch's order
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        raise Missing(f"no nvcc in CUDA_HOME ({home}), on PATH or in /usr/local/cuda/bin")
    return found


def build_cuda(sources: list[str], out: str) -> dict[str, object]:
    program = nvcc()
    archs = os.environ.get("MMFUSE_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if not archs:  # those of ours that this nvcc knows
        known = run(program, "--list-gpu-arch")
        archs = [a for a in CUDA_ARCHS if f"compute_{a}\n" in known]
    # of the PTX of "90a" no other GPU could make code
    ptx = archs[-1].rstrip("af")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    # nvcc wants a compiler alone, without a launcher such as ccache in front
    host = [f"-ccbin={next(w for w in compiler() if Path(w).name not in LAUNCHERS)}"] if os.environ.get("CXX") else []
    run(program, *CUDA_FLAGS, *DEFINES, *host, *targets, "-shared", *sources, "-o", out, *torch_flags("-Xlinker="))
    release = re.search(r"release (\d+)\.(\d+),", run(program, "--version"))
    major, minor = release.groups() if release else ("unknown", "unknown")
    return torch_version() | {
        "cuda": f"{major}.{minor}",
        "archs": archs,
        "ptx": ptx,
        "driver": f"of CUDA {major} or later, as cudart is linked statically; for GPUs that only the PTX is for, of "
        f"CUDA {major}.{minor} or later",
        "flags": " ".join(CUDA_FLAGS),
    }


BUILD = {"cpu": build_cpu, "cuda": build_cuda, "ort": build_ort}
SOURCES = {part: sorted(str(f) for f in Path("csrc", part).glob("*.c[pu]*")) for part in BUILD}
INFO = Path("mmfuse", "_build_info.json")


class BuildParts(build_ext):
    """Calls the compilers directly: torch's own CUDAExtension refuses a CPU build of torch."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # a library for torch to load, not a Python module

    def build_extensions(self) -> None:
        parts: dict[str, dict[str, object]] = {}
        wanted, self.extensions = self.extensions, []  # leaves what was built
        for ext in wanted:
            part = ext.name.removeprefix("mmfuse._C_")
            out = Path(self.get_ext_fullpath(ext.name))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.unlink(missing_ok=True)
            try:
                if MODE == "0":
                    raise NotBuilt("MMFUSE_BUILD_EXT was 0")
                facts = BUILD[part](ext.sources, str(out))
                parts[part] = {"built": True, **facts}
                self.extensions.append(ext)
            except NotBuilt as why:
                if MODE == "1" and not isinstance(why, Missing):
                    sys.exit(f"mmfuse: {ext.name} was not built: {why}")
                if MODE != "0":
                    print(f"mmfuse: {ext.name} was not built: {why}", file=sys.stderr)
                parts[part] = {"built": False, "reason": str(why)}
        Path(self.build_lib, INFO).write_text(json.dumps({"parts": parts}, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        for part in BUILD:
            Path("mmfuse", f"_C_{part}.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, INFO), INFO)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # what was to be built could not be: the wheel is the pure one
        self.root_is_pure = not self.distribution.get_command_obj("build_ext").extensions
        return super().get_tag()


setup(
    packages=sorted(packages),
    package_dir=ROOTS,
    package_data={
        "mmfuse": ["py.typed"],
        "mmfuse.fused": ["acceleration/*.json"],
        "mmfuse.kernels": ["**/configs/*.json", "**/ledger.json", "**/README.md"],
    },
    ext_modules=[Extension(f"mmfuse._C_{p}", SOURCES[p], py_limited_api=True) for p in BUILD],
    cmdclass={"build_ext": BuildParts, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
