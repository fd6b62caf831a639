"""CLIP's loss over prefixes of the features, every implementation against the formula written out."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import assert_no_worse
from mmfuse.kernels import clip_loss, matryoshka_clip_loss
from mmfuse.kernels.contrastive.grouped.op import GROUPED

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = GROUPED.available(PROBE, PROBE)
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
        logits = ((scale.to(x.dtype) * x) @ y.t()).to(scale.dtype)
        total = total + c * (F.cross_entropy(logits, label) + F.cross_entropy(logits.t(), label)) / 2
    return total


def results(loss, given: list[Tensor], scale: float, dtype: torch.dtype, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    acc = torch.promote_types(dtype, torch.float32)
    image, text = (t.detach().to(dtype).requires_grad_() for t in given)
    s = torch.tensor(scale, dtype=acc, device=DEVICE, requires_grad=True)
    value = loss(image, text, s, DIMS, **options)
    return [value, *torch.autograd.grad(value, (image, text, s))]


@pytest.mark.parametrize(
    "scale, options",
    [
        (14.3, {}),
        (100.0, {}),
        (14.3, {"weights": (0.5, 0.0, 2.0)}),
        (0.5, {"normalize": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_matches_float64(backend: str, dtype: torch.dtype, scale: float, options: dict) -> None:
    found: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(4):
        given = [t.to(dtype) for t in features()]
        found[0].append(results(matryoshka_clip_loss, given, scale, dtype, backend=backend, **options))
        found[1].append(results(written_out, given, scale, dtype, **options))
        found[2].append(results(written_out, given, scale, torch.float64, **options))
    for i, name in enumerate(("loss", "image", "text", "scale")):
        got, eager, exact = (torch.stack([r[i] for r in rs]) for rs in found)
        assert_no_worse(got, eager, exact, name)


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


@pytest.mark.parametrize("backend", [n for n in ALL if n != "torch"])
def test_bitwise_equal_runs_any_strides_and_double_backward(backend: str) -> None:
    given = features()
    strided = [torch.stack([given[0]] * 2, 2)[..., 0], given[1].t().contiguous().t()]
    runs = [results(matryoshka_clip_loss, t, 9.0, torch.float32, backend=backend) for t in (given, given, strided)]
    assert all(map(torch.equal, *runs[:2]))
    torch.testing.assert_close(runs[0], runs[2])
    image = given[0].requires_grad_()
    loss = matryoshka_clip_loss(*given, 9.0, DIMS, backend=backend)
    (g,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once, not twice"):
        (loss + g.sum()).backward()


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
