"""BEiT-3 (Wang et al. 2022, arXiv:2208.10442): image as a foreign language, an expert for each modality."""

from mmfuse.models.beit3.captioning import Captioner, Captions, generate
from mmfuse.models.beit3.encoder import Batch, BEiT3, Encoded
from mmfuse.models.beit3.model import BEiT3ForTasks, Retrieval
from mmfuse.models.beit3.pretraining import Losses, Masked, block_mask, mask_words, pretrain
from mmfuse.models.registry import System, instantiate

_TASKS = ("retrieval", "nlvr2", "captioning")
_BASE = {"encoder_embed_dim": 768, "encoder_attention_heads": 12, "encoder_ffn_embed_dim": 3072, "encoder_layers": 12}
_LARGE = {"encoder_embed_dim": 1024, "encoder_attention_heads": 16, "encoder_ffn_embed_dim": 4096, "encoder_layers": 24}
# table 2 of the paper; its experts of pairs in the last 3 layers and its shared attention are in no released code
_GIANT = {
    **{"encoder_embed_dim": 1408, "encoder_attention_heads": 16, "encoder_ffn_embed_dim": 6144, "encoder_layers": 40},
    "patch_size": 14,
}

SYSTEM = System(
    build=lambda config: instantiate(BEiT3ForTasks, config),
    presets={
        "base": {"tasks": _TASKS, "encoder_config": _BASE},
        "large": {"tasks": _TASKS, "encoder_config": _LARGE},
        "giant": {"tasks": _TASKS, "encoder_config": _GIANT},
    },
    paper="arXiv:2208.10442",
)

__all__ = [
    "SYSTEM",
    "BEiT3",
    "BEiT3ForTasks",
    "Batch",
    "Captioner",
    "Captions",
    "Encoded",
    "Losses",
    "Masked",
    "Retrieval",
    "block_mask",
    "generate",
    "mask_words",
    "pretrain",
]
