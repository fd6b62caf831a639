"""A small model for every rule of `accelerate()`, how to run it, and a child that the rule reads or passes over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip_coca
from mmfuse._compat import allow_torchvision

allow_torchvision()

HF = "transformers.models."
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Sample:
    """`make()` a model in float64 and evaluation; `run(model, dtype)` gives its output.

    Args:
        child: the path of a module that fused code reads, or of one that is called where there is none to read.
        weight: a parameter of that child, for tools that replace it.
        ops: of rules that are opt-in.
        init: draw all weights.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.dtype], Tensor]
    child: str
    weight: str | None = "weight"
    ops: tuple[str, ...] | None = None
    init: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for name, p in model.named_parameters():
            if self.init and "logit_" not in name:
                nn.init.normal_(p, std=0.3)
        return model.double().eval()

    def __call__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(1)
        return self.run(model, dtype)


def images(model: nn.Module, dtype: torch.dtype, size: int = 16) -> Tensor:
    return first(model(torch.randn(2, 3, size, size, dtype=dtype)))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class Step(nn.Module):
    """A linear layer on either side, and a loss."""

    def __init__(self, loss: Any, bias: float | None = None) -> None:
        super().__init__()
        self.image, self.text, self.loss = nn.Linear(6, 8), nn.Linear(6, 8), loss
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        pair = [F.normalize(f(x), dim=-1) for f, x in ((self.image, image), (self.text, text))]
        name = type(self.loss).__name__
        if name == "CoCaLoss":
            labels = torch.arange(4, device=text.device).expand(len(text), 4)
            return sum(self.loss(*pair, image.view(-1, 1, 6).expand(-1, 4, 6), labels, self.logit_scale.exp()))
        if name == "DistillClipLoss":
            return sum(self.loss(*pair, self.logit_scale.exp(), F.normalize(image), F.normalize(text), 9.0))
        return self.loss(*pair, self.logit_scale.exp(), self.logit_bias)


def loss(name: str, *args: Any, bias: float | None = None) -> Sample:
    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return model(*torch.randn(2, 5, 6, dtype=dtype))

    return Sample(lambda: Step(getattr(import_module("open_clip.loss"), name)(*args), bias), run, "image")


def hf_pair(name: str, op: str) -> Sample:
    def make() -> nn.Module:
        library = import_module("transformers")
        text = TOWER | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
        return getattr(library, f"{name}Model")(
            getattr(library, f"{name}Config")(text_config=text, vision_config=VISION)
        )

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        ids = torch.randint(0, 48, (5, 8))
        ids[:, -1] = 49
        return model(input_ids=ids, pixel_values=torch.randn(5, 3, 16, 16, dtype=dtype), return_loss=True).loss

    return Sample(make, run, "vision_model.embeddings.patch_embedding", ops=(op, "patch_embed"))


def embeddings(module: str, cls: str, config: str, child: str = "patch_embedding", **options: Any) -> Sample:
    """The embeddings alone."""

    def make() -> nn.Module:
        library = import_module(f"{HF}{module}.modeling_{module}")
        return getattr(library, cls)(getattr(import_module("transformers"), config)(**VISION | options))

    return Sample(make, images, child)


def qwen(module: str, cls: str, **options: Any) -> Sample:
    def make() -> nn.Module:
        return getattr(import_module(f"{HF}{module}.modeling_{module}"), cls)(**options)

    return Sample(make, lambda model, dtype: model(torch.randn(6, 96, dtype=dtype)), "proj")


def timm_stem(cls: str) -> Sample:
    def make() -> nn.Module:
        norm = partial(nn.LayerNorm, eps=1e-5)
        return getattr(import_module("timm.layers.patch_embed"), cls)(16, 8, 3, 16, norm_layer=norm)

    return Sample(make, images, "proj")


def timm_vit() -> nn.Module:
    cls = import_module("timm.models.vision_transformer").VisionTransformer
    return cls(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, pre_norm=True)


