"""Register kernels that were compiled ahead of time as TensorRT plugins, with nothing but TensorRT and numpy.

The manifest, beside the PTX files that it names, is what `mmfuse.export.plugins.compile_plugins` writes:

    {"plugins": [{"name": NODE, "inputs": {NAME: "T D"},
                  "outputs": [{"shape": "T D", "dtype": NAME of an input, or "FLOAT"}],
                  "scalars": ["D"], "grid": ["T"],
                  "code": {"80": {"ptx": FILE, "kernel": ENTRY, "threads": 128, "shared": 0}}}]}

Scalars and grid are sums, products and `cdiv` of named sizes. A node's attributes, dtypes and fixed sizes are those
that its kernel was compiled for: nodes that differ in them have different names. An engine holds the PTX, and runs
without this file.
"""

from __future__ import annotations

import ctypes
import inspect
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

NAMESPACE = "mmfuse"


def register(trt: Any, manifest: Path) -> list[str]:
    """Register every plugin of the manifest in TensorRT's registry; returns their names."""
    trtp = import_module(f"{trt.__name__}.plugin")
    plugins = json.loads(manifest.read_text())["plugins"]
    for plugin in plugins:
        identity = f"{NAMESPACE}::{plugin['name']}"
        trtp.register(identity)(_descriptor(trt, trtp, plugin))
        trtp.aot_impl(identity)(_implementation(trtp, plugin, manifest.parent))
    return [plugin["name"] for plugin in plugins]


def _signed(function: Any, parameters: dict[str, Any], result: Any) -> Any:
    """A function of any arguments with the signature that TensorRT reads."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=result,
    )
    return function


def _descriptor(trt: Any, trtp: Any, plugin: dict[str, Any]) -> Any:
    """The outputs' shapes and dtypes."""

    def describe(*inputs: Any) -> Any:
        by_name = dict(zip(plugin["inputs"], inputs, strict=True))
        sizes = sizes_of(plugin, inputs)
        outputs = []
        for output in plugin["outputs"]:
            shape = tuple(evaluate(word, sizes, trtp.cdiv) for word in output["shape"].split())
            like = by_name.get(output["dtype"])
            dtype = getattr(trt.DataType, output["dtype"]) if like is None else like.dtype
            outputs.append(trtp.from_shape_expr(shape, dtype))
        return tuple(outputs)

    return _signed(describe, dict.fromkeys(plugin["inputs"], trtp.TensorDesc), _tensors(trtp, plugin))


def _implementation(trtp: Any, plugin: dict[str, Any], folder: Path) -> Any:
    """The kernel, its grid and its scalars."""

    def implement(*given: Any) -> Any:
        sizes = sizes_of(plugin, given[: len(plugin["inputs"])])
        code = code_for(plugin, architecture())
        launch = trtp.KernelLaunchParams()
        for axis, size in zip(("grid_x", "grid_y", "grid_z"), plugin["grid"], strict=False):
            setattr(launch, axis, evaluate(size, sizes, trtp.cdiv))
        launch.block_x, launch.shared_mem = code["threads"], code["shared"]
        scalars = trtp.SymIntExprs(len(plugin["scalars"]))
        for i, scalar in enumerate(plugin["scalars"]):
            scalars[i] = trtp.SymInt32(evaluate(scalar, sizes, trtp.cdiv))
        return code["kernel"], (folder / code["ptx"]).read_text(), launch, scalars

    parameters = dict.fromkeys(plugin["inputs"], trtp.TensorDesc)
    parameters |= {"outputs": _tensors(trtp, plugin), "tactic": int}
    text = str | bytes
    return _signed(implement, parameters, tuple[text, text, trtp.KernelLaunchParams, trtp.SymIntExprs])


def _tensors(trtp: Any, plugin: dict[str, Any]) -> Any:
    return tuple[(trtp.TensorDesc,) * len(plugin["outputs"])]  # type: ignore[misc]


def sizes_of(plugin: dict[str, Any], inputs: Sequence[Any]) -> dict[str, Any]:
    """Each named size, from the first input that has it."""
    sizes: dict[str, Any] = {}
    for dims, given in zip(plugin["inputs"].values(), inputs, strict=True):
        for axis, dim in enumerate(dims.split()):
            sizes.setdefault(dim, given.shape_expr[axis])
    return sizes


def evaluate(expression: str, sizes: dict[str, Any], cdiv: Any) -> Any:
    """A sum or product of sizes, which may be numbers or TensorRT's expressions."""
    return eval(expression, {"__builtins__": {}, "cdiv": cdiv}, sizes)  # noqa: S307  of a manifest of ours


def architecture() -> int:
    """The compute capability of the first GPU, e.g. 90; 80 where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 80
    major, minor = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0):
        return 80
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return 10 * major.value + minor.value


def code_for(plugin: dict[str, Any], arch: int) -> dict[str, Any]:
    """The PTX of this very architecture, else that of 80, which later ones compile themselves."""
    code: dict[str, Any] = plugin["code"].get(str(arch)) or plugin["code"]["80"]
    return code
