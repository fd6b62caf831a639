"""ImageBind: `preprocessors.py` makes tokens, `trunk.py` is the transformer, `model.py` the six towers and the loss."""

from mmfuse.models.imagebind.model import ImageBind, build
from mmfuse.models.imagebind.preprocessors import PadIm2Video, PatchTokens, Stem
from mmfuse.models.registry import System

__all__ = ["SYSTEM", "ImageBind", "PadIm2Video", "PatchTokens", "Stem"]

SYSTEM = System(
    build=build,
    presets={
        "huge": {
            "vision_embed_dim": 1280,
            "vision_num_blocks": 32,
            "vision_num_heads": 16,
            "text_embed_dim": 1024,
            "text_num_blocks": 24,
            "text_num_heads": 16,
            "out_embed_dim": 1024,
            "audio_drop_path": 0.1,
            "imu_drop_path": 0.7,
        },
    },
    paper="arXiv:2305.05665",
)
