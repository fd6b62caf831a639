"""Models out of PyTorch, and the proof that they compute the same outside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "check_onnx": "mmfuse.export.check",
    "export_for_generation": "mmfuse.export.generation",
    "export_onnx": "mmfuse.export.onnx",
    "export_served": "mmfuse.export.served",
    "load": "mmfuse.export.generation",
}

if TYPE_CHECKING:
    from mmfuse.export.check import check_onnx
    from mmfuse.export.generation import export_for_generation, load
    from mmfuse.export.onnx import export_onnx
    from mmfuse.export.served import export_served

__all__ = ["check_onnx", "export_for_generation", "export_onnx", "export_served", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
