"""The Triton kernels of the contrastive template, called directly, against float64 formulas.

Without a GPU they run in Triton's interpreter (float32, float16, float64; its bfloat16 is not a GPU's).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import Results, judge

pytest.importorskip("triton")

from mmfuse.kernels.contrastive import blocked, clip_loss, kernel  # noqa: E402

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16 if GPU else torch.float64]
# (b, N, D, row_offset)
SHAPES = [(1, 1, 16, 0), (2, 7, 96, 5), (7, 65, 770, 0), (63, 64, 16, 1), (65, 129, 16, 64)]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Several squares of G and several launches of `stats`, at the sizes of a test."""
    monkeypatch.setattr(kernel, "_SQUARE", 64)
    monkeypatch.setattr(kernel, "_ROWS", 64)


def pairs(b: int, n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return tuple(F.normalize(torch.randn(k, d, device=device), dim=-1).to(dtype) for k in (b, n))


def tensor(value: float, x: Tensor) -> Tensor:
    return torch.tensor(value, dtype=blocked.accumulation_dtype(x.dtype), device=x.device)


STATISTICS = ("row_max", "row_lse", "col_max", "col_lse", "positive")


def plain_stats(x: Tensor, y: Tensor, scale: Tensor, row_offset: int) -> tuple[Tensor, ...]:
    u = (x @ y.T).to(scale.dtype)
    pair = paired(u, row_offset)
    s = (u * scale).masked_fill(pair, -torch.inf)
    return s.amax(1), s.logsumexp(1), s.amax(0), s.logsumexp(0), u[pair]


def paired(u: Tensor, row_offset: int) -> Tensor:
    rows, columns = (torch.arange(k, device=u.device) for k in u.shape)
    return rows[:, None] + row_offset == columns


def meant(row_max, row_sum, col_max, col_sum, positive, logits):  # type: ignore[no-untyped-def]
    """What `stats` returned, as the quantities that mean something by themselves."""
    return row_max, row_max + row_sum.log(), col_max, col_max + col_sum.log(), positive


def named(names: tuple[str, ...], found: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Results:
    return {name: t for name, t, need in zip(names, found, needs, strict=True) if need}


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def check_stats(draw, scale: float, row_offset: int) -> None:  # type: ignore[no-untyped-def]
    def results(x: Tensor, y: Tensor) -> tuple[Results, ...]:
        s = tensor(scale, x)
        got = meant(*kernel.stats(x, y, s, row_offset, "", maxima=True))
        # without the maxima, what the sums are relative to is free
        _, row, _, column, _ = meant(*kernel.stats(x, y, s, row_offset, ""))
        both = (plain_stats(*given, row_offset) for given in ((x, y, s), double(x, y, s)))
        found = [dict(zip(STATISTICS, results, strict=True)) for results in (got, *both)]
        for results, lse in zip(
            found, ((row, column), *((f["row_lse"], f["col_lse"]) for f in found[1:])), strict=True
        ):
            results |= {"row": lse[0], "column": lse[1]}
        return tuple(found)

    judge(results(*draw()) for _ in range(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats(shape, dtype, device):
    *sizes, row_offset = shape
    check_stats(lambda: pairs(*sizes, dtype, device), 20.0, row_offset)


@pytest.mark.parametrize("spread", ["narrow", "wide", "negative"])
def test_stats_at_scale_100(spread, device):
    def draw() -> tuple[Tensor, Tensor]:
        x, y = pairs(70, 90, 16, torch.float32, device)
        if spread == "wide":  # rows whose best logit is near 0 beside rows that reach 100: no common offset
            x[:40] = y[40:80]
            x[40:] *= 0.01
        elif spread == "negative":  # the best cosine of these rows is below 0
            y = F.normalize(y + 3 * y[:1], dim=-1)
            x[:50] = -y[:50]
        return x, y

    check_stats(draw, 100.0, 3)


@pytest.mark.parametrize("scale", [0.0, -5.0])
def test_stats_any_scale(scale, device):
    check_stats(lambda: pairs(33, 66, 16, torch.float32, device), scale, 0)


def test_zero_rows(device):
    x, y = pairs(20, 70, 16, torch.float32, device)
    x[3], y[5], y[64] = 0, 0, 0
    for save in ("", "int16"):
        row_max, row_sum, *_ = kernel.stats(x, y, tensor(10.0, x), 0, save)
        torch.testing.assert_close(row_max[3] + row_sum[3].log(), torch.tensor(69.0, device=device).log())


def test_a_nan_is_seen_in_its_row_and_its_column(device):
    x, y = pairs(70, 70, 16, torch.float32, device)
    x[5, 3] = torch.nan
    row_max, row_sum, col_max, col_sum, *_ = kernel.stats(x, y, tensor(10.0, x), 0, "")
    assert row_sum[5].isnan() and row_max[5].isnan()
    assert not torch.cat([row_sum[:5], row_sum[6:], row_max[:5], row_max[6:]]).isnan().any()
    # the positive of row 5 is no negative of column 5
    assert col_sum[:5].isnan().all() and col_sum[6:].isnan().all() and not col_sum[5].isnan()
    y, x = x, y
    row_max, row_sum, *_ = kernel.stats(x, y, tensor(10.0, x), 0, "int16")
    assert row_sum.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_logits(dtype, device):
    x, y = pairs(65, 70, 96, dtype, device)
    x[7] = 0
    u = x.double() @ y.double().T
    scale = tensor(20.0, x)
    full = kernel.stats(x, y, scale, 2, "full")[-1]
    assert full.dtype == scale.dtype
    judge([({"full": full}, {"full": (x @ y.T).to(scale.dtype)}, {"full": u})])
    *found, q = kernel.stats(x, y, scale, 2, "int16")
    assert q.dtype == torch.int16
    step = blocked.fixed_point_step(x, y).double()
    kept = q.double() * step[:, None]
    assert ((kept - u).abs() <= 0.5001 * step[:, None] + 1e-6).all()
    # the statistics are those of the kept logits
    rows = torch.arange(65, device=device)
    exact = (kept * scale.double()).index_put((rows, rows + 2), tensor(-torch.inf, x).double()).logsumexp(1)
    torch.testing.assert_close((found[0] + found[1].log()).double(), exact, rtol=0, atol=1e-5)


def grad_arguments(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """(a, rho, b, kappa, d) as a loss would give them, for a scale of 20."""
    acc = blocked.accumulation_dtype(x.dtype)
    s = 20 * (x.double() @ y.double().T)
    a, b, d = (torch.rand(k, device=x.device, dtype=acc) for k in (len(x), len(y), len(x)))
    b[::3] = 0
    return a, s.logsumexp(1).to(acc), b, s.logsumexp(0).to(acc), d - 1


def plain_grad(x, y, u, scale, alpha, a, rho, b, kappa, d, shift, row_offset, x_inv=None, y_inv=None):  # type: ignore[no-untyped-def]
    """(dx, dy, ds) for the logits scale * u, with the whole of G in the dtype of x."""
    s = scale * u.to(scale.dtype)
    g = a[:, None] * torch.exp(s - rho[:, None]) + b * torch.exp(s - kappa) - shift
    g = torch.where(paired(u, row_offset), d[:, None], g)
    dx, dy = ((scale * alpha).to(x.dtype) * (m @ v) for m, v in ((g.to(x.dtype), y), (g.to(x.dtype).T, x)))
    if x_inv is not None:
        dx = (dx - x * (x * dx).sum(1, keepdim=True)) * x_inv[:, None]
        dy = (dy - y * (y * dy).sum(1, keepdim=True)) * y_inv[:, None]
    return dx, dy, alpha * (g.to(x.dtype) * (x @ y.T)).sum().to(alpha.dtype)


def check_grad(draw, arguments, row_offset, save="", shift=0.0, scale=20.0, inverse=(), needs=(True, True, True)):  # type: ignore[no-untyped-def]
    def results(x: Tensor, y: Tensor) -> tuple[Results, ...]:
        s, alpha = tensor(scale, x), tensor(0.7, x)
        given = (s, alpha, *arguments(x, y))
        logits = blocked.stats(blocked.TorchTile, x, y, s, row_offset, save)[-1]
        u, exact_u = x @ y.T, x.double() @ y.double().T
        if save == "int16":
            u = logits.to(s.dtype) * blocked.fixed_point_step(x, y)[:, None]
            exact_u = u.double()
        got = kernel.grad(x, y, *given, shift, row_offset, logits, *(inverse or (None, None)), *needs)
        assert all(t.numel() == 0 for t, need in zip(got, needs, strict=True) if not need)
        eager = plain_grad(x, y, u, *given, shift, row_offset, *inverse)
        exact = plain_grad(*double(x, y), exact_u, *double(*given), shift, row_offset, *double(*inverse))
        return tuple(named(("dx", "dy", "ds"), found, needs) for found in (got, eager, exact))

    judge(results(*draw()) for _ in range(3))


@pytest.mark.parametrize("save", ["", "int16", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:-1], ids=str)
def test_grad(shape, dtype, save, device):
    *sizes, row_offset = shape
    check_grad(
        lambda: pairs(*sizes, dtype, device),
        grad_arguments,
        row_offset,
        save,
        shift=0.01,
    )


@pytest.mark.usefixtures("equal_products")
def test_grad_at_scale_100_with_a_wide_spread(device):
    def draw() -> tuple[Tensor, Tensor]:
        x, y = pairs(70, 80, 16, torch.float32, device)
        x[:30] = y[10:40]
        return x, y

    def arguments(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        # normalisers far above and far below the logits of a tile
        a, b, d = torch.ones(70, device=device), torch.ones(80, device=device), torch.zeros(70, device=device)
        s = 100 * (x.double() @ y.double().T)
        rho, kappa = s.logsumexp(1).float(), s.logsumexp(0).float()
        rho[33], b[7] = torch.inf, 0
        return a, rho, b, kappa, d

    check_grad(draw, arguments, 10, scale=100.0)


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, True), (False, False, True), (True, True, False)])
def test_grad_computes_only_what_is_needed(needs, device):
    check_grad(lambda: pairs(65, 70, 16, torch.float32, device), grad_arguments, 1, needs=needs)


def test_grad_goes_through_the_normalisation(device):
    inverse = torch.rand(65, device=device) + 0.5, torch.rand(70, device=device) + 0.5
    check_grad(lambda: pairs(65, 70, 16, torch.float32, device), grad_arguments, 0, inverse=inverse)


def plain_sigmoid(x, y, scale, bias, row_offset, negative_only):  # type: ignore[no-untyped-def]
    leaves = [t.detach().requires_grad_() for t in (x, y, scale, bias)]
    s = (leaves[2] * (leaves[0] @ leaves[1].T)).to(scale.dtype) + leaves[3]
    z = torch.where(paired(s, row_offset) & (not negative_only), 1.0, -1.0)
    loss = -F.logsigmoid(z * s).sum() / len(x)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


SIGMOID = ("loss", "dx", "dy", "ds", "db")


def check_sigmoid(draw, scale, bias, row_offset, negative_only=False, needs=(True, True)):  # type: ignore[no-untyped-def]
    def results(x: Tensor, y: Tensor) -> tuple[Results, ...]:
        given = (tensor(scale, x), tensor(bias, x), row_offset, negative_only)
        loss, dx, dy, ds, db = kernel.sigmoid(x, y, *given, None, None, *needs)
        assert dx.dtype == dy.dtype == loss.dtype  # to be rounded when they have been scaled
        got = (loss, dx.to(x.dtype), dy.to(y.dtype), ds, db)
        wanted = (True, *needs, True, True)
        assert all(t.numel() == 0 for t, need in zip(got, wanted, strict=True) if not need)
        both = (plain_sigmoid(x, y, *given), plain_sigmoid(*double(x, y, *given[:2]), *given[2:]))
        return tuple(named(SIGMOID, found, wanted) for found in (got, *both))

    judge(results(*draw()) for _ in range(3))


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid(shape, dtype, negative_only, device):
    *sizes, row_offset = shape
    check_sigmoid(lambda: pairs(*sizes, dtype, device), 10.0, -8.0, row_offset, negative_only)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_sigmoid_computes_only_what_is_needed(needs, device):
    check_sigmoid(lambda: pairs(65, 70, 16, torch.float32, device), 10.0, -8.0, 2, needs=needs)


def test_sigmoid_keeps_the_digits_of_certain_pairs(device):
    def draw() -> tuple[Tensor, Tensor]:
        x, _ = pairs(40, 40, 16, torch.float32, device)
        return x, x

    check_sigmoid(draw, 60.0, -30.0, 0)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_strides(layout, device):
    x = {
        "transposed": lambda: torch.randn(32, 40, device=device).t(),
        "sliced": lambda: torch.randn(40, 64, device=device)[:, ::2],
        "expanded": lambda: torch.randn(1, 32, device=device).expand(40, 32),
        "offset": lambda: torch.randn(40, 33, device=device)[:, 1:],
    }[layout]()
    y = torch.randn(48, 32, device=device)
    scale, alpha = tensor(20.0, x), tensor(1.0, x)
    plain = x.clone(memory_format=torch.contiguous_format)
    for got, want in zip(kernel.stats(x, y, scale, 0, ""), kernel.stats(plain, y, scale, 0, ""), strict=True):
        torch.testing.assert_close(got, want)
    given = (y, scale, alpha, *grad_arguments(plain, y), 0.0, 0, x.new_empty(0), None, None, True, True, True)
    for got, want in zip(kernel.grad(x, *given), kernel.grad(plain, *given), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("b, n", [(0, 0), (0, 5), (5, 0)])
def test_nothing_to_do(b, n, device):
    x, y = torch.randn(b, 16, device=device), torch.randn(n, 16, device=device)
    one = tensor(1.0, x)
    row_max, row_sum, col_max, col_sum, _, logits = kernel.stats(x, y, one, 0, "int16")
    assert row_max.eq(-torch.inf).all() and col_max.eq(-torch.inf).all() and not row_sum.any() and not col_sum.any()
    assert logits.shape == (b, n)
    rows, cols = torch.zeros(b, device=device), torch.zeros(n, device=device)
    settings = (y, one, one, rows, rows, cols, cols, rows, 0.0, 0, x.new_empty(0), None, None, True, True, True)
    dx, dy, ds = kernel.grad(x, *settings)
    assert dx.shape == x.shape and dy.shape == y.shape and not dx.any() and not dy.any() and ds == 0
    loss, dx, dy, ds, db = kernel.sigmoid(x, y, one, one, 0, False, None, None, True, True)
    assert loss == 0 and not dx.any() and not dy.any() and ds == 0 and db == 0


def test_two_runs_are_equal(device):
    x, y = pairs(70, 90, 16, torch.float32, device)
    settings = (tensor(30.0, x), tensor(-3.0, x), 0, False, None, None, True, True)
    for first, second in zip(kernel.sigmoid(x, y, *settings), kernel.sigmoid(x, y, *settings), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(
        kernel.stats(x, y, settings[0], 0, "full"), kernel.stats(x, y, settings[0], 0, "full"), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_a_direction_without_weight_has_no_offset(weights: tuple[float, float], device: str) -> None:
    """Its normalisers are infinite: the exponentials take theirs from the other direction."""
    x, y = (torch.randn(5, 17, device=device, requires_grad=True) for _ in range(2))
    found = [
        torch.autograd.grad(clip_loss(x, y, 3.0, weights=weights, backend=backend), (x, y), materialize_grads=True)
        for backend in ("triton", "torch")
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    nothing = torch.autograd.grad(clip_loss(x, y, 3.0, weights=(0.0, 0.0), backend="triton"), (x, y))
    assert not any(d.any() for d in nothing)
