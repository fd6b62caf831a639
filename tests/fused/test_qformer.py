"""The Q-Former against transformers' own, and passes that share an image against passes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tool_worlds
import worlds
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused.qformer import (
    CAPTION,
    CONTRAST_AND_CAPTION,
    QFormer,
    QFormerConfig,
    QFormerKV,
    from_transformers,
    to_transformers,
)

allow_torchvision()

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 30,
    "max_position_embeddings": 12,
}
WIDTH, QUERIES = 20, 4


def make(**changes: Any) -> QFormer:
    """In float64, without zeros and ones among its weights."""
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(**{"encoder_width": WIDTH, **SIZES, **changes})).double().eval()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def texts(batch: int, length: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 30, (batch, length)), torch.randint(1, length + 1, (batch,))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freq", [1, 2])
def test_is_that_of_instructblip(freq: int) -> None:
    instructblip = pytest.importorskip("transformers.models.instructblip")
    model = make(cross_attention_freq=freq)
    config = instructblip.InstructBlipQFormerConfig(
        **SIZES, cross_attention_frequency=freq, encoder_hidden_size=WIDTH, layer_norm_eps=1e-12
    )
    theirs = instructblip.InstructBlipQFormerModel(config).double().eval()
    names = to_transformers(model.state_dict(), instruct=True)
    theirs.load_state_dict(names)
    assert from_transformers(names).keys() == model.state_dict().keys() - {"embeddings.position_ids"}
    query, images, (ids, kept) = normal(2, QUERIES, 24), normal(2, 9, WIDTH), texts(2)
    lengths = torch.tensor([9, 5])
    mask = (torch.arange(6) < kept[:, None]).long()
    want = theirs(
        ids,
        torch.cat([mask.new_ones(2, QUERIES), mask], dim=1),
        query_embeds=query,
        encoder_hidden_states=images,
        encoder_attention_mask=(torch.arange(9) < lengths[:, None]).long(),
    ).last_hidden_state
    got = model(query, [ids], [kept], kv=model.project(images, lengths))
    close(torch.cat(got, dim=1), want)


def test_is_that_of_blip2() -> None:
    blip_2 = pytest.importorskip("transformers.models.blip_2")
    model = make(text=False)
    config = blip_2.Blip2QFormerConfig(**SIZES, encoder_hidden_size=WIDTH, layer_norm_eps=1e-12)
    theirs = blip_2.Blip2QFormerModel(config).double().eval()
    theirs.load_state_dict(to_transformers(model.state_dict()))
    query, images = normal(1, QUERIES, 24), normal(3, 9, WIDTH)
    (got,) = model(query, kv=model.project(images))
    close(got, theirs(query.expand(3, -1, -1), encoder_hidden_states=images).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_further_from_float64_than_transformers(dtype: torch.dtype) -> None:
    blip_2 = pytest.importorskip("transformers.models.blip_2")
    model = make(text=False)
    config = blip_2.Blip2QFormerConfig(**SIZES, encoder_hidden_size=WIDTH, layer_norm_eps=1e-12)
    theirs = blip_2.Blip2QFormerModel(config).to(dtype).eval()
    ours = make(text=False).to(dtype)
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    model.load_state_dict(ours.state_dict())  # rounded
    query, images = (normal(*shape).to(dtype) for shape in ((1, QUERIES, 24), (8, 9, WIDTH)))
    (got,), (exact,) = (
        m(q, kv=m.project(x)) for m, q, x in ((ours, query, images), (model, query.double(), images.double()))
    )
    eager = theirs(query.expand(8, -1, -1), encoder_hidden_states=images).last_hidden_state
    assert_no_worse(got, eager, exact)


# --- passes ---------------------------------------------------------------------------------------------------------


def test_one_packed_pass_is_three_passes() -> None:
    """Contrast of the image, contrast of the text and caption of BLIP-2, and their gradients."""
    model = make()
    query, images, (ids, kept) = normal(1, QUERIES, 24), normal(3, 9, WIDTH), texts(3)
    caption = ids.roll(1, 1)
    packed = model(query, [ids, caption], [kept, kept], CONTRAST_AND_CAPTION, model.project(images))
    (of_query,) = model(query, kv=model.project(images))
    (of_text,) = model(texts=[ids], kept=[kept])
    _, of_caption = model(query, [caption], [kept], CAPTION, model.project(images))
    weights = [normal(*t.shape) for t in packed]
    alone = [of_query, of_text, of_caption]
    gradients = []
    for outputs in (packed, alone):
        loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    for got, want in zip((*packed, *gradients[0]), (*alone, *gradients[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_caption_does_not_see_what_comes_and_the_queries_do_not_see_it() -> None:
    model = make()
    query, kv, (ids, _) = normal(1, QUERIES, 24), model.project(normal(2, 9, WIDTH)), texts(2)
    other = ids.clone()
    other[:, 4:] = 0
    (q, t), (q_other, t_other) = (model(query, [i], sees=CAPTION, kv=kv) for i in (ids, other))
    close(q, q_other)
    close(t[:, :4], t_other[:, :4])
    assert (t[:, 4:] != t_other[:, 4:]).any()


def test_rows_share_the_keys_and_values_of_an_image() -> None:
    model = make()
    query, images, (ids, kept) = normal(1, QUERIES, 24), normal(2, 9, WIDTH).requires_grad_(), texts(4)
    of = torch.tensor([1, 0, 1, 1])
    shared = model(query, [ids], [kept], kv=model.project(images).at(of))
    repeated = model(query, [ids], [kept], kv=model.project(images[of]))
    weights = [normal(*t.shape) for t in shared]
    gradients = []
    for outputs in (shared, repeated):
        loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, [images, *model.parameters()], materialize_grads=True))
    for got, want in zip((*shared, *gradients[0]), (*repeated, *gradients[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_rows_of_rows() -> None:
    kv = QFormerKV(normal(3, 5, 1, 2, 2, 4)).at(torch.tensor([2, 0, 1]))
    assert kv.at(torch.tensor([0, 0, 1])).index.tolist() == [2, 2, 0]
    with pytest.raises(ValueError, match=r"index has 3, expected 0 <= index < 3"):
        kv.at(torch.tensor([0, 3]))


def test_keys_and_values_look_at_what_they_are_given() -> None:
    model, query = make(), normal(1, QUERIES, 24)
    kv = model.project(normal(3, 9, WIDTH)).kv
    for lengths, message in ((torch.tensor([9, 10, 1]), "lengths has 10"), (torch.tensor([9]), "lengths has shape")):
        with pytest.raises(ValueError, match=message):
            QFormerKV(kv, lengths)
        with pytest.raises(ValueError, match=message):
            model.project(normal(3, 9, WIDTH), lengths, once=True)
    with pytest.raises(ValueError, match="index has -1, expected 0 <= index < 3, the number of images"):
        QFormerKV(kv, None, torch.tensor([0, -1]))
    with pytest.raises(TypeError, match=r"index has dtype torch.float32"):
        QFormerKV(kv, None, torch.ones(2))
    for wrong in (kv.half(), normal(3, 9, WIDTH).half()):
        with torch.no_grad(), pytest.raises(TypeError, match=r"kv has dtype torch.float16, expected torch.float"):
            model(query, kv=QFormerKV(wrong))
    with torch.no_grad(), pytest.raises(ValueError, match="kv has shape"):
        model(query, kv=QFormerKV(normal(3, 9, WIDTH + 1)))
    strided = torch.tensor([2, 0, 1, 0, 0, 0])[::2]
    close(model(query, kv=QFormerKV(kv, None, strided))[0], model(query, kv=QFormerKV(kv[[2, 1, 0]]))[0])


def test_hooks_of_every_kind_are_called() -> None:
    model, query, x, (ids, kept) = make(), normal(1, QUERIES, 24), normal(2, 9, WIDTH), texts(2)

    def run() -> Tensor:
        return sum(t.sum() for t in model(query, [ids], [kept], kv=model.project(x)))

    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    run()
    handle.remove()
    assert len(set(called)) > 30
    for module in set(called):
        seen: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append("pre")),
            module.register_forward_hook(lambda *_, seen=seen: seen.append("after")),
        ]
        # torch calls those of the backward for modules that return a tensor
        whole = module not in (model, model.encoder)
        if whole:
            handles.append(module.register_full_backward_hook(lambda *_, seen=seen: seen.append("back")))
        run().backward()
        assert set(seen) == ({"pre", "after", "back"} if whole else {"pre", "after"}), type(module).__name__
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("hidden", "attention"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_dropout_draws_for_each_row_also_before_it_sees_an_image(hidden: float, attention: float) -> None:
    model = make(num_hidden_layers=1, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention).train()
    seen = []
    model.encoder.layer[0].crossattention.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(normal(1, QUERIES, 24), kv=model.project(normal(3, 9, WIDTH)))
    assert len(seen[0]) == 3 and seen[0].unique(dim=0).shape[0] == 3 if hidden + attention else len(seen[0]) == 1


@pytest.mark.parametrize("path", ["embeddings.dropout", "encoder.layer.0.attention.output.dropout"])
def test_dropout_at_inference_draws_for_each_row_too(path: str) -> None:
    model = make(hidden_dropout_prob=0.5)
    model.get_submodule(path).train()
    (query,) = model(normal(1, QUERIES, 24), kv=model.project(normal(1, 5, WIDTH).expand(2, -1, -1)))
    assert (query[0] - query[1]).abs().max() > 0.1


def test_the_queries_alone_are_those_with_the_texts() -> None:
    model = make()
    query, kv, (ids, kept) = normal(1, QUERIES, 24), model.project(normal(2, 9, WIDTH)), texts(2)
    seen = []
    model.encoder.layer[-1].output.register_forward_hook(lambda *_: seen.append(True))
    (alone,) = model(query, [ids], [kept], kv=kv, query_only=True)
    assert not seen
    close(alone, model(query, [ids], [kept], kv=kv)[0])


def test_a_norm_that_is_a_part_of_the_product() -> None:
    """Its gradients and the Q-Former's, with none for the tokens."""
    model, norm = make(), torch.nn.LayerNorm(WIDTH).double()
    for p in norm.parameters():
        p.data.normal_()
    query, tokens = normal(1, QUERIES, 24), normal(2, 9, WIDTH)
    gradients = []
    for kv in (model.project(tokens, norm=norm), model.project(norm(tokens))):
        (found,) = model(query, kv=kv)
        loss = found[:, 0].sum() + found.square().sum()
        gradients.append(
            (found, *torch.autograd.grad(loss, [*norm.parameters(), *model.parameters()], materialize_grads=True))
        )
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4, 1])])
def test_one_pass_without_keys_and_values(lengths: Tensor | None) -> None:
    model, (ids, kept) = make(), texts(3)
    query, tokens = normal(1, QUERIES, 24), normal(3, 9, WIDTH)
    with torch.no_grad():
        kv, once = (model.project(tokens, lengths, once=once) for once in (False, True))
        assert kv.formed and not once.formed and once.kv is tokens
        for more in ({}, {"texts": [ids], "kept": [kept]}):
            for got, want in zip(model(query, **more, kv=once), model(query, **more, kv=kv), strict=True):
                close(got, want)
        with pytest.raises(ValueError, match="tokens for one pass, expected keys and values"):
            once.at(torch.tensor([0]))
        model.train()
        assert model.project(tokens, once=True).formed
    assert model.eval().project(tokens, once=True).formed


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("target", ["key", "value", "query", "word_embeddings", "position_embeddings"])
def test_adapters_are_called(target: str, once: bool) -> None:
    """What an adapter adds is what it adds to a weight."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "init_lora_weights": False, "target_modules": [target]}
    model = peft.get_peft_model(make(), peft.LoraConfig(**options)).double()
    bare: Any = model.base_model.model
    query, tokens, (ids, _) = normal(1, QUERIES, 24), normal(2, 9, WIDTH), texts(2)

    def states() -> Tensor:
        return torch.cat(bare(query, [ids], kv=bare.project(tokens, once=once)), 1)

    with torch.no_grad():
        apart = states()
        with model.disable_adapter():
            assert not torch.allclose(states(), apart)
        model.merge_adapter()
        close(states(), apart)
        model.unmerge_adapter()
    grads = torch.autograd.grad(states().sum(), [p for n, p in model.named_parameters() if "lora" in n])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("path", ["encoder.layer.0.crossattention.self.value", "embeddings.LayerNorm", "a norm before"])
def test_hooks_are_called(path: str) -> None:
    model, before = make(), torch.nn.LayerNorm(WIDTH).double()
    query, tokens, (ids, _) = normal(1, QUERIES, 24), normal(2, 9, WIDTH), texts(2)

    def states() -> Tensor:
        return torch.cat(model(query, [ids], kv=model.project(tokens, norm=before)), 1)

    want = states()
    hooked = before if path == "a norm before" else model.get_submodule(path)
    seen: list[Any] = []
    hooked.register_forward_hook(lambda *given: seen.append(given))
    close(states(), want)
    assert len(seen) == (2 if path == "embeddings.LayerNorm" else 1)


@pytest.mark.parametrize("path", ["attention.self.query", "crossattention.self.value", "output_query.LayerNorm"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_changed_parameters_are_read(path: str, name: str) -> None:
    model, query, tokens = make(), normal(1, QUERIES, 24), normal(2, 9, WIDTH)
    changed = model.encoder.layer[0].get_submodule(path)

    def states() -> Tensor:
        return model(query, kv=model.project(tokens, once=True))[0]

    with torch.no_grad():
        own = getattr(changed, name).normal_()
        before, _ = states(), own.mul_(2)
        want, _ = states(), own.div_(2)
        parametrize.register_parametrization(changed, name, _Twice())
        close(states(), want)
    assert not want.equal(before)


class _Twice(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_tokens_for_one_pass_drop_in_training() -> None:
    model, tokens = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), normal(2, 9, WIDTH)
    with torch.no_grad():
        once, kv, query = *(model.project(tokens, once=once) for once in (True, False)), normal(1, QUERIES, 24)
        results = []
        for images in (once, kv):
            torch.manual_seed(1)
            results += model.train()(query, kv=images)
    assert not once.formed
    close(*results)


def test_sharded_layer_by_layer() -> None:
    worlds.run(2, tool_worlds.qformer_layer_by_layer, timeout=60)


def test_padding_is_not_seen() -> None:
    model = make()
    query, kv, (ids, _) = normal(1, QUERIES, 24), model.project(normal(2, 9, WIDTH)), texts(2)
    kept = torch.tensor([2, 5])
    padded, short = model(query, [ids], [kept], kv=kv), model(query, [ids[:1, :2]], kv=kv.at(torch.tensor([0])))
    for got, want in zip(padded, short, strict=True):
        close(got[:1, : want.shape[1]], want)


def test_one_graph() -> None:
    model, query, images, (ids, kept) = make(), normal(1, QUERIES, 24), normal(2, 9, WIDTH), texts(3)

    def both(images: Tensor, ids: Tensor, kept: Tensor, of: Tensor) -> list[Tensor]:
        kv = model.project(images)
        return [*model(query, [ids], [kept], kv=kv.at(of)), *model(query, kv=kv)]

    inputs = images, ids, kept, torch.tensor([1, 0, 1])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), both(*inputs), strict=True):
        close(got, want)


def test_names_what_does_not_fit() -> None:
    model, bare = make(), make(text=False)
    query, (ids, _) = normal(2, QUERIES, 24), texts(3)
    kv = model.project(normal(2, 9, WIDTH))
    for call, message in (
        (lambda: model(), r"query is None and texts is empty"),
        (lambda: model(texts=[ids], query_only=True), r"query_only is True without query, expected queries"),
        (lambda: bare(texts=[ids]), r"texts has 1 texts, expected none: the config has text=False"),
        (lambda: model(query, [ids]), r"query has 2 rows, expected 3 as texts, or 1"),
        (lambda: model(query[:1], [ids], kv=kv), r"kv has 2 rows, expected 3 as texts"),
        (lambda: model(query[..., 1:]), r"query has shape \(2, 4, 23\), expected \[B, Q, 24\]"),
        (lambda: model.project(normal(2, 9, WIDTH + 1)), r"x has shape .* expected \[I, N, 20\]"),
        (lambda: model(texts=[ids.repeat(1, 3)]), r"expected \[B, T\] with T <= 12"),
        (lambda: make(num_attention_heads=5), r"hidden_size is 24, expected a multiple of num_attention_heads 5"),
        (lambda: make(cross_attention_freq=0), r"cross_attention_freq is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
