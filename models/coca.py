"""CoCa (Yu et al. 2022, arXiv:2205.01917) as open_clip builds it, under its key names: two towers and a decoder."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import linear_cross_entropy, vit_tokens
from mmfuse.fused.acceleration.plain import read
from mmfuse.fused.captioning import CaptionDecoder, attend, generate, project, residual, visible_keys
from mmfuse.fused.poolers import AttentionalPooler
from mmfuse.kernels import clip_loss
from mmfuse.kernels.text import embed_text
from mmfuse.models.registry import System, check_keys, instantiate

Norm = Callable[[int], nn.Module]
Config = TypeVar("Config", bound="BlockConfig")


@dataclass
class BlockConfig:
    """What the configs of the image and the text tower share."""

    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None  # of the layer scale, if there is one
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None
    final_ln_after_pool: bool = False
    output_tokens: bool = False  # no effect: both towers return their tokens
    block_type: str | None = None  # "custom", or None with one of the following, for a block that has them
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    def block(self, width: int, heads: int, act: Callable[..., nn.Module], **more: Any) -> Block:
        return Block(width, heads, self.mlp_ratio, self.ls_init_value, act, self.norm, **self.switches, **more)

    @property
    def norm(self) -> Norm:
        return partial(nn.LayerNorm, **self.norm_kwargs or {})

    @property
    def switches(self) -> dict[str, bool]:
        if self.scaled_cosine_attn:
            raise ValueError("scaled_cosine_attn is True, expected False: open_clip's own code fails with it")
        names = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
        switches = {name: getattr(self, name) for name in names}
        custom = any(switches.values()) if self.block_type is None else self.block_type == "custom"
        return {"custom": True, **switches} if custom else {}


@dataclass
class VisionConfig(BlockConfig):
    width: int = 768
    head_width: int = 64
    patch_size: int | tuple[int, int] = 16
    image_size: int | tuple[int, int] = 224
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    pool_type: str = "tok"


@dataclass
class TextConfig(BlockConfig):
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2  # of pool_type "eos"
    no_causal_mask: bool = False
    use_pad_mask: bool = False  # without causal mask
    correct_cls_mask: bool = False  # False: the padding mask shifted by one that published weights were trained with
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"


# official keys that choose a tokenizer, or belong to another tower, which is refused
ELSEWHERE = {
    "vision_cfg": ("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop")
    + ("timm_drop_path",),
    "text_cfg": ("hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_name")
    + ("tokenizer_mode", "tokenizer_kwargs"),
    "multimodal_cfg": ("dim_head", "n_queries", "attn_pooler_heads"),
}
ELSEWHERE["multimodal_cfg"] += ELSEWHERE["text_cfg"]


# --- blocks ----------------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`; a `custom` one has open_clip's options."""

    def __init__(
        self,
        width: int,
        heads: int,
        norm: Norm = nn.LayerNorm,
        custom: bool = False,
        qk_norm: bool = False,
        scale_heads: bool = False,
        inner_norm: bool = False,
    ):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width is {width} with {heads} attention heads, expected a multiple of the heads")
        self.num_heads = heads
        self.in_proj_weight = weight = nn.Parameter(torch.empty(3 * width, width))
        nn.init.normal_(weight, std=(width // heads) ** -0.5) if custom else nn.init.xavier_uniform_(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.ln_q, self.ln_k = (norm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.head_scale = nn.Parameter(torch.ones(heads, 1, 1)) if scale_heads else None
        self.ln_inner = norm(width) if inner_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        if not custom:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x [B, L, width] attends to itself or to context [B, K, width]. mask: True where a key is seen."""
        if context is None:
            q, k, v = project(self, x, 0, 3)
        else:
            (q,), (k, v) = project(self, x, 0, 1), project(self, context, 1, 3)
        return attend(self, q, k, v, mask, causal)


class Block(nn.Module):
    """A pre-norm block of self-attention, or with `cross` of attention to other tokens, which have their own norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        ls_init_value: float | None,
        act: Callable[..., nn.Module],
        norm: Norm,
        cross: bool = False,
        custom: bool = False,
        qk_norm: bool = False,
        scale_heads: bool = False,
        scale_attn_inner: bool = False,
        scale_attn: bool = False,
        scale_fc: bool = False,
    ):
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)

        hidden = int(width * mlp_ratio)
        self.ln_1 = norm(width)
        self.attn = Attention(width, heads, norm, custom, qk_norm, scale_heads, scale_attn_inner)
        self.ln_attn = norm(width) if scale_attn else nn.Identity()
        self.ls_1 = scale()
        if cross:
            self.ln_1_kv = norm(width)
        self.ln_2 = norm(width)
        mlp = [("c_fc", nn.Linear(width, hidden)), ("gelu", act())]
        mlp += [("ln", norm(hidden))] if scale_fc else []
        self.mlp = nn.Sequential(OrderedDict([*mlp, ("c_proj", nn.Linear(hidden, width))]))
        self.ls_2 = scale()

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        context = None if context is None else self.ln_1_kv(context)
        return residual(self, x, self.attn(self.ln_1(x), context, mask, causal))


