"""Fused kernels, drop-in modules and reference models for multimodal training and serving."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not Path(__file__).with_name("kernels").exists():
    # a checkout on sys.path: the sub-packages lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

# beside the operators that `mmfuse.kernels` gathers
_ELSEWHERE = {
    "accelerate": "mmfuse.fused",
    "decelerate": "mmfuse.fused",
    "linear_cross_entropy": "mmfuse.fused",
    "UnsupportedError": "mmfuse.kernels._runtime",
    "explain": "mmfuse.kernels._runtime",
    "use_backend": "mmfuse.kernels._runtime",
}
_PACKAGES = ("fused", "kernels", "models")

if TYPE_CHECKING:
    from mmfuse.fused import accelerate as accelerate
    from mmfuse.fused import decelerate as decelerate
    from mmfuse.fused import linear_cross_entropy as linear_cross_entropy
    from mmfuse.kernels import *  # noqa: F403
    from mmfuse.kernels._runtime import UnsupportedError as UnsupportedError
    from mmfuse.kernels._runtime import explain as explain
    from mmfuse.kernels._runtime import use_backend as use_backend


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    if name in _PACKAGES:
        return import_module(f"mmfuse.{name}")
    if name == "__all__":
        return sorted((*_ELSEWHERE, *import_module("mmfuse.kernels").__all__))
    if not name.startswith("_") and name in (kernels := import_module("mmfuse.kernels")).__all__:
        return getattr(kernels, name)
    raise AttributeError(f"module 'mmfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), *_PACKAGES, "__version__"]
