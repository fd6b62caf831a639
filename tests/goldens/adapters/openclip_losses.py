from __future__ import annotations

import pytest
import torch
from torch import Tensor

from goldens.cases import Given
from mmfuse.fused import ClipLoss, SigLipLoss


def run(given: Given) -> dict[str, Tensor]:
    kind = given.config["loss"]
    if kind not in ("clip", "siglip"):
        pytest.skip(f"no fused form of open_clip's loss {kind!r} ({given.config['class']}) yet")
    outputs = {}
    for features in given.config["sets"]:
        for setting in given.config["settings"]:
            outputs |= _loss(given, features, setting)
    return outputs


def _loss(given: Given, features: str, setting: dict) -> dict[str, Tensor]:
    leaves = {
        "image": given.inputs[f"{features}.image_features"],
        "text": given.inputs[f"{features}.text_features"],
        "scale": torch.tensor(setting["logit_scale"], dtype=given.dtype, device=given.device),
    }
    if "logit_bias" in setting:
        leaves["bias"] = torch.tensor(setting["logit_bias"], dtype=given.dtype, device=given.device)
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    if given.config["loss"] == "clip":
        loss = ClipLoss()(*leaves.values())
    elif setting.get("negative_only"):
        loss = SigLipLoss()._loss(*leaves.values(), negative_only=True)
    else:
        loss = SigLipLoss()(*leaves.values())
    key = f"{features}.{setting['name']}.loss"
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {key: loss, f"{key}64": loss} | {
        f"{key}.grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }
