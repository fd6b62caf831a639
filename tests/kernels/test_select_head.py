"""select_head: every implementation against ImageBind's own order (LayerNorm of all tokens, then one) in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, cast, judge
from mmfuse.kernels.head import select_head
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALL = backends(lambda: select_head(torch.ones(2, 1, 3, device=DEVICE), 0, (None, None, 1e-6)))
FUSED = [n for n in ALL if n != "torch"]
B, L, D, O = 6, 5, 24, 10  # noqa: E741
NAMES = ("x", "gamma", "beta", "weight", "index")
OPTIONS: dict[str, dict[str, Any]] = {
    "image": {},
    "text": {"index": True, "scale": 1 / 0.07},
    "clips": {"clips": 3, "scale": 20.0},
    "clip": {"index": True, "normalize": False},
    "no projection": {"weight": False, "scale": 2.0},
    "no norm parameters": {"gamma": False, "beta": False},
}


def inputs(
    dtype: torch.dtype, index: bool = False, weight: bool = True, gamma: bool = True, beta: bool = True, **_: Any
) -> list[Tensor | None]:
    x = 3 * torch.randn(B, L, D, device=DEVICE) + 1
    vectors = [
        1 + 0.1 * torch.randn(D, device=DEVICE),
        0.1 * torch.randn(D, device=DEVICE),
        torch.randn(O, D, device=DEVICE),
    ]
    given = [x, *(t if on else None for t, on in zip(vectors, (gamma, beta, weight), strict=True))]
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in given]
    return [*leaves, torch.randint(0, L, (B,), device=DEVICE) if index else None]


def call(
    given: list[Tensor | None], backend: str | None, scale: float | Tensor | None = None, **options: Any
) -> Tensor:
    x, gamma, beta, weight, index = given
    kept = {k: v for k, v in options.items() if k in ("normalize", "clips")}
    at = 0 if index is None else index
    return select_head(x, at, (gamma, beta, 1e-6), weight, scale=scale, backend=backend, **kept)


def official(given: list[Tensor | None], scale: Any = None, normalize: bool = True, clips: int = 1, **_: Any) -> Tensor:
    x, gamma, beta, weight, index = given
    y = F.layer_norm(x, (D,), gamma, beta, 1e-6)
    y = y[:, 0] if index is None else y[torch.arange(B, device=DEVICE), index]
    y = y if weight is None else F.linear(y, weight)
    y = F.normalize(y, dim=-1) if normalize else y
    y = y if scale is None else scale * y
    return y.unflatten(0, (-1, clips)).mean(1)


def with_gradients(fn: Any, given: list[Tensor | None], g: Tensor) -> Results:
    out = fn(given)
    leaves = {k: t for k, t in zip(NAMES, given, strict=True) if t is not None and t.is_floating_point()}
    grads = torch.autograd.grad(out, list(leaves.values()), g.to(out.dtype))
    return {"out": out.detach(), **{f"d {k}": t for k, t in zip(leaves, grads, strict=True)}}


def promoted(given: list[Tensor | None]) -> list[Tensor | None]:
    return [
        t.detach().requires_grad_(t.is_floating_point()) if t is not None else t for t in cast(given, torch.float64)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", FUSED)
def test_no_worse_than_eager(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    g = torch.randn(B // options.get("clips", 1), O if options.get("weight", True) else D, device=DEVICE)

    def results() -> tuple[Results, ...]:
        given = inputs(dtype, **options)
        got = with_gradients(lambda t: call(t, backend, **options), given, g)
        assert all(t.dtype == dtype for t in got.values())
        both = (with_gradients(lambda t: official(t, **options), t, g) for t in (given, promoted(given)))
        return got, *both

    judge(results() for _ in range(3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_is_the_official_order(options: dict[str, Any]) -> None:
    given = inputs(torch.float64, **options)
    g = torch.randn(B // options.get("clips", 1), O if options.get("weight", True) else D, device=DEVICE)
    got, want = (
        with_gradients(fn, given, g) for fn in (lambda t: call(t, "torch", **options), lambda t: official(t, **options))
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
def test_float64_stays_float64(backend: str) -> None:
    given = inputs(torch.float64, index=True)
    if backend not in backends(lambda: call(given, None)):
        pytest.skip(f"{backend} does not take float64")
    leaves = [*given[:4], torch.tensor(3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)]
    found = []
    for fn in (lambda: call(given, backend, scale=leaves[4], clips=2), lambda: official(given, leaves[4], clips=2)):
        out = fn()
        found.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    x, gamma, beta, weight, index = inputs(torch.float64, index=True)
    given = (x[:4, :2, :6], gamma[:6], beta[:6], weight[:4, :6])
    leaves = [t.detach().clone().requires_grad_() for t in given]
    fn = lambda *t: select_head(t[0], index[:4] % 2, (*t[1:3], 1e-6), t[3], scale=2.0, clips=2, backend="chunked")  # noqa: E731
    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_views_and_no_rows(backend: str) -> None:
    given = inputs(torch.float32, index=True)
    x, index = given[0].detach(), given[4]
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)  # [L, B, D] in memory, as ImageBind's trunks
    want = call([x, *given[1:]], backend)
    torch.testing.assert_close(call([strided, *given[1:]], backend), want)
    spread = x.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(call([spread, *given[1:]], backend), want)
    empty = call([x[:0], *given[1:4], index[:0]], backend)
    assert empty.shape == (0, O)


@pytest.mark.parametrize("backend", FUSED)
def test_only_the_selected_token_gets_a_gradient(backend: str) -> None:
    given = inputs(torch.float32, index=True)
    call(given, backend).sum().backward()
    touched = given[0].grad.abs().sum(-1) > 0
    assert torch.equal(touched.nonzero()[:, 1], given[4])


@pytest.mark.parametrize("backend", ALL)
def test_a_zero_row_has_no_direction(backend: str) -> None:
    given = inputs(torch.float32, weight=False, beta=False)
    given[0] = torch.zeros(B, L, D, device=DEVICE, requires_grad=True)
    out = call(given, backend)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and given[0].grad.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str) -> None:
    given = inputs(torch.float32, index=True)
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    opcheck(lambda: call(given, backend, scale, clips=2))
    opcheck(lambda: select_head(given[0], 0, (None, None, 1e-6), normalize=False, backend=backend))


def test_compile() -> None:
    given = inputs(torch.float32, index=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(list(t), None, clips=2), fullgraph=True, backend="aot_eager")
    g = torch.ones(B // 2, O, device=DEVICE)
    got, want = (with_gradients(fn, given, g) for fn in (lambda t: compiled(*t), lambda t: call(t, None, clips=2)))
    torch.testing.assert_close(got, want)


def test_autocast_multiplies_in_its_dtype() -> None:
    given = inputs(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = call(given, None, scale=2.0)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), call(given, None, scale=2.0), rtol=2e-2, atol=2e-2)


def test_errors() -> None:
    x, gamma, beta, weight, _ = inputs(torch.float32)
    norm = (gamma, beta, 1e-6)
    for message, args, options in (
        ("x has shape .6, 24., expected .B, L, D.", (x[:, 0], 0, norm), {}),
        ("index is 1, expected 0 or a tensor .6.", (x, 1, norm), {}),
        ("index has shape .2,., expected .6.", (x, torch.zeros(2, dtype=torch.int64, device=DEVICE), norm), {}),
        ("norm is 3, expected .weight", (x, 0, 3), {}),
        ("norm's weight has shape .10,., expected .24.", (x, 0, (gamma[:10], None, 1e-6)), {}),
        ("weight has shape .10, 5., expected .O, 24.", (x, 0, norm, weight[:, :5]), {}),
        ("clips is 4, expected a number >= 1 that divides the 6 rows", (x, 0, norm), {"clips": 4}),
    ):
        with pytest.raises(ValueError, match=message):
            select_head(*args, **options)
    with pytest.raises(TypeError, match="norm's bias has dtype torch.float16, expected torch.float32"):
        select_head(x, 0, (gamma, gamma.half(), 1e-6), weight)
    with pytest.raises(TypeError, match="weight has dtype torch.float64, expected torch.float32"):
        select_head(x, 0, norm, weight.double())
    if not GPU:
        with pytest.raises(ValueError, match="index has 5, expected 0 <= index < 5, the tokens of x"):
            select_head(x, torch.full((B,), 5), norm)
    with pytest.raises(mmfuse.UnsupportedError, match="cpu: not an implementation of select_head"):
        select_head(x, 0, norm, backend="cpu")


@pytest.mark.gpu
def test_an_index_out_of_range_gives_nan() -> None:
    given = inputs(torch.float32)
    given[4] = torch.tensor([0, 1, 2, 9, -1, 3], device=DEVICE)
    for backend in set(FUSED) & {"cuda", "triton"}:  # plain torch asserts on the device
        assert call(given, backend).isnan().all(-1).tolist() == [False] * 3 + [True] * 2 + [False]


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    given = inputs(torch.float32, index=True)
    call(given, None).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in FUSED:
            call(given, backend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_a_row_of_zeros_stays_one(backend: str, dtype: torch.dtype) -> None:
    nothing = torch.zeros(D, device=DEVICE, dtype=dtype)
    x = torch.randn(2, 3, D, device=DEVICE).to(dtype)
    assert not select_head(x, 0, (nothing, nothing, 1e-6), normalize=True, backend=backend).any()
