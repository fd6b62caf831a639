from __future__ import annotations

import pytest
import torch
from torch import Tensor

import worlds
from goldens.cases import Given
from mmfuse.fused import ClipLoss, SigLipLoss
from mmfuse.kernels import distill_clip_loss


def run(given: Given) -> dict[str, Tensor]:
    kind = given.config["loss"]
    if kind == "distributed":
        return _distributed(given)
    if kind not in ("clip", "siglip", "distill"):
        pytest.skip(f"no fused form of open_clip's loss {kind!r} ({given.config['class']}) yet")
    outputs = {}
    for features in given.config["sets"]:
        for setting in given.config["settings"]:
            outputs |= (_distill if kind == "distill" else _loss)(given, features, setting)
    return outputs


def _distill(given: Given, features: str, setting: dict) -> dict[str, Tensor]:
    leaves = {
        name: given.inputs[f"{features}.{name}_features"] for name in ("image", "text", "dist_image", "dist_text")
    }
    for name, key in (("scale", "logit_scale"), ("dist_scale", "dist_logit_scale")):
        leaves[name] = torch.tensor(setting[key], dtype=given.dtype, device=given.device)
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    student, teacher = (tuple(leaves[of + name] for name in ("image", "text", "scale")) for of in ("", "dist_"))
    outputs = {}
    losses = distill_clip_loss(*student, *teacher)
    for name, loss in zip(("contrastive_loss", "distill_loss"), losses, strict=True):
        key = f"{features}.{setting['name']}.{name}"
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        outputs |= {key: loss, f"{key}64": loss}
        outputs |= {f"{key}.grad_{leaf}": g for leaf, g in zip(leaves, grads, strict=True) if g is not None}
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


def _distributed(given: Given) -> dict[str, Tensor]:
    outputs = {}
    for size in given.config["world_sizes"]:
        for rank, found in enumerate(worlds.run(size, _rank, given.inputs, given.config["n_local"])):
            outputs |= {f"w{size}.{name.replace('RANK', f'rank{rank}')}": t for name, t in found.items()}
    return outputs


def _rank(rank: int, size: int, inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The losses of one rank, and the gradients of its own features and scalars."""
    world = {"rank": rank, "world_size": size}
    losses = {
        f"clip_local{local}_gradgather{grad}": ClipLoss(bool(local), bool(grad), **world)
        for local in (0, 1)
        for grad in (0, 1)
    }
    losses |= {f"siglip_{i}": SigLipLoss(**world, dist_impl=i) for i in ("bidir", "shift", "reduce", "gather")}
    found = {}
    for name, loss in losses.items():
        rows = slice(rank * n, (rank + 1) * n)
        leaves = {"image": inputs["image_features"][rows], "text": inputs["text_features"][rows]}
        leaves["scale"] = inputs["logit_scale"]
        if "siglip" in name:
            leaves["bias"] = inputs["logit_bias"]
        leaves = {leaf: t.clone().requires_grad_() for leaf, t in leaves.items()}
        value = loss(*leaves.values())
        grads = torch.autograd.grad(value, list(leaves.values()))
        found |= dict.fromkeys((f"{name}.RANK.loss", f"{name}.RANK.loss64"), value.detach())
        found |= {f"{name}.RANK.grad_{leaf}": g for leaf, g in zip(leaves, grads, strict=True)}
    return found
