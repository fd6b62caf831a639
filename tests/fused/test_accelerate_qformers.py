"""accelerate() on the Q-Formers of transformers, on the classes around them too, and on poolers of few queries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse, judge
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration import qformers
from mmfuse.kernels.qformer.op import token_attention
from rule_samples import aria_projector, kosmos2_connector
from tiny import HF_QFORMER, HF_VISION

allow_torchvision()
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel  # noqa: E402
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel  # noqa: E402
from transformers.models.instructblipvideo.modeling_instructblipvideo import InstructBlipVideoQFormerModel  # noqa: E402

INSTRUCT = {"instructblip": InstructBlipQFormerModel, "instructblipvideo": InstructBlipVideoQFormerModel}
IMAGES, TOKENS, QUERIES = 3, 11, 3
OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
}


def random(model: nn.Module) -> Any:
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def blip2(text: bool = False, **options: Any) -> Any:
    config = transformers.Blip2QFormerConfig(**HF_QFORMER | {"num_hidden_layers": 3} | options)
    config.use_qformer_text_input = text
    return random(Blip2QFormerModel(config))


def instruct(kind: str = "instructblip") -> Any:
    cls = INSTRUCT[kind]
    config = getattr(transformers, cls.__name__.replace("Model", "Config"))
    return random(cls(config(**HF_QFORMER | {"num_hidden_layers": 3})))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    query = torch.randn(1, QUERIES, HF_QFORMER["hidden_size"], dtype=dtype)
    return query.expand(IMAGES, -1, -1), torch.randn(IMAGES, TOKENS, HF_QFORMER["encoder_hidden_size"], dtype=dtype)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples' queries met an image, call by call; without keys and values, however small it is."""
    calls: list[int] = []

    def counted(q: Tensor, *rest: Any) -> Any:
        calls.append(len(q))
        return token_attention(q, *rest, backend="chunked")

    monkeypatch.setattr(qformers, "token_attention", counted)
    return calls


def pair(model: nn.Module) -> tuple[Any, Any]:
    twin = copy.deepcopy(model)
    mmfuse.accelerate(twin, strict=True)
    return model, twin


def gradients(model: nn.Module, output: Tensor, *given: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {str(i): t for i, t in enumerate(given)}
    grads = torch.autograd.grad((output * weight).sum(), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def assert_same(model: Any, twin: Any, run: Callable[[Any], Tensor], *given: Tensor) -> None:
    want, got = run(model), run(twin)
    torch.testing.assert_close(got, want)
    grads, expected = gradients(twin, got, *given), gradients(model, want, *given)
    assert list(grads) == list(expected)
    torch.testing.assert_close(grads, expected)


# --- BLIP-2's Q-Former ------------------------------------------------------------------------------------------------


# releases before 5.10 have no other attention
@pytest.mark.parametrize("implementation", ["eager", *["sdpa"] * Blip2QFormerModel._supports_sdpa])
@pytest.mark.parametrize("image_mask", [None, torch.ones(IMAGES, TOKENS)])
def test_blip2(image_mask: Tensor | None, implementation: str, fused: list[int]) -> None:
    model, twin = pair(blip2(attn_implementation=implementation).double())
    query, x = inputs()
    query, x = query[:1].requires_grad_(), x.requires_grad_()
    call = {"encoder_hidden_states": x, "encoder_attention_mask": image_mask}
    assert_same(model, twin, lambda m: m(query.expand(IMAGES, -1, -1), **call).last_hidden_state, query, x)
    assert fused == [1, IMAGES]  # the first layer's queries are those of one image
    output = twin(query, **call)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0])
    assert type(output) is type(model(query, **call)) and len(twin(query, **call, return_dict=False)) == 2


def test_blip2_with_texts(fused: list[int]) -> None:
    model, twin = pair(blip2(text=True).double())
    query, x = inputs()
    h = torch.cat([query, torch.randn(IMAGES, 4, query.shape[2], dtype=torch.float64)], 1).requires_grad_()
    mask = torch.ones(IMAGES, QUERIES + 4).long()
    mask[0, -2:] = 0
    call = {"query_length": QUERIES, "attention_mask": mask, "encoder_hidden_states": x}
    assert_same(model, twin, lambda m: m(h, **call).last_hidden_state, h)
    assert fused == [IMAGES, IMAGES]
    texts = {"query_length": 0, "attention_mask": mask[:, QUERIES:]}
    assert torch.equal(twin(h[:, QUERIES:], **texts)[0], model(h[:, QUERIES:], **texts)[0])


