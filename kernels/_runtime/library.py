"""Loading of the compiled part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmfuse.kernels._runtime.device import once

_PACKAGE = Path(__file__).resolve().parents[2]


@once
def load(part: str) -> str | None:
    """Load `mmfuse/_C_<part>.so`, once. Returns None, or the reason why its operators are not there."""
    path = _PACKAGE / "mmfuse" / f"_C_{part}.so"
    if not path.exists():  # installed: kernels/ lies inside the package
        path = _PACKAGE / f"_C_{part}.so"
    if not path.exists():
        return f"the compiled part _C_{part} was not built" + _why_not_built(path.parent, part)
    if part == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled part _C_{part} does not load beside torch {torch.__version__}: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What setup.py wrote when it built the compiled part; empty when it built nothing."""
    for folder in (_PACKAGE / "mmfuse", _PACKAGE):
        path = folder / "_build_info.json"
        if path.exists():
            return json.loads(path.read_text())
    return {}


def _why_not_built(folder: Path, part: str) -> str:
    reason = build_info().get("parts", {}).get(part, {}).get("reason")
    return f" ({reason})" if reason else ""
