"""Distillation: the reference against open_clip's formula, every other implementation against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.kernels import clip_loss, distill_clip_loss
from mmfuse.kernels.contrastive.distill.op import DISTILL
from registered import backends, opcheck, watched

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: distill_clip_loss(PROBE, PROBE, 1.0, PROBE, PROBE, 1.0))
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale")


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def features(b: int, d: int, t_d: int, n: int | None = None) -> list[Tensor]:
    """Student and teacher, who agree on some of the pairs."""
    n = n or b
    found = [unit(b, d), unit(n, d), unit(b, t_d), unit(n, t_d)]
    for image, text in (found[:2], found[2:]):
        image[: b // 2] = F.normalize(image[: b // 2] + text[: b // 2], dim=-1)
    return found


def written_out(image, text, scale, t_image, t_text, t_scale, weights=(0.5, 0.5), row_offset=0):  # type: ignore[no-untyped-def]
    """open_clip.loss.DistillClipLoss, for a block of rows."""
    pairs = slice(row_offset, row_offset + len(image))
    s, t = scale * image @ text.t(), t_scale * t_image @ t_text.t()
    label = torch.arange(len(image), device=image.device)
    contrastive = distill = s.new_zeros(())
    both = (weights[0], s, t, label + row_offset), (weights[1], s[:, pairs].t(), t[:, pairs].t(), label)
    for w, logits, teacher, target in both:
        contrastive = contrastive + w * F.cross_entropy(logits, target)
        distill = distill - w * (teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)
    return contrastive, distill


def results(
    loss: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], scales: tuple[float, float], **options: Any
) -> Results:
    """Both losses, and the gradients of each."""
    acc = torch.promote_types(given[0].dtype, torch.float32)
    image, text, t_image, t_text = (t.detach().requires_grad_() for t in given)
    s, s_t = (torch.tensor(v, dtype=acc, device=DEVICE, requires_grad=True) for v in scales)
    leaves = dict(zip(NAMES, (image, text, s, t_image, t_text, s_t), strict=True))
    contrastive, distill = loss(*leaves.values(), **options)
    found = {"contrastive": contrastive.detach(), "distill": distill.detach()}
    for name, value, inputs in (("contrastive", contrastive, NAMES[:3]), ("distill", distill, NAMES)):
        grads = torch.autograd.grad(value, [leaves[k] for k in inputs], retain_graph=True)
        found |= {f"{name} {k}": g for k, g in zip(inputs, grads, strict=True)}
    return found


def distilled(given: list[Tensor], backend: str, scales: tuple[float, float] = (9.0, 20.0), **options: Any) -> Results:
    return results(partial(distill_clip_loss, backend=backend), given, scales, **options)


def in_units(draws: Iterator[tuple[Results, Results, Results]]) -> Iterator[tuple[Results, ...]]:
    """A scalar of each draw in units of its own size: at scale 100 they differ by 10^5, and one would decide."""
    for draw in draws:
        units = {k: t.abs().log2().floor().clamp(-100, 100).exp2().item() for k, t in draw[2].items() if t.dim() == 0}
        yield tuple({k: t / units.get(k, 1) for k, t in side.items()} for side in draw)


OPTIONS = [{}, {"weights": (9.0, 0.0)}, {"weights": (0.2, 0.7), "row_offset": 30}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_formula(options: dict) -> None:
    given = [t.double() for t in features(7, 8, 5, n=40)]
    got, want = distilled(given, "torch", **options), results(written_out, given, (9.0, 20.0), **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d, t_d", [(1, 16, 24), (2, 96, 16), (63, 16, 40), (129, 70, 16), (600, 24, 24)])
@pytest.mark.parametrize("backend", FAST)
def test_matches_float64(backend: str, n: int, d: int, t_d: int, dtype: torch.dtype) -> None:
    judge(in_units(compared(partial(distilled, scales=(14.3, 30.0)), lambda: features(n, d, t_d), backend, dtype, 8)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_rectangular_blocks(backend: str, options: dict) -> None:
    judge(in_units(compared(partial(distilled, **options), lambda: features(35, 24, 16, n=70), backend, draws=8)))


@pytest.mark.parametrize("backend", FAST)
def test_many_blocks_of_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.kernels.contrastive.blocked._MAX_ROWS", 64)
    judge(in_units(compared(distilled, lambda: features(333, 24, 16), backend, draws=8)))


def same() -> list[Tensor]:
    image = unit(70, 16)
    return [image, image.clone(), image.clone(), image.clone()]


def raw() -> list[Tensor]:
    return [torch.randn(70, 16, device=DEVICE) for _ in range(4)]


def collinear() -> list[Tensor]:
    axis = unit(1, 16)
    return [axis.expand(70, 16).clone() for _ in range(4)]


def opposed() -> list[Tensor]:
    """The best logit of half of the rows is far below 0, and the teacher prefers another text there."""
    image, text, t_image, t_text = features(70, 16, 24)
    axis = unit(1, 16)
    text = F.normalize(text * 0.2 + axis, dim=-1)
    image[::2] = F.normalize(image[::2] * 0.2 - axis, dim=-1)
    return [image, text, t_image, t_text.flip(0)]


EXTREMES = {f.__name__: f for f in (same, raw, collinear, opposed)}


# the interpreter runs a Triton program in Python: it takes every case and every pair of scales once
SCALES = [(100.0, 1.0), (1.0, 100.0), (100.0, 100.0)]
HOT = [(backend, case, scales) for backend in FAST for case in EXTREMES for scales in SCALES]
if "triton" in FUSED and not GPU:
    HOT += [("triton", case, scales) for case, scales in zip(EXTREMES, (*SCALES, SCALES[2]), strict=True)]


@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("backend, case, scales", HOT, ids=str)
def test_at_scale_100(backend: str, case: str, scales: tuple[float, float]) -> None:
    judge(in_units(compared(partial(distilled, scales=scales), EXTREMES[case], backend, draws=16)))


@pytest.mark.parametrize("backend", FUSED)
def test_a_solved_batch_keeps_its_digits(backend: str) -> None:
    eye = torch.eye(64, device=DEVICE)
    losses = distill_clip_loss(eye, eye, 50.0, eye, eye, 40.0, backend=backend)
    alone = math.log1p(63 * math.exp(-50))
    # sum_j Pt_ij (S_ii - S_ij) on top
    expected = alone + 50 * 63 * math.exp(-40) / (1 + 63 * math.exp(-40))
    torch.testing.assert_close([t.item() for t in losses], [alone, expected], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ALL)
def test_the_first_loss_is_the_clip_loss(backend: str) -> None:
    image, text, t_image, t_text = features(40, 16, 24)
    got = distill_clip_loss(image, text, 10.0, t_image, t_text, 20.0, backend=backend)[0]
    torch.testing.assert_close(got, clip_loss(image, text, 10.0, backend=backend), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (-1.0, 0.5), (0.0, 0.0), (65536.0, 65536.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_one_backward_for_both_losses(
    backend: str, dtype: torch.dtype, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watched(monkeypatch, DISTILL, backend, "grad")
    image, text, t_image, t_text = features(40, 16, 24)

    def run(given: list[Tensor], name: str) -> Results:
        x, y = (t.detach().requires_grad_() for t in given[:2])
        contrastive, distill = distill_clip_loss(x, y, 14.0, *given[2:], 30.0, backend=name)
        grads = torch.autograd.grad(weights[0] * contrastive + weights[1] * distill, (x, y))
        return dict(zip(("image", "text"), grads, strict=True))

    judge([next(compared(run, lambda: [image, text, t_image, t_text], backend, dtype))])
    assert len(calls) == 1


@pytest.mark.parametrize("needs", [*NAMES, "none of the teacher"])
@pytest.mark.parametrize("backend", FUSED)
def test_nothing_is_computed_that_is_not_needed(backend: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, t_image, t_text = features(40, 16, 24)
    s, s_t = torch.tensor(9.0, device=DEVICE), torch.tensor(20.0, device=DEVICE)
    leaves = dict(zip(NAMES, (image, text, s, t_image, t_text, s_t), strict=True))
    wanted = NAMES[:3] if needs == "none of the teacher" else (needs,)
    for name in wanted:
        leaves[name].requires_grad_()
    seen = watched(monkeypatch, DISTILL, backend, "grad", "teacher_grad")
    inputs = [leaves[name] for name in wanted]
    got = torch.autograd.grad(distill_clip_loss(*leaves.values(), backend=backend)[1], inputs)
    want = torch.autograd.grad(distill_clip_loss(*leaves.values(), backend="torch")[1], inputs)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)
    side = NAMES[3:] if wanted[0].startswith("teacher") else NAMES[:3]
    assert seen == [[leaves[name].numel() if name in wanted else 0 for name in side]]


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward_is_the_same(backend: str) -> None:
    image, text, t_image, t_text = (t.requires_grad_() for t in features(33, 16, 24))
    loss = sum(distill_clip_loss(image, text, 10.0, t_image, t_text, 20.0, backend=backend))
    runs = [torch.autograd.grad(loss, (image, t_text), retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("backend", ALL)
def test_runs_are_bitwise_equal(backend: str) -> None:
    given = features(70, 16, 24)
    one, two = (distilled(given, backend) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("backend", ALL)
def test_any_strides_and_autocast(backend: str) -> None:
    image, text, t_image, t_text = features(33, 16, 24)
    strided = [torch.stack([t, t], 2)[..., 0] for t in (image, text)] + [
        t.t().contiguous().t() for t in (t_image, t_text)
    ]
    torch.testing.assert_close(distilled(strided, backend), distilled([image, text, t_image, t_text], backend))
    if backend == "triton" and not GPU:
        return
    with torch.autocast(DEVICE, torch.bfloat16):
        low = distill_clip_loss(image, text, 9.0, t_image, t_text, 9.0, backend=backend)
    rounded = [t.bfloat16() for t in (image, text, t_image, t_text)]
    exact = distill_clip_loss(*rounded[:2], 9.0, *rounded[2:], 9.0, backend=backend)
    assert all(map(torch.equal, low, exact))


@pytest.mark.parametrize("of", ["image", "teacher_text"])
@pytest.mark.parametrize("backend", ALL)
def test_a_nan_stays_visible(backend: str, of: str) -> None:
    given = features(40, 16, 24)
    given[0 if of == "image" else 3][11, 3] = torch.nan
    found = distilled(given, backend)
    assert found["contrastive"].isnan() == (of == "image")
    assert all(t.isnan().any() for name, t in found.items() if name.startswith("distill"))


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend: str) -> None:
    given = [torch.zeros(0, d, device=DEVICE) for d in (16, 16, 8, 8)]
    shapes = [tuple(t.shape) for name, t in distilled(given, backend).items() if name.startswith("distill ")]
    assert shapes == [(0, 16), (0, 16), (), (0, 8), (0, 8), ()]


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL and not GPU else [])])
def test_gradcheck(backend: str) -> None:
    given = [t.double().requires_grad_() for t in features(4, 5, 6, n=6)]
    s, s_t = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (2.0, 1.5))
    assert torch.autograd.gradcheck(
        lambda x, y, s, x_t, y_t, s_t: distill_clip_loss(x, y, s, x_t, y_t, s_t, row_offset=1, backend=backend),
        (*given[:2], s, *given[2:], s_t),
        fast_mode=backend == "triton",
    )


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_compiles_whole(backend: str | None) -> None:
    image, text, t_image, t_text = features(12, 16, 24)
    image.requires_grad_(), text.requires_grad_()

    def loss(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor) -> Tensor:
        contrastive, distill = distill_clip_loss(image, text, 9.0, t_image, t_text, 20.0, backend=backend)
        return contrastive + 0.5 * distill

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 9):
        inputs = (image[:n], text[:n], t_image[:n], t_text[:n])
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        got, want = (torch.autograd.grad(f(*inputs), (image, text)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    image, text, t_image, t_text = features(9, 16, 24, n=12)
    s, s_t = (torch.tensor(v, device=DEVICE) for v in (10.0, 20.0))
    leaves = [t.requires_grad_() for t in (image, text, s, t_image, t_text, s_t)]
    for needs in ((True,) * 6, (True, False, True, False, False, True)):
        given = [t if need else t.detach() for t, need in zip(leaves, needs, strict=True)]
        opcheck(lambda given=given: distill_clip_loss(*given, backend="chunked"))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ALL)
def test_a_scale_that_is_no_number_gives_none(backend: str, value: float) -> None:
    given = features(6, 8, 5)
    for scales, own in (((value, 2.0), (0, 1)), ((2.0, value), (1,))):
        losses = distill_clip_loss(*given[:2], scales[0], *given[2:], scales[1], backend=backend)
        assert all(losses[i].isnan() for i in own)


@pytest.mark.parametrize("backend", FAST)
def test_large_features_are_multiplied_in_float32(backend: str) -> None:
    x = torch.full((40, 8), 300.0, device=DEVICE).half()
    for loss in distill_clip_loss(x, x, 1e-5, x, x, 1e-5, backend=backend):
        torch.testing.assert_close(loss, torch.full_like(loss, 40).log(), atol=1e-2, rtol=0)


def test_errors() -> None:
    image, text, t_image, t_text = features(4, 8, 6)
    for error, message, args in (
        (ValueError, r"teacher_image has shape \(3, 6\), expected \[4, Dt\]", (t_image[:3], t_text, 1.0)),
        (ValueError, r"teacher_text has shape \(4, 5\), expected \[N, 6\]", (t_image, t_text[:, :5], 1.0)),
        (
            TypeError,
            "teacher_image has dtype torch.float64, expected torch.float32",
            (t_image.double(), t_text.double(), 1.0),
        ),
        (TypeError, "teacher_image is NoneType", (None, t_text, 1.0)),
        (TypeError, "teacher_scale is str", (t_image, t_text, "2")),
    ):
        with pytest.raises(error, match=message):
            distill_clip_loss(image, text, 1.0, *args)
    with pytest.raises(ValueError, match="weights is"):
        distill_clip_loss(image, text, 1.0, t_image, t_text, 1.0, weights=(1.0,))
    with pytest.raises(mmfuse.UnsupportedError, match="cuda: not an implementation of distill_clip_loss"):
        distill_clip_loss(image, text, 1.0, t_image, t_text, 1.0, backend="cuda")
