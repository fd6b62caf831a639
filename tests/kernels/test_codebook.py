"""Codebooks: every implementation against float64's distances, a loop over the codes, and autograd of the formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, cast, compared, judge
from mmfuse.kernels._runtime import chosen, products
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels.codebook import assign_code, code_statistics, linear_argmax, nearest_code, vector_quantize
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: nearest_code(PROBE, PROBE))
OURS = [n for n in ALL if n != "torch"]
METRICS = ("euclidean", "cosine")
GRADIENTS = ("straight_through", "rotation", "none")


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AVAILABLE = {t: backends(lambda t=t: nearest_code(PROBE.to(t), PROBE.to(t))) for t in DTYPES}


def pairs(names: list[str], dtypes: tuple[torch.dtype, ...] = DTYPES) -> pytest.MarkDecorator:
    """Each implementation with the dtypes that it takes; the interpreter's bfloat16 is not a GPU's."""
    found = [
        (b, t) for b in names for t in dtypes if b in AVAILABLE[t] and (b != "triton" or t != torch.bfloat16 or GPU)
    ]
    return pytest.mark.parametrize("backend, dtype", found, ids=[f"{b}-{t}" for b, t in found])


def random(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=DEVICE).to(dtype), torch.randn(k, d, device=DEVICE).to(dtype)


def by_distance(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    z, e = z.double(), codebook.double()
    if metric == "cosine":
        return (F.normalize(z, dim=1) @ F.normalize(e, dim=1).t()).argmax(1)
    return (z[:, None] - e).square().sum(2).argmin(1)


# --- the nearest code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, d", [(70, 517, 24), (1, 1, 1), (200, 40, 100), (5, 3, 8)])
@pytest.mark.parametrize("metric", METRICS)
@pairs(ALL)
def test_the_nearest_by_float64(backend: str, metric: str, n: int, k: int, d: int, dtype: torch.dtype) -> None:
    z, codebook = random(n, k, d, dtype)
    codes = nearest_code(z, codebook, metric=metric, backend=backend)
    assert codes.dtype == torch.int64 and torch.equal(codes, by_distance(z, codebook, metric))


@pytest.mark.parametrize("backend", OURS)
def test_what_float32_cannot_tell_apart(backend: str) -> None:
    # two codes in the same direction from each row, nearer to one another than float32 scores are exact
    z = F.normalize(torch.randn(96, 32, device=DEVICE), dim=1)
    codebook = torch.cat([z + 1e-3 * torch.randn_like(z), z]) + 0.0
    codebook[:96] = z * (1 + 3e-7)
    expected = by_distance(z, codebook)
    assert torch.equal(nearest_code(z, codebook, backend=backend), expected)
    rounded = torch.addmm(-0.5 * codebook.square().sum(1), z, codebook.t()).argmax(1)
    assert not torch.equal(rounded, expected), "the case is too easy: float32 finds the codes as well"


@pairs(OURS, (torch.float32, torch.bfloat16))
def test_what_rounded_scores_cannot_tell_apart(backend: str, dtype: torch.dtype) -> None:
    # every other pair of neighbouring codes differs in one element, by a rounding of it
    rows, many = (16, 2) if backend == "triton" and INTERPRET else (60, 20)  # the interpreter takes its time
    x, weight = random(rows, 400, 256, dtype)
    weight[1::2] = weight[::2]
    weight[1::4, 0] *= 1 + 2 * torch.finfo(dtype).eps
    expected = (x.double() @ weight.double().t()).argmax(1)
    assert torch.equal(linear_argmax(x, weight, backend=backend), expected)
    for size in (0.1, 10, 1000):
        b = size * torch.randn(400, device=DEVICE)
        expected = (x.double() @ weight.double().t() + b.double()).argmax(1)
        assert torch.equal(linear_argmax(x, weight, b, backend=backend), expected)
    # rows with more candidates than are scored one by one, of no size, and of sizes that float32 does not hold
    weight[100:200] = weight[100]
    x[:many] = weight[100].sign()
    x[-1], x[-2] = 0, x[-2] * 2.0**-70
    x[-3], x[-4] = torch.inf, torch.nan
    s = x.double() @ weight.double().t()
    expected = torch.where(s.isnan().any(1), s.isnan().int().argmax(1), s.argmax(1))
    assert torch.equal(linear_argmax(x, weight, backend=backend), expected)


@pytest.mark.skipif(GPU, reason="how a CPU multiplies float32")
def test_float32_products_that_torch_may_round() -> None:
    z, codebook = random(200, 3000, 64)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        codes = nearest_code(z, codebook, backend="chunked")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(codes, by_distance(z, codebook))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_the_first_of_equal_codes(backend: str, metric: str) -> None:
    z, codebook = random(40, 300, 12)
    # in one slot of the search, in several, and next to one another
    for first, copies in ((5, (69, 133, 261)), (17, (18, 19, 290)), (64, (192, 256))):
        codebook[list(copies)] = codebook[first].clone()
    z[:30] = codebook[torch.tensor([5, 17, 64], device=DEVICE)].repeat(10, 1)
    codes = nearest_code(z, codebook, metric=metric, backend=backend)
    assert codes[:30].tolist() == [5, 17, 64] * 10
    assert torch.equal(codes, by_distance(z, codebook, metric))


@pytest.mark.parametrize("backend", ALL)
def test_the_first_of_what_float64_cannot_tell_apart(backend: str) -> None:
    # the larger score is the second by one rounding of float64, and by more than that
    for step, code in ((2.0**-51, 0), (2.0**-40, 1)):
        x = torch.tensor([[1.0, step]], device=DEVICE)
        weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 0.0]], device=DEVICE)
        assert linear_argmax(x, weight, backend=backend).tolist() == [code]


@pytest.mark.parametrize("k", [100, 128, 200])
@pytest.mark.parametrize("backend", OURS)
def test_a_bias_far_larger_or_smaller_than_the_products(backend: str, k: int) -> None:
    x, weight = random(30, k, 32)
    for size in (1e-12, 1e-3, 1e3, 1e12):
        b = size * torch.randn(k, device=DEVICE)
        # all below 0, so that nothing past the last code is the largest
        b -= b.amax() + 100
        expected = (x.double() @ weight.double().t() + b.double()).argmax(1)
        assert torch.equal(linear_argmax(x, weight, b, backend=backend), expected)


@pytest.mark.skipif("triton" not in ALL, reason="no triton")
def test_few_rows_need_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfuse.kernels.codebook import kernel

    given, launch = {}, kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *how, **given_: given.update(given_) or launch(*how, **given_))
    z, codebook = (F.normalize(t, dim=1) for t in random(100, 600, 32))
    for dtype, metric in ((torch.float32, "euclidean"), (torch.float16, "euclidean"), (torch.float16, "cosine")):
        nearest_code(z.to(dtype), codebook.to(dtype), metric=metric, backend="triton")
        groups = given["groups_ptr"]
        assert (groups[:, 0] < 0).float().mean() <= 0.02
        # and few of more than one group
        assert (groups >= 0).sum() <= 1.3 * len(z)


@pytest.mark.parametrize("backend", ALL)
def test_codes_that_are_all_equal(backend: str) -> None:
    z, codebook = random(9, 150, 4)
    assert nearest_code(z, torch.zeros_like(codebook), backend=backend).tolist() == [0] * 9


@pytest.mark.parametrize("backend", ALL)
def test_codes_and_rows_of_norm_zero(backend: str) -> None:
    z, codebook = random(20, 90, 6)
    codebook[33], z[4] = 0, 0
    assert nearest_code(z, codebook, backend=backend)[4] == 33
    # its cosine with every row is 0, and a row of zeros has the cosine 0 with every code
    codebook[:, 0], z[:, 0] = -1 - codebook[:, 0].abs(), 1 + z[:, 0].abs()
    codebook[33], codebook[:, 1:], z[4] = 0, 0, 0
    codes = nearest_code(z, codebook, metric="cosine", backend=backend)
    assert codes[4] == 0 and (codes[:4] == 33).all() and (codes[5:] == 33).all()


@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_a_number_is_the_largest_as_in_argmax(backend: str) -> None:
    z, codebook = random(12, 80, 6)
    z[3], z[5, 2] = torch.nan, torch.inf
    s = z.double() @ codebook.double().t() - codebook.double().square().sum(1) / 2
    assert torch.equal(nearest_code(z, codebook, backend=backend), s.argmax(1))
    codebook[44, 1] = torch.nan
    codes = nearest_code(z, codebook, backend=backend)
    assert codes[3] == 0 and (codes[[0, 1, 2, 4, 6]] == 44).all()


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ALL)
def test_a_nan_passes_through_the_quantizer(backend: str, dtype: torch.dtype, gradient: str) -> None:
    z, codebook = (t.to(dtype) for t in random(12, 80, 6))
    z[3, 1], z[5, 2], z[7] = torch.nan, torch.inf, torch.nan
    mask = torch.arange(12, device=z.device) != 7
    z_q, codes, loss = vector_quantize(z, codebook, gradient=gradient, mask=mask, backend=backend)
    want = {"straight_through": [[3, 1], [5, 2]], "none": []}.get(gradient)
    want = [[i, j] for i in (3, 5) for j in range(6)] if want is None else want
    assert z_q.isnan().nonzero().tolist() == want and loss.isnan()
    kept = mask.clone()
    kept[[3, 5]] = False
    torch.testing.assert_close(z_q[kept], codebook[codes[kept]])
    assert (z_q[7] == 0).all() and codes[7] == -1


@pytest.mark.skipif(GPU, reason="a GPU would have to be waited for")
def test_a_code_out_of_range_raises_in_a_graph_too() -> None:
    z, codebook = random(3, 5, 4)
    compiled = torch.compile(lambda codes: assign_code(z, codebook, codes, backend="chunked"), backend="aot_eager")
    for code in (-2, 5):
        with pytest.raises(ValueError, match=f"codes has {code}, expected -1 <= code < 5"):
            compiled(torch.tensor([0, -1, code]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_a_row_of_zeros_has_a_cosine(backend: str, dtype: torch.dtype) -> None:
    z, codebook = (t.to(dtype) for t in random(5, 7, 6))
    z[2], codebook[4] = 0, 0
    z_q, _, loss = vector_quantize(z.requires_grad_(), codebook, metric="cosine", backend=backend)
    (grad,) = torch.autograd.grad(z_q.float().sum() + loss, z)
    assert z_q.isfinite().all() and loss.isfinite()
    assert grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-6, 1e4, 1e15])
@pytest.mark.parametrize("backend", OURS)
def test_any_size_of_numbers(backend: str, scale: float) -> None:
    z, codebook = random(12, 130, 16)
    z, codebook = z * scale, codebook * scale
    codebook[7] *= 100
    for metric in METRICS:
        assert torch.equal(nearest_code(z, codebook, metric=metric, backend=backend), by_distance(z, codebook, metric))


@pytest.mark.parametrize("backend", ALL)
def test_masked_rows_and_strides(backend: str) -> None:
    z, codebook = random(150, 70, 20)
    mask = torch.rand(150, device=DEVICE) < 0.4
    expected = by_distance(z, codebook)
    masked = nearest_code(z, codebook, mask=mask, backend=backend)
    assert torch.equal(masked, torch.where(mask, expected, -1))
    none = nearest_code(z, codebook, mask=torch.zeros_like(mask), backend=backend)
    assert (none == -1).all()
    strided = nearest_code(z.t().contiguous().t(), codebook.repeat(1, 2)[:, :20], backend=backend)
    assert torch.equal(strided, expected)
    assert nearest_code(z[:0], codebook, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", OURS)
def test_not_exact_is_nearest_up_to_rounding(backend: str) -> None:
    z, codebook = random(100, 300, 16)
    codes = nearest_code(z, codebook, exact=False, backend=backend)
    found, best = ((z - codebook[c]).norm(dim=1) for c in (codes, by_distance(z, codebook)))
    assert (found - best).max() < 2e-2


def test_blocks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = random(50, 30, 8)
    monkeypatch.setattr("mmfuse.kernels.codebook.blocked._BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 30 * 8 * 7))
    assert torch.equal(nearest_code(z, codebook, backend="chunked"), by_distance(z, codebook))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_the_largest_output_of_a_linear_layer(backend: str, bias: bool) -> None:
    x, weight = random(60, 210, 40)
    b = 5 * torch.randn(210, device=DEVICE) if bias else None
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None).argmax(1)
    assert torch.equal(linear_argmax(x, weight, b, backend=backend), expected)


@pytest.mark.parametrize("k", [40, 210, 517])
@pytest.mark.parametrize("summed", [True, False])
def test_candidates_of_16_bits(monkeypatch: pytest.MonkeyPatch, summed: bool, k: int) -> None:
    # with sums of float32, and with rounded ones
    if not summed:
        monkeypatch.setattr(products, "pairs", lambda: False)
    elif not products.pairs():
        pytest.skip("this CPU has no products of bfloat16 with sums of float32")
    x, weight = random(300, k, 64, torch.bfloat16)
    for b in (None, 5 * torch.randn(k, device=DEVICE).bfloat16(), -40 + torch.randn(k, device=DEVICE).bfloat16()):
        expected = (x.double() @ weight.double().t() + (0 if b is None else b.double())).argmax(1)
        assert torch.equal(linear_argmax(x, weight, b, backend="chunked"), expected)


def test_dtypes_that_differ_meet_in_the_wider_one() -> None:
    z, codebook = random(30, 60, 8)
    assert torch.equal(nearest_code(z.half(), codebook), by_distance(z.half(), codebook))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), by_distance(z, codebook))


def test_errors() -> None:
    z, codebook = random(7, 6, 4)
    with pytest.raises(ValueError, match=r"codebook has shape \(6, 3\), expected \[K, 4\] as z has features"):
        nearest_code(z, codebook[:, :3])
    with pytest.raises(ValueError, match=r"codebook has shape \(0, 4\), expected at least one code"):
        nearest_code(z, codebook[:0])
    with pytest.raises(ValueError, match="metric is 'dot', expected one of 'euclidean', 'cosine'"):
        nearest_code(z, codebook, metric="dot")
    with pytest.raises(TypeError, match=r"mask has dtype torch.int64, expected torch.bool"):
        nearest_code(z, codebook, mask=torch.ones(7, dtype=torch.int64, device=DEVICE))
    with pytest.raises(TypeError, match=r"mask is list, expected a tensor"):
        nearest_code(z, codebook, mask=[True] * 7)
    for wrong in (-2, 6) if DEVICE == "cpu" else ():
        with pytest.raises(ValueError, match=rf"codes has {wrong}, expected -1 <= code < 6, the rows of codebook"):
            assign_code(z, codebook, torch.tensor([0, -1, wrong, 5, 0, 0, 0]))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="codes has -1, expected 0 <= code < 6, the rows of codebook"):
            assign_code(z, codebook, torch.tensor([0, -1, 2, 5, 0, 0, 0]), masked=False)
    with pytest.raises(ValueError, match=r"mask has shape \(6,\)"):
        nearest_code(z, codebook, mask=torch.ones(6, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \[6\]"):
        linear_argmax(z, codebook, torch.ones(7, device=DEVICE))
    with pytest.raises(ValueError, match="gradient is 'ste', expected one of"):
        vector_quantize(z, codebook, gradient="ste")
    with pytest.raises(TypeError, match="codes has dtype torch.float32, expected integers"):
        code_statistics(z, z[:, 0], 6)
    with pytest.raises(mmfuse.UnsupportedError, match="cuda: not an implementation of nearest_code"):
        nearest_code(z, codebook, backend="cuda")


# --- statistics -----------------------------------------------------------------------------------------------------


@pairs(ALL)
def test_statistics(backend: str, dtype: torch.dtype) -> None:
    def results() -> tuple[Results, ...]:
        z = torch.randn(300, 21, device=DEVICE).to(dtype)
        # codes that nobody has, one that many have, and what counts for none
        codes = torch.where(torch.rand(300, device=DEVICE) < 0.3, 7, torch.randint(-1, 44, (300,), device=DEVICE))
        (counts, sums), again = (code_statistics(z, codes, 40, backend=backend) for _ in range(2))
        assert torch.equal(counts, again[0]) and torch.equal(sums, again[1])
        chosen = (codes[:, None] == torch.arange(40, device=DEVICE)).double()
        assert torch.equal(counts.double(), chosen.sum(0)) and counts.dtype == sums.dtype
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        eager = chosen.t().to(sums.dtype) @ z.to(sums.dtype)
        return {"sums": sums}, {"sums": eager}, {"sums": chosen.t() @ z.double()}

    judge(results() for _ in range(3))


@pytest.mark.parametrize("backend", ALL)
def test_statistics_of_nothing(backend: str) -> None:
    z = torch.randn(5, 3, device=DEVICE)
    for rows, codes in ((z[:0], torch.zeros(0, dtype=torch.int64)), (z, torch.full((5,), -1))):
        counts, sums = code_statistics(rows, codes.to(DEVICE), 4, backend=backend)
        assert counts.shape == (4,) and sums.shape == (4, 3) and not counts.any() and not sums.any()


# --- quantization ---------------------------------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]


def quantized(given: Pair, backend: str, masked: bool = True, **options: object) -> Results:
    """z_q, loss and both gradients of a sum in which every element counts differently."""
    z, codebook = (t.detach().requires_grad_() for t in given)
    mask = torch.arange(len(z), device=DEVICE) % 4 > 0 if masked else None
    z_q, _, loss = vector_quantize(z, codebook, beta=0.25, mask=mask, backend=backend, **options)
    weight = torch.linspace(-1, 1, z_q.numel(), dtype=torch.float64, device=z.device).view_as(z_q)
    dz, dcodebook = torch.autograd.grad((z_q * weight.to(z_q.dtype)).sum() + 3 * loss, (z, codebook))
    return {"z_q": z_q.detach(), "loss": loss.detach(), "dz": dz, "dcodebook": dcodebook}


# in the interpreter triton is slow, and differs by search and statistics alone, which are tested above
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
@pairs([n for n in OURS if n != "triton" or GPU], (torch.float32, torch.float64, torch.bfloat16))
def test_quantization_matches_autograd(backend: str, metric: str, gradient: str, dtype: torch.dtype) -> None:
    run = partial(quantized, metric=metric, gradient=gradient)
    judge(compared(run, lambda: random(60, 25, 12), backend, dtype, draws=2))


def unit(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x|, and a gradient through it."""
    size = x.norm(dim=1, keepdim=True)
    return x / size, (g - x * (x * g).sum(1, keepdim=True) / size**2) / size


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_formulas_of_the_gradients(metric: str, gradient: str, masked: bool) -> None:
    """Straight through, the rotation trick's matrix, and the codebook's gradient from counts and sums, by hand."""
    given = cast(random(30, 8, 5), torch.float64)
    z, codebook = (unit(t, t)[0] if metric == "cosine" else t for t in given)
    kept = (torch.arange(30, device=DEVICE) % 4 > 0 if masked else torch.ones(30, device=DEVICE) > 0)[:, None]
    codes = by_distance(z, codebook)
    e = codebook[codes]
    g = torch.linspace(-1, 1, 150, dtype=torch.float64, device=DEVICE).view(30, 5)
    if gradient == "rotation":
        a, b = F.normalize(z, dim=1), F.normalize(e, dim=1)
        c = F.normalize(a + b, dim=1)
        eye = torch.eye(5, dtype=torch.float64, device=DEVICE)
        turn = eye - 2 * c[:, :, None] * c[:, None] + 2 * b[:, :, None] * a[:, None]
        turn = turn * (e.norm(dim=1) / z.norm(dim=1))[:, None, None]
        # it turns the row onto its code
        torch.testing.assert_close((turn @ z[:, :, None])[..., 0], e)
        routed = (g[:, None] @ turn)[:, 0]
    else:
        routed = g if gradient == "straight_through" else torch.zeros_like(g)
    elements = kept.sum() * 5
    dz = kept * (routed + 3 * 0.25 * 2 * (z - e) / elements)
    chosen = kept * F.one_hot(codes, 8).double()
    de = 3 * 2 * (chosen.sum(0)[:, None] * codebook - chosen.t() @ z) / elements
    if gradient == "none":
        de = de + chosen.t() @ g
    if metric == "cosine":
        dz, de = unit(given[0], dz)[1], unit(given[1], de)[1]
    loss = 1.25 * (kept * (z - e).square()).sum() / elements
    want = {"z_q": kept * e, "loss": loss, "dz": dz, "dcodebook": de}
    got = quantized(given, "torch", masked, metric=metric, gradient=gradient)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    z, codebook = (t.double().requires_grad_() for t in random(6, 4, 3))
    codes = nearest_code(z, codebook)
    # the loss is a function; what z_q passes on is not its derivative
    assert torch.autograd.gradcheck(
        lambda z: assign_code(z, codebook.detach(), codes, codebook_weight=0.0, gradient="none")[1], (z,)
    )
    assert torch.autograd.gradcheck(
        lambda e: assign_code(z.detach(), e, codes, beta=0.0, codebook_weight=1.0, gradient="none"), (codebook,)
    )


