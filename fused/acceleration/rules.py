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

from mmfuse.fused.losses import distributed


@dataclass(frozen=True)
class Rule:
    """Instances of a class run another `forward`, and keep everything else.

    Args:
        op: the operator that the replacement runs.
        target: the class, as "module:Class". It is never imported: without its module there is no instance.
        forward: the replacement, as "module:function", of the instance and the arguments of the class's `forward`.
        relies_on: methods that must be the class's own; a subclass or an instance with another is left.
        reason_against: why an instance is left, or None.
        opt_in: why it is left unless `ops` names the operator; empty if it is replaced by default.
    """

    op: str
    target: str
    forward: str
    relies_on: tuple[str, ...] = ("forward",)
    reason_against: Callable[[Any], str | None] = lambda module: None
    opt_in: str = ""

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
        found, known = (list(inspect.signature(f).parameters)[1:] for f in (actual.forward, resolve_name(self.forward)))
        if found != known:
            return f"this version's forward takes ({', '.join(found)}), expected ({', '.join(known)})"
        return self.reason_against(module)

    def apply(self, module: nn.Module) -> Callable[[], None]:
        """Replace `module.forward`, and return the function that puts it back."""
        fused = module.forward = Fused(resolve_name(self.forward), module)

        def undo() -> None:
            if vars(module).get("forward") is not fused:
                raise RuntimeError(f"{type(module).__name__}.forward was replaced after accelerate(): undo that first")
            del module.forward

        return undo


class Fused(partial):
    """A module's fused `forward`. As a partial, not a bound method, it follows its module through copy and pickle."""


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
        reason_against=distributed,
    ),
    Rule(
        op="siglip_loss",
        target="open_clip.loss:SigLipLoss",
        forward="mmfuse.fused.losses:SigLipLoss.forward",
        relies_on=("forward", "_loss", "get_logits", "get_ground_truth"),
        reason_against=distributed,
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
)
