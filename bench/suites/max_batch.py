"""`mmfuse bench max-batch`: the largest batch whose loss fits a GPU's memory, from bytes counted by formula.

The loss alone, forward and backward, features in 16 bits, the encoders not counted: what is left to them is what the
loss does not take. N pairs over W ranks, b = N / W each, D features. Bytes per rank at the peak:

    features    8 b D                image, text and their gradients, in 16 bits: of every implementation
    open_clip   + 16 b N             the softmaxes of both directions and two gradients, in float32
                + 8 N D for W > 1    both towers gathered, and their gradients (local_loss, gather_with_grad)
    Inf-CL      58 b D               linear in b: its published 1.45 GB at 262144 pairs on 8 GPUs (D = 768) in all
    memeff      + 6 N D              the texts of all ranks in 16 bits, their gradient in float32
                                     (for W = 1: both gradients in float32)
    mmfuse      + 4 N D              W = 1: the texts' gradient in float32
                + 5 N D + 8 b D      W > 1: the texts of all ranks and their gradient in 16 bits, a quarter of it in
                                     float32; the images' gradient in float32, and what is added to it
    mmfuse ring + 22 b D             for W > 1 instead: 2 texts and 3 gradients of b rows held or on their way, and one
                                     in float32; the images' as above
                + 16 N + squares     of both: the columns' statistics; a square of G, 20 bytes for each of 8192 x D

The lines of open_clip and mmfuse are checked here by peak memory in float32 on the CPU, where features take twice as
much and the blocks are those of the CPU; those of Inf-CL and memeff were read, not run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from mmfuse.bench import memory
from mmfuse.kernels import clip_loss
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels.contrastive.blocked import _BLOCK_BYTES

OPTIONS = ("sizes", "json")
MEMORIES = (24, 80, 141)  # GB: 10^9 bytes
WIDTHS = (512, 768, 1024)
WORLDS = (1, 8)
_SQUARE = 8192
_STEP = 1024


def _mmfuse(n: int, b: int, d: int) -> int:
    side = min(b, _SQUARE)
    squares = 2 * side * min(n, _SQUARE) + 20 * side * d
    return 8 * b * d + (5 * n * d + 8 * b * d if n > b else 4 * n * d) + 16 * n + squares


def _ring(n: int, b: int, d: int) -> int:
    side = min(b, _SQUARE)
    return 8 * b * d + 22 * b * d + 16 * n + 2 * side * side + 20 * side * d if n > b else _mmfuse(n, b, d)


FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "open_clip": lambda n, b, d: 8 * b * d + 16 * b * n + (8 * n * d if n > b else 0),
    "Inf-CL": lambda n, b, d: 58 * b * d,
    "memeff": lambda n, b, d: 8 * b * d + (6 * n * d if n > b else 8 * b * d),
    "mmfuse": _mmfuse,
    "mmfuse ring": _ring,
}


def largest(provider: str, memory_bytes: float, world: int, d: int) -> int:
    """The largest N, a multiple of 1024 per rank, whose bytes fit."""
    low, high = 0, 1 << 24
    while low < high:  # b in steps
        middle = (low + high + 1) // 2
        b = middle * _STEP
        low, high = (middle, high) if FORMULAS[provider](b * world, b, d) <= memory_bytes else (low, middle - 1)
    return low * _STEP * world


# --- the check: peak memory on this machine --------------------------------------------------------------------------


def in_float32(provider: str, n: int, d: int) -> int:
    """The formula of one process in float32 on a CPU, beside the features themselves."""
    if provider == "open_clip":
        return 8 * n * d + 16 * n * n
    rows = min(2048, n, _BLOCK_BYTES["cpu"] // (4 * n))
    blocks = 1 if load("cpu") is None else 4  # in place in the compiled part, with temporaries in plain torch
    return 8 * n * d + 4 * n * d + 4 * rows * (blocks * n + d) + 12 * min(n, _SQUARE) * d


def _peak(provider: str, n: int, d: int) -> int | None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # a fresh process: nothing freed earlier is used again
        return pool.apply(_measure, (provider, n, d))


def _measure(provider: str, n: int, d: int) -> int | None:
    torch.set_num_threads(1)
    image, text = (torch.nn.functional.normalize(torch.randn(n, d), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)

    def step(image: torch.Tensor, text: torch.Tensor) -> None:
        if provider == "mmfuse":
            clip_loss(image, text, scale, save="recompute").backward()
        else:
            theirs(image, text, scale).backward()

    if provider == "open_clip":
        from mmfuse._compat import allow_torchvision

        allow_torchvision()
        from open_clip.loss import ClipLoss

        theirs = ClipLoss()
    small = [t.detach()[:512].clone().requires_grad_() for t in (image, text)]
    step(*small)  # what the first call alone allocates
    return memory.peak(lambda: step(image, text), torch.device("cpu"))[1]


def run(args: argparse.Namespace) -> int:
    """Print the table and the check; 0 if the measured peaks are at most a tenth above their formulas."""
    sizes = [tuple(map(int, s.split("x"))) for s in (args.sizes or "2048x256,4096x256").split(",")]
    os.environ.update(memory.EXACT)
    rows = [
        {"provider": p, "ranks": w, "D": d, "memory_gb": m, "pairs": largest(p, m * 1e9, w, d)}
        for w in WORLDS
        for d in WIDTHS
        for m in MEMORIES
        for p in FORMULAS
    ]
    checks: list[dict[str, Any]] = []
    for n, d in sizes:
        for provider in ("open_clip", "mmfuse"):
            try:
                peak = _peak(provider, n, d)
            except ImportError:
                continue
            if peak is not None:
                by_formula = in_float32(provider, n, d)
                checks.append({"provider": provider, "N": n, "D": d, "peak": peak, "formula": by_formula})
    if args.json:
        print("\n".join(map(json.dumps, [*rows, *checks])))
    else:
        _show(rows, checks)
    return int(any(c["peak"] > 1.1 * c["formula"] for c in checks))


def _show(rows: list[dict], checks: list[dict]) -> None:
    print("largest global batch (thousands of pairs) whose loss fits, by formula; the encoders not counted")
    print(f"{'ranks':>5} {'D':>5} {'GB':>5}" + "".join(f"{p:>12}" for p in FORMULAS))
    for w in WORLDS:
        for d in WIDTHS:
            for m in MEMORIES:
                found = {r["provider"]: r["pairs"] for r in rows if (r["ranks"], r["D"], r["memory_gb"]) == (w, d, m)}
                print(f"{w:>5} {d:>5} {m:>5}" + "".join(f"{found[p] / 1000:>12,.0f}" for p in FORMULAS))
    print("\npeak memory of one step in float32 on this CPU, beside the features")
    for c in checks:
        size = f"{c['N']} x {c['D']}"
        print(f"  {c['provider']:10} {size:12} {c['peak'] / 1e6:.0f} MB, by formula {c['formula'] / 1e6:.0f} MB")
