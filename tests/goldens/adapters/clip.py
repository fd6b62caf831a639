from __future__ import annotations

from torch import Tensor

from goldens.cases import Given, gradients, record_outputs
from mmfuse.models import create, load_official


def run(given: Given) -> dict[str, Tensor]:
    model = create("clip", given.model_config).to(given.device, given.dtype).eval()
    load_official(model, given.params)
    image, text = given.inputs["image"], given.inputs["text"]
    modules = {"text_tokens": model.transformer}
    if hasattr(model.visual, "transformer"):
        modules["visual_tokens"] = model.visual.transformer
    else:
        modules |= {"visual_stem": model.visual.avgpool, "visual_trunk": model.visual.layer4}
    outputs = record_outputs(modules)
    outputs["logits_per_image"], outputs["logits_per_text"] = model(image, text)
    outputs["image_features"], outputs["text_features"] = model.encode_image(image), model.encode_text(text)
    outputs["loss"] = model.loss(image, text)
    outputs["text_tokens"] = model.ln_final(outputs["text_tokens"])
    return outputs | gradients(outputs["loss"], model, given.grads)
