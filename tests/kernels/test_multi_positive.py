"""`clip_loss` with several positives, equal ids: the reference against targets written out, the others against it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.kernels import clip_loss
from mmfuse.kernels.contrastive.arguments import positives
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: clip_loss(PROBE, PROBE, 1.0, ids=torch.arange(8, device=DEVICE)))
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def drawn(b: int, n: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Ids of the images and of the texts; some have no equal on the other side."""
    return torch.randint(kinds, (b,), device=DEVICE) - 3, torch.randint(kinds, (n,), device=DEVICE) - 3


def written_out(image, text, scale, ids, weights=(0.5, 0.5), label_smoothing=0.0, row_offset=0, normalize=False):  # type: ignore[no-untyped-def]
    """The formula: -sum targets log softmax, mean over the rows, with 0 for a row that has no positive."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    image_ids, text_ids = ids if isinstance(ids, tuple) else (ids[row_offset : row_offset + len(image)], ids)
    s = scale * image @ text.t()
    pairs = slice(row_offset, row_offset + len(image))
    same = (image_ids[:, None] == text_ids).to(s.dtype)
    loss = s.new_zeros(())
    for w, logits, target in zip(weights, (s, s[:, pairs].t()), (same, same[:, pairs].t()), strict=True):
        target = (1 - label_smoothing) * target / target.sum(1, keepdim=True).clamp_min(1)
        target = target + label_smoothing / target.shape[1]
        loss = loss - w * (target * logits.log_softmax(1)).sum(1).mean()
    return loss


def results(loss: Callable[..., Tensor], given: tuple[Any, ...], scale: float, **options: Any) -> Results:
    """The loss of (image, text, ids), and its gradients."""
    image, text, ids = given
    s = torch.tensor(scale, dtype=torch.promote_types(image.dtype, torch.float32), device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in (image, text, s)]
    value = loss(*leaves, ids=ids, **options)
    names = ("loss", "image", "text", "scale")
    return dict(zip(names, [value.detach(), *torch.autograd.grad(value, leaves)], strict=True))


def clip(given: tuple[Any, ...], backend: str | None, scale: float = 9.0, **options: Any) -> Results:
    return results(partial(clip_loss, backend=backend), given, scale, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": (0.7, 0.1), "normalize": True},
        {"weights": (0.0, 1.0), "row_offset": 2},
        {"weights": (1.0, 0.0), "label_smoothing": 0.1, "row_offset": 1},
        {"weights": (0.3, 0.4), "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_the_reference_is_the_formula(options: dict) -> None:
    n = 12 if "row_offset" in options else 9
    image, text = torch.randn(9, 8, device=DEVICE).double(), torch.randn(n, 8, device=DEVICE).double()
    for ids in (drawn(9, n, 5), drawn(9, n, 4)[1]):
        given = (image, text, ids)
        got, want = clip(given, "torch", 0.6, **options), results(written_out, given, 0.6, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d, kinds", [(1, 16, 1), (7, 96, 3), (65, 40, 30), (300, 24, 40)])
@pytest.mark.parametrize("backend", FAST)
def test_matches_float64(backend: str, n: int, d: int, kinds: int, dtype: torch.dtype, save: str) -> None:
    def draw():  # type: ignore[no-untyped-def]
        return unit(n, d), unit(n, d), drawn(n, n, kinds)[0]

    judge(compared(partial(clip, scale=14.3, save=save), draw, backend, dtype, draws=8))


OPTIONS = [
    {},
    {"save": "store", "store_budget": 10**9},
    {"weights": (1.0, 0.0), "label_smoothing": 0.1},
    {"weights": (0.0, 1.0)},
    {"weights": (0.7, 0.1), "normalize": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_own_ids_of_images_and_texts(backend: str, options: dict) -> None:
    def draw():  # type: ignore[no-untyped-def]
        return unit(30, 24), unit(75, 24), drawn(30, 75, 20)

    judge(compared(partial(clip, row_offset=5, **options), draw, backend, draws=8))


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.0)])
@pytest.mark.parametrize("backend", FUSED)
def test_with_label_smoothing(backend: str, weights: tuple[float, float]) -> None:
    def draw():  # type: ignore[no-untyped-def]
        return unit(70, 24), unit(70, 24), drawn(70, 70, 40)

    judge(compared(partial(clip, label_smoothing=0.1, weights=weights), draw, backend, draws=8))


@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("kind", ["duplicates", "one id", "solved", "no positive"])
@pytest.mark.parametrize("backend", FUSED)
def test_at_scale_100(backend: str, kind: str) -> None:
    def draw():  # type: ignore[no-untyped-def]
        image, text, ids = unit(66, 32), unit(66, 32), torch.arange(66, device=DEVICE)
        if kind == "duplicates":
            image, text, ids = image[ids % 5], text[ids % 5], ids % 5
        elif kind == "one id":
            ids = torch.zeros_like(ids)
        elif kind == "solved":
            # five orthogonal groups: every positive has the same logit, 100 above the others
            ids = ids % 5
            image = text = torch.eye(32, device=DEVICE)[ids]
        else:
            return image, text, (ids, ids + 66)
        return image, text, ids

    judge(compared(partial(clip, scale=100.0), draw, backend, draws=8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_different_ids_are_the_plain_loss(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    image, text = unit(20, 16).to(dtype), unit(40, 16).to(dtype)
    ids = torch.randperm(40, device=DEVICE) - 7
    for options in ({}, {"weights": (1.0, 0.0), "label_smoothing": 0.2}):
        got, plain = (clip((image, text, i), backend, 20.0, row_offset=8, **options) for i in (ids, None))
        for name, g in got.items():
            torch.testing.assert_close(g, plain[name], rtol=4 * torch.finfo(g.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_rows_without_a_positive_get_nothing(backend: str) -> None:
    image, text = unit(9, 16), unit(9, 16)
    ids = (torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE) + 100)
    assert not any(t.any() for t in clip((image, text, ids), backend, 20.0).values())
    ids[1][4] = 7
    found = clip((image, text, ids), backend, 20.0, weights=(1.0, 0.0))
    assert found["image"].any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("needs", ["image", "text", "scale"])
@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("backend", FUSED)
def test_one_input_alone(backend: str, save: str, needs: str) -> None:
    image, text, ids = unit(40, 16), unit(40, 16), drawn(40, 40, 20)
    leaves = {"image": image, "text": text, "scale": torch.tensor(9.0, device=DEVICE)}
    leaves[needs].requires_grad_()
    got, want = (
        torch.autograd.grad(clip_loss(*leaves.values(), ids=ids, save=save, backend=name), leaves[needs])[0]
        for name in (backend, "torch")
    )
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_runs_are_bitwise_equal(backend: str) -> None:
    image, text, ids = unit(70, 16), unit(70, 16), drawn(70, 70, 9)
    one, two = (clip((image, text, ids), backend, 20.0) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend: str) -> None:
    image, text = (torch.zeros(0, 16, device=DEVICE) for _ in range(2))
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert [t.shape for t in clip((image, text, ids), backend).values()] == [(), (0, 16), (0, 16), ()]


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL and not GPU else [])])
def test_gradcheck(backend: str) -> None:
    image, text = (t.double().requires_grad_() for t in (unit(5, 6), unit(7, 6)))
    s = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ids = (torch.tensor([0, 1, 1, 2, 9], device=DEVICE), torch.tensor([3, 0, 1, 1, 2, 0, 1], device=DEVICE))
    for options in ({}, {"label_smoothing": 0.2, "weights": (1.0, 0.0)}):
        assert torch.autograd.gradcheck(
            lambda i, t, s: clip_loss(i, t, s, ids=ids, row_offset=1, normalize=True, backend=backend, **options),  # noqa: B023
            (image, text, s),
            fast_mode=backend == "triton",
        )


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_compiles_whole(backend: str | None) -> None:
    image, text = (t.requires_grad_() for t in (unit(12, 16), unit(12, 16)))
    ids = drawn(12, 12, 4)[0]

    def loss(image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return clip_loss(image, text, 9.0, ids=ids, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 9):
        inputs = (image[:n], text[:n], ids[:n])
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        got, want = (torch.autograd.grad(f(*inputs), (image, text)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    image, text, ids = unit(9, 16), unit(12, 16), drawn(9, 12, 4)
    leaves = [t.clone().requires_grad_() for t in (image, text, torch.tensor(9.0, device=DEVICE))]
    opcheck(lambda: clip_loss(*leaves, ids=ids, row_offset=2, backend="chunked"))
    opcheck(lambda: clip_loss(leaves[0], text, leaves[2], ids=ids, row_offset=2, backend="chunked"))


def test_keys_and_shares() -> None:
    ids = (torch.tensor([5, 8, 5, 1], device=DEVICE), torch.tensor([8, 5, 2, 5, 7, 5], device=DEVICE))
    keys, shares = positives(*ids, 1, torch.float32)
    assert torch.equal(keys[:4, None] == keys[4:], ids[0][:, None] == ids[1])
    # the texts 0 and 5 have no image here
    torch.testing.assert_close(shares.cpu(), torch.tensor([1 / 3, 1, 1 / 3, 0, 0, 1 / 2, 0, 1 / 2, 0, 0]))


def test_errors() -> None:
    image, text = unit(4, 8), unit(6, 8)
    ids = torch.arange(6, device=DEVICE)
    for error, message, given in (
        (ValueError, r"ids has shape \(4,\), expected \[6\]", ids[:4]),
        (TypeError, "ids is list, expected a tensor", [1, 2, 3, 4, 5, 6]),
        (ValueError, r"ids\[0\] has shape \(6,\), expected \[4\]", (ids, ids)),
        (ValueError, r"ids\[1\] has shape \(4,\), expected \[6\]", (ids[:4], ids[:4])),
        (TypeError, "ids has dtype torch.float32, expected integers", ids.float()),
        (ValueError, r"ids\[1\] is on meta", (ids[:4], ids.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            clip_loss(image, text, 1.0, ids=given)
    with pytest.raises(mmfuse.UnsupportedError, match="ids are given"):
        clip_loss(image, text, 1.0, ids=ids, backend="cuda")
