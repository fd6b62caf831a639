"""accelerate() on the Q-Formers of transformers, on the classes around them too, and on poolers of few queries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse, judge
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration import attention, qformers
from mmfuse.fused.acceleration.attention import absorbed, absorbs
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
    return random(cls(cls.config_class(**HF_QFORMER | {"num_hidden_layers": 3})))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    query = torch.randn(1, QUERIES, HF_QFORMER["hidden_size"], dtype=dtype)
    return query.expand(IMAGES, -1, -1), torch.randn(IMAGES, TOKENS, HF_QFORMER["encoder_hidden_size"], dtype=dtype)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries met an image without keys and values, call by call."""
    calls: list[int] = []

    def counted(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(len(q))
        return absorbed(q, *rest, **options)

    monkeypatch.setattr(qformers, "absorbed", counted)
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


# --- the operation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("images", [1, 5])
def test_is_attention_to_keys_and_values(
    images: int, masked: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 2 * 4 * 3 * 6)  # two images
    q = torch.randn(1 if shared else images, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(images, 7, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(20, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.randn(images, 1, 1, 7, dtype=torch.float64) if masked else None
    k, v = (torch.nn.functional.linear(x, w).unflatten(-1, (4, 5)).transpose(1, 2) for w in weights)
    heads = q.expand(images, -1, -1, -1).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(heads, k, v, attn_mask=mask).transpose(1, 2)
    got = absorbed(q, x, *weights, mask)
    torch.testing.assert_close(got, want)
    of = (q, x, *weights)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), of), torch.autograd.grad(want.square().sum(), of)
    )


@pytest.mark.parametrize(("n", "d", "e", "most"), [(257, 64, 1408, 53), (15, 64, 1024, 12), (729, 72, 1152, 69)])
def test_how_many_queries_it_takes_fewer_products_for(n: int, d: int, e: int, most: int) -> None:
    def products(q: int) -> tuple[int, int]:
        return 2 * q * d * e + 2 * q * n * e, 2 * n * d * e + 2 * q * n * d

    assert absorbs(most, n, d, e) and products(most)[0] < products(most)[1]
    assert not absorbs(most + 1, n, d, e) and products(most + 1)[0] >= products(most + 1)[1]


# --- BLIP-2's Q-Former ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
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
    "many queries": lambda m: m(_given(m)[0].repeat(1, 9, 1), None, None, _given(m)[3])[0],
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16()(*(t if t is None else t.bfloat16() for t in _given(m)))[0],
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


def test_chunks_of_the_feed_forward_are_left() -> None:
    (why,) = (e.why for e in mmfuse.accelerate(blip2(chunk_size_feed_forward=2)).left)
    assert "in chunks" in why


def test_one_product_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other devices."""
    model, twin = pair(blip2().double())
    query, x = inputs()
    monkeypatch.setattr(qformers, "_form", lambda *_: "one product")
    assert_same(model, twin, lambda m: m(query, encoder_hidden_states=x).last_hidden_state)


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
        model, twin = pair(blip2())
        query, x = inputs(torch.float32)
        results = []
        for m, dtype in ((twin, torch.float32), (model, torch.float32), (copy.deepcopy(model).double(), torch.float64)):
            output = m(query.to(dtype), encoder_hidden_states=x.to(dtype))[0]
            # a key's bias has none but of rounding
            grads = {n: g for n, g in gradients(m, output).items() if not n.endswith("key.bias")}
            results.append({"output": output.detach()} | grads)
        return tuple(results)

    judge([draw() for _ in range(4)])
    assert len(fused) == 8


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
