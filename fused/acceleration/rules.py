"""The table of what `accelerate()` replaces. A new rule is one row here and its parity test."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from torch import nn

from mmfuse.fused.acceleration import coca, cosmos, poolers, qformers, stems, torchscale, vector_quantize
from mmfuse.fused.acceleration.plain import Children, why_not_plain
from mmfuse.fused.losses import unsupported


@dataclass(frozen=True, eq=False)
class Rule:
    """Instances of a class run another `forward` (or another method), and keep everything else.

    Args:
        op: the operator that the replacement runs.
        target: the class, as "module:Class". It is never imported: without its module there is no instance.
        forward: the replacement, as "module:function", of the instance and the arguments of the class's method.
        relies_on: methods that must be the class's own; a subclass or an instance with another is left.
        children: what the replacement reads or passes over instead of calling it. They have to be plain, at the swap
            and at every call, where otherwise the class's own method runs.
        reason_against: why an instance whose children are plain is left, or None.
        aside: whether the class's own method is the faster one for the arguments of a call.
        opt_in: why it is left unless `ops` names the operator; empty if it is replaced by default.
        method: what is replaced.
    """

    op: str
    target: str
    forward: str
    relies_on: tuple[str, ...] = ("forward",)
    children: Children = field(default_factory=dict)
    reason_against: Callable[[Any], str | None] = lambda module: None
    aside: Callable[..., bool] = lambda module, *args, **kwargs: False
    opt_in: str = ""
    method: str = "forward"

    def matches(self, module: nn.Module) -> bool:
        cls = loaded(self.target)
        return cls is not None and isinstance(module, cls)

    def why_not(self, module: nn.Module) -> str | None:
        """Why `module`, which matches, has to be left, or None."""
        if self.method in vars(module):
            return f"its {self.method} was replaced by something else"
        return self.why_not_class(type(module)) or self.why_not_now(module)

    def why_not_class(self, actual: type | None) -> str | None:
        """Why no instance of a class fits, or None: of what a release or a subclass has changed."""
        return asked(self._why_not_class, actual)

    def why_not_now(self, module: nn.Module) -> str | None:
        """The same of what may change between two calls: methods set on the instance, children and tensors."""
        return asked(self._why_not_now, module)

    def _why_not_class(self, actual: type) -> str | None:
        cls = loaded(self.target)
        for method in (*self.relies_on, self.method):
            if not hasattr(cls, method):
                return f"this version has no {method}"
            if getattr(actual, method) is not getattr(cls, method):
                return f"{actual.__name__} overrides {method}"
        theirs, ours = getattr(actual, self.method), resolve_name(self.forward)
        found, known = (list(inspect.signature(f).parameters)[1:] for f in (theirs, ours))
        known = [name for name in known if name != "uint8"]
        found = [_RENAMED.get(name, name) for name in found]
        if found != known:
            return f"this version's {self.method} takes ({', '.join(found)}), expected ({', '.join(known)})"
        return None

    def _why_not_now(self, module: nn.Module) -> str | None:
        return self.why_overridden(module) or why_not_plain(module, self.children) or self.reason_against(module)

    def why_overridden(self, module: nn.Module) -> str | None:
        own = module.__dict__
        for method in self.relies_on:
            # around the replaced method itself other tools may wrap theirs
            if method in own and method != self.method:
                return f"its {method} was replaced by something else"
        return None

    @property
    def takes_uint8(self) -> bool:
        """Whether the replacement can normalise the bytes of images itself."""
        return "uint8" in inspect.signature(resolve_name(self.forward)).parameters


def asked(check: Callable[[Any], str | None], of: Any) -> str | None:
    """What a check says; in a version of the library that it does not know, what it stumbles over is the reason."""
    try:
        return check(of)
    except Exception as error:
        return f"this version is not known: {type(error).__name__}: {error}"


def loaded(target: str) -> type | None:
    """The class "module:Class", or None if its module was not imported."""
    module, _, name = target.partition(":")
    return getattr(sys.modules.get(module), name, None)


# arguments that a release has renamed, of which the replacement takes both names
_RENAMED = {"past_key_values": "cache"}

_LOGITS_IN_OUTPUT = "its output holds the N x N logits; with ops={%r} they are computed only when read"

_CONV2D = ("torch.nn.modules.conv:Conv2d",)
_CONV3D = ("torch.nn.modules.conv:Conv3d",)
_LINEAR = ("torch.nn.modules.linear:Linear",)
_EMBEDDING = ("torch.nn.modules.sparse:Embedding",)
_IDENTITY = ("torch.nn.modules.linear:Identity",)
_TIMM_NORM = (
    *_IDENTITY,
    "torch.nn.modules.normalization:LayerNorm",
    "timm.layers.norm:LayerNorm",
    "timm.layers.norm:LayerNormFp32",
)
_OPEN_CLIP_NORM = (
    *_IDENTITY,
    "torch.nn.modules.normalization:LayerNorm",
    "open_clip.transformer:LayerNorm",
    "open_clip.transformer:LayerNormFp32",
)
_TIMM_STEM = {"proj": _CONV2D, "norm": _TIMM_NORM}
_PATCHES = {"patch_embedding": _CONV2D}
_PATCHES_AND_POSITIONS = {"patch_embedding": _CONV2D, "position_embedding": _EMBEDDING}

RULES = (
    Rule(
        op="clip_loss",
        target="open_clip.loss:ClipLoss",
        forward="mmfuse.fused.losses:ClipLoss.forward",
        relies_on=("forward", "get_logits", "get_ground_truth"),
        reason_against=unsupported,
    ),
    Rule(
        op="clip_loss",
        target="open_clip.loss:CoCaLoss",
        forward="mmfuse.fused.losses:CoCaLoss.forward",
        relies_on=("forward", "get_logits", "get_ground_truth"),
        reason_against=unsupported,
    ),
    Rule(
        op="distill_clip_loss",
        target="open_clip.loss:DistillClipLoss",
        forward="mmfuse.fused.losses:DistillClipLoss.forward",
        relies_on=("forward", "dist_loss", "get_logits", "get_ground_truth"),
        reason_against=unsupported,
    ),
    Rule(
        op="siglip_loss",
        target="open_clip.loss:SigLipLoss",
        forward="mmfuse.fused.losses:SigLipLoss.forward",
        relies_on=("forward", "_loss", "get_logits", "get_ground_truth"),
    ),
    Rule(
        op="clip_loss",
        target="transformers.models.clip.modeling_clip:CLIPModel",
        forward="mmfuse.fused.acceleration.huggingface:forward",
        relies_on=("forward", "get_image_features", "get_text_features"),
        opt_in=_LOGITS_IN_OUTPUT % "clip_loss",
    ),
    Rule(
        op="siglip_loss",
        target="transformers.models.siglip.modeling_siglip:SiglipModel",
        forward="mmfuse.fused.acceleration.huggingface:forward",
        relies_on=("forward", "get_image_features", "get_text_features"),
        opt_in=_LOGITS_IN_OUTPUT % "siglip_loss",
    ),
    Rule(
        op="vector_quantize",
        target="vector_quantize_pytorch.vector_quantize_pytorch:VectorQuantize",
        forward="mmfuse.fused.acceleration.vector_quantize:forward",
        children={"_codebook": ("vector_quantize_pytorch.vector_quantize_pytorch:Codebook",)},
        reason_against=vector_quantize.reason_against,
        aside=vector_quantize.few_scores,
    ),
    Rule(
        op="vector_quantize",
        target="norm_ema_quantizer:NormEMAVectorQuantizer",
        forward="mmfuse.fused.quantizer:NormEMAVectorQuantizer.forward",
        children={"embedding": ("norm_ema_quantizer:EmbeddingEMA", "torch.nn.modules.module:Module")},
    ),
    Rule(
        op="coca_generate",
        target="open_clip.coca_model:CoCa",
        forward="mmfuse.fused.acceleration.coca:generate",
        relies_on=("generate", "_generate_beamsearch", "forward", "_encode_text"),
        children=coca.CHILDREN,
        reason_against=coca.reason_against,
        method="generate",
    ),
    Rule(
        op="multiway",
        target="torchscale.architecture.encoder:Encoder",
        forward="mmfuse.fused.acceleration.torchscale:forward",
        relies_on=("forward", "forward_embedding"),
        children=torchscale.OF_ENCODER,
        reason_against=torchscale.against_encoder,
        aside=torchscale.few_rows,
    ),
    Rule(
        op="multiway",
        target="torchscale.architecture.encoder:EncoderLayer",
        forward="mmfuse.fused.acceleration.torchscale:layer_forward",
        relies_on=("forward", "residual_connection"),
        children=torchscale.OF_LAYER,
        reason_against=torchscale.against_layer,
        aside=torchscale.few_rows,
    ),
    Rule(
        op="multiway",
        target="torchscale.component.multiway_network:MultiwayNetwork",
        forward="mmfuse.fused.acceleration.torchscale:network_forward",
        children=torchscale.OF_NETWORK,
        reason_against=torchscale.against_network,
        aside=torchscale.on_a_cpu,
    ),
    Rule(
        op="multiway",
        target="torchscale.component.multiway_network:MutliwayEmbedding",
        forward="mmfuse.fused.acceleration.torchscale:embedding_forward",
        children=torchscale.OF_EMBEDDING,
        reason_against=torchscale.against_embedding,
    ),
    Rule(
        op="multiway",
        target="transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe:Ernie4_5_VLMoeMoeBlock",
        forward="mmfuse.fused.acceleration.ernie:forward",
    ),
    Rule(
        op="multiway",
        target="diffusers.models.transformers.transformer_cosmos3:DomainAwareLinear",
        forward="mmfuse.fused.acceleration.cosmos:forward",
        children={"fc": _EMBEDDING, "bias": _EMBEDDING},
        reason_against=cosmos.reason_against,
        aside=cosmos.few_gathered,
    ),
    Rule(
        op="patch_embed",
        target="timm.layers.patch_embed:PatchEmbed",
        forward="mmfuse.fused.acceleration.stems:timm_patch_embed",
        relies_on=("forward", "dynamic_feat_size"),
        children=_TIMM_STEM,
        reason_against=stems.against_timm_patch_embed,
        aside=stems.few_products("proj", bare=True),
    ),
    Rule(
        op="patch_embed",
        target="timm.layers.patch_embed:PatchEmbedWithSize",
        forward="mmfuse.fused.acceleration.stems:timm_patch_embed_with_size",
        children=_TIMM_STEM,
        reason_against=stems.against_timm_patch_embed,
        aside=stems.few_products("proj", bare=True),
    ),
    Rule(
        op="patch_embed",
        target="timm.models.vision_transformer:VisionTransformer",
        forward="mmfuse.fused.acceleration.stems:timm_forward_features",
        relies_on=("forward_features", "_pos_embed"),
        children={
            "patch_embed": ("timm.layers.patch_embed:PatchEmbed",),
            "patch_embed.proj": _CONV2D,
            "patch_embed.norm": _TIMM_NORM,
            "patch_drop": (*_IDENTITY, "timm.layers.patch_dropout:PatchDropout"),
            "pos_drop": ("torch.nn.modules.dropout:Dropout",),
            "norm_pre": _TIMM_NORM,
        },
        reason_against=stems.against_timm_model,
        aside=stems.few_products("patch_embed.proj"),
        method="forward_features",
    ),
    Rule(
        op="patch_embed",
        target="open_clip.transformer:VisionTransformer",
        forward="mmfuse.fused.acceleration.stems:open_clip_embeds",
        relies_on=("_embeds",),
        children={
            "conv1": _CONV2D,
            "patch_dropout": (*_IDENTITY, "open_clip.transformer:PatchDropout"),
            "ln_pre": _OPEN_CLIP_NORM,
        },
        reason_against=stems.against_open_clip,
        aside=stems.few_products("conv1"),
        method="_embeds",
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.vit.modeling_vit:ViTEmbeddings",
        forward="mmfuse.fused.acceleration.stems:vit_embeddings",
        children={
            "patch_embeddings": ("transformers.models.vit.modeling_vit:ViTPatchEmbeddings",),
            "patch_embeddings.projection": _CONV2D,
        },
        reason_against=stems.against_patch_embeddings,
        aside=stems.few_products("patch_embeddings.projection"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.beit.modeling_beit:BeitEmbeddings",
        forward="mmfuse.fused.acceleration.stems:beit_embeddings",
        children={
            "patch_embeddings": ("transformers.models.beit.modeling_beit:BeitPatchEmbeddings",),
            "patch_embeddings.projection": _CONV2D,
        },
        reason_against=stems.against_patch_embeddings,
        aside=stems.few_products("patch_embeddings.projection"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.clip.modeling_clip:CLIPVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:clip_embeddings",
        children=_PATCHES_AND_POSITIONS,
        reason_against=stems.against_positions,
        aside=stems.few_products("patch_embedding"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.siglip.modeling_siglip:SiglipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:siglip_embeddings",
        children=_PATCHES_AND_POSITIONS,
        reason_against=stems.against_positions,
        aside=stems.few_products("patch_embedding"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.blip.modeling_blip:BlipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        children=_PATCHES,
        reason_against=stems.against_patch_embedding,
        aside=stems.few_products("patch_embedding"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.blip_2.modeling_blip_2:Blip2VisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        children=_PATCHES,
        reason_against=stems.against_patch_embedding,
        aside=stems.few_products("patch_embedding"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.instructblip.modeling_instructblip:InstructBlipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        children=_PATCHES,
        reason_against=stems.against_patch_embedding,
        aside=stems.few_products("patch_embedding"),
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen2_vl.modeling_qwen2_vl:PatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        children={"proj": _CONV3D},
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionPatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        children={"proj": _CONV3D},
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        children={"proj": _CONV3D},
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed_packed",
        target="timm.models.naflexvit:NaFlexEmbeds",
        forward="mmfuse.fused.acceleration.stems:naflex_embeds",
        children={"proj": (*_LINEAR, *_CONV2D), "norm": _IDENTITY},
        reason_against=stems.against_naflex,
    ),
    Rule(
        op="patch_embed_packed",
        target="transformers.models.siglip2.modeling_siglip2:Siglip2VisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:siglip2_embeddings",
        relies_on=("forward", "resize_positional_embeddings"),
        children={"patch_embedding": _LINEAR, "position_embedding": _EMBEDDING},
        reason_against=stems.against_positions,
    ),
    *(
        Rule(
            op="few_query_attention",
            target=f"{module}:{prefix}Encoder",
            forward="mmfuse.fused.acceleration.qformers:encoder",
            children=qformers.children(module, prefix),
            reason_against=qformers.reason_against,
            aside=qformers.steps_aside,
        )
        for module, prefix in (
            ("transformers.models.blip_2.modeling_blip_2", "Blip2QFormer"),
            ("transformers.models.instructblip.modeling_instructblip", "InstructBlipQFormer"),
            ("transformers.models.instructblipvideo.modeling_instructblipvideo", "InstructBlipVideoQFormer"),
        )
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.blip_2.modeling_blip_2:Blip2QFormerModel",
        forward="mmfuse.fused.acceleration.qformers:unexpanded",
        children=qformers.UNEXPANDED,
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.siglip.modeling_siglip:SiglipMultiheadAttentionPoolingHead",
        forward="mmfuse.fused.acceleration.poolers:siglip_head",
        children=poolers.CHILDREN,
        reason_against=poolers.against_attention("attention"),
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.siglip2.modeling_siglip2:Siglip2MultiheadAttentionPoolingHead",
        forward="mmfuse.fused.acceleration.poolers:siglip2_head",
        children=poolers.CHILDREN,
        reason_against=poolers.against_attention("attention"),
    ),
    Rule(
        op="few_query_attention",
        target="open_clip.transformer:AttentionalPooler",
        forward="mmfuse.fused.poolers:AttentionalPooler.forward",
        children=poolers.OPEN_CLIP_CHILDREN,
        reason_against=poolers.against_attention("attn"),
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.aria.modeling_aria:AriaProjector",
        forward="mmfuse.fused.acceleration.poolers:aria_projector",
        children=poolers.ARIA_CHILDREN,
        reason_against=poolers.against_attention("cross_attn.multihead_attn"),
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.kosmos2.modeling_kosmos2:Kosmos2ImageToTextProjection",
        forward="mmfuse.fused.acceleration.poolers:kosmos2_connector",
        children=poolers.KOSMOS2_CHILDREN,
        reason_against=poolers.against_kosmos2,
        aside=poolers.one_image,
    ),
    Rule(
        op="few_query_attention",
        target="transformers.models.blip.modeling_blip_text:BlipTextEncoder",
        forward="mmfuse.fused.acceleration.qformers:blip_text_encoder",
        children=qformers.blip_text_children(),
        reason_against=qformers.against_blip_text,
        aside=qformers.blip_text_steps_aside,
    ),
)
