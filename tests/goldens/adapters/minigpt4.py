from __future__ import annotations

import torch
from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.blip2.language import sample_losses
from mmfuse.models.minigpt4 import MiniGPT4


def run(given: Given) -> dict[str, Tensor]:
    model = create("minigpt4", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    of = given.inputs
    image = of["image"]
    images = image.flatten(0, 1) if image.dim() == 5 else image
    outputs = {
        "image_tokens": model.visual_encoder(images),
        "image_embeds": model.encode_image(images),
        "proj_input": model.image_tokens(images),
        "img_embeds": model.image_prompt(image).flatten(0, 1),
    }
    if "conv_q_ids" in of:
        turns = model.conversation(of["conv_q_ids"], of["conv_a_ids"])
        prompt_ids, ids, labels = turns
        answer = model(image, *turns)
    else:
        prompt_ids = model.question(of["prompt_ids"]) if model.chat_template else of["prompt_ids"]
        ids = model.answer(of["answer_ids"])[:, : model.max_txt_len]
        labels = model.targets(ids)
        answer = model(image, of["prompt_ids"], of["answer_ids"])
    outputs["cond_embeds"], outputs["cond_atts"] = model.wrap(prompt_ids, model.image_prompt(image))
    outputs |= {"regress_atts": (ids >= 0).long(), "part_targets": labels}
    prompt = model.prompt(image, prompt_ids, ids, labels)
    outputs |= {"inputs_embeds": prompt.embeds, "attention_mask": prompt.mask, "targets": prompt.labels}
    outputs |= {"logits": answer.logits, "loss": answer.loss}
    outputs["loss_reduction_none"] = sample_losses(answer.logits, prompt.labels)
    outputs["ln_vision_probe"] = model.ln_vision(of["ln_vision_probe_in"])
    outputs |= _generated(model, given)
    names = {name: next(iter(model.official_state({name: given.params[name]}))) for name in given.grads}
    grads = gradients(outputs["loss"], model, names.values())
    outputs |= {f"grad.{name}": grads[f"grad.{own}"] for name, own in names.items()}
    return {name: t.detach() for name, t in outputs.items()}


def _generated(model: MiniGPT4, given: Given) -> dict[str, Tensor]:
    image, ids = given.inputs["gen_image"], given.inputs["gen_prompt_ids"]
    how = {"do_sample": False, "num_beams": 1} | given.config["generate"]
    new = model.generate(image, ids, **how)
    head = record_outputs({"logits": model.llama_model.get_output_embeddings()})
    model.generate(image, ids, **how | {"max_new_tokens": 1})
    embeds, mask = model.context(image, ids)
    # a first token that is never seen
    placeholder = new.new_full((len(new), 1), given.config["llama"]["bos_token_id"])
    return {
        "gen_inputs_embeds": embeds,
        "gen_attention_mask": mask,
        "generated_ids": torch.cat([placeholder, new], dim=1),
        "gen_first_logits": head["logits"][:, -1],
    }
