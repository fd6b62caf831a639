"""The largest similarity over queries and BLIP-2's loss: against LAVIS's lines, and against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.kernels import clip_loss, max_query_loss, max_query_similarity
from mmfuse.kernels._runtime import chosen
from mmfuse.kernels.contrastive.max_query.op import MAX_QUERY
from registered import backends, opcheck, reasons, registered, watched

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(1, 1, 1, device=DEVICE)
ALL = backends(lambda: max_query_similarity(PROBE, PROBE[0]))
# the interpreter runs a Triton program in Python: it takes the small cases
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
DOUBLE = backends(lambda: max_query_similarity(PROBE.double(), PROBE[0].double()))


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def features(b: int, q: int, d: int, n: int | None = None) -> list[Tensor]:
    """image, text, and for n rows in all also image_all and text_all."""
    own = [unit(b, q, d), unit(b, d)]
    return own if n is None else [*own, unit(n, q, d), unit(n, d)]


def run(given: list[Tensor], backend: str | None, temp: float = 0.07, **options: Any) -> Results:
    """The loss and its gradients."""
    acc = torch.promote_types(given[0].dtype, torch.float32)
    leaves = dict(zip(("image", "text", "image_all", "text_all"), (t.detach() for t in given), strict=False))
    leaves["temp"] = torch.tensor(temp, dtype=acc, device=DEVICE)
    loss = max_query_loss(**{k: t.requires_grad_() for k, t in leaves.items()}, backend=backend, **options)
    return {"loss": loss.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}


# --- meaning --------------------------------------------------------------------------------------------------------


def lavis(image: Tensor, text: Tensor, temp: Tensor, image_all: Tensor, text_all: Tensor, row_offset: int, ids=None):  # type: ignore[no-untyped-def]
    """The loss as LAVIS writes it, on expanded operands."""
    i2t = torch.matmul(image.unsqueeze(1), text_all.unsqueeze(-1)).squeeze(-1).max(-1)[0] / temp
    t2i = torch.matmul(text.unsqueeze(1).unsqueeze(1), image_all.permute(0, 2, 1)).squeeze(2).max(-1)[0] / temp
    if ids is not None:
        same = torch.eq(ids[row_offset : row_offset + len(image)].view(-1, 1), ids.view(1, -1)).to(i2t.dtype)
        targets = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / len(ids)
        per_row = [-(F.log_softmax(s, dim=1) * targets).sum(1).mean() for s in (i2t, t2i)]
    else:
        target = torch.arange(row_offset, row_offset + len(image), device=image.device)
        per_row = [F.cross_entropy(s, target, label_smoothing=0.1) for s in (i2t, t2i)]
    return (per_row[0] + per_row[1]) / 2


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("row_offset", [0, 3])
@pytest.mark.parametrize("backend", DOUBLE)
def test_is_the_loss_of_lavis(backend: str, row_offset: int, with_ids: bool) -> None:
    leaves = [t.double().requires_grad_() for t in features(4, 3, 8, n=9)]
    tau = torch.tensor(0.07, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ids = torch.tensor([5, 1, 1, 7, 5, 5, 2, 7, 1], device=DEVICE) if with_ids else None
    image, text, image_all, text_all = leaves
    want = lavis(image, text, tau, image_all, text_all, row_offset, ids)
    options = {} if ids is None else {"ids": ids[row_offset : row_offset + 4], "all_ids": ids}
    got = max_query_loss(
        image, text, tau, image_all=image_all, text_all=text_all, row_offset=row_offset, label_smoothing=0.1,
        backend=backend, **options,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    inputs = (*leaves, tau)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


@pytest.mark.parametrize("backend", ALL)
def test_own_features_share_one_product(backend: str) -> None:
    image, text = (t.requires_grad_() for t in features(7, 5, 16))
    shared = max_query_loss(image, text, 0.07, label_smoothing=0.1, backend=backend)
    apart = max_query_loss(image, text, 0.07, image_all=image, text_all=text, label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(shared, apart)
    grads = (torch.autograd.grad(loss, (image, text)) for loss in (shared, apart))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ALL)
def test_one_query_is_clip(backend: str) -> None:
    image, text = (t.requires_grad_() for t in features(33, 1, 24))
    got = max_query_loss(image, text, 0.07, label_smoothing=0.1, backend=backend)
    want = clip_loss(image[:, 0], text, 1 / 0.07, label_smoothing=0.1, backend="torch")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (image, text)), torch.autograd.grad(want, (image, text)))


@pytest.mark.parametrize("backend", ALL)
def test_the_similarity_and_its_gradient_by_hand(backend: str) -> None:
    # small integers: products are exact, and ties are ties, of which the first gets the gradient
    image, text = torch.randint(-2, 3, (6, 7, 16), device=DEVICE), torch.randint(-2, 3, (40, 16), device=DEVICE)
    image[:, 5], image[:, 6] = image[:, 1], image[:, 0]
    image, text = image.float().requires_grad_(), text.float().requires_grad_()
    g = torch.randint(-3, 4, (6, 40), device=DEVICE).float()
    u = max_query_similarity(image, text, backend=backend)
    want, d_image, d_text = torch.zeros_like(u), torch.zeros_like(image), torch.zeros_like(text)
    for i in range(6):
        for j in range(40):
            products = (image[i].detach() * text[j].detach()).sum(1).tolist()
            k = products.index(max(products))
            want[i, j] = products[k]
            d_image[i, k] += g[i, j] * text[j].detach()
            d_text[j] += g[i, j] * image[i, k].detach()
    assert torch.equal(u, want)
    assert all(map(torch.equal, torch.autograd.grad(u, (image, text), g), (d_image, d_text)))
    assert not d_image[:, 5:].any() and d_image[:, :2].any()


@pytest.mark.parametrize("backend", ALL)
def test_the_last_of_many_queries_can_win(backend: str) -> None:
    image = torch.zeros(2, 256, 16, device=DEVICE)
    image[:, 255] = 1
    image.requires_grad_()
    u = max_query_similarity(image, torch.ones(3, 16, device=DEVICE), backend=backend)
    assert u.eq(16).all()
    (d,) = torch.autograd.grad(u.sum(), image)
    assert d[:, 255].eq(3).all() and not d[:, :255].any()


# --- numbers --------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "b, q, d, n", [(1, 32, 64, None), (5, 1, 16, 7), (30, 32, 96, None), (9, 33, 770, 20), (4, 256, 32, 70)]
)
@pytest.mark.parametrize("backend", FAST)
def test_matches_float64(backend: str, b: int, q: int, d: int, n: int | None, dtype: torch.dtype) -> None:
    row_offset = 0 if n is None else n - b
    loss = partial(run, row_offset=row_offset, label_smoothing=0.1)
    judge(compared(loss, lambda: features(b, q, d, n), backend, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("b, q, d, n", [(3, 5, 24, 70), (2, 32, 17, None)])
@pytest.mark.parametrize("backend", FUSED)
def test_small_case_in_every_implementation(backend, b, q, d, n, dtype) -> None:  # type: ignore[no-untyped-def]
    judge(compared(partial(run, label_smoothing=0.1), lambda: features(b, q, d, n), backend, dtype))


@pytest.mark.parametrize("b, n", [(4, 700), (700, 4)])
@pytest.mark.parametrize("backend", FAST)
def test_long_sums(backend: str, b: int, n: int) -> None:
    def draw() -> list[Tensor]:
        # one query takes every text
        image, text = unit(b, 3, 16), unit(n, 16).abs()
        image[:, 1] = image[:, 1].abs()
        image[:, ::2] = -image[:, ::2].abs()
        return [image, text]

    def similarity(given: list[Tensor], name: str) -> Results:
        leaves = [t.detach().requires_grad_() for t in given]
        u = max_query_similarity(*leaves, backend=name)
        image, text = torch.autograd.grad(u.exp().sum(), leaves)
        return {"u": u.detach(), "image": image, "text": text}

    judge(compared(similarity, draw, backend, draws=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_low_temperature(backend: str, dtype: torch.dtype) -> None:
    judge(compared(partial(run, temp=0.005), lambda: features(40, 8, 32), backend, dtype))


@pytest.mark.parametrize("backend", FAST)
def test_ids(backend: str) -> None:
    ids = torch.arange(24, device=DEVICE) // 3
    judge(compared(partial(run, ids=ids, label_smoothing=0.1), lambda: features(24, 4, 32), backend))
    part = partial(run, ids=ids[6:12], all_ids=ids, row_offset=6)
    judge(compared(part, lambda: features(6, 4, 32, 24), backend))


@pytest.mark.parametrize("backend", FAST)
def test_many_blocks_of_images(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.kernels.contrastive.max_query.blocked._BLOCK_BYTES", {"cpu": 50_000, "cuda": 50_000})
    monkeypatch.setattr("mmfuse.kernels.contrastive.max_query.blocked._SPARSE_ROWS", 7)
    for dtype in (torch.float32, torch.bfloat16):
        judge(compared(run, lambda: features(65, 8, 32), backend, dtype))


@pytest.mark.parametrize("backend", [n for n in DOUBLE if n != "torch"])
def test_gradcheck(backend: str) -> None:
    tensors = [t.double().requires_grad_() for t in features(3, 4, 6, n=5)]
    tau = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def loss(image, text, image_all, text_all, tau):  # type: ignore[no-untyped-def]
        return max_query_loss(
            image, text, tau, image_all=image_all, text_all=text_all, row_offset=1, label_smoothing=0.1, backend=backend
        )

    # a random projection of the Jacobian where the interpreter takes its time
    assert torch.autograd.gradcheck(loss, (*tensors, tau), fast_mode=backend == "triton")


# --- contracts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("backend", ALL)
def test_any_strides(backend: str, layout: str) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    image, text = {
        "transposed": lambda: (randn(24, 5, 9).permute(2, 1, 0), randn(24, 9).t()),
        "sliced": lambda: (randn(9, 10, 48)[:, ::2, ::2], randn(18, 25)[::2, 1:]),
        "expanded": lambda: (randn(1, 5, 24).expand(9, 5, 24), randn(1, 24).expand(9, 24)),
    }[layout]()
    got, want = (run(inputs, backend, 1.0) for inputs in ([image, text], [image.contiguous(), text.contiguous()]))
    torch.testing.assert_close(got, want)
    # an incoming gradient of any strides, which is not written into
    g = torch.randn(9, 9, device=DEVICE).t()
    before = g.clone()
    leaves = [t.detach().requires_grad_() for t in (image, text)]
    grads = (
        torch.autograd.grad(max_query_similarity(*leaves, backend=backend), leaves, g) for g in (g, g.contiguous())
    )
    torch.testing.assert_close(*grads)
    assert torch.equal(g, before)


@pytest.mark.parametrize("b, n", [(0, 0), (0, 4), (3, 0)])
@pytest.mark.parametrize("backend", ALL)
def test_empty(backend: str, b: int, n: int) -> None:
    image = torch.zeros(b, 3, 16, device=DEVICE, requires_grad=True)
    text = torch.zeros(n, 16, device=DEVICE, requires_grad=True)
    u = max_query_similarity(image, text, backend=backend)
    assert u.shape == (b, n)
    dq, dt = torch.autograd.grad(u.sum(), (image, text))
    assert dq.shape == image.shape and dt.shape == text.shape and not dq.any() and not dt.any()
    if b == n:
        assert max_query_loss(image, text, 0.07, backend=backend).isnan()


@pytest.mark.parametrize("frozen", ["image", "text"])
@pytest.mark.parametrize("backend", FUSED)
def test_frozen_inputs_get_no_gradient(backend: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = features(6, 3, 16)
    (text if frozen == "image" else image).requires_grad_()
    seen = watched(monkeypatch, MAX_QUERY, backend, "gradient")
    max_query_loss(image, text, 0.07, backend=backend).backward()
    assert seen == [[t.numel() if t.requires_grad else 0 for t in (image, text)]]


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward_is_the_same(backend: str) -> None:
    leaves = [t.requires_grad_() for t in features(9, 3, 16)]
    loss = max_query_loss(*leaves, 0.07, backend=backend)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", ALL)
def test_runs_are_bitwise_equal(backend: str) -> None:
    tensors = features(35, 6, 16)
    one, two = (run(tensors, backend, 0.05) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.skipif(GPU, reason="threads of a CPU")
@pytest.mark.parametrize("backend", [n for n in FUSED if n == "cpu"])
def test_the_number_of_threads_changes_nothing(backend: str) -> None:
    g, k = torch.randn(70, 300), torch.randint(0, 9, (70, 300), dtype=torch.uint8)
    image, text = features(70, 9, 33, 300)[0], features(70, 9, 33, 300)[3]
    runs, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(MAX_QUERY.implementations[backend].passes.gradient(g, k, image, text, True, True))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("where", ["image", "text"])
@pytest.mark.parametrize("query", [0, 2])
@pytest.mark.parametrize("backend", ALL)
def test_a_nan_stays_visible(backend: str, query: int, where: str) -> None:
    image, text = features(5, 4, 16)
    (image[3, query] if where == "image" else text[3])[1] = torch.nan
    u = max_query_similarity(image, text, backend=backend)
    (mine, others) = (u[3], u[:3]) if where == "image" else (u[:, 3], u[:, :3])
    assert mine.isnan().all() and not others.isnan().any()
    assert max_query_loss(image, text, 0.07, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_autocast_rounds_features_as_a_matrix_product_would(backend: str) -> None:
    leaves = [t.requires_grad_() for t in features(9, 4, 32)]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = max_query_loss(*leaves, 0.07, backend=backend)
    assert loss.dtype == torch.float32
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    want = max_query_loss(*low, 0.07, backend=backend)
    torch.testing.assert_close(loss, want)
    for g, w in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, low), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w.float())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_temp_keeps_its_shape(shape: tuple[int, ...]) -> None:
    tau = torch.full(shape, 0.07, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(max_query_loss(*features(4, 2, 8), tau), tau)
    assert g.shape == tau.shape


# --- the compiler and torch.library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *(n for n in FUSED if n != "chunked" or "cpu" not in FUSED)])
def test_compiles_whole(backend: str | None) -> None:
    image, text, image_all, text_all = (t.requires_grad_() for t in features(6, 3, 16, n=12))
    tau = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    ids = torch.arange(12, device=DEVICE) // 2

    def both(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
        alls = {"image_all": image_all, "text_all": text_all, "ids": ids[: len(image)], "all_ids": ids}
        return max_query_loss(image, text, tau, backend=backend) + max_query_loss(
            image, text, tau, label_smoothing=0.1, backend=backend, **alls
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 5):  # the second size reuses the graph
        inputs = (image[:n], text[:n], tau)
        torch.testing.assert_close(compiled(*inputs), both(*inputs))
        got, want = (torch.autograd.grad(f(*inputs), (image, text, tau)) for f in (compiled, both))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str) -> None:
    image, text = features(3, 4, 16, n=5)[0], features(3, 4, 16, n=5)[3]
    op, args = registered(lambda: max_query_similarity(image, text, backend=backend))
    assert op(*args)[1].dtype == torch.uint8
    for needs in ((True, True), (True, False), (False, True)):
        image.requires_grad_(needs[0]), text.requires_grad_(needs[1])
        opcheck(lambda: max_query_similarity(image, text, backend=backend))


# --- memory, choice and errors --------------------------------------------------------------------------------------


def test_many_queries() -> None:
    # an index beyond 8 bits
    image, text = features(3, 300, 8)
    image[:, 290] *= 9
    got, want = (run([image.double(), text.double()], name, 1.0) for name in ("chunked", "torch"))
    torch.testing.assert_close(got, want)
    why = reasons(lambda: max_query_similarity(image, text))
    for name in ("cpu", "triton"):
        assert any("300 queries, more than 256" in reason for reason in why[name])


@pytest.mark.skipif(GPU, reason="what is small there was not measured")
def test_steps_aside_for_eager_where_that_is_faster() -> None:
    def runs(b: int, q: int, n: int) -> str:
        return chosen(lambda: max_query_similarity(torch.empty(b, q, 8), torch.empty(n, 8)))

    assert runs(4, 4, 4) == runs(4096, 1, 4096) == "torch"
    assert runs(1024, 32, 1024) in ("cpu", "chunked")
    assert "-> " in mmfuse.explain(mmfuse.max_query_loss, torch.empty(4, 4, 8), torch.empty(4, 8), 0.07)


def test_bad_arguments() -> None:
    image, text = features(4, 3, 8)
    more = {"image_all": torch.cat([image, image]), "text_all": torch.cat([text, text])}
    three, four = (torch.arange(n, device=DEVICE) for n in (3, 4))
    double, narrow = ({k: f(v) for k, v in more.items()} for f in (Tensor.double, lambda t: t[..., :6]))
    images, pair = more["image_all"], torch.ones(2, device=DEVICE)
    for error, message, args, options in (
        (TypeError, r"image is list, expected a tensor \[B, Q, D\]", ([1.0], text, 1.0), {}),
        (ValueError, r"image has shape \(4, 8\), expected \[B, Q, D\]", (text, text, 1.0), {}),
        (ValueError, r"text has shape \(4, 3, 8\), expected \[N, 8\]", (image, image, 1.0), {}),
        (TypeError, "image has dtype torch.int64", (image.long(), text, 1.0), {}),
        (TypeError, "text has dtype torch.float64, expected torch.float32", (image, text.double(), 1.0), {}),
        (ValueError, r"text has shape \(4, 7\), expected \[N, 8\]", (image, text[:, :7], 1.0), {}),
        (ValueError, "at least one feature", (image[:, :0], text, 1.0), {}),
        (ValueError, "text is on meta", (image, text.to("meta"), 1.0), {}),
        (ValueError, r"text has shape \(3, 8\), expected \[4, D\]", (image, text[:3], 1.0), {}),
        (TypeError, "temp is str", (image, text, "2"), {}),
        (ValueError, r"temp has shape \(2,\), expected one element", (image, text, pair), {}),
        (ValueError, r"text_all has shape \(4, 8\), expected \[8, D\]", (image, text, 1.0), {"image_all": images}),
        (TypeError, "image_all has dtype torch.float64", (image, text, 1.0), double),
        (ValueError, r"image_all has shape .*expected \[N, Q, 8\]", (image, text, 1.0), narrow),
        (ValueError, "row_offset is 5 for 4 rows of image", (image, text, 1.0), {**more, "row_offset": 5}),
        (ValueError, "row_offset is -1", (image, text, 1.0), {"row_offset": -1}),
        (ValueError, "label_smoothing is 1.5", (image, text, 1.0), {"label_smoothing": 1.5}),
        (ValueError, "all_ids is given without ids", (image, text, 1.0), {"all_ids": four}),
        (ValueError, r"ids has shape \(3,\)", (image, text, 1.0), {"ids": three}),
        (TypeError, "ids is list, expected a tensor", (image, text, 1.0), {"ids": [1, 2, 3, 4]}),
        (ValueError, r"all_ids has shape \(4,\).*expected \[8\]", (image, text, 1.0), {**more, "ids": four}),
        (ValueError, "backend is 'nope'", (image, text, 1.0), {"backend": "nope"}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            max_query_loss(*args, **options)
    if not GPU:
        with pytest.raises(mmfuse.UnsupportedError, match="no implementation|not an implementation"):
            max_query_loss(image, text, 1.0, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_host_never_waits(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype).requires_grad_() for t in features(20, 32, 64, 50)]
    image, text, image_all, text_all = tensors
    ids = torch.arange(50, device=DEVICE) // 2
    tau = torch.tensor(0.07, device=DEVICE, requires_grad=True)

    def step() -> None:
        options = {"image_all": image_all, "text_all": text_all, "ids": ids[:20], "all_ids": ids}
        loss = max_query_loss(image, text, tau, label_smoothing=0.1, backend="triton", **options)
        torch.autograd.grad(loss, (*tensors, tau))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
