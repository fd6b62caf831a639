"""The table of what `accelerate()` replaces. A new rule is one row here and its parity test."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

from torch import nn

from mmfuse.fused.acceleration import coca, stems, vector_quantize
from mmfuse.fused.losses import unsupported


@dataclass(frozen=True)
class Rule:
    """Instances of a class run another `forward` (or another method), and keep everything else.

    Args:
        op: the operator that the replacement runs.
        target: the class, as "module:Class". It is never imported: without its module there is no instance.
        forward: the replacement, as "module:function", of the instance and the arguments of the class's method.
        relies_on: methods that must be the class's own; a subclass or an instance with another is left.
        reason_against: why an instance is left, or None.
        opt_in: why it is left unless `ops` names the operator; empty if it is replaced by default.
        method: what is replaced.
    """

    op: str
    target: str
    forward: str
    relies_on: tuple[str, ...] = ("forward",)
    reason_against: Callable[[Any], str | None] = lambda module: None
    opt_in: str = ""
    method: str = "forward"

    def matches(self, module: nn.Module) -> bool:
        cls = loaded(self.target)
        return cls is not None and isinstance(module, cls)

    def why_not(self, module: nn.Module) -> str | None:
        """Why `module`, which matches, has to be left, or None."""
        cls, actual = loaded(self.target), type(module)
        for method in self.relies_on:
            if method in vars(module):
                return f"its {method} was replaced by something else"
            if getattr(actual, method) is not getattr(cls, method):
                return f"{actual.__name__} overrides {method}"
        theirs, ours = getattr(actual, self.method), resolve_name(self.forward)
        found, known = (list(inspect.signature(f).parameters)[1:] for f in (theirs, ours))
        known = [name for name in known if name != "uint8"]
        if found != known:
            return f"this version's {self.method} takes ({', '.join(found)}), expected ({', '.join(known)})"
        return self.reason_against(module)

    @property
    def takes_uint8(self) -> bool:
        """Whether the replacement can normalise the bytes of images itself."""
        return "uint8" in inspect.signature(resolve_name(self.forward)).parameters

    def apply(self, module: nn.Module, **options: Any) -> Callable[[], None]:
        """Replace the method of `module`, and return the function that puts it back."""
        fused = Fused(resolve_name(self.forward), module, **options)
        setattr(module, self.method, fused)

        def undo() -> None:
            if vars(module).get(self.method) is not fused:
                name = f"{type(module).__name__}.{self.method}"
                raise RuntimeError(f"{name} was replaced after accelerate(): undo that first")
            delattr(module, self.method)

        return undo


class Fused(partial):
    """A module's fused method. As a partial, not a bound method, it follows its module through copy and pickle."""


def loaded(target: str) -> type | None:
    """The class "module:Class", or None if its module was not imported."""
    module, _, name = target.partition(":")
    return getattr(sys.modules.get(module), name, None)


_LOGITS_IN_OUTPUT = "its output holds the N x N logits; with ops={%r} they are computed only when read"

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
        reason_against=vector_quantize.reason_against,
    ),
    Rule(
        op="vector_quantize",
        target="norm_ema_quantizer:NormEMAVectorQuantizer",
        forward="mmfuse.fused.quantizer:NormEMAVectorQuantizer.forward",
    ),
    Rule(
        op="coca_generate",
        target="open_clip.coca_model:CoCa",
        forward="mmfuse.fused.acceleration.coca:generate",
        relies_on=("generate", "_generate_beamsearch", "forward", "_encode_text"),
        reason_against=coca.reason_against,
        method="generate",
    ),
    Rule(
        op="patch_embed",
        target="timm.layers.patch_embed:PatchEmbed",
        forward="mmfuse.fused.acceleration.stems:timm_patch_embed",
        relies_on=("forward", "dynamic_feat_size"),
        reason_against=stems.against_timm_patch_embed,
    ),
    Rule(
        op="patch_embed",
        target="timm.layers.patch_embed:PatchEmbedWithSize",
        forward="mmfuse.fused.acceleration.stems:timm_patch_embed_with_size",
        reason_against=stems.against_timm_patch_embed,
    ),
    Rule(
        op="patch_embed",
        target="timm.models.vision_transformer:VisionTransformer",
        forward="mmfuse.fused.acceleration.stems:timm_forward_features",
        relies_on=("forward_features", "_pos_embed"),
        reason_against=stems.against_timm_model,
        method="forward_features",
    ),
    Rule(
        op="patch_embed",
        target="open_clip.transformer:VisionTransformer",
        forward="mmfuse.fused.acceleration.stems:open_clip_embeds",
        relies_on=("_embeds",),
        reason_against=stems.against_open_clip,
        method="_embeds",
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.vit.modeling_vit:ViTEmbeddings",
        forward="mmfuse.fused.acceleration.stems:vit_embeddings",
        reason_against=stems.against_vit,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.beit.modeling_beit:BeitEmbeddings",
        forward="mmfuse.fused.acceleration.stems:beit_embeddings",
        reason_against=stems.against_vit,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.clip.modeling_clip:CLIPVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:clip_embeddings",
        reason_against=stems.against_patch_embedding,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.siglip.modeling_siglip:SiglipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:siglip_embeddings",
        reason_against=stems.against_patch_embedding,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.blip.modeling_blip:BlipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        reason_against=stems.against_patch_embedding,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.blip_2.modeling_blip_2:Blip2VisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        reason_against=stems.against_patch_embedding,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.instructblip.modeling_instructblip:InstructBlipVisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:blip_embeddings",
        reason_against=stems.against_patch_embedding,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen2_vl.modeling_qwen2_vl:PatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionPatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed",
        target="transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchEmbed",
        forward="mmfuse.fused.acceleration.stems:qwen_patch_embed",
        reason_against=stems.against_qwen,
    ),
    Rule(
        op="patch_embed_packed",
        target="timm.models.naflexvit:NaFlexEmbeds",
        forward="mmfuse.fused.acceleration.stems:naflex_embeds",
        reason_against=stems.against_naflex,
    ),
    Rule(
        op="patch_embed_packed",
        target="transformers.models.siglip2.modeling_siglip2:Siglip2VisionEmbeddings",
        forward="mmfuse.fused.acceleration.stems:siglip2_embeddings",
        relies_on=("forward", "resize_positional_embeddings"),
        reason_against=stems.against_siglip2,
    ),
)
