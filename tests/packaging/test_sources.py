"""Rules that hold for every file of the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mmfuse
import mmfuse.fused.language
from mmfuse.kernels._runtime import operators

ROOT = Path(__file__).parents[2]
FOLDERS = ("mmfuse", "bench", "export", "models", "fused", "kernels", "csrc", "tests", "docs", "examples", ".ci")
TEXT = {".py", ".md", ".toml", ".in", ".cpp", ".cu", ".cuh", ".h", ".json", ".jsonl", ".yml", ""}
FILES = [
    f
    for f in (*ROOT.glob("*"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*")))
    if f.is_file() and f.suffix in TEXT and "__pycache__" not in f.parts
]
# root folders that are importable by accident when the root is on sys.path
SHADOWS = {"bench", "export", "models", "fused", "kernels", "tests"}


def absolute_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


def test_imports_go_through_the_package() -> None:
    wrong = {
        str(f.relative_to(ROOT)): found for f in FILES if f.suffix == ".py" and (found := absolute_imports(f) & SHADOWS)
    }
    assert not wrong


def test_a_family_imports_what_is_shared_and_the_public_operators_of_others() -> None:
    wrong = []
    for path in (ROOT / "kernels").glob("*/**/*.py"):
        family = path.relative_to(ROOT / "kernels").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            _, _, other, *inner = f"{module}...".split(".")
            shared = other in ("_runtime", "_triton") and family != "_runtime"
            if not module.startswith("mmfuse.kernels.") or other == family or shared:
                continue
            if any(inner) or any(alias.name.startswith("_") for alias in node.names):  # type: ignore[union-attr]
                wrong.append(f"{path.relative_to(ROOT)}: {module}")
    assert not wrong


@pytest.mark.parametrize("pattern", [r"(?<![\w.~-])/(?:work|root|home|Users)/\w", r"\.\./" + "shared"])
def test_no_file_names_a_machine(pattern: str) -> None:
    wrong = [
        f"{f.relative_to(ROOT)}:{n}: {line.strip()}"
        for f in FILES
        if f != ROOT / ".ci" / "run"
        for n, line in enumerate(f.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not wrong


def test_environment_variables_are_documented() -> None:
    code = [f for f in FILES if f.suffix == ".py" or f.name in ("Makefile", "run")]
    used = {v for f in code for v in re.findall(r"\bMMFUSE_[A-Z_]+\b", f.read_text())}
    documented = set(re.findall(r"^\| `(MMFUSE_[A-Z_]+)`", (ROOT / "ENVIRONMENT.md").read_text(), re.MULTILINE))
    assert used == documented


def test_the_names_of_all_implementations_are_documented() -> None:
    (row,) = re.findall(r"^\| `MMFUSE_BACKEND` \|(.*?)\|", (ROOT / "ENVIRONMENT.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {i for op in operators().values() for i in op.implementations}


def test_the_version_has_a_changelog_entry() -> None:
    assert f"## [{mmfuse.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
