"""VLMo's Multiway transformer (Bao et al. 2021, arXiv:2111.02358): texts, images and pairs in one stream of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.multiway import MoMEBlock
from mmfuse.kernels import patch_embed
from mmfuse.kernels.multiway.routing import Part, Routing

TEXT, IMAGE, BOTH = 0, 1, 2  # the experts; the last one only in the upper blocks


class Batch(NamedTuple):
    """What enters the blocks: texts, images, or pairs of them."""

    text: Tensor | None = None  # [B, L, D]
    image: Tensor | None = None  # [B, 1 + N, D]
    words: Tensor | None = None  # int64 [B], of each text those that are no padding
    fused: bool = False  # single texts or images: also by the upper blocks' experts of pairs

    @property
    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(e, t) for e, t in ((TEXT, self.text), (IMAGE, self.image)) if t is not None]


class Hidden(NamedTuple):
    """Of a batch, after the last block and before the last norm."""

    text: Tensor | None  # [B, L, D]
    image: Tensor | None  # [B, 1 + N, D]
    fused: Tensor | None  # of a single text's or image's rows, by the experts of pairs


class MultiwayTransformer(nn.Module):
    """The blocks and the image's stem.

    Args:
        img_size, patch_size: of square images and patches. embed_dim, depth, num_heads, mlp_ratio: of the blocks.
        vlffn_start_layer_index: the first block with an expert of pairs.
        use_abs_pos_emb: positions added to the patches. need_relative_position_embed: a bias for the attention.
        layer_scale_init_values: of both branches; None for none. qkv_bias: for queries and values.
        text_len, longest_text: rows of a text, and of the longest that the table of relative positions knows.
        drop_path_rate: that of the last block; it grows linearly.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        vlffn_start_layer_index: int = 10,
        use_abs_pos_emb: bool = False,
        need_relative_position_embed: bool = True,
        layer_scale_init_values: float | None = 0.1,
        text_len: int = 40,
        longest_text: int = 196,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, expected a multiple of patch_size {patch_size}")
        self.grid, self.start, self.heads = img_size // patch_size, vlffn_start_layer_index, num_heads
        self.embed_dim, self.text_len, self.longest_text = embed_dim, text_len, longest_text
        self.patch = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(embed_dim))
        tokens = 1 + self.grid**2
        self.position = nn.Parameter(torch.zeros(tokens, embed_dim)) if use_abs_pos_emb else None
        self.blocks = nn.ModuleList(
            MoMEBlock(
                2 if i < self.start else 3,
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                layer_scale_init_values,
                drop_path=drop_path_rate * i / max(1, depth - 1),
                qkv_bias=qkv_bias,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, 1e-6)
        self.table: nn.Parameter | None = None
        if need_relative_position_embed:
            index = relative_positions(self.grid, text_len, longest_text)
            self.register_buffer("index", index, persistent=False)
            distances = (2 * self.grid - 1) ** 2 + 3 + 2 * longest_text + 2
            self.table = nn.Parameter(torch.zeros(distances, num_heads * depth))

    def embed(self, image: Tensor, type_embed: Tensor) -> Tensor:
        """The rows [B, 1 + N, D] of images [B, 3, H, W], with the embedding [D] of their kind."""
        return patch_embed(
            image,
            read(self.patch).weight,
            self.patch.bias,
            prefix=self.cls_token[None],
            pos_embed=self.position,
            type_embed=type_embed,
            dtype=self.patch.weight.dtype,
        )

    def forward(self, batches: Sequence[Batch]) -> list[Hidden]:
        """Every batch through the blocks, all of them as one stream."""
        streams, lower = list(batches), self.blocks[: self.start]
        x = _stream(t for batch in streams for _, t in batch.pieces)
        upper, biases = self.blocks[self.start :], iter(self._biases())
        routing = self._routing(streams, [False] * len(streams), 2)
        for block in lower:
            x = block(x, routing, next(biases))
        if upper:
            # single texts and images a second time, by the experts of pairs
            again = [batch for batch in batches if batch.fused]
            both = [len(batch.pieces) == 2 for batch in batches] + [True] * len(again)
            rows = zip(batches, _batches(x, streams), strict=True)
            x = _stream([x, *(t for batch, of in rows if batch.fused for t in of)])
            streams += again
            routing = self._routing(streams, both, 3)
        for block in upper:
            x = block(x, routing, next(biases))
        found = _batches(x, streams)
        fused = iter(found[len(batches) :])
        hidden = []
        for batch, of in zip(batches, found, strict=False):
            of_expert = dict(zip((e for e, _ in batch.pieces), of, strict=True))
            second = next(fused)[0] if batch.fused and upper else None
            hidden.append(Hidden(of_expert.get(TEXT), of_expert.get(IMAGE), second))
        return hidden

    def _routing(self, batches: Sequence[Batch], both: Sequence[bool], experts: int) -> Routing:
        """Of batches one after another, each by its modalities' experts or by that of both."""
        parts, samples = list[Part](), 0
        for batch, fused in zip(batches, both, strict=True):
            for modality, t in batch.pieces:
                count, length, _ = t.shape
                ids = torch.arange(samples, samples + count, device=t.device)
                words, place = (batch.words, 0) if modality == TEXT else (None, self.text_len)
                parts.append(Part(BOTH if fused else modality, count, length, ids, words, place))
            samples += count
        return Routing.of(parts, experts, samples, batches[0].pieces[0][1].device)

    def _biases(self) -> Sequence[Tensor | None]:
        """Of each block, [heads, P, P]."""
        if self.table is None:
            return [None] * len(self.blocks)
        return F.embedding(self.index, self.table).permute(2, 0, 1).split(self.heads)


def _stream(pieces: Iterable[Tensor]) -> Tensor:
    """[T, D] of rows in any shape [..., D]."""
    return torch.cat([t.flatten(0, -2) for t in pieces])


def _batches(x: Tensor, batches: Sequence[Batch]) -> list[list[Tensor]]:
    """A stream's rows as the pieces of the batches that it is made of."""
    shapes = [[t.shape[:2] for _, t in batch.pieces] for batch in batches]
    rows = iter(x.split([n * length for of in shapes for n, length in of]))
    return [[next(rows).unflatten(0, shape) for shape in of] for of in shapes]


def relative_positions(grid: int, text_len: int, longest_text: int) -> Tensor:
    """The row of the bias table for each query and key, int64 [L + 1 + N, L + 1 + N]: words first, then the image."""
    span = 2 * grid - 1
    of_image = span**2 + 3  # distances between patches, and three kinds with the class token
    last = of_image + 2 * longest_text + 2
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = (t.flatten()[:, None] - t.flatten()[None] + grid - 1 for t in (y, x))
    words = torch.arange(text_len - 1)
    distance = words[None] - words[:, None] + longest_text - 2
    text = _with_first(distance + of_image + 2, last)
    image = _with_first(y * span + x, of_image)
    n, m = len(text), len(image)
    index = torch.empty(n + m, n + m, dtype=torch.int64)
    index[:n, :n], index[n:, n:] = text, image
    index[:n, n:], index[n:, :n] = of_image, of_image + 1
    return index


def _with_first(inner: Tensor, end: int) -> Tensor:
    """The same with a first token, whose distances are the last three before `end`."""
    index = F.pad(inner, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = end - 3, end - 2, end - 1
    return index


def official(state: Mapping[str, Tensor], start: int, depth: int) -> dict[str, Tensor]:
    """The transformer's state from unilm's, in which every expert is a module."""
    left, found = _shared(state), dict[str, Tensor]()
    for ours, theirs in _experts(start, depth).items():
        found[ours] = torch.stack([left.pop(name) for name in theirs])
    return found | left


def to_official(state: Mapping[str, Tensor], start: int, depth: int) -> dict[str, Tensor]:
    """unilm's state from the transformer's."""
    left, found = dict(state), dict[str, Tensor]()
    for ours, theirs in _experts(start, depth).items():
        found |= dict(zip(theirs, left.pop(ours), strict=True))
    for key, t in left.items():
        if key == "cls_token":
            t = t.view(1, 1, -1)
        elif key == "position":
            key, t = "pos_embed", t[None]
        key = re.sub(r"^patch\.", "patch_embed.proj.", key)
        found[re.sub(r"(blocks\.\d+)\.(qkv|proj|q_bias|v_bias)", r"\1.attn.\2", key)] = t
    return found


def dense(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The transformer's state, of one expert, from BEiT's, without its heads and its last norm.

    Its table of relative positions is that of every block, one after another; the first rows of ours.
    """
    heads, tables = ("head", "lm_head", "fc_norm", "norm", "mask_token", "rel_pos_bias"), list[Tensor]()
    left = {k: t for k, t in state.items() if k.partition(".")[0] not in heads and "relative_position" not in k}
    for i in range(depth):
        of_all, own = (f"{of}.relative_position_bias_table" for of in ("rel_pos_bias", f"blocks.{i}.attn"))
        tables += [state[name] for name in (of_all, own) if name in state]
    return _shared(left) | ({"table": torch.cat(tables, dim=1)} if tables else {})


def _shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With our names for what has no experts."""
    found = {}
    for key, t in state.items():
        if key == "cls_token":
            t = t.flatten()
        elif key == "pos_embed":
            key, t = "position", t.squeeze(0)
        found[key.replace("patch_embed.proj.", "patch.").replace(".attn.", ".")] = t
    return found


def _experts(start: int, depth: int) -> dict[str, list[str]]:
    """The official names of each parameter that has experts."""
    found = {}
    for i in range(depth):
        experts = ("text", "imag", "vl") if i >= start else ("text", "imag")
        for theirs, ours in (("norm2_{}", "norm2"), ("mlp_{}.fc1", "mlp.fc1"), ("mlp_{}.fc2", "mlp.fc2")):
            for of in ("weight", "bias"):
                found[f"blocks.{i}.{ours}.{of}"] = [f"blocks.{i}.{theirs.format(e)}.{of}" for e in experts]
    return found
