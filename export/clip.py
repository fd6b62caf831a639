"""CLIP as it is served: images and texts in, unit embeddings and scaled similarities out."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.export.require import require
from mmfuse.models import create, load_official
from mmfuse.models.clip import CLIP

INPUTS = ("image", "text")
OUTPUTS = ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class ServedCLIP(nn.Module):
    """CLIP with its embeddings beside its logits.

    image [image_batch, 3, R, R] in the model's dtype, normalised pixels; text [text_batch, context_length] int64 ids ->
        logits_per_image [image_batch, text_batch]: temperature times cosine; their softmax is the zero-shot probability
        logits_per_text [text_batch, image_batch]: its transpose
        image_embeds [image_batch, embed_dim], text_embeds [text_batch, embed_dim]: of length 1, for an index
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image_embeds, text_embeds = self.clip.encode_image(image), self.clip.encode_text(text)
        image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
        logits = self.clip.logit_scale.exp() * image_embeds @ text_embeds.T
        return logits, logits.T, image_embeds, text_embeds


def build(config: str | Mapping[str, Any], *, seed: int = 0, weights: str | Path | None = None) -> CLIP:
    """CLIP in float32, with the random weights of `seed` or with an official state dict from the file `weights`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also seed the GPUs
        model = create("clip", config)
    assert isinstance(model, CLIP)
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


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's state dict: names and bytes."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def samples(model: CLIP, images: int, texts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs of `ServedCLIP`; each text ends somewhere with the end token, the highest id, then zeros."""
    generator = torch.Generator().manual_seed(seed)
    size, length, vocabulary = model.image_resolution, model.context_length, model.token_embedding.num_embeddings
    image = torch.randn(images, 3, size, size, generator=generator)
    text = torch.randint(1, vocabulary - 1, (texts, length), generator=generator)
    end = torch.randint(1, length, (texts, 1), generator=generator)
    text = torch.where(torch.arange(length) < end, text, 0).scatter(1, end, vocabulary - 1)
    weight = model.text_projection
    return image.to(weight), text.to(weight.device)
