"""`mmfuse bench export`: an exported model in onnxruntime at batch 1, beside eager PyTorch and torch's own file.

CLIP's ViT-B/16 and BLIP-2's Q-Former of transformers at random weights. Ours is what `accelerate` and `export_onnx`
for the target "ort" make of them, `torch.onnx` the file of torch's exporter alone. Outputs are compared before they are
timed; the three take turns, and the least time of each counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse._compat import allow_torchvision
from mmfuse.export.engine_check import ALLOWED, relative

OPTIONS = ("json",)
_TURNS = 30
_PAUSE = 0.05  # seconds, in which the threads of the session before, which wait in a loop, leave the cores


def run(args: argparse.Namespace) -> int:
    """Print the times of each model; 0 if all compute the same."""
    allow_torchvision()
    found = {name: _measured(*make()) for name, make in MODELS.items()}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, of in found.items():
            times = ", ".join(f"{who} {ms:.1f} ms" for who, ms in of["milliseconds"].items())
            print(f"{name}: {times}; exported in {of['seconds']:.0f} s; largest difference {of['difference']:.0e}")
    return int(any(not of["difference"] <= ALLOWED["float32"] for of in found.values()))


def _measured(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Any]:
    from mmfuse.export import export_onnx

    several = {name: torch.cat([t, t]) for name, t in given.items()}
    free = {name: {0: "batch"} for name in given}
    fused = copy.deepcopy(model)
    mmfuse.accelerate(fused)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours, plain = Path(folder, "ours.onnx"), Path(folder, "plain.onnx")
        start = time.perf_counter()
        export_onnx(fused, several, ours, dynamic=free, target="ort")
        seconds = time.perf_counter() - start
        shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in given}
        done = torch.onnx.export(model, kwargs=several, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert done is not None
        done.save(plain)
        runs = {
            "eager": lambda: model(**given)[0],
            "torch.onnx": _session(plain, given),
            "mmfuse": _session(ours, given),
        }
        expected = runs["eager"]().numpy()
        differences = [relative(runs[who]().numpy(), expected) for who in ("torch.onnx", "mmfuse")]
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(_TURNS):
            for who, call in runs.items():
                time.sleep(_PAUSE)
                start_of = time.perf_counter()
                call()
                least[who] = min(least[who], 1e3 * (time.perf_counter() - start_of))
    return {"milliseconds": least, "seconds": seconds, "difference": max(differences)}


def _session(path: Path, given: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: t.numpy() for name, t in given.items()}
    first = session.get_outputs()[0].name
    return lambda: torch.from_numpy(session.run([first], feed)[0])


def _clip() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(patch_size=16)).eval()
    return model, {"pixel_values": torch.randn(1, 3, 224, 224)}


def _qformer() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    model = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig()).eval()
    given = {"query_embeds": torch.randn(1, 32, 768), "encoder_hidden_states": torch.randn(1, 257, 1408)}
    return model, given


MODELS = {"CLIP ViT-B/16": _clip, "Q-Former": _qformer}