def open_clip_vit() -> nn.Module:
    cls = import_module("open_clip.transformer").VisionTransformer
    return cls(16, 8, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)


def naflex() -> nn.Module:
    library = import_module("timm.models.naflexvit")
    cfg = library.NaFlexVitCfg(patch_size=4, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(4, 4))
    return library.NaFlexVit(cfg, num_classes=5).embeds


def naflex_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    row = torch.arange(12).expand(2, 12)
    return model(torch.randn(2, 12, 48, dtype=dtype), torch.stack([row // 4, row % 4], -1))[0]


def siglip2() -> nn.Module:
    library = import_module("transformers")
    config = library.Siglip2VisionConfig(**TOWER | {"patch_size": 4, "num_patches": 16})
    return import_module(f"{HF}siglip2.modeling_siglip2").Siglip2VisionEmbeddings(config)


def siglip2_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return model(torch.randn(2, 16, 48, dtype=dtype), torch.tensor([[4, 4], [4, 4]]))


def coca_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    options = open_clip_coca.SAY | {"generation_type": "top_k", "top_k": 30, "temperature": 4.0}
    return model.generate(torch.randn(4, 3, 20, 20, dtype=dtype), **options)


def vector_quantize() -> nn.Module:
    return import_module("vector_quantize_pytorch").VectorQuantize(dim=6, codebook_size=9, codebook_dim=4)


QFORMER = TOWER | {"encoder_hidden_size": 12, "vocab_size": 20, "max_position_embeddings": 8}


def qformer(module: str, prefix: str) -> Sample:
    """Three queries and two text tokens over images of nine; the first of two layers sees the image."""

    def make() -> nn.Module:
        config = getattr(import_module("transformers"), f"{prefix}Config")(**QFORMER | {"num_hidden_layers": 2})
        config.use_qformer_text_input, config._attn_implementation = True, "sdpa"
        return getattr(import_module(f"{HF}{module}.modeling_{module}"), f"{prefix}Encoder")(config)

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        h, x = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 9, 12, dtype=dtype)
        return first(model(h, encoder_hidden_states=x, query_length=3))

    return Sample(make, run, "layer.0.crossattention.attention.key")


def blip2_qformer() -> Sample:
    def make() -> nn.Module:
        library = import_module("transformers")
        config = library.Blip2QFormerConfig(**QFORMER)
        return import_module(f"{HF}blip_2.modeling_blip_2").Blip2QFormerModel(config)

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        query, x = torch.randn(1, 3, 16, dtype=dtype), torch.randn(2, 9, 12, dtype=dtype)
        return first(model(query.expand(2, -1, -1), encoder_hidden_states=x))

    return Sample(make, run, "encoder.layer.0.crossattention.attention.value")


def blip_text() -> Sample:
    def make() -> nn.Module:
        config = import_module("transformers").BlipTextConfig(**TOWER | {"encoder_hidden_size": 12, "is_decoder": True})
        config._attn_implementation = "eager"
        return import_module(f"{HF}blip.modeling_blip_text").BlipTextEncoder(config)

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        h, x = torch.randn(2, 3, 16, dtype=dtype), torch.randn(2, 9, 12, dtype=dtype)
        return model(h, encoder_hidden_states=x)[0]

    return Sample(make, run, "layer.0.crossattention.self.key")


def pooling_head(module: str, prefix: str) -> Sample:
    def make() -> nn.Module:
        config = getattr(import_module("transformers"), f"{prefix}VisionConfig")(**TOWER)
        head = f"{prefix}MultiheadAttentionPoolingHead"
        return getattr(import_module(f"{HF}{module}.modeling_{module}"), head)(config)

    return Sample(make, lambda model, dtype: model(torch.randn(2, 9, 16, dtype=dtype)), "attention", "in_proj_weight")


def aria_projector() -> nn.Module:
    """Three queries over nine tokens."""
    library = import_module("transformers")
    config = library.AriaConfig(projector_patch_to_query_dict={9: 3})
    config.vision_config.hidden_size, config.vision_config.num_attention_heads = 16, 2
    config.text_config.hidden_size = 10
    return import_module(f"{HF}aria.modeling_aria").AriaProjector(config)


def kosmos2_connector(attention: str = "sdpa") -> nn.Module:
    """Three queries over the tokens of an image, [B, N, 12]."""
    text = {"embed_dim": 16, "attention_heads": 2, "attention_dropout": 0.3}
    config = import_module("transformers").Kosmos2Config(text_config=text, latent_query_num=3)
    config.vision_config.hidden_size, config.text_config._attn_implementation = 12, attention
    return import_module(f"{HF}kosmos2.modeling_kosmos2").Kosmos2ImageToTextProjection(config)


class EmbeddingEMA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.update = nn.Parameter(torch.randn(9, 6), requires_grad=False), True
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(9))

    def forward(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.weight)


class NormEMAVectorQuantizer(nn.Module):
    """Of BEiT-v2's, which is no package, the evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta, self.decay = 9, 6, 0.7, 0.99
        self.embedding, self.statistic_code_usage = EmbeddingEMA(), True
        self.register_buffer("cluster_size", torch.zeros(9))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        codes = torch.cdist(z.detach().reshape(-1, 6), self.embedding.weight).argmin(1)
        z_q = self.embedding(codes).view(z.shape)
        counts = torch.bincount(codes, minlength=9).to(z.dtype)
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        loss = self.beta * F.mse_loss(z_q.detach(), z)
        return (z + (z_q - z).detach()).permute(0, 3, 1, 2), loss, codes


def norm_ema() -> nn.Module:
    module = sys.modules.setdefault("norm_ema_quantizer", ModuleType("norm_ema_quantizer"))
    for cls in (EmbeddingEMA, NormEMAVectorQuantizer):
        cls.__module__ = "norm_ema_quantizer"
        if not hasattr(module, cls.__name__):
            setattr(module, cls.__name__, cls)
    return NormEMAVectorQuantizer()


def torchscale(cls: str) -> nn.Module:
    library = import_module("torchscale.architecture.config")
    config = library.EncoderConfig(
        **{"img_size": 16, "patch_size": 8, "vocab_size": 20, "encoder_layers": 1, "no_output_layer": True},
        **{"encoder_embed_dim": 16, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 24, "multiway": True},
        # torchscale computes GELU in float32, whatever the dtype, and a norm behind it multiplies what that costs
        subln=cls == "BEiT3",
    )
    if cls == "BEiT3":
        return import_module("torchscale.model.BEiT3").BEiT3(config)
    if cls in ("MultiwayNetwork", "MutliwayEmbedding"):
        made = import_module("torchscale.architecture.encoder").EncoderLayer(config, depth=0).ffn
        if cls == "MutliwayEmbedding":
            table = import_module("torchscale.component.embedding").PositionalEmbedding
            made = import_module("torchscale.component.multiway_network").MutliwayEmbedding(
                [table(9, 16), table(8, 16)]
            )
        made.split_position = 4
        return made
    return import_module("torchscale.architecture.encoder").EncoderLayer(config, depth=0)


def beit3_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    return model(torch.randint(20, (2, 4)), torch.randn(2, 3, 16, 16, dtype=dtype), padding)["encoder_out"]


def torchscale_layer_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return model(torch.randn(2, 3, 16, dtype=dtype), None, multiway_split_position=2)[0]


def rows(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return model(torch.randn(2, 7, 16, dtype=dtype))


SAMPLES: dict[str, Sample] = {
    "open_clip.loss:ClipLoss": loss("ClipLoss"),
    "open_clip.loss:CoCaLoss": loss("CoCaLoss", 2.0, 1.0),
    "open_clip.loss:DistillClipLoss": loss("DistillClipLoss"),
    "open_clip.loss:SigLipLoss": loss("SigLipLoss", bias=-5.0),
    f"{HF}clip.modeling_clip:CLIPModel": hf_pair("CLIP", "clip_loss"),
    f"{HF}siglip.modeling_siglip:SiglipModel": hf_pair("Siglip", "siglip_loss"),
    "vector_quantize_pytorch.vector_quantize_pytorch:VectorQuantize": Sample(
        vector_quantize, lambda model, dtype: model(torch.randn(3, 7, 6, dtype=dtype))[0], "project_out"
    ),
    "norm_ema_quantizer:NormEMAVectorQuantizer": Sample(
        norm_ema, lambda model, dtype: model(torch.randn(2, 6, 3, 3, dtype=dtype))[0], "embedding"
    ),
    "open_clip.coca_model:CoCa": Sample(
        lambda: open_clip_coca.official(open_clip_coca.config()),
        coca_run,
        "text_decoder.resblocks.0.attn",
        "in_proj_weight",
        init=False,
    ),
    "torchscale.architecture.encoder:Encoder": Sample(
        lambda: torchscale("BEiT3"), beit3_run, "encoder.layers.0.self_attn.q_proj.A"
    ),
    "torchscale.architecture.encoder:EncoderLayer": Sample(
        lambda: torchscale("EncoderLayer"), torchscale_layer_run, "ffn.B.fc1"
    ),
    "torchscale.component.multiway_network:MultiwayNetwork": Sample(
        lambda: torchscale("MultiwayNetwork"), rows, "B.fc1"
    ),
    "torchscale.component.multiway_network:MutliwayEmbedding": Sample(
        lambda: torchscale("MutliwayEmbedding"), rows, "A"
    ),
    "timm.layers.patch_embed:PatchEmbed": timm_stem("PatchEmbed"),
    "timm.layers.patch_embed:PatchEmbedWithSize": timm_stem("PatchEmbedWithSize"),
    "timm.models.vision_transformer:VisionTransformer": Sample(timm_vit, images, "patch_embed.proj"),
    "open_clip.transformer:VisionTransformer": Sample(open_clip_vit, images, "conv1"),
    f"{HF}vit.modeling_vit:ViTEmbeddings": embeddings(
        "vit", "ViTEmbeddings", "ViTConfig", "patch_embeddings.projection"
    ),
    f"{HF}beit.modeling_beit:BeitEmbeddings": embeddings(
        "beit", "BeitEmbeddings", "BeitConfig", "patch_embeddings.projection", use_absolute_position_embeddings=True
    ),
    f"{HF}clip.modeling_clip:CLIPVisionEmbeddings": embeddings(
        "clip", "CLIPVisionEmbeddings", "CLIPVisionConfig", "position_embedding"
    ),
    f"{HF}siglip.modeling_siglip:SiglipVisionEmbeddings": embeddings(
        "siglip", "SiglipVisionEmbeddings", "SiglipVisionConfig"
    ),
    f"{HF}blip.modeling_blip:BlipVisionEmbeddings": embeddings("blip", "BlipVisionEmbeddings", "BlipVisionConfig"),
    f"{HF}blip_2.modeling_blip_2:Blip2VisionEmbeddings": embeddings(
        "blip_2", "Blip2VisionEmbeddings", "Blip2VisionConfig"
    ),
    f"{HF}instructblip.modeling_instructblip:InstructBlipVisionEmbeddings": embeddings(
        "instructblip", "InstructBlipVisionEmbeddings", "InstructBlipVisionConfig"
    ),
    f"{HF}qwen2_vl.modeling_qwen2_vl:PatchEmbed": qwen("qwen2_vl", "PatchEmbed", patch_size=4, embed_dim=16),
    f"{HF}qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionPatchEmbed": qwen(
        "qwen2_5_vl", "Qwen2_5_VisionPatchEmbed", patch_size=4, embed_dim=16
    ),
    f"{HF}qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchEmbed": Sample(
        lambda: _qwen3(), lambda model, dtype: model(torch.randn(6, 96, dtype=dtype)), "proj"
    ),
    "timm.models.naflexvit:NaFlexEmbeds": Sample(naflex, naflex_run, "proj"),
    f"{HF}siglip2.modeling_siglip2:Siglip2VisionEmbeddings": Sample(siglip2, siglip2_run, "patch_embedding"),
}

SAMPLES |= {
    f"{HF}blip_2.modeling_blip_2:Blip2QFormerEncoder": qformer("blip_2", "Blip2QFormer"),
    f"{HF}instructblip.modeling_instructblip:InstructBlipQFormerEncoder": qformer(
        "instructblip", "InstructBlipQFormer"
    ),
    f"{HF}instructblipvideo.modeling_instructblipvideo:InstructBlipVideoQFormerEncoder": qformer(
        "instructblipvideo", "InstructBlipVideoQFormer"
    ),
    f"{HF}blip_2.modeling_blip_2:Blip2QFormerModel": blip2_qformer(),
    f"{HF}blip.modeling_blip_text:BlipTextEncoder": blip_text(),
    f"{HF}siglip.modeling_siglip:SiglipMultiheadAttentionPoolingHead": pooling_head("siglip", "Siglip"),
    f"{HF}siglip2.modeling_siglip2:Siglip2MultiheadAttentionPoolingHead": pooling_head("siglip2", "Siglip2"),
    f"{HF}aria.modeling_aria:AriaProjector": Sample(
        aria_projector, lambda model, dtype: model(torch.randn(2, 9, 16, dtype=dtype)), "cross_attn.k_proj"
    ),
    f"{HF}kosmos2.modeling_kosmos2:Kosmos2ImageToTextProjection": Sample(
        kosmos2_connector, lambda model, dtype: model(torch.randn(2, 9, 12, dtype=dtype))[0], "x_attn.k_proj"
    ),
    "open_clip.transformer:AttentionalPooler": Sample(
        lambda: import_module("open_clip.transformer").AttentionalPooler(16, 16, 2, n_queries=3),
        lambda model, dtype: model(torch.randn(2, 9, 16, dtype=dtype)),
        "attn",
        "in_proj_weight",
    ),
}


def _ernie() -> nn.Module:
    module = f"{HF}ernie4_5_vl_moe"
    config = import_module(f"{module}.configuration_ernie4_5_vl_moe").Ernie4_5_VLMoeTextConfig(
        hidden_size=16, moe_intermediate_size=[12, 8], moe_num_experts=4, moe_k=2, moe_num_shared_experts=1
    )
    return import_module(f"{module}.modeling_ernie4_5_vl_moe").Ernie4_5_VLMoeMoeBlock(config)


def ernie_run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return model(torch.randn(2, 7, 16, dtype=dtype), torch.tensor([[0, 0, 1, 1, 0, 2, 0], [1, 0, 1, 1, 0, 0, 1]]))[0]


SAMPLES[f"{HF}ernie4_5_vl_moe.modeling_ernie4_5_vl_moe:Ernie4_5_VLMoeMoeBlock"] = Sample(
    _ernie, ernie_run, "shared_experts.gate_proj"
)


COSMOS = "diffusers.models.transformers.transformer_cosmos3:DomainAwareLinear"


def _domains() -> nn.Module:
    module, _, cls = COSMOS.partition(":")
    return getattr(import_module(module), cls)(6, 5, 4)


SAMPLES[COSMOS] = Sample(
    _domains, lambda model, dtype: model(torch.randn(7, 6, dtype=dtype), torch.tensor([2, 0, 3, 2, 2, 0, 3])), "fc"
)


def _qwen3() -> nn.Module:
    module = f"{HF}qwen3_vl"
    config = import_module(f"{module}.configuration_qwen3_vl").Qwen3VLVisionConfig(patch_size=4, hidden_size=16)
    return import_module(f"{module}.modeling_qwen3_vl").Qwen3VLVisionPatchEmbed(config)
