"""Make torchvision importable beside a CPU-only torch, for which it has no build of its own."""

from __future__ import annotations

import torch

_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None


def allow_torchvision() -> None:
    """Define the two operators that torchvision expects at import, where they are missing.

    A no-op when torchvision's compiled part loads. Call it before importing torchvision, timm or open_clip.
    """
    global _library
    if _library is not None or torch.version.cuda is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _OPERATORS.items():
        try:
            _library.define(name + schema)
        except RuntimeError:  # already defined: torchvision was built for this torch
            continue
