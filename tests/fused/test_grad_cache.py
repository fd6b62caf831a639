"""GradCache against the same micro-batches in one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import ClipLoss, GradCache, SigLipLoss


class Towers(nn.Module):
    def __init__(self, bias: bool = False, named: bool = False) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 5)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor([-3.0])) if bias else None
        self.named = named

    def forward(self, image: Tensor, text: Tensor) -> Any:
        out = {"image_features": self.image(image), "text_features": self.text(text)}
        out = {name: F.normalize(t, dim=-1) for name, t in out.items()} | {"logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias.clone()
        return out if self.named else tuple(out.values())


def together(model: nn.Module, loss: nn.Module, batches: list[Any]) -> Tensor:
    """The definition: every micro-batch's graph at once."""
    outputs = [model(**b) if isinstance(b, dict) else model(*b) for b in batches]
    outputs = [tuple(o.values()) if isinstance(o, dict) else o for o in outputs]
    x, y = (torch.cat([o[i] for o in outputs]) for i in range(2))
    value = loss(x, y, *outputs[0][2:])
    value.backward()
    return value.detach()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()], ids=["clip", "siglip"])
@pytest.mark.parametrize("sizes", [[7], [3, 3, 1]], ids=str)
def test_as_one_batch(named: bool, loss: nn.Module, sizes: list[int]) -> None:
    model = Towers(isinstance(loss, SigLipLoss), named).double()
    other = copy.deepcopy(model)
    batches = [tuple(torch.randn(2, n, 6).double()) for n in sizes]
    if named:
        batches = [dict(zip(("image", "text"), b, strict=True)) for b in batches]
    torch.manual_seed(1)
    want = together(other, loss, batches)
    after = torch.rand(3)
    torch.manual_seed(1)
    got = GradCache(model, loss)(batches)
    # dropout drew the same masks twice, and what is drawn next is what would have been
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close([got, *grads(model)], [want, *grads(other)])
    assert not got.requires_grad


def test_scaled_and_accumulated() -> None:
    model = Towers().double()
    batches = [tuple(torch.randn(2, n, 6).double()) for n in (2, 3)]
    step = GradCache(model.eval(), lambda *a: {"a_loss": ClipLoss()(*a), "b_loss": 2 * ClipLoss()(*a)})
    value = step(batches)
    once = [g.clone() for g in grads(model)]
    torch.testing.assert_close(value["b_loss"], 2 * value["a_loss"])
    step(batches, scale=lambda loss: 8 * loss)
    torch.testing.assert_close(grads(model), [9 * g for g in once])


def test_as_accum_freq() -> None:
    plain, quirk = Towers().double().eval(), Towers().double().eval()
    quirk.load_state_dict(plain.state_dict())
    batches = [tuple(torch.randn(2, 3, 6).double()) for _ in range(4)]
    GradCache(plain, ClipLoss())(batches)
    GradCache(quirk, ClipLoss(), as_accum_freq=True)(batches)
    torch.testing.assert_close(quirk.logit_scale.grad, 4 * plain.logit_scale.grad)
    torch.testing.assert_close(quirk.image[0].weight.grad, plain.image[0].weight.grad)


def test_a_frozen_tower() -> None:
    model = Towers()
    model.text.requires_grad_(False)
    GradCache(model, ClipLoss())([tuple(torch.randn(2, 4, 6)) for _ in range(2)])
    assert model.text[0].weight.grad is None and model.image[0].weight.grad.abs().sum() > 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        GradCache(Towers(), ClipLoss())([])
    model = nn.Module()
    outputs = iter([(torch.ones(1, 2),), (torch.ones(1, 2), torch.ones(1, 2))])
    model.forward = lambda *_: next(outputs)
    with pytest.raises(ValueError, match=r"outputs are \[0, 1\], expected \[0\]"):
        GradCache(model, ClipLoss())([(0,), (1,)])


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (nn.Linear(6, 5), ClipLoss(), "model returned Tensor, expected a tuple or a dict of what loss takes"),
        (Towers(), lambda *f: [ClipLoss()(*f)], "loss returned list, expected a scalar, or a tuple or dict of scalars"),
        (Towers(), lambda *f: f[0], r"loss returned a Tensor of shape \(4, 5\), expected a scalar"),
        (Towers(), lambda *f: (1.0, ClipLoss()(*f)), "loss returned float, expected a scalar"),
    ],
)
def test_what_it_cannot_sum_is_named(model: nn.Module, loss: Any, message: str) -> None:
    images = (torch.randn(4, 6),) if isinstance(model, nn.Linear) else tuple(torch.randn(2, 4, 6))
    with pytest.raises(TypeError, match=message):
        GradCache(model, loss)([images])
