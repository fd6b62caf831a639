"""Models out of PyTorch, and the proof that they compute the same outside."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "TensorRTModule": "mmfuse.export.tensorrt",
    "build_tensorrt": "mmfuse.export.tensorrt",
    "check_generation": "mmfuse.export.generation.check",
    "check_onnx": "mmfuse.export.check",
    "compile_plugins": "mmfuse.export.plugins",
    "export_aoti": "mmfuse.export.aoti",
    "export_for_generation": "mmfuse.export.generation",
    "export_onnx": "mmfuse.export.onnx",
    "export_served": "mmfuse.export.served",
    "fuse_for_ort": "mmfuse.export.ort",
    "load": "mmfuse.export.generation",
    "ort_library": "mmfuse.export.ort_kernels",
    "run_onnx": "mmfuse.export.run",
    "write_bundle": "mmfuse.export.tensorrt",
}

if TYPE_CHECKING:
    from mmfuse.export.aoti import export_aoti
    from mmfuse.export.check import check_onnx
    from mmfuse.export.generation import export_for_generation, load
    from mmfuse.export.generation.check import check_generation
    from mmfuse.export.onnx import export_onnx
    from mmfuse.export.ort import fuse_for_ort
    from mmfuse.export.ort_kernels import ort_library
    from mmfuse.export.plugins import compile_plugins
    from mmfuse.export.run import run_onnx
    from mmfuse.export.served import export_served
    from mmfuse.export.tensorrt import TensorRTModule, build_tensorrt, write_bundle

__all__ = [
    "TensorRTModule",
    "build_tensorrt",
    "check_generation",
    "check_onnx",
    "compile_plugins",
    "export_aoti",
    "export_for_generation",
    "export_onnx",
    "export_served",
    "fuse_for_ort",
    "load",
    "ort_library",
    "run_onnx",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
