from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse import models, use_backend
from mmfuse.models.blip import CaptionDecoder, Context, Features, bootstrap
from mmfuse.models.blip.decoding import search
from mmfuse.models.blip.med import BertConfig, BertLMHeadModel, BertModel
from mmfuse.models.vit import Block

TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 50, "enc_token_id": 51, "len": 52}
MED = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "encoder_width": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
COMMON = {
    "med_config": MED,
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "tokenizer": TOKENS,
    "prompt_ids": [1, 7, 9, 2],
}
ITC = {"image_size": 16, "embed_dim": 12, "queue_size": 7, "momentum": 0.9}
PRETRAIN = COMMON | {"variant": "pretrain", "config": ITC}
RETRIEVAL = COMMON | {"variant": "retrieval", "config": ITC}
CAPTION = COMMON | {"variant": "caption", "config": {"image_size": 16}}
VQA = COMMON | {"variant": "vqa", "config": {"image_size": 16}}


def _model(config: dict[str, Any]) -> Any:
    """A float64 model with no zeros or ones among its weights, and a momentum model of its own."""
    model = models.create("blip", config).double().eval()
    for p in model.parameters():
        if p.dim():
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def _texts(batch: int, length: int = 6, first: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 50, (batch, length))
    ids[:, 0] = first
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        end = 2 + row % (length - 2)
        ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = 2, 0, 0
    return ids, mask


def _image(size: int) -> Tensor:
    return torch.randn(size, 3, 16, 16, dtype=torch.float64)


def _batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return _image(size), *_texts(size)


# --- published sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("base", 252), ("base-vqa", 361), ("base-caption", 224), ("base-retrieval", 224), ("large-caption", 446)],
)
def test_parameter_counts_of_the_papers(preset: str, millions: int) -> None:
    """Li et al. 2022, table 3: all shared except self-attention, nothing shared, one BERT; Li et al. 2023: 446M."""
    with torch.device("meta"):
        model = models.create("blip", preset)
    count = sum(p.numel() for name, p in model.named_parameters() if "_m." not in name)
    assert round(count / 1e6) == millions


def test_the_defaults_are_the_official_constructors() -> None:
    with torch.device("meta"):
        model, large = models.create("blip", "base"), models.create("blip", "large-retrieval")
    assert model.image_queue.shape == (256, 57600) and model.momentum == 0.995 and model.image_resolution == 224
    assert len(model.text_encoder.embeddings.word_embeddings.weight) == 30524
    assert (
        large.image_resolution == 384
        and large.text_encoder.encoder.layer[0].crossattention.self.key.in_features == 1024
    )
    rates = [block.drop_path for block in large.visual_encoder.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


@pytest.mark.parametrize("config", [PRETRAIN, RETRIEVAL], ids=["pretrain", "retrieval"])
def test_a_momentum_twin_starts_as_a_frozen_copy(config: dict) -> None:
    model = models.create("blip", config)
    state = model.state_dict()
    twins = [key for key in state if "_m." in key]
    assert twins and all(torch.equal(state[key], state[key.replace("_m.", ".")]) for key in twins)
    assert all(p.requires_grad == ("_m." not in name) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "nlvr"}, "variant is 'nlvr', expected one of pretrain, retrieval, caption, vqa"),
        ({"temperature": 1}, "unknown key 'temperature'"),
        ({"config": {"image_res": 16}}, "unknown key 'image_res'"),
        ({"med_config": {k: v for k, v in MED.items() if k != "hidden_size"}}, "med_config has no hidden_size"),
        ({"med_config": MED | {"add_cross_attention": False}}, "add_cross_attention is False, expected True"),
        ({"variant": "vqa", "config": {}, "med_config": MED | {"encoder_width": 16}}, "encoder_width is 16, expected"),
    ],
)
def test_a_config_that_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create("blip", PRETRAIN | change)


def test_official_keys_of_retrieval() -> None:
    """The official queue's pointer has another name there."""
    model = models.create("blip", RETRIEVAL)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    state["ptr_queue"] = state.pop("queue_ptr") + 4
    models.load_official(model, state)
    assert model.queue_ptr.tolist() == [4]
    del state["ptr_queue"]
    with pytest.raises(ValueError, match="missing: queue_ptr"):
        models.load_official(model, state)


# --- the text model ---------------------------------------------------------------------------------------------------


