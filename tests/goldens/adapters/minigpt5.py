from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.minigpt5 import Draws, MiniGPT5


def exact_times(module: Any, given: tuple[Tensor], found: Tensor) -> Tensor:
    """diffusers computes sines of time steps in float32 whatever the rest is in; the stored numbers are of float64."""
    half = module.num_channels // 2
    exponent = torch.arange(half, dtype=torch.float64) / (half - module.downscale_freq_shift)
    angles = given[0][:, None] * (-math.log(10000) * exponent).exp()
    sine, cosine = angles.sin(), angles.cos()
    exact = torch.cat([cosine, sine] if module.flip_sin_to_cos else [sine, cosine], dim=1)
    torch.testing.assert_close(exact.float(), found, rtol=0, atol=1e-3)
    return exact


def run(given: Given) -> dict[str, Tensor]:
    pytest.importorskip("diffusers")  # the UNet
    config = {key: value for key, value in given.model_config.items() if key != "masked_grad_names"}
    model = create("minigpt5", config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    if given.dtype == torch.float64:
        model.unet.time_proj.register_forward_hook(exact_times)
    outputs, _ = before_diffusion(model, given)
    of = given.inputs
    draws = draws_of(given)
    predicted = model.unet(outputs["noisy_latents"], draws.timesteps, outputs["mapping_feature"]).sample
    outputs |= {"model_pred": predicted, "image_loss": model.image_loss(predicted, draws.noise, draws.timesteps)}
    (outputs["dimage_loss_dmapping_feature"],) = torch.autograd.grad(
        outputs["image_loss"], outputs["mapping_feature"], retain_graph=True
    )
    names = ("input_ids", "attention_mask", "labels", "input_images", "latent_moments")
    losses = model(*(of[name] for name in names), *captions_of(given), draws=draws)
    outputs["loss"] = losses.total
    outputs |= gradients(losses.total, model, given.grads)
    outputs |= masked(model, outputs, given.config["masked_grad_names"])
    return {name: t.detach() for name, t in outputs.items()}


def draws_of(given: Given) -> Draws:
    return Draws(*(given.inputs[name] for name in ("latent_noise", "noise", "timesteps", "cfg_drop")))


def captions_of(given: Given) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    of = given.inputs
    if "caption_ids" not in of:
        return None, None
    sd = given.config["tokens"]["sd"]
    empty = torch.full_like(of["caption_ids"][:1], sd["pad"])
    mask = torch.zeros_like(empty)
    length = len(sd["empty_ids"])
    empty[0, :length], mask[0, :length] = torch.tensor(sd["empty_ids"]), 1
    return (of["caption_ids"], of["caption_mask"]), (empty, mask)


def before_diffusion(model: MiniGPT5, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    """What does not need the diffusion model, and the rows of the groups."""
    of, draws = given.inputs, draws_of(given)
    ids, mask, labels, images = (of[name] for name in ("input_ids", "attention_mask", "labels", "input_images"))
    has_image = (ids == model.tokens.image).any(1)
    first = images[has_image][0]
    outputs = {
        "image_embeds": model.model.encode_image(first),
        "query_output": model.model.image_tokens(first),
        "img_embeds": model.model.image_prompt(first[None])[0],
    }
    embedded = model.embed(ids, mask, labels, images)
    outputs |= {"inputs_embeds": embedded.embeds, "llm_labels": embedded.labels}
    outputs["llm_attention_mask"] = embedded.mask.to(given.dtype)
    outputs["text_loss"], outputs["logits"], states = model.read(embedded)
    outputs["last_hidden_state"] = states
    outputs["special_token_index"] = where = model.voken_places(embedded.labels)
    outputs["t2i_input"] = model.voken_states(states, where, draws.drop)
    seen = record_outputs({"fc_output": model.fc, "mapping_memory": model.llm_to_t2i_mapping.encoder})
    outputs["mapping_feature"] = model.conditioning(outputs["t2i_input"])
    outputs |= seen
    rows = where[:, 0]
    outputs["latents"] = model.latents(of["latent_moments"][rows], draws.latent)
    outputs["noisy_latents"] = model.noisy(outputs["latents"], draws.noise, draws.timesteps)
    outputs["alphas_cumprod_at_t"] = model.alphas_cumprod[draws.timesteps]
    outputs["snr_weights"] = model.snr_weights(draws.timesteps)
    captions, empty = captions_of(given)
    if captions is not None:
        outputs["caption_feature"] = model.targets(captions, empty, rows, draws.drop)
        outputs["caption_loss"] = torch.nn.functional.mse_loss(outputs["mapping_feature"], outputs["caption_feature"])
        outputs["empty_text_feature"] = model.caption_features(*empty)
    outputs["ln_vision_probe"] = model.model.ln_vision(of["ln_vision_probe_in"])
    return outputs | _generated(model, given), rows


def masked(model: MiniGPT5, outputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].grad = outputs[f"grad.{name}"].clone()
    model.keep_old_words()
    return {f"masked_grad.{name}": parameters[name].grad for name in names}


def _generated(model: MiniGPT5, given: Given) -> dict[str, Tensor]:
    if "gen_input_ids" not in given.inputs:
        return {}
    inputs: list[Tensor] = []
    hook = model.fc.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    ids, image = given.inputs["gen_input_ids"], given.inputs["gen_image"]
    found = model.generate(ids, image[None], given.config["generate"]["max_new_tokens"], force_image=True)
    hook.remove()
    return {
        "gen_sequence": torch.cat([ids.new_tensor([model.tokens.bos]), found.ids]),
        "gen_t2i_input": inputs[0],
        "gen_prompt_embeds": found.prompt_embeds,
        "gen_negative_prompt_embeds": found.negative_prompt_embeds,
    }
