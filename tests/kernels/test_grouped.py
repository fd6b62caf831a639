"""`grouped_clip_loss`: the reference against the formula for each group, the others against it, and the launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, compared, judge
from mmfuse.kernels import grouped_clip_loss
from registered import backends, opcheck, reasons

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: grouped_clip_loss([PROBE], [PROBE], [1.0]))
FUSED = [n for n in ALL if n != "torch"]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SHAPES = [(5, 16), (70, 40), (1, 16), (33, 100)]
SCALES = (20.0, 5.0, 14.3, 100.0)


def features(shapes=SHAPES) -> tuple[list[Tensor], list[Tensor]]:  # type: ignore[no-untyped-def]
    made = [[F.normalize(torch.randn(n, d, device=DEVICE), dim=-1) for n, d in shapes] for _ in range(2)]
    return made[0], made[1]


def written_out(images, texts, scales, weights=(0.5, 0.5), normalize=False) -> Tensor:  # type: ignore[no-untyped-def]
    losses = []
    for x, y, scale in zip(images, texts, scales, strict=True):
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        s = scale * x @ y.t()
        row, column = (-s.log_softmax(dim).diagonal().mean() for dim in (1, 0))
        losses.append(weights[0] * row + weights[1] * column)
    return torch.stack(losses)


def results(loss, given, scales=SCALES, **options: Any) -> Results:  # type: ignore[no-untyped-def]
    """The losses, and the gradients of a weighted sum of them."""
    acc = torch.promote_types(given[0][0].dtype, torch.float32)
    images, texts = ([t.detach().requires_grad_() for t in side] for side in given)
    s = [torch.tensor(v, dtype=acc, device=DEVICE, requires_grad=True) for v in scales]
    losses = loss(images, texts, s, **options)
    weights = torch.arange(1, 1 + len(s), device=DEVICE, dtype=acc)
    leaves = {
        f"{name} {i}": t for name, side in zip("xys", (images, texts, s), strict=True) for i, t in enumerate(side)
    }
    grads = torch.autograd.grad(losses @ weights, list(leaves.values()))
    return {"losses": losses.detach(), **dict(zip(leaves, grads, strict=True))}


def grouped(given, backend: str, **options: Any) -> Results:  # type: ignore[no-untyped-def]
    return results(partial(grouped_clip_loss, backend=backend), given, **options)


OPTIONS = [{}, {"normalize": True, "weights": (0.7, 0.2)}, {"weights": (0.0, 9.0)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_formula(options: dict) -> None:
    given = [[t.double() for t in side] for side in features()]
    got, want = grouped(given, "torch", **options), results(written_out, given, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_matches_float64(backend: str, dtype: torch.dtype, options: dict) -> None:
    judge(compared(partial(grouped, **options), features, backend, dtype))


def test_one_launch_of_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" not in ALL:
        pytest.skip("Triton is not there")
    from mmfuse.kernels.contrastive import kernel

    launches: list[str] = []

    class Counted:
        def __init__(self, name: str):
            self.name, self.inner = name, getattr(kernel, name)

        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            launches.append(self.name)
            return self.inner[grid]

    names = ["_stats_fwd_kernel", "_merge_kernel", "_grad_kernel"]
    for name in names:
        monkeypatch.setattr(kernel, name, Counted(name))
    grouped(features(), "triton")
    assert launches == names


@pytest.mark.parametrize("trained", ["images[1]", "texts[3]", "scales", "texts"])
@pytest.mark.parametrize("backend", FUSED)
def test_frozen_inputs_get_no_gradient(backend: str, trained: str) -> None:
    images, texts = features()
    scales = [torch.tensor(v, device=DEVICE) for v in SCALES]
    inputs = {"images[1]": [images[1]], "texts[3]": [texts[3]], "scales": scales, "texts": texts}[trained]
    for t in inputs:
        t.requires_grad_()
    got, want = (
        torch.autograd.grad(grouped_clip_loss(images, texts, scales, backend=name).sum(), inputs)
        for name in (backend, "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_bitwise_equal_runs(backend: str) -> None:
    images, texts = features()
    one, two = (grouped((images, texts), backend) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("backend", ALL)
def test_empty_group(backend: str) -> None:
    given = features([(4, 16), (0, 16), (3, 16)])
    got, want = grouped(given, backend, scales=SCALES[:3]), results(written_out, given, SCALES[:3])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_tensor_of_scales() -> None:
    images, texts = features()
    scales = torch.tensor(SCALES, device=DEVICE, requires_grad=True)
    for backend in ALL:
        losses = grouped_clip_loss(images, texts, scales, backend=backend)
        (got,) = torch.autograd.grad(losses.sum(), scales)
        (want,) = torch.autograd.grad(written_out(images, texts, scales).sum(), scales)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("triton" not in ALL or GPU, reason="float64 Triton kernels run in the interpreter only")
def test_gradcheck() -> None:
    images, texts = ([t.double().requires_grad_() for t in side] for side in features([(4, 5), (3, 2)]))
    s = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def losses(a: Tensor, b: Tensor, c: Tensor, d: Tensor, s: Tensor) -> Tensor:
        return grouped_clip_loss([a, b], [c, d], s, normalize=True, backend="triton")

    assert torch.autograd.gradcheck(losses, (*images, *texts, s), fast_mode=True)


@pytest.mark.parametrize("backend", [None, *(["triton"] if "triton" in ALL else [])])
def test_compiles_whole(backend: str | None) -> None:
    images, texts = features(SHAPES[:2])
    images[0].requires_grad_(), texts[1].requires_grad_()

    def loss(*tensors: Tensor) -> Tensor:
        return grouped_clip_loss(tensors[:2], tensors[2:], (9.0, 5.0), backend=backend).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (*images, *texts)
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    got, want = (torch.autograd.grad(f(*inputs), (images[0], texts[1])) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif("triton" not in ALL, reason="Triton is not there")
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize: bool) -> None:
    images, texts = features([(3, 16), (5, 16)])
    s = torch.tensor([3.0, 9.0], device=DEVICE, requires_grad=True)
    for t in (images[0], *texts):
        t.requires_grad_()
    opcheck(lambda: grouped_clip_loss(images, texts, list(s), normalize=normalize, backend="triton"), "_grouped_clip")


def test_errors() -> None:
    images, texts = features(SHAPES[:2])
    for error, message, args in (
        (ValueError, "images, texts and logit_scales have 2, 1, 2 groups", (images, texts[:1], (1.0, 1.0))),
        (ValueError, "have 0, 0, 0 groups, expected as many", ([], [], [])),
        (
            ValueError,
            r"texts\[1\] has shape .*expected \[N, 40\], as many features per row as images\[1\]",
            (images, [texts[0]] * 2, (1.0, 1.0)),
        ),
        (ValueError, r"texts\[0\] has shape .*expected \[4, 16\] as images\[0\]", ([images[0][:4]], texts[:1], (1.0,))),
        (
            TypeError,
            r"images\[1\] has dtype torch.float64",
            ([images[0], images[1].double()], [texts[0], texts[1].double()], (1.0, 1.0)),
        ),
        (TypeError, "logit_scale is str", (images, texts, (1.0, "2"))),
        (ValueError, "weights is", (images, texts, (1.0, 1.0), (1.0,))),
    ):
        with pytest.raises(error, match=message):
            grouped_clip_loss(*args[:3], **({"weights": args[3]} if len(args) > 3 else {}))
    large = torch.empty(9000, 1, device=DEVICE)
    for side in ([large], [PROBE, large]):
        why = reasons(lambda side=side: grouped_clip_loss(side, side, [1.0] * len(side)))
        assert "triton" not in ALL or "9000 rows, more than 8192" in why["triton"][0]
    assert "-> " in mmfuse.explain(mmfuse.grouped_clip_loss, [PROBE, PROBE], [PROBE, PROBE], [1.0, 2.0])
