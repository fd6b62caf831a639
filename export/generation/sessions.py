"""The parts of an exported model in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfuse.export.run import TYPES


class Sessions:
    """`run(part, *inputs)`: a part's outputs, of inputs in its graph's order. A file of two parts is opened once."""

    def __init__(
        self, files: Mapping[str, Path], providers: Sequence[Any] = ("CPUExecutionProvider",), options: Any = None
    ):
        import onnxruntime

        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors only
        opened = {}
        for path in dict.fromkeys(files.values()):
            try:
                opened[path] = onnxruntime.InferenceSession(path, options, providers=list(providers))
            except Exception as error:  # onnxruntime's have no common class
                raise ValueError(f"{path} cannot be loaded: {error}") from error
        self.sessions = {part: opened[path] for part, path in files.items()}
        self.inputs = {part: [i.name for i in session.get_inputs()] for part, session in self.sessions.items()}

    def run(self, part: str, *inputs: Tensor) -> list[Tensor]:
        feed = {name: t.numpy() for name, t in zip(self.inputs[part], inputs, strict=True)}
        return [torch.from_numpy(t) for t in self.sessions[part].run(None, feed)]

    def empty_cache(self, rows: int) -> list[Tensor]:
        """Of every layer, a key and a value [rows, heads, 0, d]."""
        past = [i for i in self.sessions["decode"].get_inputs() if i.name.startswith("past.")]
        return [torch.empty(rows, i.shape[1], 0, i.shape[3], dtype=TYPES[i.type]) for i in past]

    def pixels(self, image: Tensor) -> Tensor:
        """An image in the dtype that the vision graph takes."""
        (taken, *_) = self.sessions["vision"].get_inputs()
        dtype = TYPES[taken.type]
        if image.dtype != dtype and not (image.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{taken.name} is {image.dtype}, expected {dtype}, as the sample of the export was")
        return image.to(dtype)


def repeated(seen: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """What each prompt gave, for each of its texts, which come one after another."""
    times = rows // len(seen[0])
    return seen if times == 1 else [t.repeat_interleave(times, 0) for t in seen]
