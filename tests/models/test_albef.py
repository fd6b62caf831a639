from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse import models, use_backend
from mmfuse.models.albef import ALBEF, VQA, Features, MaskDraws
from mmfuse.models.albef.bert import BertConfig, BertForLanguage, BertModel

TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "fusion_layer": 1,
    "encoder_width": 16,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
ITC = {"image_res": 16, "vision_width": 16, "embed_dim": 12, "temp": 0.07, "queue_size": 7, "momentum": 0.9}
PRETRAIN = {
    "variant": "pretrain",
    "config": ITC | {"mlm_probability": 0.3},
    "bert_config": BERT,
    "vit": VIT,
    "tokenizer": TOKENS,
}
RETRIEVAL = PRETRAIN | {"variant": "retrieval", "config": ITC | {"distill": True}}
VQA_CONFIG = PRETRAIN | {
    "variant": "vqa",
    "config": {"image_res": 16, "vision_width": 16, "distill": True},
    "bert_config": BERT | {"encoder_width": 16, "hidden_size": 16},
}


def _model(config: dict[str, Any], **changes: Any) -> Any:
    """A float64 model with no zeros or ones among its weights, and a momentum model of its own."""
    config = copy.deepcopy(config)
    config["config"] |= changes
    model = models.create("albef", config).double().eval()
    for p in model.parameters():
        if p.dim():
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def _texts(batch: int, length: int = 6) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 50, (batch, length))
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        end = 2 + row % (length - 2)
        ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = 2, 0, 0
    return ids, mask


def _batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, 3, 16, 16, dtype=torch.float64), *_texts(size)


# --- published sizes ------------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_paper() -> None:
    """Section 3.5: "a BERT-base with 123.7M parameters and a ViT-B/16 with 85.8M parameters"."""
    with torch.device("meta"):
        model = models.create("albef", "14m")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert round(count["text_encoder"] / 1e6, 1) == 123.7 and round(count["visual_encoder"] / 1e6, 1) == 85.8
    assert model.image_queue.shape == (256, 65536)


@pytest.mark.parametrize("preset", ["14m", "14m-retrieval", "14m-vqa"])
def test_a_momentum_twin_starts_as_a_frozen_copy(preset: str) -> None:
    config = {"14m": PRETRAIN, "14m-retrieval": RETRIEVAL, "14m-vqa": VQA_CONFIG}[preset]
    assert config["variant"] == models.registry.system("albef").presets[preset]["variant"]
    model = models.create("albef", config)
    state = model.state_dict()
    twins = [key for key in state if "_m." in key]
    assert twins and all(torch.equal(state[key], state[key.replace("_m.", ".")]) for key in twins)
    assert all(p.requires_grad == ("_m." not in name) for name, p in model.named_parameters())


# --- the encoders against other implementations -----------------------------------------------------------------------


def _randomise(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module.double().eval()


def test_the_image_encoder_is_timms() -> None:
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    timm = pytest.importorskip("timm", exc_type=ImportError)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=20, depth=3, num_heads=4, mlp_ratio=3, num_classes=0, global_pool=""
    )
    _randomise(theirs)
    config = RETRIEVAL | {"vit": {"patch_size": 8, "embed_dim": 20, "depth": 3, "num_heads": 4, "mlp_ratio": 3}}
    config |= {"config": ITC | {"image_res": 24, "vision_width": 20, "distill": False}}
    config |= {"bert_config": BERT | {"encoder_width": 20}}
    ours = models.create("albef", config).double().visual_encoder
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs.forward_features(image), rtol=1e-10, atol=1e-12)


def _transformers_bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    return transformers, transformers.BertConfig(
        **{name: BERT[name] for name in names}, hidden_act="gelu", layer_norm_eps=1e-12, **changes
    )


def test_text_mode_is_a_bert_of_the_layers_below_fusion() -> None:
    transformers, config = _transformers_bert(num_hidden_layers=2)
    theirs = _randomise(transformers.BertModel(config, add_pooling_layer=False))
    ours = BertModel(BertConfig(**BERT | {"fusion_layer": 2})).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(".layer.2." in key or key.endswith("position_ids") for key in missing)
    ids, mask = _texts(3)
    want = theirs(ids, attention_mask=mask).last_hidden_state
    kept = mask.bool()
    torch.testing.assert_close(ours.text(ids, mask)[kept], want[kept], rtol=1e-9, atol=1e-10)


