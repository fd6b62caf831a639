"""Does an exported file hold what it says? ONNX's checker, and onnxruntime against PyTorch."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfuse.export.clip import DTYPES, INPUTS, OUTPUTS, ServedCLIP, build, fingerprint, samples
from mmfuse.export.require import require
from mmfuse.models.clip import CLIP

if TYPE_CHECKING:
    import onnx

# images x texts: an empty batch switches one tower off, and the last is large enough for a steady error
BATCHES = ((1, 1), (3, 2), (2, 0), (0, 2), (4, 16))


def check_onnx(path: str | Path, model: CLIP | None = None, *, weights: str | Path | None = None) -> dict[str, Any]:
    """Compare a file of `export_onnx` with the PyTorch model, on the CPU.

    Checks: onnx's checker with shape inference; standard operators of the recorded opset only; every token's
    embedding; onnxruntime's outputs over several batch sizes. An output holds if its error against float64 is at most
    twice that of PyTorch in the file's dtype plus one ulp of the largest value. An error is the root mean square over
    the output's elements of all batches: a maximum over few elements is luck.

    Args:
        model: the model that was exported; by default it is made again from the file's own record.
        weights: where the recorded weights file is now.

    Returns:
        A record that `json` can write: "ok", the "checks" and "outputs" it follows from, and what the file holds.

    Raises:
        ValueError: the file cannot be read, is not one of ours, or is not of this model.
        UnsupportedError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    path = Path(path)
    file, size = _read(path)
    facts = {p.key.removeprefix("mmfuse."): p.value for p in file.metadata_props if p.key.startswith("mmfuse.")}
    if facts.get("model") != "clip":
        raise ValueError(f"path is {str(path)!r}, which has no record of an export by mmfuse")
    model = _rebuild(facts, weights) if model is None else copy.deepcopy(model).cpu()
    if fingerprint(model) != facts["weights_sha256"]:
        raise ValueError(
            f"the model is not the one exported to {str(path)!r}: other weights (seed {facts.get('seed')}, file "
            f"{weights or facts.get('weights')}, torch {torch.__version__} here and {file.producer_version} there)"
        )
    outputs: list[dict[str, Any]] = []
    checks = [
        _attempt("onnx.checker", _checker, path),
        _attempt("operators", _operators, file, facts),
        _attempt("token embedding", _token_embedding, file, path, model),
        _attempt("onnxruntime", _onnxruntime, path, model, outputs),
    ]
    return {
        "ok": all(part["ok"] for part in checks + outputs),
        "file": str(path),
        "bytes": size,
        **facts,
        "operators": dict(Counter(node.op_type for node in file.graph.node).most_common()),
        "checks": checks,
        "outputs": outputs,
    }


def _read(path: Path) -> tuple[onnx.ModelProto, int]:
    """The file without weights that lie beside it, and the size of both."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        file = onnx.load(path, format="protobuf", load_external_data=False)
        apart = {e.value for t in file.graph.initializer for e in t.external_data if e.key == "location"}
        return file, sum((path.parent / name).stat().st_size for name in (path.name, *apart))
    except (OSError, DecodeError) as error:
        raise ValueError(f"path is {str(path)!r}, which is not a readable ONNX file: {error}") from error


def _rebuild(facts: Mapping[str, str], weights: str | Path | None) -> CLIP:
    weights = weights or facts.get("weights")
    if "config" not in facts or (weights is None and "seed" not in facts):
        raise ValueError("the file does not record how its model was made: pass the model to check_onnx(path, model)")
    model = build(json.loads(facts["config"]), seed=int(facts.get("seed", 0)), weights=weights)
    return model.to(DTYPES[facts["dtype"]])


def _attempt(name: str, check: Callable[..., str], *args: Any) -> dict[str, Any]:
    """Run a check that returns a remark or raises."""
    try:
        return {"name": name, "ok": True, "detail": check(*args)}
    except Exception as error:  # onnx and onnxruntime have no common class
        return {"name": name, "ok": False, "detail": str(error)}


def _checker(path: Path) -> str:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    return "valid, shapes inferred"


def _operators(file: onnx.ModelProto, facts: Mapping[str, str]) -> str:
    opsets = {o.domain or "ai.onnx": o.version for o in file.opset_import}
    if opsets != {"ai.onnx": int(facts["opset"])}:
        raise ValueError(f"opsets are {opsets}, expected only ai.onnx {facts['opset']}")
    foreign = {f"{n.domain}::{n.op_type}" for n in file.graph.node if n.domain not in ("", "ai.onnx")}
    if foreign or file.functions:
        raise ValueError(f"not standard: {', '.join(sorted(foreign) + [f.name for f in file.functions])}")
    return f"{len(file.graph.node)} nodes, opset {facts['opset']}, standard only"


def _token_embedding(file: onnx.ModelProto, path: Path, model: CLIP) -> str:
    """The samples meet few of the ids, so the table itself is compared."""
    from onnx.numpy_helper import to_array

    stored = {t.name: t for t in file.graph.initializer}["clip.token_embedding.weight"]
    expected = model.token_embedding.weight.detach().numpy()
    other = (to_array(stored, str(path.parent)) != expected).any(1).nonzero()[0]
    if len(other):
        raise ValueError(f"{len(other)} of {len(expected)} ids differ from PyTorch's, the first is {other[0]}")
    return f"{len(expected)} ids, equal to PyTorch's"


def _onnxruntime(path: Path, model: CLIP, outputs: list[dict[str, Any]]) -> str:
    """Fill `outputs` with a judgement of each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    eager = ServedCLIP(model).eval()
    exact = copy.deepcopy(eager).double()
    runs = []
    for images, texts in BATCHES:
        image, text = samples(model, images, texts)
        got = session.run(OUTPUTS, dict(zip(INPUTS, (image.numpy(), text.numpy()), strict=True)))
        with torch.no_grad():
            runs.append(([torch.from_numpy(g) for g in got], eager(image, text), exact(image.double(), text)))
    for i, name in enumerate(OUTPUTS):
        got, own, true = (torch.cat([run[which][i].flatten() for run in runs]) for which in range(3))
        outputs.append({"name": name, **_judge(got, own, true)})
    return f"ran {', '.join(f'{images}x{texts}' for images, texts in BATCHES)} (images x texts)"


def _judge(got: Tensor, eager: Tensor, exact: Tensor) -> dict[str, Any]:
    error, own = (float((t.double() - exact).square().mean().sqrt()) for t in (got, eager))
    scale = float(exact.abs().max())
    allowed = 2 * own + torch.finfo(got.dtype).eps * scale
    return {
        "ok": error <= allowed,  # not so for NaN
        "error": error,
        "pytorch_error": own,
        "allowed": allowed,
        "scale": scale,
        "difference": float((got - eager).abs().max()),
    }
