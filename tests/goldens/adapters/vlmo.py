from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from goldens.cases import Given
from mmfuse.models import create, load_official
from mmfuse.models.vlmo import VLMo


def run(given: Given) -> dict[str, Tensor]:
    model = create("vlmo", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    with torch.no_grad():
        outputs = _outputs(model, given.inputs)
    # an official parameter is a part of one of ours: as functions of the official ones
    official = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in given.params.items()}
    state = {f"model.{name}": t for name, t in model.official_state(official).items()}
    total = torch.func.functional_call(_Total(model, given.inputs, outputs), state)
    grads = torch.autograd.grad(total, [official[name] for name in given.grads])
    return outputs | {f"grad.{name}": grad for name, grad in zip(given.grads, grads, strict=True)}


class _Total(torch.nn.Module):
    def __init__(self, model: VLMo, of: dict[str, Tensor], found: dict[str, Tensor]):
        super().__init__()
        self.model, self.of, self.found = model, of, found

    def forward(self) -> Tensor:
        return sum(_losses(self.model, self.of, self.found).values())


def _losses(model: VLMo, of: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask, names = of["text_ids"], of["text_masks"], model.config.names
    losses = {}
    if "itm" in names:
        negatives = found["itm_neg_image_index"], found["itm_neg_text_index"]
        step = model.pretrain(of["image"], ids, mask, of["text_ids_mlm"], of["text_labels_mlm"], negatives)
        losses |= {f"{name}_loss": loss for name, loss in step._asdict().items()}
    if "textmlm" in names:
        losses["textmlm_loss"] = model.text_loss(of["text_ids_mlm"], mask, of["text_labels_mlm"])
    if "irtr" in names:
        losses["irtr_loss"] = model.contrastive_loss(model.retrieval(of["image"], ids, mask))
    if "vqa" in names:
        losses["vqa_loss"] = model.answer_loss(model.answer(of["image"], ids, mask), of["vqa_targets"])
    if "nlvr2" in names:
        logits = model.visual_reasoning(of["image_0"], of["image_1"], ids, mask)
        losses["nlvr2_loss"] = F.cross_entropy(logits, of["nlvr2_labels"])
    return losses


def _outputs(model: VLMo, of: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask, names = of["text_ids"], of["text_masks"], model.config.names
    outputs = {}
    if model.transformer.table is not None:
        length, index = model.config.max_text_len, model.transformer.index
        outputs["relative_position_index"] = index[length:, length:]
        outputs["text_relative_position_index"] = index[:length, :length]
        outputs["text_imag_relative_position_index"] = index
    if "textmlm" in names:
        found = model(model.texts(of["text_ids_mlm"], mask))
        outputs |= {"text_only_mlm.text_feats": found.text, "text_only_mlm.raw_cls_feats": found.raw_cls}
        outputs["textmlm_logits"] = model.word_head(found.text)
    if "image" in of:
        single = "" if "itc" in names else "_ft"
        batches = [model.images(of["image"], fused=not single), model.texts(ids, mask, fused=not single)]
        hidden = model.transformer(batches)
        f, (image, text) = model.contrast(*hidden), map(model.features, hidden)
        pair = model(model.pairs(ids, mask, of["image"]))
        outputs |= {f"image_only{single}.image_feats": image.image, f"text_only{single}.text_feats": text.text}
        outputs |= {f"image_only{single}.cls_feats": f.image, f"text_only{single}.cls_feats": f.text}
        outputs |= {
            f"image_only{single}.raw_cls_feats": image.raw_cls,
            f"text_only{single}.raw_cls_feats": text.raw_cls,
        }
        outputs |= {"fused.text_feats": pair.text, "fused.image_feats": pair.image}
        outputs |= {"fused.cls_feats": model.pooled(pair), "fused.raw_cls_feats": pair.raw_cls}
        logits = model.logit_scale.exp() * f.image @ f.text.T
        name = "irtr" if single else "itc"
        outputs |= {f"{name}_i2t_logits": logits, f"{name}_t2i_logits": logits.T}
        if not single:
            outputs |= {"image_only.cls_vlffn_feats": f.image_fused, "text_only.cls_vlffn_feats": f.text_fused}
    if "itm" in names:
        other = torch.eye(len(logits), device=logits.device) == 0
        images, texts = ((sim.softmax(1) * other).argmax(1) for sim in (logits.T, logits))
        outputs |= {"itm_neg_image_index": images, "itm_neg_text_index": texts}
        outputs["itm_logits"] = model.match(of["image"], ids, mask, (images, texts))
        outputs["itm_labels"] = (torch.arange(3 * len(ids), device=ids.device) < len(ids)).long()
        masked = model(model.pairs(of["text_ids_mlm"], mask, of["image"]))
        outputs |= {"fused_mlm_input.text_feats": masked.text, "mlm_logits": model.word_head(masked.text)}
    if "vqa" in names:
        outputs["vqa_logits"] = model.answer(of["image"], ids, mask)
    if "nlvr2" in names:
        outputs["nlvr2_logits"] = model.visual_reasoning(of["image_0"], of["image_1"], ids, mask)
    losses = _losses(model, of, outputs)
    return outputs | losses | {"total_loss": sum(losses.values())}
