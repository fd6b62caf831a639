"""Cross-entropy of bfloat16 logits as they are, against float64 and torch's in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import assert_no_worse
from mmfuse.kernels._runtime import chosen, use_backend
from mmfuse.kernels.contrastive.cross_entropy import _LEAST, mean_cross_entropy


def of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = mean_cross_entropy(leaf, labels, torch.promote_types(logits.dtype, torch.float32))
    return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]


@pytest.mark.parametrize("size", [(800, 333), (9, 32000), (270000, 1)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_matches_float64(size: tuple[int, int], spread: float) -> None:
    logits = (spread * torch.randn(size)).bfloat16()
    labels = torch.randint(size[1], size[:1])
    got, eager, exact = of(logits, labels), of(logits.float(), labels), of(logits.double(), labels)
    assert_no_worse(got[0], eager[0], exact[0])
    # rounded once, as torch's in float32 is by the cast
    assert_no_worse(got[1], eager[1].bfloat16(), exact[1])
    again = of(logits, labels)
    assert all(map(torch.equal, got, again))


def test_what_is_no_number_stays_in_its_row() -> None:
    logits, labels = torch.randn(800, 333).bfloat16(), torch.zeros(800, dtype=torch.int64)
    logits[3, 5], logits[7, 2], logits[9] = torch.nan, torch.inf, -torch.inf
    loss, grad = of(logits, labels)
    assert loss.isnan() and grad.isnan().any(1).nonzero().flatten().tolist() == [3, 7, 9]


def test_a_label_out_of_range() -> None:
    for label in (333, -1):
        with pytest.raises(RuntimeError, match="expected 0 <= label < 333"):
            of(torch.randn(800, 333).bfloat16(), torch.full((800,), label))


def test_second_derivatives_are_those_of_the_formula() -> None:
    logits, labels = torch.randn(800, 333).bfloat16(), torch.randint(333, (800,))

    def second() -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss = mean_cross_entropy(leaf, labels, torch.float32)
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(g.float().square().sum(), leaf)[0]

    ours = second()
    with use_backend("torch"):
        assert_no_worse(ours, second(), ours.double())
    assert ours.any()


def test_it_is_taken_where_it_pays() -> None:
    def choice(n: int, dtype: torch.dtype = torch.bfloat16) -> str:
        labels = torch.zeros(n, dtype=torch.int64)
        return chosen(lambda: mean_cross_entropy(torch.zeros(n, 64, dtype=dtype), labels, torch.float32))

    assert choice(_LEAST // 64) == "cpu"
    for few in ((_LEAST // 64 - 1, torch.bfloat16), (_LEAST // 64, torch.float32)):
        with pytest.raises(ValueError, match="came to no operator"):
            choice(*few)


def test_soft_targets_and_smoothing() -> None:
    logits, labels = torch.randn(800, 333).bfloat16(), torch.randint(333, (800,))
    for target, options in ((F.one_hot(labels, 333).float(), {}), (labels, {"label_smoothing": 0.1})):
        want = F.cross_entropy(logits.float(), target, **options)
        assert torch.equal(mean_cross_entropy(logits, target, torch.float32, **options), want)
