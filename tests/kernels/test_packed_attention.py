"""Attention among the rows of each sample in Triton, by groups of samples and by torch's flex_attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from judge import Results, compared, judge
from mmfuse.kernels.multiway import attention
from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.routing import Part, Routing
from registered import opcheck, reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")


def splits(kept: bool = True) -> Routing:
    """Samples of two segments, one of them without the first."""
    n = torch.tensor([1, 2, 6, 3], device=DEVICE) if kept else None
    return Routing.from_splits(torch.tensor([3, 5, 0, 4], device=DEVICE), 7, n)


def mixed() -> Routing:
    """Pairs, an image alone and a text alone; texts have padding, and one of two places in a table."""
    of = torch.tensor
    parts = [
        Part(0, 3, 5, of([0, 1, 2], device=DEVICE), place=3),
        Part(1, 2, 3, of([0, 1], device=DEVICE), of([3, 1], device=DEVICE)),
        Part(1, 1, 3, of([3], device=DEVICE), of([2], device=DEVICE)),
    ]
    return Routing.of(parts, 2, samples=4, device=DEVICE)


CAPTIONS = (("all", "none"), ("all", "causal"))
# routing, what segments see, heads, their width, whether there is a bias
CASES = {
    "splits": (splits, None, 2, 5, False),
    "splits, bias": (splits, None, 1, 8, True),
    "captions": (splits, CAPTIONS, 1, 8, False),
    "causal over another": (splits, (("causal", "causal"), ("none", "all")), 1, 8, True),
    "parts": (mixed, None, 1, 8, True),
    "several tiles": (lambda: Routing.from_split(1, 150, 70, device=DEVICE), CAPTIONS, 1, 8, True),
    "grouped heads": (splits, CAPTIONS, 4, 8, True),
    "one row": (lambda: Routing.from_split(3, 1, 1, device=DEVICE), None, 1, 8, False),
}


def drawn(name: str, rows: int, heads: int, d: int) -> list[Tensor]:
    """q, k and v; of grouped heads two share one of keys and values."""
    of_keys = heads // 2 if name == "grouped heads" else heads
    return [torch.randn(rows, n, d, device=DEVICE) for n in (heads, of_keys, of_keys)]


def run(given: dict[str, Any], backend: str) -> Results:
    leaves = {n: given[n].detach().requires_grad_() for n in ("q", "k", "v", "bias") if given[n] is not None}
    y = packed_attention(
        *(leaves[n] for n in "qkv"), given["routing"], given["sees"], leaves.get("bias"), backend=backend
    )
    found = torch.autograd.grad(y, list(leaves.values()), given["g"])
    return {"out": y.detach()} | {f"d {n}": t for n, t in zip(leaves, found, strict=True)}


def draw(name: str) -> dict[str, Any]:
    make, sees, heads, d, biased = CASES[name]
    routing = make()
    t, p = routing.rows, max(8, routing.longest)
    q, k, v = drawn(name, t, heads, d)
    bias = torch.randn(heads, p, p, device=DEVICE) if biased else None
    g = torch.randn(t, heads * d, device=DEVICE)
    return {"q": q, "k": k, "v": v, "bias": bias, "g": g, "routing": routing, "sees": sees}


@pytest.mark.usefixtures("equal_products")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    judge(compared(run, partial(draw, name), "triton", dtype, 2 if name == "several tiles" else 4))


@pytest.mark.skipif(DEVICE == "cuda", reason="it reads lengths on the host")
@pytest.mark.parametrize("name", [name for name in CASES if name != "one row"])
def test_by_length_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CALL", 0)  # however little it saves
    judge(compared(run, partial(draw, name), "by_length", torch.float32, 4))


@pytest.mark.skipif(DEVICE == "cuda", reason="it reads lengths on the host")
def test_by_length_pads_nothing() -> None:
    """Images, pairs and texts: a product of each kind's own rows, without a mask where no text has padding."""
    parts = [Part(0, 4, 50, torch.arange(4)), Part(1, 4, 20, torch.arange(2, 6))]
    for kept, masked in ((None, [False] * 3), (torch.tensor([20, 20, 20, 7]), [False, False, True])):
        routing = Routing.of([parts[0], parts[1]._replace(kept=kept)], 2, samples=6)
        q = torch.randn(routing.rows, 8, 64)
        assert reasons(lambda: packed_attention(q, q, q, routing))["by_length"] == []  # noqa: B023
        with _Attended() as attended:
            packed_attention(q, q, q, routing)
        assert attended.found == [((2, 8, n, 64), m) for n, m in zip((50, 70, 20), masked, strict=True)]


