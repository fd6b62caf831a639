"""`mmfuse bench contrastive-dist`: what each rank computes and sends in one step of a distributed loss, counted.

Matrix products are counted by the profiler, from the shapes of every `mm` that runs, forward and backward. Bytes are
those that a rank sends in the collectives that are issued, by the ring algorithms: (W-1)/W of what an all_gather makes,
a reduce_scatter takes or a broadcast or reduce moves, twice that of what an all_reduce reduces, and point-to-point
messages as they are. Neither depends on a clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from mmfuse._compat import allow_torchvision
from mmfuse.bench import store
from mmfuse.bench.cases import Check
from mmfuse.bench.inputs import differentiated, features
from mmfuse.kernels import distributed_clip_loss, distributed_siglip_loss
from mmfuse.kernels.contrastive.distributed import peers

allow_torchvision()  # open_clip is imported after this module, by the server that the processes fork from

OPTIONS = ("sizes", "out", "json")
WORLDS = (1, 2, 4, 8)
SIZE = "64x64"  # pairs per rank, features
_MODES = {f"clip local={int(a)} grad={int(b)}": (a, b) for a in (False, True) for b in (False, True)}
_IMPLS = ("bidir", "shift", "reduce", "gather")
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}


# --- counting --------------------------------------------------------------------------------------------------------


def products(runs: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Floating-point operations of the matrix products in each of `runs`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for name, run in runs.items():
            with torch.profiler.record_function(f"run:{name}"):
                run()
    spans = {e.name[4:]: e.time_range for e in profile.events() if e.name.startswith("run:")}
    total = dict.fromkeys(runs, 0)
    for event in profile.events():
        if event.name in _PRODUCTS:
            (m, k), (_, n) = (event.input_shapes[i] for i in _PRODUCTS[event.name])
            at = event.time_range.start
            total[next(name for name, span in spans.items() if span.start <= at <= span.end)] += 2 * m * k * n
    return total


@contextmanager
def sent(size: int) -> Iterator[list[float]]:
    """A list to which every collective that is issued appends the bytes that this rank sends in it."""
    found: list[float] = []
    share = (size - 1) / size

    def bytes_of(t: Any) -> int:
        return sum(map(bytes_of, t)) if isinstance(t, (list, tuple)) else t.numel() * t.element_size()

    rules: dict[str, Callable[..., float]] = {
        "all_gather": lambda out, t, *_, **__: share * bytes_of(out),
        "all_gather_into_tensor": lambda out, t, *_, **__: share * bytes_of(out),
        "reduce_scatter_tensor": lambda out, t, *_, **__: share * bytes_of(t),
        "all_reduce": lambda t, *_, **__: 2 * share * bytes_of(t),
        "broadcast": lambda t, *_, **__: share * bytes_of(t),
        "reduce": lambda t, *_, **__: share * bytes_of(t),
        # gloo's stand-in for a reduce_scatter: each rank scatters its parts once
        "scatter": lambda out, parts=None, *_, **__: share * bytes_of(parts) if parts else 0.0,
        "batch_isend_irecv": lambda ops: float(sum(bytes_of(o.tensor) for o in ops if o.op is dist.isend)),
    }
    owners = [(dist, name, name) for name in rules]
    owners += [(peers, "_gather_into", "all_gather_into_tensor"), (peers, "_scatter_into", "reduce_scatter_tensor")]

    def counted(fn: Callable[..., Any], rule: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(rule(*args, **kwargs))
            return fn(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for owner, name, rule in owners:
            patches.enter_context(patch.object(owner, name, counted(getattr(owner, name), rules[rule])))
        yield found


# --- the ranks -------------------------------------------------------------------------------------------------------


def _losses(rank: int, size: int) -> dict[tuple[str, str], Callable[..., Tensor]]:
    """(loss, provider): a function of image, text, scale and bias."""
    losses: dict[tuple[str, str], Callable[..., Tensor]] = {}
    for name, (local, grad) in _MODES.items():
        mode: dict[str, Any] = {"local_loss": local, "gather_with_grad": grad, "backend": "chunked"}
        for save in ("recompute", "store"):
            losses[name, f"mmfuse[{save}]"] = partial(_clip, save=save, **mode)
        if local and grad:
            losses[name, "mmfuse[recompute, true]"] = partial(_clip, save="recompute", grad_scale="true", **mode)
            losses[name, "mmfuse[ring, true]"] = partial(_clip, dist_impl="ring", grad_scale="true", **mode)
    for impl in _IMPLS:
        losses[f"siglip {impl}", "mmfuse"] = partial(distributed_siglip_loss, dist_impl=impl, backend="chunked")
    try:
        from open_clip import loss as open_clip
    except ImportError:
        return losses
    world = {"rank": rank, "world_size": size}
    for name, (local, grad) in _MODES.items():
        losses[name, "open_clip"] = partial(_theirs, open_clip.ClipLoss(local, grad, **world))
    for impl in _IMPLS:
        losses[f"siglip {impl}", "open_clip"] = open_clip.SigLipLoss(**world, dist_impl=impl)
    return losses


def _clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return distributed_clip_loss(image, text, scale, **options)


def _theirs(loss: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return loss(image, text, scale)


def _rank(rank: int, size: int, folder: str, b: int, d: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    image, text = torch.nn.functional.normalize(torch.randn(2, b, d), dim=-1)
    messages: dict[str, float] = {}

    def step(name: str, fn: Callable[..., Tensor]) -> None:
        leaves = [t.clone().requires_grad_() for t in (image, text, torch.tensor(10.0), torch.tensor(-5.0))]
        with sent(size) as bytes_of_each:
            fn(*leaves).backward()
        messages[name] = sum(bytes_of_each)

    losses = {f"{loss}|{provider}": fn for (loss, provider), fn in _losses(rank, size).items()}
    flops = products({name: partial(step, name, fn) for name, fn in losses.items()})
    found = [(*name.split("|"), flops[name], messages[name]) for name in losses]
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# --- the formulas ----------------------------------------------------------------------------------------------------


def expected(loss: str, provider: str, size: int, b: int, d: int) -> tuple[int, float]:
    """(floating-point operations, bytes) per rank and step, in float32, by formula."""
    n, features = size * b, 4 * d * (size - 1) * b  # bytes of all the others' features
    one = 2 * b * n * d  # a product of b x N x D
    ring = 2 * (size - 1) / size  # an all_reduce's share
    if loss.startswith("siglip"):
        if provider == "mmfuse":
            return 3 * one, 2 * features + 104 * (size - 1)
        factor = 2 if loss.endswith("reduce") else 1
        # the block of the own texts, multiplied by 0, is computed again
        more = 3 * 2 * b * b * d if size > 1 and loss.endswith(("reduce", "gather")) else 0
        return 3 * one + more, factor * 2 * features
    local, grad = _MODES[loss]
    if provider == "open_clip":
        if size == 1:
            return 6 * one, 0
        return (6 if grad else 4) * one if local else 3 * size * one, (4 if grad else 2) * features
    header = 104 * (size - 1)
    if size > 1 and local and not grad:
        return (4 if "store" in provider else 6) * one, 2 * features + header
    kept = "store" in provider
    split = one * (size - 1) // size if local and "true" not in provider and not kept else 0  # the others' columns
    numbers = ring * 4 * 3 * n  # a maximum and two sums of each column
    scalars: float = 4 * (size - 1)  # the upstream gradients
    scalars += ring * 4 * (size * ("true" not in provider) if local else 2)
    travels = 3 if "ring" in provider else 2  # texts, their gradients, and around a ring texts again
    return (3 if kept else 4) * one + split, travels * features + numbers + header + scalars


# --- for `mmfuse verify` ---------------------------------------------------------------------------------------------


@contextmanager
def _alone() -> Iterator[Any]:
    """A group of this process only."""
    if dist.is_initialized():
        yield dist.new_group([dist.get_rank()])
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield None
    finally:
        dist.destroy_process_group()


def _of_one(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def run(*args: Tensor, backend: str) -> Tensor:
        with _alone() as group:
            return loss(*args, group=group, backend=backend, **options)

    return run


CHECKS = [
    Check(loss.__name__, f"N=129 D=96, one rank{more}", features(**scalars), differentiated(_of_one(loss, **options)))
    for loss, more, scalars, options in (
        (distributed_clip_loss, ", local=False", {"scale": 14.3}, {"local_loss": False}),
        (distributed_clip_loss, ", local=True", {"scale": 14.3}, {"local_loss": True}),
        (distributed_siglip_loss, "", {"scale": 10.0, "bias": -10.0}, {}),
    )
]


# --- the command -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Count, print, and say whether the counts of ours are those of the formulas."""
    b, d = _size(args.sizes or SIZE)
    rows: list[dict[str, Any]] = []
    for size in WORLDS:
        for loss, provider, flops, sends in _world(size, b, d):
            want = expected(loss, provider, size, b, d)
            row = {"loss": loss, "provider": provider, "ranks": size, "b": b, "D": d, "flops": flops, "bytes": sends}
            rows.append(row | {"formula_flops": want[0], "formula_bytes": want[1]})
    if args.out is not None:  # not among the records of measurements: nothing here is one
        environment = store.environment(torch.device("cpu"))
        path = args.out / store.slug(environment["device"]) / "contrastive-dist.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, rows))
        path.write_text(f'{{"environment": {json.dumps(environment)}, "counts": [\n{lines}\n]}}\n')
    wrong = [r for r in rows if r["flops"] != r["formula_flops"] or abs(r["bytes"] - r["formula_bytes"]) > 0.5]
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        _show(rows, b, d)
    for r in wrong:
        print(f"not as by formula: {json.dumps(r)}", file=sys.stderr)
    return 1 if any(r["provider"] != "open_clip" for r in wrong) else 0


