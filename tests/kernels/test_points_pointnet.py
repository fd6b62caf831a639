"""The mini-PointNet: the reference against the published layers, every implementation against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import Results, cast, compared, judge
from mmfuse.kernels._runtime import chosen
from mmfuse.kernels.points import mini_pointnet, mini_pointnet_training
from mmfuse.kernels.points.pointnet import blocked
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Layers = list[tuple[Tensor, Tensor]]


NAMES = ("x", "w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4", "scale")


def drawn(groups: int = 11, k: int = 5, widths: tuple[int, ...] = (3, 8, 6, 10, 9)) -> tuple[Tensor, Layers]:
    c, c1, c2, c3, d = widths
    shapes = ((c1, c), (c2, c1), (c3, 2 * c2), (d, c3))
    layers = [(torch.randn(s, device=DEVICE) / s[1] ** 0.5, torch.randn(s[0], device=DEVICE)) for s in shapes]
    return torch.randn(groups, k, c, device=DEVICE), layers


ALL = backends(lambda: mini_pointnet(*drawn()))
OURS = [b for b in ALL if b != "torch"]


def published(x: Tensor, layers: Layers, scale: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, ...]:
    """Point-BERT's encoder, convolutions over points; with `scale` its second normalisation, and what that found."""

    def conv(x: Tensor, i: int) -> Tensor:
        return F.conv1d(x, layers[i][0][:, :, None], layers[i][1])

    f = conv(conv(x.transpose(1, 2), 0).relu(), 1)
    f = torch.cat([f.max(2, keepdim=True)[0].expand_as(f), f], 1)
    found = ()
    if scale is None:
        h = conv(f, 2)
    else:
        v = F.conv1d(f, layers[2][0][:, :, None])
        mean, var = v.mean((0, 2)), v.var((0, 2), correction=0)
        h = (v - mean[:, None]) / (var + eps).sqrt()[:, None] * scale[:, None] + layers[2][1][:, None]
        found = (mean.detach(), var.detach())
    return conv(h.relu(), 3).max(2)[0], *found


