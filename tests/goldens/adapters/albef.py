from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.albef import ALBEF, Features, MaskDraws

_DRAWS = ("draw_masked", "draw_replace", "draw_random", "random_words")


def run(given: Given) -> dict[str, Tensor]:
    model = create("albef", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    step = {"pretrain": _pretrain, "retrieval": _retrieval, "vqa": _vqa}[given.config["variant"]]
    outputs = step(model, given)
    outputs |= gradients(outputs["loss"], model, given.grads)
    return {name: t.detach() for name, t in outputs.items()}


def _after(model: nn.Module) -> dict[str, Tensor]:
    return {f"after.{key}": t.clone() for key, t in model.state_dict().items()}


def _pretrain(model: ALBEF, given: Given) -> dict[str, Tensor]:
    image, ids, mask = (given.inputs[name] for name in ("image", "text_ids", "text_mask"))
    alpha = given.config["forward"]["alpha"]
    before = copy.deepcopy(model)
    before.clamp_temp()
    outputs = _contrast(before, image, ids, mask, alpha)
    draws = MaskDraws(*(given.inputs[f"mlm_{name}"] for name in _DRAWS))
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    losses = model(image, ids, mask, alpha, negatives=negatives, mask_draws=draws)
    outputs |= _after(model) | {"loss_mlm": losses.loss_mlm, "loss_ita": losses.loss_ita, "loss_itm": losses.loss_itm}
    outputs["loss"] = losses.total
    masked, labels = model.mask_tokens(ids, draws)
    with torch.no_grad():
        f, f_m = model.features(image, ids, mask), model.features(image, ids, mask, "_m")
        logits = model.text_encoder.logits(masked, mask, f.image_embeds)
        logits_m = model.text_encoder_m.logits(masked, mask, f_m.image_embeds)
    outputs["itm_logits"] = model.itm(f, mask, negatives)[1]
    return outputs | {
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "mlm_logits": logits,
        "mlm_logits_m": logits_m,
    }


def _retrieval(model: ALBEF, given: Given) -> dict[str, Tensor]:
    image, ids, mask, idx = (given.inputs[name] for name in ("image", "text_ids", "text_mask", "idx"))
    alpha = given.config["forward"]["alpha"]
    outputs = _contrast(copy.deepcopy(model), image, ids, mask, alpha if model.distill else 0.0, idx)
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    losses = model(image, ids, mask, idx, alpha, negatives=negatives)
    outputs |= _after(model) | {"loss": losses.total, "loss_ita": losses.loss_ita, "loss_itm": losses.loss_itm}
    outputs["itm_logits"] = model.itm(model.features(image, ids, mask), mask, negatives)[1]
    return outputs


@torch.no_grad()
def _contrast(
    model: ALBEF, image: Tensor, ids: Tensor, mask: Tensor, alpha: float, idx: Tensor | None = None
) -> dict[str, Tensor]:
    """What a step computes before it draws: features, similarities, targets, and the likeliest negatives."""
    model.momentum_update()
    f, f_m = model.features(image, ids, mask), model.features(image, ids, mask, "_m")
    outputs = Features._asdict(f) | {"image_feat_m": f_m.image_feat, "text_feat_m": f_m.text_feat}
    outputs["loss_i2t"], outputs["loss_t2i"] = model.itc(f, f_m, alpha, idx)
    text_all = torch.cat([f_m.text_feat.T, model.text_queue], dim=1)
    image_all = torch.cat([f_m.image_feat.T, model.image_queue], dim=1)
    same = torch.eye(len(image), text_all.shape[1], device=image.device)
    if idx is not None:
        same = (idx[:, None] == torch.cat([idx, model.idx_queue[0]])).float()
    outputs["sim_targets"] = same = same.to(f.image_feat.dtype) / same.sum(1, keepdim=True)
    for way, query, query_m, keys, negative in (
        ("i2t", f.image_feat, f_m.image_feat, text_all, "neg_text_idx"),
        ("t2i", f.text_feat, f_m.text_feat, image_all, "neg_image_idx"),
    ):
        outputs[f"sim_{way}"] = sim = query @ keys / model.temp
        outputs[f"sim_{way}_targets"] = alpha * (query_m @ keys / model.temp).softmax(1) + (1 - alpha) * same
        weights = sim[:, : len(image)].softmax(1).masked_fill(same[:, : len(image)] > 0, 0)
        outputs[f"weights_{way}"], outputs[negative] = weights, weights.argmax(1)
    return outputs


def _vqa(model: nn.Module, given: Given) -> dict[str, Tensor]:
    inputs, run = given.inputs, given.config["forward"]
    image = inputs["image"]
    question, answer, candidates = (
        (inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in ("question", "answer", "candidate")
    )
    outputs = record_outputs({"image_embeds": model.visual_encoder, "question_states": model.text_encoder})
    outputs["loss"] = model(image, *question, *answer, run["k"], inputs["weights"], run["alpha"])
    outputs = dict(outputs) | _after(model)
    with torch.no_grad():
        k = torch.tensor(run["k"], device=image.device)
        states, mask = outputs["question_states"].repeat_interleave(k, 0), question[1].repeat_interleave(k, 0)
        outputs["answer_logits"] = model.text_decoder.logits(*answer, states, mask)
        teacher = None
        if model.distill:
            states_m = model.question(image, *question, "_m").repeat_interleave(k, 0)
            hidden_m = model.text_decoder_m.hidden(*answer, states_m, mask)[:, :-1]
            outputs["answer_logits_m"] = model.text_decoder_m.cls.predictions.decoder(hidden_m)
            teacher = model.text_decoder_m, hidden_m
        outputs["answer_loss"] = model.answer_loss(states, mask, *answer, teacher, run["alpha"])
    ranked = model.rank_answer(image, *question, *candidates, run["k_test"])
    return outputs | {
        "rank_topk_ids": ranked.ids,
        "rank_topk_probs": ranked.probs,
        "rank_prob_first_token": ranked.first_token,
        "rank_log_probs_sum": ranked.log_probs,
    }
