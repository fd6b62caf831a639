"""Does a directory of graphs say what the model says?"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.export.check import attempt, checker, rebuild
from mmfuse.export.generation import load
from mmfuse.export.generation.directory import MANIFEST, read_manifest
from mmfuse.export.lint import every_node
from mmfuse.export.nodes import DOMAIN
from mmfuse.export.onnx import fingerprint
from mmfuse.export.served import writes

_PROMPTS = 4


def check_generation(
    directory: str | Path,
    model: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
) -> dict[str, Any]:
    """Compare a directory of `export_for_generation` with the model's own `generate`, on the CPU.

    Checks: that every file is there and whole; onnx's checker of each graph, with shape inference; the words.

    Args:
        model: the model that was exported; by default it is made again from the directory's own record.
        inputs: of `generate`, by name; by default samples of the recorded model. Both draw from the same seed.
        weights: where the recorded weights file is now.

    Returns:
        A record that `json` can write: "ok", the "checks" it follows from, and what the directory holds.

    Raises:
        ValueError: the directory cannot be read, is damaged, or is not of this model.
        UnsupportedError: onnx, onnxruntime or transformers is missing.
    """
    import onnx

    directory = Path(directory)
    generator, entries = load(directory), read_manifest(directory)
    facts = entries.get("facts")
    if not isinstance(facts, dict) or not {"weights_sha256", "dtype"} <= facts.keys():
        raise ValueError(f"{directory / MANIFEST} has no facts of an export: export again")
    if model is None:
        model = rebuild(facts, weights)
    model = copy.deepcopy(model).cpu().eval()
    if fingerprint(model) != facts["weights_sha256"]:
        raise ValueError(f"the model is not the one exported to {str(directory)!r}: other weights")
    if inputs is None:
        if "model" not in facts:
            raise ValueError("the directory does not record what goes in: pass inputs, or --model FILE.PY:FACTORY")
        inputs = _samples(facts["model"], model)
    files = sorted(set(entries["parts"].values()))
    graphs = [onnx.load(directory / name, load_external_data=False) for name in files]
    checks = [{"name": "files", "ok": True, "detail": f"{len(entries['files'])} whole"}]
    checks += [attempt(name, checker, directory / name) for name in files]
    checks += [attempt("words", _words, generator, model, inputs)]
    nodes = [node for graph in graphs for node in every_node(graph)]
    return {
        "ok": all(check["ok"] for check in checks),
        "file": str(directory),
        "bytes": sum(of["bytes"] for of in entries["files"].values()),
        "version": entries["mmfuse"],
        "target": "generation",
        **facts,
        "parts": entries["parts"],
        "operators": dict(Counter(node.op_type for graph in graphs for node in graph.graph.node).most_common()),
        "ours": dict(Counter(node.op_type for node in nodes if node.domain == DOMAIN).most_common()),
        "checks": checks,
    }


def _samples(name: str, model: nn.Module) -> Mapping[str, Any]:
    how = writes(name)
    draw = torch.Generator().manual_seed(0)
    return how.samples(model, {"batch": _PROMPTS, "length": 5}, draw) | dict(how.options)


def _words(generator: Any, model: Any, inputs: Mapping[str, Any]) -> str:
    dtype = next(model.parameters()).dtype
    given = {
        name: v.cpu().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in inputs.items()
    }
    said = []
    for of in (generator, model):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            said.append(of.generate(**given))
    got, expected = said
    if got.shape != expected.shape:
        raise ValueError(f"{list(got.shape)} words, PyTorch's are {list(expected.shape)}")
    if other := int((got != expected).any(1).sum()):
        raise ValueError(f"{other} of {len(got)} answers differ from PyTorch's")
    return f"{len(got)} answers of {got.shape[1]} words are PyTorch's, {len(set(map(tuple, got.tolist())))} different"
