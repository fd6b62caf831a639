"""`clip_loss(decoupled=True)`: the reference against the formula of the paper, the others against the reference."""

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
from mmfuse.kernels.contrastive import global_contrastive_loss
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: clip_loss(PROBE, PROBE, 1.0, decoupled=True))
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def pairs(n: int, d: int, m: int | None = None) -> list[Tensor]:
    image, text = unit(n, d), unit(m or n, d)
    image[: n // 2] = F.normalize(image[: n // 2] + text[: n // 2], dim=-1)
    return [image, text]


def written_out(image, text, scale, weights=(0.5, 0.5), row_offset=0, normalize=False):  # type: ignore[no-untyped-def]
    """-log(e^S_ii / sum_{j != i} e^S_ij), over the texts of an image and the images of a text."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    s = scale * image @ text.t()
    loss = torch.zeros_like(scale)
    for i in range(len(s)):
        own = i + row_offset
        row = torch.cat([s[i, :own], s[i, own + 1 :]])
        column = torch.cat([s[:i, own], s[i + 1 :, own]])
        for w, others in zip(weights, (row, column), strict=True):
            loss = loss + w * (others.logsumexp(0) - s[i, own]) / len(s)
    return loss


def results(loss: Callable[..., Tensor], given: list[Tensor], scale: float, **options: Any) -> Results:
    s = torch.tensor(scale, dtype=torch.promote_types(given[0].dtype, torch.float32), device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in (*given, s)]
    value = loss(*leaves, **options)
    names = ("loss", "image", "text", "scale")
    return dict(zip(names, [value.detach(), *torch.autograd.grad(value, leaves)], strict=True))


def clip(given: list[Tensor], backend: str, scale: float = 10.0, decoupled: bool = True, **options: Any) -> Results:
    return results(partial(clip_loss, backend=backend, decoupled=decoupled), given, scale, **options)


OPTIONS = [{}, {"weights": (1.0, 0.0)}, {"weights": (0.2, 0.7), "normalize": True}, {"row_offset": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_formula(options: dict) -> None:
    given = [t.double() for t in pairs(8, 6, 14 if "row_offset" in options else None)]
    got, want = clip(given, "torch", **options), results(written_out, given, 10.0, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(2, 96), (63, 16), (130, 70)])
@pytest.mark.parametrize("backend", FAST)
def test_matches_float64(backend: str, n: int, d: int, dtype: torch.dtype, save: str) -> None:
    judge(compared(partial(clip, scale=14.3, save=save), lambda: pairs(n, d), backend, dtype, draws=6))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_weights_and_rectangular_blocks(backend: str, options: dict) -> None:
    m = 60 if "row_offset" in options else None
    judge(compared(partial(clip, **options), lambda: pairs(35, 24, m), backend, draws=8))


def same() -> list[Tensor]:
    image = unit(70, 16)
    return [image, image.clone()]


def opposed() -> list[Tensor]:
    image = unit(70, 16)
    return [image, F.normalize(0.3 * unit(70, 16) - image, dim=-1)]


def solved() -> list[Tensor]:
    return [torch.eye(70, device=DEVICE), torch.eye(70, device=DEVICE)]


EXTREMES = {f.__name__: f for f in (same, opposed, solved)}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("backend", FUSED)
def test_at_scale_100(backend: str, case: str) -> None:
    judge(compared(partial(clip, scale=100.0), EXTREMES[case], backend, draws=6))


@pytest.mark.parametrize("backend", ALL)
def test_a_solved_pair_is_still_pushed(backend: str) -> None:
    """The positive-negative coupling of CLIP's loss, (1 - P_ii), is what the paper removes."""
    image, text = solved()
    coupled, plain = (clip([image, text], backend, 100.0, on)["image"] for on in (False, True))
    assert coupled.abs().max() < 1e-30
    torch.testing.assert_close(plain.diagonal(), torch.full((70,), -100 / 70, device=DEVICE))


@pytest.mark.parametrize("backend", ALL)
def test_is_the_direction_of_the_global_loss(backend: str) -> None:
    """With normalisers of the batch alone, gamma = 1, SogCLR's gradient is (2/s) times the decoupled loss's."""
    image, text = (t.requires_grad_() for t in pairs(40, 16))
    none = torch.full((40,), -torch.inf, device=DEVICE)
    whole = global_contrastive_loss(image, text, 14.0, none, none, 1.0, eps=0.0, backend=backend)[0]
    got = torch.autograd.grad(whole, (image, text))
    want = torch.autograd.grad(clip_loss(image, text, 14.0, decoupled=True, backend=backend), (image, text))
    torch.testing.assert_close(got, tuple(2 / 14.0 * t for t in want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_metrics_are_those_of_the_clip_loss(backend: str) -> None:
    image, text = pairs(40, 16)
    plain, decoupled = (
        clip_loss(image, text, 9.0, metrics=True, backend=backend, decoupled=on)[1] for on in (False, True)
    )
    torch.testing.assert_close(plain, decoupled)


@pytest.mark.parametrize("backend", FUSED)
def test_runs_are_bitwise_equal(backend: str) -> None:
    given = pairs(70, 16)
    one, two = (clip(given, backend, 20.0) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL and not GPU else [])])
def test_gradcheck(backend: str) -> None:
    image, text = (t.double().requires_grad_() for t in pairs(4, 5, 6))
    s = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y, s: clip_loss(x, y, s, decoupled=True, row_offset=1, backend=backend),
        (image, text, s),
        fast_mode=backend == "triton",
    )


@pytest.mark.parametrize("backend", ["chunked", "torch"])
def test_compiles_whole(backend: str) -> None:
    image, text = (t.requires_grad_() for t in pairs(12, 16))

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, 9.0, decoupled=True, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 9):
        inputs = (image[:n], text[:n])
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        got, want = (torch.autograd.grad(f(*inputs), (image, text)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    leaves = [t.requires_grad_() for t in (*pairs(9, 16, 12), torch.tensor(9.0, device=DEVICE))]
    opcheck(lambda: clip_loss(*leaves, decoupled=True, backend="chunked"))
    opcheck(lambda: clip_loss(leaves[0], *(t.detach() for t in leaves[1:]), decoupled=True, backend="chunked"))


def test_errors() -> None:
    image, text = pairs(4, 8)
    for message, options in (
        ("decoupled is set, expected neither label_smoothing nor ids", {"label_smoothing": 0.1}),
        ("decoupled is set, expected neither label_smoothing nor ids", {"ids": torch.arange(4, device=DEVICE)}),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            clip_loss(image, text, 1.0, decoupled=True, **options)
    with pytest.raises(ValueError, match="image has 1 row, expected at least 2"):
        clip_loss(image[:1], text, 1.0, decoupled=True)
