from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from goldens.cases import Given, gradients
from mmfuse.models import create, load_official
from mmfuse.models.metatransformer import (
    AST,
    DataEmbedding,
    GraphEncoder,
    GraphFeatureTokenizer,
    Hyperspectral,
    ImageEmbed,
    MetaTransformer,
    PointCloud,
    TabTransformer,
    TimeSeries,
    VideoEmbed,
    VideoMAE,
    XRay,
    neighbouring_bands,
    zero_padding,
)

_DRAWS = ("rand_node_id", "orf_gaussian")


def run(given: Given) -> dict[str, Tensor]:
    model = create("metatransformer", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    outputs: dict[str, Tensor] = {}
    losses = []
    for name in model.names:
        component = model.get_submodule(name)
        step = next(step for kind, step in _STEPS.items() if isinstance(component, kind))
        found, loss = step(model, name, given)
        outputs |= {f"{name}{key}" if key.startswith("_") else f"{name}.{key}": t for key, t in found.items()}
        losses.append(loss)
    if order := given.config.get("concat_order"):
        outputs["concat.features"] = model.encoder(torch.cat([outputs[f"{name}.tokens"] for name in order], dim=1))
        losses.append(_power(outputs["concat.features"]))
    if "text_encoding" in given.inputs:
        outputs["text.tokens"] = zero_padding(given.inputs["text_encoding"], model.embed_dim)
    outputs["loss"] = torch.stack(losses).sum()
    if given.grads:
        outputs |= gradients(outputs["loss"], model, given.grads)
    return {name: t.detach() for name, t in outputs.items()}


def _input(given: Given, *names: str) -> Tensor | None:
    """The first of these inputs that the case has."""
    return next((given.inputs[name] for name in names if name in given.inputs), None)


def _power(t: Tensor) -> Tensor:
    return (t**2).mean()


def _pictures(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    tokens = model.tokens(name, given.inputs[name])
    features = model.encoder(tokens)
    return {"tokens": tokens, "features": features}, _power(features)


def _series(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    x = given.inputs[name]
    tokens = model.tokens(name, x, given.inputs.get(f"{name}_mark"))
    features = model.encoder(tokens)
    return {"tokens": tokens, "features": features, "_no_mark.tokens": model.tokens(name, x)}, _power(features)


def _graph_input(name: str, given: Given) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    data = {k.removeprefix(f"{name}."): t for k, t in given.inputs.items() if k.startswith(f"{name}.")}
    return data, {draw: data.pop(draw) for draw in _DRAWS if draw in data}


def _graph(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    data, draws = _graph_input(name, given)
    perturb = data.pop("perturb", None)
    tokens, padding, index = model.get_submodule(name)(data, perturb, **draws)
    features = model.encoder(tokens)
    outputs = {"tokens": tokens, "features": features, "padding_mask": padding, "padded_index": index}
    return outputs, _power(features)


def _hyperspectral(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    near_band = given.config["components"][name]["near_band"]
    bands = neighbouring_bands(_input(given, f"{name}_cube", "hyper_cube"), near_band)
    outputs = {"band_input": bands, "tokens": model.tokens(name, bands), "logits": model(name, bands)}
    outputs["loss"] = F.cross_entropy(outputs["logits"], _input(given, f"{name}_label", "hyper_label"))
    return outputs, outputs["loss"]


def _xray(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    pixels = _input(given, f"{name}_image", "xray_image")
    outputs = {"tokens": model.tokens(name, pixels), "logits": model(name, pixels)}
    outputs["loss"] = F.cross_entropy(outputs["logits"], _input(given, f"{name}_label", "xray_label"))
    return outputs, outputs["loss"]


def _audio(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    sound, component = _input(given, f"{name}_fbank", "audio_fbank"), model.get_submodule(name)
    outputs = {"tokens": model.tokens(name, sound), "logits": model(name, sound)}
    outputs["pooled"] = component.pooled(model.encoder, sound)
    label = _input(given, f"{name}_label", "audio_label")
    outputs["loss"] = F.binary_cross_entropy_with_logits(outputs["logits"], label)
    return outputs, outputs["loss"]


def _forecast(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    x_enc, x_mark_enc, x_dec, x_mark_dec = (
        _input(given, f"{name}_{part}", f"ts_{part}") for part in ("x_enc", "x_mark_enc", "x_dec", "x_mark_dec")
    )
    component = model.get_submodule(name)
    outputs = {"tokens": model.tokens(name, x_enc, x_mark_enc)}
    outputs["decoder_tokens"] = component.dec_embedding(x_dec, x_mark_dec)
    outputs["output"] = model(name, x_enc, x_mark_enc, x_dec, x_mark_dec)
    outputs["loss"] = F.mse_loss(outputs["output"], _input(given, f"{name}_target", "ts_target"))
    return outputs, outputs["loss"]


def _graph_encoder(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    data, draws = _graph_input(name, given)
    states, graph_rep = model(name, data, data.pop("perturb", None), **draws)
    outputs = {"inner_states": torch.stack(list(states)), "graph_rep": graph_rep}
    return outputs, _power(states[-1])


def _tabular(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    table = _input(given, name, "tabular")
    outputs = {"tokens": model.tokens(name, table), "output": model(name, table)}
    return outputs, _power(outputs["output"])


def _video(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    clip = _input(given, f"{name}_clip", "video_clip")
    outputs = {"tokens": model.tokens(name, clip), "logits": model(name, clip)}
    return outputs, F.cross_entropy(outputs["logits"], _input(given, f"{name}_label", "video_label"))


def _points(model: MetaTransformer, name: str, given: Given) -> tuple[dict[str, Tensor], Tensor]:
    points, features = given.inputs[name], _input(given, f"{name}.x", f"{name}_x")
    component = model.get_submodule(name)
    centres, groups, x = component.features(model.encoder, points, features)
    outputs = {"center_p": centres[-1], "embed_features": groups[-1], "features": x}
    outputs["block0_input"] = model.tokens(name, points, features)
    outputs["cls_feat"] = model(name, points, features)
    return outputs, _power(outputs["cls_feat"])


_STEPS: dict[Any, Any] = {
    Hyperspectral: _hyperspectral,
    XRay: _xray,
    AST: _audio,
    TimeSeries: _forecast,
    GraphEncoder: _graph_encoder,
    TabTransformer: _tabular,
    VideoMAE: _video,
    PointCloud: _points,
    DataEmbedding: _series,
    GraphFeatureTokenizer: _graph,
    (ImageEmbed, VideoEmbed): _pictures,
}
