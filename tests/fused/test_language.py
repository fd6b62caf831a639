from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import assert_no_worse
from mmfuse import UnsupportedError, explain, use_backend
from mmfuse.fused import language, linear_cross_entropy
from mmfuse.kernels._runtime.dtypes import accumulation_dtype

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
SHAPE, D, V = (3, 5), 8, 11


def _inputs(dtype: torch.dtype = torch.float64, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(*SHAPE, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    bias, labels = torch.randn(V, dtype=dtype), torch.randint(V, SHAPE)
    if ignored:
        labels[0, 1] = labels[2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def _teacher(dtype: torch.dtype = torch.float64) -> language.Teacher:
    return torch.randn(*SHAPE, 6, dtype=dtype), torch.randn(V, 6, dtype=dtype), torch.randn(V, dtype=dtype)


def _formula(hidden, weight, bias, labels, teacher, alpha, smoothing, reduction) -> Tensor:  # type: ignore[no-untyped-def]
    logits = hidden @ weight.T + bias
    hard = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing, reduction="none")
    soft = torch.zeros_like(hard)
    if teacher is not None:
        target = (teacher[0] @ teacher[1].T + teacher[2]).softmax(-1)
        soft = -(target * logits.log_softmax(-1)).sum(-1).flatten() * (labels.flatten() != -100)
    loss = ((1 - alpha) * hard + alpha * soft).view(labels.shape)
    if reduction == "none":
        return loss
    return loss.sum() / (labels != -100).sum() if reduction == "mean" else loss.sum()


@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("backend", ["chunked", "torch"])
def test_it_is_the_formula(backend: str, alpha: float, smoothing: float, reduction: str) -> None:
    hidden, weight, bias, labels = _inputs()
    teacher = _teacher() if alpha else None
    got = linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        label_smoothing=smoothing,
        reduction=reduction,
        teacher=teacher,
        alpha=alpha,
        chunk=4,
        backend=backend,
    )
    want = _formula(hidden, weight, bias, labels, teacher, alpha, smoothing, reduction)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for d, expected in zip(
        torch.autograd.grad(got, (hidden, weight, bias), upstream),
        torch.autograd.grad(want, (hidden, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(d, expected)


@REDUCTIONS
def test_gradcheck(reduction: str) -> None:
    *leaves, labels = _inputs()
    teacher = _teacher()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            label_smoothing=0.1,
            reduction=reduction,
            teacher=teacher,
            alpha=0.3,
            chunk=4,
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_is_no_worse_than_eager(reduction: str, dtype: torch.dtype, device: str) -> None:
    n, width, vocabulary = 96, 32, 500
    hidden, weight = torch.randn(n, width), torch.randn(vocabulary, width)
    bias, labels = torch.randn(vocabulary), torch.randint(vocabulary, (n,), device=device)
    labels[:20] = -100
    teacher = tuple(t.to(device, dtype) for t in (torch.randn(n, width), torch.randn(vocabulary, width)))
    upstream = torch.randn((n,) if reduction == "none" else ()).to(device)

    def run(backend: str, dtype: torch.dtype, of: torch.dtype) -> list[Tensor]:
        leaves = [t.to(device, of).to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        soft = (*(t.to(dtype) for t in teacher), None)
        loss = linear_cross_entropy(
            *leaves[:2], labels, bias=leaves[2], reduction=reduction, teacher=soft, alpha=0.4, chunk=17, backend=backend
        )
        assert loss.dtype == accumulation_dtype(dtype)
        return [loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    exact, eager, got = run("torch", torch.float64, dtype), run("torch", dtype, dtype), run("chunked", dtype, dtype)
    for name, *values in zip(("loss", "d hidden", "d weight", "d bias"), got, eager, exact, strict=True):
        assert_no_worse(*values, name=name)


@REDUCTIONS
def test_a_block_of_logits_is_all_that_exists(reduction: str) -> None:
    hidden, weight, bias, labels = _inputs(ignored=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.dim() == 2 and t.shape[1] == V and len(t) != D:  # not weight.T
                    largest = max(largest, len(t))
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, chunk=2).sum().backward()
    assert largest == 2


def test_a_second_backward_repeats_bitwise() -> None:
    hidden, weight, bias, labels = _inputs(torch.float32)
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, chunk=4).sum()
        first, second = (torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = _inputs()
    asked = []
    sweep = language._sweep
    monkeypatch.setattr(
        language, "_sweep", lambda *args, needs, **kw: asked.append(needs) or sweep(*args, needs=needs, **kw)
    )
    linear_cross_entropy(hidden.detach(), weight, labels, bias=bias.detach(), chunk=4).backward()
    linear_cross_entropy(hidden, weight.detach(), labels, reduction="none", chunk=4).sum().backward()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, chunk=4)
    nothing = (False, False, False)
    assert asked == [(False, True, False), nothing, (True, False, False), nothing]
    assert bias.grad is None and hidden.grad is not None and weight.grad is not None


@pytest.mark.parametrize("backend", [None, "chunked", "torch"])
def test_nothing_counts(backend: str | None) -> None:
    hidden, weight, _, labels = _inputs()
    labels.fill_(-100)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend)
        want = torch.full(SHAPE if reduction == "none" else (), expected, dtype=loss.dtype)
        torch.testing.assert_close(loss, want, equal_nan=True)
        assert all(not g.any() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="none", backend=backend)
    assert empty.shape == (0, 5)


def test_few_tokens_step_aside() -> None:
    hidden, weight, _, labels = _inputs(torch.float32)
    few = linear_cross_entropy(hidden, weight, labels, chunk=9)  # 9 count
    more = linear_cross_entropy(hidden, weight, labels, chunk=8)
    torch.testing.assert_close(few, more)
    assert ["LinearCrossEntropy" in type(loss.grad_fn).__name__ for loss in (few, more)] == [False, True]


def test_another_ignored_index_and_strides() -> None:
    hidden, weight, bias, labels = _inputs(ignored=False)
    labels[1, 2:] = 0
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    got = linear_cross_entropy(turned, weight.T.contiguous().T, labels, bias=bias, ignore_index=0, chunk=3)
    want = F.cross_entropy((hidden @ weight.T + bias).flatten(0, -2), labels.flatten(), ignore_index=0)
    torch.testing.assert_close(got, want)


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, bias, labels = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=4)
    want = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, bias=bias)
    torch.testing.assert_close(got, want)
    got.backward()
    assert hidden.grad.dtype == torch.float32


def test_the_context_asks_for_the_formula() -> None:
    hidden, weight, _, labels = _inputs(torch.float32)
    with use_backend("torch"):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert "LinearCrossEntropy" not in type(loss.grad_fn).__name__
    chunked = linear_cross_entropy(hidden, weight, labels, backend="chunked")
    assert "LinearCrossEntropy" in type(chunked.grad_fn).__name__


def test_compiles_in_one_graph() -> None:
    hidden, weight, bias, labels = _inputs(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = compiled(hidden, weight, labels, bias=bias, chunk=4)
    want = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=4)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


# --- other packages -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["liger", "cut_cross_entropy"])
def test_another_package_gives_the_same(peer: str) -> None:
    pytest.importorskip({"liger": "liger_kernel"}.get(peer, peer))
    hidden = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1000, (64,), device="cuda")
    labels[::3] = -100
    got, want = (linear_cross_entropy(hidden, weight, labels, backend=b) for b in (peer, "chunked"))
    # the packages round logits and gradients to bfloat16 on the way; that they compute the same loss is what is asked
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)


