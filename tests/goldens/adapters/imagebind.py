from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official
from mmfuse.models.imagebind import ImageBind


def run(given: Given) -> dict[str, Tensor]:
    model = create("imagebind", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    outputs: dict[str, Tensor] = {}
    for name, x in given.inputs.items():
        outputs |= of_input(model, name, x)
    images = outputs["vision_image.embedding"]
    others = [_paired(outputs, modality, len(images)) for modality in ("text", "audio", "depth", "thermal", "imu")]
    pairs = torch.arange(len(images), device=given.device)
    outputs["loss"] = sum(F.cross_entropy(images @ other.T, pairs) for other in others)
    return outputs | gradients(outputs["loss"], model, given.grads)


def of_input(model: ImageBind, name: str, x: Tensor) -> dict[str, Tensor]:
    modality = name.split("_")[0]
    stages = {"tokens": model.modality_preprocessors[modality], "trunk": model.modality_trunks[modality]}
    seen = record_outputs(stages)
    embedding = model({modality: x})[modality]
    index = x.argmax(-1) if modality == "text" else 0
    head = model.modality_heads[modality](seen["trunk"], index)
    return {f"{name}.{stage}": t for stage, t in (*seen.items(), ("head", head), ("embedding", embedding))}


def _paired(outputs: dict[str, Tensor], modality: str, rows: int) -> Tensor:
    """The first embeddings of a modality of which there is one for each image."""
    names = [n for n in sorted(outputs) if n.startswith(modality) and n.endswith(".embedding")]
    return next(outputs[n] for n in names if len(outputs[n]) == rows)
