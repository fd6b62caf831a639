"""Losses against a momentum queue: the reference against its formula, the others against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import Results, cast, compared, judge
from mmfuse.kernels._runtime import UnsupportedError, explain
from mmfuse.kernels.contrastive.negatives import hard_negatives
from mmfuse.kernels.contrastive.negatives.op import OTHER_DIRECTION
from mmfuse.kernels.contrastive.queue import moco_loss, queue_itc_loss, queue_itc_losses
from registered import backends, opcheck, registered

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: queue_itc_loss(PROBE, PROBE, PROBE, 0.07))
# the interpreter runs a Triton program in Python: it takes the small cases
FUSED = [n for n in ALL if n != "torch"]
FAST = [n for n in FUSED if GPU or n != "triton"]
Case = dict[str, Any]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def case(b: int = 9, k: int | None = None, m: int = 36, d: int = 24, alpha: float = 0.4, ids: bool = False) -> Case:
    k = b if k is None else k
    found: Case = {"query": unit(b, d), "keys": unit(k, d), "queue": unit(m, d)}
    if alpha:
        found |= {"query_m": unit(b, d), "alpha": alpha}
    if ids:
        for name, n in (("ids", b), ("key_ids", k), ("queue_ids", m)):
            found[name] = torch.randint(0, max(2, (k + m) // 3), (n,), device=DEVICE)
    return found


def run(given: Case, backend: str | None, temp: float = 0.07) -> Results:
    """The loss and its gradients, of `moco_loss` where there is one key for each query."""
    given = dict(given)
    query = given.pop("query").detach().requires_grad_()
    acc = torch.promote_types(query.dtype, torch.float32)
    t = torch.tensor(temp, dtype=acc, device=query.device, requires_grad=True)
    loss = (moco_loss if "key" in given else queue_itc_loss)(query, temp=t, backend=backend, **given)
    return dict(zip(("loss", "query", "temp"), [loss.detach(), *torch.autograd.grad(loss, (query, t))], strict=True))


def written_out(given: Case, temp: float) -> Results:
    """Equation (6) of Li et al. 2021, or equation (1) of He et al. 2020, row by row."""
    x = given["query"].detach().requires_grad_()
    t = torch.tensor(temp, dtype=x.dtype, device=x.device, requires_grad=True)
    if "key" in given:
        losses = [
            -(q @ k / t - torch.cat([q @ k[:, None], given["queue"] @ q]).div(t).exp().sum().log())
            for q, k in zip(x, given["key"], strict=True)
        ]
    else:
        everything, alpha, losses = torch.cat([given["keys"], given["queue"]]), given.get("alpha", 0.0), []
        for i, q in enumerate(x):
            e = (everything @ q / t).exp()
            hard = torch.arange(len(everything), device=x.device) == i
            if "ids" in given:
                hard = torch.cat([given["key_ids"], given["queue_ids"]]) == given["ids"][i]
            target = (1 - alpha) * hard.to(x.dtype) / max(1, int(hard.sum()))
            if alpha:
                soft = (everything @ given["query_m"][i] / temp).exp()
                target = target + alpha * soft / soft.sum()
            losses.append(-(target * (e / e.sum()).log()).sum())
    loss = torch.stack(losses).mean()
    return dict(zip(("loss", "query", "temp"), [loss.detach(), *torch.autograd.grad(loss, (x, t))], strict=True))


def moco_case(m: int) -> Case:
    return {"query": unit(9, 24), "key": unit(9, 24), "queue": unit(m, 24)}


SIZES: list[dict[str, Any]] = [
    {},
    {"b": 1, "m": 5},
    {"b": 17, "m": 20},
    {"k": 30},
    {"m": 0},
    {"m": 0, "b": 1},
    {"k": 2, "ids": True},
    {"k": 0, "ids": True},
    {"ids": True},
    {"alpha": 0.0},
    {"alpha": 0.0, "ids": True},
    {"alpha": 1.0},
]


def unmatched() -> Case:
    given = case(ids=True)
    given["ids"][::2] = -1
    return given


@pytest.mark.parametrize("draw", [*(partial(case, **size) for size in SIZES), unmatched, partial(moco_case, 36)])
def test_the_reference_is_the_formula(draw: Callable[[], Case]) -> None:
    given = cast(draw(), torch.float64)
    torch.testing.assert_close(run(given, "torch"), written_out(given, 0.07), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_matches_float64(backend: str, size: dict) -> None:
    judge(compared(run, lambda: case(**size), backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [{"b": 33, "m": 1000, "d": 64}, {"b": 33, "m": 1000, "d": 64, "ids": True}], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_sixteen_bits(backend: str, size: dict, dtype: torch.dtype) -> None:
    judge(compared(run, lambda: case(**size), backend, dtype))


@pytest.mark.parametrize("backend", FAST)
def test_many_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_LOGIT_BYTES", 1 << 14), ("_PASS_BYTES", 1 << 12)):
        monkeypatch.setattr(f"mmfuse.kernels.contrastive.queue.blocked.{name}", {DEVICE: size})
    monkeypatch.setattr("mmfuse.kernels.contrastive.queue.blocked._KEYS", 37)
    for ids in (False, True):
        judge(compared(run, lambda ids=ids: case(b=30, k=50, m=130, ids=ids), backend))


@pytest.mark.parametrize("m", [0, 1, 36])
@pytest.mark.parametrize("backend", FUSED)
def test_moco(backend: str, m: int) -> None:
    judge(compared(run, lambda: moco_case(m), backend))


def opposite() -> Case:
    """Every key points away from every query: at temperature 0.001 all logits are near -1000."""
    given = case()
    axis = unit(1, 24)
    for name, sign in (("query", 1), ("query_m", 1), ("keys", -1), ("queue", -1)):
        given[name] = F.normalize(0.1 * given[name] + sign * axis, dim=-1)
    return given


def duplicates() -> Case:
    given = case(b=10, m=30)
    for name in ("query", "query_m", "keys", "queue"):
        given[name] = given[name][torch.arange(len(given[name])) % 5]
    return given


def solved() -> Case:
    """Orthogonal pairs, and a teacher that agrees: at temperature 0.001 the loss is e^-1000."""
    eye = torch.eye(24, device=DEVICE)
    return {"query": eye[:9], "keys": eye[:9], "queue": eye[9:], "query_m": eye[:9], "alpha": 0.4}


# logits of the teacher that all but tie at 0.001 make any loss uncertain: only what is about temperature is taken there
EXTREMES = [(opposite, 0.001), (duplicates, 0.001), (solved, 0.001), (solved, 0.5), (unmatched, 0.07)]


@pytest.mark.parametrize("draw, temp", EXTREMES)
@pytest.mark.parametrize("backend", FUSED)
def test_extremes(backend: str, draw: Callable[[], Case], temp: float) -> None:
    # the temperature's gradient is one number, whose error in few draws is a matter of luck
    judge(compared(partial(run, temp=temp), draw, backend, draws=16))


@pytest.mark.parametrize("backend", ALL)
def test_a_row_without_a_match_has_no_hard_targets(backend: str) -> None:
    given = case(b=4, ids=True, alpha=0.0)
    given["ids"][:] = -1
    assert not any(t.any() for t in run(given, backend).values())
    given |= {"query_m": unit(4, 24), "alpha": 0.4}
    soft = {k: v for k, v in given.items() if "ids" not in k} | {"alpha": 1.0}
    torch.testing.assert_close(run(given, backend)["loss"], 0.4 * run(soft, backend)["loss"])


@pytest.mark.parametrize("backend", FUSED)
def test_equals_the_official_code(backend: str) -> None:
    # Li et al. 2021, models/model_pretrain.py: the queue is [D, M], the keys are concatenated before it
    given = case(b=5, m=40)
    t = torch.tensor(0.07, device=DEVICE)
    everything = torch.cat([given["keys"].t(), given["queue"].t().clone()], dim=1)
    with torch.no_grad():
        sim_m = given["query_m"] @ everything / t
        targets = torch.zeros_like(sim_m).fill_diagonal_(1)
        targets = 0.4 * F.softmax(sim_m, dim=1) + 0.6 * targets
    query = given["query"].clone().requires_grad_()
    want = -torch.sum(F.log_softmax(query @ everything / t, dim=1) * targets, dim=1).mean()
    found = run(given, backend)
    torch.testing.assert_close(found["loss"], want.detach())
    torch.testing.assert_close(found["query"], torch.autograd.grad(want, query)[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_any_strides_and_a_wider_queue(backend: str) -> None:
    given = case(b=8, m=40)
    strided = {k: v.t().contiguous().t() if isinstance(v, Tensor) else v for k, v in given.items()}
    torch.testing.assert_close(run(strided, backend, 0.1), run(given, backend, 0.1))
    half = cast(given, torch.float16)
    got, want = run(half | {"queue": given["queue"]}, backend, 0.1), run(half, backend, 0.1)
    assert got["loss"].dtype == torch.float32
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", FUSED)
def test_gradcheck(backend: str) -> None:
    if GPU and backend == "triton":
        pytest.skip("float64 Triton kernels run in the interpreter only")
    t = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    fast = {"fast_mode": backend == "triton"}  # a random projection: the interpreter takes its time
    for options in ({}, {"ids": True}, {"alpha": 0.0, "ids": True}):
        given = case(b=3, k=4, m=6, d=5, **options)
        given = cast(given, torch.float64)
        query = given.pop("query").requires_grad_()

        def loss(q: Tensor, t: Tensor, given: Case = given) -> Tensor:
            return queue_itc_loss(q, temp=t, backend=backend, **given)

        # the temperature of the teacher is a constant, which a finite difference does not know
        torch.autograd.gradcheck(loss, (query, t if "alpha" not in given else t.detach()), **fast)
    key, queue = unit(3, 5).double(), unit(6, 5).double()
    torch.autograd.gradcheck(lambda q, t: moco_loss(q, key, queue, t, backend=backend), (query, t), **fast)


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward_is_the_same(backend: str) -> None:
    given = case(b=5)
    query = given.pop("query").requires_grad_()
    for loss in (
        queue_itc_loss(query, temp=0.1, backend=backend, **given),
        moco_loss(query, given["keys"], given["queue"], 0.1, backend=backend),
    ):
        first = torch.autograd.grad(loss, query, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(loss, query)[0])


@pytest.mark.parametrize("backend", ALL)
def test_runs_are_bitwise_equal(backend: str) -> None:
    given = case(b=20, m=60, ids=True)
    one, two = (run(given, backend) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("backend", FUSED)
def test_nothing_but_the_query_and_the_temperature_gets_a_gradient(backend: str) -> None:
    given = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in case().items()}
    queue_itc_loss(temp=0.07, backend=backend, **given).backward()
    assert given["query"].grad is not None
    assert given["keys"].grad is given["queue"].grad is given["query_m"].grad is None
    op, args = registered(lambda: queue_itc_loss(temp=0.07, backend=backend, **given))
    *args, needs = args
    with torch.no_grad():
        loss, dx, dt, _ = op(*args, [False for _ in needs])
    assert loss.isfinite() and dx.numel() == dt.numel() == 0


@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_own_keys_are_multiplied_in_float32(backend: str) -> None:
    x = torch.full((4, 8), 300.0, device=DEVICE).half()
    small = torch.full((3, 8), 0.5, device=DEVICE).half()
    loss = moco_loss(x, x, small, 1e6, backend=backend)
    assert 0.5 < loss < 2


@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_not_a_number_is_seen(backend: str) -> None:
    for name in ("query", "query_m", "keys", "queue"):
        given = case()
        given[name][-1, 3] = float("nan")
        assert run(given, backend)["loss"].isnan()


@pytest.mark.parametrize("backend", ["torch", *FAST])
def test_compiles_in_one_graph(backend: str) -> None:
    given = case(b=6, ids=True)
    query = given.pop("query").requires_grad_()
    t = torch.tensor(0.07, device=DEVICE, requires_grad=True)

    def losses(query: Tensor, t: Tensor) -> Tensor:
        a = queue_itc_loss(query, temp=t, backend=backend, **given)
        return a + moco_loss(query, given["keys"], given["queue"], t, backend=backend)

    want = torch.autograd.grad(losses(query, t), (query, t))
    got = torch.autograd.grad(torch.compile(losses, fullgraph=True, backend="aot_eager")(query, t), (query, t))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mixture", [0.0, 0.5])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_negatives_are_those_of_hard_negatives(backend: str, ids: bool, mixture: float) -> None:
    given, draw = case(b=8, k=12, ids=ids), {"mixture": mixture, "seed": 5}
    loss, drawn = queue_itc_loss(temp=0.1, backend=backend, negatives=3, **given, **draw)
    assert loss == queue_itc_loss(temp=0.1, backend=backend, **given)
    masks = {"ids": given["ids"], "key_ids": given["key_ids"]} if ids else {}
    want = hard_negatives(given["query"], given["keys"], 10.0, k=3, backend="torch", **masks, **draw)
    assert torch.equal(drawn, want)


BOTH = ("image", "text", "image_m", "text_m", "image_queue", "text_queue")


def both_directions(**options: Any) -> Case:
    (i2t, t2i), shared = (case(**options) for _ in range(2)), {}
    if options.get("ids"):
        shared = {name: i2t[name] for name in ("ids", "queue_ids")}
    features = (i2t["query"], t2i["query"], i2t["keys"], t2i["keys"], i2t["queue"], t2i["queue"])
    return dict(zip(BOTH, features, strict=True)) | shared | {"alpha": options.get("alpha", 0.4)}


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0, "m": 0}, {"ids": True}], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_both_directions_are_two_losses(backend: str, options: Case) -> None:
    given = both_directions(**options)
    image, text, image_m, text_m, image_queue, text_queue = (given.pop(name) for name in BOTH)
    image, text = image.t().contiguous().t().requires_grad_(), text.requires_grad_()
    temp = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    shared = given | {"temp": temp, "negatives": 2, "mixture": 0.1, "backend": backend}
    *got, texts, images = queue_itc_losses(image, text, image_m, text_m, image_queue, text_queue, seed=3, **shared)
    ways = (
        queue_itc_loss(image, text_m, text_queue, query_m=image_m, seed=3, **shared),
        queue_itc_loss(text, image_m, image_queue, query_m=text_m, seed=3 ^ OTHER_DIRECTION, **shared),
    )
    assert torch.equal(texts, ways[0][1]) and torch.equal(images, ways[1][1])
    want = [loss for loss, _ in ways]
    grads = [torch.autograd.grad(2 * i2t + 3 * t2i, (image, text, temp)) for i2t, t2i in (got, want)]
    torch.testing.assert_close([*got, *grads[0]], [*want, *grads[1]], atol=1e-6, rtol=1e-5)
    # one of the two may not be used
    alone = queue_itc_losses(image, text, image_m, text_m, image_queue, text_queue, seed=3, **shared)[1]
    assert not torch.autograd.grad(alone, image)[0].any()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text": torch.ones(9, 25)}, "text has shape|image_m has shape"),
        ({"text_queue": torch.ones(35, 24)}, "text_queue is torch.float32"),
        ({"text_queue": torch.ones(24, 36).t()}, "text_queue has strides"),
        ({"image_m": None}, "alpha is 0.4 and image_m is None"),
        ({"text": torch.ones(8, 24)}, "text_m has shape|text is"),
        ({"ids": torch.arange(9)}, "queue_ids is NoneType"),
    ],
)
def test_errors_of_both_directions(change: dict, words: str) -> None:
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises((ValueError, TypeError), match=words):
        queue_itc_losses(**{"temp": 0.07} | both_directions() | change)


def test_registration() -> None:
    given = case(b=4, m=20, ids=True)
    query = given.pop("query").requires_grad_()
    t = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    drawing = {"negatives": 2, "mixture": 0.1, "seed": 7}
    opcheck(lambda: queue_itc_loss(query, temp=t, backend="chunked", **given, **drawing))
    for rows, checks in ((4, {}), (0, {"test_utils": "test_faketensor"})):
        call = partial(moco_loss, query[:rows], given["keys"][:rows], given["queue"], t, backend="chunked")
        opcheck(call, **checks)


@pytest.mark.parametrize("backend", ALL)
def test_the_queue_may_change_before_the_backward(backend: str) -> None:
    for loss in (moco_loss, queue_itc_loss):
        query, key, queue = unit(4, 8).requires_grad_(), unit(4, 8), unit(20, 8)
        value = loss(query, key, queue, 0.1, backend=backend)
        (want,) = torch.autograd.grad(value, query, retain_graph=True)
        queue[:4] = key
        assert torch.equal(torch.autograd.grad(value, query)[0], want)


def test_alpha_is_not_compiled_anew_for_each_value() -> None:
    torch._dynamo.reset()
    given = case(b=3, m=9)
    compiled = torch.compile(partial(queue_itc_loss, temp=0.1, backend="chunked"), fullgraph=True, backend="aot_eager")
    for step in range(12):
        given["alpha"] = 0.4 * step / 12
        torch.testing.assert_close(compiled(**given), queue_itc_loss(temp=0.1, backend="torch", **given))


def test_explain_takes_the_arguments_of_the_call() -> None:
    x = torch.ones(4, 8, device=DEVICE)
    for loss in (queue_itc_loss, moco_loss):
        assert "->" in explain(loss, x, x, x, 0.07)


def test_autocast_rounds_like_a_product() -> None:
    given = case()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = queue_itc_loss(temp=0.07, **given)
    low = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in given.items()}
    torch.testing.assert_close(got, queue_itc_loss(temp=0.07, **low))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"alpha": 1.5}, ValueError, "alpha is 1.5"),
        ({"query_m": None}, ValueError, "alpha is 0.4 and query_m is None"),
        ({"query_m": torch.ones(3, 24)}, ValueError, "query_m has shape"),
        ({"keys": torch.ones(3, 24)}, ValueError, "keys has 3 rows, expected at least the 9"),
        ({"queue": torch.ones(3, 25)}, ValueError, r"queue has shape \(3, 25\), expected \[N, 24\]"),
        ({"queue": torch.ones(3, 24, dtype=torch.float64)}, TypeError, "queue has dtype torch.float64"),
        ({"queue": torch.ones(3)}, ValueError, "queue has shape"),
        ({"queue": None}, TypeError, "queue is NoneType"),
        ({"key_ids": torch.arange(9)}, ValueError, "ids is not"),
        ({"ids": torch.arange(9)}, TypeError, "queue_ids is NoneType"),
        ({"ids": torch.arange(8)}, ValueError, r"ids has shape \(8,\), expected \[9\]"),
        ({"ids": torch.ones(9)}, TypeError, "ids has dtype torch.float32"),
        ({"negatives": -1}, ValueError, "negatives is -1"),
        ({"mixture": -0.1}, ValueError, "mixture is -0.1"),
        ({"temp": torch.ones(2)}, ValueError, "temp has shape"),
        ({"backend": "cuda"}, UnsupportedError, "not an implementation"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change: dict, error: type[Exception], words: str) -> None:
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=words):
        queue_itc_loss(**{"temp": 0.07} | case() | change)


def test_moco_errors_and_its_implementations() -> None:
    assert backends(lambda: moco_loss(PROBE, PROBE, PROBE, 0.07)) == ALL
    with pytest.raises(ValueError, match="key has shape"):
        moco_loss(unit(3, 8), unit(4, 8), unit(5, 8), 0.1)
    wide = torch.ones(4, 600, device=DEVICE)
    assert "triton" not in backends(lambda: queue_itc_loss(wide, wide, wide, 0.07))
