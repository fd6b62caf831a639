"""Does an exported file hold what it says? ONNX's checker, the rules, and onnxruntime against PyTorch."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfuse.export.audit import audit_float16
from mmfuse.export.lint import every_node, lint
from mmfuse.export.nodes import DOMAIN
from mmfuse.export.onnx import Called, Given, fingerprint
from mmfuse.export.require import require
from mmfuse.export.runtimes import RUNTIMES
from mmfuse.export.served import DTYPES, SERVED, build, served

if TYPE_CHECKING:
    import onnx


def check_onnx(
    path: str | Path,
    model: nn.Module | None = None,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    *,
    weights: str | Path | None = None,
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare a file of `export_onnx` with the PyTorch model, on the CPU.

    Checks: onnx's checker with shape inference; the rules of `mmfuse.export.lint`; every weight that has kept its name;
    onnxruntime's outputs over several sizes; of a file in float16, that no node can leave its range, of others which
    would. An output holds if its error against float64 is at most twice that of PyTorch in the file's dtype plus one
    ulp of the largest value. An error is the root mean square over the output's elements of all runs: a maximum over
    few elements is luck.

    Args:
        model: the model that was exported; by default it is made again from the file's own record.
        inputs: what to run, as `export_onnx` takes them; by default samples of the recorded model.
        weights: where the recorded weights file is now.
        also: other runtimes: "openvino" (its outputs are onnxruntime's), "tensorrt-rtx" (it builds an engine).

    Returns:
        A record that `json` can write: "ok", the "checks" and "outputs" it follows from, and what the file holds.

    Raises:
        ValueError: the file cannot be read, is not one of ours, or is not of this model.
        UnsupportedError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    if unknown := [name for name in also if name not in RUNTIMES]:
        raise ValueError(f"also has {unknown[0]!r}, expected {' or '.join(RUNTIMES)}")
    path = Path(path)
    file, size = _read(path)
    facts = {p.key.removeprefix("mmfuse."): p.value for p in file.metadata_props if p.key.startswith("mmfuse.")}
    if "version" in facts and "weights_sha256" not in facts:
        raise ValueError(f"path is {str(path)!r}, a graph without weights: there is nothing to compare")
    if "weights_sha256" not in facts:
        raise ValueError(f"path is {str(path)!r}, which has no record of an export by mmfuse")
    part = SERVED.get(facts.get("model", ""))
    if model is None:
        model = rebuild(facts, weights)
    model = copy.deepcopy(model).cpu().eval()
    called = model if part is None else part.module(model)
    if fingerprint(called) != facts["weights_sha256"]:
        raise ValueError(
            f"the model is not the one exported to {str(path)!r}: other weights (seed {facts.get('seed')}, file "
            f"{weights or facts.get('weights')}, torch {torch.__version__} here and {file.producer_version} there)"
        )
    if inputs is None:
        if part is None:
            raise ValueError("the file does not record what goes in: pass inputs to check_onnx(path, model, inputs)")
        inputs = [part.inputs(model, sizes) for sizes in part.sizes]
    outputs: list[dict[str, Any]] = []
    checks = [
        attempt("onnx.checker", checker, path),
        attempt("rules", _rules, file, facts),
        attempt("weights", _weights, file, path, called),
        attempt("onnxruntime", _onnxruntime, path, called, inputs, outputs),
    ]
    given = [Given(called, one, {}) for one in inputs]
    feeds = [dict(zip(one.names, one.tensors, strict=True)) for one in given]
    checks += [attempt(name, RUNTIMES[name], path, feeds) for name in also]
    half = _half(path, called, inputs)
    if facts["dtype"] == "float16":
        fits = half["first"] is None
        checks.append({"name": "float16", "ok": fits, "detail": half["detail"]})
    return {
        "ok": all(part["ok"] for part in checks + outputs),
        "file": str(path),
        "bytes": size,
        **facts,
        "operators": dict(Counter(node.op_type for node in file.graph.node).most_common()),
        "ours": dict(Counter(node.op_type for node in every_node(file) if node.domain == DOMAIN).most_common()),
        "checks": checks,
        "outputs": outputs,
        "float16": half,
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


def rebuild(facts: Mapping[str, str], weights: str | Path | None) -> nn.Module:
    """The reference model that a file was made of."""
    weights = weights or facts.get("weights")
    if not {"model", "config"} <= facts.keys() or (weights is None and "seed" not in facts):
        raise ValueError("the file does not record how its model was made: pass the model, or --model FILE.PY:FACTORY")
    config, seed = json.loads(facts["config"]), int(facts.get("seed", 0))
    model = build(served(facts["model"]).name, config, seed=seed, weights=weights)
    return model.to(DTYPES[facts["dtype"]])


def attempt(name: str, check: Callable[..., str], *args: Any) -> dict[str, Any]:
    """Run a check that returns a remark or raises."""
    try:
        return {"name": name, "ok": True, "detail": check(*args)}
    except Exception as error:  # onnx and onnxruntime have no common class
        return {"name": name, "ok": False, "detail": str(error)}


def checker(path: Path) -> str:
    """onnx's own, which raises."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    return "valid, shapes inferred"


