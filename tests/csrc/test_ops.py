"""Each compiled operation against its formula in float64, on every device whose part is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from judge import assert_no_worse
from mmfuse.kernels._runtime.library import load

SHAPES = [(1, 1), (3, 7), (64, 65), (129, 1000), (70, 1540)]
DIAGONALS = [0, 5, -2, 10_000]
# tests/cuda_emulation runs the operators of a GPU on tensors of the CPU
ON = {"cpu": "cpu", "cuda": "cuda" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(params=["cpu", "cuda"])
def part(request: pytest.FixtureRequest) -> str:
    reason = load(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def positives(u: Tensor, diagonal: int) -> Tensor:
    row, col = (torch.arange(n, device=u.device) for n in u.shape)
    return col == row[:, None] + diagonal


def logit_stats(part: str, u: Tensor, scale: float, diagonal: int, state=None, step=None):
    """(row_max, row_sum, col_max, col_sum, q)"""
    c, n = u.shape
    row_max, row_sum = torch.empty(c, device=ON[part]), torch.empty(c, device=ON[part])
    col_max, col_sum = state or (torch.full((n,), -math.inf, device=ON[part]), torch.zeros(n, device=ON[part]))
    q = torch.empty(0 if step is None else (c, n), dtype=torch.int16, device=ON[part])
    step = torch.empty(0, device=ON[part]) if step is None else step
    op = getattr(torch.ops, f"mmfuse_{part}").logit_stats
    op(u, torch.tensor(scale, device=ON[part]), diagonal, step, row_max, row_sum, col_max, col_sum, q)
    return row_max, row_sum, col_max, col_sum, q


def check_stats(part: str, u: Tensor, scale: float, diagonal: int) -> None:
    u = u.to(ON[part])
    row_max, row_sum, col_max, col_sum, _ = logit_stats(part, u, scale, diagonal)

    def formula(u: Tensor) -> tuple[Tensor, ...]:
        s = (scale * u).masked_fill(positives(u, diagonal), -math.inf)
        return s.amax(1), s.logsumexp(1), s.amax(0), s.logsumexp(0)

    got = row_max, row_max + row_sum.log(), col_max, col_max + col_sum.log()
    for name, *results in zip(
        ("row_max", "row_lse", "col_max", "col_lse"), got, formula(u), formula(u.double()), strict=True
    ):
        assert_no_worse(*results, name=name)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stats(part: str, shape: tuple[int, int], diagonal: int) -> None:
    check_stats(part, 0.3 * torch.randn(shape), 20.0, diagonal)


def mixed(kind: str, c: int = 130, n: int = 1100) -> Tensor:
    """Cosines whose rows, columns or single elements differ by as much as cosines can."""
    u = 0.1 * torch.randn(c, n)
    sign_row = torch.where(torch.arange(c) % 3 == 0, -0.9, 0.9)[:, None]
    sign_col = torch.where(torch.arange(n) % 5 == 0, -0.9, 0.9)
    return {
        "rows": u + sign_row,
        "columns": u + sign_col,
        "both": u + (sign_row + sign_col) / 2,
        "negative": u - 0.9,
        "one": u.index_put((torch.tensor(7), torch.tensor(400)), torch.tensor(1.0)),
        "row": u.index_fill(0, torch.tensor(7), 1.0),
        "equal": torch.ones(c, n),
    }[kind]


@pytest.mark.parametrize("kind", ["rows", "columns", "both", "negative", "one", "row", "equal"])
@pytest.mark.parametrize("scale", [100.0, 0.0, -100.0])
def test_stats_of_any_spread(part: str, kind: str, scale: float) -> None:
    check_stats(part, mixed(kind), scale, 3)


def test_stats_over_chunks(part: str) -> None:
    u = mixed("both").to(ON[part])
    whole = logit_stats(part, u, 100.0, 1)
    state, rows = None, []
    for chunk, first in zip(u.split(50), range(0, 130, 50), strict=True):
        *row, col_max, col_sum, _ = logit_stats(part, chunk.contiguous(), 100.0, first + 1, state)
        state = col_max, col_sum
        rows.append(row)
    assert torch.equal(torch.cat([r[0] for r in rows]), whole[0])
    torch.testing.assert_close(torch.cat([r[1] for r in rows]), whole[1], rtol=1e-6, atol=0)
    assert torch.equal(state[0], whole[2])
    torch.testing.assert_close(state[1], whole[3], rtol=1e-5, atol=0)


def test_stats_show_nan(part: str) -> None:
    u = 0.1 * torch.randn(70, 600)
    u[2, 5] = u[40, 30] = math.nan
    u[50, 54] = math.nan  # a positive: no part of the statistics
    row_max, row_sum, col_max, col_sum, _ = logit_stats(part, u.to(ON[part]), 20.0, 4)
    for t in (row_max, row_sum):
        assert t.isnan().nonzero().flatten().tolist() == [2, 40]
    for t in (col_max, col_sum):
        assert t.isnan().nonzero().flatten().tolist() == [5, 30]


def test_fixed_point(part: str) -> None:
    u = 0.3 * torch.randn(66, 520, device=ON[part])
    u[3] = 0
    step = u.abs().amax(1) / 32767
    *stats, q = logit_stats(part, u, 20.0, 0, step=step)
    assert q[3].eq(0).all()
    # half a step, and what the division rounds
    error = (q * step[:, None] - u).abs()
    assert (error <= step[:, None] * 0.505).all()
    # the statistics are those of the kept logits
    for got, expected in zip(stats, logit_stats(part, q * step[:, None], 20.0, 0), strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    *_, q = logit_stats(part, u, 20.0, 0, step=step / 2)
    assert q.amin() == -32767 and q.amax() == 32767


def test_fixed_point_shows_nan(part: str) -> None:
    u = torch.randn(6, 20, device=ON[part])
    u[2, 5] = math.nan
    row_max, row_sum, col_max, col_sum, _ = logit_stats(part, u, 20.0, 0, step=torch.full((6,), 1e-3, device=ON[part]))
    assert row_sum.isnan().nonzero().flatten().tolist() == [2]
    assert col_sum.isnan().nonzero().flatten().tolist() == [5]


def grad_formula(u: Tensor, scale: float, a, rho, b, kappa, d, shift: float, diagonal: int):
    """(G, row sums of G u); a weight of 0 leaves its normaliser without effect."""
    s = scale * u
    a, rho, b, kappa, d = (t.to(u.dtype) for t in (a, rho, b, kappa, d))
    rho, kappa = rho.masked_fill(a == 0, math.inf), kappa.masked_fill(b == 0, math.inf)
    g = a[:, None] * (s - rho[:, None]).exp() + b * (s - kappa).exp() - shift
    g = torch.where(positives(u, diagonal), d[:, None], g)
    return g, (g * u).sum(1)


def logit_grad(part: str, u: Tensor, scale: float, *vectors: Tensor, shift: float, diagonal: int, step=None, g=None):
    g = torch.empty(u.shape, device=ON[part]) if g is None else g
    dot = torch.empty(u.shape[0], device=ON[part])
    step = torch.empty(0, device=ON[part]) if step is None else step
    op = getattr(torch.ops, f"mmfuse_{part}").logit_grad
    op(u, torch.tensor(scale, device=ON[part]), *vectors, shift, diagonal, step, g, dot)
    return g, dot


def vectors_for(u: Tensor, scale: float, diagonal: int) -> tuple[Tensor, ...]:
    """a, rho, b, kappa, d as a loss has them: rho and kappa are log-sum-exps."""
    s = scale * u.float()
    row, col = s.logsumexp(1), s.logsumexp(0)
    (c, n), device = u.shape, u.device
    return torch.rand(c, device=device), row, torch.rand(n, device=device), col, torch.randn(c, device=device)


def check_grad(part: str, u: Tensor, scale: float, diagonal: int, *vectors: Tensor, step=None) -> None:
    got = logit_grad(part, u, scale, *vectors, shift=0.25, diagonal=diagonal, step=step)
    raw = u.float() if step is None else u * step[:, None]
    exact_raw = u.double() if step is None else u.double() * step[:, None].double()
    eager = grad_formula(raw, scale, *vectors, 0.25, diagonal)
    exact = grad_formula(exact_raw, scale, *vectors, 0.25, diagonal)
    assert_no_worse(got[0], eager[0], exact[0], name="g")
    # float32 within a block of 512 columns, where each addition rounds once; float64 until stored
    rounding = 513 * 2**-24 * (exact[0] * exact_raw).abs().sum(1)
    assert ((got[1] - exact[1]).abs() <= 2 * (eager[1] - exact[1]).abs().amax() + rounding).all()


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grad(part: str, shape: tuple[int, int], diagonal: int) -> None:
    u = 0.3 * torch.randn(shape, device=ON[part])
    check_grad(part, u, 20.0, diagonal, *vectors_for(u, 20.0, diagonal))


@pytest.mark.parametrize("kind", ["rows", "columns", "both", "negative", "one", "row", "equal"])
def test_grad_of_any_spread(part: str, kind: str) -> None:
    u = mixed(kind).to(ON[part])
    check_grad(part, u, 100.0, 3, *vectors_for(u, 100.0, 3))


@pytest.mark.parametrize("kind", ["rows", "negative"])
def test_grad_of_one_side(part: str, kind: str) -> None:
    u = mixed(kind).to(ON[part])
    a, rho, b, kappa, d = vectors_for(u, 100.0, 3)
    unused = torch.full_like
    check_grad(part, u, 100.0, 3, a, rho, torch.zeros_like(b), unused(kappa, -math.inf), d)
    check_grad(part, u, 100.0, 3, torch.zeros_like(a), unused(rho, math.nan), b, kappa, d)
    check_grad(part, u, 100.0, 3, a * (torch.arange(130, device=ON[part]) > 9), rho, b * (kappa > 0), kappa, d)


def test_grad_from_fixed_point(part: str) -> None:
    u = mixed("columns").to(ON[part])
    step = u.abs().amax(1) / 32767
    *_, q = logit_stats(part, u, 30.0, 2, step=step)
    check_grad(part, q, 30.0, 2, *vectors_for(u, 30.0, 2), step=step)


def test_grad_in_place(part: str) -> None:
    u = mixed("both").to(ON[part])
    vectors = vectors_for(u, 100.0, 3)
    g, dot = logit_grad(part, u, 100.0, *vectors, shift=0.1, diagonal=3)
    again, again_dot = logit_grad(part, u, 100.0, *vectors, shift=0.1, diagonal=3, g=u)
    assert torch.equal(u, g) and again is u
    assert torch.equal(again_dot, dot)


def test_grad_overflows_only_where_the_formula_does(part: str) -> None:
    u = mixed("both").to(ON[part])
    a, rho, b, kappa, d = vectors_for(u, 100.0, 3)
    vectors = a + 0.5, rho - 60 * torch.rand_like(rho) - 60, b + 0.5, kappa, d
    g, _ = logit_grad(part, u, 100.0, *vectors, shift=0.0, diagonal=3)
    exact, _ = grad_formula(u.double(), 100.0, *vectors, 0.0, 3)
    assert exact.amax() > 1e40 and not g.isnan().any()
    # an exponential is infinite from 2^127.5 on
    finite = exact.abs() < 1e38
    assert g[~finite].gt(9e37).all()
    torch.testing.assert_close(g[finite].double(), exact[finite], rtol=1e-4, atol=1e-6)


def test_grad_shows_nan(part: str) -> None:
    u = 0.1 * torch.randn(70, 600, device=ON[part])
    a, rho, b, kappa, d = vectors_for(u, 20.0, 4)
    u[2, 5], rho[40], kappa[30] = math.nan, math.nan, math.nan
    g, dot = logit_grad(part, u, 20.0, a, rho, b, kappa, d, shift=0.0, diagonal=4)
    expected = torch.zeros(u.shape, dtype=torch.bool, device=ON[part])
    expected[2, 5] = expected[40] = expected[:, 30] = True
    assert torch.equal(g.isnan(), expected & ~positives(u, 4))
    # row 26 meets column 30 at its positive
    assert dot.isfinite().nonzero().flatten().tolist() == [26]


@pytest.mark.parametrize("kind", ["rows", "columns", "both", "negative", "one", "row", "equal"])
@pytest.mark.parametrize("fixed", [False, True])
def test_probabilities_sum_to_one(part: str, kind: str, fixed: bool) -> None:
    u = mixed(kind).to(ON[part])
    step = u.abs().amax(1) / 32767 if fixed else None
    row_max, row_sum, col_max, col_sum, q = logit_stats(part, u, 100.0, 3, step=step)
    raw = q if fixed else u
    zero_row, zero_col = torch.zeros_like(row_max), torch.zeros_like(col_max)
    rows = (1 / row_sum, row_max, zero_col, zero_col, zero_row)
    cols = (zero_row, zero_row, 1 / col_sum, col_max, zero_row)
    for dim, vectors in ((1, rows), (0, cols)):
        p, _ = logit_grad(part, raw, 100.0, *vectors, shift=0.0, diagonal=3, step=step)
        total = p.double().sum(dim)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**13)])
def test_grad_of_cuda_in_sixteen_bits(dtype: torch.dtype, factor: float) -> None:
    if reason := load("cuda"):
        pytest.skip(reason)
    for shape in SHAPES:
        u = 0.3 * torch.randn(shape, device=ON["cuda"])
        vectors = vectors_for(u, 20.0, 0)
        half = torch.empty(shape, dtype=dtype, device=ON["cuda"])
        full, dot = logit_grad("cuda", u, 20.0, *vectors, shift=0.25, diagonal=0)
        _, half_dot = logit_grad("cuda", u, 20.0, *vectors, shift=0.25, diagonal=0, g=half)
        assert torch.equal(half, (full * factor).to(dtype))
        # 16-bit rows may be unaligned where float32 ones are not: another order of summation
        torch.testing.assert_close(half_dot, dot, rtol=1e-5, atol=1e-5)


def sigmoid_grad(part: str, u: Tensor, scale: float, bias: float, diagonal: int, negative_only: bool, g: Tensor):
    sums = torch.empty(3, u.shape[0], dtype=torch.float64, device=ON[part])
    op = getattr(torch.ops, f"mmfuse_{part}").sigmoid_grad
    op(u, *(torch.tensor(t, device=ON[part]) for t in (scale, bias)), diagonal, negative_only, g, sums)
    return sums


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 0.0), (1.0, 60.0)])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoid(part: str, shape: tuple[int, int], diagonal: int, scale: float, bias: float) -> None:
    u = (0.4 * torch.randn(shape, device=ON[part])).clamp(-1, 1)
    for negative_only in (False, True):

        def formula(u: Tensor, only: bool = negative_only) -> tuple[Tensor, Tensor]:
            s, positive = scale * u + bias, positives(u, diagonal) & (not only)
            loss = torch.nn.functional.softplus(torch.where(positive, -s, s), threshold=1e4)
            g = torch.where(positive, -(-s).sigmoid(), s.sigmoid())
            return g, torch.stack([loss, g, g * u]).double()

        g = torch.empty_like(u)
        sums = sigmoid_grad(part, u, scale, bias, diagonal, negative_only, g)
        (eager, _), (exact, terms) = formula(u), formula(u.double())
        exact_sums, magnitude = terms.sum(2), terms.abs().sum(2)
        assert_no_worse(g, eager, exact, name="g")
        # float32 within a block of 512 columns, each addition rounds once; float64 beyond
        assert ((sums - exact_sums).abs() <= 512 * 2**-24 * magnitude).all()
        assert torch.equal(
            sigmoid_grad(part, u, scale, bias, diagonal, negative_only, torch.empty(0, device=ON[part])), sums
        )
        in_place = u.clone()
        assert torch.equal(sigmoid_grad(part, in_place, scale, bias, diagonal, negative_only, in_place), sums)
        assert torch.equal(in_place, g)


def test_sigmoid_shows_nan(part: str) -> None:
    u = torch.zeros(70, 600, device=ON[part])
    u[2, 5], u[40, 44] = math.nan, math.nan
    g = torch.empty_like(u)
    sums = sigmoid_grad(part, u, 1.0, 0.0, 4, False, g)
    assert torch.equal(g.isnan(), u.isnan())
    assert sums.isnan().any(0).nonzero().flatten().tolist() == [2, 40]


# --- positives of equal keys, and distillation: on the CPU -----------------------------------------------------------


def cpu_op(name: str, *args) -> None:  # type: ignore[no-untyped-def]
    if reason := load("cpu"):
        pytest.skip(reason)
    getattr(torch.ops.mmfuse_cpu, name)(*args)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_positives_of_equal_keys(shape: tuple[int, int], diagonal: int) -> None:
    (c, n), u = shape, torch.randn(shape)
    row_key, col_key = (torch.randint(-1, 4, (k,), dtype=torch.int32) for k in shape)
    row_centre, col_centre, row_sum, before = (torch.randn(k) for k in (c, n, c, n))
    col_sum = before.clone()
    cpu_op("add_positives", u, diagonal, row_key, col_key, row_centre, col_centre, row_sum, col_sum)
    same = row_key[:, None] == col_key
    others = (same & ~positives(u, diagonal)).double()
    expected = (
        ((u.double() - row_centre[:, None]) * others).sum(1),
        ((u.double() - col_centre) * others).sum(0) + before,
    )
    torch.testing.assert_close((row_sum.double(), col_sum.double()), expected, rtol=1e-6, atol=1e-4)

    g, p, q = u.clone(), torch.rand(c), torch.rand(n)
    cpu_op("subtract_targets", g, row_key, col_key, p, q)
    assert torch.equal(g, torch.where(same, u - (p[:, None] + q), u))


@pytest.mark.parametrize("kind", ["rows", "both", "negative", "equal"])
@pytest.mark.parametrize("diagonal", [3, -2, 10_000])
def test_cross_stats_over_chunks(kind: str, diagonal: int) -> None:
    u, t = torch.randn(130, 1100), mixed(kind)
    one = torch.tensor(1.0)
    scale, t_scale = torch.tensor(3.0), torch.tensor(60.0)
    row_centre, col_centre = torch.randn(130), torch.randn(1100)
    col_max, col_sum, col_cross = torch.full((1100,), -math.inf), torch.zeros(1100), torch.zeros(1100)
    rows = []
    for first, last in ((0, 50), (50, 130)):
        chunk = t[first:last].contiguous()
        before = col_max.clone()
        row_max, _, col_max, *_ = logit_stats(
            "cpu", chunk * t_scale, one.item(), diagonal + first, (col_max, col_sum.clone())
        )
        row_sum, row_cross = torch.empty(last - first), torch.empty(last - first)
        largest = (row_max, before, col_max, row_centre[first:last], col_centre)
        into = (row_sum, col_sum, row_cross, col_cross)
        cpu_op("cross_stats", u[first:last].contiguous(), chunk, scale, t_scale, diagonal + first, *largest, *into)
        rows.append((row_max, row_sum, row_cross))
    row_max, row_sum, row_cross = (torch.cat(parts) for parts in zip(*rows, strict=True))
    teacher = (t_scale * t).double().masked_fill(positives(u, diagonal), -math.inf)
    p, q = (teacher - row_max[:, None]).exp(), (teacher - col_max).exp()
    expected = (
        p.sum(1),
        q.sum(0),
        (p * 3.0 * (u.double() - row_centre[:, None])).sum(1),
        (q * 3.0 * (u.double() - col_centre)).sum(0),
    )
    got = tuple(v.double() for v in (row_sum, col_sum, row_cross, col_cross))
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=3e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_distillation(shape: tuple[int, int]) -> None:
    u, t = 0.3 * torch.randn(shape), 0.3 * torch.randn(shape)
    scales = torch.tensor(20.0), torch.tensor(50.0)
    student, teacher = (vectors_for(v, s.item(), 0)[:4] for v, s in zip((u, t), scales, strict=True))
    about = [torch.randn(k) for k in shape for _ in range(3)]  # mean, centre, teacher's centre; rows, columns

    def softmaxes(v: Tensor, scale: Tensor, a: Tensor, rho: Tensor, b: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        s, vectors = scale * v, [w.to(v.dtype) for w in (a, rho, b, kappa)]
        return vectors[0][:, None] * (s - vectors[1][:, None]).exp(), vectors[2] * (s - vectors[3]).exp()

    def formulas(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (p, q), (p_t, q_t) = softmaxes(u, scales[0], *student), softmaxes(t, scales[1], *teacher)
        row, row_c, row_t_c, col, col_c, col_t_c = (v.to(u.dtype) for v in about)
        h = p_t * (row[:, None] - scales[0] * (u - row_c[:, None]))
        k = q_t * (col - scales[0] * (u - col_c))
        return p + q - p_t - q_t, h + k, (h * (t - row_t_c[:, None]) + k * (t - col_t_c)).sum(1)

    got = torch.empty(shape), torch.empty(shape), torch.empty(shape[0], dtype=torch.float64)
    cpu_op("distill_grad", u, t, *scales, *student, *teacher, got[0])
    nowhere = 10 * sum(shape)  # no positive in the block
    cpu_op("teacher_grad", u, t, *scales, *teacher, *about, nowhere, *got[1:])
    got = *got[:2], got[2].float()
    for g, eager, exact in zip(got, formulas(u, t), formulas(u.double(), t.double()), strict=True):
        assert_no_worse(g, eager, exact)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(part: str, shape: tuple[int, int]) -> None:
    u = torch.empty(shape, device=ON[part])
    row_max, row_sum, col_max, col_sum, _ = logit_stats(part, u, 1.0, 0)
    assert row_max.eq(-math.inf).all() and row_sum.eq(0).all()
    assert col_max.eq(-math.inf).all() and col_sum.eq(0).all()
    c, n = (torch.zeros(k, device=ON[part]) for k in shape)
    _, dot = logit_grad(part, u, 1.0, c, c, n, n, c, shift=0.0, diagonal=0)
    assert dot.eq(0).all()
    assert sigmoid_grad(part, u, 1.0, 0.0, 0, False, u).eq(0).all()


def test_any_number_of_threads() -> None:
    if reason := load("cpu"):
        pytest.skip(reason)
    u = mixed("rows")
    vectors = vectors_for(u, 100.0, 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            g = torch.empty_like(u)
            sums = sigmoid_grad("cpu", u, 100.0, 0.0, 3, False, g)
            grads = logit_grad("cpu", u, 100.0, *vectors, shift=0.1, diagonal=3)
            results.append([*logit_stats("cpu", u, 100.0, 3)[:4], *grads, g, sums])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_repeats_bitwise(part: str) -> None:
    u = mixed("both").to(ON[part])
    first, second = (logit_stats(part, u, 100.0, 3)[:4] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_rejects_wrong_tensors(part: str) -> None:
    u = torch.randn(4, 5, device=ON[part])
    vectors = vectors_for(u, 1.0, 0)
    with pytest.raises(RuntimeError, match="u: expected"):
        logit_grad(part, u.t(), 1.0, *vectors, shift=0.0, diagonal=0)
    with pytest.raises(RuntimeError, match="rho: expected"):
        logit_grad(part, u, 1.0, vectors[0], vectors[1][:3], *vectors[2:], shift=0.0, diagonal=0)
    with pytest.raises(RuntimeError, match="g: expected"):
        logit_grad(part, u, 1.0, *vectors, shift=0.0, diagonal=0, g=torch.empty_like(u, dtype=torch.float64))


# --- modality experts -----------------------------------------------------------------------------------------------


def route(part: str, ids: Tensor, experts: int, **other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, order, inverse)"""
    sizes = {"offsets": min(experts + 1, 99), "order": len(ids), "inverse": len(ids)}
    out = {name: torch.empty(n, dtype=torch.int64, device=ON[part]) for name, n in sizes.items()} | other
    getattr(torch.ops, f"mmfuse_{part}").route(*out.values(), ids.to(ON[part]), experts)
    return tuple(t.cpu() for t in out.values())  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [0, 1, 31, 512, 513, 3000])
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 16])
def test_route_is_a_stable_sort(part: str, experts: int, rows: int) -> None:
    for ids in (
        torch.randint(experts, (rows,)),
        torch.full((rows,), experts - 1),
        torch.arange(rows) % experts // 2 * 2,
    ):
        offsets, order, inverse = route(part, ids.clamp(max=experts - 1), experts)
        want = ids.clamp(max=experts - 1)
        assert torch.equal(order, want.argsort(stable=True)) and torch.equal(inverse, order.argsort())
        assert offsets.tolist() == [0, *want.bincount(minlength=experts).cumsum(0).tolist()]