def test_a_decoder_is_a_causal_bert_with_cross_attention_everywhere() -> None:
    transformers, config = _transformers_bert(num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
    theirs = _randomise(transformers.BertLMHeadModel(config))
    ours = BertForLanguage(
        BertConfig(**BERT | {"fusion_layer": 0, "num_hidden_layers": 2, "encoder_width": 24}), causal=True
    ).double()
    missing, unexpected = ours.eval().load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("position_ids") for key in missing)
    ids, mask = _texts(3)
    states, states_mask = torch.randn(3, 5, 24, dtype=torch.float64), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5])
    want = theirs(ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=states_mask).logits
    kept = mask.bool()
    torch.testing.assert_close(ours.logits(ids, mask, states, states_mask)[kept], want[kept], rtol=1e-9, atol=1e-10)


def test_both_modes_together_are_the_multimodal_encoder() -> None:
    model = _model(RETRIEVAL)
    image, ids, mask = _batch()
    f = model.features(image, ids, mask)
    whole = model.text_encoder(ids, mask, f.image_embeds)
    torch.testing.assert_close(whole, model.text_encoder.fusion(f.text_embeds, mask, f.image_embeds))
    assert [layer.crossattention is not None for layer in model.text_encoder.encoder.layer] == [False, True, True]


def test_padding_is_not_seen() -> None:
    model = _model(RETRIEVAL)
    image, ids, mask = _batch()
    longer = F.pad(ids, (0, 3), value=17), F.pad(mask, (0, 3))
    f, f_longer = model.features(image, ids, mask), model.features(image, *longer)
    torch.testing.assert_close(f_longer.text_feat, f.text_feat)
    torch.testing.assert_close(
        model.match(f_longer.image_embeds, f_longer.text_embeds, longer[1]),
        model.match(f.image_embeds, f.text_embeds, mask),
    )


# --- the losses -----------------------------------------------------------------------------------------------------


def _itc(model: ALBEF, f: Features, f_m: Features, alpha: float, idx: Tensor | None) -> Tensor:
    """Equation 6, written out."""
    losses = []
    for query, query_m, keys, queue in (
        (f.image_feat, f_m.image_feat, f_m.text_feat, model.text_queue),
        (f.text_feat, f_m.text_feat, f_m.image_feat, model.image_queue),
    ):
        keys = torch.cat([keys.T, queue], dim=1)
        target = torch.eye(len(query), keys.shape[1], dtype=keys.dtype)
        if idx is not None:
            target = (idx[:, None] == torch.cat([idx, model.idx_queue[0]])).double()
            target /= target.sum(1, keepdim=True)
        target = alpha * (query_m @ keys / model.temp).softmax(1) + (1 - alpha) * target
        losses.append(-(target.detach() * (query @ keys / model.temp).log_softmax(1)).sum(1).mean())
    return sum(losses) / 2


