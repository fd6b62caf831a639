"""kernels/ of this repository and the `kernels` distribution of Hugging Face, which transformers imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
IMPORT = "import transformers.integrations.hub_kernels"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution `kernels` of a version that transformers accepts, with every name that it imports."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as VERSION

    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("def __getattr__(name):\n    return type(name, (), {})\n")
    (site / "kernels" / "layer.py").write_text("")
    info = site / f"kernels-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {VERSION}\n")
    return site


def python(*args: str, path: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_transformers_imports_in_the_root() -> None:
    python("-c", IMPORT)


def test_the_other_distribution_is_found(stand_in: Path) -> None:
    code = f"{IMPORT}, kernels.layer, mmfuse.kernels\n"
    code += "from transformers.utils import is_kernels_available\n"
    code += "assert is_kernels_available()\n"
    code += "assert mmfuse.kernels.clip_loss\n"
    code += "print(kernels.__file__)"
    assert python("-c", code, path=stand_in) == str(stand_in / "kernels" / "__init__.py")


def test_under_python_m_pytest(stand_in: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_root.py"
    test.write_text(
        f"{IMPORT}, kernels\n"
        "def test_root():\n"
        f"    assert kernels.__file__ == {str(stand_in / 'kernels' / '__init__.py')!r}\n"
    )
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(test), path=stand_in)


def test_without_the_other_distribution_the_folder_stays_empty() -> None:
    # -S: no site-packages, so none is installed
    assert python("-S", "-c", "import kernels; print(hasattr(kernels, 'clip_loss'))") == "False"