def _theirs(**changes: Any) -> Any:
    """transformers' BLIP text model and our own, with the same weights."""
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    config = transformers.BlipTextConfig(
        **{name: MED[name] for name in names},
        vocab_size=52,
        encoder_hidden_size=24,
        is_decoder=True,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        pad_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
        bos_token_id=50,
        label_smoothing=0.1,
        **changes,
    )
    theirs = transformers.BlipTextLMHeadModel(config)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = theirs.double().eval()
    ours = BertLMHeadModel(BertConfig(**MED | {"vocab_size": 52})).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("position_ids") for key in missing)
    return theirs, ours


def test_the_decoder_is_transformers() -> None:
    theirs, ours = _theirs()
    (ids, mask), states = _texts(4), torch.randn(4, 5, 24, dtype=torch.float64)
    want = theirs(ids, attention_mask=mask, encoder_hidden_states=states).logits
    kept = mask.bool()
    got = ours.logits(ids, mask, ours.bert.context(states))
    torch.testing.assert_close(got[kept], want[kept], rtol=1e-9, atol=1e-10)


def test_masked_states_are_not_seen() -> None:
    model = _model(VQA).text_decoder
    (ids, mask), states = _texts(2), torch.randn(2, 5, 24, dtype=torch.float64)
    hidden = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    got = model.logits(ids, mask, model.bert.context(states, hidden))
    want = model.logits(ids[:1], mask[:1], model.bert.context(states[:1, :3]))
    torch.testing.assert_close(got[:1], want)


def test_the_encoder_of_both_modes_is_transformers() -> None:
    theirs, decoder = _theirs()
    ours = BertModel(BertConfig(**MED | {"vocab_size": 52})).double().eval()
    ours.load_state_dict(decoder.bert.state_dict())
    (ids, mask), states = _texts(4), torch.randn(4, 5, 24, dtype=torch.float64)
    kept = mask.bool()
    for got, given in (
        (ours.text(ids, mask), {}),
        (ours(ids, mask, ours.context(states)), {"encoder_hidden_states": states}),
    ):
        want = theirs.bert(ids, attention_mask=mask, is_decoder=False, **given).last_hidden_state
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-9, atol=1e-10)


def test_texts_in_a_run_share_their_context() -> None:
    model = _model(RETRIEVAL).text_encoder
    (ids, mask), states = _texts(6), torch.randn(2, 5, 16, dtype=torch.float64)
    hidden = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    shared = model(ids, mask, model.context(states, hidden))
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(shared, model(ids, mask, model.context(states[rows], hidden[rows])))
    torch.testing.assert_close(shared, model(ids, mask, model.context(states, hidden).select(rows)))


def test_a_step_projects_an_image_once() -> None:
    model = _model(PRETRAIN)
    calls = []
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_hook(lambda _module, args, _out: calls.append(args[0].shape[:2]))
    model(*_batch(), negatives=(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])))
    assert calls == [(4, 5)] * 3


def test_all_but_self_attention_is_shared() -> None:
    model = _model(PRETRAIN)
    encoder, decoder = (dict(m.named_parameters()) for m in (model.text_encoder, model.text_decoder.bert))
    assert encoder.keys() == decoder.keys()
    for name, p in encoder.items():
        assert (p is decoder[name]) == (".attention." not in name)
    assert model.text_decoder.cls.predictions.decoder.weight is encoder["embeddings.word_embeddings.weight"]


# --- the losses -----------------------------------------------------------------------------------------------------


def _itc(model: Any, temp: Tensor, f: Features, f_m: Features, alpha: float, idx: Tensor | None) -> Tensor:
    """Cross-entropy with soft targets over batch and queue, written out."""
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
        target = alpha * (query_m @ keys / temp).softmax(1) + (1 - alpha) * target
        losses.append(-(target.detach() * (query @ keys / temp).log_softmax(1)).sum(1).mean())
    return sum(losses) / 2