@pytest.mark.parametrize("variant", ["pretrain", "retrieval", "retrieval without distillation"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_step_is_the_papers(variant: str, alpha: float) -> None:
    config = PRETRAIN if variant == "pretrain" else RETRIEVAL
    model = _model(config, **({"distill": False} if "without" in variant else {}))
    extra = () if config is PRETRAIN else (torch.tensor([5, 9, 5, 2]),)
    if extra:
        model.idx_queue[0, :3] = torch.tensor([9, 5, 1])
    before, batch, negatives = copy.deepcopy(model), _batch(), (torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
    losses = model(*batch, *extra, alpha, negatives=negatives)

    m = before.momentum
    expected = {
        key: m * t + (1 - m) * before.state_dict()[key.replace("_m.", ".")]
        for key, t in before.state_dict().items()
        if "_m." in key and t.is_floating_point()
    }
    for key, t in expected.items():
        torch.testing.assert_close(model.state_dict()[key], t)

    f, f_m = model.features(*batch), model.features(*batch, "_m")
    want = _itc(before, f, f_m, 0.0 if "without" in variant else alpha, *extra or (None,))
    torch.testing.assert_close(losses.loss_ita, want)
    parameters = [model.temp, model.vision_proj.weight, model.text_proj.weight]
    for got, expected_grad in zip(
        torch.autograd.grad(losses.loss_ita, parameters, retain_graph=True),
        torch.autograd.grad(
            _itc(_with(before, model.temp), f, f_m, 0.0 if "without" in variant else alpha, *extra or (None,)),
            parameters,
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, expected_grad)

    f = model.features(*batch)
    image_neg, text_neg = negatives
    pairs = [(range(4), range(4)), (image_neg, range(4)), (range(4), text_neg)]
    logits = [
        model.match(f.image_embeds[i], f.text_embeds[t], batch[2][t])
        for images, texts in pairs
        for i, t in zip(_rows(images), _rows(texts), strict=True)
    ]
    labels = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(losses.loss_itm, F.cross_entropy(torch.cat(logits), labels))
    assert (losses.loss_mlm is None) == (config is RETRIEVAL)
    torch.testing.assert_close(losses.total, sum(loss for loss in losses if loss is not None))


def _rows(indices: Iterable[int]) -> list[slice]:
    return [slice(int(i), int(i) + 1) for i in indices]


def _with(model: ALBEF, temp: nn.Parameter) -> ALBEF:
    model.temp = temp
    return model


def test_masked_language_modelling() -> None:
    model = _model(PRETRAIN)
    image, ids, mask = _batch()
    draws = MaskDraws(*(torch.rand(ids.shape) < p for p in (0.6, 0.8, 0.5)), torch.randint(50, ids.shape))
    masked, labels = model.mask_tokens(ids, draws)
    kept = (labels == -100) | ~(draws.replace | draws.random)
    assert torch.equal(masked[kept], ids[kept])
    assert torch.equal(labels != -100, draws.masked & (ids != 0) & (ids != 1))
    hidden = labels != -100
    assert (masked[hidden & draws.replace] == 3).all()
    swapped = hidden & ~draws.replace & draws.random
    assert torch.equal(masked[swapped], draws.words[swapped])

    losses = model(image, ids, mask, 0.4, mask_draws=draws)
    logits = model.text_encoder.logits(masked, mask, model.visual_encoder(image))[hidden]
    target = model.text_encoder_m.logits(masked, mask, model.visual_encoder_m(image))[hidden].softmax(-1)
    soft = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses.loss_mlm, 0.6 * F.cross_entropy(logits, labels[hidden]) + 0.4 * soft)


def test_a_mask_is_drawn_as_the_paper_says() -> None:
    model = models.create("albef", PRETRAIN)
    ids = torch.full((400, 50), 7)
    masked, labels = model.mask_tokens(ids)
    chosen = labels != -100
    rate = chosen.float().mean().item()
    assert rate == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / ids.numel()) ** 0.5)
    share = {"mask": (masked[chosen] == 3), "same": masked[chosen] == 7}
    assert share["mask"].float().mean().item() == pytest.approx(0.8 + 0.1 / 50, abs=0.03)
    assert share["same"].float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.03)


def test_pretraining_clamps_its_temperature_and_retrieval_does_not() -> None:
    for config, expected in ((PRETRAIN, 0.5), (RETRIEVAL, 0.9)):
        model = _model(config)
        model.temp.data.fill_(0.9)
        model(*_batch(), *(() if config is PRETRAIN else (torch.arange(4),)))
        assert model.temp.item() == expected


def test_the_queues_wrap_around() -> None:
    model = _model(RETRIEVAL)  # 7 entries
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    for step, size in enumerate((4, 2, 3, 5)):
        batch, idx = _batch(size), torch.arange(size) + 10 * step
        model(*batch, idx)
        f_m = model.features(*batch, "_m")
        entries += list(zip(f_m.image_feat, f_m.text_feat, idx, strict=True))
    assert model.queue_ptr.tolist() == [14 % 7]
    assert model.image_queue.shape == model.text_queue.shape == (12, 7) and model.idx_queue.shape == (1, 7)
    for at, (image, text, idx) in enumerate(entries[-7:]):
        torch.testing.assert_close(model.image_queue[:, at], image)
        torch.testing.assert_close(model.text_queue[:, at], text)
        assert model.idx_queue[0, at] == idx


