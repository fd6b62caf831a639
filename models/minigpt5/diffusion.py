"""Stable Diffusion's part of MiniGPT-5, over diffusers' classes: images to moments, and conditioning to images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.arguments import check
from mmfuse.models.minigpt5.model import Generated


@torch.no_grad()
def moments(vae: Any, images: Tensor) -> Tensor:
    """[B, 2 c, h, w], what `MiniGPT5` learns to denoise a sample of: of images [B, 3, H, W] from -1 to 1.

    Args:
        vae: diffusers' `AutoencoderKL`.
    """
    return vae.encode(images).latent_dist.parameters


@torch.no_grad()
def paint(
    unet: Any, vae: Any, scheduler: Any, found: Generated, latents: Tensor, steps: int = 50, guidance: float = 7.5
) -> Tensor:
    """The images [G, 3, H, W], from 0 to 1, of what `MiniGPT5.generate` found.

    Noise is predicted with the conditioning and with that of no features, e = e_0 + guidance (e_c - e_0) (Ho & Salimans
    2022, arXiv:2207.12598), and taken out by the scheduler's steps.

    Args:
        unet, vae, scheduler: diffusers' `UNet2DConditionModel`, `AutoencoderKL` and a scheduler of noise predictions.
        found: with a group of vokens.
        latents: [G, c, h, w], normal, as the result's dtype.
        steps: of the scheduler.
        guidance: 1 for none.

    Deterministic where the scheduler and torch's convolutions are.

    Raises:
        ValueError: there are no vokens, or steps is less than 1.
    """
    if found.prompt_embeds is None or found.negative_prompt_embeds is None:
        raise ValueError("found has no prompt_embeds, expected those of a group of vokens")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    check("latents", latents, ("G", unet.config.in_channels, "h", "w"))
    groups = len(latents)
    both = [t.expand(groups, -1, -1) for t in (found.negative_prompt_embeds, found.prompt_embeds)]
    conditioning = torch.cat(both)
    scheduler.set_timesteps(steps, device=latents.device)
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, conditioning).sample
        without, given = noise.chunk(2)
        x = scheduler.step(without + guidance * (given - without), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
