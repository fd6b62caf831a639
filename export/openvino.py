"""ONNX files in OpenVINO, on the CPU: a second runtime that knows nothing of the first."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmfuse.export.onnx import SINGLE_FILE_BYTES
from mmfuse.export.require import require
from mmfuse.export.run import ELEMENTS, TYPES
from mmfuse.kernels._runtime import UnsupportedError

if TYPE_CHECKING:
    import onnx

# ONNX's element types, as onnxruntime calls them
_KINDS = {ELEMENTS[dtype]: kind for kind, dtype in TYPES.items()}


class Compiled:
    """A file, compiled for the CPU in float32 arithmetic, whatever the file's dtype.

    Attributes:
        inputs: of each input, its type as onnxruntime calls it and its shape, a free dimension by its name.

    Raises:
        ValueError: the file cannot be read.
        UnsupportedError: onnx or OpenVINO is missing, or OpenVINO does not take the file.
    """

    def __init__(self, path: str | Path):
        require("onnx", "openvino")
        import onnx
        import openvino

        self.version = openvino.__version__.split("-")[0]
        try:
            file = onnx.load(path)
        except Exception as error:  # of the file system, of protobuf, of the checks of external data
            raise ValueError(f"path is {str(path)!r}, which is not a readable ONNX file: {error}") from error
        weights = {t.name for t in file.graph.initializer}
        self.inputs = {v.name: _described(v) for v in file.graph.input if v.name not in weights}
        self.outputs = [v.name for v in file.graph.output]
        core = openvino.Core()
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = core.read_model(_plain(file, Path(path), Path(folder)))
                # otherwise in the processor's fastest: bfloat16 where it has it
                self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise UnsupportedError(f"OpenVINO does not take {str(path)!r}: {error}") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor for each input, by name -> the outputs by name, on the CPU."""
        found = self._compiled({name: t.numpy() for name, t in inputs.items()})
        return {name: torch.from_numpy(np.array(found[i])) for i, name in enumerate(self.outputs)}


def _plain(file: onnx.ModelProto, path: Path, folder: Path) -> Path:
    """The file itself, or one with its functions put in line: OpenVINO has no conversion for them."""
    import onnx
    from onnx import inliner

    if not file.functions:
        return path
    large = file.ByteSize() > SINGLE_FILE_BYTES
    inlined = inliner.inline_local_functions(file)
    onnx.save(inlined, folder / path.name, save_as_external_data=large)
    return folder / path.name


def _described(value: Any) -> tuple[str, list[int | str]]:
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
    return _KINDS.get(kind.elem_type, f"tensor of type {kind.elem_type}"), shape
