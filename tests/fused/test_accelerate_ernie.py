"""accelerate() on ERNIE 4.5 VL's mixture of experts, in the real model at random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmfuse
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration import ernie
from mmfuse.fused.acceleration.rules import RULES
from mmfuse.kernels import Routing

allow_torchvision()
modeling = pytest.importorskip("transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe")
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeConfig  # noqa: E402

TEXT = {
    **{"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64},
    **{"num_key_value_heads": 1, "moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4},
    **{"moe_num_shared_experts": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]},
}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
START, END, IMAGE = 57, 58, 59
IDS = torch.tensor([[5, 6, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8]])


def model(**options: Any) -> nn.Module:
    tokens = {"image_start_token_id": START, "image_end_token_id": END, "image_token_id": IMAGE}
    tokens |= {"video_start_token_id": 60, "video_end_token_id": 61, "video_token_id": 62}
    config = Ernie4_5_VLMoeConfig(text_config=TEXT | options, vision_config=VISION, **tokens)
    torch.manual_seed(0)
    made = modeling.Ernie4_5_VLMoeForConditionalGeneration(config)
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made.eval()


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """transformers', and the accelerated one."""
    eager, fused = model(**options), model(**options)
    assert len(mmfuse.accelerate(fused, strict=True).replaced) == 2
    return eager, fused


def call(ids: Tensor = IDS) -> dict[str, Any]:
    torch.manual_seed(1)
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    given["moe_mm_token_type_ids"] = ((ids >= START) & (ids <= IMAGE)).int()
    if (ids == IMAGE).any():
        images = int((ids == IMAGE).sum()) // 4
        given |= {"pixel_values": torch.randn(16 * images, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * images)}
    return given


@contextmanager
def no_own_code() -> Iterator[None]:
    """Within it the blocks' own forward fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers' own block runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling.Ernie4_5_VLMoeMoeBlock, "forward", fail)
        yield


@pytest.mark.parametrize("options", [{}, {"moe_num_shared_experts": 0}])
def test_parity(options: dict[str, int]) -> None:
    """The banks get the same rows: outputs, router logits and gradients are equal to the last digit."""
    eager, fused = pair(**options)
    ids = torch.cat([IDS, IDS.roll(1, 1)])
    found = []
    for of in (eager, fused):
        out = of(**call(ids), labels=ids, output_router_logits=True)
        (out.loss + out.aux_loss).backward()
        grads = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
        found.append({"logits": out.logits.detach(), **dict(zip("ab", out.router_logits, strict=False)), **grads})
    with no_own_code():
        fused(**call(ids))
    assert list(found[0]) == list(found[1])
    assert sum("vision_moe" in name for name in found[0]) == sum("text_moe" in name for name in found[0]) > 0
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("types", [torch.zeros, torch.ones, None])
def test_one_modality(types: Any) -> None:
    """A bank without rows has the gradient that it has in transformers, or none."""
    eager, fused = pair()
    found = []
    for of in (eager, fused):
        block, x = of.model.language_model.layers[1].mlp, torch.linspace(-1, 1, 224).sin().view(1, 7, 32)
        y, logits = block(x, None if types is None else types(1, 7, dtype=torch.int))
        y.square().sum().backward()
        grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "logits": logits.detach(), **grads})
    assert list(found[0]) == list(found[1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_generation() -> None:
    eager, fused = pair()
    said = [of.generate(**call(), max_new_tokens=6, do_sample=False, eos_token_id=None) for of in (eager, fused)]
    assert torch.equal(*said) and said[0].shape[1] == 16


def test_rows_are_sorted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the token types are the same ones, with the same values."""
    _, fused = pair()
    calls, sort = [], Routing.from_ids
    monkeypatch.setattr(Routing, "from_ids", lambda *args: (calls.append(args), sort(*args))[1])
    types = call()["moe_mm_token_type_ids"]
    run = lambda: fused.model.language_model(inputs_embeds=torch.ones(1, 10, 32), moe_mm_token_type_ids=types)  # noqa: E731
    run(), run()
    assert len(calls) == 1
    types[0, 0] = 2
    run()
    assert len(calls) == 2 and ernie._routing(types)[1] == 3
    types.data[0, 1] = 2  # which is no other version
    assert ernie._routing(types)[1] == 2


def test_recomputed_after_another_batch() -> None:
    eager, fused = pair()
    found = []
    for of in (eager, fused):
        block = of.model.language_model.layers[1].mlp
        x = torch.linspace(-1, 1, 320).sin().view(1, 10, 32).requires_grad_()
        types = [(IDS == IMAGE).int(), (IDS > 6).int()]
        ys = [checkpoint(lambda x, t, b=block: b(x, t)[0], x, t, use_reentrant=False) for t in types]
        sum(y.square().sum() * (i + 1) for i, y in enumerate(ys)).backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_every_rule_is_tested_here() -> None:
    assert [r.target.split(":")[1] for r in RULES if "ernie" in r.target] == ["Ernie4_5_VLMoeMoeBlock"]
