"""What other runtimes make of a file: each says what it did, or raises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mmfuse.export.engine_check import relative
from mmfuse.export.openvino import Compiled
from mmfuse.export.run import open_session
from mmfuse.export.tensorrt import build_tensorrt

# root mean square of the difference, over that of onnxruntime's output. OpenVINO computes in float32 either way
_ALLOWED = {"float32": 1e-4, "float16": 1e-2}
Feeds = Sequence[Mapping[str, Tensor]]


def openvino_agrees(path: Path, feeds: Feeds) -> str:
    """OpenVINO's outputs are onnxruntime's, on every sample without an empty input."""
    compiled, session = Compiled(path), open_session(path, "cpu")
    names = [output.name for output in session.get_outputs()]
    largest, ran = 0.0, 0
    for feed in feeds:
        given = {name: t for name, t in feed.items() if name in compiled.inputs}
        if not all(t.numel() for t in given.values()):
            continue
        ran += 1
        found = compiled(given)
        for name, expected in zip(names, session.run(names, {n: t.numpy() for n, t in given.items()}), strict=True):
            difference = relative(found[name].numpy(), expected)
            allowed = _ALLOWED.get(str(expected.dtype), 0.0)
            if found[name].shape != expected.shape or difference > allowed:
                raise ValueError(
                    f"{name} is {list(found[name].shape)} in OpenVINO and {list(expected.shape)} in onnxruntime, the "
                    f"relative difference {difference:.1e}, at most {allowed:.0e}"
                )
            largest = max(largest, difference)
    if not ran:
        raise ValueError("every sample has an empty input")
    return f"OpenVINO {compiled.version}: within {largest:.1e} of onnxruntime's, {ran} samples"


def rtx_builds(path: Path, feeds: Feeds) -> str:
    """TensorRT-RTX builds an engine for the samples' sizes; it does not run."""
    session = open_session(path, "cpu")
    sizes: dict[str, list[int]] = {}
    for given in session.get_inputs():
        for axis, dim in enumerate(given.shape):
            if isinstance(dim, str):
                sizes.setdefault(dim, []).extend(max(1, feed[given.name].shape[axis]) for feed in feeds)
    profile = {name: (min(ns), sorted(ns)[len(ns) // 2], max(ns)) for name, ns in sizes.items()}
    with tempfile.TemporaryDirectory() as folder:
        built = build_tensorrt(path, Path(folder, "model.engine"), profile or None, runtime="tensorrt-rtx")
    return f"{built.runtime}: {built.graph}, {built.layers} layers, {built.seconds:.0f} s; no engine ran"


RUNTIMES: dict[str, Callable[[Path, Feeds], str]] = {"openvino": openvino_agrees, "tensorrt-rtx": rtx_builds}
