"""The global contrastive loss: the reference against FastCLIP's formula, the others against the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.fused import GlobalContrastiveLoss
from mmfuse.kernels.contrastive import global_contrastive_loss
from mmfuse.kernels.contrastive.global_loss.op import GLOBAL
from registered import backends, opcheck, watched

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
STATE = torch.zeros(len(PROBE), device=DEVICE)
ALL = backends(lambda: global_contrastive_loss(PROBE, PROBE, 1.0, STATE, STATE, 0.5))
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LABELS = ("loss", "log u", "log w", "image", "text", "scale")


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def batch(n: int, d: int) -> list[Tensor]:
    """image, text, log u, log w: some of the pairs agree, some samples are new."""
    image, text = unit(n, d), unit(n, d)
    image[: n // 2] = F.normalize(image[: n // 2] + text[: n // 2], dim=-1)
    log_u, log_w = 3 * torch.randn(2, n, device=DEVICE)
    log_u[::5] = log_w[1::7] = -torch.inf
    return [image, text, log_u, log_w]


def written_out(image, text, scale, log_u, log_w, gamma, eps=1e-14):  # type: ignore[no-untyped-def]
    """FastCLIPLoss of the released code with multiply_tau, in one process, which keeps u itself."""
    n = len(image)
    mask = 1 - torch.eye(n, dtype=image.dtype, device=image.device)
    positive = (image * text).sum(1, keepdim=True)
    loss, found = 0.0, []
    for similarity, old in ((image @ text.t(), log_u), (text @ image.t(), log_w)):
        g = (torch.exp((similarity - positive) * scale) * mask).sum(1) / (n - 1)
        u = (1 - gamma) * old.exp() + gamma * g.detach()
        u = torch.where(old.isinf(), g.detach(), u)
        loss = loss + g / (u + eps)
        found.append(u.log())
    return loss.mean() / scale.detach(), *found


def results(
    loss: Callable[..., tuple[Tensor, ...]], given: list[Tensor], scale: float, gamma: float, **options: Any
) -> Results:
    acc = torch.promote_types(given[0].dtype, torch.float32)
    image, text = (t.detach().requires_grad_() for t in given[:2])
    s = torch.tensor(scale, dtype=acc, device=DEVICE, requires_grad=True)
    value, *new = loss(image, text, s, *(t.to(acc) for t in given[2:]), gamma, **options)
    grads = torch.autograd.grad(value, (image, text, s))
    return dict(zip(LABELS, [value.detach(), *new, *grads], strict=True))


def ours(given: list[Tensor], backend: str, scale: float = 9.0, gamma: float = 0.5, **options: Any) -> Results:
    return results(partial(global_contrastive_loss, backend=backend), given, scale, gamma, **options)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(2, 96), (63, 16), (129, 70), (600, 24)])
@pytest.mark.parametrize("backend", FAST)
def test_matches_float64(backend: str, n: int, d: int, dtype: torch.dtype, gamma: float) -> None:
    judge(compared(partial(ours, scale=14.3, gamma=gamma), lambda: batch(n, d), backend, dtype, draws=12))


@pytest.mark.parametrize("backend", ALL)
def test_is_the_published_formula(backend: str) -> None:
    dtype = torch.float64 if backend in ("chunked", "torch") or not GPU and backend == "triton" else torch.float32
    tight = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    given = [t.to(dtype) for t in batch(35, 24)]
    for eps in (0.0, 1e-14, 0.1):
        got = ours(given, backend, 14.3, 0.2, eps=eps)
        want = results(written_out, [t.double() for t in given], 14.3, 0.2, eps=eps)
        torch.testing.assert_close(got, {k: t.to(dtype) for k, t in want.items()}, **tight)


def near(image: Tensor, text: Tensor) -> list[Tensor]:
    """Normalisers within a few powers of e of the batch's own at scale 100, so that every sample counts."""
    none = torch.full((len(image),), -torch.inf, device=DEVICE)
    _, *log_g = global_contrastive_loss(image, text, 100.0, none, none, 1.0, backend="torch")
    return [image, text, *(t + torch.randn_like(t) for t in log_g)]


def same() -> list[Tensor]:
    image = unit(70, 16)
    return near(image, image.clone())


def raw() -> list[Tensor]:
    return near(*(0.2 * torch.randn(70, 16, device=DEVICE) for _ in range(2)))


