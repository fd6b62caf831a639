from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.fused.qformer import QFormerEncoder
from mmfuse.models.blip2 import OPT, T5, Pretraining, convert
from tiny import ARGS, BERT, HF_QFORMER, HF_VISION, T5_SIZES, VIT

allow_torchvision()
from peft import LoraConfig, inject_adapter_in_model  # noqa: E402  it imports transformers
from peft.tuners.lora import LoraLayer  # noqa: E402

TOKENS = {"bert": {"size": 40, "pad": 0, "cls": 1, "sep": 2, "bos_DEC": 39}}
STAGE_1 = {"class": "Blip2Qformer", "args": ARGS | {"embed_dim": 12}, "vit": VIT, "bert": BERT, "tokens": TOKENS}
OPT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
STAGE_2 = {"class": "Blip2OPT", "args": ARGS, "vit": VIT, "bert": BERT, "opt": OPT_SIZES}
STAGE_2_T5 = {"class": "Blip2T5", "args": ARGS, "vit": VIT, "bert": BERT, "t5": T5_SIZES}


def make(config: dict[str, Any], **args: Any) -> Any:
    """In float64, without zeros and ones among its weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config["args"] |= args
    model = models.create("blip2", config).double().eval()
    for p in model.parameters():
        if p.dim():
            p.data.add_(0.2 * torch.randn_like(p))
    return model


def batch(size: int = 4, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 39, (size, length))
    ids[:, 0] = 1
    mask = (torch.arange(length) < torch.arange(size)[:, None] % (length - 2) + 2).long()
    return torch.randn(size, 3, 16, 16, dtype=torch.float64), ids * mask, mask


# --- published sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("flan-t5-xl-vit-l", 103), ("opt-2.7b", 107), ("flan-t5-xl", 107), ("opt-6.7b", 108), ("flan-t5-xxl", 108)],
)
def test_trainable_parameters_of_the_paper(preset: str, millions: int) -> None:
    """Table 2."""
    with torch.device("meta"):
        model = models.create("blip2", preset)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == millions


def test_parameter_counts_of_the_models_page() -> None:
    with torch.device("meta"):
        model = models.create("blip2", "vit-g")
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert round(count["visual_encoder"], 1) == 985.9 and round(count["Qformer"], 1) == 186.3
    for preset, millions in (("vit-g", 186.7), ("vit-l", 183.2), ("vit-g-coco", 1173.2)):
        with torch.device("meta"):
            model = models.create("blip2", preset)
        assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == millions


# --- the first stage ------------------------------------------------------------------------------------------------


def test_a_step_projects_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, project = [], QFormerEncoder.project
    monkeypatch.setattr(
        QFormerEncoder, "project", lambda self, x, *more, **norm: seen.append(len(x)) or project(self, x, *more, **norm)
    )
    make(STAGE_1)(*batch())
    assert seen == [4]


def test_negatives_are_of_other_pairs() -> None:
    model, (image, ids, mask) = make(STAGE_1), batch()
    f, image_id = model.features(image, ids, mask), torch.tensor([5, 7, 5, 9])
    for p in model.negative_probabilities(f):
        assert p.diagonal().eq(0).all()
        torch.testing.assert_close(p.sum(1), torch.ones(4, dtype=torch.float64))
    for p in model.negative_probabilities(f, image_id):
        assert p[image_id[:, None] == image_id].eq(0).all() and p.gt(0).sum() == 10


def test_a_frozen_image_encoder_has_no_gradient_and_all_else_has() -> None:
    model = make(STAGE_1).train()
    model(*batch()).total.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("visual_encoder."), name


def test_checkpointing_changes_no_gradient() -> None:
    found, inputs = [], batch()
    for checkpointing in (False, True):
        model = make(STAGE_1, use_grad_checkpoint=checkpointing, freeze_vit=False)
        loss = model(*inputs, negatives=(torch.tensor([1, 0, 0, 0]), torch.tensor([3, 3, 3, 2]))).total
        found.append(torch.autograd.grad(loss, model.visual_encoder.pos_embed)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_an_adapter_in_the_image_encoder_has_its_effect() -> None:
    model, image = make(STAGE_1, freeze_vit=False), torch.randn(2, 3, 16, 16)
    before = model.visual_encoder(image)
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"], init_lora_weights=False), model.visual_encoder)
    after = model.visual_encoder(image)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert all(p.grad is not None for n, p in model.visual_encoder.named_parameters() if "lora_" in n)
    for m in model.visual_encoder.modules():
        if isinstance(m, LoraLayer):
            m.merge()
    torch.testing.assert_close(model.visual_encoder(image), after)


def test_captions_end_and_are_padded() -> None:
    model, (image, *_) = make(STAGE_1), batch()
    head = model.predictions
    ids = model.generate(image, max_length=9, min_length=4)
    assert ids.shape[1] <= 9 and ids[:, 0].eq(39).all()
    # with [SEP] the likeliest word, a caption is as long as it must be
    head.bias.data[2] = 1e4
    ids = model.generate(image, max_length=9, min_length=4)
    assert ids.shape == (4, 5) and ids[:, 4].eq(2).all() and not ids[:, :4].eq(2).any()


def test_a_nucleus_of_one_word_is_the_likeliest() -> None:
    model, (image, *_) = make(STAGE_1), batch()
    assert torch.equal(model.generate(image, 8, 3, top_p=1e-9), model.generate(image, 8, 3))
    torch.manual_seed(1)
    drawn = model.generate(image, 8, 3, top_p=0.99)
    torch.manual_seed(1)
    assert torch.equal(drawn, model.generate(image, 8, 3, top_p=0.99))
    assert not torch.equal(drawn, model.generate(image, 8, 3)[:, : drawn.shape[1]])


@pytest.mark.parametrize(("vit_model", "key"), [("eva_clip_g", "pos_embed"), ("clip_L", "positional_embedding")])
def test_a_checkpoint_of_another_resolution_loads(vit_model: str, key: str) -> None:
    sizes = VIT if vit_model == "eva_clip_g" else {"patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    small, large = (make(STAGE_1 | {"vit": sizes}, vit_model=vit_model, img_size=size) for size in (16, 32))
    models.load_official(large, small.state_dict())
    got, given = (getattr(m.visual_encoder, key) for m in (large, small))
    assert torch.equal(got.flatten(0, -2)[0], given.flatten(0, -2)[0]) and got.shape[-2] == 17
    assert torch.equal(large.query_tokens, small.query_tokens)
    with pytest.raises(ValueError, match=f"visual_encoder.{key}: shape"):
        models.load_official(large, small.state_dict() | {f"visual_encoder.{key}": torch.zeros(7, 3)})


# --- the second stage -----------------------------------------------------------------------------------------------


def language_model_is_frozen(model: nn.Module, name: str) -> None:
    for key, p in model.named_parameters():
        assert (p.grad is None) == key.startswith(("visual_encoder.", name)), key


def test_opt_learns_the_words_after_the_prompt() -> None:
    model: OPT = make(STAGE_2 | {"prompt_length": 2}).train()
    image, ids, mask = batch()
    ids = ids.where(mask == 1, 1)
    labels = model.prompt(image, ids, mask).labels
    assert labels[:, :5].eq(-100).all() and torch.equal(labels[:, 5:], ids[:, 2:].where(mask[:, 2:] == 1, -100))
    model(image, ids, mask).loss.backward()
    language_model_is_frozen(model, "opt_model.")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        assert model.generate(image, ids[:, :2], mask[:, :2], num_beams=beams, **how).shape == (4, 4)


def test_t5_answers() -> None:
    model: T5 = make(STAGE_2_T5).train()
    image, ids, mask = batch()
    model(image, ids, mask, ids.roll(1, 1), mask).loss.backward()
    language_model_is_frozen(model, "t5_model.")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        assert model.generate(image, ids, mask, num_beams=beams, **how).shape == (4, 5)


# --- names of transformers ------------------------------------------------------------------------------------------


def test_the_first_stage_as_transformers_retrieval() -> None:
    blip_2 = pytest.importorskip("transformers.models.blip_2")
    model: Pretraining = make(STAGE_1 | {"ln_vision_eps": 1e-6})
    config = blip_2.Blip2Config(
        vision_config=HF_VISION,
        qformer_config={**HF_QFORMER, "use_qformer_text_input": True},
        num_query_tokens=3,
        image_text_hidden_size=12,
        image_token_index=None,
    )
    theirs = blip_2.Blip2ForImageTextRetrieval(config).double().eval()
    state = convert.to_transformers(model.state_dict())
    theirs.load_state_dict(state)
    image, ids, mask = batch()
    found = theirs(image, ids, attention_mask=mask, use_image_text_matching_head=True)
    f = model.features(image, ids, mask)
    torch.testing.assert_close(model.match(f.kv, ids, f.kept), found.logits_per_image)
    every = torch.full_like(f.kept, ids.shape[1])
    torch.testing.assert_close(model.match(f.kv, ids), model.match(f.kv, ids, every))
    back = convert.from_transformers(state)
    assert all(torch.equal(t, back[key]) for key, t in model.state_dict().items() if key in back)
    assert all(
        key.startswith(("temp", "Qformer.cls.")) or "position_ids" in key for key in model.state_dict().keys() - back
    )


def test_the_second_stage_as_transformers_generation() -> None:
    blip_2 = pytest.importorskip("transformers.models.blip_2")
    model: OPT = make(STAGE_2 | {"ln_vision_eps": 1e-6})
    config = blip_2.Blip2Config(
        vision_config=HF_VISION,
        qformer_config=HF_QFORMER,
        text_config={"model_type": "opt", **OPT_SIZES},
        num_query_tokens=3,
        image_token_index=49,
    )
    theirs = blip_2.Blip2ForConditionalGeneration(config).double().eval()
    theirs.load_state_dict(convert.to_transformers(model.state_dict()))
    image, ids, mask = batch()
    placed = torch.cat([torch.full((4, 3), 49), ids], dim=1)
    found = theirs(image, placed, attention_mask=torch.cat([torch.ones_like(mask[:, :3]), mask], dim=1))
    torch.testing.assert_close(model(image, ids, mask).logits, found.logits)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "Blip2"}, r"class is 'Blip2', expected one of Blip2Qformer, Blip2OPT, Blip2T5"),
        ({"args": {"img": 3}}, r"unknown key 'img', expected only vit_model"),
        ({"args": {"img_size": 17}}, r"img_size is 17, expected a multiple of patch_size 8"),
        ({"args": {"vit_model": "vit"}}, r"vit_model is 'vit', expected one of eva_clip_g, clip_L"),
        ({"args": {"vit_precision": "fp16"}}, r"vit_precision is 'fp16', expected 'fp32'"),
        ({"args": {"drop_path_rate": 0.1}}, r"drop_path_rate is 0.1, expected 0"),
        ({"class": "Blip2OPT", "args": ARGS}, r"config has no opt, expected the language model's config"),
        ({"vit": VIT | {"num_heads": 3}}, r"embed_dim is 16, expected a multiple of num_heads 3"),
    ],
)
def test_create_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create("blip2", STAGE_1 | change)


def test_an_image_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"image has shape \(1, 3, 16, 8\), expected \[B, 3, 16, 16\]"):
        make(STAGE_1).encode_image(torch.zeros(1, 3, 16, 8, dtype=torch.float64))