def test_negatives_are_of_another_pair_or_id() -> None:
    model, pretraining = _model(RETRIEVAL), _model(PRETRAIN)
    batch = _batch(6)
    idx = torch.tensor([4, 4, 4, 8, 8, 1])
    f, f_m = model.features(*batch), model.features(*batch, "_m")
    for _ in range(20):
        for negative in pretraining.itc(f, f_m, 0.4, negatives=1)[2:]:
            assert (negative[:, 0] != torch.arange(6)).all() and (negative >= 0).all()
        for negative in model.itc(f, f_m, 0.4, idx, negatives=1)[2:]:
            assert (idx[negative[:, 0]] != idx).all()


def test_a_batch_without_negatives_is_matched_on_its_pairs_alone() -> None:
    model = _model(RETRIEVAL)
    batch = _batch(3)
    losses = model(*batch, torch.tensor([6, 6, 6]))
    f = model.features(*batch)
    logits = model.match(f.image_embeds, f.text_embeds, batch[2])
    torch.testing.assert_close(losses.loss_itm, F.cross_entropy(logits, torch.ones(3, dtype=torch.long)))


def test_a_step_in_training_mode_has_dropout_and_a_gradient_everywhere() -> None:
    model = _model(PRETRAIN | {"bert_config": BERT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}})
    batch = _batch()
    model.train()
    once, again = (model.encode_text(*batch[1:])[1] for _ in range(2))
    assert not torch.equal(once, again)
    draws = MaskDraws(*torch.ones(3, *batch[1].shape), batch[1])
    model(*batch, 0.4, mask_draws=draws).total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("config", [PRETRAIN, RETRIEVAL], ids=["pretrain", "retrieval"])
