"""Products that are not MKL's: against float64 and torch, and never where something else looks on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import Results, assert_no_worse, judge
from mmfuse.fused.qformer import QFormer, QFormerConfig
from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.library import load

pytestmark = pytest.mark.skipif(load("cpu") is not None, reason=f"{load('cpu')}")


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPUs that it is for, at any size."""
    monkeypatch.setattr(products, "half_vectors", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)


def fast(call: Callable[[], object]) -> int:
    """How many products are the compiled part's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return sum(e.count for e in seen.key_averages() if e.key == "mmfuse_cpu::products")


# rows, features and columns at the edges of tiles, and of what is summed at a time; of few rows and of many
SIZES = [
    (1, 1, 1),
    (4, 16, 6),
    (9, 40, 70),
    (19, 801, 197),
    (3, 1540, 20),
    (96, 256, 64),
    (197, 515, 131),
    (101, 777, 65),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(sizes: tuple[int, int, int], bias: bool) -> None:
    m, k, n = sizes

    def draw(strided: bool) -> dict[str, Tensor | None]:
        x, w = torch.randn(m, k + 3), torch.randn(n, 2, k)
        x, w = (x[:, :k], w[:, 1]) if strided else (x[:, 3:].t().contiguous().t(), w[:, 0].contiguous())
        return {"x": x, "weight": w, "bias": torch.randn(n) if bias else None}

    def run(of: Callable[..., Tensor], given: dict[str, Tensor | None], double: bool = False) -> Results:
        return {"y": of(*(t.double() if double and t is not None else t for t in given.values()))}

    draws = [draw(i % 2 == 0) for i in range(8)]
    assert fast(lambda: products.linear(**draws[0])) == 1  # type: ignore[arg-type]
    judge((run(products.linear, d), run(F.linear, d), run(F.linear, d, True)) for d in draws)
    given = draws[0]
    assert torch.equal(products.linear(**given), products.linear(**given))  # type: ignore[arg-type]


def laid_out(rows: int, columns: int, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, columns + 3)[:, 1 : columns + 1] if layout == "part" else torch.randn(rows, columns)


@pytest.mark.parametrize("layouts", ["rows rows", "transposed rows", "rows transposed", "part part", "part transposed"])
@pytest.mark.parametrize(
    "shape",
    [(17, 1, 3), (5, 33, 7), (64, 77, 130), (30, 600, 9), (103, 300, 70), (0, 3, 2), (3, 2, 0), (3, 0, 2)],
    ids=str,
)
def test_mm(shape: tuple[int, int, int], layouts: str) -> None:
    (m, k, n), (left, right) = shape, layouts.split()

    def draw() -> list[Tensor]:
        return [laid_out(m, k, left), laid_out(k, n, right), torch.randn(m, n), torch.randn(n)]

    def ours(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Results:
        empty = partial(torch.full, (m, n), torch.nan)
        return {
            "a b": products.mm(a, b),
            "out": products.mm(a, b, empty()),
            "part of out": products.mm(a, b, torch.full((m, n + 2), torch.nan)[:, 1:-1]),
            "added": products.add_mm_(c.clone(), a, b),
            "added to a transposed one": products.add_mm_(c.t().clone(memory_format=torch.contiguous_format).t(), a, b),
            "linear": products.linear(a, b.t(), d, c),
            "linear out": products.linear(a, b.t(), d, c, empty()),
            "linear without a bias": products.linear(a, b.t(), None, c, empty()),
        }

    def torchs(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Results:
        y = a @ b
        plain = dict.fromkeys(("a b", "out", "part of out"), y)
        added = dict.fromkeys(("added", "added to a transposed one", "linear without a bias"), y + c)
        return plain | added | dict.fromkeys(("linear", "linear out"), y + c + d)

    draws = [draw() for _ in range(4)]
    judge((ours(*d), torchs(*d), torchs(*(t.double() for t in d))) for d in draws)


@pytest.mark.parametrize("transposed", [True, False])
def test_several_at_once(transposed: bool) -> None:
    a, b = torch.randn(3, 13, 30), torch.randn(3, 149, 30).mT if transposed else torch.randn(3, 30, 149)
    assert fast(lambda: products.mm(a, b)) == 1
    assert torch.equal(products.mm(a, b)[1], products.mm(a[1], b[1]))
    assert_no_worse(products.mm(a, b), a @ b, a.double() @ b.double())


@pytest.mark.parametrize("transposed", [True, False])
def test_long_sums_round_as_mkls(transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(256, 4096), torch.randn(256, 4096).t() if transposed else torch.randn(4096, 256)
    exact = a.double() @ b.double()
    error, eager = ((y - exact).square().mean() for y in (products.mm(a, b), a @ b))
    assert error < 1.5**2 * eager


def test_results_are_written_where_they_belong() -> None:
    a, b, out = torch.randn(4, 5), torch.randn(5, 6), torch.zeros(4, 6)
    for b_ in (b, b.t().contiguous().t()):
        for got in (products.mm(a, b_, out), products.linear(a, b_.t(), out=out), products.add_mm_(out, a, b_)):
            assert got.data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, 2 * (a @ b))


@pytest.mark.parametrize("rows", [33, 200])
def test_threads_change_nothing(rows: int) -> None:
    x, w, before = torch.randn(rows, 900), torch.randn(500, 900), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(products.linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(("rows", "features"), [(9, 40), (9, 300), (100, 300)])
def test_not_a_number_stays_in_its_row(rows: int, features: int) -> None:
    x, w = torch.ones(rows, features), torch.ones(30, features)
    x[3, 7], w[5, 2] = torch.nan, torch.inf
    y = products.linear(x, w)
    assert torch.equal(y.isnan(), F.linear(x, w).isnan()) and torch.equal(y.isinf(), F.linear(x, w).isinf())


def test_what_looks_on() -> None:
    """Gradients, transforms, autocast, a graph and other dtypes have torch's own product."""
    x, w = torch.randn(4, 8), torch.nn.Parameter(torch.randn(6, 8))
    assert products.linear(x, w).requires_grad and not fast(lambda: products.linear(x, w))
    with torch.no_grad():
        assert fast(lambda: products.linear(x, w)) == 1
        assert not fast(lambda: torch.func.vmap(products.linear, (0, None))(x, w))
        assert not fast(lambda: torch.func.jvp(lambda x: products.linear(x, w), (x,), (x,)))
        assert products.linear(x.double(), w.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert products.linear(x, w).dtype == torch.bfloat16
        exported = torch.export.export(Wrapped(w), (x,))
        assert "mmfuse" not in str(exported.graph)


class Wrapped(torch.nn.Module):
    def __init__(self, w: torch.nn.Parameter):
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, self.w)


