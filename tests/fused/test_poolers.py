"""Poolers and resamplers against open_clip's own class and against open_flamingo's lines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from judge import judge
from mmfuse._compat import allow_torchvision
from mmfuse.fused import AttentionalPooler, PerceiverResampler

allow_torchvision()
open_clip = pytest.importorskip("open_clip")


def drawn(model: nn.Module) -> Any:
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def run(model: nn.Module, x: Tensor, forward: Any = None) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    y = model(x) if forward is None else forward(model, x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    named = dict(model.named_parameters()) | {"x": x}
    grads = torch.autograd.grad((y * weight).sum(), list(named.values()))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


# --- open_clip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "context"), [(1, 12), (3, 16), (40, 12)])
def test_is_open_clips_pooler(queries: int, context: int) -> None:
    args = {"d_model": 16, "context_dim": context, "n_head": 2, "n_queries": queries}
    theirs = drawn(open_clip.transformer.AttentionalPooler(**args)).double()
    ours = AttentionalPooler(**args).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 11, context, dtype=torch.float64)
    torch.testing.assert_close(run(ours, x), run(theirs, x))
    assert ours(x[:0]).shape == (0, queries, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_further_from_float64_than_open_clips(dtype: torch.dtype) -> None:
    def draw() -> tuple[dict[str, Tensor], ...]:
        theirs = drawn(open_clip.transformer.AttentionalPooler(16, 12, 2, 3)).to(dtype)
        ours = AttentionalPooler(16, 12, 2, 3).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 11, 12).to(dtype)
        return run(ours, x), run(theirs, x), run(copy.deepcopy(theirs).double(), x.double())

    judge([draw() for _ in range(6)])


# --- open_flamingo ----------------------------------------------------------------------------------------------------


def flamingo(model: Any, x: Tensor) -> Tensor:
    """open_flamingo's resampler, layer by layer: tokens [B, T, F, V, D]."""
    _, images, frames, *_ = x.shape
    if model.frame_embs is not None:
        x = x + model.frame_embs[:frames, None]
    x = x.flatten(2, 3)
    if model.media_time_embs is not None:
        x = x + model.media_time_embs[:images]
    latents = model.latents.expand(*x.shape[:2], -1, -1)
    for of, (norm, into, act, out) in model.layers:
        own = of.norm_latents(latents)
        k, v = of.to_kv(torch.cat([of.norm_media(x), own], dim=2)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (of.heads, -1)).transpose(2, 3) for t in (of.to_q(own), k, v))
        o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        latents = of.to_out(o.transpose(2, 3).flatten(3)) + latents
        latents = out(act(into(norm(latents)))) + latents
    return F.layer_norm(latents, latents.shape[-1:], model.norm.weight, model.norm.bias)


def resampler(**options: Any) -> Any:
    return drawn(PerceiverResampler(dim=12, depth=2, dim_head=8, heads=2, num_latents=3, **options))


@pytest.mark.parametrize("options", [{}, {"max_num_media": 3, "max_num_frames": 4, "ff_mult": 2}])
def test_is_open_flamingos_resampler(options: dict[str, int]) -> None:
    model, x = resampler(**options).double(), torch.randn(2, 3, 2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(run(model, x), run(model, x, flamingo))


def test_has_the_names_of_open_flamingo() -> None:
    names = {name for name, _ in resampler(max_num_media=1, max_num_frames=1).named_parameters()}
    layer = {"norm_media.weight", "norm_media.bias", "norm_latents.weight", "norm_latents.bias"}
    layer = {f"0.{name}" for name in layer | {"to_q.weight", "to_kv.weight", "to_out.weight"}}
    layer |= {"1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"}
    layers = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == layers | {"latents", "frame_embs", "media_time_embs", "norm.weight", "norm.bias"}


def test_the_resampler_is_no_further_from_float64() -> None:
    def draw() -> tuple[dict[str, Tensor], ...]:
        model, x = resampler(), torch.randn(2, 1, 1, 9, 12)
        return run(model, x), run(model, x, flamingo), run(copy.deepcopy(model).double(), x.double(), flamingo)

    judge([draw() for _ in range(24)])


@pytest.mark.parametrize("target", ["attn", "to_kv", "norm_media"])
def test_adapters_and_hooks_are_called(target: str) -> None:
    """What an adapter adds is what it adds to a weight; a hook is called."""
    peft = pytest.importorskip("peft")
    bare = drawn(AttentionalPooler(16, 16, 2, 3)) if target == "attn" else resampler()
    x = torch.randn(2, 5, 16, dtype=torch.float64) if target == "attn" else torch.randn(2, 1, 1, 5, 12).double()
    want = bare.double()(x)
    if target != "norm_media":
        options = {"r": 2, "init_lora_weights": False, "target_modules": [target]}
        model = peft.get_peft_model(bare.double(), peft.LoraConfig(**options)).double()
        apart = bare(x)
        with model.disable_adapter():
            assert not torch.allclose(bare(x), apart)
        model.merge_adapter()
        torch.testing.assert_close(want := bare(x), apart)
    seen: list[Any] = []
    for name, module in bare.named_modules():
        if name.split(".")[-1] == target:
            module.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(bare(x), want)
    assert seen


def test_names_what_does_not_fit() -> None:
    model = resampler(max_num_media=2, max_num_frames=3)
    for call, message in (
        (lambda: model(torch.zeros(1, 3, 1, 4, 12)), "x has 3 images, expected at most 2"),
        (lambda: model(torch.zeros(1, 1, 4, 4, 12)), "x has 4 frames, expected at most 3"),
        (lambda: model(torch.zeros(1, 1, 4, 4, 11)), r"x has shape .* expected \[B, T, F, V, 12\]"),
        (lambda: PerceiverResampler(dim=12, depth=0), "depth is 0, expected at least 1"),
        (lambda: AttentionalPooler(16, 12, 3), "d_model is 16, expected a multiple of n_head 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
