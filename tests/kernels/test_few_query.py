"""Attention of a few queries in every implementation, against float64 and eager in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from judge import Results, compared, judge
from mmfuse import UnsupportedError, use_backend
from mmfuse.kernels import few_query_attention, project_kv, token_attention
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels.qformer import absorbed
from mmfuse.kernels.qformer.arguments import Keys
from registered import backends, opcheck, reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PROBE = torch.ones(1, 1, 1, 8, device=DEVICE)
# how exact torch's own attention is, is torch's
OURS = [b for b in backends(lambda: few_query_attention(PROBE, PROBE, PROBE)) if b not in ("torch", "sdpa")]
FORWARD = ("cuda", "cpu")  # which have no backward

# B or 1, Q, I, N, H, d, and what says which keys belong to which rows
CASES: dict[str, tuple[tuple[int, int, int, int, int, int], dict[str, Any]]] = {
    "queries of a Q-Former": ((1, 32, 2, 57, 1, 64), {}),
    "one query": ((1, 1, 2, 130, 1, 32), {}),
    "one key": ((2, 5, 2, 1, 1, 16), {}),
    "windows": ((1, 3, 5, 15, 1, 64), {}),
    "more queries than a tile": ((1, 70, 1, 20, 1, 96), {}),
    "a wide head": ((1, 3, 2, 70, 1, 128), {}),
    "lengths": ((3, 4, 3, 9, 1, 24), {"lengths": [9, 0, 4]}),
    "shared": ((5, 3, 3, 7, 1, 16), {"kv_index": [2, 0, 2, 1, 2]}),
    "shared, one set of queries, lengths": ((1, 3, 3, 7, 1, 16), {"kv_index": [2, 2, 1], "lengths": [3, 0, 7]}),
    "packed": ((3, 3, 3, 5, 2, 16), {"cu_seqlens": [0, 4, 4, 9]}),
    "packed, shared": ((4, 2, 3, 140, 1, 16), {"cu_seqlens": [1, 4, 9, 149], "kv_index": [2, 0, 2, 2]}),
    "256 queries": ((1, 256, 1, 9, 1, 16), {}),
    "an image": ((2, 2, 2, 257, 1, 16), {}),
    "a large image": ((1, 1, 1, 677, 1, 8), {}),
    "a video": ((1, 1, 1, 8192, 1, 8), {}),
    "images of any size": ((4, 2, 4, 300, 1, 8), {"cu_seqlens": [0, 1, 258, 273, 573]}),
    "no keys": ((2, 3, 2, 0, 2, 8), {}),
    "no rows": ((0, 3, 2, 4, 2, 8), {"kv_index": []}),
}
LARGE = ("256 queries", "an image", "a large image", "a video", "images of any size")


def case(name: str, size: float = 1.0) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """(draws q, k and v; the other arguments)"""
    (b, queries, images, n, heads, d), given = CASES[name]
    of = {key: torch.tensor(v, dtype=torch.int64, device=DEVICE) for key, v in given.items()}
    packed = "cu_seqlens" in of
    shape = (max(given["cu_seqlens"]) + 1, heads, d) if packed else (images, n, heads, d)

    def draw() -> dict[str, Any]:
        shapes = {"q": (b, queries, heads, d), "k": shape, "v": shape}
        return {key: size * torch.randn(s, dtype=torch.float64, device=DEVICE) for key, s in shapes.items()}

    return draw, of | ({"longest": n} if packed else {})


def runner(function: Callable[..., Any], **options: Any) -> Callable[[Any, str], Results]:
    def run(given: dict[str, Any], backend: str) -> Results:
        asked = {} if backend in FORWARD else given
        given = {key: t.detach().clone().requires_grad_(key in asked) for key, t in given.items()}
        o, lse = function(**given, **options, return_lse=True, backend=backend)
        g = torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=DEVICE).sin().view_as(o)
        leaves = [given[key] for key in asked]
        grads = dict(zip(asked, torch.autograd.grad(o, leaves, g) if leaves else (), strict=True))
        # eager's lse of 16 bits is of rounded scores
        stats = {"lse": lse.nan_to_num(neginf=-1)} if o.dtype.itemsize > 2 else {}
        return {"o": o.detach()} | stats | {f"d {name}": t for name, t in grads.items()}

    return run


def judged(draws: Any) -> None:
    """Of the results that ours has: float64 has lse, too."""
    draws = list(draws)
    judge([tuple({name: r[name] for name in draws[0][0]} for r in sides) for sides in draws])  # type: ignore[misc]


def runs(backend: str, call: Callable[[], Any], dtype: torch.dtype = torch.float32) -> bool:
    if INTERPRET and backend == "triton" and dtype == torch.bfloat16:
        return False
    return backend in backends(call)


# where one key has all of the probability, forward and backward take the difference of equal products
@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, t) for n in CASES for t in (DTYPES[:1] if n in LARGE else DTYPES)], ids=str
)
def test_every_implementation(name: str, dtype: torch.dtype, backend: str) -> None:
    draw, of = case(name)
    given = {key: t.to(dtype) for key, t in draw().items()}
    # an emulated GPU is slow
    left = name == "a video" and DEVICE == "cpu" and backend in ("cuda", "triton")
    if left or not runs(backend, lambda: few_query_attention(**given, **of), dtype):
        pytest.skip(f"{backend} does not run in {dtype} here")
    judged(compared(runner(few_query_attention, **of), draw, backend, dtype))


@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("name", ["queries of a Q-Former", "shared", "packed"])
def test_large_scores(name: str, backend: str) -> None:
    """Probabilities of 0 and 1: of scores in the hundreds."""
    draw, of = case(name, 8.0)
    if not runs(backend, lambda: few_query_attention(**{key: t.float() for key, t in draw().items()}, **of)):
        pytest.skip(f"{backend} does not run here")
    # the largest error of such scores is that of a few rows
    judged(compared(runner(few_query_attention, **of), draw, backend, torch.float32, draws=16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_image_in_several_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if "chunked" not in OURS:
        pytest.skip("blocks are of a CPU")
    monkeypatch.setattr("mmfuse.kernels.qformer.blocked._BLOCK_BYTES", 2 * 4 * 7 * 3)
    draw, of = case("shared")
    judged(compared(runner(few_query_attention, **of), draw, "chunked", dtype))


@pytest.mark.parametrize("backend", [*OURS, "sdpa"])
def test_any_strides(backend: str) -> None:
    """Keys and values of one buffer of all layers, queries and gradients of any layout."""
    kv = torch.randn(2, 7, 3, 2, 2, 16, device=DEVICE)
    k, v = kv[:, :, 1].unbind(2)
    q = torch.randn(2, 2, 16, 3, device=DEVICE).permute(0, 3, 1, 2)
    g = torch.randn(2, device=DEVICE)[:, None, None, None].expand(2, 3, 2, 16)

    def run(backend: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(backend not in FORWARD) for t in (q, k, v)]
        o = few_query_attention(*leaves, backend=backend).o
        return [o.detach(), *(() if backend in FORWARD else torch.autograd.grad(o, leaves, g))]

    for got, want in zip(run(backend), run("torch"), strict=backend not in FORWARD):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("name", ["lengths", "shared", "packed"])
def test_any_strides_of_what_says_which_keys(name: str, backend: str) -> None:
    draw, of = case(name)
    given = {key: t.float() for key, t in draw().items()}
    spread = of | {key: torch.stack([t, t + 1], 1)[:, 0] for key, t in of.items() if isinstance(t, Tensor)}
    if not runs(backend, lambda: few_query_attention(**given, **of)):
        pytest.skip(f"{backend} does not run here")
    assert torch.equal(*(few_query_attention(**given, **which, backend=backend).o for which in (of, spread)))


@pytest.mark.parametrize("backend", OURS)
def test_padding_is_not_read(backend: str) -> None:
    q, k, v = (torch.randn(2, 3, 2, 16, device=DEVICE) for _ in range(3))
    lengths = torch.tensor([2, 0], device=DEVICE)
    want = few_query_attention(q, k, v, lengths=lengths, backend=backend).o
    k[0, 2:], v[0, 2:], k[1], v[1] = (math.nan,) * 4
    leaves = [t.requires_grad_(backend not in FORWARD) for t in (q, k, v)]
    o = few_query_attention(*leaves, lengths=lengths, backend=backend).o
    torch.testing.assert_close(o, want)
    assert not o[1].any()
    if backend in FORWARD:
        return
    grads = torch.autograd.grad(o.sum(), leaves)
    assert all(t.isfinite().all() for t in grads) and not grads[1][0, 2:].any() and not grads[2][1].any()


@pytest.mark.parametrize("backend", [*OURS, "sdpa", "torch"])
def test_two_runs_are_equal(backend: str) -> None:
    draw, of = case("packed" if backend == "cpu" else "shared")
    given = {key: t.float().requires_grad_(backend not in FORWARD) for key, t in draw().items()}
    o, again = (few_query_attention(**given, **of, backend=backend).o for _ in range(2))
    assert torch.equal(o, again)
    if backend not in FORWARD:
        first, second = (torch.autograd.grad(o.sum(), list(given.values()), retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "sdpa", "torch"])
@pytest.mark.parametrize("n", [8, 70])
def test_dropout(backend: str, n: int) -> None:
    """Which probabilities are kept shows where the values are unit vectors; o and the gradients follow from it."""
    b, queries, heads, p = 2, 16, 2, 0.25
    q, k = torch.randn(b, queries, heads, 16, device=DEVICE), torch.randn(b, n, heads, 16, device=DEVICE)
    if backend not in backends(lambda: few_query_attention(q, k, k, dropout=p)):
        pytest.skip(f"{backend} does not run here")

    def attend(v: Tensor, **leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        return few_query_attention(leaves.get("q", q), leaves.get("k", k), v, dropout=p, backend=backend).o

    # head dims differ: the probabilities do not, as queries and keys end in zeros
    wide = [F.pad(t, (0, n - 16)) if n > 16 else t for t in (q, k)]
    factor = (wide[0].shape[-1] / 16) ** 0.5
    unit = torch.eye(n, max(n, 16), device=DEVICE)[None, :, None].expand(b, -1, heads, -1)
    shown = attend(unit, q=wide[0] * factor, k=wide[1])[..., :n]  # [B, Q, H, N]
    whole = few_query_attention(q, k, k, return_map=True).map.transpose(1, 2)
    kept = shown != 0
    torch.testing.assert_close(shown, torch.where(kept, whole / (1 - p), 0), rtol=1e-4, atol=1e-6)
    # 5 standard deviations; of neighbours, heads and rows, too, as independent draws have it
    for pair in (kept, kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1], kept[..., 1:] & kept[..., :-1]):
        share = 1 - p if pair is kept else (1 - p) ** 2
        assert abs(pair.double().mean().item() - share) < 5 * math.sqrt(2 * share * (1 - share) / pair.numel())
    assert (kept[:, :, 0] != kept[:, :, 1]).any()

    leaves = [torch.randn_like(t).requires_grad_() if t is k else t.clone().requires_grad_() for t in (k, q, k)]
    v, q_, k_ = leaves
    g = torch.randn(b, queries, heads, 16, device=DEVICE)
    got = torch.autograd.grad(attend(v, q=q_, k=k_), (q_, k_, v), g)
    probabilities = few_query_attention(q_, k_, v, return_map=True).map
    want = torch.where(kept.transpose(1, 2), probabilities / (1 - p), 0) @ v.transpose(1, 2)
    want = torch.autograd.grad(want.transpose(1, 2), (q_, k_, v), g)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "torch"])
def test_dropout_follows_the_generator(backend: str) -> None:
    q, k = torch.randn(2, 3, 2, 16, device=DEVICE), torch.randn(2, 40, 2, 16, device=DEVICE)
    if backend not in backends(lambda: few_query_attention(q, k, k, dropout=0.5)):
        pytest.skip(f"{backend} does not run here")
    torch.manual_seed(0)
    first, other = (few_query_attention(q, k, k, dropout=0.5, backend=backend).o for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, few_query_attention(q, k, k, dropout=0.5, backend=backend).o)
    assert not torch.equal(first, other)


# --- the map --------------------------------------------------------------------------------------------------------


def test_the_map_has_a_gradient() -> None:
    q, k, v = (torch.randn(2, 3, 2, 4, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(3))
    o, lse, p = few_query_attention(q, k, v, return_map=True)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(lse))
    (of_map,) = torch.autograd.grad(o.sum(), p)
    torch.testing.assert_close(of_map, v.sum(-1).transpose(1, 2)[:, :, None].expand_as(p))
    with pytest.raises(UnsupportedError, match="return_map"):
        few_query_attention(q, k, v, return_map=True, backend="chunked")


# --- over the tokens themselves -------------------------------------------------------------------------------------


TOKENS = [*OURS, "absorbed"]  # whose names there are


def tokens_case(rows: int, queries: int, n: int, biases: bool) -> Callable[[], dict[str, Any]]:
    def draw() -> dict[str, Any]:
        shapes = {"q": (rows, queries, 2, 16), "x": (3, n, 24), "key_weight": (32, 24), "value_weight": (32, 24)}
        shapes |= {"value_bias": (32,), "bias": (3, n)} if biases else {}
        scale = {"key_weight": 24**-0.5, "value_weight": 24**-0.5}
        return {
            name: scale.get(name, 1.0) * torch.randn(s, dtype=torch.float64, device=DEVICE)
            for name, s in shapes.items()
        }

    return draw


@pytest.mark.parametrize("rows", [1, 3])
def test_groups_of_images(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed, several images share a product with the weights, or each has its own; or there are no queries."""
    given = {name: t.cpu() for name, t in tokens_case(rows, 5, 9, True)().items()}
    together = token_attention(**given, backend="chunked", return_lse=True)
    monkeypatch.setattr(absorbed, "_GROUP_BYTES", 0)
    for got, want in zip(token_attention(**given, backend="chunked", return_lse=True), together, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    none = token_attention(**(given | {"q": given["q"][:, :0]}), backend="chunked", return_lse=True)
    assert none.o.shape == (3, 0, 2, 16) and none.lse is not None and none.lse.shape == (3, 2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", [None, [9, 0, 4]], ids=["whole", "lengths"])
@pytest.mark.parametrize(("rows", "queries", "biases"), [(1, 1, True), (3, 5, True), (1, 5, False), (3, 2, False)])
def test_tokens(rows: int, queries: int, biases: bool, lengths: Any, dtype: torch.dtype) -> None:
    draw = tokens_case(rows, queries, 9, biases)
    of = {} if lengths is None else {"lengths": torch.tensor(lengths, device=DEVICE)}
    given = {name: t.to(dtype) for name, t in draw().items()}
    for backend in TOKENS:
        if runs(backend, lambda: token_attention(**given, **of), dtype):
            judged(compared(runner(token_attention, **of), draw, backend, dtype))


@pytest.mark.parametrize("backend", [*TOKENS, "sdpa", "torch"])
def test_hidden_tokens(backend: str) -> None:
    """By a bias, as by lengths; no lengths are none of its tokens, and a NaN behind the last one is not read."""
    given, n = {name: t.float() for name, t in tokens_case(1, 2, 9, True)().items()}, [4, 9, 0]
    given["bias"].zero_()
    lengths = torch.tensor(n, device=DEVICE)
    behind = torch.arange(9, device=DEVICE) >= lengths[:, None]
    if backend not in backends(lambda: token_attention(**given)):
        del given["bias"]  # there is none in Triton, nor in torch's
    want = token_attention(**given, lengths=lengths, backend="torch").o
    given["x"] = given["x"].masked_fill(behind[..., None], torch.nan)
    given |= {name: t.masked_fill(behind, torch.nan) for name, t in given.items() if name == "bias"}
    if backend not in backends(lambda: token_attention(**given)):
        pytest.skip(f"{backend} does not run here")
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    o = token_attention(**leaves, lengths=lengths, backend=backend).o
    torch.testing.assert_close(o, want)
    grads = torch.autograd.grad(o.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads) and not grads[list(leaves).index("x")][behind].any()
    if "bias" in given:
        x = given["x"].detach().nan_to_num()[:2]
        hidden = given["bias"].detach().masked_fill(behind, -torch.inf)[:2]
        got = token_attention(**given | {"x": x, "bias": hidden}, backend=backend).o
        torch.testing.assert_close(got, want[:2])


def test_tokens_are_attended_to_where_that_is_cheaper() -> None:
    if DEVICE == "cuda":
        pytest.skip("weights are absorbed on a CPU")

    def why(queries: int, n: int, dtype: torch.dtype = torch.float32, asked: bool = False) -> list[str]:
        shapes = ((1, queries, 12, 64), (1, n, 1408), (768, 1408))
        q, x, w = (torch.empty(shape, dtype=dtype) for shape in shapes)
        return reasons(lambda: token_attention(q, x.requires_grad_(asked), w, w))["chunked"]

    assert not why(1, 729) and not why(32, 257) and not why(16, 257, asked=True)
    assert why(256, 257) and why(32, 257, asked=True) and why(1, 257, torch.bfloat16, asked=True)


# --- keys and values ------------------------------------------------------------------------------------------------


def test_project_kv_normalises_without_a_gradient_of_frozen_tokens() -> None:
    x = torch.randn(2, 5, 12, device=DEVICE)
    weight, gamma, beta = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((3, 2, 8, 12), (12,), (12,)))
    bias = torch.randn(3, 2, 8, device=DEVICE)
    kv = project_kv(x, weight, bias, 2, (gamma, beta, 1e-5))
    seen = F.layer_norm(x, (12,), gamma, beta, 1e-5)
    torch.testing.assert_close(
        kv[:, :, 1, 1].flatten(2), F.linear(seen, weight[1, 1], bias[1, 1]), rtol=1e-4, atol=1e-5
    )
    assert all(t is not None for t in torch.autograd.grad(kv.square().sum(), (weight, gamma, beta)))


# --- errors and tools -----------------------------------------------------------------------------------------------

Q, KEYS = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q": ({"q": Q[0]}, ValueError, r"q has shape \(3, 2, 4\), expected \[B, Q, H, d\]"),
    "rows of q": ({"q": torch.randn(3, 3, 2, 4)}, ValueError, "q has 3 rows, expected 2 as the images, or 1"),
    "k": ({"k": KEYS[..., :3]}, ValueError, r"k has shape .* expected \[I, N, 2, 4\] as q"),
    "v": ({"v": KEYS[:, :3]}, ValueError, r"v has shape .* as k"),
    "dtype": ({"v": KEYS.double()}, TypeError, "v has dtype torch.float64, expected torch.float32 as q"),
    "index": ({"kv_index": torch.tensor([0, 2])}, ValueError, "kv_index has 2, expected 0 <= kv_index < 2"),
    "index dtype": ({"kv_index": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "kv_index has dtype torch.int32"),
    "lengths": ({"lengths": torch.tensor([6, 1])}, ValueError, "lengths has 6"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout is 1.0, expected 0 <= dropout < 1"),
    "longest": ({"longest": 5}, ValueError, "longest is 5, expected None without cu_seqlens"),
    "bounds": (
        {"k": KEYS[0], "v": KEYS[0], "cu_seqlens": torch.tensor([0, 2, 6]), "longest": 4},
        ValueError,
        "cu_seqlens is .* expected bounds that do not fall, from 0 to the 5 rows of k",
    ),
    "too long": (
        {"k": KEYS[0], "v": KEYS[0], "cu_seqlens": torch.tensor([0, 2, 5]), "longest": 2},
        ValueError,
        "longest is 2, expected at least 3",
    ),
    "both": (
        {"k": KEYS[0], "v": KEYS[0], "cu_seqlens": torch.tensor([0, 5]), "longest": 5, "lengths": torch.tensor([5])},
        ValueError,
        "lengths and cu_seqlens are both given",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    given, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        few_query_attention(**{"q": Q, "k": KEYS, "v": KEYS} | given)


@pytest.mark.parametrize("backend", [b for b in OURS if b != "triton" or INTERPRET])
def test_opcheck(backend: str) -> None:
    draw, of = case("packed" if backend == "cpu" else "packed, shared")
    leaves = {key: t.float().requires_grad_(backend not in FORWARD) for key, t in draw().items()}
    opcheck(lambda: few_query_attention(**leaves, **of, backend=backend).o)


def test_derivatives() -> None:
    q, k, v = (torch.randn(2, 2, 1, 3, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(3))
    index = torch.tensor([1, 1], device=DEVICE)

    def attend(*given: Tensor) -> Tensor:
        return few_query_attention(*given, index, return_lse=True).o

    assert torch.autograd.gradcheck(attend, (q, k, v)) and torch.autograd.gradgradcheck(attend, (q, k, v))
    torch.testing.assert_close(torch.func.vmap(attend)(*(t[None] for t in (q, k, v)))[0], attend(q, k, v))


def test_autocast() -> None:
    q, k = (torch.randn(2, n, 2, 16, device=DEVICE).requires_grad_() for n in (3, 5))
    with torch.autocast(DEVICE, torch.bfloat16):
        o = few_query_attention(q, k, k).o
    want = few_query_attention(*(t.bfloat16() for t in (q, k, k))).o
    assert o.dtype == torch.bfloat16 and torch.equal(o, want)
    grads, expected = (torch.autograd.grad(t.float().square().sum(), (q, k)) for t in (o, want))
    assert all(t.dtype == torch.float32 for t in grads) and all(map(torch.equal, grads, expected))


def test_checkpointing_repeats_what_was_dropped() -> None:
    q, k, v = (torch.randn(2, 3, 2, 16, device=DEVICE).requires_grad_() for _ in range(3))

    def attend(*given: Tensor) -> Tensor:
        return few_query_attention(*given, dropout=0.5).o.square().sum()

    results = []
    for run in (attend, lambda *given: checkpoint(attend, *given, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(q, k, v), (q, k, v)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", OURS)
def test_values_near_the_end_of_float16(backend: str) -> None:
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (3, 70, 70))
    given = (100 * q).half(), (100 * k).half(), (6e4 * v.sign()).half()  # scores beyond 65504, too
    if not runs(backend, lambda: few_query_attention(*given)):
        pytest.skip(f"{backend} does not take float16")
    got = few_query_attention(*given, backend=backend).o
    want = few_query_attention(*(t.double() for t in given)).o
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0)


class _Waits(TorchDispatchMode):
    """Notes the operations for which a host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split("::")[1] in ("_local_scalar_dense", "nonzero", "equal", "unique_consecutive"):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRET, reason="a GPU says so itself: test_token_ops_in_graphs.py")
def test_launches_wait_for_nothing_and_an_image_that_is_not_there_is_no_number() -> None:
    kernel = pytest.importorskip("mmfuse.kernels.qformer.kernel")
    q, k, v = (torch.randn(n, 3, 2, 16) for n in (3, 2, 2))
    keys = Keys(k, v, torch.tensor([1, 5, -1]), torch.tensor([3, 2]), None, 3)
    with _Waits() as waits:
        found = kernel.attend(q, keys, True, None, 0.0)
        grads = kernel.attend_grads(torch.ones_like(found.o), q, keys, found, [True] * 3, None, 0.0)
    assert not waits.found
    assert found.o[0].isfinite().all() and found.o[1:].isnan().all()
    assert grads["q"][0].isfinite().all() and grads["q"][1:].isnan().all() and grads["k"].isfinite().all()


def test_a_named_implementation_runs_or_raises() -> None:
    q, k = torch.randn(2, 3, 1, 160, device=DEVICE), torch.randn(2, 5, 1, 160, device=DEVICE)
    with use_backend("triton"), pytest.raises(UnsupportedError, match="the head dim is 160|device is cpu"):
        few_query_attention(q, k, k)