def test_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "half_vectors", lambda: True)
    x, w = torch.randn(32, 256), torch.randn(256, 256)
    assert fast(lambda: products.linear(x, w)) == 1 and not fast(lambda: products.linear(x[:8], w))


@pytest.mark.parametrize("shape", [(17, 1, 3), (5, 33, 7), (64, 76, 130), (103, 1025, 70), (0, 3, 2)], ids=str)
@pytest.mark.parametrize("layouts", ["rows rows", "transposed rows", "rows transposed", "part part"])
def test_bfloat16_summed_in_float32(shape: tuple[int, int, int], layouts: str) -> None:
    """Where a CPU has such products they are the compiled part's; elsewhere both operands become float32."""
    (m, k, n), (left, right) = shape, layouts.split()

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        return laid_out(m, k, left).bfloat16(), laid_out(k, n, right).bfloat16(), torch.randn(m, n)

    def ours(a: Tensor, b: Tensor, c: Tensor) -> Results:
        y = torch.full((m, n), torch.nan)
        got = products.mm(products.operand(a, y.dtype), products.operand(b, y.dtype), y)
        assert got.data_ptr() == y.data_ptr()
        columns = c.t().clone(memory_format=torch.contiguous_format).t()
        return {
            "a b": got,
            "as they are": products.mm(a, b, torch.full((m, n), torch.nan)),
            "added": products.add_mm_(c.clone(), a, b),
            "added to a transposed one": products.add_mm_(columns, a, b),
        }

    def formula(a: Tensor, b: Tensor, c: Tensor) -> Results:
        y = a @ b
        return dict.fromkeys(("a b", "as they are"), y) | dict.fromkeys(("added", "added to a transposed one"), y + c)

    draws = [draw() for _ in range(4)]
    if products.pairs():
        assert fast(lambda: ours(*draws[0])) == 4
    float32, exact = ([formula(*(t.to(dtype) for t in d)) for d in draws] for dtype in (torch.float32, torch.float64))
    judge(zip((ours(*d) for d in draws), float32, exact, strict=True))


@pytest.mark.parametrize("once", [True, False])
def test_a_q_former(once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QFormerConfig(20, 32, 2, 2, 64, vocab_size=30, max_position_embeddings=6)
    model = QFormer(config).eval().requires_grad_(False)
    query, x, ids = torch.randn(1, 3, 32), torch.randn(2, 5, 20), torch.randint(30, (2, 4))

    def run(dtype: torch.dtype) -> Tensor:
        of = model.to(dtype)
        kv = of.project(x.to(dtype), torch.tensor([5, 2]), once=once)
        return torch.cat(of(query.to(dtype), [ids], kv=kv), 1)

    with torch.no_grad():
        assert fast(lambda: run(torch.float32)) > 10
        got = run(torch.float32)
        monkeypatch.undo()
        assert_no_worse(got, run(torch.float32), run(torch.float64))


def test_layers_that_are_called_as_they_are() -> None:
    """Hooks and adapters around a product stay; a gradient has torch's own."""
    layer, seen = torch.nn.Linear(8, 6), []
    layer.register_forward_hook(lambda module, inputs, y: seen.append(y) or y + 1)
    x = torch.randn(4, 8)

    def run() -> Tensor:
        with products.linears(x):
            return layer(x)

    with torch.no_grad():
        assert fast(run) == 1
        seen.clear()
        assert_no_worse(run(), layer(x), layer.double()(x.double()))
        assert len(seen) == 3
    layer.float()
    assert not fast(run) and run().requires_grad
    with torch.no_grad():
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(), run())
