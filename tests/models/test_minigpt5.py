from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.models.minigpt5 import Draws, MiniGPT5, moments, paint
from tiny import BERT, LLAMA, VIT

CONFIG = {
    "img_token_num": 3,
    "args": {"image_size": 16, "num_query_token": 2},
    "vit": VIT,
    "bert": BERT,
    "llama": LLAMA,
    "clip_text": {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llm_to_t2i_mapping": {"d_model": 16, "nhead": 2, "dim_feedforward": 24},
    "tokens": {
        "llm": {"bos": 1, "eos": 2, "IMG0": 50, "ImageHere": 53, "base_size": 50, "size": 54},
        "sd": {"max_length": 5},
    },
}


class Denoiser(nn.Module):
    """As small as a UNet of latents [G, 4, h, w] under conditioning [G, P, 16] can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 4)

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Tensor) -> Any:
        shift = self.project(conditioning.mean(1)) + timesteps[:, None] / 1000
        return SimpleNamespace(sample=self.conv(latents) + shift[:, :, None, None])


def make(**changes: Any) -> MiniGPT5:
    torch.manual_seed(0)
    model = models.create("minigpt5", copy.deepcopy(CONFIG) | changes)
    model.unet = Denoiser().requires_grad_(False)
    model = model.double().eval()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


# an image is read, and one is written; words alone; an image is written
IDS = torch.tensor([[20, 53, 21, 50, 51, 52, 22], [23, 24, 25, 26, 27, 2, 2], [28, 29, 50, 51, 52, 2, 2]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 5 + [0] * 2])
LABELS = torch.tensor(
    [[-100, -100, -100, 50, -100, 52, 22], [-100, -100, 25, 26, 27, -100, -100], [-100, -100, 50, -100, 52, -100, -100]]
)


def batch() -> tuple[Tensor, ...]:
    images, moments = torch.randn(3, 1, 3, 16, 16), torch.randn(3, 8, 4, 4)
    return IDS, MASK, LABELS, images.double(), moments.double()


@pytest.mark.parametrize(("preset", "millions"), [("vicuna-7b", 385.1), ("vicuna-7b-stage-2", 384.0)])
def test_parameter_counts_of_the_models_page(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.create("minigpt5", preset)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == millions
    conditioning = [*model.fc.parameters(), *model.llm_to_t2i_mapping.parameters(), model.t2i_decoder_prompt]
    assert round(sum(p.numel() for p in conditioning) / 1e6, 1) == 122.9


def test_the_states_that_become_an_image() -> None:
    model, (ids, mask, labels, images, _) = make(), batch()
    given = model.embed(ids, mask, labels, images)
    assert given.embeds.shape[1] == 1 + 6 + 2
    assert given.mask.sum(1).tolist() == [9, 6, 6] and not given.embeds[1, 8:].any()
    # bos, a word and an image's two rows are before the word that comes before the vokens
    where = model.voken_places(given.labels)
    assert where.tolist() == [[0, 4], [2, 2]]
    _, _, states = model.read(given)
    found = model.voken_states(states, where, torch.tensor([0, 1]))
    assert torch.equal(found[0], states[0, 4:7]) and not found[1].any()


@pytest.mark.parametrize("stage_2", [False, True])
def test_what_learns(stage_2: bool) -> None:
    model = make(IS_STAGE2=stage_2, USE_LORA=stage_2).train()
    captions = torch.randint(2, 20, (3, 5)), torch.ones(3, 5, dtype=torch.int64)
    empty = torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    losses = model(*batch(), captions, empty)
    torch.testing.assert_close(losses.total, 0.01 * losses.text_loss + losses.image_loss + 0.1 * losses.caption_loss)
    losses.total.backward()
    always = ("llm_to_t2i_mapping.",)
    here = ("lora_", "modules_to_save") if stage_2 else ("embed_tokens", "lm_head", "fc.", "t2i_decoder_prompt")
    for name, p in model.named_parameters():
        learns = any(part in name for part in (*always, *here))
        assert (p.grad is not None) == learns, name
    model.keep_old_words()
    for name, p in model.named_parameters():
        if p.grad is not None and ("embed_tokens" in name or "lm_head" in name):
            assert not p.grad[:50].any() and p.grad[50:].any(), name


def test_noise_is_that_of_the_timestep() -> None:
    model = make()
    latents, noise, timesteps = (
        torch.ones(2, 4, 2, 2).double(),
        torch.zeros(2, 4, 2, 2).double(),
        torch.tensor([0, 999]),
    )
    got = model.noisy(latents, noise, timesteps)[:, 0, 0, 0] ** 2
    # of Stable Diffusion: 1 - 0.00085 at first, 0.0047 at last
    assert got[0].item() == pytest.approx(1 - 0.00085, abs=1e-6) and got[1].item() == pytest.approx(0.00466, abs=1e-4)
    weights = model.snr_weights(timesteps)
    assert weights[1] == 1 and weights[0].item() == pytest.approx(5 * 0.00085 / (1 - 0.00085), rel=1e-3)


def test_a_step_repeats_with_its_draws() -> None:
    model, inputs = make(), batch()
    draws = model.draw(inputs[-1][:2], 2)
    first, second = (model(*inputs, draws=Draws(*draws)) for _ in range(2))
    assert torch.equal(first.total, second.total) and first.caption_loss is None


def test_a_voken_is_read_with_its_group() -> None:
    model, (_, _, _, images, _) = make(), batch()
    prompt = IDS[:1, :3]
    found = model.generate(prompt, images[:1], max_new_tokens=1, force_image=True)
    assert found.ids.tolist() == [50]
    # as if the vokens had been there
    ids = torch.tensor([[20, 53, 21, 50, 51, 52]])
    labels = torch.full_like(ids, -100).masked_fill(ids == 50, 50)
    given = model.embed(ids, torch.ones_like(ids), labels, images[:1])
    states = model.voken_states(model.read(given)[2], model.voken_places(given.labels), torch.zeros(1))
    torch.testing.assert_close(found.prompt_embeds, model.conditioning(states))
    torch.testing.assert_close(found.negative_prompt_embeds, model.conditioning(torch.zeros_like(states)))
    model.model.llama_model.lm_head.weight.data[50:] = 0
    assert model.generate(prompt, images[:1], max_new_tokens=1).prompt_embeds is None


def test_names_what_does_not_fit() -> None:
    model = make()
    model.unet = None
    with pytest.raises(ValueError, match=r"unet is None, expected the diffusion model's"):
        model(*batch())
    with pytest.raises(ValueError, match=r"beta_schedule is 'linear', expected 'scaled_linear'"):
        models.create("minigpt5", CONFIG | {"scheduler": {"beta_schedule": "linear"}})


def test_words_are_drawn_from_a_nucleus() -> None:
    model, (_, _, _, images, _) = make(), batch()
    prompt, drawn = IDS[:1, :3], set()
    likeliest = model.generate(prompt, images[:1], max_new_tokens=4).ids
    assert torch.equal(model.generate(prompt, images[:1], max_new_tokens=4, top_p=1e-9).ids, likeliest)
    for seed in range(3):
        torch.manual_seed(seed)
        drawn.add(tuple(model.generate(prompt, images[:1], max_new_tokens=4, top_p=0.99).ids.tolist()))
    assert len(drawn) > 1


# --- diffusers' own classes -------------------------------------------------------------------------------------------


def parts() -> tuple[Any, Any, Any]:
    """(unet, vae, scheduler) of random weights."""
    allow_torchvision()
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return unet.eval(), vae.eval(), scheduler


def painter(unet: Any) -> MiniGPT5:
    torch.manual_seed(0)
    model = models.create("minigpt5", copy.deepcopy(CONFIG))
    model.unet = unet.requires_grad_(False)
    return model.eval()


def test_a_step_of_training() -> None:
    unet, vae, scheduler = parts()
    model = painter(unet)
    torch.testing.assert_close(model.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5, atol=0)
    read, written = torch.randn(3, 1, 3, 16, 16), torch.rand(3, 3, 8, 8) * 2 - 1
    of_images = moments(vae, written)
    assert of_images.shape == (3, 8, 4, 4)
    mean, _ = of_images.chunk(2, 1)
    torch.testing.assert_close(vae.encode(written).latent_dist.mode(), mean)
    draws = model.draw(of_images, 2)
    scaled = model.latents(of_images[[0, 2]], draws.latent)
    torch.testing.assert_close(
        model.noisy(scaled, draws.noise, draws.timesteps), scheduler.add_noise(scaled, draws.noise, draws.timesteps)
    )
    losses = [model(IDS, MASK, LABELS, read, of_images, draws=draws).total]
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        losses.append(model(IDS, MASK, LABELS, read, of_images, draws=draws).total)
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))
    assert model.fc[0].weight.grad is not None and all(p.grad is None for p in unet.parameters())


def images(guidance: float) -> tuple[Tensor, Tensor]:
    """(ours, diffusers' pipeline's) of the same conditioning and the same noise."""
    from diffusers import StableDiffusionPipeline

    unet, vae, scheduler = parts()
    model = painter(unet)
    found = model.generate(IDS[:1, :3], torch.randn(1, 1, 3, 16, 16), max_new_tokens=1, force_image=True)
    latents = torch.randn(2, 4, 4, 4)
    pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert found.prompt_embeds is not None and found.negative_prompt_embeds is not None
    theirs = pipeline(
        prompt_embeds=found.prompt_embeds.expand(2, -1, -1),
        negative_prompt_embeds=found.negative_prompt_embeds.expand(2, -1, -1),
        latents=latents,
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    return paint(unet, vae, scheduler, found, latents, steps=4, guidance=guidance), theirs


@pytest.mark.parametrize("guidance", [7.5, 2.0])
def test_images_are_those_of_the_pipeline(guidance: float) -> None:
    ours, theirs = images(guidance)
    assert ours.shape == (2, 3, 8, 8) and ours.std() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_vokens() -> None:
    unet, vae, scheduler = parts()
    found = painter(unet).generate(IDS[:1, :3], torch.randn(1, 1, 3, 16, 16), max_new_tokens=0)
    with pytest.raises(ValueError, match="found has no prompt_embeds"):
        paint(unet, vae, scheduler, found, torch.randn(1, 4, 4, 4))
