"""BLIP-2's contrastive module, in one process and in two, against LAVIS's own lines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import worlds
from distributed import gathered
from distributed.gathered import IDS, batch, lavis, rows_of
from mmfuse.fused import MaxQueryITC


@pytest.mark.parametrize("with_ids", [False, True])
def test_one_process(with_ids: bool) -> None:
    leaves = rows_of(0, 1, batch(6))
    ids = IDS if with_ids else None
    got, want = MaxQueryITC()(*leaves, ids), lavis(*leaves, lambda t: t, 0, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_a_batch_of_one() -> None:
    leaves = rows_of(0, 1, batch(1))
    loss = MaxQueryITC()(*leaves)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_label_smoothing() -> None:
    image, text, temp = batch(6)
    sim = torch.einsum("iqd,jd->ijq", image, text).max(-1).values / temp
    target = torch.arange(6)
    want = (F.cross_entropy(sim, target) + F.cross_entropy(sim.t(), target)) / 2
    torch.testing.assert_close(MaxQueryITC(label_smoothing=0.0)(image, text, temp), want)


def test_two_processes() -> None:
    worlds.run(2, gathered.max_query)