@pytest.mark.parametrize("kind", INSTRUCT)
def test_instructblip(kind: str, fused: list[int]) -> None:
    model, twin = pair(instruct(kind).double())
    query, x = inputs()
    mask = torch.ones(IMAGES, QUERIES + 4).long()
    mask[1, -3:] = 0
    call = {"input_ids": torch.randint(0, 40, (IMAGES, 4)), "attention_mask": mask, "query_embeds": query}
    call |= {"encoder_hidden_states": x, "encoder_attention_mask": torch.ones(IMAGES, TOKENS)}
    assert_same(model, twin, lambda m: m(**call).last_hidden_state)
    assert fused == [IMAGES, IMAGES]


ASIDE: dict[str, Callable[[Any], Any]] = {
    "masked image tokens": lambda m: m(*_given(m), encoder_attention_mask=torch.ones(IMAGES, TOKENS).tril(5))[0],
    "attentions": lambda m: m(*_given(m), output_attentions=True).cross_attentions[0],
    "hidden states": lambda m: m(*_given(m), output_hidden_states=True).hidden_states[1],
    "training": lambda m: _trained(m, False),
    "gradient checkpointing": lambda m: _trained(m, True),
}


def _given(model: Any) -> tuple[Tensor, None, None, Tensor]:
    torch.manual_seed(0)
    query, x = inputs(next(model.parameters()).dtype)
    return query, None, None, x


def _trained(model: Any, checkpointing: bool) -> Tensor:
    """Dropout draws as it would without accelerate()."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(*_given(model))[0]
    output.sum().backward()
    assert all(p.grad is not None for p in model.encoder.layer[0].crossattention.attention.parameters())
    return output


@pytest.mark.parametrize("case", ASIDE)
@pytest.mark.filterwarnings("ignore:Blip2QFormerEncoder.forward is not fused")
def test_the_class_itself_runs_with(case: str, fused: list[int]) -> None:
    model, twin = pair(blip2(attn_implementation="eager", attention_probs_dropout_prob=0.3))
    torch.testing.assert_close(ASIDE[case](twin), ASIDE[case](model))
    assert not fused


def test_hidden_states_leave_hooks_that_are_named(fused: list[int]) -> None:
    """transformers keeps the hooks that record them: from then on its own code runs."""
    model, twin = pair(blip2())
    with pytest.warns(UserWarning, match="layer.0 has hooks"):
        ASIDE["hidden states"](twin)
    got = twin(*_given(twin))[0]
    torch.testing.assert_close(got, model(*_given(model))[0])
    assert not fused


def test_a_hook_sees_the_queries_of_every_image() -> None:
    model, twin = pair(blip2())
    for path in ("layernorm", "encoder.layer.0.attention.attention.query"):
        seen: list[int] = []
        for of in (model, twin):
            handle = of.get_submodule(path).register_forward_hook(lambda *given, s=seen: s.append(len(given[2])))
            with pytest.warns(UserWarning, match=f"{path} has hooks") if of is twin else nullcontext():
                of(*_given(of))
            handle.remove()
        assert seen == [IMAGES, IMAGES]


def test_chunks_of_the_feed_forward_are_left() -> None:
    (why,) = (e.why for e in mmfuse.accelerate(blip2(chunk_size_feed_forward=2)).left)
    assert "in chunks" in why


def test_one_product_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other devices."""
    model, twin = pair(blip2().double())
    query, x = inputs()
    cross, kv = qformers._cross, iter(qformers._keys_and_values(twin.encoder.layer, x))
    monkeypatch.setattr(qformers, "_cross", lambda block, query, x, _: cross(block, query, x, next(kv)))
    assert_same(model, twin, lambda m: m(query, encoder_hidden_states=x).last_hidden_state)