def _rules(file: onnx.ModelProto, facts: Mapping[str, str]) -> str:
    if found := lint(file, facts):
        raise ValueError("; ".join(f"{rule}: {where} {what}" for rule, where, what in found))
    ours = sum(node.domain == DOMAIN for node in file.graph.node)
    return f"{len(file.graph.node)} nodes, {ours} of them ours, opset {facts['opset']}"


def _weights(file: onnx.ModelProto, path: Path, model: nn.Module) -> str:
    """The samples meet few of a table's rows, so weights themselves are compared."""
    from onnx.numpy_helper import to_array

    stored = {t.name: t for t in file.graph.initializer}
    same = {name: t for name, t in model.state_dict().items() if name in stored and t.dtype != torch.bfloat16}
    # the exporter multiplies the weights before a batch norm by its own
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        folded = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
        names = {name for name, p in model.named_parameters() if id(p) in folded}
        same = {name: t for name, t in same.items() if name not in names}
    for name, expected in same.items():
        values = to_array(stored[name], str(path.parent))
        if values.shape != expected.shape:
            raise ValueError(f"{name} has shape {values.shape}, PyTorch's {tuple(expected.shape)}")
        other = (values != expected.detach().numpy()).reshape(len(values) if values.ndim else 1, -1).any(1).nonzero()[0]
        if len(other):
            raise ValueError(f"{name} differs from PyTorch's in {len(other)} rows, the first is {other[0]}")
    return f"{len(same)} equal to PyTorch's"


def _onnxruntime(
    path: Path, model: nn.Module, inputs: Sequence[Mapping[str, Any]], outputs: list[dict[str, Any]]
) -> str:
    """Fill `outputs` with a judgement of each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    exact = copy.deepcopy(model).double()
    runs, ran = [], []
    for given in inputs:
        said = Given(model, given, {})
        kept = {i.name for i in session.get_inputs()}
        feed = {name: t.numpy() for name, t in zip(said.names, said.tensors, strict=True) if name in kept}
        got = [torch.from_numpy(g) for g in session.run(names, feed)]
        in_double = [t.double() if t.is_floating_point() else t for t in said.tensors]
        with torch.no_grad():
            runs.append((got, Called(model, said)(*said.tensors), Called(exact, said)(*in_double)))
        ran.append("x".join(str(len(t)) for t in said.tensors if t.dim()))
    for i, name in enumerate(names):
        of_runs = (torch.cat([run[which][i].flatten() for run in runs]) for which in range(3))
        outputs.append({"name": name, **_judge(*of_runs)})
    return f"ran {', '.join(ran)}"


def _half(path: Path, model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the audit of float16's range finds, or why there is none."""
    given = [Given(model, one, {}) for one in inputs]
    feeds = [dict(zip(g.names, (t.numpy() for t in g.tensors), strict=True)) for g in given]
    feeds = [feed for feed in feeds if all(t.size for t in feed.values())]
    try:
        found = audit_float16(path, feeds)
    except Exception as error:  # onnx and onnxruntime have no common class
        return {"first": None, "masked_rows": {}, "detail": f"not told: {error}"}
    first = found.first
    if first is None:
        largest = max(found.ranges, key=lambda r: r.bound)
        detail = f"every node stays in range, the largest bound is {largest.bound:.0f} at {largest.node}"
    else:
        detail = f"{first.node} ({first.op}) can reach {first.bound:.3g}, {first.observed:.3g} was seen"
    return {"first": None if first is None else first.node, "masked_rows": found.masked_rows, "detail": detail}


def _judge(got: Tensor, eager: Tensor, exact: Tensor) -> dict[str, Any]:
    if not got.is_floating_point():
        other = float((got != eager).double().mean())
        return {"ok": not other, **dict.fromkeys(("error", "difference"), other), "pytorch_error": 0.0, "allowed": 0.0,
                "scale": float(eager.abs().max())}  # fmt: skip
    error, own = (float((t.double() - exact).square().mean().sqrt()) for t in (got, eager))
    scale = float(exact.abs().max()) if len(exact) else 0.0
    allowed = 2 * own + torch.finfo(got.dtype).eps * scale
    return {
        "ok": error <= allowed,  # not so for NaN
        "error": error,
        "pytorch_error": own,
        "allowed": allowed,
        "scale": scale,
        "difference": float((got - eager).abs().max()),
    }
