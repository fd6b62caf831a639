from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

import worlds
from goldens.cases import Given, gradients, record_outputs
from mmfuse.fused.gather import gather_rows
from mmfuse.fused.qformer import CAPTION
from mmfuse.models import create, load_official
from mmfuse.models.blip2 import OPT, T5, Features, Pretraining

_CHECKED_LOSSES = ("loss_itc", "loss_itm", "loss_lm")


def run(given: Given) -> dict[str, Tensor]:
    size = given.config.get("world_size", 1)
    if size > 1:
        return _processes(given, size)
    model = _model(given)
    step = {Pretraining: _stage1, OPT: _opt, T5: _t5}[type(model)]
    outputs = step(model, given)
    outputs |= gradients(outputs["loss"], model, given.grads)
    outputs["ln_vision_probe"] = model.ln_vision(given.inputs["ln_vision_probe_in"])
    return {name: t.detach() for name, t in outputs.items()}


def _model(given: Given) -> torch.nn.Module:
    config = {key: value for key, value in given.model_config.items() if key != "world_size"}
    model = create("blip2", config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    return model


# --- the first stage ------------------------------------------------------------------------------------------------


@contextmanager
def _process_group() -> Iterator[None]:
    """The official losses ran in one process of a group: gathered features are constants."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stage1(model: Pretraining, given: Given) -> dict[str, Tensor]:
    of = given.inputs
    image, ids, mask, image_id = of["image"], of["text_ids"], of["text_mask"], of.get("image_id")
    layer = model.bert.encoder.layer[0].attention.self
    seen = record_outputs({"image_tokens": model.visual_encoder, "key": layer.key})
    f = model.features(image, ids, mask)
    batch, queries = len(image), model.query_tokens.shape[1]
    keys = (
        seen["key"][: batch * queries]
        .unflatten(0, (batch, queries))
        .unflatten(-1, (model.bert.config.num_attention_heads, -1))
    )
    outputs = {
        "image_tokens": seen["image_tokens"],
        "image_embeds": model.ln_vision(f.tokens),
        "query_output": f.query,
        "query_cache_key_layer0": keys.transpose(1, 2),
        "text_output": f.text,
        "image_feats": f.image_feats,
        "text_feat": f.text_feat,
        "extract_image_embeds_proj": f.image_feats,
        "decoder_input_ids": model.decoder_ids(ids),
        "lm_labels": model.caption_labels(ids),
        "lm_logits": model.caption_logits(f.caption),
    }
    outputs |= _contrast(model, f, image_id)
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    own = torch.arange(batch, device=ids.device)
    texts = torch.cat([own, own, negatives[1]])
    kv = f.kv.at(torch.cat([own, negatives[0], own]))
    outputs["itm_query_hidden"] = model.fuse(kv, ids[texts], f.kept[texts])
    outputs["itm_logits"] = model.itm(f, negatives)[1]
    with _process_group():
        losses = model(image, ids, mask, image_id, negatives=negatives)
        for name in _CHECKED_LOSSES:
            outputs[name] = loss = getattr(losses, name)
            (grad,) = torch.autograd.grad(loss, model.query_tokens, retain_graph=True)
            outputs[f"d{name}_dquery_tokens"] = grad
        outputs["loss"] = losses.total
    longest = int(f.kept.max())
    (text,) = model.bert(texts=[ids[:, :longest]], kept=[f.kept])
    outputs["extract_text_embeds_proj"] = model.text_feats(text)
    outputs["extract_multimodal_embeds"] = model.fuse(f.kv, ids[:, :longest], f.kept)
    images, texts = of["itm_pairs"].T
    outputs["itm_scores"] = model.match(f.kv.at(images), ids[texts], f.kept[texts])[:, 1]
    outputs["pos_embed_interpolated"] = model.visual_encoder.resized(of["pos_embed_ckpt"])
    if "generate" in given.config:
        outputs["generated_ids"] = model.generate(image, **given.config["generate"])
        _, caption = model.bert(model.query_tokens, [model.decoder_ids(ids)[:, :1]], sees=CAPTION, kv=f.kv)
        outputs["generate_first_step_logits"] = model.caption_logits(caption[:, 0])
    return outputs


def _contrast(model: Pretraining, f: Features, image_id: Tensor | None) -> dict[str, Tensor]:
    """What the contrast and the draw of negatives see; over all processes, if there are several."""
    images, texts = f.image_feats, f.text_feat
    if dist.is_initialized():
        images, texts = gather_rows(images, None), gather_rows(texts, None)
    of_text, of_image = model.negative_probabilities(f, image_id)
    return {
        "sim_q2t": torch.einsum("iqd,jd->ijq", f.image_feats, texts),
        "sim_t2q": torch.einsum("id,jqd->ijq", f.text_feat, images),
        "weights_t2i": of_text,
        "weights_i2t": of_image,
        "neg_image_idx": of_text.argmax(1),
        "neg_text_idx": of_image.argmax(1),
    }


def _processes(given: Given, size: int) -> dict[str, Tensor]:
    found = worlds.run(size, _rank, given)
    outputs = {}
    for rank, of_rank in enumerate(found):
        own = ("grad.ln_vision.weight", "grad.temp")
        outputs |= {f"rank{rank}.{k}": t for k, t in of_rank.items() if not k.startswith("grad.") or k in own}
    for name in given.grads:
        outputs[f"grad.{name}"] = torch.stack([of_rank[f"grad.{name}"] for of_rank in found]).mean(0)
    return outputs


def _rank(rank: int, size: int, given: Given) -> dict[str, Tensor]:
    model = _model(given)
    batch = len(given.inputs["image"]) // size
    of = {name: t[rank * batch : (rank + 1) * batch] for name, t in given.inputs.items()}
    image, ids, mask = of["image"], of["text_ids"], of["text_mask"]
    f = model.features(image, ids, mask)
    outputs = _contrast(model, f, of.get("image_id"))
    negatives = outputs["neg_image_idx"], outputs["neg_text_idx"]
    outputs["itm_logits"] = model.itm(f, negatives)[1]
    losses = model(image, ids, mask, of.get("image_id"), negatives=negatives)
    outputs |= {name: getattr(losses, name) for name in _CHECKED_LOSSES} | {"loss": losses.total}
    outputs |= gradients(losses.total, model, given.grads)
    return {name: t.detach() for name, t in outputs.items()}


# --- the second stage -----------------------------------------------------------------------------------------------


def _opt(model: OPT, given: Given) -> dict[str, Tensor]:
    image, ids, mask = (given.inputs[name] for name in ("image", "opt_ids", "opt_mask"))
    outputs = _seen(model, model.opt_proj, "inputs_opt", image)
    prompt, answer = model.prompt(image, ids, mask), model(image, ids, mask)
    outputs |= {"attention_mask": prompt.mask, "targets": prompt.labels}
    return outputs | {"logits": answer.logits, "loss": answer.loss}


def _t5(model: T5, given: Given) -> dict[str, Tensor]:
    names = ("image", "input_ids", "input_mask", "output_ids", "output_mask")
    image, ids, mask, output_ids, output_mask = (given.inputs[name] for name in names)
    outputs = _seen(model, model.t5_proj, "inputs_t5", image)
    encoder = record_outputs({"encoder": model.t5_model.encoder})
    prompt = model.prompt(outputs["inputs_t5"], ids, mask, output_ids)
    answer = model(image, ids, mask, output_ids, output_mask)
    outputs |= {"encoder_atts": prompt.mask, "targets": prompt.labels}
    outputs["encoder_last_hidden_state"] = encoder["encoder"].last_hidden_state
    return outputs | {"logits": answer.logits, "loss": answer.loss}


def _seen(model: OPT | T5, projection: torch.nn.Module, name: str, image: Tensor) -> dict[str, Tensor]:
    tokens = model.visual_encoder(image)
    query = model.query(image)
    return {
        "image_tokens": tokens,
        "image_embeds": model.encode_image(image),
        "query_output": query,
        name: projection(query),
    }
