from __future__ import annotations

import torch
from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.blip2.language import in_order, sample_losses
from mmfuse.models.instructblip import Instructed, Vicuna

_TEXTS = ("llm_input_ids", "llm_input_mask", "llm_output_ids", "llm_output_mask")


def run(given: Given) -> dict[str, Tensor]:
    model = create("instructblip", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    of = given.inputs
    image, instruction = of["image"], (of["qformer_ids"], of["qformer_mask"])
    ids, mask, output_ids, output_mask = (of[name] for name in _TEXTS)
    outputs = {"image_tokens": model.visual_encoder(image), "image_embeds": model.encode_image(image)}
    texts = ([instruction[0]], [instruction[1].sum(1)]) if model.bert.config.text else ()
    states = model.bert(model.query_tokens, *texts, kv=model.bert.project(outputs["image_embeds"]))
    outputs["query_output"] = torch.cat(states, dim=1)
    outputs["inputs_llm"] = prompt = model.image_prompt(image, *instruction)
    answer = model(image, *instruction, ids, mask, output_ids, output_mask)
    outputs |= {"logits": answer.logits, "loss": answer.loss}
    if isinstance(model, Vicuna):
        words = model.prompt(prompt, ids, mask, output_ids, output_mask)
        outputs["llm_token_ids"] = model.words(ids, mask, output_ids, output_mask)[0]
        outputs["loss_reduction_none"] = sample_losses(answer.logits, words.labels)
    else:
        words = model.prompt(prompt, ids, mask, output_ids)
    outputs |= {"attention_mask": words.mask, "targets": words.labels}
    outputs["ln_vision_probe"] = model.ln_vision(of["ln_vision_probe_in"])
    outputs |= _generated(model, given)
    outputs |= gradients(outputs["loss"], model, given.grads)
    return {name: t.detach() for name, t in outputs.items()}


def _generated(model: Instructed, given: Given) -> dict[str, Tensor]:
    of, how = given.inputs, dict(given.config["generate"])
    instruction = of["gen_qformer_ids"], of["gen_qformer_mask"]
    ids, mask = of["gen_llm_input_ids"], of["gen_llm_input_mask"]
    length, placeholder = how.pop("max_length"), None
    how |= {"do_sample": False, "num_beams": 1}
    if isinstance(model, Vicuna):  # a first token that is never seen counts in both lengths
        length, how["min_new_tokens"] = length - 1, how.pop("min_length") - 1
        placeholder = ids.new_full((len(ids), 1), given.config["llama"]["bos_token_id"])
    new = model.generate(of["video"], *instruction, ids, mask, **how, max_new_tokens=length)
    head = record_outputs({"logits": model.language.lm_head})
    model.generate(of["video"], *instruction, ids, mask, **how | {"max_new_tokens": 1})
    prompt = model.image_prompt(of["video"], *instruction)
    if placeholder is not None:
        ids, mask = in_order(ids, mask), in_order(mask, mask)
    return {
        "gen_inputs_llm": prompt,
        "gen_attention_mask": model.with_words(prompt, ids, mask)[1],
        "gen_token_ids": ids,
        "generated_ids": new if placeholder is None else torch.cat([placeholder, new], dim=1),
        "gen_first_logits": head["logits"][:, -1],
    }