def results(run: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> Results:
    """The tokens, what the normalisation found, and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, *rest = leaves
    y, *found = run(x, list(zip(rest[:8:2], rest[1:8:2], strict=True)), *rest[8:])
    assert not any(t.requires_grad for t in found)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=DEVICE).view_as(y).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, g)
    found = dict(zip(("mean", "var"), found, strict=False))
    return {"y": y.detach(), **found, **{f"d {n}": d for n, d in zip(NAMES, grads, strict=False)}}


def inference(tensors: list[Tensor], backend: str) -> Results:
    return results(lambda x, layers: (mini_pointnet(x, layers, backend=backend),), tensors)


def training(tensors: list[Tensor], backend: str) -> Results:
    found = results(lambda x, layers, scale: mini_pointnet_training(x, layers, scale, backend=backend), tensors)
    # a bias before a normalisation has no gradient, and what is found is rounding
    assert found.pop("d b2").abs().max() <= 1e-5 * found["d b3"].abs().max()
    return found


def tensors(with_scale: bool = False) -> list[Tensor]:
    x, layers = drawn()
    return [x, *(t for pair in layers for t in pair), *[torch.linspace(-1, 1.5, 10, device=DEVICE)] * with_scale]


def test_the_reference_is_the_published_one() -> None:
    given = cast(tensors(), torch.float64)
    torch.testing.assert_close(inference(given, "torch"), results(published, given), rtol=1e-11, atol=1e-12)
    given = cast(tensors(with_scale=True), torch.float64)
    want = results(published, given)
    del want["d b2"]
    torch.testing.assert_close(training(given, "torch"), want, rtol=1e-11, atol=1e-12)


@pytest.fixture
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.kernels.points.pointnet.blocked._BLOCK_BYTES", {"cpu": 800, "cuda": 800})


@pytest.mark.usefixtures("_several_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", OURS)
def test_tokens_and_gradients(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    judge(compared(inference, tensors, backend, dtype, draws=6))


def test_a_single_block_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    blocks = blocked._blocks
    monkeypatch.setattr(blocked, "_blocks", lambda *given: made.append(given) or blocks(*given))
    x, layers, scale = (*drawn(), torch.ones(10, device=DEVICE))
    whole = mini_pointnet_training(x, layers, scale, backend="chunked")
    assert len(made) == 1
    monkeypatch.setattr(blocked, "_BLOCK_BYTES", {"cpu": 800, "cuda": 800})
    torch.testing.assert_close(mini_pointnet_training(x, layers, scale, backend="chunked"), whole)
    assert len(made) == 3


@pytest.mark.parametrize("backend", [b for b in OURS if b != "cpu"])
def test_gradcheck(backend: str) -> None:
    x, layers = drawn(2, 3, (2, 3, 2, 3, 2))
    tensors = [t.double().requires_grad_() for t in (x, *(t for pair in layers for t in pair))]

    def tokens(x: Tensor, *rest: Tensor) -> Tensor:
        return mini_pointnet(x, list(zip(rest[::2], rest[1::2], strict=True)), backend=backend)

    assert torch.autograd.gradcheck(tokens, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", OURS)
def test_only_the_argmax_is_kept(backend: str) -> None:
    x, layers = drawn(6, 4)
    for w, b in layers:
        w.requires_grad_(), b.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mini_pointnet(x, layers, backend=backend)
    given = {t.data_ptr() for t in (x, *(t for pair in layers for t in pair))}
    new = [t for t in kept if t.data_ptr() not in given]
    assert [(t.dtype, tuple(t.shape)) for t in new] == [(torch.uint8, (6, 9))]


@pytest.mark.parametrize("backend", OURS)
def test_a_second_backward_repeats_bitwise_and_asks_only_for_what_is_needed(backend: str) -> None:
    x, layers = drawn()
    layers[2][0].requires_grad_()
    y = mini_pointnet(x, layers, backend=backend)
    grads = [torch.autograd.grad(y.sum(), layers[2][0], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert x.grad is None and layers[0][0].grad is None


@pytest.mark.parametrize("backend", ALL)
def test_equal_points_and_nan(backend: str) -> None:
    # whole numbers: equal points have equal features, bit for bit
    x, layers = drawn(3, 4)
    x, layers = x.round(), [((3 * w).round(), b.round()) for w, b in layers]
    x[0] = x[0, :1]
    x[1, 2, 0] = torch.nan
    x.requires_grad_()
    y = mini_pointnet(x, layers, backend=backend)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    dx = torch.autograd.grad(y[0].sum(), x)[0]
    # the first of equal points takes the gradient
    assert (dx[0, 0] != 0).any() and (dx[0, 1:] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_leading_dimensions_strides_and_no_groups(backend: str) -> None:
    x, layers = drawn(12, 5)
    expected = mini_pointnet(x, layers, backend="torch")
    shaped = mini_pointnet(
        x.view(3, 4, 5, 3).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), layers, backend=backend
    )
    torch.testing.assert_close(shaped.view(12, 9), expected)
    none = x[:0].clone().requires_grad_()
    layers[0][0].requires_grad_()
    y = mini_pointnet(none, layers, backend=backend)
    dx, dw = torch.autograd.grad(y.sum(), (none, layers[0][0]))
    assert y.shape == (0, 9) and dx.shape == none.shape and (dw == 0).all()


def test_autocast() -> None:
    x, layers = drawn()
    low = [(w.bfloat16(), b.bfloat16()) for w, b in layers]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = mini_pointnet(x, layers, backend="chunked")
    assert torch.equal(y, mini_pointnet(x.bfloat16(), low, backend="chunked"))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_several_blocks")
@pytest.mark.parametrize("backend", OURS)
def test_training(backend: str) -> None:
    judge(compared(training, lambda: tensors(with_scale=True), backend, draws=10))


@pytest.mark.parametrize("backend", [b for b in OURS if b != "cpu"])
def test_gradcheck_of_training(backend: str) -> None:
    x, layers = drawn(3, 3, (2, 3, 2, 3, 2))
    tensors = [t.double().requires_grad_() for t in (x, *(t for pair in layers for t in pair), layers[2][1] + 2)]

    def tokens(x: Tensor, *rest: Tensor) -> Tensor:
        pairs = list(zip(rest[:8:2], rest[1:8:2], strict=True))
        return mini_pointnet_training(x, pairs, rest[8], 1e-3, backend=backend)[0]

    assert torch.autograd.gradcheck(tokens, tensors, fast_mode=True)


# --- all ------------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    x, layers = drawn(4, 3)
    for pair in layers:
        for t in pair:
            t.requires_grad_()
    opcheck(lambda: mini_pointnet(x, layers, backend="chunked"))
    scale = torch.rand(10, device=DEVICE)
    opcheck(lambda: mini_pointnet_training(x, layers, scale, backend="chunked")[0])


def test_compile() -> None:
    x, layers = drawn(4, 3)
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        y, mean, var = mini_pointnet_training(x, layers, layers[2][1])
        return mini_pointnet(x, layers).square().sum() + y.sum() + (mean * var).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x), x)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


def test_errors() -> None:
    x, layers = drawn()
    with pytest.raises(ValueError, match=r"layers\[2\] weight has shape \(10, 6\), expected \[out, 12\]"):
        mini_pointnet(x, [*layers[:2], (layers[2][0][:, :6], layers[2][1]), layers[3]])
    with pytest.raises(ValueError, match=r"layers\[1\] bias has shape \(5,\), expected \[6\]"):
        mini_pointnet(x, [layers[0], (layers[1][0], layers[1][1][:5]), *layers[2:]])
    with pytest.raises(ValueError, match="layers has 3 pairs, expected 4"):
        mini_pointnet(x, layers[:3])
    with pytest.raises(TypeError, match=r"layers\[0\] weight has dtype torch.float64"):
        mini_pointnet(x, [(layers[0][0].double(), layers[0][1]), *layers[1:]])
    with pytest.raises(ValueError, match="at least one point in a group"):
        mini_pointnet(x[:, :0], layers)
    with pytest.raises(ValueError, match="at least one point"):
        mini_pointnet_training(x[:0], layers, layers[2][1])
    with pytest.raises(ValueError, match=r"scale has shape \(9,\), expected \[10\]"):
        mini_pointnet_training(x, layers, layers[3][1])
    with pytest.raises(TypeError, match="groups has dtype torch.int64"):
        mini_pointnet(x.long(), layers)


def test_large_groups_run_in_plain_torch() -> None:
    x, layers = drawn(2, 300)
    assert chosen(lambda: mini_pointnet(x, layers)) == "torch"
    assert mini_pointnet(x, layers).shape == (2, 9)


@pytest.mark.skipif(GPU, reason="on a GPU nothing steps aside")
def test_where_eager_is_faster() -> None:
    x, layers = drawn(512, 32, (3, 8, 16, 16, 96))
    fused = next(b for b in OURS if b != "triton")
    assert chosen(lambda: mini_pointnet(x, layers)) == fused
    assert chosen(lambda: mini_pointnet(x[:4], layers)) == "torch"
    for dtype in (torch.bfloat16, torch.float64):
        given = x.to(dtype), [(w.to(dtype), b.to(dtype)) for w, b in layers]
        assert chosen(lambda given=given: mini_pointnet(*given)) == "torch"
