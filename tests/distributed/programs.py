"""What each rank runs in the tests of the distributed losses: it raises where something differs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmfuse
from mmfuse.fused import ClipLoss, CoCaLoss, DistillClipLoss, GradCache, SigLipLoss
from mmfuse.kernels.contrastive.distributed import op, peers

IMPLS = ("bidir", "shift", "reduce", "gather")
MODES = [(local, grad) for local in (False, True) for grad in (False, True)]


def pairs(sizes: list[int], d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The global batch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, sum(sizes), d, generator=generator, dtype=torch.float64)
    return F.normalize(x + y, dim=-1).to(dtype), F.normalize(y, dim=-1).to(dtype)


def rows(t: Tensor, sizes: list[int], rank: int) -> Tensor:
    return t.split(sizes)[rank]


def differentiate(loss: Callable[..., Any], g: float, *leaves: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    value = loss(*leaves)
    total = sum(value) if isinstance(value, tuple) else value
    return [total.detach(), *torch.autograd.grad(g * total, leaves)]


def close(got: list[Tensor], want: list[Tensor], what: Any, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


@mmfuse.use_backend("chunked")
def as_open_clip(rank: int, size: int, b: int, d: int) -> None:
    """Every mode, implementation and module against open_clip's own on the same ranks, in float64."""
    from open_clip import loss as theirs

    world = {"rank": rank, "world_size": size}
    x, y = (rows(t, [b] * size, rank) for t in pairs([b] * size, d))
    tx, ty = (rows(t, [b] * size, rank) for t in pairs([b] * size, d + 3, seed=1))
    scale, bias, t_scale = (torch.tensor(v, dtype=torch.float64) for v in (12.0, -3.0, 20.0))
    logits, labels = torch.randn(b, 5, 7, dtype=torch.float64), torch.arange(5).expand(b, 5)
    upstream = (1.0, 0.5 + rank, float(rank == 0), 1.0 if rank == 0 else -1.0 / (size - 1), 0.0)
    for local, grad in MODES:
        mode = {"local_loss": local, "gather_with_grad": grad}
        for g in upstream:
            want = differentiate(theirs.ClipLoss(**mode, **world), g, x, y, scale)
            others = ({"save": "recompute"}, {"backend": "torch"}, {"sizes": [b] * size}) if g == upstream[1] else ()
            if others and (grad or not local):
                others += ({"dist_impl": "ring"}, {"dist_impl": "ring", "save": "store"})
            for options in ({}, *others):
                got = differentiate(partial(mmfuse.distributed_clip_loss, **mode, **options), g, x, y, scale)
                close(got, want, (mode, g, options))
        want = differentiate(theirs.ClipLoss(**mode, **world), 1.0, x, y, scale, bias)
        close(differentiate(ClipLoss(**mode, **world), 1.0, x, y, scale, bias), want, mode)
        mine, other = (c(2.0, 3.0, pad_id=1, **mode, **world) for c in (CoCaLoss, theirs.CoCaLoss))
        got, want = (
            differentiate(lambda x, y, s, z, m=m: m(x, y, z, labels, s), 1.0, x, y, scale, logits)
            for m in (mine, other)
        )
        close(got, want, ("CoCaLoss", mode))
        leaves = (x, y, scale, tx, ty, t_scale)
        got, want = (differentiate(c(**mode, **world), 1.5, *leaves) for c in (DistillClipLoss, theirs.DistillClipLoss))
        close(got, want, ("DistillClipLoss", mode))
        mine, other = (c(cache_labels=True, **mode, **world) for c in (ClipLoss, theirs.ClipLoss))
        got, want = (differentiate(partial(_of_logits, c), 1.0, x, y, scale, bias) for c in (mine, other))
        close(got, want, ("get_logits", mode))
        assert torch.equal(mine.get_ground_truth(x.device, b), other.get_ground_truth(x.device, b))
    for impl in IMPLS:
        for g in upstream[:2]:
            want = differentiate(theirs.SigLipLoss(**world, dist_impl=impl), g, x, y, scale, bias)
            close(differentiate(SigLipLoss(**world, dist_impl=impl), g, x, y, scale, bias), want, impl)
            plain = {"dist_impl": impl, "backend": "torch"}
            got = differentiate(partial(mmfuse.distributed_siglip_loss, **plain), g, x, y, scale, bias)
            close(got, want, plain)


def _of_logits(loss: nn.Module, *args: Tensor) -> Tensor:
    per_image, per_text = loss.get_logits(*args)
    return (per_image.square() + 2 * per_text.sin()).sum()


