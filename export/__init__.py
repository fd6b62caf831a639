"""Models out of PyTorch, and the proof that they compute the same outside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {"export_onnx": "mmfuse.export.onnx", "check_onnx": "mmfuse.export.check"}

if TYPE_CHECKING:
    from mmfuse.export.check import check_onnx
    from mmfuse.export.onnx import export_onnx

__all__ = ["check_onnx", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
