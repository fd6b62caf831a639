from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse import models, use_backend

VIT = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 16,
    "context_length": 8,
    "vocab_size": 50,
    "transformer_width": 32,
    "transformer_heads": 2,
    "transformer_layers": 2,
}
RESNET = VIT | {"image_resolution": 64, "vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}
TOWERS = pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])


def _batch(config: dict, images: int = 3, texts: int = 3) -> tuple[Tensor, Tensor]:
    size = config["image_resolution"]
    text = torch.randint(1, config["vocab_size"] - 1, (texts, config["context_length"]))
    text[:, 4] = config["vocab_size"] - 1
    return torch.randn(images, 3, size, size), text


# --- published sizes ------------------------------------------------------------------------------------------------

OPEN_CLIP_NAMES = {
    "rn50": "RN50",
    "rn101": "RN101",
    "rn50x4": "RN50x4",
    "vit-b-32": "ViT-B-32",
    "vit-b-16": "ViT-B-16",
    "vit-l-14": "ViT-L-14",
    "vit-l-14-336": "ViT-L-14-336",
}


def _open_clip():  # type: ignore[no-untyped-def]
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    return pytest.importorskip("open_clip", exc_type=ImportError)


@pytest.mark.parametrize("preset", OPEN_CLIP_NAMES)
def test_a_preset_has_the_shapes_of_open_clips_model(preset: str) -> None:
    open_clip = _open_clip()
    config = open_clip.get_model_config(f"{OPEN_CLIP_NAMES[preset]}-quickgelu")
    with torch.device("meta"):
        theirs, ours = open_clip.model.CLIP(**config), models.create("clip", preset)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("preset", "parameters"), [("vit-b-32", 151_277_313), ("rn50", 102_007_137), ("vit-l-14", 427_616_513)]
)
def test_parameter_count(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.create("clip", preset)
    assert sum(p.numel() for p in model.parameters()) == parameters


# --- against open_clip ----------------------------------------------------------------------------------------------


@TOWERS
def test_parity_with_open_clip(config: dict) -> None:
    open_clip = _open_clip()
    theirs = open_clip.model.CLIP(
        embed_dim=config["embed_dim"],
        quick_gelu=True,
        vision_cfg={
            "image_size": config["image_resolution"],
            "layers": config["vision_layers"],
            "width": config["vision_width"],
            "patch_size": config["vision_patch_size"],
        },
        text_cfg={
            "context_length": config["context_length"],
            "vocab_size": config["vocab_size"],
            "width": config["transformer_width"],
            "heads": config["transformer_heads"],
            "layers": config["transformer_layers"],
        },
    )
    for name, t in theirs.named_parameters():  # zeros and ones hide mistakes
        nn.init.normal_(t, std=0.1) if t.dim() < 2 and name != "logit_scale" else None
    theirs = theirs.double()
    ours = models.create("clip", config).double()
    models.load_official(ours, theirs.state_dict())
    image, text = _batch(config)
    image = image.double()
    for training in (False, True):  # in training, batch norm takes the batch's statistics
        theirs.train(training)
        ours.train(training)
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.encode_text(text), theirs.encode_text(text), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours(image, text)[0], theirs.get_logits(image, text)[0], rtol=1e-10, atol=1e-12)


# --- behaviour ------------------------------------------------------------------------------------------------------


@TOWERS
def test_logits_are_scaled_cosines(config: dict) -> None:
    model = models.create("clip", config).eval()
    image, text = _batch(config, images=2, texts=3)
    per_image, per_text = model(image, text)
    cosine = F.cosine_similarity(model.encode_image(image)[:, None], model.encode_text(text)[None], dim=-1)
    torch.testing.assert_close(per_image, cosine / 0.07)  # the initial temperature
    assert per_image.shape == (2, 3) and torch.equal(per_text, per_image.T)


@TOWERS
def test_loss_is_the_cross_entropy_of_the_logits(config: dict) -> None:
    model = models.create("clip", config).double().eval()
    image, text = _batch(config)
    image, labels = image.double(), torch.arange(3)
    eager = sum(F.cross_entropy(logits, labels) for logits in model(image, text)) / 2
    with use_backend("chunked"):
        loss = model.loss(image, text)
    torch.testing.assert_close(loss, eager)
    parameters = [*model.parameters()]
    for got, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(eager, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_what_follows_the_end_token_is_not_seen() -> None:
    model = models.create("clip", VIT).eval()
    _, text = _batch(VIT)
    other = text.clone()
    other[:, 5:] = 0
    assert torch.equal(model.encode_text(text), model.encode_text(other))
    torch.testing.assert_close(model.encode_text(text), model.encode_text(text[:, :5]))
    other[:, 3] = 0
    assert not torch.allclose(model.encode_text(text), model.encode_text(other))


def test_half_precision_takes_float32_pixels() -> None:
    model = models.create("clip", VIT).bfloat16()
    image, text = _batch(VIT)
    assert model.encode_image(image).dtype == model.encode_text(text).dtype == torch.bfloat16


def test_bad_inputs_are_named() -> None:
    model = models.create("clip", VIT)
    with pytest.raises(ValueError, match=r"image has shape \(1, 3, 32, 64\), expected \[B, 3, 32, 32\]"):
        model.encode_image(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match=r"text has shape \(1, 9\), expected \[B, L\] with L <= 8"):
        model.encode_text(torch.zeros(1, 9, dtype=torch.long))


def test_official_initialisation() -> None:
    wide = models.create("clip", VIT | {"transformer_width": 128, "transformer_layers": 3, "vocab_size": 1000})
    block = wide.transformer.resblocks[2]
    for weight, std in (
        (wide.token_embedding.weight, 0.02),
        (wide.positional_embedding, 0.01),
        (wide.text_projection, 128**-0.5),
        (block.attn.in_proj_weight, 128**-0.5),
        (block.attn.out_proj.weight, (128 * 2 * 3) ** -0.5),
        (block.mlp.c_fc.weight, (2 * 128) ** -0.5),
        (block.mlp.c_proj.weight, (128 * 2 * 3) ** -0.5),
        (wide.visual.proj, 64**-0.5),
    ):
        # five standard errors of a sample's deviation
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert wide.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    resnet = models.create("clip", RESNET).visual
    assert not resnet.layer3[0].bn3.weight.any() and resnet.bn3.weight.all()
    assert resnet.attnpool.k_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


@TOWERS
def test_export_with_two_dynamic_batches(config: dict) -> None:
    model = models.create("clip", config).eval()
    batches = ({0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")})
    exported = torch.export.export(model, _batch(config, images=2, texts=3), dynamic_shapes=batches).module()
    for images, texts in ((1, 4), (5, 1), (2, 2)):
        inputs = _batch(config, images, texts)
        torch.testing.assert_close(exported(*inputs), model(*inputs))
