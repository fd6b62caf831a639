"""What setup.py asks the compilers for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, which sets nothing up."""
    for name in ("CXX", "CUDA_HOME", "MMFUSE_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("mmfuse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def commands(build: ModuleType, monkeypatch: pytest.MonkeyPatch, known: str = "80 90 100") -> list[tuple[str, ...]]:
    """What is run, by an nvcc that knows some architectures."""
    ran: list[tuple[str, ...]] = []

    def run(*command: str) -> str:
        ran.append(command)
        if command[-1] == "--list-gpu-arch":
            return "".join(f"compute_{a}\n" for a in known.split())
        return "release 12.4, V12"

    monkeypatch.setattr(build, "run", run)
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    return ran


@pytest.mark.parametrize(
    ("known", "asked", "ptx"),
    [("80 90 100", "", "100"), ("80 90", "", "90"), ("80 90", "80;90a", "90"), ("100 103", "100 103f", "103")],
)
def test_the_ptx_is_for_every_newer_gpu(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, known: str, asked: str, ptx: str
) -> None:
    ran = commands(build, monkeypatch, known)
    monkeypatch.setenv("MMFUSE_CUDA_ARCHS", asked)
    facts = build.build_cuda([], "out")
    compile_ = next(c for c in ran if "-shared" in c)
    targets = [option for option in compile_ if option.startswith("-gencode")]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in asked.replace(";", " ").split() or known.split()]
    assert targets == [*codes, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]
    assert facts["cuda"] == "12.4" and "CUDA 12 or later" in facts["driver"]


def test_a_compiler_behind_a_launcher(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = commands(build, monkeypatch)
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    monkeypatch.setattr(build, "run", lambda *c: ran.append(c) or "12.2 release 12.4,\ncompute_80\n")
    build.build_cpu([], "out")
    build.build_cuda([], "out")
    assert ran[0][:3] == ("ccache", "g++", "-m64")
    assert [o for c in ran for o in c if o.startswith("-ccbin")] == ["-ccbin=g++"]


def test_nvcc_of_cuda_home_comes_first(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("home/bin", "path"):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.nvcc() == str(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
