"""VLMo beyond the golden cases: packed steps, stages, presets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.models.vlmo import VLMo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCH = {"embed_dim": 16, "depth": 3, "num_heads": 2, "vlffn_start_layer_index": 2}
CONFIG = {"image_size": 32, "vocab_size": 40, "max_text_len": 6, "max_text_len_of_initckpt": 9, "drop_path_rate": 0.0}
LOSSES = {"itm": 1, "itc": 1, "mlm": 1}


def tiny(losses: dict[str, int] = LOSSES, **arch: object) -> VLMo:
    model = models.create("vlmo", {"arch": ARCH | arch, "config": CONFIG | {"loss_names": losses}})
    if model.transformer.table is not None:
        torch.nn.init.normal_(model.transformer.table)
    return model.to(DEVICE, torch.float64).eval()


def inputs(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(5, 40, (n, 6), device=DEVICE)
    mask = (torch.arange(6, device=DEVICE) < torch.randint(2, 7, (n, 1), device=DEVICE)).long()
    return torch.randn(n, 3, 32, 32, dtype=torch.float64, device=DEVICE), ids, mask


@pytest.mark.parametrize("relative", [True, False])
def test_one_forward_of_all_is_each_by_itself(relative: bool) -> None:
    model = tiny(need_relative_position_embed=relative, use_abs_pos_emb=not relative)
    image, ids, mask = inputs()
    batches = [model.pairs(ids, mask, image), model.images(image, fused=True), model.texts(ids, mask, fused=True)]
    together = model.transformer(batches)
    for batch, found in zip(batches, together, strict=True):
        (alone,) = model.transformer([batch])
        for got, want in zip(found, alone, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want)


def test_a_step_is_its_losses() -> None:
    """Two forwards give what six passes, one for each objective's input, give."""
    model = tiny()
    image, ids, mask = inputs()
    labels = ids.where(torch.arange(6, device=DEVICE) == 1, -100)
    masked = ids.masked_fill(labels != -100, 4)
    negatives = torch.tensor([1, 2, 0], device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE)
    step = model.pretrain(image, ids, mask, masked, labels, negatives)
    words = model(model.pairs(masked, mask, image)).text
    mlm = 0.25 * F.cross_entropy(model.word_head(words).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(step.mlm, mlm)
    f = model.contrast(
        *(model.transformer([b])[0] for b in (model.images(image, fused=True), model.texts(ids, mask, fused=True)))
    )
    torch.testing.assert_close(step.itc, model.contrastive_loss(f))
    images, texts = negatives
    three = [(ids, mask, image), (ids, mask, image[images]), (ids[texts], mask[texts], image)]
    logits = torch.cat([model.match_head(model.pooled(model(model.pairs(*of)))) for of in three])
    matches = torch.tensor([1] * 3 + [0] * 6, device=DEVICE)
    torch.testing.assert_close(step.itm, F.cross_entropy(logits, matches))
    torch.testing.assert_close(step.total, step.mlm + step.itc + step.itm)


def test_negatives_are_drawn_by_similarity_and_never_the_own_pair() -> None:
    model = tiny()
    image, ids, mask = inputs()
    seen = []
    match = model.match
    model.match = lambda image, ids, mask, negatives: (seen.append(negatives), match(image, ids, mask, negatives))[1]  # type: ignore[method-assign]
    for _ in range(5):
        assert torch.isfinite(model.pretrain(image, ids, mask, ids, ids).total)
    own = torch.arange(3, device=DEVICE)
    assert all((drawn != own).all() and (drawn >= 0).all() for pair in seen for drawn in pair)


def test_text_alone_has_no_expert_of_pairs() -> None:
    model = tiny({"textmlm": 1})
    assert all(len(block.mlp.fc1.weight) == 2 for block in model.transformer.blocks)
    _, ids, mask = inputs()
    model.text_loss(ids, mask, ids).backward()
    grad = model.transformer.blocks[0].mlp.fc1.weight.grad
    assert grad[0].any() and not grad[1].any()  # the image's expert saw nothing


def test_padding_is_not_seen() -> None:
    model = tiny()
    image, ids, _ = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 3, device=DEVICE)
    other = torch.where(mask.bool(), ids, torch.randint_like(ids, 5, 40))
    one, two = (model(model.pairs(words, mask, image)) for words in (ids, other))
    assert torch.equal(one.image, two.image) and torch.equal(one.text[:, :3], two.text[:, :3])


