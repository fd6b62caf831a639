"""The momentum queue: a ring on the device with the official layout, and the momentum update."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import worlds
from distributed import gathered
from mmfuse.fused import HardNegativeSampler, MomentumQueueITC, momentum_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def make(m: int = 10, d: int = 8, with_ids: bool = False) -> MomentumQueueITC:
    return MomentumQueueITC(d, m, with_ids=with_ids).to(DEVICE)


def test_a_new_queue_is_the_official_one() -> None:
    torch.manual_seed(1)
    queue = MomentumQueueITC(8, 10, with_ids=True)
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(8, 10), dim=0) for _ in range(2))
    assert torch.equal(queue.image_queue, image) and torch.equal(queue.text_queue, text)
    shapes = {k: tuple(v.shape) for k, v in queue.state_dict().items()}
    assert shapes == {"image_queue": (8, 10), "text_queue": (8, 10), "idx_queue": (1, 10), "queue_ptr": (1,)}
    assert (queue.idx_queue == -100).all() and queue.queue_ptr.dtype == torch.long
    assert "idx_queue" not in make().state_dict()


def test_enqueue_wraps_around_at_any_size() -> None:
    queue, b = make(m=10, with_ids=True), 4
    expected = {k: v.clone() for k, v in queue.state_dict().items()}
    for step in range(7):
        image, text, ids = unit(b, 8), unit(b, 8), torch.arange(b, device=DEVICE) + 10 * step
        for i in range(b):
            at = (step * b + i) % 10
            expected["image_queue"][:, at], expected["text_queue"][:, at] = image[i], text[i]
            expected["idx_queue"][0, at] = ids[i]
        queue.enqueue(image, text, ids)
        expected["queue_ptr"][0] = (step + 1) * b % 10
        for name, value in queue.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_rows_stay_contiguous_through_checkpoints_and_moves() -> None:
    queue = make()
    queue.enqueue(unit(3, 8), unit(3, 8))
    file = io.BytesIO()
    torch.save({k: v.contiguous() for k, v in queue.state_dict().items()}, file)  # as the official code stores it
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file))
    for q in (queue, other, copy.deepcopy(queue), make().double()):
        assert q.image_queue.t().is_contiguous() and q.text_queue.t().is_contiguous()
    assert torch.equal(other.image_queue, queue.image_queue) and other.queue_ptr.item() == 3


def official(queue: MomentumQueueITC, x: list[Tensor], temp: Tensor, alpha: float, ids: Tensor | None) -> list[Tensor]:
    """ALBEF's models/model_retrieval.py, of which model_pretrain.py is the case without ids."""
    image, text, image_m, text_m = x
    with torch.no_grad():
        image_all = torch.cat([image_m.t(), queue.image_queue.clone().detach()], dim=1)
        text_all = torch.cat([text_m.t(), queue.text_queue.clone().detach()], dim=1)
        sims = image_m @ text_all / temp, text_m @ image_all / temp
        if ids is None:
            hard = torch.zeros_like(sims[0]).fill_diagonal_(1)
        else:
            same = torch.eq(ids.view(-1, 1), torch.cat([ids.view(1, -1), queue.idx_queue], dim=1)).float()
            hard = same / same.sum(1, keepdim=True)
        targets = [alpha * F.softmax(s, dim=1) + (1 - alpha) * hard for s in sims]
    logits = image @ text_all / temp, text @ image_all / temp
    return [-(F.log_softmax(s, dim=1) * t).sum(1).mean() for s, t in zip(logits, targets, strict=True)]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_equals_the_official_code_over_steps(alpha: float, with_ids: bool) -> None:
    queue = make(m=30, with_ids=with_ids)
    for _ in range(4):
        x = [unit(7, 8) for _ in range(4)]
        ids = torch.randint(0, 9, (7,), device=DEVICE) if with_ids else None
        grads = []
        for losses in (queue, None):
            leaves = [t.clone().requires_grad_() for t in x[:2]]
            temp = torch.tensor(0.07, device=DEVICE, requires_grad=True)
            if losses is None:
                pair = official(queue, [*leaves, *x[2:]], temp, alpha, ids)
            else:
                pair = list(losses(*leaves, *x[2:], temp, alpha, ids))
            grads.append([*pair, *torch.autograd.grad(sum(pair) / 2, (*leaves, temp))])
        torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
        queue.enqueue(*x[2:], ids)