def opposed() -> list[Tensor]:
    """Each image is far from its own text and close to another's: g is about e^150."""
    image = unit(70, 16)
    return near(image, F.normalize(0.3 * unit(70, 16) - image, dim=-1))


def solved() -> list[Tensor]:
    """g is e^-100."""
    return near(*(torch.eye(70, device=DEVICE) for _ in range(2)))


EXTREMES = {f.__name__: f for f in (same, raw, opposed, solved)}


# with eps the loss of `same` is that of the closest two of all images, and one rounding of theirs; eps is no part of a
# kernel, and in the interpreter one is enough
HOT = [
    (b, c, e)
    for b in FUSED
    for c in EXTREMES
    for e in (0.0, 1e-14)
    if (b in FAST or not e) and (c, e) != ("same", 1e-14)
]


@pytest.mark.parametrize("backend, case, eps", HOT)
def test_at_scale_100(backend: str, case: str, eps: float) -> None:
    judge(compared(partial(ours, scale=100.0, eps=eps), EXTREMES[case], backend, draws=12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_normalisers_beyond_the_range_of_a_float(backend: str, dtype: torch.dtype) -> None:
    # e^150 and e^-150 are no float32; a sample as far behind as gamma allows has a ratio of 1 / gamma
    image, text, *_ = opposed()
    for level in (-150.0, 150.0):
        given = [t.to(dtype) for t in (image, text, *[torch.full((70,), level, device=DEVICE)] * 2)]
        got = ours(given, backend, 100.0, 0.01)
        want = results(written_out, [t.double() for t in given], 100.0, 0.01)
        assert all(t.isfinite().all() for t in got.values())
        # logits that are kept in 16 bits are off by at most scale / 65534, those of the pair and of its negatives
        atol = 2 * 100.0 / 65534 if dtype == torch.float16 else 1e-4
        for name in ("log u", "log w"):
            torch.testing.assert_close(got[name], want[name].float(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("backend", FUSED)
def test_normalize(backend: str) -> None:
    image, text, *state = batch(33, 24)
    long = [image * (1 + torch.rand(33, 1, device=DEVICE)), text * 3, *state]
    got, want = (ours(long, name, normalize=True) for name in (backend, "torch"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    plain = ours([image, text, *state], "torch")
    for name in LABELS[:3]:
        torch.testing.assert_close(got[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["image", "text", "scale"])
@pytest.mark.parametrize("backend", FUSED)
def test_nothing_is_computed_that_is_not_needed(backend: str, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, log_u, log_w = batch(40, 16)
    leaves = {"image": image, "text": text, "scale": torch.tensor(9.0, device=DEVICE)}
    leaves[trained].requires_grad_()
    seen = watched(monkeypatch, GLOBAL, backend, "grad")
    got, want = (
        torch.autograd.grad(global_contrastive_loss(*leaves.values(), log_u, log_w, 0.5, backend=n)[0], leaves[trained])
        for n in (backend, "torch")
    )
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)
    assert seen == [[t.numel() if name == trained else 0 for name, t in leaves.items()]]


@pytest.mark.parametrize("backend", FUSED)
def test_bitwise_equal_runs(backend: str) -> None:
    given = batch(70, 16)
    one, two = (ours(given, backend, 20.0) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    image = given[0].requires_grad_()
    loss, log_u, log_w = global_contrastive_loss(image, given[1], 20.0, *given[2:], 0.5, backend=backend)
    assert loss.requires_grad and not log_u.requires_grad and not log_w.requires_grad


@pytest.mark.parametrize("backend", ALL)
def test_any_strides_and_autocast(backend: str) -> None:
    image, text, *state = batch(33, 16)
    strided = [torch.stack([image, image], 2)[..., 0], text.t().contiguous().t()]
    strided += [torch.stack([t, t], 1)[:, 0] for t in state]
    torch.testing.assert_close(ours(strided, backend), ours([image, text, *state], backend))
    if backend != "triton" or GPU:
        with torch.autocast(DEVICE, torch.bfloat16):
            low = global_contrastive_loss(image, text, 9.0, *state, 0.5, backend=backend)
        exact = global_contrastive_loss(image.bfloat16(), text.bfloat16(), 9.0, *state, 0.5, backend=backend)
        assert all(map(torch.equal, low, exact))


@pytest.mark.parametrize("backend", ALL)
def test_without_negatives(backend: str) -> None:
    for n in (0, 1):
        given = [*unit(2, n, 16), *torch.zeros(2, n, device=DEVICE)]
        value, log_u, log_w, *grads = ours(given, backend).values()
        assert n == 0 or value == 0
        assert log_u.tolist() == log_w.tolist() == pytest.approx([math.log(0.5)] * n)
        assert n == 0 or not any(g.any() for g in grads)
        assert [g.shape for g in grads] == [(n, 16), (n, 16), ()]


@pytest.mark.parametrize("backend", ALL)
def test_a_nan_stays_visible_and_is_forgotten(backend: str) -> None:
    image, text, log_u, log_w = batch(33, 16)
    broken = image.clone()
    broken[11, 3] = torch.nan
    value, u, _, *grads = ours([broken, text, log_u, log_w], backend).values()
    assert value.isnan() and u[11].isnan() and all(g.isnan().any() for g in grads)
    got, want = (
        global_contrastive_loss(image, text, 9.0, old, log_w, 0.5, backend=backend)[1][11]
        for old in (u, torch.full_like(u, -torch.inf))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["chunked", *(["triton"] if "triton" in ALL and not GPU else [])])
def test_gradcheck(backend: str) -> None:
    image, text, log_u, log_w = (t.double() for t in batch(5, 6))
    _, u, w = global_contrastive_loss(image, text, 3.0, log_u, log_w, 0.3, backend="torch")

    def frozen(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """The formula with u, w and the factor 1/s held where they are: what the gradient is one of."""
        s_ij = s * x @ y.t()
        off = s_ij.exp() * (1 - torch.eye(5, device=DEVICE))
        g, h = (off.sum(dim) / 4 / s_ij.diagonal().exp() for dim in (1, 0))
        return (g / (u.exp() + 1e-14) + h / (w.exp() + 1e-14)).mean() / 3.0

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        ours = global_contrastive_loss(x, y, s, log_u, log_w, 0.3, backend=backend)[0]
        return ours - ours.detach() + frozen(x, y, s).detach()

    s = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    inputs = [t.requires_grad_() for t in (image, text, s)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_compiles_whole(backend: str | None) -> None:
    image, text, *state = batch(12, 16)
    image.requires_grad_(), text.requires_grad_()

    def loss(*given: Tensor) -> tuple[Tensor, ...]:
        return global_contrastive_loss(*given[:2], 9.0, *given[2:], 0.5, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 9):
        given = [t[:n] for t in (image, text, *state)]
        torch.testing.assert_close(compiled(*given), loss(*given))
        got, want = (torch.autograd.grad(f(*given)[0], (image, text)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize: bool) -> None:
    image, text, log_u, log_w = batch(9, 16)
    leaves = [t.requires_grad_() for t in (image, text, torch.tensor(9.0, device=DEVICE))]
    for needs in ((True, True, True), (False, True, False)):
        given = [t if need else t.detach() for t, need in zip(leaves, needs, strict=True)]
        opcheck(
            lambda given=given: global_contrastive_loss(
                *given, log_u, log_w, 0.5, normalize=normalize, backend="chunked"
            )[0]
        )


def test_errors() -> None:
    image, text, log_u, log_w = batch(4, 8)
    for error, message, change in (
        (ValueError, "text has shape (6, 8), expected [4, 8] as image", {"text": unit(6, 8)}),
        (ValueError, r"log_u has shape (3,), expected [4]", {"log_u": log_u[:3]}),
        (TypeError, "log_w has dtype torch.int64", {"log_w": log_w.to(torch.int64)}),
        (ValueError, "gamma is 0, expected a number in (0, 1]", {"gamma": 0}),
        (ValueError, "gamma is 1.5", {"gamma": 1.5}),
        (ValueError, "eps is -1", {"eps": -1.0}),
        (mmfuse.UnsupportedError, "computes in float32", {"image": image.double(), "text": text.double()}),
    ):
        given = {"image": image, "text": text, "log_u": log_u, "log_w": log_w, "gamma": 0.5} | change
        named = {"backend": "cpu"} if error is mmfuse.UnsupportedError else {}
        if named and "cpu" not in ALL:
            continue
        with pytest.raises(error, match=re.escape(message)):
            global_contrastive_loss(**given, logit_scale=1.0, **named)
    assert "-> " in mmfuse.explain(global_contrastive_loss, PROBE, PROBE, 1.0, STATE, STATE, 0.5)


# --- the module -----------------------------------------------------------------------------------------------------


def test_the_tables_are_updated_in_training_only() -> None:
    loss = GlobalContrastiveLoss(20, gamma=0.3).to(DEVICE)
    image, text = unit(2, 8, 16)
    first, second = torch.tensor([3, 1, 7, 19, 0, 5, 11, 2], device=DEVICE), torch.arange(8, device=DEVICE)
    unseen = torch.full((8,), -torch.inf, device=DEVICE)
    got = loss(image, text, 9.0, first)
    want, u, w = global_contrastive_loss(image, text, 9.0, unseen, unseen, 0.3)
    assert torch.equal(got, want) and torch.equal(loss.log_u[first], u) and torch.equal(loss.log_w[first], w)
    assert loss.log_u.isfinite().sum() == 8
    before = loss.log_u.clone(), loss.log_w.clone()
    loss.eval()(image, text, 9.0, second)
    assert torch.equal(loss.log_u, before[0]) and torch.equal(loss.log_w, before[1])
    loss.train()(image, text, 9.0, (first, second))  # images and texts that are numbered on their own
    _, u, w = global_contrastive_loss(image, text, 9.0, before[0][first], before[1][second], 0.3)
    assert torch.equal(loss.log_u[first], u) and torch.equal(loss.log_w[second], w)
    other = GlobalContrastiveLoss(20, gamma=0.3).to(DEVICE)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.log_w, loss.log_w)


def test_learned_temperature() -> None:
    """FastCLIP-v3: the released code's loss with rho."""
    image, text, *_ = batch(10, 16)
    s = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    loss = GlobalContrastiveLoss(10, gamma=1.0, rho=8.0).to(DEVICE)
    got = loss(image, text, s, torch.arange(10, device=DEVICE))
    want, log_u, log_w = written_out(image, text, s, loss.log_u, loss.log_w, 1.0)
    want = want + 8.0 / s + torch.mean(log_u + log_w) / 2 / s
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, s), torch.autograd.grad(want, s), rtol=1e-4, atol=1e-6)


def test_small_batches_find_the_normalisers_of_all_samples() -> None:
    image, text, *_ = batch(40, 16)
    loss = GlobalContrastiveLoss(40, gamma=0.05).to(DEVICE)
    for _ in range(120):
        for index in torch.randperm(40).to(DEVICE).split(8):
            loss(image[index], text[index], 4.0, index)
    _, log_g, log_h = global_contrastive_loss(image, text, 4.0, loss.log_u, loss.log_w, 1.0)
    for got, want in ((loss.log_u, log_g), (loss.log_w, log_h)):
        assert (got - want).abs().mean() < 0.1
    single = GlobalContrastiveLoss(40, gamma=1.0).to(DEVICE)  # a batch's own normalisers, as CLIP has them
    for index in torch.arange(40, device=DEVICE).split(8):
        single(image[index], text[index], 4.0, index)
    assert (single.log_u - log_g).abs().mean() > 0.2


def test_the_module_compiles_whole() -> None:
    image, text, *_ = batch(6, 16)
    index = torch.tensor([4, 0, 9, 2, 7, 3], device=DEVICE)
    plain, whole = (GlobalContrastiveLoss(10, gamma=0.5).to(DEVICE) for _ in range(2))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(image, text, 9.0, index), plain(image, text, 9.0, index))
    torch.testing.assert_close(whole.log_u, plain.log_u)


@pytest.mark.gpu
def test_no_host_wait() -> None:
    image, text, *_ = batch(64, 16)
    image.requires_grad_()
    scale, index = torch.tensor(9.0, device=DEVICE), torch.arange(64, device=DEVICE)
    loss = GlobalContrastiveLoss(100, gamma=0.5, rho=8.0).to(DEVICE)
    loss(image, text, scale, index).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(image, text, scale, index).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_module_s_errors() -> None:
    loss = GlobalContrastiveLoss(10, gamma=0.5).to(DEVICE)
    image, text = unit(2, 4, 8)
    with pytest.raises(ValueError, match=re.escape("index has shape (3,), expected [4]")):
        loss(image, text, 1.0, torch.arange(3, device=DEVICE))
    with pytest.raises(TypeError, match="index has dtype torch.float32"):
        loss(image, text, 1.0, torch.ones(4, device=DEVICE))
