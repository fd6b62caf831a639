"""accelerate() on open_clip's CoCa: the same captions from cached keys and values, and its loss."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused import accelerate, captioning

allow_torchvision()
open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
from open_clip_coca import GENERATE, SAY, batch, config, let_generate, official  # noqa: E402

CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
CONFIGS = {
    "attentional pool": config(),
    "class token": config({"attentional_pool": False, "width": 24, "head_width": 8}, quick_gelu=True),
    "custom blocks": config(None, CUSTOM | {"ls_init_value": 0.3}),
}


@pytest.fixture(autouse=True)
def _generates(monkeypatch: pytest.MonkeyPatch) -> None:
    let_generate(monkeypatch)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The token ids that the cached decoder is given, filled as it runs."""
    seen: list[Tensor] = []
    run = captioning.CaptionDecoder.__call__
    monkeypatch.setattr(captioning.CaptionDecoder, "__call__", lambda self, ids: seen.append(ids) or run(self, ids))
    return seen


@pytest.mark.parametrize("how", GENERATE)
def test_captions_are_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = official(config()), SAY | GENERATE[how]
    image, _ = batch(config(), 1 if how == "one prompt" else 3)
    torch.manual_seed(1)  # of the draws
    want = model.generate(image, **options)
    seen = calls(monkeypatch)
    with accelerate(model, strict=True) as report:
        replaced = [(e.path, e.cls, e.op) for e in report.replaced]
        assert replaced == [
            ("", "CoCa", "coca_generate"),
            ("visual", "VisionTransformer", "patch_embed"),
            ("visual.attn_pool", "AttentionalPooler", "few_query_attention"),
        ]
        torch.manual_seed(1)
        assert torch.equal(model.generate(image, **options), want)
        # a token at a time, but for a prompt and a window that slides
        assert how == "sliding window" or {ids.shape[1] for ids in seen[1:]} <= {1}
    steps = len(seen)
    assert steps
    torch.manual_seed(1)
    assert torch.equal(model.generate(image, **options), want) and len(seen) == steps


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parity_of_the_logits(name: str, dtype: torch.dtype, device: str) -> None:
    """Of every step, each with the same ids: against float64, cached and in open_clip's own forward."""
    model = official(CONFIGS[name]).to(device, dtype)
    exact = copy.deepcopy(model).double()
    image, text = (t.to(device) for t in batch(CONFIGS[name], 16))
    image, results = image.to(dtype), []
    with torch.no_grad():
        # the same image tokens for all three: those are no part of it
        tokens = model(image)["image_embs"]
        cached = captioning.CaptionDecoder(model, tokens)
        for step in range(text.shape[1]):
            ids, given = text[:, : step + 1], {"image_latent": tokens, "output_labels": False}
            eager, truth = (m(None, ids, image_embs=t, **given) for m, t in ((model, tokens), (exact, tokens.double())))
            results.append([cached(ids[:, -1:]), eager["logits"][:, -1], truth["logits"][:, -1]])
    got, eager, truth = (torch.stack(t) for t in zip(*results, strict=True))
    if dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)
    else:
        assert_no_worse(got, eager, truth)


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("its text tower has no causal mask", lambda: official(config(None, {"no_causal_mask": True}))),
        ("its text tower has no class token", lambda: official(config(None, {"embed_cls": False}))),
        ("Mine overrides generate", lambda: mine(generate=lambda self, *a, **k: None)),
        ("Mine overrides forward", lambda: mine(forward=lambda self, *a, **k: None)),
        (
            r"its text is Linear \(torch.*\), expected TextTransformer \(open_clip",
            lambda: changed("text", nn.Linear(2, 2)),
        ),
        (
            r"its text_decoder.cross_attn.1.attn is Linear \(.*\), expected Multihead",
            lambda: changed("text_decoder.cross_attn.1.attn", nn.Linear(2, 2)),
        ),
        ("its text.transformer.resblocks.1.mlp has hooks", lambda: hooked("text.transformer.resblocks.1.mlp")),
    ],
)
def test_what_is_left_says_why(why: str, make: Any) -> None:
    model = make()
    before = dict(vars(model))
    (entry,) = accelerate(model).left
    assert re.search(why, entry.why) and vars(model) == before
    with pytest.raises(mmfuse.UnsupportedError, match=why):
        accelerate(model, strict=True)


def mine(**methods: Any) -> nn.Module:
    model = official(config())
    model.__class__ = type("Mine", (type(model),), methods)
    return model


def changed(path: str, module: nn.Module) -> nn.Module:
    model = official(config())
    model.set_submodule(path, module)
    return model


def hooked(path: str) -> nn.Module:
    model = official(config())
    model.get_submodule(path).register_forward_hook(lambda *args: None)
    return model


def test_what_open_clips_own_code_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = official(config())
    image, _ = batch(config(), 2)
    greedy = SAY | {"generation_type": "top_k"}
    want = model.generate(image, **greedy)
    seen = calls(monkeypatch)
    accelerate(model)
    stop = [open_clip.coca_model.MaxLengthCriteria(max_length=SAY["seq_len"])]
    assert torch.equal(model.generate(image, **greedy, stopping_criteria=stop), want)
    assert torch.equal(model.generate(image, **greedy | {"eos_token_id": [SAY["eos_token_id"]]}), want)
    model.train()
    assert torch.equal(model.generate(image, **greedy), want)
    assert model.training and not seen
    assert torch.equal(model.eval().generate(image, **greedy), want) and seen


def test_an_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = official(config())
    image, _ = batch(config(), 2)
    shapes: list[Any] = []
    model.visual.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    model.generate(image, **SAY)
    accelerate(model, strict=True)
    model.generate(image, **SAY)
    assert shapes == [(12, 3, 20, 20), (2, 3, 20, 20)]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_accelerated(twin_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = official(config())
    accelerate(model)
    twin = twin_of(model)
    with torch.no_grad():
        twin.text_decoder.text_projection[:, 7] += 10
    seen = calls(monkeypatch)
    captions = twin.generate(batch(config(), 2)[0], **SAY)
    assert seen and (captions[:, 1:] == 7).all()


def test_undo_leaves_no_trace() -> None:
    model = official(config())
    before = [(path, type(m), dict(vars(m))) for path, m in model.named_modules()]
    accelerate(model).undo()
    assert [(path, type(m), dict(vars(m))) for path, m in model.named_modules()] == before
    report = accelerate(model, ops={"coca_generate"})
    fused = model.generate
    model.generate = lambda *args: fused(*args)
    with pytest.raises(RuntimeError, match=r"CoCa\.generate was replaced after accelerate\(\)"):
        report.undo()


class Task(nn.Module):
    """As open_clip's training: the model and its CoCaLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss = official(config()), open_clip.loss.CoCaLoss(2.0, 1.0)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        out = self.model(image, text)
        return sum(self.loss(**out, output_dict=True).values())


def test_training_is_the_same() -> None:
    task = Task().double()
    image, text = batch(config(), 12)
    results = []
    for run in (lambda: task, lambda: accelerate(task, strict=True) and task):
        task.zero_grad()
        loss = run()(image.double(), text)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in task.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    already = [(e.path, e.op) for e in accelerate(task).already]
    assert already == [
        ("model", "coca_generate"),
        ("model.visual", "patch_embed"),
        ("model.visual.attn_pool", "few_query_attention"),
        ("loss", "clip_loss"),
    ]
