"""CLIP (Radford et al. 2021, arXiv:2103.00020) with its ViT and ResNet image towers, under the official key names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import vit_tokens
from mmfuse.fused.acceleration.plain import read
from mmfuse.kernels import clip_loss
from mmfuse.kernels.head import select_head
from mmfuse.kernels.text import embed_text
from mmfuse.models.registry import System, check_keys, instantiate


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))  # QuickGELU


class Attention(nn.Module):
    """Self-attention with the parameters and the initialisation of `nn.MultiheadAttention`. x: [B, L, width]."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        _check_heads(width, heads)
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, width / heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool = False):
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads, causal) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """image [B, 3, H, W] -> features [B, output_dim], from the class token."""

    def __init__(self, image_resolution: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int):
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, image: Tensor) -> Tensor:
        x = vit_tokens(image, self.conv1, self.class_embedding, self.positional_embedding)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """A residual block whose convolutions have stride 1: an average pool makes the stride."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        outplanes = 4 * planes
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample = None
        if stride > 1 or inplanes != outplanes:
            pool, conv = nn.AvgPool2d(stride), nn.Conv2d(inplanes, outplanes, 1, bias=False)
            self.downsample = nn.Sequential(
                OrderedDict([("-1", pool), ("0", conv), ("1", nn.BatchNorm2d(outplanes))]),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + identity)


class AttentionPool2d(nn.Module):
    """[B, C, H, W] -> [B, output_dim]: the mean token attends over itself and every position."""

    def __init__(self, grid: int, width: int, heads: int, output_dim: int):
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(nn.Module):
    """image [B, 3, H, W] -> features [B, output_dim]: a ResNet with a three-convolution stem and attention pooling."""

    def __init__(self, image_resolution: int, layers: Sequence[int], width: int, heads: int, output_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = self._layer(width, width, layers[0], stride=1)
        self.layer2 = self._layer(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self._layer(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self._layer(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool2d(image_resolution // 32, 32 * width, heads, output_dim)

    @staticmethod
    def _layer(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(inplanes, planes, stride)
        return nn.Sequential(first, *(Bottleneck(4 * planes, planes, stride=1) for _ in range(blocks - 1)))

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)


class CLIP(nn.Module):
    """An image tower and a causal text tower into one space. The arguments are the official constructor's.

    Args:
        embed_dim: width of the common space.
        image_resolution: height and width of the input image.
        vision_layers: number of blocks (ViT), or four numbers of residual blocks (ResNet).
        vision_width, vision_patch_size: of the image tower; a ResNet has no patch size.
        context_length, vocab_size, transformer_width, transformer_heads, transformer_layers: of the text tower.
        vision_heads: attention heads of the image tower, by default the official one per 64 channels.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | Sequence[int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        vision_heads: int | None = None,
    ):
        super().__init__()
        self.embed_dim, self.image_resolution, self.context_length = embed_dim, image_resolution, context_length
        if isinstance(vision_layers, int):
            if vision_patch_size is None:
                raise ValueError("vision_patch_size is None, expected an integer for a ViT")
            heads = vision_heads or vision_width // 64
            self.visual: VisionTransformer | ModifiedResNet = VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers, heads, embed_dim
            )
        else:
            if len(vision_layers) != 4:
                raise ValueError(f"vision_layers is {vision_layers}, expected an integer (ViT) or four (ResNet)")
            heads = vision_heads or vision_width * 32 // 64
            self.visual = ModifiedResNet(image_resolution, vision_layers, vision_width, heads, embed_dim)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, layers = self.ln_final.normalized_shape[0], len(self.transformer.resblocks)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for module in self.transformer.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.in_proj_weight, std=width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=(2 * width * layers) ** -0.5)
            elif isinstance(module, MLP):
                nn.init.normal_(module.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.c_proj.weight, std=(2 * width * layers) ** -0.5)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def encode_image(self, image: Tensor) -> Tensor:
        """Image features [B, embed_dim], not normalised, of normalised pixels [B, 3, R, R], R = image_resolution."""
        expected = (3, self.image_resolution, self.image_resolution)
        if image.shape[1:] != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected [B, {', '.join(map(str, expected))}]")
        return self.visual(image.to(self.text_projection.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        """Text features [B, embed_dim], not normalised, from the position of each row's highest id (its end token).

        text: token ids [B, L], L <= context_length. Later positions cannot be seen, so padding needs no mask.
        """
        if text.dim() != 2 or text.shape[1] > self.context_length:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected [B, L] with L <= {self.context_length}")
        x = self.transformer(embed_text(text, read(self.token_embedding).weight, position=self.positional_embedding))
        norm = read(self.ln_final).weight, self.ln_final.bias, self.ln_final.eps
        return select_head(x, text.argmax(-1), norm, self.text_projection.t(), normalize=False)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities: logits_per_image [B_image, B_text], logits_per_text [B_text, B_image]."""
        image, text = self.encode_image(image), self.encode_text(text)
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The symmetric contrastive loss of a batch of pairs (figure 3), without forming its logits."""
        return clip_loss(self.encode_image(image), self.encode_text(text), self.logit_scale.exp(), normalize=True)

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a published archive, without the three sizes that it stores beside them."""
        sizes = ("input_resolution", "context_length", "vocab_size")
        return {key: t for key, t in state_dict.items() if key not in sizes}


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"width is {width} with {heads} attention heads, expected a multiple of the heads")


def build(config: Mapping[str, Any]) -> CLIP:
    """CLIP from its constructor's arguments, plain or as {"model": arguments, "vision_heads_override": heads}."""
    if "model" not in config:
        return instantiate(CLIP, config)
    check_keys(config, ("model", "vision_heads_override"))
    return instantiate(CLIP, {**config["model"], "vision_heads": config.get("vision_heads_override")})


def _published(
    embed_dim: int,
    image_resolution: int,
    vision_layers: int | tuple[int, ...],
    vision_width: int,
    vision_patch_size: int | None,
    transformer_width: int,
) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "image_resolution": image_resolution,
        "vision_layers": vision_layers,
        "vision_width": vision_width,
        "vision_patch_size": vision_patch_size,
        "context_length": 77,
        "vocab_size": 49408,
        "transformer_width": transformer_width,
        "transformer_heads": transformer_width // 64,
        "transformer_layers": 12,
    }


SYSTEM = System(
    build=build,
    presets={
        "rn50": _published(1024, 224, (3, 4, 6, 3), 64, None, 512),
        "rn101": _published(512, 224, (3, 4, 23, 3), 64, None, 512),
        "rn50x4": _published(640, 288, (4, 6, 10, 6), 80, None, 640),
        "vit-b-32": _published(512, 224, 12, 768, 32, 512),
        "vit-b-16": _published(512, 224, 12, 768, 16, 512),
        "vit-l-14": _published(768, 224, 24, 1024, 14, 768),
        "vit-l-14-336": _published(768, 336, 24, 1024, 14, 768),
    },
    paper="arXiv:2103.00020",
)