def test_fused_and_eager_gradients_agree(config: dict) -> None:
    batch, extra = _batch(), () if config is PRETRAIN else (torch.tensor([1, 2, 1, 3]),)
    draws = {"negatives": (torch.tensor([1, 0, 3, 2]), torch.tensor([3, 2, 1, 0]))}
    if config is PRETRAIN:
        draws["mask_draws"] = MaskDraws(*torch.ones(3, *batch[1].shape), batch[1])
    model = _model(config)
    state, grads = copy.deepcopy(model.state_dict()), []
    for backend in ("chunked", "torch"):
        model.load_state_dict(state)
        with use_backend(backend):
            model(*batch, *extra, 0.4, **draws).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() and not any("_m." in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_retrieval_ranks_the_most_similar_by_their_match() -> None:
    model = _model(RETRIEVAL)
    (image, *_), (ids, mask) = _batch(4), _texts(6)
    images, texts = model.encode_image(image), model.encode_text(ids, mask)
    f = Features(images[0], texts[0], images[1], texts[1])
    similar = f.image_feat @ f.text_feat.T
    match = torch.stack([model.match(f.image_embeds[[i] * 6], f.text_embeds, mask)[:, 1] for i in range(4)])
    for ranking, similarity, logit in zip(
        model.retrieve(f, mask, k=3, batch_size=2), (similar, similar.T), (match, match.T), strict=True
    ):
        chosen = similarity.topk(3).indices
        order = logit.gather(1, chosen).argsort(1, descending=True)
        assert torch.equal(ranking.indices, chosen.gather(1, order))
        torch.testing.assert_close(ranking.scores.double(), logit.gather(1, ranking.indices), rtol=1e-6, atol=1e-6)


# --- question answering -----------------------------------------------------------------------------------------------


def _answers(batch: int) -> tuple[Tensor, Tensor]:
    return _texts(batch, 4)


def _nll(model: VQA, suffix: str, image: Tensor, question: tuple[Tensor, Tensor], answer: Tensor) -> Tensor:
    """Log-probabilities [L - 1, V] of the words of one answer without padding."""
    states = model.question(image, *question, suffix)
    decoder = getattr(model, f"text_decoder{suffix}")
    return decoder.logits(answer[None], torch.ones_like(answer)[None], states, question[1])[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("alpha, distill", [(0.4, True), (0.0, True), (0.4, False)])
def test_vqa_loss_is_summed_over_words_and_averaged_over_images(alpha: float, distill: bool) -> None:
    model = _model(VQA_CONFIG, distill=distill)
    image, *question = _batch(2)
    ids, mask = _answers(3)
    k, weights = [2, 1], torch.tensor([0.5, 1.5, 0.7], dtype=torch.float64)
    loss = model(image, *question, ids, mask, k, weights, alpha)
    want = torch.zeros(())
    for i, b in enumerate((0, 0, 1)):
        of = (image[b : b + 1], tuple(t[b : b + 1] for t in question), ids[i][mask[i].bool()])
        log_p = _nll(model, "", *of)
        value = -log_p.gather(1, of[2][1:, None]).sum()
        if distill:
            value = (1 - alpha) * value - alpha * (_nll(model, "_m", *of).exp() * log_p).sum()
        want = want + weights[i] * value / 2
    torch.testing.assert_close(loss, want)
    assert hasattr(model, "text_decoder_m") == distill
    assert len(model.text_decoder.bert.encoder.layer) == 6


def test_answers_are_ranked_by_first_token_and_then_as_a_whole() -> None:
    model = _model(VQA_CONFIG)
    image, *question = _batch(3)
    candidates, mask = _answers(7)
    ranked = model.rank_answer(image, *question, candidates, mask, 4)
    for b in range(3):
        scores, first = {}, {}
        for i in range(7):
            answer = candidates[i][mask[i].bool()]
            log_p = _nll(model, "", image[b : b + 1], tuple(t[b : b + 1] for t in question), answer)
            first[i] = log_p[0, answer[1]]
            scores[i] = first[i] + log_p.gather(1, answer[1:, None]).sum()
        torch.testing.assert_close(ranked.first_token[b], torch.stack(list(first.values())).exp())
        best = sorted(first, key=lambda i: -first[i])[:4]
        order = sorted(best, key=lambda i: -scores[i])
        assert ranked.ids[b].tolist() == order
        torch.testing.assert_close(ranked.probs[b], torch.stack([scores[i] for i in order]).softmax(0))


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PRETRAIN | {"variant": "nlvr"}, "variant is 'nlvr', expected one of pretrain, retrieval, vqa"),
        (PRETRAIN | {"width": 1}, "unknown key 'width', expected only variant, config"),
        (PRETRAIN | {"config": ITC}, "config has no mlm_probability"),
        (RETRIEVAL | {"config": RETRIEVAL["config"] | {"queues": 1}}, "unknown key 'queues'"),
        (PRETRAIN | {"bert_config": BERT | {"layers": 1}}, "unknown key 'layers'"),
        (PRETRAIN | {"bert_config": {}}, "bert_config has no hidden_size"),
        (PRETRAIN | {"bert_config": BERT | {"hidden_act": "relu"}}, "hidden_act is 'relu', expected 'gelu'"),
        (PRETRAIN | {"bert_config": BERT | {"num_attention_heads": 5}}, "hidden_size is 24, expected a multiple"),
        (PRETRAIN | {"bert_config": BERT | {"fusion_layer": 4}}, "fusion_layer is 4, expected 0 to 3"),
        (PRETRAIN | {"vit": VIT | {"embed_dim": 20}}, "vision_width is 16, expected the image encoder's embed_dim 20"),
        (VQA_CONFIG | {"bert_config": BERT}, "encoder_width is 16, expected hidden_size 24"),
        (PRETRAIN | {"config": PRETRAIN["config"] | {"image_res": 20}}, "image_res is 20, expected a multiple"),
    ],
)
def test_a_config_that_does_not_fit_is_named(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create("albef", config)


def test_bad_inputs_are_named() -> None:
    model = _model(RETRIEVAL)
    with pytest.raises(ValueError, match=r"image has shape \(1, 3, 8, 8\), expected \[B, 3, 16, 16\]"):
        model.encode_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"token ids have shape \(1, 13\), expected \[B, L\] with L <= 12"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13))
