"""Finite scalar quantization and the entropies of lookup-free quantization, against their definitions on every code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from judge import assert_no_worse
from mmfuse.kernels.codebook import fsq, lfq_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_every_code(x: Tensor, inv_temperature: float, scale: float) -> tuple[Tensor, Tensor]:
    """The entropies from the [N, 2^D] probabilities."""
    d = x.shape[1]
    bits = torch.arange(2**d, device=x.device)[:, None] >> torch.arange(d, device=x.device) & 1
    codes = (2 * bits - 1).to(x.dtype) * scale
    prob = (2 * inv_temperature * x @ codes.t()).softmax(1)
    return torch.special.entr(prob).sum(1).mean(), torch.special.entr(prob.mean(0)).sum()


@pytest.mark.parametrize("d", [1, 2, 7])
def test_entropies_and_gradients(d: int) -> None:
    results: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(4):
        x = 0.3 * torch.randn(33, d, device=DEVICE)
        x[0] = 0
        for found, fn, dtype in zip(
            results,
            (lambda x: lfq_entropy(x, inv_temperature=3.0, scale=0.7), *[lambda x: on_every_code(x, 3.0, 0.7)] * 2),
            (torch.float32, torch.float32, torch.float64),
            strict=True,
        ):
            leaf = x.to(dtype).requires_grad_()
            rows, mean = fn(leaf)
            grads = [torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in (rows, mean)]
            found.append([rows.detach(), mean.detach(), *grads])
    stacked = ([torch.stack(t) for t in zip(*r, strict=True)] for r in results)
    for name, *three in zip(("rows", "mean", "d rows", "d mean"), *stacked, strict=True):
        assert_no_worse(*three, name=name)


def test_entropies_of_eighteen_bits() -> None:
    # 2^18 codes: N sure rows of different codes have log N of entropy together and none alone
    bits = torch.arange(32, device=DEVICE)[:, None] >> torch.arange(18, device=DEVICE) & 1
    rows, mean = lfq_entropy((2.0 * bits - 1).double())
    torch.testing.assert_close(mean, torch.tensor(32.0, dtype=torch.float64, device=DEVICE).log())
    assert rows < 1e-100
    rows, mean = lfq_entropy(torch.zeros(5, 18, device=DEVICE))
    full = torch.tensor(2.0, device=DEVICE).log() * 18
    torch.testing.assert_close((rows, mean), (full, full))


def test_gradient_where_codes_are_out_of_reach() -> None:
    # at the temperature of the paper most probabilities underflow
    x = 3 * torch.randn(9, 6, device=DEVICE, dtype=torch.float64)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        if dtype == torch.float32:
            entropy = lfq_entropy(leaf, inv_temperature=20.0)[1]
        else:
            bits = torch.arange(2**6, device=DEVICE)[:, None] >> torch.arange(6, device=DEVICE) & 1
            log_p = (40.0 * leaf @ (2.0 * bits - 1).double().t()).log_softmax(1).logsumexp(0) - math.log(9)
            entropy = -(log_p.exp() * log_p).sum()
        grads.append(torch.autograd.grad(entropy, leaf)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_entropy_gradcheck() -> None:
    x = torch.randn(5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lfq_entropy(x, inv_temperature=0.5), (x,))
    assert lfq_entropy(x.half())[0].dtype == torch.float32
    with pytest.raises(ValueError, match="expected at least one bit"):
        lfq_entropy(x[:, :0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3], [7, 4]], ids=str)
def test_fsq_as_the_library(levels: list[int], symmetric: bool) -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.FSQ(levels, preserve_symmetry=symmetric).to(DEVICE)
    z = torch.randn(3, 20, len(levels), device=DEVICE, requires_grad=True)
    (z_q, codes), (expected, indices) = fsq(z, levels, symmetric=symmetric), theirs(z)
    weight = torch.linspace(-1, 1, z.numel(), device=DEVICE).view_as(z)
    got, want = (torch.autograd.grad((t * weight).sum(), z)[0] for t in (z_q, expected))
    torch.testing.assert_close(z_q, expected)
    torch.testing.assert_close(got, want)
    assert torch.equal(codes, indices.long())
    torch.testing.assert_close(z_q.detach(), theirs.indices_to_codes(codes))


def test_fsq_reaches_every_code_and_no_other() -> None:
    levels = [4, 3, 6]
    z_q, codes = fsq(4 * torch.randn(20000, 3, device=DEVICE), levels)
    assert codes.unique().tolist() == list(range(72)) and len(z_q.unique(dim=0)) == 72
    assert fsq(z_q.half()[:0], levels)[0].dtype == torch.float16
    with pytest.raises(ValueError, match="levels is .* expected at least 3"):
        fsq(z_q, [2, 3, 3])
    with pytest.raises(ValueError, match=r"expected \[..., 2\]"):
        fsq(z_q, [3, 3])
