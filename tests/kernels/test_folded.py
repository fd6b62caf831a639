"""A norm and a LayerScale folded into a product: every identity, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.multiway.folded import Folded, FoldedGrads, fold, folded_linear, folded_linear_grads, statistics

T, K, N, EPS = 7, 12, 5, 1e-5
CENTRED = pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])


def case(rows: int = T) -> tuple[Tensor, list[Tensor]]:
    """Rows far from 0, and weight, bias, gamma, beta, scale."""
    shapes = ((N, K), (N,), (K,), (K,), (N,))
    x, *parameters = (torch.randn(s, dtype=torch.float64) for s in ((rows, K), *shapes))
    return 3 * x + 10, parameters


def unfolded(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, centred: bool
) -> Tensor:
    """Norm, product and LayerScale, one after another."""
    y = F.layer_norm(x, (K,), gamma, beta, EPS) if centred else F.rms_norm(x, (K,), gamma, EPS) + beta
    return scale * F.linear(y, weight, bias)


def folded(x: Tensor, parameters: list[Tensor], centred: bool) -> tuple[Folded, Tensor, Tensor, Tensor]:
    f = fold(*parameters, centred=centred)
    mean, rstd = statistics(x, EPS, centred)
    return f, mean, rstd, folded_linear(x, f, mean, rstd)


@CENTRED
def test_the_product(centred: bool) -> None:
    x, parameters = case()
    *_, z = folded(x, parameters, centred)
    torch.testing.assert_close(z, unfolded(x, *parameters, centred=centred), rtol=1e-11, atol=1e-12)


@CENTRED
@pytest.mark.parametrize("rows", [T, 1, 0])
@pytest.mark.parametrize("name", FoldedGrads._fields)
def test_a_gradient(name: str, rows: int, centred: bool) -> None:
    """That of every operand; of an expert without rows exactly 0."""
    x, parameters = case(rows)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    dz = torch.randn(rows, N, dtype=torch.float64)
    want = dict(
        zip(FoldedGrads._fields, torch.autograd.grad(unfolded(*leaves, centred=centred), leaves, dz), strict=True)
    )
    f, mean, rstd, z = folded(x, parameters, centred)
    got = folded_linear_grads(dz, z, x, f, mean, rstd, *parameters)._asdict()
    torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-11)
    assert rows or not got[name].any()


def test_the_shift_is_that_of_the_rounded_weight() -> None:
    """Rows that are constant are 0 after a norm: the product must cancel, however far from 0 they are."""
    _, parameters = case()
    f = fold(*(t.bfloat16() for t in parameters))
    mean, rstd = torch.full((1, 1), 1000.0), torch.ones(1, 1)
    whole = Folded(f.weight.float(), f.weight.float().sum(1), f.bias.float())
    z = folded_linear(torch.full((1, K), 1000.0), whole, mean, rstd)
    # two sums of some 1000 cancel in float32; with the shift of the weight before it was rounded 3 and more is left
    torch.testing.assert_close(z[0], whole.bias, rtol=0, atol=1e-3)


def test_the_second_norm_from_the_residual_stream() -> None:
    """t2 needs z - d; where a residual was added, the stream's own difference is z."""
    x, parameters = case()
    f, mean, rstd, z = folded(x, parameters, True)
    before, dz = torch.randn_like(z), torch.randn_like(z)
    after = before + z
    torch.testing.assert_close((dz * (after - before)).sum(1), (dz * z).sum(1), rtol=1e-12, atol=1e-12)
    got = folded_linear_grads(dz, after - before, x, f, mean, rstd, *parameters)
    torch.testing.assert_close(got, folded_linear_grads(dz, z, x, f, mean, rstd, *parameters), rtol=1e-11, atol=1e-11)
