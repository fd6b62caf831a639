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

from mmfuse.export.onnx import export_onnx
from mmfuse.export.require import require
from mmfuse.models import create, load_official
from mmfuse.models.registry import system

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Sizes = Mapping[str, int]


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
    """

    name: str
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    module: Callable[[Any], nn.Module]
    samples: Callable[[Any, Sizes, torch.Generator], dict[str, Tensor]]
    sizes: Sequence[Sizes]

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


SERVED: dict[str, Served] = {}


def served(name: str) -> Served:
    """The part `name`, a system's or "system/part"."""
    if name not in SERVED:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(sorted(SERVED))}")
    return SERVED[name]


def export_served(
    name: str,
    path: str | Path,
    config: str | Mapping[str, Any],
    *,
    seed: int | None = 0,
    weights: str | Path | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Path:
    """Write part `name` of a reference model; the file records how to make the model again.

    Args:
        config, seed, weights: of `build`. options: of `export_onnx`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    part, given = served(name), config
    if isinstance(config, str):
        config = dict(system(name.partition("/")[0]).presets.get(config, {}))
    model = build(name, given, seed=seed or 0, weights=weights).to(DTYPES[dtype]).eval()
    facts = {"model": name, "config": json.dumps(config), "seed": None if weights else seed, "weights": weights}
    return export_onnx(
        part.module(model), part.inputs(model), path, dynamic=part.dynamic, outputs=part.outputs, facts=facts, **options
    )


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


# --- CLIP -----------------------------------------------------------------------------------------------------------


class ServedCLIP(nn.Module):
    """CLIP with its embeddings beside its logits.

    image [image_batch, 3, R, R] in the model's dtype, normalised pixels; text [text_batch, context_length] int64 ids ->
        logits_per_image [image_batch, text_batch]: temperature times cosine; their softmax is the zero-shot probability
        logits_per_text [text_batch, image_batch]: its transpose
        image_embeds [image_batch, embed_dim], text_embeds [text_batch, embed_dim]: of length 1, for an index
    """

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image_embeds, text_embeds = self.clip.encode_image(image), self.clip.encode_text(text)
        image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
        logits = self.clip.logit_scale.exp() * image_embeds @ text_embeds.T
        return logits, logits.T, image_embeds, text_embeds


def _clip_samples(model: Any, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Each text ends somewhere with the end token, the highest id, then zeros."""
    size, length, vocabulary = model.image_resolution, model.context_length, model.token_embedding.num_embeddings
    image = torch.randn(sizes["image_batch"], 3, size, size, generator=generator)
    texts = sizes["text_batch"]
    text = torch.randint(1, vocabulary - 1, (texts, length), generator=generator)
    end = torch.randint(1, length, (texts, 1), generator=generator)
    return {"image": image, "text": torch.where(torch.arange(length) < end, text, 0).scatter(1, end, vocabulary - 1)}


SERVED["clip"] = Served(
    "clip",
    outputs=("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    dynamic={"image": {0: "image_batch"}, "text": {0: "text_batch"}},
    module=ServedCLIP,
    samples=_clip_samples,
    # an empty batch switches one tower off, and the last is large enough for a steady error
    sizes=[{"image_batch": i, "text_batch": t} for i, t in ((1, 1), (3, 2), (2, 0), (0, 2), (4, 16))],
)