@pytest.mark.parametrize("config", [PRETRAIN, RETRIEVAL], ids=["pretrain", "retrieval"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_step_is_the_papers(config: dict, alpha: float) -> None:
    model = _model(config)
    extra = () if config is PRETRAIN else (torch.tensor([5, 9, 5, 2]),)
    if extra:
        model.idx_queue[0, :3] = torch.tensor([9, 5, 1])
    model.temp.data.fill_(0.9)
    before, (image, ids, mask) = copy.deepcopy(model), _batch()
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    losses = model(image, ids, mask, *extra, alpha, negatives=negatives)
    assert model.temp.item() == 0.5

    m, old = before.momentum, before.state_dict()
    for key, t in old.items():
        if "_m." in key and t.is_floating_point():
            torch.testing.assert_close(model.state_dict()[key], m * t + (1 - m) * old[key.replace("_m.", ".")])

    f, f_m = model.features(image, ids, mask), model.features(image, ids, mask, "_m")
    torch.testing.assert_close(losses.loss_ita, _itc(before, model.temp, f, f_m, alpha, *extra or (None,)))
    torch.testing.assert_close(model.image_queue[:, :4], f_m.image_feat.T)

    # matching begins again from the ids
    pairs = [(range(4), range(4)), (negatives[0], range(4)), (range(4), negatives[1])]
    started = ids.clone()
    started[:, 0] = 51
    logits = []
    for i, t in itertools.chain(*(zip(*pair, strict=True) for pair in pairs)):
        context = model.context(f.image_embeds[int(i)][None])
        states = model.text_encoder(started[int(t)][None], mask[int(t)][None], context)
        logits.append(model.itm_head(states[:, 0]))
    torch.testing.assert_close(losses.loss_itm, F.cross_entropy(torch.cat(logits), torch.tensor([1] * 4 + [0] * 8)))
    assert (losses.loss_lm is None) == (config is RETRIEVAL)
    torch.testing.assert_close(losses.total, sum(loss for loss in losses if loss is not None))


def test_language_modelling_smooths_its_labels() -> None:
    model, captioner = _model(PRETRAIN), _model(CAPTION)
    image, ids, mask = _batch()
    started = ids.clone()
    started[:, 0] = 50
    for decoder, encoder, loss, prompt in (
        (model.text_decoder, model.visual_encoder, model(image, ids, mask).loss_lm, 0),
        (captioner.text_decoder, captioner.visual_encoder, captioner(image, ids, mask), 3),
    ):
        each = []
        for row in range(4):
            text = started[row][mask[row].bool()][None]
            context = decoder.bert.context(encoder(image[row : row + 1]))
            log_p = decoder.logits(text, torch.ones_like(text), context)[0, :-1].log_softmax(-1)
            smooth = -0.9 * log_p.gather(1, text[0, 1:, None])[:, 0] - 0.1 * log_p.mean(1)
            each.append(smooth[max(0, prompt - 1) :])
        torch.testing.assert_close(loss, torch.cat(each).mean())


def test_negatives_are_of_another_pair_or_id() -> None:
    model, pretraining = _model(RETRIEVAL), _model(PRETRAIN)
    batch = _batch(6)
    idx = torch.tensor([4, 4, 4, 8, 8, 1])
    seen: list[tuple[Tensor, Tensor]] = []
    for of in (model, pretraining):
        itm = of.itm
        of.itm = lambda context, ids, mask, negatives, itm=itm: (
            seen.append(negatives),
            itm(context, ids, mask, negatives),
        )[1]
    for _ in range(10):
        model(*batch, idx)
        pretraining(*batch)
        of_ids, of_pairs = seen[-2:]
        assert all((idx[negative] != idx).all() for negative in of_ids)
        assert all((negative != torch.arange(6)).all() and (negative >= 0).all() for negative in of_pairs)


def test_pretraining_draws_any_other_where_the_own_pair_takes_all_of_the_softmax() -> None:
    """By the 1e-4 that is added to it; the softmax alone would always draw the most similar other."""
    model, batch = _model(PRETRAIN), _batch()
    certain = F.normalize(torch.eye(4, 12) + 0.1 * torch.rand(4, 12), dim=1).double()
    features, drawn, itm = model.features, [], model.itm
    model.features = lambda *args: features(*args)._replace(image_feat=certain, text_feat=certain)
    model.itm = lambda *args: (drawn.append(torch.stack(args[-1])), itm(*args))[1]
    model.temp.data.fill_(0.001)
    for _ in range(30):
        model(*batch)
    for way in torch.stack(drawn).unbind(1):
        assert all(len(way[:, row].unique()) == 3 for row in range(4))


def test_retrieval_draws_by_the_features_themselves() -> None:
    """With an all but certain draw, and another momentum model."""
    model = _model(RETRIEVAL)
    image, ids, mask = _batch()
    f = model.features(image, ids, mask)
    model.temp.data.fill_(0.001)
    drawn: list[tuple[Tensor, Tensor]] = []
    itm = model.itm
    model.itm = lambda *args: (drawn.append(args[-1]), itm(*args))[1]
    model(image, ids, mask, torch.arange(4))
    similar = (f.image_feat @ f.text_feat.T).fill_diagonal_(-torch.inf)
    assert torch.equal(drawn[0][1], similar.argmax(1)) and torch.equal(drawn[0][0], similar.argmax(0))


def test_a_batch_without_negatives_is_matched_on_its_pairs_alone() -> None:
    model = _model(RETRIEVAL)
    image, ids, mask = _batch(3)
    losses = model(image, ids, mask, torch.tensor([6, 6, 6]))
    logits = model.match(model.context(model.encode_image(image)[0]), ids, mask)
    torch.testing.assert_close(losses.loss_itm, F.cross_entropy(logits, torch.ones(3, dtype=torch.long)))


def test_padding_is_not_seen() -> None:
    model = _model(PRETRAIN)
    image, ids, mask = _batch()
    longer = F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    twin = copy.deepcopy(model)
    for short, long in zip(
        model(image, ids, mask, negatives=negatives), twin(image, *longer, negatives=negatives), strict=True
    ):
        torch.testing.assert_close(short, long)


def test_a_step_in_training_mode_has_dropout_and_a_gradient_everywhere() -> None:
    model = _model(PRETRAIN | {"med_config": MED | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}})
    batch = _batch()
    model.train()
    once, again = (model.encode_text(*batch[1:])[1] for _ in range(2))
    assert not torch.equal(once, again)
    model(*batch, 0.4).total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_stochastic_depth_keeps_all_or_nothing_of_a_branch() -> None:
    block = Block(8, 2, 2, drop_path=0.5).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64).expand(200, 3, 8)
    y = block.train()(x)
    untouched = (y == x).all(2).all(1)
    assert untouched.double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 200) ** 0.5)
    with torch.no_grad():
        attended = x + 2 * block.attn(block.norm1(x))
    # an image has twice the attention's branch or none of it, and of the other branch, too
    kinds = [x, attended, x + 2 * block.mlp(block.norm2(x)), attended + 2 * block.mlp(block.norm2(attended))]
    nearest = torch.stack([(y - kind).abs().amax((1, 2)) for kind in kinds])
    assert nearest.min(0).values.max() < 1e-12 and nearest.argmin(0).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("config", [PRETRAIN, RETRIEVAL], ids=["pretrain", "retrieval"])
