"""Meta-Transformer (Zhang et al. 2023, arXiv:2307.10802): 12 modalities, one frozen encoder.

model = mmfuse.models.create("metatransformer", {
    "encoder": {"dim": 768, "depth": 12, "num_heads": 12},
    "components": {"digits": {"modality": "image", "num_classes": 10, "tokenizer": {"img_size": 32}}},
})
mmfuse.models.load_official(model, state_dict)
logits = model("digits", pixels)

A file for each modality holds its tokenizer, the published task model, and what else belongs to it. A task model has
`tokens(...)`, what the encoder is given, `forward(encoder, ...)`, and `encoder_prefix`, where its official state dict
holds the encoder's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmfuse.models.metatransformer.audio import AST, AudioEmbed, fbank
from mmfuse.models.metatransformer.data2seq import MODALITIES, Classifier, Data2Seq, TextEmbed, zero_padding
from mmfuse.models.metatransformer.encoder import Encoder
from mmfuse.models.metatransformer.graph import (
    GraphEncoder,
    GraphFeatureTokenizer,
    laplacian_eigenvectors,
    orthogonal_node_ids,
)
from mmfuse.models.metatransformer.hyperspectral import BandEmbed, Hyperspectral, neighbouring_bands
from mmfuse.models.metatransformer.images import ImageEmbed, XRay
from mmfuse.models.metatransformer.points import PointCloud
from mmfuse.models.metatransformer.series import DataEmbedding, PatchEmbedding, TimeSeries
from mmfuse.models.metatransformer.tabular import TabTransformer, TabularEmbed
from mmfuse.models.metatransformer.video import VideoEmbed, VideoMAE
from mmfuse.models.registry import System, check_keys, instantiate

__all__ = [
    "AST",
    "MODALITIES",
    "AudioEmbed",
    "BandEmbed",
    "Classifier",
    "Data2Seq",
    "DataEmbedding",
    "Encoder",
    "GraphEncoder",
    "GraphFeatureTokenizer",
    "Hyperspectral",
    "ImageEmbed",
    "MetaTransformer",
    "PatchEmbedding",
    "PointCloud",
    "TabTransformer",
    "TabularEmbed",
    "TextEmbed",
    "TimeSeries",
    "VideoEmbed",
    "VideoMAE",
    "XRay",
    "build",
    "fbank",
    "laplacian_eigenvectors",
    "neighbouring_bands",
    "orthogonal_node_ids",
    "zero_padding",
]

# what a component is, by the first of these keys that its config has
_COMPONENTS: Mapping[str, type[nn.Module]] = {
    "modality": Classifier,
    "near_band": Hyperspectral,
    "task_name": TimeSeries,
    "ast": AST,
    "num_encoder_layers": GraphEncoder,
    "column_idx": TabTransformer,
    "embed_args": PointCloud,
    "num_frames": VideoEmbed,
    "all_frames": VideoMAE,
    "tubelet_size": VideoMAE,
    "c_in": DataEmbedding,
    "num_atoms": GraphFeatureTokenizer,
    "num_heads": XRay,
    "img_size": ImageEmbed,
}
_TASKS = (Classifier, Hyperspectral, TimeSeries, AST, GraphEncoder, TabTransformer, PointCloud, VideoMAE, XRay)


class MetaTransformer(nn.Module):
    """Components by name around one encoder, whose parameters are frozen: `model(name, *data)`.

    A component is a task model, which gives its own result, or a tokenizer, which gives the encoder's features.
    """

    def __init__(self, encoder: Encoder, components: Mapping[str, nn.Module]):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.names = tuple(components)
        for name, component in components.items():
            if hasattr(self, name) or "." in name:
                raise ValueError(f"components has the name {name!r}, expected no dot and no attribute of the model")
            self.add_module(name, component)
        self.embed_dim, self.image_resolution = encoder.dim, 224

    def tokens(self, name: str, *data: Any, **draws: Any) -> Tensor:
        """What the encoder is given for component `name`: [B, L, dim]."""
        component = self._component(name)
        if isinstance(component, _TASKS):
            return component.tokens(*data, **draws)
        tokens = component(*data, **draws)
        return tokens if isinstance(tokens, Tensor) else tokens[0]

    def forward(self, name: str, *data: Any, **draws: Any) -> Any:
        component = self._component(name)
        if isinstance(component, _TASKS):
            return component(self.encoder, *data, **draws)
        return self.encoder(self.tokens(name, *data, **draws))

    def _component(self, name: str) -> nn.Module:
        if name not in self.names:
            raise ValueError(f"name is {name!r}, expected one of {', '.join(self.names)}")
        return self.get_submodule(name)

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the encoder's file, whose keys begin with the block, or a task's, which has the encoder under its own
        prefix and, where the model has one component, no name before its keys."""
        state = {}
        named = any(key.split(".")[0] in self.names for key in state_dict)
        for key, t in state_dict.items():
            if key.split(".")[0].isdigit():
                key = f"encoder.{key}"
            elif not named and len(self.names) == 1:
                key = f"{self.names[0]}.{key}"
            for name in self.names:
                prefix = getattr(self.get_submodule(name), "encoder_prefix", None)
                if prefix and key.startswith(f"{name}.{prefix}"):
                    key = "encoder." + key.removeprefix(f"{name}.{prefix}")
            state[key] = t
        return state


def build(config: Mapping[str, Any]) -> MetaTransformer:
    """A model from {"encoder": {...}, "components": {name: {...}}}; "concat_order" is of the caller.

    A component's config has the official constructor's arguments, or {"modality", "num_classes", "tokenizer"} for a
    classifier of any of the 12 modalities.
    """
    check_keys(config, ("encoder", "components", "concat_order"))
    if "encoder" not in config:
        raise ValueError("config has no encoder")
    encoder = instantiate(Encoder, config["encoder"])
    components = {}
    for name, given in config.get("components", {}).items():
        kind = next((kind for key, kind in _COMPONENTS.items() if key in given), None)
        if kind is None:
            raise ValueError(f"component {name!r} has none of the keys {', '.join(_COMPONENTS)}")
        if kind is Classifier:
            given = {"dim": encoder.dim} | dict(given)
        components[name] = instantiate(kind, given)
    return MetaTransformer(encoder, components)


_BASE = {"dim": 768, "depth": 12, "num_heads": 12}


def _task(name: str, **config: Any) -> dict[str, Any]:
    return {"encoder": _BASE, "components": {name: config}}


SYSTEM = System(
    build=build,
    presets={
        "base-patch16": {"encoder": _BASE},
        "large-patch14": {"encoder": {"dim": 1024, "depth": 24, "num_heads": 16}},
        "x-ray": _task("xray_vit", num_heads=12),
        "hyperspectral-indian-pines": _task(
            "hyper", image_size=1, near_band=1, num_patches=200, num_classes=16, dim=768, emb_dropout=0.1
        ),
        "audio": _task("audio_ast", vit={}, ast={}),
        "time-series-etth1": _task(
            "time_series", task_name="long_term_forecast", pred_len=96, enc_in=7, dec_in=7, c_out=7, factor=3
        ),
        "video": _task("video_vit", all_frames=16, num_classes=400, qkv_bias=True, norm_eps=1e-6, init_scale=1e-3),
    },
    paper="arXiv:2307.10802",
)