def test_route_rejects_what_does_not_fit(part: str) -> None:
    ids = torch.tensor([0, 1, 1, 0])
    for wrong, experts in ((ids.int(), 2), (ids[None], 2), (ids, 0), (ids, 2**62), (ids, 2**63 - 1)):
        with pytest.raises(RuntimeError, match="expected"):
            route(part, wrong, experts)
    for name in ("offsets", "order", "inverse"):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            route(part, ids, 2, **{name: torch.empty(5, dtype=torch.int64, device=ON[part])})


def test_route_of_ids_out_of_range() -> None:
    """Those on the host are looked at; on a GPU they are some expert's, and nothing is written elsewhere."""
    ids = torch.tensor([0, 5, -1, 2**62, -(2**63), 1])
    for part in ("cpu", "cuda"):
        if load(part):
            continue
        if part == "cpu":
            with pytest.raises(RuntimeError, match="ids: expected 0 <= id < 2, got 5"):
                route(part, ids, 2)
        else:
            assert route(part, ids, 2)[1].sort().values.tolist() == [0, 1, 2, 3, 4, 5]


# --- few queries ----------------------------------------------------------------------------------------------------


def few_queries(**other: Any) -> list[Tensor]:
    """(o, row_max, row_sum) of 3 rows, with other arguments than those of a valid call."""
    if reason := load("cuda"):
        pytest.skip(reason)
    shapes = {"q": (3, 5, 2, 16), "k": (2, 20, 2, 16), "v": (2, 20, 2, 16)}
    given = {name: torch.randn(s).half() for name, s in shapes.items()}
    given |= {"kv_index": torch.tensor([1, 0, 1]), "lengths": None, "bounds": None, "longest": 20}
    given |= {"o": torch.empty(3, 5, 2, 16).half(), "row_max": torch.empty(3, 2, 5), "row_sum": torch.empty(3, 2, 5)}
    args = [t.to(ON["cuda"]) if isinstance(t, Tensor) else t for t in (given | other).values()]
    torch.ops.mmfuse_cuda.few_query_attention(*args)
    return [t.cpu() for t in args[-3:]]