@pytest.mark.parametrize("backend", ["chunked", "torch"])
def test_no_rows(backend: str) -> None:
    z, codebook = random(4, 6, 3)
    z.requires_grad_()
    z_q, codes, loss = vector_quantize(
        z, codebook, mask=torch.zeros(4, dtype=torch.bool, device=DEVICE), backend=backend
    )
    assert loss == 0 and not z_q.any() and (codes == -1).all()
    (z_q.sum() + loss).backward()
    assert not z.grad.any()
    assert vector_quantize(z[:0], codebook, backend=backend)[2] == 0


def test_only_what_is_asked_for() -> None:
    z, codebook = random(20, 6, 3)
    z.requires_grad_()
    z_q, _, loss = vector_quantize(z, codebook)
    before = z.detach().clone(), codebook.clone()
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    z.grad = None
    loss.backward()
    assert torch.equal(z.grad, first) and codebook.grad is None
    assert torch.equal(z, before[0]) and torch.equal(codebook, before[1])


# --- torch.library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["chunked", *(["cpu"] if "cpu" in ALL else [])])
def test_opcheck(backend: str) -> None:
    z, codebook = random(9, 7, 4)
    mask = torch.arange(9, device=DEVICE) > 2
    opcheck(lambda: nearest_code(z, codebook, mask=mask, backend=backend))
    codes = nearest_code(z, codebook, mask=mask)
    opcheck(lambda: code_statistics(z, codes, 7, backend=backend))
    z.requires_grad_(), codebook.requires_grad_()
    for gradient in GRADIENTS:
        opcheck(lambda gradient=gradient: assign_code(z, codebook, codes, beta=0.3, gradient=gradient, backend=backend))


def test_compile() -> None:
    z, codebook = random(33, 20, 6)

    def step(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        z_q, codes, loss = vector_quantize(z, codebook, metric="cosine")
        return z_q, codes, loss, *code_statistics(z, codes, 20), linear_argmax(z, codebook)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(z, codebook), step(z, codebook), strict=True):
        torch.testing.assert_close(got, want)


def test_explain_names_the_choice() -> None:
    running = chosen(lambda: nearest_code(PROBE, PROBE))
    assert f"-> {running}" in mmfuse.explain("nearest_code", PROBE, PROBE)
    codes = nearest_code(PROBE, PROBE)
    for call in (lambda: code_statistics(PROBE, codes, 8), lambda: assign_code(PROBE, PROBE, codes)):
        assert backends(call) == ALL


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    z, codebook = random(500, 300, 32)
    z.requires_grad_()
    mask = torch.rand(500, device=DEVICE) < 0.5

    def step(backend: str) -> None:
        _, codes, loss = vector_quantize(z, codebook, mask=mask, gradient="rotation", backend=backend)
        code_statistics(z, codes, 300, backend=backend)
        loss.backward()

    for backend in OURS:
        step(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in OURS:
            step(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