@pytest.mark.parametrize(
    ("losses", "arch"),
    [
        (LOSSES, {}),
        ({"vqa": 1, "nlvr2": 1, "irtr": 1}, {"use_abs_pos_emb": True, "need_relative_position_embed": False}),
        ({"textmlm": 1}, {"layer_scale_init_values": None}),
    ],
)
def test_weights_go_back(losses: dict[str, int], arch: dict[str, object]) -> None:
    """The golden cases load official weights; here they are those that are given back."""
    model, other = tiny(losses, **arch), tiny(losses, **arch)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    given = models.to_official(model)
    models.load_official(other, given)
    want = model.state_dict()
    assert all(torch.equal(t, want[key]) for key, t in other.state_dict().items())
    assert all(torch.equal(t, given[key]) for key, t in models.to_official(other).items())
    assert given["transformer.blocks.1.mlp_imag.fc1.weight"].shape == (64, 16)
    del given["transformer.blocks.1.mlp_imag.fc1.weight"]
    with pytest.raises(ValueError, match="missing: transformer.blocks.1.mlp_imag.fc1.weight"):
        models.load_official(other, given)


def test_the_images_expert_begins_as_beit() -> None:
    """timm's BEiT at random weights: the image's rows are its own, and the other experts stay what they were."""
    allow_torchvision()
    beit = pytest.importorskip("timm.models.beit").Beit(
        img_size=32,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=5,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )
    for p in beit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model = tiny()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    models.load_dense(model, beit.state_dict(), experts=("image",))
    model.kind.weight.data.zero_()
    image, _, _ = inputs()
    (found,) = model.transformer([model.images(image)])
    beit = beit.double().eval().to(DEVICE)
    beit.norm = torch.nn.Identity()
    torch.testing.assert_close(found.image, beit.forward_features(image), rtol=1e-6, atol=1e-6)
    for expert in (0, 2):
        key = "transformer.blocks.2.mlp.fc1.weight"
        assert torch.equal(model.state_dict()[key][expert], before[key][expert])


def test_what_is_no_dense_model_of_it() -> None:
    model = tiny()
    for state, experts, message in (
        ({"blocks.0.mlp.fc1.weight": torch.zeros(3)}, None, "shape .3,., expected .2, 64, 16., or that of one expert"),
        ({"blocks.9.mlp.fc1.weight": torch.zeros(3)}, None, "unexpected: transformer.blocks.9"),
        ({}, ("video",), "experts has 'video', expected some of text, image, pair"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_dense(model, state, experts)


@pytest.mark.parametrize(("preset", "millions"), [("base", 175), ("large", 561)])
def test_size_is_the_papers(preset: str, millions: int) -> None:
    """Of the transformer and the words; the paper counts 175 M and 562 M."""
    with torch.device("meta"):
        model = models.create("vlmo", preset)
    count = sum(t.numel() for part in (model.transformer, model.word) for t in part.parameters())
    assert int(count / 1e6) == millions


@pytest.mark.parametrize(
    ("arch", "config", "message"),
    [
        ({}, {"loss_names": {"caption": 1}}, "loss_names has 'caption', expected some of itm"),
        ({"num_heads": 3}, {}, "width is 16 with 3 heads"),
        ({"rel_pos": True}, {}, "unknown key 'rel_pos'"),
        ({}, {"image_size": 40}, "img_size is 40, expected a multiple of patch_size 16"),
    ],
)
def test_create_names_what_does_not_fit(arch: dict[str, object], config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create("vlmo", {"arch": ARCH | arch, "config": CONFIG | {"loss_names": LOSSES} | config})
