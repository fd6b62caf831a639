"""The k most similar of a gallery: every implementation against a stable sort of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mmfuse
from judge import assert_no_worse
from mmfuse.kernels.contrastive.topk import similarity_topk
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: similarity_topk(PROBE, PROBE, 1))
OURS = [n for n in ALL if n != "torch"]


def whole_numbers(b: int, n: int, d: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Scores that every dtype holds exactly, most of them several times."""
    return [torch.randint(-2, 3, (m, d), device=DEVICE).to(dtype) for m in (b, n)]


def by_sorting(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    s = queries.double() @ gallery.double().t()
    s = torch.where(s > -torch.inf, s, -torch.inf)  # NaN too
    value, index = s.sort(dim=1, descending=True, stable=True)
    return value[:, :k], index[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("b, n, k", [(1, 1, 1), (1, 300, 5), (70, 300, 1), (33, 130, 20), (3, 90, 90)])
@pytest.mark.parametrize("backend", ALL)
def test_ties_come_in_the_order_of_the_gallery(backend: str, b: int, n: int, k: int, dtype: torch.dtype) -> None:
    queries, gallery = whole_numbers(b, n, dtype=dtype)
    if backend not in backends(lambda: similarity_topk(queries, gallery, k)):
        pytest.skip(f"{backend} does not take {dtype} or k = {k}")
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    value, index = similarity_topk(queries, gallery, k, backend=backend)
    expected = by_sorting(queries, gallery, k)
    assert value.dtype == torch.promote_types(dtype, torch.float32) and index.dtype == torch.int64
    assert torch.equal(value.double(), expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", OURS)
def test_values_match_float64(backend: str, dtype: torch.dtype) -> None:
    queries, gallery = (torch.randn(m, 96, device=DEVICE).to(dtype) for m in (40, 500))
    value, index = similarity_topk(queries, gallery, 9, backend=backend)
    exact = torch.gather(queries.double() @ gallery.double().t(), 1, index)
    eager = torch.gather(queries.float() @ gallery.float().t(), 1, index)
    assert_no_worse(value, eager, exact)
    # nothing larger was left out, up to the rounding of a score
    best = by_sorting(queries, gallery, 9)[0]
    assert_no_worse(value, (queries.float() @ gallery.float().t()).topk(9).values, best)


@pytest.mark.parametrize("backend", OURS)
def test_blocks_do_not_change_the_result(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = whole_numbers(50, 2500)
    monkeypatch.setattr("mmfuse.kernels.contrastive.topk.blocked._ROWS", 16)
    monkeypatch.setattr("mmfuse.kernels.contrastive.topk.blocked._BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 1))
    value, index = similarity_topk(queries, gallery, 12, backend=backend)
    expected = by_sorting(queries, gallery, 12)
    assert torch.equal(value.double(), expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_a_number_comes_last(backend: str) -> None:
    queries, gallery = whole_numbers(5, 40)
    gallery[3], gallery[8, 0], queries[2] = torch.nan, torch.inf, torch.nan
    value, index = similarity_topk(queries, gallery, 40, backend=backend)
    assert torch.equal(index, by_sorting(queries, gallery, 40)[1])
    assert torch.equal(index[2], torch.arange(40, device=DEVICE))
    assert (value[2] == torch.finfo(torch.float32).min).all() and not value.isnan().any()


@pytest.mark.parametrize("backend", ALL)
def test_strides_and_no_queries(backend: str) -> None:
    queries, gallery = whole_numbers(7, 60)
    expected = by_sorting(queries, gallery, 4)
    strided = similarity_topk(queries.t().contiguous().t(), gallery.repeat(1, 2)[:, :6], 4, backend=backend)
    assert torch.equal(strided[1], expected[1])
    assert [t.shape for t in similarity_topk(queries[:0], gallery, 4, backend=backend)] == [(0, 4), (0, 4)]


def test_inputs_stay_and_no_gradient_flows() -> None:
    queries, gallery = whole_numbers(7, 60)
    before = queries.clone()
    value, _ = similarity_topk(queries.requires_grad_(), gallery, 4)
    assert torch.equal(queries, before) and not value.requires_grad


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend: str) -> None:
    queries, gallery = whole_numbers(5, 20)
    opcheck(lambda: similarity_topk(queries, gallery, 3, backend=backend))


def test_compile() -> None:
    queries, gallery = whole_numbers(7, 60)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, g: similarity_topk(q, g, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, gallery)[1], by_sorting(queries, gallery, 4)[1])


def test_errors() -> None:
    queries, gallery = whole_numbers(7, 60)
    for k in (0, 61):
        with pytest.raises(ValueError, match=f"k is {k}, expected at least 1 and at most the 60 rows of gallery"):
            similarity_topk(queries, gallery, k)
    with pytest.raises(TypeError, match="k is 1.5, expected an integer"):
        similarity_topk(queries, gallery, 1.5)
    with pytest.raises(ValueError, match=r"gallery has shape .*expected \[N, 6\], as many features per row as queries"):
        similarity_topk(queries, gallery[:, :5], 3)
    with pytest.raises(TypeError, match="gallery has dtype torch.float64"):
        similarity_topk(queries, gallery.double(), 3)
    if "triton" in ALL:
        gallery = torch.ones(100, 6, device=DEVICE)
        with pytest.raises(mmfuse.UnsupportedError, match="lists of at most 64"):
            similarity_topk(queries, gallery, 65, backend="triton")


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    queries, gallery = whole_numbers(64, 500)
    similarity_topk(queries, gallery, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in OURS:
            similarity_topk(queries, gallery, 10, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