@pytest.mark.parametrize("with_ids", [False, True])
def test_negatives_are_those_of_the_sampler(with_ids: bool) -> None:
    queue, x = make(m=30, with_ids=with_ids), [unit(9, 8) for _ in range(4)]
    ids = torch.randint(0, 5, (9,), device=DEVICE) if with_ids else None
    sampler = HardNegativeSampler("albef_retrieval" if with_ids else "albef", k=3)
    for seed in (5, torch.tensor(-6, device=DEVICE)):
        i2t, t2i, *drawn = queue(*x, 0.07, 0.4, ids, negatives=3, seed=seed)
        assert (i2t, t2i) == queue(*x, 0.07, 0.4, ids)
        want = sampler(*x[:2], 1 / 0.07, ids, image_all=x[2], text_all=x[3], seed=seed)
        assert all(map(torch.equal, drawn, want))


def test_enqueue_compiles_in_one_graph() -> None:
    queue, other = make(), None
    other = copy.deepcopy(queue)
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        image, text = unit(4, 8), unit(4, 8)
        compiled(image, text)
        other.enqueue(image, text)
    assert all(map(torch.equal, queue.state_dict().values(), other.state_dict().values()))


def test_forward_compiles_in_one_graph() -> None:
    queue, x = make(m=30, with_ids=True), [unit(4, 8).requires_grad_() for _ in range(4)]
    ids = torch.randint(0, 3, (4,), device=DEVICE)
    compiled = torch.compile(queue, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(sum(f(*x, 0.07, 0.4, ids, negatives=1)[:2]), x[:2]) for f in (queue, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    queue, x = make(m=4096, d=256), [unit(64, 256).bfloat16() for _ in range(4)]
    temp = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    leaves = [t.requires_grad_() for t in x[:2]]

    def step() -> None:
        torch.autograd.grad(sum(queue(*leaves, *x[2:], temp, 0.4)), (*leaves, temp))
        queue.enqueue(*x[2:])
        momentum_update(leaves, x[2:], 0.995)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_errors() -> None:
    x, ids = unit(4, 8), torch.arange(4, device=DEVICE)
    with pytest.raises(ValueError, match="ids are given, expected None"):
        make().enqueue(x, x, ids)
    with pytest.raises(ValueError, match="ids are given, expected None"):
        make()(x, x, x, x, 0.07, ids=ids)
    with pytest.raises(ValueError, match="ids is None, expected"):
        make(with_ids=True).enqueue(x, x)
    with pytest.raises(ValueError, match="image_m has 4 rows over all ranks, expected at most the 3"):
        make(m=3).enqueue(x, x)
    with pytest.raises(ValueError, match=r"image_m has shape \(4, 7\), expected \[B, 8\]"):
        make().enqueue(x[:, :7], x[:, :7])
    with pytest.raises(ValueError, match=r"text_m has shape \(3, 8\)"):
        make().enqueue(x, x[:3])
    with pytest.raises(ValueError, match=r"ids has shape \(3,\)"):
        make(with_ids=True).enqueue(x, x, ids[:3])


def test_a_group_gathers() -> None:
    worlds.run(2, gathered.momentum_queue)


def test_momentum_update_is_the_official_formula() -> None:
    params = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 4), (5,), ())]
    momentum = [torch.randn_like(p) for p in params]
    want = [m.double() * 0.995 + p.detach().double() * (1 - 0.995) for p, m in zip(params, momentum, strict=True)]
    momentum_update(iter(params), iter(momentum), 0.995)
    torch.testing.assert_close([m.double() for m in momentum], want, atol=1e-7, rtol=1e-6)
    with pytest.raises(RuntimeError):
        momentum_update(params[:2], momentum, 0.9)
