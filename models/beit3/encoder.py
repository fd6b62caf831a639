"""BEiT-3's encoder (Wang et al. 2022, arXiv:2208.10442): one stream of image rows and text rows, an expert for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.multiway import MultiwayBlock, MultiwayLayerNorm, MultiwayLinear
from mmfuse.kernels import patch_embed
from mmfuse.kernels.multiway.routing import Part, Routing
from mmfuse.kernels.text import embed_text

VISION, LANGUAGE = 0, 1  # the experts
# words see the image and the words before them, the image sees itself (section 2.2)
CAPTIONING = (("all", "none"), ("all", "causal"))
# fairseq's positions begin at 2
_FIRST = 2


class Batch(NamedTuple):
    """Images, texts or pairs, as `BEiT3.forward` takes them."""

    image: Tensor | None = None
    text_ids: Tensor | None = None
    padding_mask: Tensor | None = None
    masked: Tensor | None = None


class Encoded(NamedTuple):
    image: Tensor | None  # [B, 1 + N, D], the class token first
    text: Tensor | None  # [B, L, D]


class BEiT3(nn.Module):
    """Images, texts or both to the encodings of their tokens.

    Args:
        img_size, patch_size, in_chans: of square images and patches.
        vocab_size: of the words. max_source_positions: rows of their position table, of which the first two are unused.
        encoder_embed_dim, encoder_attention_heads, encoder_ffn_embed_dim, encoder_layers: D, heads, hidden, depth.
        normalize_output: a LayerNorm at the end.
        drop_path_rate: that of the last layer; it grows linearly.
        layernorm_eps: of every norm.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        vocab_size: int = 64010,
        encoder_embed_dim: int = 768,
        encoder_attention_heads: int = 12,
        encoder_ffn_embed_dim: int = 3072,
        encoder_layers: int = 12,
        max_source_positions: int = 1024,
        normalize_output: bool = True,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        layernorm_eps: float = 1e-5,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, expected a multiple of patch_size {patch_size}")
        width, depth, patches = encoder_embed_dim, encoder_layers, (img_size // patch_size) ** 2
        self.img_size, self.embed_dim = img_size, width
        self.patch = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.word = nn.Embedding(vocab_size, width)
        self.image_position = nn.Embedding(_FIRST + 1 + patches, width)
        self.text_position = nn.Embedding(max_source_positions, width)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        sizes = (2, width, encoder_attention_heads, encoder_ffn_embed_dim)
        layers = [MultiwayBlock(*sizes, eps=layernorm_eps, drop_path=rate) for rate in rates]
        self.layers: Sequence[MultiwayBlock] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = MultiwayLayerNorm(2, width, layernorm_eps) if normalize_output else None
        self.apply(_initialise)
        # sub-LayerNorm's initialisation (Magneto, arXiv:2210.06423, section 2.3)
        gain = math.sqrt(math.log(2 * depth)) if depth > 1 else 1.0
        for layer in self.layers:
            values = layer.qkv.weight[:, 2 * width :]
            for weight in (values, layer.out.weight, layer.ffn.fc1.weight, layer.ffn.fc2.weight):
                weight.data.mul_(gain)

    def embed(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
        start: int = 0,
        positions: bool = True,
    ) -> list[Tensor]:
        """The tokens that enter the layers: those of the image [B, 1 + N, D], of the text [B, L, D], or both.

        Args:
            masked: [B, N], patches that the mask token stands for.
            padding_mask: [B, L], words that are padding, which enter as 0.
            start: the place of the first word in its text.
            positions: whether they are added.
        """
        tokens = []
        if image is not None:
            tokens.append(
                patch_embed(
                    image,
                    read(self.patch).weight,
                    self.patch.bias,
                    prefix=self.cls_token[None],
                    pos_embed=read(self.image_position).weight[_FIRST:] if positions else None,
                    mask=None if masked is None else masked.bool(),
                    mask_token=None if masked is None else self.mask_token,
                    dtype=self.patch.weight.dtype,
                )
            )
        if text_ids is not None:
            tokens.append(
                embed_text(
                    text_ids,
                    read(self.word).weight,
                    position=read(self.text_position).weight if positions else None,
                    position_offset=_FIRST + start if positions else 0,
                    pad_mask=None if padding_mask is None or not positions else padding_mask.bool(),
                )
            )
        return tokens

    def forward(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
        sees: tuple[tuple[str, ...], ...] | None = None,
    ) -> Encoded:
        """Encode images, texts, or pairs of them.

        Args:
            image: [B, C, H, W]. text_ids: [B, L].
            padding_mask: [B, L], nonzero where the text has ended.
            masked: [B, N], nonzero where the mask token stands for a patch.
            sees: what image and text see of each other, such as `CAPTIONING`; by default everything.
        """
        return self.together([Batch(image, text_ids, padding_mask, masked)], sees)[0]

    def together(self, batches: Sequence[Batch], sees: tuple[tuple[str, ...], ...] | None = None) -> list[Encoded]:
        """Each batch encoded, all of them as one stream of rows: that of images, texts and pairs takes one forward.

        `sees` has as many rows as there are pieces: images first, then texts.
        """
        pieces, first = list[tuple[int, int, Tensor]](), 0
        parts: list[Part] = []
        for i, (image, text_ids, padding_mask, masked) in enumerate(batches):
            if image is None and text_ids is None:
                raise ValueError("image and text_ids are None, expected one of them or both")
            tokens = self.embed(image, text_ids, padding_mask, masked)
            experts = [VISION] * (image is not None) + [LANGUAGE] * (text_ids is not None)
            words = None if padding_mask is None else (padding_mask == 0).sum(1)
            for e, t in zip(experts, tokens, strict=True):
                count, length, _ = t.shape
                samples = torch.arange(first, first + count, device=t.device)
                parts.append(Part(e, count, length, samples, words if e == LANGUAGE else None))
                pieces.append((e, i, t))
            first += len(tokens[0])
        order = sorted(range(len(parts)), key=lambda k: parts[k].expert)  # an expert's rows lie together
        pieces, parts = [pieces[k] for k in order], [parts[k] for k in order]
        routing = Routing.of(parts, 2, first, pieces[0][2].device)
        x = self.encode(torch.cat([t.flatten(0, 1) for _, _, t in pieces]), routing, sees)
        found: list[dict[int, Tensor]] = [{} for _ in batches]
        for (e, i, t), rows in zip(pieces, x.split([p.sequences * p.length for p in parts]), strict=True):
            found[i][e] = rows.unflatten(0, t.shape[:2])
        return [Encoded(of.get(VISION), of.get(LANGUAGE)) for of in found]

    def encode(self, x: Tensor, routing: Routing, sees: tuple[tuple[str, ...], ...] | None = None) -> Tensor:
        """A stream of rows through the layers: [T, D]."""
        for layer in self.layers:
            x = layer(x, routing, sees)
        return x if self.norm is None else self.norm(x, routing)


def _initialise(module: nn.Module) -> None:
    """As unilm's `BEiT3Wrapper`: truncated normal of 0.02, no bias."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    elif isinstance(module, MultiwayLinear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def official(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The encoder's state from torchscale's, whose modules have a copy A for the image and B for the text."""
    left = dict(state)

    def both(name: str) -> Tensor:
        return torch.stack([left.pop(f"{name.replace('*', copy)}") for copy in "AB"])

    found: dict[str, Any] = {ours: left.pop(theirs) for ours, theirs in _OWN.items()}
    found |= {name: found[name].flatten() for name in _TOKENS}
    for of in ("weight", "bias"):
        if f"encoder.layer_norm.A.{of}" in left:
            found[f"norm.{of}"] = both(f"encoder.layer_norm.*.{of}")
        for i in range(depth):
            theirs, ours = f"encoder.layers.{i}.", f"layers.{i}."
            qkv = [both(f"{theirs}self_attn.{name}_proj.*.{of}") for name in "qkv"]
            found[f"{ours}qkv.{of}"] = torch.cat(qkv, dim=1)
            for name, other in _LAYER.items():
                found[f"{ours}{name}.{of}"] = both(f"{theirs}{other}.{of}")
    return found | left


def to_official(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """torchscale's state from the encoder's."""
    left = dict(state)
    found = {theirs: left.pop(ours) for ours, theirs in _OWN.items()}
    found |= {_OWN[name]: found[_OWN[name]].view(1, 1, -1) for name in _TOKENS}

    def split(theirs: str, experts: Tensor) -> None:
        found.update({theirs.replace("*", copy): t for copy, t in zip("AB", experts, strict=True)})

    for of in ("weight", "bias"):
        if f"norm.{of}" in left:
            split(f"encoder.layer_norm.*.{of}", left.pop(f"norm.{of}"))
        for i in range(depth):
            theirs, ours = f"encoder.layers.{i}.", f"layers.{i}."
            for name, t in zip("qkv", left.pop(f"{ours}qkv.{of}").chunk(3, 1), strict=True):
                split(f"{theirs}self_attn.{name}_proj.*.{of}", t)
            for name, other in _LAYER.items():
                split(f"{theirs}{other}.{of}", left.pop(f"{ours}{name}.{of}"))
    return found | left


def dense(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The encoder's state, of one expert, from that of torchscale's without `multiway`."""
    left, found = dict(state), dict[str, Tensor]()
    for of in ("weight", "bias"):
        if f"encoder.layer_norm.{of}" in left:
            found[f"norm.{of}"] = left.pop(f"encoder.layer_norm.{of}")
        for i in range(depth):
            theirs, ours = f"encoder.layers.{i}.", f"layers.{i}."
            found[f"{ours}qkv.{of}"] = torch.cat([left.pop(f"{theirs}self_attn.{name}_proj.{of}") for name in "qkv"])
            for name, other in _LAYER.items():
                found[f"{ours}{name}.{of}"] = left.pop(f"{theirs}{other.replace('.*', '')}.{of}")
    found |= {ours: left.pop(theirs) for ours, theirs in _OWN.items() if theirs in left}
    return found | {name: found[name].flatten() for name in _TOKENS if name in found} | left


# what has no experts
_OWN = {
    "patch.weight": "vision_embed.proj.weight",
    "patch.bias": "vision_embed.proj.bias",
    "cls_token": "vision_embed.cls_token",
    "mask_token": "vision_embed.mask_token",
    "word.weight": "text_embed.weight",
    "image_position.weight": "encoder.embed_positions.A.weight",
    "text_position.weight": "encoder.embed_positions.B.weight",
}
_TOKENS = ("cls_token", "mask_token")
_LAYER = {
    "attention_norm": "self_attn_layer_norm.*",
    "inner_norm": "self_attn.inner_attn_ln.*",
    "out": "self_attn.out_proj.*",
    "ffn_norm": "final_layer_norm.*",
    "ffn.fc1": "ffn.*.fc1",
    "ffn.norm": "ffn.*.ffn_layernorm",
    "ffn.fc2": "ffn.*.fc2",
}
