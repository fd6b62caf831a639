"""Optional packages, with an error that says how to get them."""

from __future__ import annotations

from importlib import import_module

from mmfuse.kernels._runtime import UnsupportedError

# packages of other extras than "onnx"
_EXTRAS = {"openvino": "openvino", "transformers": "hf"}


def require(*packages: str) -> None:
    """Raise an UnsupportedError that names the first of `packages` that cannot be imported, and the remedy."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            extra = _EXTRAS.get(package.partition(".")[0], "onnx")
            raise UnsupportedError(f"{package} cannot be imported ({error}): pip install 'mmfuse[{extra}]'") from error
