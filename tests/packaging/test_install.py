"""The package as a user gets it: built from a copy of the checkout, installed into empty environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mmfuse

ROOT = Path(__file__).parents[2]
PACKAGES = ("bench", "export", "models", "fused", "kernels")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
IMPORT_ALL = f"import mmfuse, {', '.join(f'mmfuse.{p}' for p in PACKAGES)}; print(mmfuse.kernels.__file__)"

# one worker: the builds are shared
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=inherited | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build touches the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("mmfuse", "csrc", *PACKAGES):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, ".", cwd=tree, MMFUSE_BUILD_EXT="0")
    (path,) = out.iterdir()
    return path


def environment(folder: Path, *install: str | Path, cwd: Path) -> Path:
    """A new environment that sees this one's packages, except mmfuse; returns its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=cwd)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    # a plain path line, so that the .pth files found there (an editable mmfuse) are not read
    shared = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "shared.pth").write_text("\n".join(shared))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", *options, "--force-reinstall", *install, cwd=cwd, MMFUSE_BUILD_EXT="0")
    return python


def test_wheel_without_a_compiler(wheel: Path) -> None:
    assert wheel.name == f"mmfuse-{mmfuse.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"mmfuse-{mmfuse.__version__}.dist-info"
        assert "mmfuse = mmfuse.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert {n.split("/")[0] for n in names} == {"mmfuse", info}
    sources = {"mmfuse/py.typed", f"{info}/licenses/LICENSE"}
    for folder, prefix in (("mmfuse", "mmfuse"), *((p, f"mmfuse/{p}") for p in PACKAGES)):
        for pattern in ("*.py", "configs/*.json"):
            files = (ROOT / folder).rglob(pattern)
            sources |= {f"{prefix}/{f.relative_to(ROOT / folder).as_posix()}" for f in files}
    assert sources <= names, sorted(sources - names)


def test_wheel_installs(wheel: Path, tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel, cwd=tmp_path)
    assert Path(run(python, "-c", IMPORT_ALL, cwd=tmp_path)).is_relative_to(tmp_path / "env")
    run(python, "-c", IMPORT_ALL, cwd=tree)
    assert run(python.parent / "mmfuse", "--version", cwd=tree) == mmfuse.__version__


def test_editable_installs(tree: Path, tmp_path: Path) -> None:
    earlier = tree / "mmfuse" / "_C_cpu.so"
    earlier.touch()
    python = environment(tmp_path / "env", "--editable", tree, cwd=tmp_path)
    for cwd in (tmp_path, tree):
        assert Path(run(python, "-c", IMPORT_ALL, cwd=cwd)) == tree / "kernels" / "__init__.py"
    assert run(python.parent / "mmfuse", "--version", cwd=tmp_path) == mmfuse.__version__
    assert not earlier.exists()  # MMFUSE_BUILD_EXT=0


def test_runs_from_an_uninstalled_checkout(tree: Path, tmp_path: Path) -> None:
    # -S -E keep this environment's own mmfuse out; torch is put back by hand
    paths = [str(tree), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    code = f"import sys; sys.path += {paths}; {IMPORT_ALL}"
    assert Path(run(sys.executable, "-S", "-E", "-c", code, cwd=tmp_path)) == tree / "kernels" / "__init__.py"


def test_sdist_holds_the_compiled_parts_sources(tree: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=tree, MMFUSE_BUILD_EXT="0")
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    sources = {f.relative_to(ROOT).as_posix() for f in (ROOT / "csrc").rglob("*") if f.is_file()}
    assert sources and sources <= names, sorted(sources - names)
    assert {"setup.py", "pyproject.toml", "kernels/__init__.py"} <= names
