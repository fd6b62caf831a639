from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.fused.qformer import QFormer, QFormerConfig, from_transformers
from mmfuse.models import create
from mmfuse.models.blip2 import convert

_OTHER_NAMES = {"cross_attention_frequency": "cross_attention_freq", "encoder_hidden_size": "encoder_width"}


def run(given: Given) -> dict[str, Tensor]:
    return _retrieval(given) if given.config["class"] == "Blip2ForImageTextRetrieval" else qformer(given)


def config_of(args: dict[str, Any]) -> dict[str, Any]:
    return {_OTHER_NAMES.get(key, key): value for key, value in args.items() if key != "use_qformer_text_input"}


def qformer(given: Given) -> dict[str, Tensor]:
    """`Blip2QFormerModel` or `InstructBlipQFormerModel`."""
    args, of = given.config["args"], given.inputs
    instruct = given.config["class"] == "InstructBlipQFormerModel"
    text = instruct or args["use_qformer_text_input"]
    model = QFormer(QFormerConfig(**config_of(args), text=text)).to(given.device, given.dtype).eval()
    missing, unexpected = model.load_state_dict(from_transformers(given.params), strict=False)
    # BLIP-2's words belong to the model around it
    assert not unexpected and all(name.startswith("embeddings.") for name in missing)
    query, texts, kept = of["query_embeds"], [], []
    if "input_ids" in of:
        texts = [model.embeddings(of["input_ids"])]
    elif "query_length" in given.config:
        query, text_embeds = query.tensor_split([given.config["query_length"]], dim=1)
        texts = [model.embeddings.query(text_embeds)]
    if texts:
        kept = [of["attention_mask"][:, query.shape[1] :].sum(1)]
    lengths = of["encoder_attention_mask"].sum(1) if "encoder_attention_mask" in of else None
    kv = model.project(of["encoder_hidden_states"], lengths)
    embedded = model.embeddings.query(query)
    seen = record_outputs({str(i): layer for i, layer in enumerate(model.encoder.layer, 1)})
    states = torch.cat(model.encoder(embedded, texts, kept, kv=kv), dim=1)
    outputs = {"last_hidden_state": states, "pooler_output": states[:, 0], "loss": (states * of["w"]).sum()}
    outputs["hidden_states_0"] = torch.cat([embedded, *texts], dim=1)
    sizes = [len(query) * t.shape[1] for t in (query, *texts)]
    for i, rows in seen.items():  # first the queries of all samples, then their texts
        parts = [t.unflatten(0, (len(query), -1)) for t in rows.split(sizes)]
        outputs[f"hidden_states_{i}"] = torch.cat(parts, dim=1)
    names = {name: next(iter(from_transformers({name: states}))) for name in given.grads}
    grads = gradients(outputs["loss"], model, names.values())
    outputs |= {f"grad.{name}": grads[f"grad.{official}"] for name, official in names.items()}
    return {name: t.detach() for name, t in outputs.items()}


def _retrieval(given: Given) -> dict[str, Tensor]:
    """`Blip2ForImageTextRetrieval` is the first stage with another eps."""
    args, of = given.config["args"], given.inputs
    vision, text = args["vision_config"], config_of(args["qformer_config"])
    text.pop("encoder_width")
    config = {
        "class": "Blip2Qformer",
        "args": {
            "img_size": vision["image_size"],
            "num_query_token": args["num_query_tokens"],
            "embed_dim": args["image_text_hidden_size"],
            "cross_attention_freq": text.pop("cross_attention_freq"),
            "freeze_vit": False,
        },
        "vit": {
            "patch_size": vision["patch_size"],
            "embed_dim": vision["hidden_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_ratio": (vision["intermediate_size"] + 0.5) / vision["hidden_size"],
            "norm_eps": vision["layer_norm_eps"],
        },
        "bert": text,
        "tokens": {"bert": {"size": text["vocab_size"], "bos_DEC": text["vocab_size"] - 1}},
        "ln_vision_eps": vision["layer_norm_eps"],
    }
    model = create("blip2", config).to(given.device, given.dtype).eval()
    missing, unexpected = model.load_state_dict(convert.from_transformers(given.params), strict=False)
    assert not unexpected and all(
        name.startswith(("temp", "Qformer.cls.")) or "position_ids" in name for name in missing
    )
    f = model.features(of["image"], of["text_ids"], of["text_mask"])
    outputs = {
        "itm_logits": model.match(f.kv, f.ids, f.kept),
        "itc_logits_per_image": torch.einsum("iqd,jd->ijq", f.image_feats, f.text_feat).amax(2),
        "itc_image_embeds": f.image_feats,
        "itc_text_embeds": f.text_feat,
        "vision_last_hidden_state": model.ln_vision(f.tokens),
    }
    outputs["loss"] = (outputs["itm_logits"] * of["w_itm"]).sum()
    outputs["loss"] = outputs["loss"] + (outputs["itc_logits_per_image"] * of["w_itc"]).sum()
    names = {name: convert.official_name(name) for name in given.grads}
    grads = gradients(outputs["loss"], model, names.values())
    outputs |= {f"grad.{name}": grads[f"grad.{official}"] for name, official in names.items()}
    return {name: t.detach() for name, t in outputs.items()}
