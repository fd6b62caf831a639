"""PyTorch to one ONNX file that says what it holds."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mmfuse
from mmfuse.export.clip import DTYPES, INPUTS, OUTPUTS, ServedCLIP, fingerprint, samples
from mmfuse.export.require import require
from mmfuse.kernels._runtime import use_backend
from mmfuse.models.clip import CLIP

TARGETS = {"portable": 18}  # opset; from 23 on attention is one node, which TensorRT does not build in float32
SINGLE_FILE_BYTES = 2_000_000_000  # protobuf ends at 2 GiB, and the graph needs its share


def export_onnx(
    model: CLIP,
    path: str | Path,
    *,
    target: str = "portable",
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    weights: str | Path | None = None,
) -> Path:
    """Write a CLIP, in its own dtype and in evaluation mode, to an ONNX file. The model is left as it was.

    Inputs, outputs and dtypes are those of `mmfuse.export.clip.ServedCLIP`; the two batch dimensions are free and
    independent, and onnxruntime also takes an empty batch for the tower that is not wanted. The file holds standard
    ONNX operators only; weights above 2 GB go to `path` + ".data" beside it. It appears complete or not at all.

    Args:
        target: "portable", i.e. opset 18.
        config, seed, weights: how the model was made (its constructor's arguments, and the seed of its random weights
            or the file they came from). Recorded in the file, they let `check_onnx(path)` make the model again.

    Raises:
        ValueError: unknown target, or `path` cannot be written.
        TypeError: another model than `mmfuse.models.clip.CLIP`, or a dtype that the target does not run.
        UnsupportedError: onnx or onnxscript is missing.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if not isinstance(model, CLIP):
        raise TypeError(f"model is {type(model).__name__}, expected mmfuse.models.clip.CLIP")
    dtype = str(model.text_projection.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected {' or '.join(DTYPES)}: what every ONNX runtime computes in")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path is {str(path)!r}, which is a folder, expected a file")
    require("onnx", "onnxscript")
    model = copy.deepcopy(model)
    facts = {
        "version": mmfuse.__version__,
        "model": "clip",
        "target": target,
        "opset": TARGETS[target],
        "dtype": dtype,
        "weights_sha256": fingerprint(model),
        "config": None if config is None else json.dumps(config),
        "seed": seed,
        "weights": weights,
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            _write(model, Path(folder, path.name), TARGETS[target], facts)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ValueError(f"path is {str(path)!r}, which cannot be written: {error}") from error
    return path


def _write(model: CLIP, path: Path, opset: int, facts: Mapping[str, Any]) -> None:
    import onnx_ir

    with torch.no_grad(), use_backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own calls
        program = torch.onnx.export(
            ServedCLIP(model).eval(),
            samples(model, images=2, texts=3),  # neither 1 nor equal: such sizes would be taken for constants
            dynamo=True,
            opset_version=opset,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes={name: {0: f"{name}_batch"} for name in INPUTS},
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names this machine's folders
    program.model.metadata_props.update({f"mmfuse.{key}": str(fact) for key, fact in facts.items() if fact is not None})
    large = sum(t.nbytes for t in model.state_dict().values()) > SINGLE_FILE_BYTES
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data" if large else None)
