"""CLIP's loss over prefixes of the features: the reference against the formula, the others against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import Results, compared, judge
from mmfuse.kernels import clip_loss
from mmfuse.kernels.contrastive import matryoshka_clip_loss
from registered import backends

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: matryoshka_clip_loss(PROBE, PROBE, 1.0, (8, 16)))
FUSED = [n for n in ALL if n != "torch"]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
DIMS = (8, 20, 48)


def features(n: int = 37, d: int = 48) -> list[Tensor]:
    return [torch.randn(n, d, device=DEVICE) for _ in range(2)]


def written_out(image, text, scale, dims, weights=(1.0, 1.0, 1.0), normalize=True):  # type: ignore[no-untyped-def]
    label, total = torch.arange(len(image), device=image.device), 0.0
    for d, c in zip(dims, weights, strict=True):
        x, y = image[:, :d], text[:, :d]
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        logits = scale * x @ y.t()
        total = total + c * (F.cross_entropy(logits, label) + F.cross_entropy(logits.t(), label)) / 2
    return total


def results(loss: Callable[..., Tensor], given: list[Tensor], scale: float, **options: Any) -> Results:
    s = torch.tensor(scale, dtype=torch.promote_types(given[0].dtype, torch.float32), device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in (*given, s)]
    value = loss(*leaves, DIMS, **options)
    names = ("loss", "image", "text", "scale")
    return dict(zip(names, [value.detach(), *torch.autograd.grad(value, leaves)], strict=True))


def ours(given: list[Tensor], backend: str, scale: float = 9.0, **options: Any) -> Results:
    return results(partial(matryoshka_clip_loss, backend=backend), given, scale, **options)


CASES = [(14.3, {}), (100.0, {}), (14.3, {"weights": (0.5, 0.0, 2.0)}), (0.5, {"normalize": False})]


@pytest.mark.parametrize("scale, options", CASES, ids=str)
def test_the_reference_is_the_formula(scale: float, options: dict) -> None:
    given = [t.double() for t in features(9)]
    got, want = ours(given, "torch", scale, **options), results(written_out, given, scale, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale, options", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_matches_float64(backend: str, dtype: torch.dtype, scale: float, options: dict) -> None:
    judge(compared(partial(ours, scale=scale, **options), features, backend, dtype))


@pytest.mark.parametrize("backend", ALL)
def test_one_whole_prefix_is_the_clip_loss(backend: str) -> None:
    image, text = features()
    got = matryoshka_clip_loss(image, text, 9.0, [48], backend=backend)
    torch.testing.assert_close(got, clip_loss(image, text, 9.0, normalize=True, backend=backend), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ALL)
def test_dimensions_past_the_longest_prefix_get_no_gradient(backend: str) -> None:
    image, text = (t.requires_grad_() for t in features())
    loss = matryoshka_clip_loss(image, text, 9.0, (8, 20), backend=backend)
    grads = torch.autograd.grad(loss, (image, text))
    assert all(g[:, 20:].eq(0).all() and g[:, :20].ne(0).all() for g in grads)


@pytest.mark.parametrize("backend", FUSED)
def test_bitwise_equal_runs_and_any_strides(backend: str) -> None:
    given = features()
    strided = [torch.stack([given[0]] * 2, 2)[..., 0], given[1].t().contiguous().t()]
    one, two, other = (ours(t, backend) for t in (given, given, strided))
    assert all(torch.equal(one[k], two[k]) for k in one)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL and not GPU else [])])
def test_gradcheck(backend: str) -> None:
    image, text = (t.double().requires_grad_() for t in features(4, 6))
    s = torch.tensor(3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def loss(image: Tensor, text: Tensor, s: Tensor) -> Tensor:
        return matryoshka_clip_loss(image, text, s, (2, 6), (1.0, 0.3), backend=backend)

    assert torch.autograd.gradcheck(loss, (image, text, s), fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_compiles_whole(backend: str | None) -> None:
    image, text = (t.requires_grad_() for t in features(12, 16))

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return matryoshka_clip_loss(image, text, 9.0, (4, 16), backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text), loss(image, text))
    got, want = (torch.autograd.grad(f(image, text), (image, text)) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_errors() -> None:
    image, text = features(4, 8)
    for message, change in (
        ("dims is (), expected lengths of prefixes from 1 to 8", {"dims": ()}),
        ("dims is (4, 9), expected lengths of prefixes from 1 to 8", {"dims": (4, 9)}),
        ("weights is (1.0,), expected 2 finite numbers", {"weights": (1.0,)}),
        ("weights is (1.0, inf), expected 2 finite numbers", {"weights": (1.0, float("inf"))}),
        ("text has shape (5, 8), expected [4, 8] as image", {"text": torch.randn(5, 8, device=DEVICE)}),
    ):
        given = {"image": image, "text": text, "logit_scale": 1.0, "dims": (4, 8)} | change
        with pytest.raises(ValueError, match=re.escape(message)):
            matryoshka_clip_loss(**given)