@pytest.mark.parametrize(("kept", "masked"), [([4, 4, 4], False), ([4, 3, 4], True)])
def test_no_mask_where_all_rows_are_kept(kept: list[int], masked: bool) -> None:
    routing = Routing.of([Part(0, 3, 2), Part(1, 3, 4, kept=torch.tensor(kept))], 2)
    q = torch.randn(18, 2, 8)
    with _Attended() as attended:
        got = packed_attention(q, q, q, routing, backend="torch")
    assert attended.found == [((3, 2, 6, 8), masked)] and routing.kept[:, 1].tolist() == kept
    if not masked:
        torch.testing.assert_close(got, packed_attention(q, q, q, Routing.of([Part(0, 3, 2), Part(1, 3, 4)], 2)))


class _Attended(TorchFunctionMode):
    """The shape of the queries in each call of torch's attention, and whether it has a mask."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[int, ...], bool]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.found.append((tuple(args[0].shape), kwargs["attn_mask"] is not None))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_grouped_heads_are_repeated_ones(backend: str) -> None:
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    normal = partial(torch.randn, dtype=dtype, device=DEVICE, requires_grad=True)
    routing, q, (k, v) = splits(), normal(28, 6, 4), (normal(28, 2, 4) for _ in "kv")
    g = torch.randn(28, 24, dtype=dtype, device=DEVICE)

    def attend(k: Tensor, v: Tensor) -> list[Tensor]:
        y = packed_attention(q, k, v, routing, CAPTIONS, backend=backend)
        return [y, *torch.autograd.grad(y, given, g)]

    given = q, k, v
    repeated = attend(k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    for found, expected in zip(attend(k, v), repeated, strict=True):
        torch.testing.assert_close(found, expected)


def test_groups_that_do_not_fit() -> None:
    routing, q, k = Routing.from_split(1, 4, 2), torch.randn(4, 4, 8), torch.randn(4, 3, 8)
    with pytest.raises(ValueError, match="k has 3 heads, expected a divisor of q's 4"):
        packed_attention(q, k, k, routing)
    with pytest.raises(ValueError, match="k has 0 heads, expected a divisor of q's 4"):
        packed_attention(q, k[:, :0], k[:, :0], routing)
    with pytest.raises(ValueError, match=r"v has shape \(4, 2, 8\), expected \[4, 1, 8\], as k"):
        packed_attention(q, k[:, :1], k[:, :2], routing)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
def test_gradients_of_numbers() -> None:
    routing, normal = Routing.from_split(1, 4, 2), partial(torch.randn, dtype=torch.float64, requires_grad=True)
    given = *(normal(4, 1, 2) for _ in "qkv"), normal(1, 4, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return packed_attention(q, k, v, routing, CAPTIONS, bias, backend="triton")

    assert torch.autograd.gradcheck(attend, given, fast_mode=True)


def test_any_strides_and_two_runs_are_equal() -> None:
    qkv = torch.randn(28, 3, 2, 8, device=DEVICE).requires_grad_()
    bias, g = torch.randn(2, 7, 9, device=DEVICE)[:, :, :7], torch.randn(28, 1, device=DEVICE).expand(28, 16)
    results = []
    for given in (qkv, qkv.detach().clone().requires_grad_()):
        y = packed_attention(*given.unbind(1), splits(), CAPTIONS, bias, backend="triton")
        results += [(y, *torch.autograd.grad(y, given, g))]
    y = packed_attention(*qkv.unbind(1), splits(), CAPTIONS, bias, backend="torch")
    want = y, *torch.autograd.grad(y, qkv, g)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0], want)


def test_only_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfuse.kernels.multiway import attention_kernel

    launched, own = [], attention_kernel.launch
    monkeypatch.setattr(
        attention_kernel, "launch", lambda kernel, *a, **k: launched.append(kernel.__name__) or own(kernel, *a, **k)
    )
    for asked, kernels in (
        ("q", {"_packed_query_grad_kernel"}),
        ("bias", {"_packed_query_grad_kernel", "_packed_bias_grad_kernel"}),
    ):
        given = {n: torch.randn(28, 1, 4, device=DEVICE) for n in "qkv"} | {"bias": torch.randn(1, 7, 7, device=DEVICE)}
        given[asked].requires_grad_()
        y = packed_attention(**given, routing=splits(), backend="triton")
        launched.clear()
        y.sum().backward()
        assert set(launched) == kernels and given[asked].grad is not None


def test_no_rows() -> None:
    q, routing = torch.empty(0, 2, 8, device=DEVICE).requires_grad_(), Routing.from_split(0, 6, 3, device=DEVICE)
    bias = torch.randn(2, 6, 6, device=DEVICE).requires_grad_()
    y = packed_attention(q, q, q, routing, bias=bias, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 16) and not bias.grad.any()


def test_registered() -> None:
    routing = Routing.from_split(1, 4, 2, device=DEVICE)
    q, k, v, bias = (torch.randn(shape, device=DEVICE).requires_grad_() for shape in (*[(4, 1, 4)] * 3, (1, 4, 4)))
    opcheck(lambda: packed_attention(q, k, v, routing, CAPTIONS, bias, backend="triton"))


# --- torch's flex_attention -------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles it")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["splits", "causal over another", "parts"])
def test_flex_attention(name: str) -> None:
    make, sees, heads, d, biased = CASES[name]
    routing, bias = make(), torch.randn(heads, 8, 8) if biased else None
    q, k, v = drawn(name, routing.rows, heads, d)
    got, want = (packed_attention(q, k, v, routing, sees, bias, backend=b) for b in ("flex_attention", "torch"))
    torch.testing.assert_close(got, want)


def test_reasons() -> None:
    q = torch.randn(14, 1, 132, device=DEVICE).requires_grad_()
    told = reasons(lambda: packed_attention(q, q, q, Routing.from_split(2, 7, 4, device=DEVICE), dropout=0.5))
    assert told["triton"][-2:] == ["d is 132, a program holds 1 to 128", "dropout is 0.5"] and told["torch"] == []
    assert "dropout is 0.5" in told["flex_attention"]
    with torch.no_grad():
        told = reasons(lambda: packed_attention(q, q, q, Routing.from_split(2, 7, 4, device=DEVICE)))
    assert told["flex_attention"] == ["it has no gradients on a CPU"] * (DEVICE == "cpu")
    five = Routing.of([Part(0, 2, 1) for _ in range(5)], 1, device=DEVICE)
    told = reasons(lambda: packed_attention(*(torch.randn(10, 1, 4, device=DEVICE) for _ in "qkv"), five))
    assert "a sample has 5 segments, the kernel knows 4 at most" in told["triton"]
    for place in (65535, 65536):
        far = Routing.of([Part(0, 2, 3, place=place)], 1, device=DEVICE)
        told = reasons(lambda far=far: packed_attention(*(torch.randn(6, 1, 4, device=DEVICE) for _ in "qkv"), far))
        assert ("a segment has place 65536, the kernel knows 65535 at most" in told["triton"]) == (place > 65535)
    if DEVICE == "cpu":
        assert "device is cpu" in told["xformers"]
