from __future__ import annotations

import torch
from torch import Tensor

from goldens.cases import Given
from mmfuse.models import create, load_official
from mmfuse.models.beit3 import BEiT3ForTasks, Captioner, generate


def run(given: Given) -> dict[str, Tensor]:
    model = create("beit3", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    outputs = _outputs(model, given)
    # an official parameter is a part of one of ours: as functions of the official ones
    official = {name: t.clone().requires_grad_() for name, t in given.params.items()}
    total = torch.func.functional_call(
        _Total(model, given), {f"model.{k}": t for k, t in model.official_state(official).items()}
    )
    grads = torch.autograd.grad(total, [official[name] for name in given.grads])
    return outputs | {f"grad.{name}": grad for name, grad in zip(given.grads, grads, strict=True)}


class _Total(torch.nn.Module):
    def __init__(self, model: BEiT3ForTasks, given: Given):
        super().__init__()
        self.model, self.given = model, given

    def forward(self) -> Tensor:
        return sum(_losses(self.model, self.given).values())


def _losses(model: BEiT3ForTasks, given: Given) -> dict[str, Tensor]:
    of, losses = given.inputs, {}
    image, ids, padding = (of[name] for name in ("image", "text_ids", "padding_mask"))
    if "retrieval" in model.tasks:
        losses["retrieval"] = model.retrieval(image, ids, padding).loss
    if "nlvr2" in model.tasks:
        logits = model.visual_reasoning(image, of["image2"], ids, padding)
        losses["nlvr2"] = torch.nn.functional.cross_entropy(logits, of["nlvr2_label"])
    if "captioning" in model.tasks:
        masked = of["caption_language_masked_pos"]
        logits = model.caption_logits(image, of["caption_masked_tokens"], padding, masked)
        losses["captioning"] = model.caption_loss(logits, ids[masked.bool()])
    if "vqa" in model.tasks:
        losses["vqa"] = model.answer_loss(model.answer(image, ids, padding), of["vqa_labels"])
    if "imageclassification" in model.tasks:
        losses["imageclassification"] = model.class_loss(model.classify(image), of["class_label"])
    return losses


@torch.no_grad()
def _outputs(model: BEiT3ForTasks, given: Given) -> dict[str, Tensor]:
    of, losses = given.inputs, _losses(model, given)
    image, ids, padding = (of[name] for name in ("image", "text_ids", "padding_mask"))
    outputs = {f"{task}.loss": loss for task, loss in losses.items()} | {"total_loss": sum(losses.values())}
    outputs["image_only"] = model(image=image).image
    outputs["text_only"] = model(text_ids=ids, padding_mask=padding).text
    outputs["vision_language"] = torch.cat(model(image, ids, padding), dim=1)
    outputs["vision_language_embedding"] = torch.cat(model.beit3.embed(image, ids, positions=False), dim=1)
    outputs["masked_image_language"] = torch.cat(model(image, ids, padding, of["vision_masked_position"]), dim=1)
    if "retrieval" in model.tasks:
        found = model.retrieval(image, ids, padding)
        outputs |= {"retrieval.vision_cls": found.image, "retrieval.language_cls": found.text}
        outputs["retrieval.logits_per_image"] = model.logit_scale.exp() * found.image @ found.text.T
    if "nlvr2" in model.tasks:
        outputs["nlvr2.logits"] = model.visual_reasoning(image, of["image2"], ids, padding)
    if "vqa" in model.tasks:
        outputs["vqa.logits"] = model.answer(image, ids, padding)
    if "imageclassification" in model.tasks:
        outputs["imageclassification.logits"] = model.classify(image)
    if "captioning" in model.tasks:
        outputs |= _captions(model, given)
    return outputs


def _captions(model: BEiT3ForTasks, given: Given) -> dict[str, Tensor]:
    of = given.inputs
    image, padding, words = (of[name] for name in ("image", "padding_mask", "incremental_words"))
    masked, positions = of["caption_masked_tokens"], of["caption_language_masked_pos"]
    logits = model.caption_logits(image, masked, padding, positions)
    late = model.drop_worst_after + 1
    outputs = {
        "captioning.masked_logits": logits,
        "captioning.all_logits": model.caption_logits(image, masked, padding),
        "captioning.loss_drop_worst": model.caption_loss(logits, of["text_ids"][positions.bool()], late),
    }
    captioner = Captioner(model, image)
    ids = torch.cat([words.new_full((len(words), 1), model.token_ids["cls"]), words], dim=1)
    for step in range(ids.shape[1]):
        logits = captioner(ids[:, step : step + 1])
        if step == 0:
            outputs["captioning.incremental_first_call_logits"] = logits
        outputs[f"captioning.incremental_step{step}_logits"] = logits[:, 1]
    outputs["captioning.beam_ids"], outputs["captioning.beam_scores"] = generate(model, image)
    return outputs