def test_few_queries_on_cuda_of_images_that_are_not_there() -> None:
    for index in (-1, 2, 2**62, -(2**63)):
        o, _, _ = few_queries(kv_index=torch.tensor([0, index, 1]))
        assert o[1].isnan().all() and o[::2].isfinite().all()
    for length in (-5, -(2**63), 0):
        o, row_max, row_sum = few_queries(lengths=torch.tensor([length, 2**62]))
        assert not o[1].any() and row_max[1].eq(-math.inf).all() and not row_sum[1].any() and o[::2].all()
    packed = torch.randn(20, 2, 16).half()
    for bounds in ([0, 2**62, -7], [-(2**63), 30, 2**63 - 1], [40, 5, 0]):
        o, *_ = few_queries(k=packed, v=packed, bounds=torch.tensor(bounds))
        assert o.isfinite().all()


def test_few_queries_on_cuda_reject_what_does_not_fit() -> None:
    wrong = {
        "q": (torch.randn(3, 5, 2, 12).half(), torch.randn(2, 5, 2, 16).half(), torch.randn(3, 5, 16).half()),
        "k": (torch.randn(2, 20, 3, 16).half(), torch.randn(2, 20, 2, 16), torch.randn(2, 20, 2, 32).half()[..., ::2]),
        "v": (torch.randn(2, 19, 2, 16).half(), torch.randn(2, 20, 2, 17).half()[..., 1:]),
        "kv_index": (torch.tensor([1, 0]), torch.tensor([1, 0, 1], dtype=torch.int32)),
        "lengths": (torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.0])),
        "longest": (19, -1, 2**62),
        "o": (torch.empty(3, 5, 2, 8).half(), torch.empty(3, 5, 2, 16)),
        "row_sum": (torch.empty(3, 2, 4), torch.empty(3, 2, 5).double()),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match="expected"):
                few_queries(**{name: value})


@pytest.mark.gpu
def test_rejects_tensors_of_two_devices() -> None:
    if reason := load("cuda"):
        pytest.skip(reason)
    u, none = torch.randn(4, 5), torch.empty(0, device="cuda")  # an argument that is not wanted counts, too
    vectors = vectors_for(u, 1.0, 0)
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.mmfuse_cuda.logit_grad(u, torch.tensor(1.0), *vectors, 0.0, 0, none, torch.empty(4, 5), none)