class Blocks(nn.Module):
    def __init__(self, *blocks: Block):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def initialize(self) -> None:
        """As open_clip does in its text tower alone."""
        block: Any
        for block in self.resblocks:
            width = block.attn.out_proj.in_features
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * len(self.resblocks)) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * len(self.resblocks)) ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask=mask, causal=causal)
        return x


# --- the image tower -------------------------------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """image [B, 3, H, W] -> its latent [B, embed_dim], and the tokens [B, S, width or embed_dim] of the decoder."""

    def __init__(self, embed_dim: int, config: VisionConfig, act: Callable[..., nn.Module]):
        super().__init__()
        c = config
        if not isinstance(c.layers, int):
            raise ValueError(f"layers is {c.layers}, expected an integer: a ResNet gives the decoder no tokens")
        self.image_size, patch = _pair(c.image_size), _pair(c.patch_size)
        grid = self.image_size[0] // patch[0], self.image_size[1] // patch[1]
        self.patch_dropout, self.pool, self.pool_type = c.patch_dropout, c.attentional_pool, c.pool_type
        self.final_ln_after_pool = c.final_ln_after_pool
        _check_choice("pool_type", c.pool_type, ("tok", "avg", "none"))
        _check_choice("pos_embed_type", c.pos_embed_type, ("learnable", "sin_cos_2d"))
        _check_choice("attentional_pool", c.attentional_pool, (False, True, "parallel", "cascade"))
        scale = c.width**-0.5
        self.conv1 = nn.Conv2d(3, c.width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(c.width))
        if c.pos_embed_type == "learnable":
            self.positional_embedding = nn.Parameter(scale * torch.randn(grid[0] * grid[1] + 1, c.width))
        else:
            self.positional_embedding = nn.Parameter(_sin_cos_2d(grid, c.width), requires_grad=False)
        self.ln_pre = nn.Identity() if c.no_ln_pre else c.norm(c.width)
        heads = c.width // c.head_width
        self.transformer = Blocks(*(c.block(c.width, heads, act) for _ in range(c.layers)))
        pooled = embed_dim if c.attentional_pool else c.width
        if c.attentional_pool:
            self.attn_pool = AttentionalPooler(embed_dim, c.width, c.attn_pooler_heads, c.attn_pooler_queries)
        if isinstance(c.attentional_pool, str):
            if c.width != embed_dim:
                raise ValueError(f"width is {c.width}, expected embed_dim = {embed_dim} for a {self.pool} pooler")
            self.attn_pool_contrastive = AttentionalPooler(embed_dim, c.width, c.attn_pooler_heads, 1)
        self.ln_post = c.norm(pooled)
        self.proj = nn.Parameter(scale * torch.randn(pooled, embed_dim))

    def forward(self, image: Tensor, patch_scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keep = None
        if self.training and self.patch_dropout > 0:  # of random patches (Li et al. 2022, arXiv:2212.00794)
            patches = len(self.positional_embedding) - 1
            scores = torch.randn(image.shape[0], patches) if patch_scores is None else patch_scores
            keep = scores.topk(max(1, int(patches * (1 - self.patch_dropout)))).indices.to(image.device)
        x = vit_tokens(image, self.conv1, self.class_embedding, self.positional_embedding, ids_keep=keep)
        pooled, tokens = self._pool(self.transformer(self.ln_pre(x)))
        return pooled @ self.proj, tokens

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.pool, str):
            x = self.ln_post(x)
            tokens = self.attn_pool(x)
            return self.attn_pool_contrastive(x if self.pool == "parallel" else tokens), tokens
        if self.pool:
            return self._global_pool(self.ln_post(self.attn_pool(x)))
        if self.final_ln_after_pool:
            pooled, tokens = self._global_pool(x)
            return self.ln_post(pooled), tokens
        return self._global_pool(self.ln_post(x))

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.pool_type == "none":
            return x, x
        return x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(1), x[:, 1:]


