"""Models out of PyTorch, and the proof that they compute the same outside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "check_onnx": "mmfuse.export.check",
    "export_onnx": "mmfuse.export.onnx",
    "export_served": "mmfuse.export.served",
}

if TYPE_CHECKING:
    from mmfuse.export.check import check_onnx
    from mmfuse.export.onnx import export_onnx
    from mmfuse.export.served import export_served

__all__ = ["check_onnx", "export_onnx", "export_served"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