@pytest.mark.parametrize(
    ("queries", "tokens", "sizes", "faster", "trains"),
    [
        (32, 257, (12, 768, 1408), True, False),
        (3, 15, (16, 1024, 1024), True, True),
        (80, 257, (12, 768, 1408), False, False),
    ],
)
def test_steps_aside(queries: int, tokens: int, sizes: tuple[int, int, int], faster: bool, trains: bool) -> None:
    """But where it takes fewer products without keys and values, in float32: with a gradient for fewer queries."""
    heads, width, key_width = sizes
    names = ("num_attention_heads", "hidden_size", "encoder_hidden_size")
    config = dict(zip(names, sizes, strict=True)) | {"num_hidden_layers": 1, "intermediate_size": 1}
    encoder = Blip2QFormerModel(transformers.Blip2QFormerConfig(**config)).encoder
    h, x = torch.zeros(1).expand(2, queries, width), torch.zeros(1).expand(2, tokens, key_width)
    call = {"encoder_hidden_states": x, "query_length": queries}
    with torch.no_grad():
        assert qformers.steps_aside(encoder, h, **call) is not faster
        with torch.autocast("cpu", torch.bfloat16):
            assert qformers.steps_aside(encoder, h, **call)
    assert qformers.steps_aside(encoder, h, **call) is not trains


# --- what runs a Q-Former ---------------------------------------------------------------------------------------------


def blip2_generation() -> Any:
    vision = transformers.Blip2VisionConfig(**HF_VISION)
    qformer = transformers.Blip2QFormerConfig(**HF_QFORMER)
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=transformers.OPTConfig(**OPT)
    )
    config.num_query_tokens, config.image_token_index = QUERIES, 39
    return random(transformers.Blip2ForConditionalGeneration(config))