def in_low_precision(rank: int, size: int, b: int, d: int, draws: int, backend: str) -> list[list[Tensor]]:
    """[ours, open_clip's, open_clip's in float64] of several draws in every mode and dtype, to be judged together."""
    from open_clip import loss as theirs

    world = {"rank": rank, "world_size": size}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for draw in range(draws):
            x, y = (rows(t, [b] * size, rank) for t in pairs([b] * size, d, seed=draw, dtype=dtype))
            scale, bias = torch.tensor(14.3), torch.tensor(-5.0)
            for local, grad in MODES:
                kinds = ((c, (local, grad), (scale,)) for c in (ClipLoss, theirs.ClipLoss))
                found.append(_three(kinds, world, x, y, backend))
            kinds = ((c, (), (scale, bias)) for c in (SigLipLoss, theirs.SigLipLoss))
            found.append(_three(kinds, world, x, y, backend))
    return found


def _three(kinds: Any, world: dict[str, int], x: Tensor, y: Tensor, backend: str) -> list[list[Tensor]]:
    (ours, mode, scalars), (theirs, *_) = kinds
    wide = [t.double() for t in (x, y, *scalars)]
    options = {"local_loss": mode[0], "gather_with_grad": mode[1]} if mode else {}
    with mmfuse.use_backend(backend):
        results = [differentiate(c(**options, **world), 1.0, x, y, *scalars) for c in (ours, theirs)]
    return [*results, differentiate(theirs(**options, **world), 1.0, *wide)]