def _sin_cos_2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions [1 + patches, width]: zeros for the class token, then sines and cosines of row and column."""
    if grid[0] != grid[1] or width % 4:
        raise ValueError(f"pos_embed_type is 'sin_cos_2d' with {grid} patches and width {width}, expected as many rows")
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    # open_clip's meshgrid has the columns first
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [t.flatten()[:, None] * omega for t in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()


# --- the text tower and the decoder ----------------------------------------------------------------------------------


class TextTransformer(nn.Module):
    """text [B, L] -> its latent [B, embed_dim], and its tokens [B, L, width] without norm where there is a class token.

    The learned class token comes last. It and the ids see what `visible_keys` says.
    """

    def __init__(self, embed_dim: int, config: TextConfig, act: Callable[..., nn.Module]):
        super().__init__()
        c = config
        _check_choice("text pool_type", c.pool_type, ("first", "last", "argmax", "eos", "none"))
        self.context_length, self.pad_id, self.eos_id = c.context_length, c.pad_id, c.eos_id
        self.pool_type, self.correct_cls_mask = c.pool_type, c.correct_cls_mask
        self.use_pad_mask = c.use_pad_mask and c.no_causal_mask
        positions = c.context_length + c.embed_cls
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.cls_emb = nn.Parameter(torch.empty(c.width)) if c.embed_cls else None
        self.positional_embedding = nn.Parameter(torch.empty(positions, c.width))
        self.transformer = Blocks(*(c.block(c.width, c.heads, act) for _ in range(c.layers)))
        self.ln_final = c.norm(c.width)
        causal = None if c.no_causal_mask else torch.ones(positions, positions, dtype=torch.bool).tril()
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", causal, persistent=False)
        self.text_projection: Any = None
        if c.proj_type != "none":
            linear = nn.Linear(c.width, embed_dim)
            self.text_projection = linear if c.proj_bias else nn.Parameter(torch.empty(c.width, embed_dim))
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.cls_emb is not None:
            nn.init.normal_(self.cls_emb, std=0.01)
        self.transformer.initialize()
        std = self.token_embedding.embedding_dim**-0.5
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=std)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=std)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        x = embed_text(text, read(self.token_embedding).weight, position=self.positional_embedding)
        if self.cls_emb is not None:
            last = self.cls_emb + self.positional_embedding[text.shape[1]]
            x = torch.cat([x, last.expand(x.shape[0], 1, -1)], dim=1)
        mask, causal = self._mask(text), self.attn_mask is not None
        x = self.transformer(x, mask, causal=causal and mask is None)
        if self.cls_emb is not None:
            return self._project(self.ln_final(x[:, -1])), x[:, :-1]
        x = self.ln_final(x)
        return self._project(self._pool(x, text)), x

    def _mask(self, text: Tensor) -> Tensor | None:
        """Where a query sees a key: [B, 1, L + 1 or 1, L + 1], or [B, 1, 1, L]; None for no more than causality."""
        if self.cls_emb is not None:
            visible = visible_keys(self, text)[:, None, None]
            n = visible.shape[-1]
            return visible if self.attn_mask is None else visible & self.attn_mask[:n, :n]
        return (text != self.pad_id)[:, None, None] if self.use_pad_mask else None

    def _pool(self, x: Tensor, text: Tensor) -> Tensor:
        if self.pool_type == "none":
            return x
        if self.pool_type in ("first", "last"):
            return x[:, 0 if self.pool_type == "first" else -1]
        which = text if self.pool_type == "argmax" else (text == self.eos_id).int()
        return x[torch.arange(x.shape[0], device=x.device), which.argmax(-1)]

    def _project(self, pooled: Tensor) -> Tensor:
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled @ self.text_projection


class MultimodalTransformer(nn.Module):
    """The captioning decoder: after every causal block of the text comes a block of attention to the image."""

    def __init__(self, vocab_size: int, config: TextConfig, act: Callable[..., nn.Module]):
        super().__init__()
        # open_clip passes on neither the MLP's ratio nor the blocks' options
        block = partial(Block, config.width, config.heads, 4.0, config.ls_init_value, act, nn.LayerNorm)
        self.context_length = config.context_length
        self.resblocks = nn.ModuleList(block() for _ in range(config.layers))
        self.cross_attn = nn.ModuleList(block(cross=True) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, vocab_size))
        nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def hidden(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        """image_tokens [B, S, width], text_tokens [B, L, width] -> [B, L, width], the logits but for the projection."""
        x = text_tokens
        if x.shape[1] > self.context_length:
            raise ValueError(f"text_tokens has {x.shape[1]} tokens, expected at most {self.context_length}")
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            x = cross(block(x, causal=True), image_tokens)
        return self.ln_final(x)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        """The logits [B, L, vocab_size]."""
        return self.hidden(image_tokens, text_tokens) @ self.text_projection


class CoCa(nn.Module):
    """A contrastive and a generative model in one. The arguments are those of open_clip's constructor.

    Args:
        embed_dim: width of the common space.
        vision_cfg, text_cfg, multimodal_cfg: open_clip's configs, as mappings. Of `multimodal_cfg` it reads
            context_length, width, heads, layers and ls_init_value alone: the vocabulary is `text_cfg`'s, the MLP's
            ratio 4. With an attentional pooler the decoder is embed_dim wide, otherwise as wide as the image tower.
        quick_gelu: x sigmoid(1.702 x) for GELU, in all three.
        init_logit_scale, init_logit_bias, nonscalar_logit_scale: of the logits; the loss does not see the bias.
        pad_id: what `loss` does not count, and `generate` pads with.
        caption_loss_weight, clip_loss_weight: of `loss`.
    """

    def __init__(
        self,
        embed_dim: int,
        multimodal_cfg: Mapping[str, Any],
        text_cfg: Mapping[str, Any],
        vision_cfg: Mapping[str, Any],
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        pad_id: int = 0,
        caption_loss_weight: float = 2.0,
        clip_loss_weight: float = 1.0,
    ):
        super().__init__()
        vision = _config(VisionConfig, "vision_cfg", vision_cfg)
        text = _config(TextConfig, "text_cfg", text_cfg)
        multimodal = _config(TextConfig, "multimodal_cfg", multimodal_cfg)
        act = QuickGELU if quick_gelu else nn.GELU
        image_width = embed_dim if vision.attentional_pool else vision.width
        for name, width in (("the image tokens'", image_width), ("text_cfg's", text.width)):
            if width != multimodal.width:
                raise ValueError(f"multimodal_cfg's width is {multimodal.width}, expected {name} {width}")
        self.embed_dim, self.image_resolution, self.pad_id = embed_dim, vision.image_size, pad_id
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self.visual = VisionTransformer(embed_dim, vision, partial(act, **vision.act_kwargs or {}))
        self.text = TextTransformer(embed_dim, text, partial(act, **text.act_kwargs or {}))
        self.text_decoder = MultimodalTransformer(text.vocab_size, multimodal, act)
        shape = (1,) if nonscalar_logit_scale else ()
        self.logit_scale = nn.Parameter(torch.full(shape, float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.full(shape, float(init_logit_bias)))

    def _encode_image(self, image: Tensor, patch_scores: Tensor | None) -> tuple[Tensor, Tensor]:
        expected = (3, *self.visual.image_size)
        if image.shape[1:] != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected [B, {', '.join(map(str, expected))}]")
        return self.visual(image.to(self.visual.proj.dtype), patch_scores)

    def _encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        if text.dim() != 2 or text.shape[1] > self.text.context_length:
            raise ValueError(
                f"text has shape {tuple(text.shape)}, expected [B, L] with L <= {self.text.context_length}"
            )
        return self.text(text)

    def encode_image(self, image: Tensor, normalize: bool = True, patch_scores: Tensor | None = None) -> Tensor:
        """Image features [B, embed_dim] of normalised pixels [B, 3, H, W].

        patch_scores: random numbers [B, patches]; in training, `patch_dropout` keeps the patches with the highest.
        """
        latent, _ = self._encode_image(image, patch_scores)
        return F.normalize(latent, dim=-1) if normalize else latent

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Text features [B, embed_dim] of token ids [B, L]."""
        latent, _ = self._encode_text(text)
        return F.normalize(latent, dim=-1) if normalize else latent

    def forward(
        self,
        image: Tensor,
        text: Tensor | None = None,
        image_latent: Tensor | None = None,
        image_embs: Tensor | None = None,
        output_labels: bool = True,
        patch_scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """open_clip's dictionary.

        Without text: `image_features` [B, embed_dim] and `image_embs` [B, S, width], which a later call may be given
        instead of the image. With text [B, L]: `image_features`, `text_features`, `logits` [B, L - 1, vocab_size] of
        the `labels` [B, L - 1], the ids that follow, `logit_scale` (its exponential) and `logit_bias`, if there is
        one. Without `output_labels` the logits are [B, L, vocab_size].
        """
        if image_latent is None or image_embs is None:
            latent, image_embs = self._encode_image(image, patch_scores)
            image_latent = F.normalize(latent, dim=-1)
        if text is None:
            return {"image_features": image_latent, "image_embs": image_embs}
        latent, tokens = self._encode_text(text)
        out = {
            "image_features": image_latent,
            "text_features": F.normalize(latent, dim=-1),
            "logits": self.text_decoder(image_embs, tokens[:, :-1] if output_labels else tokens),
            "logit_scale": self.logit_scale.exp(),
        }
        if output_labels:
            out["labels"] = text[:, 1:]
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def losses(self, image: Tensor, text: Tensor, patch_scores: Tensor | None = None) -> dict[str, Tensor]:
        """open_clip's `CoCaLoss` of a batch of pairs, weighted: `contrastive_loss` and `caption_loss`.

        Neither the B x B logits nor those of the captions, [B, L - 1, vocab_size], are formed as a whole.
        """
        image_latent, image_tokens = self._encode_image(image, patch_scores)
        text_latent, tokens = self._encode_text(text)
        hidden = self.text_decoder.hidden(image_tokens, tokens[:, :-1])
        caption = linear_cross_entropy(
            hidden, self.text_decoder.text_projection.t(), text[:, 1:], ignore_index=self.pad_id
        )
        if self.clip_loss_weight:
            contrastive = clip_loss(image_latent, text_latent, self.logit_scale.exp(), normalize=True)
            contrastive = self.clip_loss_weight * contrastive
        else:
            contrastive = torch.zeros((), dtype=torch.long, device=hidden.device)  # as there
        return {"contrastive_loss": contrastive, "caption_loss": self.caption_loss_weight * caption}

    def loss(self, image: Tensor, text: Tensor, patch_scores: Tensor | None = None) -> Tensor:
        """The sum of `losses`."""
        losses = self.losses(image, text, patch_scores)
        return losses["contrastive_loss"] + losses["caption_loss"]

    def captioner(self, image: Tensor) -> CaptionDecoder:
        """A decoder of captions of images [B, 3, H, W], for a loop of one's own."""
        return CaptionDecoder(self, self(image)["image_embs"])

    def generate(self, image: Tensor, text: Tensor | None = None, **options: Any) -> Tensor:
        """Captions of images [B, 3, H, W]: `mmfuse.fused.captioning.generate` says which `options` there are."""
        return generate(self, image, text, **options)


def _config(cls: type[Config], name: str, given: Mapping[str, Any]) -> Config:
    fields = [f.name for f in dataclasses.fields(cls)]
    try:
        check_keys(given, [*fields, *ELSEWHERE[name]])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for key in ("timm_model_name", "hf_model_name"):
        if given.get(key):
            raise ValueError(f"{name}: {key} is {given[key]!r}, expected None: only open_clip's own towers are here")
    return cls(**{key: value for key, value in given.items() if key in fields})


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def build(config: Mapping[str, Any]) -> CoCa:
    """CoCa from its constructor's arguments, plain or as {"model": arguments, "loss": CoCaLoss's arguments}.

    `custom_text`, which open_clip's files have beside the arguments, is ignored. The loss's `pad_id` is by default the
    model's.
    """
    if "model" in config:
        check_keys(config, ("model", "loss"))
        loss = config.get("loss", {})
        check_keys(loss, ("caption_loss_weight", "clip_loss_weight", "pad_id"))
        config = {**config["model"], **loss}
    return instantiate(CoCa, {key: value for key, value in config.items() if key != "custom_text"})


def _published(embed_dim: int, patch: int, vision: int, layers: int, width: int, heads: int) -> dict[str, Any]:
    text = {"context_length": 76, "vocab_size": 49408, "width": width, "heads": heads, "layers": 12}
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": 224,
            "layers": layers,
            "width": vision,
            "patch_size": patch,
            "attentional_pool": True,
            "attn_pooler_heads": 8,
            "output_tokens": True,
        },
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": heads},
    }


_BASE_TEXT = {"context_length": 76, "vocab_size": 64000, "width": 768, "heads": 12, "layers": 12}

SYSTEM = System(
    build=build,
    presets={
        "coca_base": {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 288, "layers": 12, "width": 768, "patch_size": 18, "output_tokens": True},
            "text_cfg": {**_BASE_TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**_BASE_TEXT, "dim_head": 64, "n_queries": 256, "attn_pooler_heads": 8},
        },
        "coca_ViT-B-32": _published(512, 32, 768, 12, 512, 8),
        "coca_ViT-L-14": _published(768, 14, 1024, 24, 768, 12),
    },
    paper="arXiv:2205.01917",
)
