"""The contrastive losses: the reference against its formula, every other implementation against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.kernels._runtime import chosen
from mmfuse.kernels.contrastive import clip_loss, siglip_loss
from mmfuse.kernels.contrastive.op import CLIP, kept_logits
from registered import backends, opcheck, reasons, watched

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: clip_loss(PROBE, PROBE, 1.0))
# the interpreter runs a Triton program in Python: it takes the small cases
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]


def features(
    n: int, d: int, dtype: torch.dtype = torch.float32, unit: bool = True, m: int | None = None
) -> list[Tensor]:
    image, text = torch.randn(n, d, device=DEVICE), torch.randn(m or n, d, device=DEVICE)
    if unit:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return [image.to(dtype), text.to(dtype)]


def results(loss: Callable[..., Tensor], given: list[Tensor], *scalars: float) -> Results:
    """The loss of (image, text, scale, bias), and its gradients."""
    acc = torch.promote_types(given[0].dtype, torch.float32)
    leaves = [t.detach().requires_grad_() for t in given]
    leaves += [torch.tensor(v, dtype=acc, device=DEVICE, requires_grad=True) for v in scalars]
    value = loss(*leaves)
    names = ("loss", "image", "text", "scale", "bias")
    return dict(zip(names, [value.detach(), *torch.autograd.grad(value, leaves)], strict=False))


def clip(given: list[Tensor], backend: str | None, scale: float = 14.0, **options: Any) -> Results:
    return results(partial(clip_loss, backend=backend, **options), given, scale)


def siglip(
    given: list[Tensor], backend: str | None, scale: float = 14.0, bias: float = -3.0, **options: Any
) -> Results:
    return results(partial(siglip_loss, backend=backend, **options), given, scale, bias)


# --- the formulas ---------------------------------------------------------------------------------------------------


def softmax(s: Tensor, dim: int) -> Tensor:
    return s.exp() / s.exp().sum(dim, keepdim=True)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def clip_formula(
    image: Tensor, text: Tensor, scale: Tensor, weights=(0.5, 0.5), label_smoothing=0.0, normalize=False, row_offset=0
) -> Tensor:  # type: ignore[no-untyped-def]
    """Of an image the probabilities of all texts, of its text those of all images; the mean of -log at the targets."""
    s = scale * (unit(image) @ unit(text).t() if normalize else image @ text.t())
    loss = 0.0
    for i in range(len(image)):
        pair = i + row_offset
        for w, p, at in ((weights[0], softmax(s, 1)[i], pair), (weights[1], softmax(s, 0)[:, pair], i)):
            nll = -p.log()
            loss = loss + w * ((1 - label_smoothing) * nll[at] + label_smoothing * nll.mean()) / len(image)
    return loss


def siglip_formula(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize=False, row_offset=0, negative_only=False
) -> Tensor:  # type: ignore[no-untyped-def]
    """-log sigmoid(z (S + bias)) over all pairs, per image; z is 1 for the pairs that belong together, else -1."""
    s = scale * (unit(image) @ unit(text).t() if normalize else image @ text.t()) + bias
    loss = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if j == i + row_offset and not negative_only else -1
            loss = loss + (1 + (-z * s[i, j]).exp()).log() / len(image)
    return loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": (0.7, 0.1)},
        {"weights": (0.0, 1.0), "row_offset": 3},
        {"weights": (0.2, 0.9), "normalize": True, "row_offset": 4},
        {"weights": (1.0, 0.0), "label_smoothing": 0.2, "row_offset": 2},
        {"weights": (0.7, 0.3), "label_smoothing": 0.1, "normalize": True},
    ],
    ids=str,
)
def test_the_clip_reference_is_the_formula(options: dict) -> None:
    given = [t.double() for t in features(6, 8, m=10 if "row_offset" in options else 6, unit=False)]
    got = clip(given, "torch", 1.3, **options)
    torch.testing.assert_close(got, results(partial(clip_formula, **options), given, 1.3), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"normalize": True, "row_offset": 3}, {"negative_only": True}], ids=str)
def test_the_siglip_reference_is_the_formula(options: dict) -> None:
    given = [t.double() for t in features(6, 8, m=10, unit=False)]
    got = siglip(given, "torch", 1.3, -0.7, **options)
    want = results(partial(siglip_formula, **options), given, 1.3, -0.7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


# --- every implementation -------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 16), (2, 512), (7, 96), (63, 16), (64, 770), (65, 96), (129, 512), (1000, 96)])
@pytest.mark.parametrize("backend", FAST)
def test_clip_matches_float64(backend: str, n: int, d: int, dtype: torch.dtype, save: str) -> None:
    judge(compared(partial(clip, save=save), lambda: features(n, d), backend, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 16), (2, 512), (7, 96), (63, 16), (64, 770), (65, 96), (129, 512), (1000, 96)])
@pytest.mark.parametrize("backend", FAST)
def test_siglip_matches_float64(backend: str, n: int, d: int, dtype: torch.dtype) -> None:
    judge(compared(partial(siglip, scale=10.0, bias=-10.0), lambda: features(n, d), backend, dtype))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"save": "store"}], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_small_case_in_every_implementation(backend: str, options: dict) -> None:
    def draw() -> list[Tensor]:
        return features(35, 24, unit=False)

    judge(compared(partial(clip, scale=0.5, **options), draw, backend))
    if "save" not in options:
        judge(compared(partial(siglip, scale=0.5, bias=-1.0, **options), draw, backend))


def negative_cosines() -> list[Tensor]:
    """Half of the rows point away from every text: their best logit at scale 100 is far below 0."""
    image, text = features(96, 32)
    axis = F.normalize(torch.ones(32, device=DEVICE), dim=0)
    text = F.normalize(text * 0.2 + axis, dim=-1)
    image = F.normalize(
        image * 0.2 + axis * torch.where(torch.arange(96, device=DEVICE) % 2 == 0, 1.0, -1.0)[:, None], dim=-1
    )
    return [image, text]


def duplicates() -> list[Tensor]:
    image, text = features(80, 32)
    return [image[torch.arange(80) % 5], text[torch.arange(80) % 5]]


def solved() -> list[Tensor]:
    """Orthogonal pairs: at scale 100 the loss is e^-100."""
    eye = torch.eye(64, device=DEVICE)
    return [eye, eye.clone()]


def zero_rows() -> list[Tensor]:
    image, text = features(70, 16)
    image[3], text[5], image[6], text[6] = 0, 0, 0, 0
    return [image, text]


EXTREMES = {f.__name__: f for f in (negative_cosines, duplicates, solved, zero_rows)}


@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("backend", FUSED)
def test_clip_at_scale_100(backend: str, case: str, save: str) -> None:
    judge(compared(partial(clip, scale=100.0, save=save), EXTREMES[case], backend))


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("backend", FUSED)
def test_siglip_at_scale_100(backend: str, case: str) -> None:
    if backend == "triton" and case == "solved" and not GPU:
        pytest.skip("all entries of G are one number, and the interpreter's exp (numpy's) is off by 2 ulp there")
    judge(compared(partial(siglip, scale=100.0, bias=-10.0), EXTREMES[case], backend))


@pytest.mark.parametrize("backend", FUSED)
def test_a_solved_batch_keeps_its_digits(backend: str) -> None:
    # eager computes log(1 + 63 e^-100) as a difference of two equal numbers: 0
    image, text = solved()
    loss = clip_loss(image, text, 50.0, backend=backend)
    torch.testing.assert_close(loss.item(), math.log1p(63 * math.exp(-50)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": (1.0, 0.0)},
        {"weights": (0.0, 1.0)},
        {"weights": (0.7, 0.1)},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2, "weights": (0.7, 0.3), "normalize": True},
        {"normalize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", FAST)
def test_clip_variants(backend: str, options: dict) -> None:
    judge(compared(partial(clip, scale=1.5, **options), lambda: features(67, 24, unit=False), backend))


@pytest.mark.parametrize("options", [{"weights": (1.0, 0.0), "label_smoothing": 0.1}, {}, {"save": "store"}], ids=str)
@pytest.mark.parametrize("row_offset", [0, 5, 40])
@pytest.mark.parametrize("backend", FAST)
def test_rectangular_blocks(backend: str, row_offset: int, options: dict) -> None:
    def draw() -> list[Tensor]:
        return features(30, 24, m=70)

    judge(compared(partial(clip, row_offset=row_offset, **options), draw, backend))
    judge(compared(partial(siglip, row_offset=row_offset), draw, backend))


@pytest.mark.parametrize("backend", FAST)
def test_many_blocks_of_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.kernels.contrastive.blocked._MAX_ROWS", 64)
    for run in (clip, siglip):
        judge(compared(run, lambda: features(333, 24), backend))


@pytest.mark.parametrize("backend", FAST)
def test_negative_block_of_siglip(backend: str) -> None:
    judge(compared(partial(siglip, negative_only=True), lambda: features(30, 24, m=20), backend))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("backend", ALL)
def test_any_strides(backend: str, layout: str) -> None:
    image = {
        "transposed": lambda: torch.randn(24, 33, device=DEVICE).t(),
        "sliced": lambda: torch.randn(33, 48, device=DEVICE)[:, ::2],
        "expanded": lambda: torch.randn(1, 24, device=DEVICE).expand(33, 24),
    }[layout]()
    text = torch.randn(33, 24, device=DEVICE)
    for run in (clip, partial(clip, normalize=True), siglip):
        got, want = (run([x, text], backend, 1.0) for x in (image, image.contiguous()))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize("backend", ALL)
def test_an_expanded_incoming_gradient_is_respected(backend: str, loss) -> None:  # type: ignore[no-untyped-def]
    image, text = (t.requires_grad_() for t in features(9, 16))
    weights = torch.tensor([3.0], device=DEVICE).expand(4)
    out = torch.stack([loss(image, text, 5.0, backend=backend)]).expand(4)
    (got,) = torch.autograd.grad(out, image, weights)
    (one,) = torch.autograd.grad(loss(image, text, 5.0, backend=backend), image)
    torch.testing.assert_close(got, 12 * one)
    assert weights.stride() == (0,) and weights[0] == 3.0


@pytest.mark.parametrize("backend", FAST)
def test_fp16_gradients_do_not_underflow(backend: str) -> None:
    # 1 / 2N is below float16's normal range, and an uninformative batch has probabilities of 1 / N
    image, text = features(2048, 16, torch.float16)
    judge(compared(partial(clip, scale=1.0, save="recompute"), lambda: [image, text], backend, torch.float16, draws=1))
    assert (clip([image, text], backend, 1.0)["image"] != 0).float().mean() > 0.5


@pytest.mark.parametrize("backend", FUSED)
def test_fp16_gradients_do_not_overflow(backend: str) -> None:
    given = features(40, 16, torch.float16)
    judge(compared(partial(clip, scale=1.0, weights=(9.0, 5.0)), lambda: given, backend, torch.float16, draws=2))


@pytest.mark.parametrize("spread", [1.0, 0.02])
@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_fp16_gradients_under_a_loss_scaler(backend: str, options: dict, spread: float) -> None:
    """A factor of 65536 is in the loss before the gradients are rounded; a spread of 0.02 is a batch all but solved."""
    image, text = features(300, 32, torch.float16)
    text = F.normalize((1 - spread) * image.float() + spread * text.float(), dim=-1).half()
    for loss, scalars in ((clip_loss, (20.0,)), (siglip_loss, (20.0, -10.0))):

        def scaled(name: str, dtype: torch.dtype, loss: Any = loss, scalars: Any = scalars) -> Results:
            leaves = [t.to(dtype).requires_grad_() for t in (image, text)]
            value = 65536 * loss(*leaves, *scalars, backend=name, **options)
            return dict(zip(("image", "text"), torch.autograd.grad(value, leaves), strict=True))

        eager = {name: t.half() for name, t in scaled("torch", torch.float32).items()}
        judge([(scaled(backend, torch.float16), eager, scaled("torch", torch.float64))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_large_features_are_multiplied_in_float32(backend: str, dtype: torch.dtype) -> None:
    if GPU or backend != "triton":
        image = torch.full((40, 8), 300.0, device=DEVICE, dtype=dtype)
        for options in ({"ids": torch.arange(40, device=DEVICE) // 2}, {}):
            if options and backend == "cuda":
                continue
            loss = clip_loss(image, image.clone(), 1e-5, backend=backend, **options)
            torch.testing.assert_close(loss.float(), torch.tensor(math.log(40), device=DEVICE), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_zero_rows_are_normalized_to_zeros(backend: str, dtype: torch.dtype) -> None:
    image, text = features(6, 8, dtype)
    image[2], text[4] = 0, 0
    for run in (clip, siglip):
        assert run([image, text], backend, normalize=True)["loss"].isfinite()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("backend", ALL)
def test_a_scale_that_is_no_number_gives_none(backend: str, n: int, value: float) -> None:
    image, text = features(n, 8)
    options = [(clip_loss, {}), (clip_loss, {"normalize": True, "save": "store", "store_budget": 0})]
    options += [(siglip_loss, {}), (siglip_loss, {"negative_only": True})]
    if backend != "cuda":
        options.append((clip_loss, {"ids": torch.zeros(n, dtype=torch.long, device=DEVICE)}))
    for loss, how in options:
        found = results(partial(loss, backend=backend, **how), [image, text], value)
        assert all(t.isnan().any() for t in found.values()), (loss, how, found)
        assert loss(image, text, value, backend=backend, **how).isnan()


def test_a_scale_that_is_no_number_gives_none_in_a_graph() -> None:
    image, text = features(3, 8)
    compiled = torch.compile(lambda s: clip_loss(image, text, s) + siglip_loss(image, text, s), backend="aot_eager")
    assert compiled(torch.tensor(math.inf, device=DEVICE)).isnan()


@pytest.mark.parametrize("backend", ALL)
def test_siglip_at_infinite_logits(backend: str) -> None:
    """softplus(-inf) is 0, and softplus(S) is S where S + |S| is no number."""
    image, text = torch.ones(3, 8, device=DEVICE), torch.ones(3, 8, device=DEVICE)
    for bias, want in ((-math.inf, 0.0), (2.5e38, None), (math.inf, math.inf)):
        one = (image[:1], text[:1])
        loss = siglip_loss(*one, 1.0, bias, negative_only=True, backend=backend)
        assert loss == (torch.tensor(8 + 2.5e38) if want is None else want)
    found = siglip([image, text], backend, 1.0, -math.inf, negative_only=True)
    assert not any(t.any() for t in found.values())


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("frozen", ["image", "text", "both", "scale"])
@pytest.mark.parametrize("backend", FUSED)
def test_frozen_inputs_get_no_gradient(backend: str, frozen: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = features(20, 16)
    image.requires_grad_(frozen not in ("image", "both"))
    text.requires_grad_(frozen not in ("text", "both"))
    s = torch.tensor(7.0, device=DEVICE, requires_grad=frozen != "scale")
    inputs = [t for t in (image, text, s) if t.requires_grad]
    seen = watched(monkeypatch, CLIP, backend, "grad")
    got = torch.autograd.grad(clip_loss(image, text, s, backend=backend, save=save), inputs)
    monkeypatch.undo()
    torch.testing.assert_close(got, torch.autograd.grad(clip_loss(image, text, s, backend="torch"), inputs))
    assert seen == [[t.numel() if t.requires_grad else 0 for t in (image, text, s)]]
    got = torch.autograd.grad(siglip_loss(image, text, s, backend=backend), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(siglip_loss(image, text, s, backend="torch"), inputs))


@pytest.mark.parametrize("backend", FUSED)
def test_scale_of_zero_has_a_gradient(backend: str) -> None:
    judge(compared(partial(clip, scale=0.0), lambda: features(20, 16), backend))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_scale_and_bias_keep_their_shape(backend: str, shape: tuple[int, ...]) -> None:
    image, text = features(9, 16)
    s, b = (torch.full(shape, v, device=DEVICE, requires_grad=True) for v in (10.0, -3.0))
    for loss, run in ((clip_loss, clip), (siglip_loss, siglip)):
        grads = torch.autograd.grad(loss(image, text, s, b, backend=backend), (s, b))
        assert [g.shape for g in grads] == [s.shape, b.shape]
        want = run([image, text], "torch", 10.0)
        torch.testing.assert_close(grads[0].reshape(()), want["scale"])
        torch.testing.assert_close(grads[1].item(), want["bias"].item() if loss is siglip_loss else 0.0)


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL else [])])
def test_gradcheck(backend: str) -> None:
    if GPU and backend == "triton":
        pytest.skip("float64 Triton kernels run in the interpreter only")
    image, text = (t.double().requires_grad_() for t in features(5, 6, m=7, unit=False))
    s, b = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (0.7, -0.2))
    fast = backend == "triton"  # a random projection of the Jacobian: the interpreter takes its time
    for save in ("recompute", "store"):
        assert torch.autograd.gradcheck(
            lambda i, t, s: clip_loss(i, t, s, normalize=True, row_offset=1, save=save, backend=backend),  # noqa: B023
            (image, text, s),
            fast_mode=fast,
        )
    assert torch.autograd.gradcheck(
        lambda i, t, s, b: siglip_loss(i, t, s, b, normalize=True, row_offset=1, backend=backend),
        (image, text, s, b),
        fast_mode=fast,
    )


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward_is_the_same(backend: str) -> None:
    image, text = (t.requires_grad_() for t in features(33, 16))
    for loss in (clip_loss(image, text, 10.0, backend=backend), siglip_loss(image, text, 10.0, backend=backend)):
        first = torch.autograd.grad(loss, (image, text), retain_graph=True)
        second = torch.autograd.grad(loss, (image, text), retain_graph=True)
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", ALL)
def test_runs_are_bitwise_equal(backend: str) -> None:
    image, text = features(70, 16)
    one, two = (clip([image, text], backend) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("where", ["image", "text"])
@pytest.mark.parametrize("backend", ALL)
def test_a_nan_row_stays_visible(backend: str, where: str) -> None:
    image, text = features(70, 16)
    (image if where == "image" else text)[11, 3] = torch.nan
    for run in (clip, siglip):
        found = run([image, text], backend)
        # of an input, in the row; a number all alone
        assert all((t[11] if t.dim() else t).isnan().any() for t in found.values())


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend: str) -> None:
    image, text = (torch.zeros(0, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    s = torch.tensor(5.0, device=DEVICE, requires_grad=True)
    for loss in (clip_loss(image, text, s, backend=backend), siglip_loss(image, text, s, backend=backend)):
        assert loss.isnan()
        grads = torch.autograd.grad(loss, (image, text, s))
        assert [g.shape for g in grads] == [(0, 16), (0, 16), ()]
    texts = torch.randn(3, 16, device=DEVICE)
    for few in (texts[:0], texts):
        loss, found = clip_loss(texts[:0], few, 5.0, metrics=True, backend=backend)
        assert loss.isnan() and all(t.isnan() for t in found.values())
        assert siglip_loss(texts[:0], few, 5.0, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_autocast_rounds_features_as_a_matrix_product_would(backend: str) -> None:
    image, text = (t.requires_grad_() for t in features(50, 32))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = clip_loss(image, text, 14.0, backend=backend)
        grads = torch.autograd.grad(loss, (image, text))
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    low = [t.detach().bfloat16().requires_grad_() for t in (image, text)]
    want = clip_loss(*low, 14.0, backend=backend)
    assert torch.equal(loss, want)
    for g, w in zip(grads, torch.autograd.grad(want, low), strict=True):
        torch.testing.assert_close(g, w.float())


@pytest.mark.parametrize("backend", ALL)
def test_metrics(backend: str) -> None:
    image, text = features(40, 16)
    text[:20] = image[:20]
    s = 20 * image.double() @ text.double().t()
    loss, m = clip_loss(image, text, 20.0, metrics=True, backend=backend)
    off = ~torch.eye(40, dtype=torch.bool, device=DEVICE)
    hits = s.diagonal() > s.masked_fill(~off, -torch.inf).amax(1) + 1e-4
    hits_t = s.diagonal() > s.masked_fill(~off, -torch.inf).amax(0) + 1e-4
    want = [hits.double().mean(), hits_t.double().mean(), s.diagonal().mean(), s[off].mean(), s.max()]
    keys = ["image_to_text_r1", "text_to_image_r1", "mean_positive", "mean_negative", "max_logit"]
    assert list(m) == keys
    torch.testing.assert_close([v.double() for v in m.values()], want, rtol=1e-5, atol=1e-5)
    assert not any(v.requires_grad for v in m.values()) and torch.equal(
        loss, clip_loss(image, text, 20.0, backend=backend)
    )


# --- the compiler and torch.library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "chunked", *(["triton"] if "triton" in ALL else [])])
def test_compiles_whole(backend: str | None) -> None:
    image, text = (t.requires_grad_() for t in features(12, 16))
    s = torch.tensor(10.0, device=DEVICE, requires_grad=True)

    def both(image: Tensor, text: Tensor, s: Tensor) -> Tensor:
        loss, m = clip_loss(image, text, s, normalize=True, metrics=True, backend=backend)
        return loss + siglip_loss(image, text, s, -3.0, backend=backend) + 0 * m["mean_positive"]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 9):  # the second size reuses the graph
        inputs = (image[:n], text[:n], s)
        torch.testing.assert_close(compiled(*inputs), both(*inputs))
        got, want = (torch.autograd.grad(f(*inputs), (image, text, s)) for f in (compiled, both))
        torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    image, text = features(9, 16, m=12)
    s, bias = (torch.tensor(v, device=DEVICE) for v in (10.0, -1.0))
    grads = [t.clone().requires_grad_() for t in (image, text, s)]
    for options in ({}, {"normalize": True, "save": "store"}, {"save": "store", "store_budget": 0}):
        opcheck(lambda options=options: clip_loss(*grads, metrics=True, backend="chunked", **options))
    opcheck(lambda: clip_loss(grads[0], text, s, backend="chunked"))
    opcheck(lambda: siglip_loss(*grads, bias.requires_grad_(), backend="chunked"))


def test_transforms_see_the_operator() -> None:
    image, text = features(9, 16)
    got = torch.func.grad(lambda i: clip_loss(i, text, 10.0, backend="torch"))(image)
    torch.testing.assert_close(got, clip([image, text], "chunked", 10.0)["image"])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_what_auto_keeps() -> None:
    wide, narrow = torch.empty(8192, 1), torch.empty(8192, 1, dtype=torch.bfloat16)
    assert kept_logits("auto", None, wide, 8192) == "full"
    assert kept_logits("auto", None, torch.empty(16384, 1), 16384) == ""
    assert kept_logits("auto", None, narrow, 8192) == "int16"
    assert kept_logits("auto", 2 * 8192**2, wide, 8192) == ""
    assert kept_logits("store", 2 * 8192**2, wide, 8192) == "int16"
    assert kept_logits("recompute", None, wide, 8) == ""


@pytest.mark.parametrize("columns, kept", [(512, ""), (768, "int16")])
def test_what_auto_keeps_on_a_gpu(columns: int, kept: str) -> None:
    image: Any = SimpleNamespace(dtype=torch.bfloat16, shape=(8192, columns), is_cuda=True)
    assert kept_logits("auto", 1 << 30, image, 8192) == kept
    assert kept_logits("store", 1 << 30, image, 8192) == "int16"


@pytest.mark.parametrize("backend", FUSED)
def test_16_bit_logits_stay_within_their_bound(backend: str) -> None:
    """Half a step of fixed point moves a logit, and again the logsumexp, by at most s |x| max|y| / 65534."""
    image, text = features(65, 32)
    for scale in (14.3, 100.0):
        got = clip([image, text], backend, scale, save="store", store_budget=0)
        exact = clip([image.double(), text.double()], "torch", scale)
        s = scale * image.double() @ text.double().t()
        mass = s.softmax(1) + s.softmax(0)
        moved = math.expm1(scale * 1.0001 / 32767) * scale / (2 * 65) * mass
        for name, bound in (("image", moved.sum(1)), ("text", moved.sum(0))):
            error = torch.linalg.vector_norm(got[name].double() - exact[name], dim=1)
            assert (error <= bound + 1e-6 * exact[name].abs().max()).all()
        assert not torch.equal(got["image"], clip([image, text], backend, scale)["image"])


# --- choice and errors ----------------------------------------------------------------------------------------------


def test_choice_of_implementation() -> None:
    image, text = features(9, 16)
    with pytest.raises(mmfuse.UnsupportedError, match="device is cpu|CUDA|cuda"):
        clip_loss(image.cpu(), text.cpu(), 1.0, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'nope', expected one of cuda, triton, cpu, slices, chunked"):
        clip_loss(image, text, 1.0, backend="nope")
    with mmfuse.use_backend("chunked"):
        assert chosen(lambda: clip_loss(image, text, 1.0)) == "chunked"
    scale = torch.tensor(14.0, device=DEVICE)
    running = chosen(lambda: clip_loss(image, text, scale))
    assert f"-> {running}" in mmfuse.explain(mmfuse.clip_loss, image, text, scale)
    assert mmfuse.explain(mmfuse.clip_loss, image, text, scale) == mmfuse.explain("clip_loss", image, text, scale)
    assert set(reasons(lambda: siglip_loss(image, text, scale))) == {"cuda", "triton", "cpu", "chunked", "torch"}


@pytest.mark.skipif(GPU, reason="what is small there was not measured")
def test_steps_aside_for_eager_where_that_is_faster() -> None:
    small, large = torch.empty(100, 16), torch.empty(16384, 16)
    for loss in (clip_loss, siglip_loss):
        assert chosen(lambda loss=loss: loss(small, small, 1.0)) == "torch"
        assert chosen(lambda loss=loss: loss(large, large, 1.0)) in ("cpu", "chunked")
        assert chosen(lambda loss=loss: loss(small, small, 1.0, backend="chunked")) == "chunked"
        why = reasons(lambda loss=loss: loss(small, small, 1.0))["chunked"]
        assert why[0].startswith("a later one is faster for fewer than")


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_bad_arguments(loss) -> None:  # type: ignore[no-untyped-def]
    image, text = features(4, 8)
    for error, message, args in (
        (ValueError, r"image has shape \(8,\), expected \[N, D\]", (image[0], text, 1.0)),
        (ValueError, r"text has shape \(4, 7\), expected \[N, 8\]", (image, text[:, :7], 1.0)),
        (ValueError, "image has 4 rows at row_offset 0", (image, text[:3], 1.0)),
        (TypeError, "image has dtype torch.int64", (image.long(), text.long(), 1.0)),
        (TypeError, "text has dtype torch.float64, expected torch.float32", (image, text.double(), 1.0)),
        (TypeError, "image is list", ([1.0], text, 1.0)),
        (ValueError, "at least one feature", (image[:, :0], text[:, :0], 1.0)),
        (ValueError, "text is on meta", (image, text.to("meta"), 1.0)),
        (TypeError, "logit_scale is str, expected a number or a tensor", (image, text, "1.0")),
        (ValueError, r"logit_scale has shape \(2,\)", (image, text, torch.ones(2, device=DEVICE))),
        (
            TypeError,
            "logit_scale has dtype torch.int64",
            (image, text, torch.ones((), dtype=torch.int64, device=DEVICE)),
        ),
    ):
        with pytest.raises(error, match=message):
            loss(*args)


def test_bad_options_of_clip() -> None:
    image, text = features(4, 8)
    for message, options in (
        ("weights is", {"weights": (1.0,)}),
        ("weights is", {"weights": (math.nan, 1.0)}),
        ("label_smoothing is 1.5", {"label_smoothing": 1.5}),
        ("expected as many images as texts, got 3 and 4", {"label_smoothing": 0.1}),
        ("save is 'all', expected one of 'auto', 'recompute', 'store'", {"save": "all"}),
        ("row_offset 2", {"row_offset": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            clip_loss(image[:3], text, 1.0, **options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        clip_loss(image, text, 1.0, nope=1)


def test_a_number_as_scale_is_not_compiled_anew_for_each_value() -> None:
    torch._dynamo.reset()
    image, text = torch.randn(4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)

    def losses(scale: float) -> torch.Tensor:
        return clip_loss(image, text, scale, backend="chunked") + siglip_loss(image, text, scale, backend="chunked")

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for step in range(12):
        torch.testing.assert_close(compiled(1 + step / 4), losses(1 + step / 4))
