"""Generation from ONNX files: the words of the model's own `generate`, without the model.

    export_for_generation(model, {"image": image}, "blip2")       # once, where the model is
    words = load("blip2").generate(image, ids, mask, num_beams=3)  # anywhere, on onnxruntime

Parts, one graph each: "vision", "qformer", "projection", "prefill" (the prompt) and "decode" (a word after a KV cache).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.export.generation import directory as folder
from mmfuse.export.generation.graphs import BATCH
from mmfuse.export.generation.sessions import Sessions
from mmfuse.export.generation.systems import SYSTEMS, StandIn, System
from mmfuse.export.nodes import evaluated
from mmfuse.export.onnx import fingerprint
from mmfuse.export.require import require
from mmfuse.kernels._runtime.dtypes import dtype_name

DTYPES = torch.float32, torch.float16


def export_for_generation(
    model: nn.Module, inputs: Mapping[str, Any], directory: str | Path, *, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a model as ONNX files that `load(directory).generate` generates from. The model is left as it was.

    Takes BLIP (captions, VQA), BLIP-2, InstructBLIP and MiniGPT-4 of `mmfuse.models`, and transformers'
    BlipForConditionalGeneration, Blip2ForConditionalGeneration and InstructBlipForConditionalGeneration, accelerated or
    not. A decoder-only language model is one graph, which reads a prompt and every word after it; T5 and BLIP are two:
    "prefill" gives the keys and values that the decoder's cross-attention sees, once. Batch, lengths and the KV cache
    are free, the images' size is that of the sample. Weights lie once in weights.bin, whatever parts share them. Files
    hold standard operators of opset 18 and no pickles. The directory appears complete or not at all; an earlier export
    in its place is replaced.

    Args:
        inputs: the pixels as the model's `generate` takes them, {"image": [B, 3, R, R]} or {"pixel_values": ...}; other
            entries are not needed. Pixels of type uint8 are exported as such, where the model takes them.
        facts: to be recorded in the manifest.

    Raises:
        TypeError: another class of models, or a dtype that onnxruntime does not compute in.
        ValueError: the pixels are missing, or the directory cannot be written or holds something else.
        UnsupportedError: a package is missing, or a part cannot be exported with free sizes.
    """
    require("onnx", "onnxscript", "onnxruntime")
    system = _system(model)
    dtype = next(model.parameters()).dtype
    if dtype not in DTYPES:
        raise TypeError(f"the model's dtype is {dtype}, expected {' or '.join(map(str, DTYPES))}")
    image = inputs.get(system.image)
    if not isinstance(image, Tensor) or image.dim() < 4 or not len(image):
        raise ValueError(f"inputs has {system.image} {type(image).__name__}, expected pixels [B, 3, R, R]")
    sample = system.images(image)[:1].cpu().repeat(BATCH, 1, 1, 1)
    with folder.appearing(Path(directory)) as new, evaluated(model):
        parts = system.parts(model, sample if sample.dtype == torch.uint8 else sample.to(dtype))
        names: dict[int, str] = {}  # a part that serves two purposes is one file
        for name, part in parts.items():
            if id(part) not in names:
                names[id(part)] = f"{name}.onnx"
                part.write(new / names[id(part)])
        folder.join_weights([new / name for name in names.values()], new / folder.WEIGHTS)
        entries = {
            "mmfuse": mmfuse.__version__,
            "system": system.cls,
            "parts": {name: names[id(part)] for name, part in parts.items()},
            "settings": json.loads(json.dumps(system.settings(model))),
            "facts": {"weights_sha256": fingerprint(model), "dtype": dtype_name(dtype), **(facts or {})},
        }
        folder.write_manifest(new, entries)
    return Path(directory)


def load(
    directory: str | Path, *, providers: Sequence[Any] = ("CPUExecutionProvider",), options: Any = None
) -> Generator:
    """Open what `export_for_generation` wrote.

    Args:
        providers, options: onnxruntime's, of every session.

    Raises:
        ValueError: the directory is none of ours, of another format, or a file of it is missing, truncated, changed, or
            named outside of it.
        UnsupportedError: onnxruntime, or transformers where the language model needs it, is missing.
    """
    require("onnxruntime")
    directory = Path(directory)
    entries = folder.read_manifest(directory)
    system = SYSTEMS.get(entries.get("system", ""))
    if system is None:
        raise ValueError(
            f"{directory / folder.MANIFEST} has system {entries.get('system')!r}, expected one of {', '.join(SYSTEMS)}"
        )
    missing = {"vision", "prefill", "decode", *system.needed} - entries["parts"].keys()
    if missing:
        raise ValueError(f"{directory / folder.MANIFEST} has no part {', '.join(sorted(missing))}")
    files = {part: directory / name for part, name in entries["parts"].items()}
    return Generator(system, Sessions(files, providers, options), entries["settings"])


class Generator:
    """An exported model. `sessions.sessions` are onnxruntime's, by part. One may generate from several threads."""

    def __init__(self, system: System, sessions: Sessions, settings: Mapping[str, Any]):
        self.system, self.sessions = system, sessions
        try:
            self.settings = system.read(settings)
            system.standin(sessions, self.settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder.MANIFEST}: settings has no {error}, or not as it is written") from error
        self.cls = system.load()

    def __repr__(self) -> str:
        return f"Generator({self.system.cls}, parts={list(self.sessions.sessions)})"

    def generate(self, *args: Any, **options: Any) -> Any:
        """What the model's own `generate` returns for the same arguments: its code, over these graphs."""
        return StandIn(self.cls, self.system.standin(self.sessions, self.settings)).generate(*args, **options)


def _system(model: nn.Module) -> System:
    classes = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__}
    for system in SYSTEMS.values():
        module, _, name = system.cls.partition(":")
        # a library that is not imported made no model
        if (module.partition(".")[0], name) in classes and isinstance(model, system.load()):
            return system
    raise TypeError(f"model is {type(model).__name__}, expected one of {', '.join(SYSTEMS)}")
