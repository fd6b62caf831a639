"""Files for onnxruntime alone: its own fused operators, where they compute the same and are not slower."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmfuse.export.engine_check import relative
from mmfuse.export.onnx import move, save
from mmfuse.export.require import require
from mmfuse.export.run import draw, open_session

# root mean square of the difference from the plain file, over that of its output: what another order of sums makes
ALLOWED = {"float32": 1e-5, "float16": 5e-3}
# a sample's runs end after so many seconds, and not before so many turns
_SECONDS, _FEWEST = 5.0, 4


@dataclass(frozen=True)
class Fused:
    """What became of a file.

    Args:
        kept: whether the fused file took the plain one's place.
        why: where it did not.
        difference: the largest of its outputs, relative; infinite where it did not run.
        plain, fused: milliseconds on this processor, the least of interleaved runs, on the sample for which the fused
            file does worst; NaN where it did not run.
    """

    kept: bool
    why: str | None
    difference: float
    plain: float
    fused: float
    operators: dict[str, int]

    def __str__(self) -> str:
        if not self.kept:
            return f"the plain file, as the fused one: {self.why}"
        own = ", ".join(f"{name} {count}" for name, count in self.operators.items())
        return f"fused ({own}), {self.fused:.2f} ms for {self.plain:.2f}"


def fuse_for_ort(
    path: str | Path,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    out: str | Path | None = None,
    repeat: int = 30,
) -> Fused:
    """Fuse a file into onnxruntime's own operators by transformers' rewriter, behind two gates.

    The fused file is kept only if it loads and runs, and on every sample differs from the plain one by no more than
    rounding and is not slower, both on the CPU. Otherwise nothing is written.

    Args:
        inputs: samples by name, several of different sizes; by default random ones of two sizes.
        out: the file to write; by default `path` itself.
        repeat: timed runs of each file on each sample; fewer where they take long.

    Raises:
        ValueError: the file cannot be read or written.
        UnsupportedError: onnx, onnxruntime or transformers is missing.
    """
    require("onnx", "onnxruntime", "transformers", "transformers.exporters")
    import onnx_ir as ir

    path = Path(path)
    target = path if out is None else Path(out)
    plain = open_session(path, "cpu")
    signature = {i.name: (i.type, i.shape) for i in plain.get_inputs()}
    if inputs is None:
        names = sorted({n for _, shape in signature.values() for n in shape if isinstance(n, str)})
        inputs = [draw(signature, {name: start + i for i, name in enumerate(names)}, start) for start in (1, 3)]
    feeds = [{name: t.numpy() for name, t in given.items()} for given in inputs]
    expected = [plain.run(None, feed) for feed in feeds]
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            made, file = Path(folder, target.name), ir.load(path)
            if "mmfuse.operators" in file.metadata_props:
                file.metadata_props["mmfuse.operators"] = "{}"  # the rewriter puts functions in line
            why = _attempt(file, made)
            if why is not None:
                return Fused(False, why, math.inf, math.nan, math.nan, {})
            verdict = _judged(plain, made, feeds, expected, repeat, _operators(file))
            if verdict.kept:
                move(Path(folder), target.parent)
            return verdict
    except OSError as error:
        raise ValueError(f"path is {str(target)!r}, which cannot be written: {error}") from error


def _attempt(file: Any, made: Path) -> str | None:
    """Fuse and save; why not, or None."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    try:
        fuse_for_onnxruntime(file, "cpu")
        save(file, made)
    except OSError:
        raise
    except Exception as error:  # a rewriter of others
        return f"it cannot be fused: {error}"
    return None


def _judged(
    plain: Any, made: Path, feeds: list[Any], expected: list[Any], repeat: int, operators: dict[str, int]
) -> Fused:
    try:
        fused = open_session(made, "cpu")
        found = [fused.run(None, feed) for feed in feeds]
    except Exception as error:  # onnxruntime has no class for it
        return Fused(False, f"the fused file does not run: {error}", math.inf, math.nan, math.nan, operators)
    pairs = [pair for got, wanted in zip(found, expected, strict=True) for pair in zip(got, wanted, strict=True)]
    difference = max((relative(got, wanted) for got, wanted in pairs), default=0.0)
    allowed = max(ALLOWED.get(str(wanted.dtype), 0.0) for _, wanted in pairs)
    times = [_least([plain, fused], feed, repeat) for feed in feeds]
    plain_ms, fused_ms = max(times, key=lambda of: of[1] / of[0])
    if difference > allowed:
        why = f"it differs by {difference:.1e} from the plain file, at most {allowed:.0e}"
    elif fused_ms > plain_ms:
        why = f"it takes {fused_ms:.2f} ms, the plain file {plain_ms:.2f}"
    else:
        return Fused(True, None, difference, plain_ms, fused_ms, operators)
    return Fused(False, why, difference, plain_ms, fused_ms, operators)


def _least(sessions: list[Any], feed: Mapping[str, np.ndarray], repeat: int) -> list[float]:
    """Milliseconds of each session, run in turn: the least, as other work of the machine only adds to it."""
    least, start = [math.inf] * len(sessions), time.perf_counter()
    for turn in range(repeat):
        if turn >= _FEWEST and time.perf_counter() - start > _SECONDS:
            break
        for i, session in enumerate(sessions):
            before = time.perf_counter()
            session.run(None, feed)
            least[i] = min(least[i], 1e3 * (time.perf_counter() - before))
    return least


def _operators(file: Any) -> dict[str, int]:
    """How many nodes of onnxruntime's own there are."""
    own = [node.op_type for node in file.graph.all_nodes() if node.domain == "com.microsoft"]
    return {name: own.count(name) for name in sorted(set(own))}