def _size(text: str) -> tuple[int, int]:
    numbers = text.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"--sizes is {text!r}, expected pairs per rank x features, such as {SIZE}")
    return int(numbers[0]), int(numbers[1])


def _world(size: int, b: int, d: int) -> list[tuple[str, str, int, float]]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler would tell when it starts and stops
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "open_clip.loss"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, size, folder, b, d)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found = Path(folder, "found")
        if not found.exists():
            raise RuntimeError(f"the {size} local processes did not finish; their errors are above")
        return [tuple(row) for row in json.loads(found.read_text())]


def _show(rows: list[dict[str, Any]], b: int, d: int) -> None:
    """Operations in units of b N D, bytes in units of the others' features, so that the ranks are comparable."""
    print(f"b = {b} pairs per rank, D = {d}, float32; per rank and step: products in b N D operations, bytes sent")
    print("in (W-1) b D elements, that is in all others' features once; in brackets the formula's")
    for loss in dict.fromkeys(r["loss"] for r in rows):
        print(f"\n{loss:26}" + "".join(f"{f'W = {w}':>30}" for w in WORLDS))
        for provider in dict.fromkeys(r["provider"] for r in rows if r["loss"] == loss):
            cells = []
            for r in (r for r in rows if r["loss"] == loss and r["provider"] == provider):
                unit, others = b * r["ranks"] * b * d, 4 * (r["ranks"] - 1) * b * d
                sends = [f"{r[k] / others:.2f}" if others else "-" for k in ("bytes", "formula_bytes")]
                cells.append(f"{r['flops'] / unit:.0f} ({r['formula_flops'] / unit:.0f})  {sends[0]} ({sends[1]})")
            print(f"  {provider:24}" + "".join(f"{c:>30}" for c in cells))
