from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse import models, use_backend
from mmfuse._compat import allow_torchvision
from mmfuse.fused.captioning import draw

allow_torchvision()
open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
from open_clip_coca import END, GENERATE, SAY, START, VOCAB, batch, config, let_generate, official  # noqa: E402

CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
NORM, TANH = {"norm_kwargs": {"eps": 1e-3}}, {"act_kwargs": {"approximate": "tanh"}}
# without a pooler the image tokens are as wide as the decoder
NO_POOL = {"attentional_pool": False, "width": 24, "head_width": 8}
CONFIGS = {
    "attentional pool": config(),
    "class token, quick gelu": config(NO_POOL, {"width": 24, "heads": 1}, quick_gelu=True, init_logit_bias=-2.0),
    "average pool": config(NO_POOL | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}),
    "average of queries": config({"pool_type": "avg", "mlp_ratio": 2.5} | TANH, {"mlp_ratio": 1.7} | TANH),
    "pooler as wide as the tower": config({"width": 24, "head_width": 12}, nonscalar_logit_scale=True),
    "oblong": config({"image_size": (20, 12), "patch_size": (5, 4)}, {"embed_cls": True, "proj_bias": True}),
    "fixed positions": config({"pos_embed_type": "sin_cos_2d", "width": 32, "head_width": 8} | NORM, NORM),
    "custom blocks": config({"ls_init_value": 0.3} | CUSTOM, CUSTOM, {"ls_init_value": 0.2, "mlp_ratio": 2}),
    "custom without options": config({"block_type": "custom"}, {"block_type": "custom", "ls_init_value": 0.1}),
    "options of default blocks": config({"block_type": "default"} | CUSTOM, {"block_type": "default"} | CUSTOM),
    "bidirectional": config(None, {"no_causal_mask": True}),
    "other padding": config(None, {"pad_id": 3}, pad_id=3),
    "no projection": config(None, {"proj_type": "none"}),
    "argmax": config(None, {"embed_cls": False, "context_length": 14}),
    "eos": config(None, {"embed_cls": False, "context_length": 14, "pool_type": "eos", "eos_id": END}),
    "last": config(None, {"embed_cls": False, "context_length": 14, "pool_type": "last"}),
    "first": config(None, {"embed_cls": False, "context_length": 14, "pool_type": "first"}),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def pair(config: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """open_clip's model and ours, with the same weights, in float64."""
    theirs = official(config).double()
    ours = models.create("coca", config).double().eval()
    models.load_official(ours, theirs.state_dict())
    return theirs, ours


def assert_same(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


# --- against open_clip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", models.list()["coca"])
def test_a_preset_has_the_shapes_of_open_clips_model(preset: str) -> None:
    given = open_clip.get_model_config(preset)
    with torch.device("meta"):
        ours, from_file = models.create("coca", preset), models.create("coca", given)
        given.pop("custom_text")
        theirs = open_clip.coca_model.CoCa(**given)
    shapes = {k: t.shape for k, t in theirs.state_dict().items()}
    for model in (ours, from_file):
        assert {k: t.shape for k, t in model.state_dict().items()} == shapes


@EVERY
def test_parity_with_open_clip(name: str) -> None:
    config = CONFIGS[name]
    theirs, ours = pair(config)
    image, text = batch(config)
    image = image.double()
    for normalize in (True, False):
        assert_same(ours.encode_image(image, normalize), theirs.encode_image(image, normalize))
        assert_same(ours.encode_text(text, normalize), theirs.encode_text(text, normalize))
    want = theirs(image, text)
    assert_same(ours(image, text), want)
    assert_same(ours(image), theirs(image))
    tokens = theirs(image)
    given = {"image_latent": tokens["image_features"], "image_embs": tokens["image_embs"], "output_labels": False}
    assert_same(ours(image, text, **given), theirs(image, text, **given))

    pad = config.get("pad_id", 0)
    want.pop("logit_bias", None)
    loss = open_clip.loss.CoCaLoss(2.0, 1.0, pad_id=pad)(**want, output_dict=True)
    losses = ours.losses(image, text)
    assert_same(losses, loss)
    sum(loss.values()).backward()
    ours.loss(image, text).backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    # the loss reads no bias of the logits
    grads = {k: torch.zeros_like(p) if p is None else p for k, p in grads.items() if k != "logit_bias"}
    got = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in ours.named_parameters() if k in grads}
    assert_same(got, grads)


def test_the_correct_class_mask() -> None:
    config = CONFIGS["attentional pool"]
    theirs, _ = pair(config)
    theirs.text.correct_cls_mask = True
    ours = models.create("coca", config | {"text_cfg": config["text_cfg"] | {"correct_cls_mask": True}}).double()
    models.load_official(ours, theirs.state_dict())
    image, text = batch(config)
    assert_same(ours(image.double(), text), theirs(image.double(), text))


@pytest.mark.parametrize("pool", ["parallel", "cascade"])
def test_poolers_of_the_paper(pool: str) -> None:
    given = config({"attentional_pool": pool, "width": 24, "head_width": 8})
    theirs, ours = pair(given)
    image, text = batch(given)
    assert ours(image)["image_features"].shape == (4, 1, 24)
    assert_same(ours(image.double(), text), theirs(image.double(), text))
    # open_clip's loss fails on such latents too
    with pytest.raises(ValueError, match=r"image has shape \(4, 1, 24\)"):
        ours.loss(image, text)


def test_patch_dropout() -> None:
    given = config({"patch_dropout": 0.4})
    theirs, ours = (m.train() for m in pair(given))
    image = batch(given)[0].double()
    torch.manual_seed(3)
    want = theirs.encode_image(image)
    torch.manual_seed(3)
    assert_same(ours.encode_image(image), want)
    torch.manual_seed(3)
    assert_same(ours.encode_image(image, patch_scores=torch.randn(4, 16)), want)
    assert not torch.equal(ours.encode_image(image), want)
    assert_same(ours.eval().encode_image(image), theirs.eval().encode_image(image))


def test_what_open_clip_fails_on_is_refused() -> None:
    given = config(None, {"scaled_cosine_attn": True})
    with pytest.raises(RuntimeError, match="must be a 3D tensor"):
        official(given)(*batch(given))
    with pytest.raises(ValueError, match="scaled_cosine_attn is True, expected False"):
        models.create("coca", given)


@pytest.mark.parametrize("how", GENERATE)
def test_captions_are_open_clips(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_generate(monkeypatch)
    options = SAY | GENERATE[how]
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = official(config())
        ours = models.create("coca", config()).eval()
        models.load_official(ours, theirs.state_dict())
        image, _ = batch(config(), 1 if how == "one prompt" else 3)
        captions = []
        for model in (ours, theirs):
            torch.manual_seed(1)  # of the draws
            captions.append(model.generate(image, **options))
        assert torch.equal(*captions)


# --- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@EVERY
def test_cached_logits_are_those_of_the_forward(name: str, beams: int) -> None:
    model = models.create("coca", CONFIGS[name]).double().eval()
    models.load_official(model, official(CONFIGS[name]).state_dict())
    image, text = batch(CONFIGS[name], 2)
    image = image.double()
    # both rows have padding in the middle too
    text = torch.cat([text[:, :6], text.new_full((2, 1), model.pad_id), text[:, 1:7]], dim=1).repeat(beams, 1)
    text = text.view(beams, 2, 13).transpose(0, 1).reshape(2 * beams, 13)
    for row in range(2 * beams):
        text[row] = text[row].roll(row)
    state = model(image.repeat_interleave(beams, 0))

    def logits(ids: Tensor) -> Tensor:
        given = {"image_latent": state["image_features"], "image_embs": state["image_embs"]}
        return model(image, ids, **given, output_labels=False)["logits"][:, -1]

    captioner = model.captioner(image)
    if beams > 1:
        captioner = type(captioner)(model, model(image)["image_embs"], beams)
    for start, end in ((0, 1), (1, 2), (2, 7), (7, 8)):
        assert_same(captioner(text[:, start:end]), logits(text[:, :end]))
    # the first row of each image goes on in all of its rows
    rows = torch.arange(2 * beams) // beams * beams
    captioner.reorder(rows)
    text = torch.cat([text[rows, :8], text[:, 8:]], dim=1)
    assert_same(captioner(text[:, 8:9]), logits(text[:, :9]))
    captioner.clear()
    assert_same(captioner(text[:, 3:9]), logits(text[:, 3:9]))
    with pytest.raises(ValueError, match="the captions have 15 tokens, expected at most 14"):
        captioner(text[:, :9])


def test_given_draws() -> None:
    given = config()
    model = models.create("coca", given).eval()
    models.load_official(model, official(given).state_dict())
    image, _ = batch(given, 3)
    say = SAY | {"generation_type": "top_k", "top_k": 8}
    low = model.generate(image, **say, draws=torch.zeros(3, 13))
    assert torch.equal(low, model.generate(image, **say, draws=torch.full((3, 13), 1e-9)))
    high = model.generate(image, **say, draws=torch.full((3, 13), 0.999999))
    assert not torch.equal(low[:, 1], high[:, 1])
    draws = torch.rand(3, 13)
    both = model.generate(image, **say, draws=draws)
    # a caption depends on its own draws alone
    assert torch.equal(both[:1], model.generate(image[:1], **say, draws=draws[:1])[:, : both.shape[1]])


def test_draws_have_the_probabilities() -> None:
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(probs.expand(1000, 6), uniform)
    assert torch.equal(tokens.flatten().bincount(minlength=6), (1000 * probs).round().long())
    assert draw(probs[None], torch.tensor([0.0])).item() == 1
    assert draw(probs[None], torch.tensor([1 - 2**-24])).item() == 4


# --- behaviour ------------------------------------------------------------------------------------------------------


def test_loss_in_the_backends() -> None:
    given = config()
    _, model = pair(given)
    image, text = batch(given)
    results = []
    for backend in ("torch", "chunked"):
        with use_backend(backend):
            loss = model.loss(image, text)
        results.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    out = model(image, text)
    caption = F.cross_entropy(out["logits"].flatten(0, 1), out["labels"].flatten(), ignore_index=0)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    contrastive = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    eager = contrastive + 2 * caption
    for result in results:
        assert_same(result, [eager, *torch.autograd.grad(eager, [*model.parameters()], retain_graph=True)])


def test_weights_of_the_loss() -> None:
    model = models.create("coca", {"model": config(), "loss": {"caption_loss_weight": 0.5, "clip_loss_weight": 0.0}})
    plain = models.create("coca", config())
    plain.load_state_dict(model.state_dict())
    image, text = batch(config())
    losses, expected = model.losses(image, text), plain.losses(image, text)
    assert losses["contrastive_loss"].dtype == torch.long and losses["contrastive_loss"] == 0  # as open_clip
    torch.testing.assert_close(losses["caption_loss"], 0.25 * expected["caption_loss"])
    torch.testing.assert_close(model.loss(image, text), losses["caption_loss"])


def test_the_vocabulary_is_the_text_towers() -> None:
    model = models.create("coca", config(None, None, {"vocab_size": 7, "mlp_ratio": 9}))
    assert model.text_decoder.text_projection.shape == (24, VOCAB)
    assert model.text_decoder.resblocks[0].mlp.c_fc.out_features == 4 * 24


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_cfg": {"widht": 3}}, r"vision_cfg: config has an unknown key 'widht', expected only layers"),
        ({"text_cfg": {"head_width": 3}}, r"text_cfg: config has an unknown key 'head_width'"),
        ({"multimodal_cfg": {"depth": 3}}, r"multimodal_cfg: config has an unknown key 'depth'"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, r"vision_cfg: timm_model_name is 'vit', expected None"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, r"text_cfg: hf_model_name is 'roberta-base', expected None"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1]}}, r"layers is \[1, 1, 1, 1\], expected an integer"),
        ({"vision_cfg": {"pool_type": "max"}}, r"pool_type is 'max', expected one of 'tok', 'avg', 'none'"),
        ({"vision_cfg": {"attentional_pool": "paper"}}, r"attentional_pool is 'paper', expected one of False"),
        ({"vision_cfg": {"attentional_pool": "cascade"}}, r"width is 30, expected embed_dim = 24 for a cascade"),
        ({"vision_cfg": {"pos_embed_type": "rope"}}, r"pos_embed_type is 'rope'"),
        ({"vision_cfg": {"pos_embed_type": "sin_cos_2d"}}, r"'sin_cos_2d' with \(4, 4\) patches and width 30"),
        ({"vision_cfg": {"head_width": 7}}, r"width is 30 with 4 attention heads, expected a multiple of the heads"),
        ({"text_cfg": {"pool_type": "mean"}}, r"text pool_type is 'mean'"),
        ({"text_cfg": {"width": 30}}, r"multimodal_cfg's width is 24, expected text_cfg's 30"),
        ({"multimodal_cfg": {"width": 30}}, r"multimodal_cfg's width is 30, expected the image tokens' 24"),
        ({"cast_dtype": None}, r"config has an unknown key 'cast_dtype'"),
    ],
)
def test_create_names_what_does_not_fit(changed: dict, message: str) -> None:
    given = config()
    given |= {k: given[k] | v if isinstance(v, dict) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=message):
        models.create("coca", given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 3, "min_seq_len": 3}, "seq_len is 3, expected more than min_seq_len = 3"),
        ({"generation_type": "greedy"}, "generation_type is 'greedy', expected 'top_k', 'top_p' or 'beam_search'"),
        ({"num_beams": 1}, "num_beams is 1 in 3 groups"),
        ({"num_beams": 4}, "num_beams is 4 in 3 groups"),
        ({"generation_type": "top_k", "top_k": 0}, "top_k is 0"),
        ({"generation_type": "top_p", "top_p": 1.5}, "top_k is 1 and top_p 1.5"),
        ({"generation_type": "top_k", "text": torch.zeros(1, 2)}, "text has 1 captions, expected 2 as image"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    model = models.create("coca", config())
    with pytest.raises(ValueError, match=message):
        model.generate(batch(config(), 2)[0], **(SAY | options))


def test_bad_inputs_are_named() -> None:
    model = models.create("coca", config())
    image, text = batch(config())
    with pytest.raises(ValueError, match=r"image has shape \(4, 3, 20, 10\), expected \[B, 3, 20, 20\]"):
        model(image[..., :10], text)
    with pytest.raises(ValueError, match=r"text has shape \(4, 28\), expected \[B, L\] with L <= 15"):
        model.encode_text(text.repeat(1, 2))
    with pytest.raises(ValueError, match="text_tokens has 15 tokens, expected at most 14"):
        model(image, batch(config(), length=15)[1], output_labels=False)
    assert model(image, batch(config(), length=15)[1])["logits"].shape == (4, 14, VOCAB)


def test_official_initialisation() -> None:
    wide = models.create(
        "coca",
        config(NO_POOL | {"width": 128, "head_width": 64}, {"width": 128, "layers": 3, "heads": 4}, {"width": 128}),
    )
    text, decoder = wide.text, wide.text_decoder
    for weight, std in (
        (text.token_embedding.weight, 0.02),
        (text.positional_embedding, 0.01),
        (text.cls_emb, 0.01),
        (text.text_projection, 128**-0.5),
        (text.transformer.resblocks[2].attn.in_proj_weight, 128**-0.5),
        (text.transformer.resblocks[2].attn.out_proj.weight, (128 * 2 * 3) ** -0.5),
        (text.transformer.resblocks[2].mlp.c_fc.weight, (2 * 128) ** -0.5),
        (text.transformer.resblocks[2].mlp.c_proj.weight, (128 * 2 * 3) ** -0.5),
        # torch's own
        (decoder.cross_attn[1].attn.in_proj_weight, (2 / (128 + 3 * 128)) ** 0.5),
        (decoder.cross_attn[1].mlp.c_fc.weight, (3 * 128) ** -0.5),
        (decoder.text_projection, 128**-0.5),
        (wide.visual.proj, 128**-0.5),
    ):
        # five standard errors of a sample's deviation
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert wide.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_exported_with_dynamic_batch() -> None:
    given = config()
    model = models.create("coca", given).eval()
    pairs = torch.export.Dim("pairs")
    exported = torch.export.export(model, batch(given, 3), dynamic_shapes={"image": {0: pairs}, "text": {0: pairs}})
    for n in (2, 5):
        inputs = batch(given, n)
        torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_half_precision() -> None:
    model = models.create("coca", config()).bfloat16()
    image, text = batch(config())
    out = model(image, text)
    assert {t.dtype for t in out.values() if t.is_floating_point()} == {torch.bfloat16}
    assert model.loss(image, text).dtype == torch.float32
    assert model.generate(image, **SAY)[0, 0] == START
