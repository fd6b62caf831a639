"""Reference models as they are served: what goes in and comes out, which sizes are free, and samples of both."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.export.onnx import check_writable, export_onnx
from mmfuse.export.require import require
from mmfuse.models import create, load_official
from mmfuse.models.registry import system

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Sizes = Mapping[str, int]


Samples = Callable[[Any, Sizes, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Writes:
    """How a model writes words: a small configuration, samples of its `generate`'s inputs, and its other options."""

    tiny: Mapping[str, Any]
    samples: Samples
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """A part of a reference model that leaves as one file.

    Args:
        name: the system's, or "system/part".
        outputs: their names.
        dynamic: for each input, in order, its free dimensions with their names.
        module: of a model; it takes the inputs by name and returns the outputs in order.
        samples: (model, sizes, generator) to inputs; `sizes` has a number for each name of a free dimension.
        sizes: what a check runs.
        tiny: a small configuration in which the part has something to do.
        writes: of a model that generates.
    """

    name: str
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    module: Callable[[Any], nn.Module]
    samples: Samples
    sizes: Sequence[Sizes]
    tiny: Mapping[str, Any]
    writes: Writes | None = None

    def configuration(self, given: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a preset, of "tiny", or as they are given."""
        if not isinstance(given, str):
            return given
        presets = {"tiny": self.tiny, **system(self.name.partition("/")[0]).presets}
        if given not in presets:
            raise ValueError(f"preset is {given!r}, expected one of {', '.join(presets)}")
        return presets[given]

    def inputs(self, model: nn.Module, sizes: Sizes | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Samples in the model's dtype; by default sizes that are neither 1 nor equal, as an export wants them."""
        names = sorted({name for dims in self.dynamic.values() for name in dims.values()})
        given = self.samples(
            model,
            {name: i + 2 for i, name in enumerate(names)} | dict(sizes or {}),
            torch.Generator().manual_seed(seed),
        )
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}

    def export(
        self, model: nn.Module, path: str | Path, *, facts: Mapping[str, Any] | None = None, **options: Any
    ) -> Path:
        """Write `model` to a file with this part's names and free sizes; options as of `export_onnx`."""
        facts = {"model": self.name, **(facts or {})}
        names: dict[str, Any] = {"dynamic": self.dynamic, "outputs": self.outputs}
        return export_onnx(self.module(model), self.inputs(model), path, facts=facts, **names, **options)


SERVED: dict[str, Served] = {}


def served(name: str) -> Served:
    """The part `name`, a system's or "system/part"."""
    if name not in SERVED:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(sorted(SERVED))}")
    return SERVED[name]


def writes(name: str) -> Writes:
    """How the system of part `name` writes words."""
    system = served(name).name.partition("/")[0]
    for part in SERVED.values():
        if part.name.partition("/")[0] == system and part.writes is not None:
            return part.writes
    raise ValueError(f"model is {name!r}, which writes no words")


def export_served(
    name: str,
    path: str | Path,
    config: str | Mapping[str, Any],
    *,
    seed: int | None = 0,
    weights: str | Path | None = None,
    no_weights: bool = False,
    dtype: str = "float32",
    **options: Any,
) -> Path:
    """Write part `name` of a reference model; the file records how to make the model again.

    Args:
        config: a preset, "tiny", or the constructor's arguments.
        seed, weights: of `build`.
        no_weights: the graph alone, in little memory whatever the model's size; its weights are inputs.
        options: of `export_onnx`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    part = served(name)
    config = part.configuration(config)
    check_writable(Path(path))
    if no_weights:
        seed = weights = None
        with torch.device("meta"):
            model = create(name.partition("/")[0], config)
    else:
        model = build(name, config, seed=seed or 0, weights=weights)
    model = model.to(DTYPES[dtype]).eval()
    facts = {"config": json.dumps(config), "seed": None if weights else seed, "weights": weights}
    return part.export(model, path, facts=facts, **options)


def build(name: str, config: str | Mapping[str, Any], *, seed: int = 0, weights: str | Path | None = None) -> nn.Module:
    """The model of part `name` in float32, with the random weights of `seed` or an official state dict in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also seed the GPUs
        model = create(name.partition("/")[0], config)
    if weights is not None:
        load_official(model, read_weights(Path(weights)))
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, a PyTorch file of tensors only, or a TorchScript archive (OpenAI's form).

    Raises:
        ValueError: the file is missing or none of these.
        UnsupportedError: a safetensors file without safetensors.
    """
    if path.suffix == ".safetensors":
        require("safetensors")
    try:
        state = _load(path)
    except Exception as error:  # every reader has exceptions of its own
        raise ValueError(f"weights is {str(path)!r}, which cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"weights is {str(path)!r}, expected a state dict: names and tensors, nothing around them")
    return state


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            return torch.jit.load(path, map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


from mmfuse.export.served import systems  # noqa: E402, F401  (declares the parts)
