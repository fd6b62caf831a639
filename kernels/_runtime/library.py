"""Loading of the compiled part."""

from __future__ import annotations

import ctypes
import filecmp
import json
import os
from pathlib import Path
from typing import Any

import torch

from mmfuse.kernels._runtime.device import once

_PACKAGE = Path(__file__).resolve().parents[2]
_FAILURES: dict[str, OSError] = {}


@once
def load(part: str) -> str | None:
    """Load `_C_<part>.so`, once. Returns None, or the reason why its operators are not there.

    It lies in the package, or in `MMFUSE_LIBRARY_DIR`: another build of it, such as one with sanitizers.
    """
    path = find(part)
    if path is None:
        return not_built(part)
    if part == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if hasattr(getattr(torch.ops, f"mmfuse_{part}"), "logit_stats"):  # a second library of them ends the process
        return _why_not_again(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _FAILURES[part] = error
        return f"the compiled part _C_{part} does not load beside torch {torch.__version__}: {error.__cause__ or error}"
    return None


def find(part: str) -> Path | None:
    """Where `_C_<part>.so` is, if it was built."""
    another = os.environ.get("MMFUSE_LIBRARY_DIR")
    # installed, kernels/ lies inside the package
    folders = [Path(another)] if another else [_PACKAGE / "mmfuse", _PACKAGE]
    return next((path for folder in folders if (path := folder / f"_C_{part}.so").exists()), None)


def not_built(part: str) -> str:
    """That a part is not there, and why."""
    reason = build_info().get("parts", {}).get(part, {}).get("reason")
    return f"the compiled part _C_{part} was not built" + (f" ({reason})" if reason else "")


@once
def error_on(device: torch.device) -> str | None:
    """Why the kernels of `_C_cuda`, which is loaded, do not run on this GPU; None: they do."""
    (library,) = (p for p in torch.ops.loaded_libraries if Path(p).name == "_C_cuda.so")
    probe = ctypes.CDLL(library).mmfuse_cuda_error
    probe.restype = ctypes.c_char_p
    error = probe(device.index or 0)
    if error is None:
        return None
    built = build_info().get("parts", {}).get("cuda", {})
    what = f"built for {', '.join(built['archs'])} with CUDA {built['cuda']}" if built.get("built") else "another build"
    return f"the compiled part _C_cuda ({what}) does not run on {torch.cuda.get_device_name(device)}: {error.decode()}"


def failure(part: str) -> OSError | None:
    """Where a part is there and does not load, why: the cause of an error that says so."""
    return _FAILURES.get(part)


def _why_not_again(path: Path) -> str | None:
    """None if the operators that are registered are those of this library, out of another copy of it."""
    others = [p for p in torch.ops.loaded_libraries if Path(p).name == path.name]
    if any(Path(p).exists() and filecmp.cmp(p, path, shallow=False) for p in others):
        return None
    where = f"by {', '.join(others)}" if others else "by another library"
    return f"the operators of {path} are registered in this process already, {where}, which is another build"


def build_info() -> dict[str, Any]:
    """What setup.py wrote when it built the compiled part; empty when it built nothing."""
    for folder in (_PACKAGE / "mmfuse", _PACKAGE):
        path = folder / "_build_info.json"
        if path.exists():
            return json.loads(path.read_text())
    return {}