def test_what_the_packages_are_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own signatures, without a GPU: the arguments arrive under the names that they have there."""

    def liger_fused_linear_cross_entropy(
        input,
        weight,
        target,
        bias=None,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
    ):  # type: ignore[no-untyped-def]
        logits = (input @ weight.T + bias).float()
        return F.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )

    def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):  # type: ignore[no-untyped-def]
        assert filter_eps is None
        return F.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index, reduction=reduction)

    functional = SimpleNamespace(liger_fused_linear_cross_entropy=liger_fused_linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=cut))
    monkeypatch.setattr(language.LINEAR_CROSS_ENTROPY, "reasons_against", lambda *args: [])
    hidden, weight, bias, labels = _inputs(torch.float32)
    options = {"bias": bias, "label_smoothing": 0.1, "reduction": "sum"}
    for backend, kw in (("liger", options), ("cut_cross_entropy", {"reduction": "none"})):
        got = linear_cross_entropy(hidden, weight, labels, backend=backend, **kw)
        torch.testing.assert_close(got, linear_cross_entropy(hidden, weight, labels, **kw, backend="torch"))


@pytest.mark.parametrize("peer", ["liger", "cut_cross_entropy"])
def test_a_named_package_that_cannot_says_why(peer: str) -> None:
    hidden, weight, _, labels = _inputs(torch.float32)
    with pytest.raises(UnsupportedError, match=f"{peer}: hidden is on cpu"):
        linear_cross_entropy(hidden, weight, labels, backend=peer)


def test_explain() -> None:
    hidden, weight, _, labels = _inputs(torch.float32)
    for op in (linear_cross_entropy, "linear_cross_entropy"):
        lines = explain(op, hidden, weight, labels).splitlines()
        assert "hidden is on cpu" in lines[1] and lines[3].split()[:2] == ["->", "chunked"]


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, r"labels has shape \(3, 4\), expected \[3, 5\]"),
        ({"labels": torch.zeros(3, 5)}, "labels has dtype torch.float32, expected torch.int64"),
        ({"weight": torch.zeros(11, 7)}, r"weight has shape \(11, 7\), expected \[V, 8\]"),
        ({"weight": torch.zeros(11, 8).half()}, "weight has dtype torch.float16, expected torch.float32"),
        ({"hidden": torch.zeros(3, 5, 8).long()}, "hidden has dtype torch.int64, expected a floating-point dtype"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \[11\]"),
        ({"label_smoothing": 2.0}, r"label_smoothing is 2.0, expected a number in \[0, 1\]"),
        ({"alpha": 0.4}, "alpha is 0.4 without a teacher, expected 0"),
        ({"reduction": "max"}, "reduction is 'max', expected one of 'mean', 'sum', 'none'"),
        ({"teacher": (torch.zeros(3, 5, 6), torch.zeros(12, 6), None)}, r"teacher has logits of shape \(3, 5, 12\)"),
        ({"teacher": (torch.zeros(3, 5, 6), torch.zeros(11, 6))}, "teacher has 2 entries"),
        ({"chunk": 0}, "chunk is 0, expected at least 1"),
    ],
)
def test_an_error_names_the_argument(changed: dict, message: str) -> None:
    given = {"hidden": torch.zeros(3, 5, 8), "weight": torch.zeros(11, 8), "labels": torch.zeros(3, 5).long()} | changed
    with pytest.raises((ValueError, TypeError), match=message):
        linear_cross_entropy(**given)


def test_a_backend_that_it_lacks_is_refused() -> None:
    given = torch.zeros(3, 5, 8), torch.zeros(11, 8), torch.zeros(3, 5).long()
    there_are = r"there are liger, cut_cross_entropy, chunked, torch"
    with pytest.raises(UnsupportedError, match=f"cuda: not an implementation of linear_cross_entropy .{there_are}"):
        linear_cross_entropy(*given, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'nothing', expected one of cuda, triton, cpu, slices"):
        linear_cross_entropy(*given, backend="nothing")
