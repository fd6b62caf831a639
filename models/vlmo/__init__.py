"""VLMo (Bao et al. 2021, arXiv:2111.02358): one transformer whose FFNs are experts of images, texts and pairs."""

from mmfuse.models.registry import System, instantiate
from mmfuse.models.vlmo.model import Contrast, Features, Losses, VLMo
from mmfuse.models.vlmo.transformer import Batch, Hidden, MultiwayTransformer

_PRETRAIN = {"loss_names": {"itm": 1, "itc": 1, "mlm": 1}}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "vlffn_start_layer_index": 21}
_BASE_PLUS = {"embed_dim": 544, "depth": 24, "num_heads": 16, "vlffn_start_layer_index": 21}
_ABSOLUTE = {"use_abs_pos_emb": True, "need_relative_position_embed": False, "layer_scale_init_values": None}

SYSTEM = System(
    build=lambda config: instantiate(VLMo, config),
    presets={
        "base": {"arch": {}, "config": _PRETRAIN},
        "base-plus": {"arch": _BASE_PLUS | _ABSOLUTE, "config": _PRETRAIN},
        "large": {"arch": _LARGE, "config": _PRETRAIN},
    },
    paper="arXiv:2111.02358",
)

__all__ = ["SYSTEM", "Batch", "Contrast", "Features", "Hidden", "Losses", "MultiwayTransformer", "VLMo"]