def prompt(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[39] * QUERIES + [2, 7, 9]] * 2)
    pixels = torch.randn(2, 3, 16, 16).to(next(model.parameters()).dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_blip2_generates(fused: list[int]) -> None:
    model = blip2_generation()
    twin = copy.deepcopy(model)
    report = mmfuse.accelerate(twin)
    assert {"Blip2QFormerModel", "Blip2QFormerEncoder"} <= {e.cls for e in report.replaced} and not report.left
    call = prompt(model)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(twin.generate(**call, **options), model.generate(**call, **options)) and fused
    torch.testing.assert_close(twin(**call).logits, model(**call).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_blip2_in_float16_keeps_its_qformer_in_float32(large: bool, fused: list[int], tmp_path: Path) -> None:
    """As transformers loads it: accelerate() computes with the weights as they are, near the end of float16 too."""
    blip2_generation().save_pretrained(tmp_path)
    load = transformers.Blip2ForConditionalGeneration.from_pretrained
    model = load(tmp_path, dtype=torch.float16).eval()
    assert model.qformer.encoder.layer[0].crossattention.attention.key.weight.dtype == torch.float32
    assert model.vision_model.post_layernorm.weight.dtype == torch.float16
    query = model.query_tokens.detach().expand(2, -1, -1)
    x = torch.randn(2, TOKENS, HF_QFORMER["encoder_hidden_size"]).half()
    if large:
        x[0, 3] = 65504.0
    want = copy.deepcopy(model.qformer).double()(query.double(), encoder_hidden_states=x.double())[0]
    eager = model.qformer(query, encoder_hidden_states=x)[0]
    mmfuse.accelerate(model)
    got = model.qformer(query, encoder_hidden_states=x)[0]
    assert got.dtype == torch.float32 and fused
    assert_no_worse(got, eager, want)


def test_is_no_further_from_float64(fused: list[int]) -> None:
    def draw() -> tuple[dict[str, Tensor], ...]:
        model = blip2()
        for m in model.modules():  # by small ones rounding grows a thousandfold, and either error is luck
            if isinstance(m, nn.LayerNorm):
                nn.init.ones_(m.weight)
        model, twin = pair(model)
        query, x = inputs(torch.float32)
        results = []
        for m, dtype in ((twin, torch.float32), (model, torch.float32), (copy.deepcopy(model).double(), torch.float64)):
            output = m(query.to(dtype), encoder_hidden_states=x.to(dtype))[0]
            results.append((output.detach(), gradients(m, output)))
        return in_units(results)

    judge([draw() for _ in range(18)])  # of few, the largest error of either is luck
    assert len(fused) == 36


def in_units(results: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[dict[str, Tensor], ...]:
    """Outputs, and the gradients of all parameters in units of each; a key's bias has none but of rounding."""
    sizes = {n: g.abs().mean().float() for n, g in results[2][1].items() if not n.endswith("key.bias")}
    return tuple(
        {"output": output, "gradients": torch.cat([(g[n] / size).flatten() for n, size in sizes.items()])}
        for output, g in results
    )


def granite_speech(package: str) -> Any:
    module = __import__(f"transformers.models.{package}", fromlist=["*"])
    prefix = "GraniteSpeechPlus" if package.endswith("plus") else "GraniteSpeech"
    config = getattr(module, f"{prefix}Config")(projector_config=dict(HF_QFORMER, model_type="blip_2_qformer"))
    config.text_config.hidden_size = 20
    modeling = __import__(f"transformers.models.{package}.modeling_{package}", fromlist=["*"])
    return random(getattr(modeling, f"{prefix}EncoderProjector")(config))


@pytest.mark.parametrize("package", ["granite_speech", "granite_speech_plus"])
def test_granite_speech(package: str, fused: list[int]) -> None:
    """Windows of 15 frames, a rest among them, and three queries, of batch 1."""
    model, twin = pair(granite_speech(package).double())
    x = torch.randn(2, 40, HF_QFORMER["encoder_hidden_size"], dtype=torch.float64, requires_grad=True)
    assert_same(model, twin, lambda m: m(x), x)
    assert fused == [1]


def test_granite4_vision(fused: list[int]) -> None:
    """Queries of each window's own."""
    from transformers.models.granite4_vision import modeling_granite4_vision as library

    config = transformers.Granite4VisionConfig(
        vision_config=transformers.SiglipVisionConfig(**HF_VISION | {"image_size": 64, "hidden_size": 128}),
        qformer_config=dict(HF_QFORMER, hidden_size=128, encoder_hidden_size=128, model_type="blip_2_qformer"),
        downsample_rate="2/4",
    )
    config.text_config.hidden_size = 20
    model, twin = pair(random(library.Granite4VisionWindowQFormerDownsampler(config)).double())
    x = torch.randn(2, 64, 128, dtype=torch.float64, requires_grad=True)
    assert_same(model, twin, lambda m: m(x), x)
    assert fused == [8]


def blip_text() -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 40}
    config = transformers.BlipTextConfig(hidden_size=16, encoder_hidden_size=12, is_decoder=True, **sizes)
    return random(transformers.BlipTextModel(config))


def test_blip_text(fused: list[int]) -> None:
    model, twin = pair(blip_text().double())
    mask = torch.ones(IMAGES, 4).long()
    mask[1, 2:] = 0
    x = torch.randn(IMAGES, TOKENS, 12, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 40, (IMAGES, 4))
    call = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": x}
    call |= {"encoder_attention_mask": torch.ones(IMAGES, TOKENS).long()}
    for options in ({"is_decoder": False}, {"is_decoder": True, "use_cache": False}):
        assert_same(model, twin, lambda m, o=options: m(**call, **o).last_hidden_state, x)
    assert fused == [IMAGES] * 4
    cached = {"is_decoder": True, "use_cache": True}
    torch.testing.assert_close(twin(**call, **cached)[0], model(**call, **cached)[0])
    call["encoder_attention_mask"] = torch.ones(IMAGES, TOKENS).long().tril(5)
    torch.testing.assert_close(twin(**call)[0], model(**call)[0])
    assert len(fused) == 4
    h = torch.randn(IMAGES, 4, 16, dtype=torch.float64)
    assert twin.encoder(h, encoder_hidden_states=x, past_key_values=None)[0].shape == h.shape and len(fused) == 6


# --- poolers ----------------------------------------------------------------------------------------------------------


def siglip_head(kind: str) -> Any:
    module = __import__(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}", fromlist=["*"])
    config = getattr(transformers, f"{kind}VisionConfig")(**HF_VISION_HEAD)
    config._attn_implementation = "sdpa"
    return random(getattr(module, f"{kind}MultiheadAttentionPoolingHead")(config))


HF_VISION_HEAD = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip_heads(kind: str) -> None:
    model, twin = pair(siglip_head(kind).double())
    x = torch.randn(IMAGES, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    assert_same(model, twin, lambda m: m(x), x)


@pytest.mark.parametrize("of", ["sdpa", "eager"])
def test_masks_of_siglip2(of: str) -> None:
    """What is masked anywhere, an image without tokens among them, of which the library takes the mean."""
    model, twin = pair(siglip_head("Siglip2").double())
    model.config._attn_implementation = twin.config._attn_implementation = of
    x = torch.randn(4, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, TOKENS).long()
    mask[0, 5:], mask[1, ::2], mask[2] = 0, 0, 0
    assert_same(model, twin, lambda m: m(x, attention_mask=mask), x)
    torch.testing.assert_close(twin(x, mask)[3], twin(x[3:])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip_heads_are_no_further_from_float64(kind: str, dtype: torch.dtype) -> None:
    def draw() -> tuple[dict[str, Tensor], ...]:
        model, twin = pair(siglip_head(kind).to(dtype))
        x = torch.randn(IMAGES, TOKENS, 16).to(dtype)
        results = []
        for m in (twin, model, copy.deepcopy(model).double()):
            output = m(x.to(m.probe.dtype))
            grads = gradients(m, output)
            results.append({"output": output.detach()} | grads)
        return tuple(results)

    judge([draw() for _ in range(6)])


@pytest.mark.parametrize(("queries", "context"), [(1, 12), (3, 16), (40, 12)])
def test_open_clip_pooler(queries: int, context: int) -> None:
    model, twin = pair(random(open_clip.transformer.AttentionalPooler(16, context, 2, queries)).double())
    x = torch.randn(IMAGES, TOKENS, context, dtype=torch.float64, requires_grad=True)
    assert_same(model, twin, lambda m: m(x), x)


@pytest.mark.parametrize("mask", [None, "tokens", "scores"])
@pytest.mark.parametrize("images", [1, 3])
def test_aria(images: int, mask: str | None) -> None:
    """With few tokens, and with so many that the weights of keys and values are multiplied first."""
    model, twin = pair(random(aria_projector()).double())
    x = torch.randn(images, 9, 16, dtype=torch.float64, requires_grad=True)
    hidden = torch.arange(9).expand(images, 9) > 5
    given = {None: None, "tokens": hidden, "scores": hidden * torch.tensor(-1.5).double()}[mask]
    assert_same(model, twin, lambda m: m(x, given), x)
    with pytest.raises(KeyError, match="patch_to_query_dict"):
        twin(x[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aria_is_no_further_from_float64(dtype: torch.dtype) -> None:
    def draw() -> tuple[dict[str, Tensor], ...]:
        model, twin = pair(random(aria_projector()).to(dtype))
        x = torch.randn(3, 9, 16).to(dtype)
        results = []
        for m in (twin, model, copy.deepcopy(model).double()):
            output = m(x.to(m.query.dtype))
            results.append((output.detach(), gradients(m, output)))
        return in_units(results)

    judge([draw() for _ in range(6)])


def test_kosmos2() -> None:
    model, twin = pair(random(kosmos2_connector()).double())
    x = torch.randn(IMAGES, TOKENS, 12, dtype=torch.float64, requires_grad=True)
    assert_same(model, twin, lambda m: m(x)[0], x)
    assert_same(model, twin, lambda m: m(x[:1])[0], x)
    assert twin(x)[1] is None
    with_map, twin = pair(random(kosmos2_connector("eager")).double())
    torch.testing.assert_close(twin(x), with_map(x))
    assert twin(x)[1].shape == (IMAGES, 2, 3, TOKENS + 3)


def test_kosmos2_drops_as_it_did() -> None:
    model, twin = pair(random(kosmos2_connector()).train())
    results = []
    for m in (model, twin):
        torch.manual_seed(3)
        results.append(m(torch.ones(IMAGES, TOKENS, 12))[0])
    torch.testing.assert_close(results[1], results[0])


def test_poolers_that_are_left() -> None:
    pooler = open_clip.transformer.AttentionalPooler(16, 16, 2, 3)
    pooler.attn = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
    (entry,) = mmfuse.accelerate(pooler).left
    assert entry.why == "its attn adds a key"
    pooler.attn = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
    (entry,) = mmfuse.accelerate(pooler).left
    assert "dropout" in entry.why
    connector = kosmos2_connector()
    connector.x_attn.inner_attn_ln = nn.LayerNorm(16)
    (entry,) = mmfuse.accelerate(connector).left
    assert entry.why == "its attention has a LayerNorm inside"
