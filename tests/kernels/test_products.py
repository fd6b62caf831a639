import pytest
import torch

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.numerics import error_and_bound


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


def laid_out(rows, columns, layout):
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "a part":
        return torch.randn(rows, columns + 3)[:, 1 : columns + 1]
    return torch.randn(rows, columns)


@pytest.mark.parametrize("layouts", ["rows rows", "transposed rows", "rows transposed", "a_part a_part"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 33, 7), (64, 77, 130), (130, 600, 9), (0, 3, 2), (2, 0, 3), (3, 2, 0)]
)
def test_products(library, shape, layouts):
    torch.manual_seed(0)
    m, k, n = shape
    left, right = (word.replace("_", " ") for word in layouts.split())
    a, b, c, d = laid_out(m, k, left), laid_out(k, n, right), torch.randn(m, n), torch.randn(n)
    exact = a.double() @ b.double()
    for got, plain, wanted in [
        (products.mm(a, b), a @ b, exact),
        (products.mm(a, products.repeated(b, m), torch.full((m, n), torch.nan)), a @ b, exact),
        (products.mm(a, b, torch.full((m, n + 2), torch.nan)[:, 1:-1]), a @ b, exact),
        (products.add_mm_(c.clone(), a, b), c + a @ b, exact + c),
        (products.linear(a, b.t()), a @ b, exact),
        (products.linear(a, b.t(), d), a @ b + d, exact + d),
        (products.linear(a, b.t(), None, c), a @ b + c, exact + c),
        (products.linear(a, b.t(), d, c), a @ b + c + d, exact + c + d),
        (products.linear(a, b.t(), d, c, torch.full((m, n), torch.nan)), a @ b + c + d, exact + c + d),
    ]:
        assert got.shape == (m, n)
        error, bound, _ = error_and_bound(got, plain, wanted)
        assert error <= bound


def test_long_sums_round_as_mkls(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    a, b = torch.randn(256, 4096), torch.randn(4096, 256)
    exact = a.double() @ b.double()
    one_go = products._onednn(a, b, None, 1)
    error, eager, in_one_go = ((y - exact).square().mean() for y in (products.mm(a, b), a @ b, one_go))
    assert error < 1.5**2 * eager
    assert error < in_one_go


def test_results_are_written_into_out(library):
    a, b, out = torch.randn(4, 5), torch.randn(5, 6), torch.zeros(4, 6)
    for got in (products.mm(a, b, out), products.linear(a, b.t(), out=out), products.add_mm_(out, a, b)):
        assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, 2 * (a @ b))


def test_which_library(monkeypatch):
    called = []
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda a, b, bias, parts: called.append(parts) or a @ b)
    a = torch.randn(128, 128)
    products.mm(a, a)
    assert len(called) == 1
    products.mm(a[:2], a)  # too small
    products.mm(a.double(), a.double())
    products.mm(a.bfloat16(), a.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False):
        products.mm(a, a)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    products.mm(a, a)
    assert len(called) == 1
