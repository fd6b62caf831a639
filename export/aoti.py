"""AOTInductor: a module as a compiled library in one file, which C++ or Python runs without the module's code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmfuse.export.nodes import evaluated, traced
from mmfuse.export.onnx import Called, Given, on_cpu
from mmfuse.kernels._runtime import UnsupportedError


def export_aoti(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a module for this processor, in its own dtype and in evaluation mode. The module is left as it was.

    Fused operators become what they compute in plain torch, which Inductor fuses and compiles: the file needs neither
    mmfuse nor Python. Its function takes the tensors of `inputs` in order, and returns the tensors of the result.
    Run it by `torch._inductor.aoti_load_package(path)`, or by `AOTIModelPackageLoader` in C++.

    Args:
        inputs, dynamic: as of `export_onnx`; sizes of equal names may differ in a call, and fail there.
        path: the file to write, which ends in ".pt2". It appears complete or not at all.
        options: of Inductor, e.g. {"max_autotune": True}.

    Returns:
        The path.

    Raises:
        ValueError: an argument does not fit, or `path` cannot be written.
        UnsupportedError: something in the model cannot be traced or compiled; the message says what.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .pt2")
    if not path.parent.is_dir():
        raise ValueError(f"path is {str(path)!r}, whose folder does not exist")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    given = Given(model, inputs, dynamic or {})
    called = Called(on_cpu(model), given)
    with evaluated(called):
        try:
            program = traced(called, given.tensors, given.dynamic)
        except Exception as error:  # torch.export has many
            raise UnsupportedError(f"{type(model).__name__} cannot be traced: {error}") from error
    given.sizes(program)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            new = Path(folder, path.name)
            try:
                with torch.no_grad():
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(new), inductor_configs=dict(options or {})
                    )
            except Exception as error:  # of Inductor and of the compiler that it calls
                raise UnsupportedError(f"{type(model).__name__} does not compile: {error}") from error
            os.replace(new, path)
    except OSError as error:
        raise ValueError(f"path is {str(path)!r}, which cannot be written: {error}") from error
    return path
