from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.blip import BLIP, Features


def run(given: Given) -> dict[str, Tensor]:
    model = _model(given, given.model_config)
    load_official(model, given.params)
    step = {"pretrain": _pretrain, "retrieval": _retrieval, "vqa": _vqa}[given.config["variant"]]
    outputs = step(model, given)
    outputs |= gradients(outputs["loss"], model, given.grads)
    return {name: t.detach() for name, t in outputs.items() if t is not None}


def _model(given: Given, config: dict) -> nn.Module:
    return create("blip", config).to(given.device, given.dtype).eval()


def _after(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    if "idx_queue" in state:
        state["ptr_queue"] = state["queue_ptr"]
    return {f"after.{key}": t.clone() for key, t in state.items()}


def _pretrain(model: BLIP, given: Given) -> dict[str, Tensor]:
    image, ids, mask = (given.inputs[name] for name in ("image", "text_ids", "text_mask"))
    alpha = given.config["forward"]["alpha"]
    outputs = _contrast(copy.deepcopy(model), image, ids, mask, alpha)
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    losses = model(image, ids, mask, alpha, negatives=negatives)
    outputs |= _after(model) | losses._asdict() | {"loss": losses.total}
    outputs |= _matching(model, image, ids, mask, negatives)
    with torch.no_grad():
        embeds, _ = model.encode_image(image)
        context = model.context(embeds)
        outputs["base_text"], outputs["base_multimodal"] = (
            model.encode_text(ids, mask)[0],
            model.fuse(context, ids, mask),
        )
        started = ids.clone()
        started[:, 0] = given.config["tokenizer"]["bos_token_id"]
        outputs["decoder_logits"] = model.text_decoder.logits(started, mask, context)
        return outputs | _captions(given, image, ids, mask)


def _captions(given: Given, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the class of captioning makes of the weights of its parts."""
    config = given.model_config
    size = {"image_size": config["config"]["image_size"]}
    captioner = _model(given, config | {"variant": "caption", "config": size})
    parts = ("visual_encoder.", "text_decoder.")
    load_official(captioner, {key: t for key, t in given.params.items() if key.startswith(parts)})
    run = given.config["forward"]
    lengths = {"max_length": run["max_length"], "min_length": run["min_length"]}
    greedy = captioner.generate(image, num_beams=1, **lengths)
    context = captioner.text_decoder.bert.context(captioner.visual_encoder(image))
    penalty = run["repetition_penalty"]
    return {
        "decoder_loss": captioner(image, ids, mask),
        "greedy_ids": greedy,
        "beam3_ids": captioner.generate(image, num_beams=3, **lengths),
        "greedy_reppen_ids": captioner.generate(image, num_beams=1, repetition_penalty=penalty, **lengths),
        "greedy_logits": captioner.text_decoder.logits(greedy, torch.ones_like(greedy), context),
    }


def _retrieval(model: BLIP, given: Given) -> dict[str, Tensor]:
    image, ids, mask, idx = (given.inputs[name] for name in ("image", "text_ids", "text_mask", "idx"))
    alpha = given.config["forward"]["alpha"]
    outputs = _contrast(copy.deepcopy(model), image, ids, mask, alpha, idx)
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    losses = model(image, ids, mask, idx, alpha, negatives=negatives)
    outputs |= _after(model) | losses._asdict() | {"loss": losses.total}
    outputs |= _matching(model, image, ids, mask, negatives)
    with torch.no_grad():
        f = model.features(image, ids, mask)
        # the official class for inference leaves [CLS] in place
        states = model.text_encoder(ids, mask, model.context(f.image_embeds))
        return outputs | {"itm_model_itm": model.itm_head(states[:, 0]), "itm_model_itc": f.image_feat @ f.text_feat.T}


@torch.no_grad()
def _matching(
    model: BLIP, image: Tensor, ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    context = model.context(model.encode_image(image)[0])
    return {
        "itm_logits": model.itm(context, ids, mask, negatives)[1],
        "itm_pos_states": model.fuse(context, ids, mask),
    }


@torch.no_grad()
def _contrast(
    model: BLIP, image: Tensor, ids: Tensor, mask: Tensor, alpha: float, idx: Tensor | None = None
) -> dict[str, Tensor]:
    """What a step computes before it draws: features, similarities, targets, and the likeliest negatives."""
    model.clamp_temp()
    model.momentum_update()
    f, f_m = model.features(image, ids, mask), model.features(image, ids, mask, "_m")
    outputs = Features._asdict(f) | {"image_feat_m": f_m.image_feat, "text_feat_m": f_m.text_feat}
    outputs["text_states"] = outputs.pop("text_embeds")
    outputs["loss_i2t"], outputs["loss_t2i"] = model.itc(f, f_m, alpha, idx)
    text_all = torch.cat([f_m.text_feat.T, model.text_queue], dim=1)
    image_all = torch.cat([f_m.image_feat.T, model.image_queue], dim=1)
    same = torch.eye(len(image), text_all.shape[1], device=image.device)
    if idx is not None:
        same = (idx[:, None] == torch.cat([idx, model.idx_queue[0]])).float()
    outputs["sim_targets"] = same = same.to(f.image_feat.dtype) / same.sum(1, keepdim=True)
    for way, query, other, query_m, keys, negative in (
        ("i2t", f.image_feat, f.text_feat, f_m.image_feat, text_all, "neg_text_idx"),
        ("t2i", f.text_feat, f.image_feat, f_m.text_feat, image_all, "neg_image_idx"),
    ):
        outputs[f"sim_{way}"] = sim = query @ keys / model.temp
        outputs[f"sim_{way}_targets"] = alpha * (query_m @ keys / model.temp).softmax(1) + (1 - alpha) * same
        if idx is None:
            weights = sim[:, : len(image)].softmax(1) + 1e-4
        else:
            outputs[f"neg_sim_{way}"] = query @ other.T / model.temp
            weights = outputs[f"neg_sim_{way}"].softmax(1)
        weights = weights.masked_fill(same[:, : len(image)] > 0, 0)
        outputs[f"weights_{way}"], outputs[negative] = weights, weights.argmax(1)
    return outputs


def _vqa(model: nn.Module, given: Given) -> dict[str, Tensor]:
    inputs, run = given.inputs, given.config["forward"]
    image = inputs["image"]
    question, answer, candidates = (
        (inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in ("question", "answer", "candidate")
    )
    outputs = record_outputs({"image_embeds": model.visual_encoder, "question_states": model.text_encoder})
    outputs["loss"] = model(image, *question, *answer, run["n"], inputs["weights"])
    outputs = dict(outputs)
    with torch.no_grad():
        rows = torch.arange(len(image), device=image.device).repeat_interleave(
            torch.tensor(run["n"], device=image.device)
        )
        context = model.text_decoder.bert.context(outputs["question_states"], question[1]).select(rows)
        ids = answer[0].clone()
        ids[:, 0] = given.config["tokenizer"]["bos_token_id"]
        outputs["answer_logits"] = model.text_decoder.logits(ids, answer[1], context)
        outputs["answer_loss"] = model.answer_loss(context, ids, answer[1])
    ranked = model.rank_answer(image, *question, *candidates, run["k_test"])
    return outputs | {
        "rank_max_ids": ranked.best,
        "rank_topk_ids": ranked.ids,
        "rank_log_probs_sum": ranked.log_probs,
        "rank_prob_first_token": ranked.first_token,
        "generate_ids": model.generate(image, *question),
    }