def test_fused_and_eager_gradients_agree(config: dict) -> None:
    batch, extra = _batch(), () if config is PRETRAIN else (torch.tensor([1, 2, 1, 3]),)
    negatives = torch.tensor([1, 0, 3, 2]), torch.tensor([3, 2, 1, 0])
    model = _model(config)
    state, grads = copy.deepcopy(model.state_dict()), []
    for backend in ("chunked", "torch"):
        model.load_state_dict(state)
        with use_backend(backend):
            model(*batch, *extra, 0.4, negatives=negatives).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() and not any("_m." in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_retrieval_ranks_the_most_similar_by_similarity_and_match() -> None:
    model = _model(RETRIEVAL)
    image, (ids, mask) = _image(4), _texts(6)
    images, texts = model.encode_image(image), model.encode_text(ids, mask)
    f = Features(images[0], texts[0], images[1], texts[1])
    similar = f.image_feat @ f.text_feat.T
    match = torch.stack([model.match(model.context(f.image_embeds[[i] * 6]), ids, mask)[:, 1] for i in range(4)])
    for ranking, similarity, score in zip(
        model.retrieve(f, ids, mask, k=3, batch_size=2),
        (similar, similar.T),
        (similar + match, (similar + match).T),
        strict=True,
    ):
        chosen = similarity.topk(3).indices
        order = score.gather(1, chosen).argsort(1, descending=True)
        assert torch.equal(ranking.indices, chosen.gather(1, order))
        torch.testing.assert_close(ranking.scores.double(), score.gather(1, ranking.indices), rtol=1e-6, atol=1e-6)


# --- captions -------------------------------------------------------------------------------------------------------


def _context(model: Any, image: Tensor) -> Context:
    return model.text_decoder.bert.context(model.visual_encoder(image))


def test_a_decoder_word_by_word_is_the_decoder_at_once() -> None:
    model = _model(CAPTION)
    context, ids = _context(model, _image(2)), torch.randint(4, 50, (6, 7))
    whole = model.text_decoder.logits(ids, torch.ones_like(ids), context)
    decoder = CaptionDecoder(model.text_decoder, context, beams=3)
    torch.testing.assert_close(decoder(ids[:, :3]), whole[:, 2])
    torch.testing.assert_close(decoder(ids[:, 3:4]), whole[:, 3])
    order = torch.tensor([1, 1, 0, 5, 3, 3])
    decoder.reorder(order)
    again = torch.cat([ids[order, :4], ids[:, 4:5]], dim=1)
    torch.testing.assert_close(
        decoder(ids[:, 4:5]), model.text_decoder.logits(again, torch.ones_like(again), context)[:, -1]
    )


def test_greedy_captions_are_transformers() -> None:
    theirs, ours = _theirs()
    model = _model(CAPTION | {"vit": COMMON["vit"] | {"embed_dim": 24}})
    model.text_decoder.load_state_dict(ours.state_dict())
    model.text_decoder.cls.predictions.bias.data[2] += 2  # ends come early
    theirs.load_state_dict(model.text_decoder.state_dict(), strict=False)
    image = _image(5)
    options = {"max_length": 11, "min_length": 5, "num_beams": 1, "repetition_penalty": 1.3}
    got = model.generate(image, **options)
    states = model.visual_encoder(image)
    prompt = torch.tensor([[50, 7, 9]]).expand(5, -1)
    want = theirs.generate(input_ids=prompt, encoder_hidden_states=states, do_sample=False, **options)
    assert torch.equal(got, want)
    lengths = (got != 0).sum(1)
    assert lengths.min() < lengths.max(), "all captions are equally long, so padding is not tried"


def test_a_beam_search_with_room_for_all_finds_the_best() -> None:
    """Best is the mean log-probability of all tokens before the end, the prompt's among them in the number."""
    few = TOKENS | {"bos_token_id": 5, "enc_token_id": 6, "len": 7}
    model = _model(CAPTION | {"tokenizer": few, "prompt_ids": [1, 4, 2]})
    context, prompt, length = _context(model, _image(2)), [5, 4], 5
    for row in range(2):
        scores = {}
        of = Context(tuple((k[row : row + 1], v[row : row + 1]) for k, v in context.keys_values))
        for words in itertools.product(range(7), repeat=length - len(prompt)):
            ids = torch.tensor([[*prompt, *words]])
            log_p = model.text_decoder.logits(ids, torch.ones_like(ids), of)[0].log_softmax(-1)
            end = words.index(2) if 2 in words else len(words)
            taken = (*words[:end], 2)[: len(words)]
            total = sum(log_p[len(prompt) - 1 + i, word].item() for i, word in enumerate(taken))
            scores[taken] = total / (len(prompt) + end)
        best = max(scores, key=lambda words: scores[words])
        decoder = CaptionDecoder(model.text_decoder, of, beams=343)
        got = search(decoder, prompt, lambda ids, logits: logits, length, few)[0].tolist()
        assert tuple(word for word in got[len(prompt) :] if word) == tuple(word for word in best if word)


def test_given_draws() -> None:
    model = _model(CAPTION)
    image, say = _image(3), {"sample": True, "max_length": 11, "min_length": 4}
    # the likeliest word alone is left
    certain = model.generate(image, **say, top_p=0.0)
    assert torch.equal(certain, model.generate(image, num_beams=1, repetition_penalty=1.1, max_length=11, min_length=4))
    draws = torch.rand(3, 8)
    both = model.generate(image, **say, draws=draws)
    assert torch.equal(both, model.generate(image, **say, draws=draws))
    # a caption depends on its own draws alone
    one = model.generate(image[:1], **say, draws=draws[:1])
    assert torch.equal(both[:1, : one.shape[1]], one)
    assert not torch.equal(both, certain)
    with pytest.raises(ValueError, match="max_length is 3, expected more than the 3 tokens of the prompt"):
        model.generate(image, max_length=3)
    with pytest.raises(ValueError, match="num_beams is 0"):
        model.generate(image, num_beams=0)


def test_capfilt_keeps_what_the_filter_matches() -> None:
    captioner, judge = _model(CAPTION), _model(RETRIEVAL)
    captioner.text_decoder.cls.predictions.bias.data[2] += 1
    image, (ids, mask) = _image(6), _texts(6, 9)
    draws = torch.rand(6, 8)
    options = {"max_length": 9, "min_length": 4, "draws": draws}
    written = captioner.generate(image, sample=True, **options)
    found = bootstrap(captioner, judge, image, ids, mask, **options)
    assert found.ids.shape == found.mask.shape and found.kept.shape == (6, 2)
    for row in range(6):
        words = [word for word in written[row, 3:].tolist() if word not in (0, 2)]
        text = found.ids[row, 1][found.mask[row, 1].bool()].tolist()
        assert text == [1, *words, 2]
        assert found.ids[row, 0][found.mask[row, 0].bool()].tolist() == ids[row][mask[row].bool()].tolist()
        context = judge.context(judge.encode_image(image[row : row + 1])[0])
        for column in range(2):
            text = found.ids[row, column][found.mask[row, column].bool()][None]
            logits = judge.match(context, text, torch.ones_like(text))[0]
            assert found.kept[row, column] == (logits[1] > logits[0])
    rows, kept_ids, kept_mask = found.pairs
    assert len(rows) == len(kept_ids) == len(kept_mask) == found.kept.sum()
    assert 0 < len(rows) < 12, "the filter says the same of all, so it is not tried"
    assert torch.equal(kept_ids, found.ids[found.kept]) and torch.equal(rows, found.kept.nonzero()[:, 0])


# --- question answering -----------------------------------------------------------------------------------------------


def _answer(model: Any, image: Tensor, question: Tensor, answer: Tensor) -> Tensor:
    """Log-probabilities [L - 1, V] of the words of one answer to one question, both without padding."""
    question = question.clone()
    question[0] = 51
    of_image = model.text_encoder.context(model.visual_encoder(image[None]))
    states = model.text_encoder(question[None], torch.ones_like(question)[None], of_image)
    context = model.text_decoder.bert.context(states)
    return model.text_decoder.logits(answer[None], torch.ones_like(answer)[None], context)[0, :-1].log_softmax(-1)


def _value(log_p: Tensor, answer: Tensor) -> Tensor:
    return 0.9 * log_p.gather(1, answer[1:, None]).sum() + 0.1 * log_p.mean(1).sum()


def test_vqa_loss_is_summed_over_words_and_averaged_over_images() -> None:
    model = _model(VQA)
    image, question, mask = _batch(2)
    answers, answer_mask = _texts(3, 4)
    n, weights = [2, 1], torch.tensor([0.5, 1.5, 0.7], dtype=torch.float64)
    loss = model(image, question, mask, answers, answer_mask, n, weights)
    want = torch.zeros(())
    for i, b in enumerate((0, 0, 1)):
        answer = answers[i][answer_mask[i].bool()].clone()
        answer[0] = 50
        want = want - weights[i] * _value(_answer(model, image[b], question[b][mask[b].bool()], answer), answer) / 2
    torch.testing.assert_close(loss, want)


def test_answers_are_ranked_by_first_token_and_then_as_a_whole() -> None:
    model = _model(VQA)
    image, question, mask = _batch(3)
    candidates, candidate_mask = _texts(7, 4, first=50)
    candidates[:, 1] = torch.arange(10, 17)
    ranked = model.rank_answer(image, question, mask, candidates, candidate_mask, 4)
    for b in range(3):
        scores, first = [], []
        for i in range(7):
            answer = candidates[i][candidate_mask[i].bool()]
            log_p = _answer(model, image[b], question[b][mask[b].bool()], answer)
            scores.append(_value(log_p, answer))
            first.append(log_p[0, answer[1]].exp())
        torch.testing.assert_close(ranked.first_token[b], torch.stack(first))
        chosen = torch.stack(first).topk(4).indices
        assert torch.equal(ranked.ids[b], chosen)
        torch.testing.assert_close(ranked.log_probs[b], torch.stack(scores)[chosen])
        assert ranked.best[b] == chosen[torch.stack(scores)[chosen].argmax()]


def test_generated_answers_see_the_padding_of_questions() -> None:
    model = _model(VQA)
    image, question, mask = _batch(3)
    got = model.generate(image, question, mask, num_beams=1, max_length=6)
    states = model.question(image, question, mask)
    ids = torch.full((3, 1), 50)
    for _ in range(5):
        logits = model.text_decoder.logits(ids, torch.ones_like(ids), model.text_decoder.bert.context(states))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    for row, want in zip(got.tolist(), ids.tolist(), strict=True):
        end = want.index(2) + 1 if 2 in want else len(want)
        assert row[:end] == want[:end] and not any(row[end:])
