"""The compiled part's products: against float64 and torch, and never where something else looks on."""

from __future__ import annotations

from collections.abc import Callable

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
    monkeypatch.setattr(products, "_FEWEST", 0)


def compiled(call: Callable[[], object]) -> int:
    """How many products the compiled part computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return sum(e.count for e in seen.key_averages() if e.key == "mmfuse_cpu::products")


# rows, features and columns at the edges of tiles, and of what is summed at a time
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 16, 6), (9, 40, 70), (19, 801, 197), (3, 1540, 20)], ids=str)
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
    assert compiled(lambda: products.linear(**draws[0])) == 1  # type: ignore[arg-type]
    judge((run(products.linear, d), run(F.linear, d), run(F.linear, d, True)) for d in draws)
    given = draws[0]
    assert torch.equal(products.linear(**given), products.linear(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(2, 3, 8, 24), (3, 13, 30, 149), (1, 7, 780, 65)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_matmul(sizes: tuple[int, ...], transposed: bool) -> None:
    h, m, k, n = sizes

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(m, h, k).transpose(0, 1), torch.randn(h, n, k).mT if transposed else torch.randn(h, k, n)

    draws = [draw() for _ in range(4)]
    assert compiled(lambda: products.matmul(*draws[0])) == 1
    judge(({"y": products.matmul(x, y)}, {"y": x @ y}, {"y": x.double() @ y.double()}) for x, y in draws)
    x, y = draws[0]
    assert torch.equal(products.matmul(x[0], y[0]), products.matmul(x, y)[0])


def test_threads_change_nothing() -> None:
    x, w, before = torch.randn(33, 900), torch.randn(500, 900), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(products.linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_not_a_number_stays_in_its_row() -> None:
    x, w = torch.ones(9, 40), torch.ones(30, 40)
    x[3, 7], w[5, 2] = torch.nan, torch.inf
    y = products.linear(x, w)
    assert torch.equal(y.isnan(), F.linear(x, w).isnan()) and torch.equal(y.isinf(), F.linear(x, w).isinf())


def test_what_looks_on() -> None:
    """Gradients, transforms, autocast, a graph and other dtypes have torch's own product."""
    x, w = torch.randn(4, 8), torch.nn.Parameter(torch.randn(6, 8))
    assert products.linear(x, w).requires_grad and not compiled(lambda: products.linear(x, w))
    with torch.no_grad():
        assert compiled(lambda: products.linear(x, w)) == 1
        assert not compiled(lambda: torch.func.vmap(products.linear, (0, None))(x, w))
        assert not compiled(lambda: torch.func.jvp(lambda x: products.linear(x, w), (x,), (x,)))
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
    assert compiled(lambda: products.linear(x, w)) == 1 and not compiled(lambda: products.linear(x[:8], w))


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
        assert compiled(lambda: run(torch.float32)) > 10
        got = run(torch.float32)
        monkeypatch.undo()
        assert_no_worse(got, run(torch.float32), run(torch.float64))
