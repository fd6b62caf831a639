"""Captions of open_clip's CoCa before and after `accelerate()`: the same tokens, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.demo.page import Page
from mmfuse.demo.swap import photographs

if TYPE_CHECKING:
    from mmfuse.demo import Settings

_WIDTH, _VOCABULARY, _CONTEXT = 256, 4096, 76
_START, _END = _VOCABULARY - 2, _VOCABULARY - 1


def _coca(layers: int) -> nn.Module:
    from open_clip.coca_model import CoCa

    tower = {"width": _WIDTH, "heads": 4, "layers": layers}
    text = {**tower, "context_length": _CONTEXT, "vocab_size": _VOCABULARY}
    image = {
        "image_size": 224,
        "patch_size": 32,
        "width": _WIDTH,
        "layers": layers,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    model = CoCa(
        _WIDTH,
        multimodal_cfg={**text, "attn_pooler_heads": 4},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg=image,
    )
    nn.init.normal_(model.text_decoder.text_projection, std=_WIDTH**-0.5)  # the constructor leaves it as it was found
    return model


def show(page: Page, settings: Settings) -> None:
    page.section("Captions")
    _, images = photographs()
    image = ((images - 0.5) / 0.25).to(settings.device)
    torch.manual_seed(0)
    model: Any = _coca(settings.of(4, 1)).to(settings.device).eval()
    length = settings.of(30, 8)
    eager, eager_seconds = _timed(lambda: _greedy(model, image, length))
    with mmfuse.accelerate(model) as report:
        tokens = {"sot_token_id": _START, "eos_token_id": _END, "pad_token_id": 0}
        greedy = {"generation_type": "top_k", "top_k": 1, "seq_len": length, "min_seq_len": length - 1}
        fused, seconds = _timed(lambda: model.generate(image, **greedy, **tokens))
    page.text(
        f"A CoCa of open_clip at random weights writes {length} tokens about each of {len(image)} images, greedily. "
        "Its own generate, which needs a transformers before 5, runs the text towers on the whole caption at every "
        "token, as is done here beside it; accelerated, it keeps keys and values, those of the image from the first "
        "token on. One run each."
    )
    page.pre(f"{report}")
    page.table(
        ("captions", "seconds"), [("open_clip", f"{eager_seconds:.2f}"), ("accelerated", f"{seconds:.2f}")], left=1
    )
    # the last token is the end, whatever the model says
    same = torch.equal(eager[:, :-1], fused[:, :-1])
    page.claim(same and bool(report.replaced), "open_clip's CoCa: accelerated, it writes the same captions")


def _greedy(model: Any, image: Tensor, length: int) -> Tensor:
    """The loop of open_clip's generate, with the most likely token at every step and no end before the last."""
    latent, tokens = model._encode_image(image)
    ids = torch.full((len(image), 1), _START, device=image.device)
    while ids.shape[1] < length:
        out = model(image, ids, image_latent=latent, image_embs=tokens, output_labels=False)
        logits = out["logits"][:, -1].index_fill(1, ids.new_tensor([_END]), -torch.inf)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def _timed(write: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    with torch.no_grad():
        ids = write().cpu()
    return ids, time.perf_counter() - start
