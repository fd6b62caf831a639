"""Our C++ in onnxruntime: which fused nodes of a file the library of custom operators computes, and why not others.

onnxruntime prefers a registered operator to a function of the same name that the file has; a node that is not
registered runs as its function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmfuse.export.nodes import DOMAIN
from mmfuse.export.require import require
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.library import find, not_built

# of ONNX's element types: those that a node's inputs may have, and that of its output
_FLOAT, _UINT8, _INT64, _BOOL, _FLOAT16, _DOUBLE = 1, 2, 7, 9, 10, 11
_TYPES = {
    "nearest_code": ({_FLOAT, _FLOAT16, _DOUBLE, _BOOL}, _INT64),
    "patch_embed": ({_FLOAT, _UINT8, _DOUBLE, _BOOL, _INT64}, _FLOAT),
    "few_query_attention": ({_FLOAT, _INT64}, _FLOAT),
    "routed_ffn": ({_FLOAT, _INT64}, _FLOAT),
}
_FEWEST = 4  # queries, up to which a product by itself for each is faster than one of all, measured
_ENTRY = "mmfuse.nodes"  # of a session's configuration: what the library is to register


def ort_library() -> Path:
    """The library of custom operators that was built with mmfuse, for `run_onnx` or `register_custom_ops_library`.

    Raises:
        UnsupportedError: it was not built; the message says why.
    """
    path = find("ort")
    if path is None:
        raise UnsupportedError(not_built("ort"))
    return path


def reasons(onnx: str | Path) -> dict[str, str | None]:
    """Of each kind of fused node in a file: why the library leaves it to its function; None: it computes it."""
    require("onnx")
    import onnx_ir as ir

    model = ir.load(onnx)
    every = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    return {node.op_type: _against(node) for node in every}


def _against(node: Any) -> str | None:
    operator = node.attributes["operator"].value
    if operator not in _TYPES:
        return f"the library has no {operator}"
    allowed, result = _TYPES[operator]
    types = [_dtype(value) for value in node.inputs]
    output = node.outputs[0].dtype
    if wrong := [t for t in types if t is None or t not in allowed] or [output] * (output != result):
        return f"it has {'tensors of no known dtype' if wrong[0] is None else wrong[0].name}, the library has float32"
    if operator == "few_query_attention":
        shape = node.inputs[0].shape
        n = None if shape is None else shape[1]
        if not isinstance(n, int) or n > _FEWEST:
            return (
                f"it has {n if isinstance(n, int) else 'any number of'} queries, products are faster beyond {_FEWEST}"
            )
    return None


def _dtype(value: Any) -> Any:
    return value.dtype if value.const_value is None else value.const_value.dtype


def register(options: Any, onnx: Path, library: Path) -> dict[str, str | None]:
    """Register the library's operators for a file in onnxruntime's session options; returns `reasons`.

    Raises:
        ValueError: the library cannot be loaded.
        UnsupportedError: a node without a function in the file is none of the library's.
    """
    import onnx_ir as ir

    found = reasons(onnx)
    functions = {function.name for function in ir.load(onnx).functions.values() if function.domain == DOMAIN}
    for name, why in found.items():
        if why is not None and name not in functions:
            raise UnsupportedError(f"{name} has no function in {onnx.name}, and {why}")
    names = ",".join(name for name, why in found.items() if why is None)
    try:
        options.add_session_config_entry(_ENTRY, names)
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime has no class for it
        raise ValueError(f"library is {str(library)!r}, which onnxruntime does not load: {error}") from error
    return found


def error() -> str | None:
    """Why onnxruntime does not load the library; None: it does."""
    path = find("ort")
    if path is None:
        return not_built("ort")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(_ENTRY, "")
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime has no class for it
        return f"the library _C_ort does not load: {error}"
    return None
