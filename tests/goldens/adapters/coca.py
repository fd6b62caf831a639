from __future__ import annotations

import torch
from torch import Tensor

from goldens.cases import Given, gradients
from mmfuse.models import create, load_official


def run(given: Given) -> dict[str, Tensor]:
    config = given.model_config
    # open_clip's loss counts by its own pad_id, not by the model's
    loss = {"pad_id": 0} | config.get("loss", {})
    model = create("coca", {"model": config["model"], "loss": loss}).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    image, text = given.inputs["image"], given.inputs["text"]
    out = model(image, text)
    image_latent, image_tokens = model(image).values()
    outputs = {
        "image_latent": out["image_features"],
        "text_latent": out["text_features"],
        "image_latent_raw": model.encode_image(image, normalize=False),
        "text_latent_raw": model.encode_text(text, normalize=False),
        "image_tokens": image_tokens,
        "text_tokens": model.text(text)[1],
        "caption_logits": out["logits"],
        "labels": out["labels"],
        "logit_scale_exp": out["logit_scale"],
        "caption_logits_full": model(image, text, image_latent, image_tokens, output_labels=False)["logits"],
    }
    outputs |= _greedy(model, image, given)
    if image_latent.dim() > 2:  # a pooler of open_clip's that its own loss does not take
        return outputs
    outputs |= model.losses(image, text) | {"loss": model.loss(image, text)}
    return outputs | gradients(outputs["loss"], model, given.grads)


@torch.no_grad()
def _greedy(model: torch.nn.Module, image: Tensor, given: Given) -> dict[str, Tensor]:
    if "greedy" not in given.config:
        return {}
    ids = image.new_full((len(image), 1), given.config["greedy"]["sot"], dtype=torch.long)
    captioner = model.captioner(image)
    for _ in range(given.config["greedy"]["steps"]):
        logits = captioner(ids[:, -1:])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return {"greedy_ids": ids, "greedy_last_logits": logits}
