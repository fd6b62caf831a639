"""transformers' CLIP and SigLIP models with a fused loss: the logits are computed only when they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel, CLIPOutput
from transformers.models.siglip.modeling_siglip import SiglipModel, SiglipOutput
from transformers.utils import ModelOutput, can_return_tuple

from mmfuse.fused.losses import require_pairs
from mmfuse.kernels import clip_loss, siglip_loss


@can_return_tuple
def forward(
    model: CLIPModel | SiglipModel,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_loss: bool | None = None,
    interpolate_pos_encoding: bool = False,
    **kwargs: Any,
) -> CLIPOutput | SiglipOutput:
    """The model's forward; with `return_loss` the loss is fused, in float32 for 16-bit models, and the logits lazy.

    Read after the forward, the logits are what they were in it: under its gradient, inference and autocast modes.
    Under torch.compile and with `return_dict=False` they are computed at once.
    """
    text = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    image = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
    kwargs["return_dict"] = True
    if not return_loss:
        return type(model).forward(model, **text, **image, return_loss=return_loss, **kwargs)
    image_output, text_output = model.get_image_features(**image, **kwargs), model.get_text_features(**text, **kwargs)
    image_embeds, text_embeds = image_output.pooler_output, text_output.pooler_output
    bias = None
    # normalised as each model does, to the last bit
    if isinstance(model, CLIPModel):
        image_embeds, text_embeds = (t / t.pow(2).sum(-1, keepdim=True).pow(0.5) for t in (image_embeds, text_embeds))
    else:
        image_embeds, text_embeds = (t / t.norm(p=2, dim=-1, keepdim=True) for t in (image_embeds, text_embeds))
        # a clone: a step of the optimizer must not reach the logits
        bias = model.logit_bias.to(text_embeds.device).clone()
    scale = model.logit_scale.to(text_embeds.device).exp()
    pairs = (text_embeds, image_embeds.to(text_embeds.device))
    require_pairs(*reversed(pairs))
    output: type[LazyLogits] = LazyCLIPOutput if bias is None else LazySiglipOutput
    loss: Callable[..., Tensor] = clip_loss if bias is None else siglip_loss
    return output.later(
        partial(_logits, *pairs, scale, bias),
        loss=loss(*pairs, scale, bias),
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text_output,
        vision_model_output=image_output,
    )


def _logits(text: Tensor, image: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.matmul(text, image.t()) * scale
    return logits if bias is None else logits + bias


def _as_now(fn: Callable[[], Tensor], kind: str) -> Callable[[], Tensor]:
    """`fn` for later, under the modes of this moment."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run() -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast(kind, dtype, autocast):
            return fn()

    return run


class LazyLogits(ModelOutput):
    """A model output whose `logits_per_image` and `logits_per_text` are computed when first read."""

    _plain: ClassVar[type[ModelOutput]]
    _LOGITS: ClassVar[tuple[str, str]] = ("logits_per_image", "logits_per_text")

    @classmethod
    def later(cls, logits_per_text: Callable[[], Tensor], *, loss: Tensor, **fields: Any) -> ModelOutput:
        if torch.compiler.is_compiling():
            logits = logits_per_text()
            return cls._plain(loss=loss, logits_per_image=logits.t(), logits_per_text=logits, **fields)
        # the keys are there, in their order, from the start
        output = cls(loss=loss, **dict.fromkeys(cls._LOGITS, loss), **fields)
        output.__dict__["_pending"] = _as_now(logits_per_text, loss.device.type)
        return output

    def _compute(self) -> None:
        if "_pending" in self.__dict__:
            logits = self.__dict__["_pending"]()
            del self.__dict__["_pending"]
            self.logits_per_image, self.logits_per_text = logits.t(), logits

    def __getattribute__(self, name: str) -> Any:
        if name in LazyLogits._LOGITS:
            self._compute()
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LazyLogits._LOGITS:
            self._compute()
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in LazyLogits._LOGITS:
            self._compute()
        super().__setitem__(key, value)

    def __getitem__(self, key: Any) -> Any:
        # the inherited one reads every value to find one
        if isinstance(key, slice):
            return self.to_tuple()[key]
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        value = getattr(self, list(self)[key])
        return value.to_tuple() if isinstance(value, ModelOutput) else value

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def values(self) -> Any:
        self._compute()
        return super().values()

    def items(self) -> Any:
        self._compute()
        return super().items()

    def __reduce__(self) -> Any:
        return self._plain(**self).__reduce__()


class LazyCLIPOutput(LazyLogits, CLIPOutput):
    _plain = CLIPOutput


class LazySiglipOutput(LazyLogits, SiglipOutput):
    _plain = SiglipOutput