@mmfuse.use_backend("chunked")
def of_the_global_batch(rank: int, size: int, sizes: list[int]) -> None:
    """Uneven ranks (one may be empty), sub-groups and `grad_scale="true"` against one process."""
    groups = [None] if len(sizes) == size else [dist.new_group([1, size - 1])]
    if groups[0] is not None and rank not in (1, size - 1):
        assert dist.get_rank(groups[0]) == -1
        try:
            mmfuse.distributed_clip_loss(*pairs([2], 4), 10.0, group=groups[0])
        except ValueError as error:
            assert "not in" in str(error)
            return
        raise AssertionError("a rank outside of the group was not refused")
    group, me, world, n = groups[0], dist.get_rank(groups[0]), len(sizes), sum(sizes)
    all_x, all_y = pairs(sizes, 9)
    scale, bias = (torch.tensor(v, dtype=torch.float64) for v in (12.0, -3.0))
    x, y = (rows(t, sizes, me) for t in (all_x, all_y))
    own = slice(sum(sizes[:me]), sum(sizes[: me + 1]))

    def one_process(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return mmfuse.clip_loss(x, y, s, backend="torch")

    value, dx, dy, ds = differentiate(one_process, 1.0, all_x, all_y, scale)
    for options in ({}, {"save": "recompute"}, {"backend": "torch"}, {"sizes": sizes}, {"dist_impl": "ring"}):
        for local, grad in MODES:
            mode = {"local_loss": local, "gather_with_grad": grad, "group": group, **options}
            got = differentiate(partial(mmfuse.distributed_clip_loss, grad_scale="true", **mode), 1.0, x, y, scale)
            # what DistributedDataParallel does to parameters: the mean over ranks
            means = torch.stack([got[0], got[3]])
            dist.all_reduce(means, group=group)
            close([*(means / world), got[1] / world, got[2] / world], [value, ds, dx[own], dy[own]], ("true", mode))
            if not local:
                close([got[0]], [value], mode)
                factor = 1 if not grad else world
                got = differentiate(partial(mmfuse.distributed_clip_loss, **mode), 1.0, x, y, scale)
                close(got, [value, factor * dx[own], factor * dy[own], ds], ("global", mode))
            elif grad:
                got = differentiate(partial(mmfuse.distributed_clip_loss, **mode), 1.0, x, y, scale)
                want = differentiate(lambda *a: _mean_of_local(*a, sizes), 1.0, all_x, all_y, scale)
                close([got[1], got[2]], [want[1][own], want[2][own]], ("local", mode))
    teachers = pairs(sizes, 7, seed=1)
    want = differentiate(lambda *a: mmfuse.distill_clip_loss(*a, *teachers, 20.0), 1.0, all_x, all_y, scale)
    for local, grad in MODES:
        loss = DistillClipLoss(local, grad, rank=me, world_size=world)
        loss.group, loss.grad_scale = group, "true"
        got = differentiate(lambda *a, m=loss: m(*a, *(rows(t, sizes, me) for t in teachers), 20.0), 1.0, x, y, scale)
        means = torch.stack([got[0], got[3]])
        dist.all_reduce(means, group=group)
        found = [*(means / world), got[1] / world, got[2] / world]
        close(found, [want[0], want[3], want[1][own], want[2][own]], ("DistillClipLoss", local, grad))
    want = differentiate(lambda *a: _sum_of_siglip(*a, sizes), 1.0, all_x, all_y, scale, bias)
    for impl in IMPLS:
        got = differentiate(
            partial(mmfuse.distributed_siglip_loss, dist_impl=impl, group=group), 1.0, x, y, scale, bias
        )
        sums = torch.stack([got[0], got[3], got[4]])
        dist.all_reduce(sums, group=group)
        close([*sums, got[1], got[2]], [want[0], want[3], want[4], want[1][own], want[2][own]], impl)
    assert n == len(all_x)


def _mean_of_local(x: Tensor, y: Tensor, s: Tensor, sizes: list[int]) -> Tensor:
    """sum_r L_r: every rank's mean over its own pairs."""
    z, label = s * x @ y.T, torch.arange(len(x))
    per_pair = (F.cross_entropy(z, label, reduction="none") + F.cross_entropy(z.T, label, reduction="none")) / 2
    return sum(part.mean() for part in per_pair.split(sizes) if len(part))


def _sum_of_siglip(x: Tensor, y: Tensor, s: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    z = (2 * torch.eye(len(x), dtype=x.dtype) - 1) * (s * x @ y.T + b)
    return sum(-F.logsigmoid(part).sum() / len(part) for part in z.split(sizes) if len(part))


def every_backend(rank: int, size: int, backends: list[str]) -> None:
    """Each implementation against plain torch's, in float32, where no tile is full."""
    sizes = [5, 2]
    x, y = (rows(t, sizes, rank) for t in pairs(sizes, 16, dtype=torch.float32))
    scale, bias = torch.tensor(12.0), torch.tensor(-3.0)
    for backend in backends:
        for save in ("recompute", "store"):
            mode = {"local_loss": True, "gather_with_grad": True, "save": save}
            got, want = (
                differentiate(partial(mmfuse.distributed_clip_loss, **mode, backend=b), 1.0 + rank, x, y, scale)
                for b in (backend, "torch")
            )
            close(got, want, (backend, save), 1e-4, 1e-5)
        for impl in ("bidir", "gather"):
            got, want = (
                differentiate(
                    partial(mmfuse.distributed_siglip_loss, dist_impl=impl, backend=b), 1.0 + rank, x, y, scale, bias
                )
                for b in (backend, "torch")
            )
            close(got, want, (backend, impl), 1e-4, 1e-5)


@mmfuse.use_backend("chunked")
def only_what_is_asked(rank: int, size: int) -> None:
    """A locked tower, no gradient at all, a scale that is a number, double backward."""
    x, y = (rows(t, [3] * size, rank) for t in pairs([3] * size, 5))
    for options in (
        {"local_loss": True, "gather_with_grad": True},
        {"gather_with_grad": True},
        {},
        {"dist_impl": "ring"},
    ):
        leaf = x.clone().requires_grad_()
        mmfuse.distributed_clip_loss(leaf, y, 10.0, **options).backward()
        full = differentiate(partial(mmfuse.distributed_clip_loss, logit_scale=10.0, **options), 1.0, x, y)
        close([leaf.grad], [full[1]], options)
        s = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
        mmfuse.distributed_clip_loss(x, y, s, **options).backward()
        close([s.grad], differentiate(partial(mmfuse.distributed_clip_loss, **options), 1.0, x, y, s)[3:], 0)
        with torch.no_grad():
            assert not mmfuse.distributed_clip_loss(leaf, y, s, **options).requires_grad
    leaf = x.clone().requires_grad_()
    for loss in (mmfuse.distributed_clip_loss, mmfuse.distributed_siglip_loss):
        (first,) = torch.autograd.grad(loss(leaf, y, 10.0).square(), leaf, create_graph=True)
        for again in (first.sum().backward, lambda d=first: torch.autograd.grad(d.sum(), leaf, allow_unused=True)):
            try:
                again()
            except RuntimeError as error:
                assert "differentiable once, not twice" in str(error)
            else:
                raise AssertionError("a second derivative was not refused")
    compiled = torch.compile(lambda x, y: 2 * mmfuse.distributed_clip_loss(2 * x, y, 5.0), backend="eager")
    close([compiled(x, y)], [2 * mmfuse.distributed_clip_loss(x, y, 10.0)], "compiled")


class _NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), func
        return func(*args, **(kwargs or {}))


def waits_for_nothing(rank: int, size: int, sizes: list[int]) -> None:
    """With known sizes: no exchange before the features', and no number read by the host, forward and backward."""
    x, y = (rows(t, sizes, rank).requires_grad_() for t in pairs(sizes, 6))
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    clip = [partial(mmfuse.distributed_clip_loss, local_loss=a, gather_with_grad=b) for a, b in MODES]
    clip.append(partial(mmfuse.distributed_clip_loss, gather_with_grad=True, dist_impl="ring"))
    siglip = [partial(mmfuse.distributed_siglip_loss, dist_impl=impl) for impl in IMPLS]
    refused = AssertionError("the ranks' sizes are known")
    with (
        patch.object(peers, "_exchange", side_effect=refused),
        patch.object(Tensor, "tolist", side_effect=AssertionError("a number is read")),
        _NoWait(),
    ):
        for loss in (*clip, *siglip):
            torch.autograd.grad(loss(x, y, scale, sizes=sizes, backend="chunked"), (x, y, scale))


def captured(rank: int, size: int, sizes: list[int]) -> None:
    """A step over NCCL in a CUDA graph; without the sizes it is refused."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    x, y = (rows(t, sizes, rank).cuda().requires_grad_() for t in pairs(sizes, 16, dtype=torch.float32))
    scale = torch.tensor(12.0, device="cuda", requires_grad=True)

    def step(loss: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        value = loss(x, y, scale, group=group, backend="triton", **options)
        return [value.detach(), *torch.autograd.grad(value, (x, y, scale))]

    for loss in (partial(mmfuse.distributed_clip_loss, gather_with_grad=True), mmfuse.distributed_siglip_loss):
        want = step(loss, sizes=sizes)
        close(step(loss), want, "the sizes asked for", 0, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            try:
                step(loss)
            except ValueError as error:
                assert "sizes is None" in str(error)
            else:
                raise AssertionError("the host waited in a capture")
            got = step(loss, sizes=sizes)
        for t in got:
            t.zero_()
        graph.replay()
        close(got, want, "replayed", 0, 0)


def kept_by_a_ring(rank: int, size: int, sizes: list[int], d: int) -> int:
    """The most numbers in one of the tensors that wait for the backward."""
    x, y = (rows(t, sizes, rank).requires_grad_() for t in pairs(sizes, d))
    loss = mmfuse.distributed_clip_loss(x, y, 10.0, gather_with_grad=True, dist_impl="ring", backend="chunked")
    return max(t.numel() for t in loss.grad_fn.saved_tensors)


def explained(rank: int, size: int) -> str:
    x = torch.ones(2, 16)
    return mmfuse.explain("distributed_clip_loss", x, x, 10.0)


def disagree(rank: int, size: int) -> dict[str, str]:
    """What a rank is told where another one's arguments are different, or wrong."""
    x, y = pairs([3], 5)
    odd = rank == size - 1
    calls = {
        "features": lambda: mmfuse.distributed_clip_loss(*(pairs([3], 4) if odd else (x, y)), 10.0),
        "dtype": lambda: mmfuse.distributed_clip_loss(*((x.float(), y.float()) if odd else (x, y)), 10.0),
        "mode": lambda: mmfuse.distributed_clip_loss(x, y, 10.0, local_loss=odd),
        "impl": lambda: mmfuse.distributed_siglip_loss(x, y, 10.0, dist_impl="gather" if odd else "shift"),
        "clip impl": lambda: mmfuse.distributed_clip_loss(x, y, 10.0, dist_impl="ring" if odd else "gather"),
        "loss": lambda: (mmfuse.distributed_siglip_loss if odd else mmfuse.distributed_clip_loss)(x, y, 10.0),
        "gradient": lambda: mmfuse.distributed_clip_loss(x, y.clone().requires_grad_(odd), 10.0),
        "rows": lambda: mmfuse.distributed_clip_loss(x, y[:2] if odd else y, 10.0),
        "scale": lambda: mmfuse.distributed_siglip_loss(x, y, torch.ones(2) if odd else 10.0),
        "sizes": lambda: mmfuse.distributed_clip_loss(x, y, 10.0, sizes=[2] * size),
        "world": lambda: ClipLoss(rank=rank, world_size=size + 1)(x, y, 10.0),
    }
    said = {}
    for name, call in calls.items():
        try:
            said[name] = f"a number: {call()}"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    close([mmfuse.distributed_clip_loss(x, y, 10.0)], [mmfuse.distributed_clip_loss(x, y, 10.0)], "afterwards")
    return said


def overlapped(rank: int, size: int, sizes: list[int]) -> list[list[str]]:
    """What happens in which order, where one rank sends nothing before the others have computed their own blocks.

    An exchange that were waited for first would never come to an end. The numbers are those of ranks that do not wait.
    """
    x, y = (rows(t, sizes, rank) for t in pairs(sizes, 6))
    scale = torch.tensor(12.0, dtype=torch.float64)
    clip = partial(mmfuse.distributed_clip_loss, backend="chunked", local_loss=True, grad_scale="true")
    siglip = partial(mmfuse.distributed_siglip_loss, backend="chunked", dist_impl="gather")
    told, happened = dist.new_group(), []
    for loss in (clip, siglip):
        expected = differentiate(loss, 1.0, x, y, scale)
        for late in (0, size - 1):
            with recorded(late, told) as events:
                got = differentiate(loss, 1.0, x, y, scale)
            assert all(map(torch.equal, got, expected))
            happened.append(events)
    return happened


@contextmanager
def recorded(late: int, told: Any) -> Iterator[list[str]]:
    """Blocks computed, exchanges begun and waited for; rank `late` begins them after the other ranks' own blocks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    events: list[str] = []

    def computes(kind: str, compute: Callable[..., Any], own: int) -> Callable[..., Any]:
        def block(x: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
            found = compute(x, y, *args, **options)
            events.append(f"{kind} of {len(y)}")
            if rank != late and sum(e.startswith(kind) for e in events) == own:
                dist.send(torch.ones(1), late, told)
            return found

        return block

    def exchanges(kind: str, begin: Callable[..., Any], after: str) -> Callable[..., Any]:
        def collective(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not async_op:
                return begin(*args, **kwargs)
            if rank == late and kind not in events and any(e.startswith(after) for e in ["", *events]):
                for other in set(range(size)) - {late}:
                    dist.recv(torch.ones(1), other, told)
            work = begin(*args, async_op=True, **kwargs)
            events.append(kind)
            return SimpleNamespace(wait=lambda: (work.wait(), events.append(f"{kind} waited for")))

        return collective

    real = op.TEMPLATE["chunked"]
    # the own block is the first of the forward, and the last of the backward
    blocks = {k: computes(k, getattr(real, k), size if k == "grad" else 1) for k in ("stats", "grad", "sigmoid")}
    with (
        patch.dict(op.TEMPLATE, {"chunked": SimpleNamespace(**blocks)}),
        patch.object(peers, "_gather_into", exchanges("gather", peers._gather_into, after="")),
        patch.object(peers, "_scatter_into", exchanges("scatter", peers._scatter_into, after="grad")),
    ):
        yield events


def die(rank: int, size: int, when: str) -> tuple[str, float]:
    """The last rank ends before, while features are gathered, or before backward: what do the others get, how soon?"""
    x, y = (rows(t, [3] * size, rank).requires_grad_() for t in pairs([3] * size, 5))
    dead = rank == size - 1
    start = time.monotonic()
    try:
        if dead and when != "between":
            os._exit(1)
        sizes = [3] * size if when == "gather" else None  # known: the first thing to wait for are the features
        loss = mmfuse.distributed_clip_loss(x, y, 10.0, gather_with_grad=True, sizes=sizes, backend="chunked")
        if dead:
            os._exit(1)
        loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return f"a number: {x.grad}", time.monotonic() - start


class Towers(nn.Module):
    """Two encoders with dropout, and CLIP's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 5)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *(F.normalize(t, dim=-1) for t in (self.image(image), self.text(text))), self.logit_scale.exp()


def grad_cache_under_ddp(rank: int, size: int) -> None:
    """GradCache over uneven micro-batches against the whole batch in one process."""
    sizes = [5, 3, 4][:size]
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, sum(sizes), 6, generator=generator)
    torch.manual_seed(0)
    whole, part = Towers().eval(), Towers().eval()
    part.load_state_dict(whole.state_dict())
    parallel = nn.parallel.DistributedDataParallel(part)
    loss = ClipLoss(local_loss=True, rank=rank, world_size=size)
    loss.grad_scale = "true"
    x, y = (rows(t, sizes, rank) for t in (image, text))
    got = GradCache(parallel, loss)([(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])])
    dist.all_reduce(got)
    want = ClipLoss()(*whole(image, text))
    want.backward()
    close([got / size], [want.detach()], "loss", 1e-5, 1e-6)
    close([p.grad for p in part.parameters()], [p.grad for p in whole.parameters()], "gradients", 1e-4, 1e-6)
