"""Shows that a refactoring changed no number: digests of what every operator returns, and of its gradients.

    python tests/bitwise.py write before.json [operator ...]      in one checkout
    python tests/bitwise.py compare before.json [operator ...]    in another, on the same machine

Every implementation that runs on a CPU takes part, Triton's in its interpreter. `mmfuse` comes from PYTHONPATH, or else
from the working directory. `compare` prints each difference and exits with 1 if there is one; so does `write` if an
operator fails, or if one of its options is in no variant.
"""

from __future__ import annotations

import os
import sys

# before torch and triton are imported
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
os.environ.pop("MMFUSE_BACKEND", None)
if not os.environ.get("PYTHONPATH"):
    sys.path[0] = os.getcwd()

import argparse
import functools
import hashlib
import inspect
import json
import pkgutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import keystr, tree_flatten_with_path

import mmfuse

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = (None, "cuda", "triton", "cpu", "chunked", "torch")
# those for large sizes and compiled graphs
FAST = (None, "cpu", "chunked")
RGB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
Call = tuple[tuple[Any, ...], dict[str, Any]]
Rows = dict[str, dict[str, str]]


# --- inputs -----------------------------------------------------------------------------------------------------------


def call(*args: Any, **options: Any) -> Call:
    return args, options


class Inputs:
    """Seeded inputs, the same numbers in every dtype: `t(70, 24)` has a gradient, `t.fixed(70, 24)` has none."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return self.fixed(*shape).requires_grad_()

    def fixed(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def strided(self, *shape: int) -> Tensor:
        """No dimension is contiguous."""
        wider = self.fixed(*(2 * n for n in reversed(shape)))
        return wider.permute(*reversed(range(len(shape))))[(slice(None, None, 2),) * len(shape)].requires_grad_()

    def unit(self, *shape: int) -> Tensor:
        return normalize(self.fixed(*shape).double(), dim=-1).to(self.dtype).requires_grad_()

    def near(self, x: Tensor) -> Tensor:
        """A pair for each row of unit length."""
        pair = x.detach().double() + 0.3 * self.fixed(*x.shape)
        return normalize(pair, dim=-1).to(self.dtype).requires_grad_()

    def gaps(self, *shape: int) -> Tensor:
        """Every seventh row is 0."""
        x = self.fixed(*shape)
        x[..., ::7, :] = 0
        return x.requires_grad_()

    def broken(self, *shape: int) -> Tensor:
        """Some numbers are none, or infinite."""
        x = self.fixed(*shape)
        for i, wrong in enumerate((torch.nan, torch.inf, -torch.inf)):
            x[..., i::11, i] = wrong
        return x

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.wide).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def bytes(self, *shape: int) -> Tensor:
        return self.integers(256, *shape).to(torch.uint8)

    def mask(self, *shape: int) -> Tensor:
        return self.integers(5, *shape) < 2

    def order(self, b: int, n: int) -> Tensor:
        return torch.rand(b, n, generator=self.generator).argsort(1)

    def norm(self, d: int, eps: float = 0.1) -> tuple[Tensor, Tensor, float]:
        return self(d), self(d), eps

    def layers(self, *widths: int) -> list[tuple[Tensor, Tensor]]:
        """Of a mini-PointNet."""
        c, c1, c2, c3, d = widths
        return [(self(o, i), self(o)) for o, i in ((c1, c), (c2, c1), (c3, 2 * c2), (d, c3))]


# --- the variants: a function for each operator, a line for each variant ----------------------------------------------


def clip_loss(t: Inputs) -> dict[str, Call]:
    x, few, s, ids = t.unit(70, 24), t.unit(40, 24), t.number(12.0), t.integers(30, 70)
    y = t.near(x)
    return {
        "plain": call(x, y, s),
        "frozen image, scale as a float": call(x.detach(), y, 12.0),
        "scale alone": call(x.detach(), y.detach(), s),
        "no gradient": call(x.detach(), y.detach(), 12.0, metrics=True),
        "peaked": call(x, y, t.number(100.0)),
        "normalize": call(t(70, 24), t(70, 24), s, normalize=True, metrics=True),
        "zero rows": call(t(40, 24), t.gaps(40, 24), s, normalize=True),
        "wide": call(t.unit(70, 70), t.unit(70, 70), s),
        "strided": call(t.strided(70, 24), t.strided(70, 24), 1.0),
        "bias": call(x, y, s, t.number(-3.0), metrics=True),
        "weights": call(x, y, s, weights=(0.3, 1.2)),
        "image to text": call(x, y, s, weights=(1.0, 0.0)),
        "text to image": call(x, y, s, weights=(0.0, 1.0)),
        "smoothed": call(x, y, s, label_smoothing=0.1, metrics=True),
        "decoupled": call(x, y, s, decoupled=True, metrics=True),
        "decoupled rows": call(few, y, s, decoupled=True, row_offset=20),
        "rows": call(few, y, s, row_offset=20, metrics=True),
        "rows, smoothed": call(few, y, s, row_offset=30, weights=(1.0, 0.0), label_smoothing=0.1, normalize=True),
        "ids": call(x, y, s, ids=ids),
        "ids, smoothed": call(x, y, s, ids=ids, label_smoothing=0.1, normalize=True, weights=(0.7, 0.2)),
        "ids of rows": call(few, y, s, ids=ids, row_offset=20, metrics=True),
        "ids, a pair": call(few, y, s, ids=(t.integers(60, 40), ids), row_offset=20),
        "recompute": call(x, y, s, save="recompute"),
        "recompute, ids": call(x, y, s, save="recompute", ids=ids, label_smoothing=0.1),
        "store": call(x, y, s, save="store"),
        "store in 16 bits": call(x, y, s, save="store", store_budget=0),
        "store in 16 bits, rows": call(few, y, s, save="store", store_budget=0, row_offset=20, normalize=True),
        "store in 16 bits, ids": call(x, y, s, save="store", store_budget=0, ids=ids),
        "one pair": call(t.unit(1, 24), t.unit(1, 24), s, metrics=True),
        "no pairs": call(t(0, 24), t(0, 24), s),
    }


def siglip_loss(t: Inputs) -> dict[str, Call]:
    x, y, few, s, b = t.unit(70, 24), t.unit(70, 24), t.unit(40, 24), t.number(9.0), t.number(-8.0)
    return {
        "plain": call(x, y, s, b),
        "floats": call(x, y, 9.0, -8.0),
        "no bias, frozen image": call(x.detach(), y, s),
        "scale and bias alone": call(x.detach(), y.detach(), s, b),
        "no gradient": call(x.detach(), y.detach(), 9.0),
        "normalize": call(t(70, 24), t(70, 24), s, b, normalize=True),
        "zero rows": call(t.gaps(40, 24), t(40, 24), s, b, normalize=True),
        "wide": call(t.unit(70, 70), t.unit(70, 70), s, b),
        "strided": call(t.strided(70, 24), t.strided(70, 24), s, b),
        "negative only": call(few, y, s, b, negative_only=True),
        "negative only, normalize": call(t(40, 24), t(70, 24), s, b, negative_only=True, normalize=True),
        "rows": call(few, y, s, b, row_offset=20),
        "no pairs": call(t(0, 24), t(0, 24), s, b),
    }


def distill_clip_loss(t: Inputs) -> dict[str, Call]:
    x, y, few, s = t.unit(70, 24), t.unit(70, 24), t.unit(40, 24), t.number(12.0)
    u, v, few_u, r = t.unit(70, 20), t.unit(70, 20), t.unit(40, 20), t.number(8.0)
    teacher = (u.detach(), v.detach(), 8.0)
    return {
        "plain": call(x, y, s, *teacher),
        "teacher's gradients": call(x, y, s, u, v, r),
        "teacher alone": call(x.detach(), y.detach(), 12.0, u, v, r),
        "one of each": call(x.detach(), y, 12.0, u, v.detach(), 8.0),
        "scale alone": call(x.detach(), y.detach(), s, *teacher),
        "teacher's scale alone": call(x.detach(), y.detach(), 12.0, *teacher[:2], r),
        "no gradient": call(x.detach(), y.detach(), 12.0, *teacher),
        "weights": call(x, y, s, u, v, r, weights=(1.0, 0.0)),
        "rows": call(few, y, s, few_u, v, r, weights=(0.3, 0.7), row_offset=20),
        "wide": call(t.unit(70, 70), t.unit(70, 70), s, t.unit(70, 70), t.unit(70, 70), r),
        "strided": call(t.strided(70, 24), t.strided(70, 24), 1.0, t.strided(70, 20), t.strided(70, 20), 1.0),
        "no pairs": call(t(0, 24), t(0, 24), s, t(0, 20), t(0, 20), r),
    }


def distributed_clip_loss(t: Inputs) -> dict[str, Call]:
    x, y, s = t.unit(70, 24), t.unit(70, 24), t.number(12.0)
    return {
        "plain": call(x, y, s, group=None),
        "local loss": call(x, y, 12.0, local_loss=True),
        "gather with gradient": call(x, y, s, local_loss=True, gather_with_grad=True, grad_scale="true"),
        "weights": call(x, y, s, weights=(0.3, 1.2), sizes=[70]),
        "ring": call(x, y, s, dist_impl="ring"),
        "recompute": call(x.detach(), y, s, save="recompute"),
        "store in 16 bits": call(x, y, s, save="store", store_budget=0),
    }


def distributed_siglip_loss(t: Inputs) -> dict[str, Call]:
    x, y, s, b = t.unit(70, 24), t.unit(70, 24), t.number(9.0), t.number(-8.0)
    return {
        "plain": call(x, y, s, b, group=None),
        "no bias": call(x, y.detach(), 9.0, sizes=[70]),
        **{way: call(x, y, s, b, dist_impl=way) for way in ("shift", "reduce", "gather")},
    }


def global_contrastive_loss(t: Inputs) -> dict[str, Call]:
    x, y, s, u, w = t.unit(70, 24), t.unit(70, 24), t.number(9.0), t.fixed(70), t.fixed(70)
    new = u.masked_fill(t.mask(70), -torch.inf)
    return {
        "plain": call(x, y, s, u, w, 0.3),
        "new samples": call(x, y, 9.0, new, w, 0.3),
        "scale alone": call(x.detach(), y.detach(), s, u, w, 0.3),
        "no gradient": call(x.detach(), y.detach(), 9.0, u, new, 1.0),
        "normalize": call(t(70, 24), t(70, 24), s, u, w, 0.9, normalize=True),
        "eps": call(x.detach(), y, s, u, w, 0.3, eps=0.1),
        "strided": call(t.strided(70, 24), t.strided(70, 24), 1.0, u, w, 0.3),
        "one pair": call(t.unit(1, 24), t.unit(1, 24), s, u[:1], w[:1], 0.3),
    }


def grouped_clip_loss(t: Inputs) -> dict[str, Call]:
    shapes = ((70, 24), (33, 16), (5, 8))
    xs, ys, s = [t.unit(*n) for n in shapes], [t.unit(*n) for n in shapes], [t.number(v) for v in (12.0, 5.0, 9.0)]
    frozen = [x.detach() for x in xs]
    return {
        "plain": call(xs, ys, s),
        "scales in a tensor": call(xs, ys, torch.tensor([12.0, 5.0, 9.0], dtype=t.wide).requires_grad_()),
        "scales as floats": call(xs, [*ys[:1], *(y.detach() for y in ys[1:])], [12.0, 5.0, 9.0]),
        "scales alone": call(frozen, [y.detach() for y in ys], s),
        "normalize": call([t(*n) for n in shapes], [t(*n) for n in shapes], s, normalize=True),
        "weights": call(frozen, ys, s, weights=(0.2, 1.0)),
    }


def matryoshka_clip_loss(t: Inputs) -> dict[str, Call]:
    x, y, s = t(70, 24), t(70, 24), t.number(12.0)
    return {
        "plain": call(x, y, s, (4, 16, 24)),
        "weights": call(x, y, 12.0, (8, 20), (0.3, 1.2)),
        "as they are": call(t.unit(70, 24), t.unit(70, 24), s, (8, 24), normalize=False),
    }


def hard_negatives(t: Inputs) -> dict[str, Call]:
    x, y, few, ids = t.unit(70, 24), t.unit(70, 24), t.unit(40, 24), t.integers(30, 70)
    return {
        "plain": call(x, y, 12.0, seed=7),
        "k": call(x, y, t.number(12.0), k=3, seed=torch.tensor(7)),
        "mixture": call(x, y, 12.0, mixture=0.01, seed=7),
        "rows": call(few, y, 12.0, row_offset=20, seed=7, k=2),
        "ids": call(x, y, 12.0, ids=ids, seed=7, k=2),
        "ids of keys": call(few, y, 12.0, ids=ids[:40], key_ids=ids, row_offset=5, seed=7, mixture=0.01),
        "both": call(x, y, 12.0, both=True, seed=7),
        "both, rows": call(few, y, 12.0, both=True, k=3, row_offset=20, mixture=0.01, seed=-3),
        "not finite": call(t.broken(40, 24), y, 12.0, k=2, row_offset=20, both=True, seed=7),
        "too few keys": call(t.unit(5, 24), t.unit(5, 24), 12.0, k=8, seed=7, both=True),
        "torch's generator": call(x, y, 12.0),
    }


def max_query_similarity(t: Inputs) -> dict[str, Call]:
    x, y = t.unit(37, 5, 24), t.unit(70, 24)
    return {
        "plain": call(x, y),
        "frozen image": call(x.detach(), y),
        "frozen text": call(x, y.detach()),
        "one query": call(t.unit(37, 1, 24), y),
        "many queries": call(t.unit(3, 300, 24), t.unit(6, 24)),
        "wide": call(t.unit(12, 32, 70), t.unit(20, 70)),
        "strided": call(t.strided(12, 5, 24), t.strided(20, 24)),
        "no texts": call(x, t(0, 24)),
    }


def max_query_loss(t: Inputs) -> dict[str, Call]:
    x, y, temp, ids = t.unit(37, 5, 24), t.unit(37, 24), t.number(0.1), t.integers(20, 70)
    every = {"image_all": t.unit(70, 5, 24), "text_all": t.unit(70, 24)}
    return {
        "plain": call(x, y, temp),
        "smoothed": call(x, y, 0.1, label_smoothing=0.1),
        "ids": call(x, y, temp, ids=ids[:37], label_smoothing=0.1),
        "all": call(x, y, temp, **every, row_offset=20),
        "all, detached": call(x, y, temp, image_all=every["image_all"].detach(), text_all=every["text_all"].detach()),
        "ids of all": call(x, y, temp, **every, ids=ids[:37], all_ids=ids, label_smoothing=0.1),
    }


def moco_loss(t: Inputs) -> dict[str, Call]:
    q, k, queue, temp = t.unit(20, 24), t.unit(20, 24).detach(), t.unit(40, 24).detach(), t.number(0.1)
    return {
        "plain": call(q, k, queue, temp),
        "temp as a float": call(q, k, queue, 0.1),
        "temp alone": call(q.detach(), k, queue, temp),
        "no gradient": call(q.detach(), k, queue, 0.1),
        "wide keys": call(q, k.to(t.wide), queue.to(t.wide), temp),
        "strided": call(t.strided(20, 24), t.strided(20, 24).detach(), t.strided(40, 24).detach(), 4.0),
        "no queue": call(q, k, queue[:0], temp),
    }


def queue_itc_loss(t: Inputs) -> dict[str, Call]:
    q, m, k, queue, more = t.unit(20, 24), *(t.unit(n, 24).detach() for n in (20, 20, 40, 30))
    temp, soft = t.number(0.1), {"query_m": m, "alpha": 0.4}
    known = {"ids": t.integers(10, 20), "queue_ids": t.integers(15, 40)}
    return {
        "plain": call(q, k, queue, temp),
        "soft": call(q, k, queue, temp, **soft),
        "soft alone": call(q, k, queue, 0.1, query_m=m, alpha=1.0),
        "temp alone": call(q.detach(), k, queue, temp, **soft),
        "no gradient": call(q.detach(), k, queue, 0.1, **soft),
        "ids": call(q, k, queue, temp, **known),
        "ids, soft": call(q, k, queue, temp, **known, **soft),
        "ids of keys": call(q, more, queue, temp, **known, **soft, key_ids=t.integers(10, 30)),
        "more keys": call(q, more, queue, temp, **soft),
        "negatives": call(q, k, queue, temp, **soft, negatives=2, seed=7),
        "negatives, ids": call(q, k, queue, temp, **known, negatives=1, mixture=0.01, seed=torch.tensor(7)),
        "wide keys": call(q, k.to(t.wide), queue.to(t.wide), temp, **soft),
        "strided": call(t.strided(20, 24), k, t.strided(40, 24).detach(), 4.0, **soft),
        "no queue": call(q, k, queue[:0], temp, **soft),
    }


def queue_itc_losses(t: Inputs) -> dict[str, Call]:
    x, y, temp = t.unit(20, 24), t.unit(20, 24), t.number(0.1)
    momentum = [t.unit(n, 24).detach() for n in (20, 20, 40, 40)]
    ids = {"ids": t.integers(10, 20), "queue_ids": t.integers(15, 40)}
    return {
        "plain": call(x, y, *momentum, temp),
        "soft": call(x, y, *momentum, temp, alpha=0.4),
        "ids": call(x, y, *momentum, 0.1, alpha=0.4, **ids),
        "negatives": call(x, y, *momentum, temp, negatives=2, mixture=0.01, seed=7, **ids),
    }


def similarity_topk(t: Inputs) -> dict[str, Call]:
    x, y = t.unit(33, 24), t.unit(150, 24)
    return {
        "plain": call(x, y, 5),
        "all": call(x, y, 150),
        "one": call(x, y, 1),
        "ties": call(t.integers(3, 33, 24).to(t.dtype), t.integers(3, 150, 24).to(t.dtype), 60),
        "not finite": call(t.broken(33, 24), t.broken(150, 24), 60),
        "wide": call(t.unit(20, 70), t.unit(70, 70), 9),
        "strided": call(t.strided(33, 24), t.strided(150, 24), 5),
    }


def nearest_code(t: Inputs) -> dict[str, Call]:
    z, codes, mask = t(70, 24), t(150, 24), t.mask(70)
    return {
        "plain": call(z, codes),
        "cosine": call(z, codes, metric="cosine"),
        "mask": call(z, codes, mask=mask),
        "not exact": call(z, codes, exact=False),
        "cosine, not exact": call(z, codes, metric="cosine", exact=False, mask=mask),
        "ties": call(t.integers(3, 70, 24).to(t.dtype), t.integers(3, 5, 24).to(t.dtype).repeat(30, 1)),
        "not finite": call(t.broken(70, 24), codes),
        "wide codes": call(z, t(40, 24).to(t.wide)),
        "strided": call(t.strided(70, 70), t.strided(150, 70)),
        "no rows": call(t(0, 24), codes),
    }


def linear_argmax(t: Inputs) -> dict[str, Call]:
    x, weight = t(70, 24), t(150, 24)
    return {
        "plain": call(x, weight),
        "bias": call(x, weight, t(150)),
        "strided": call(t.strided(70, 70), t.strided(40, 70), t(40)),
    }


def code_statistics(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(200, 24), t.integers(30, 200), 30),
        "outside": call(t(200, 24), t.integers(40, 200) - 5, 30),
        "one code": call(t.strided(200, 70), torch.zeros(200, dtype=torch.int32), 3),
        "no rows": call(t(0, 24), t.integers(30, 0), 30),
    }


def vector_quantize(t: Inputs) -> dict[str, Call]:
    z, codes, mask = t(70, 24), t(50, 24), t.mask(70)
    return {
        "plain": call(z, codes),
        "weights": call(z, codes, beta=0.25, codebook_weight=0.7),
        "moving average": call(z, codes.detach(), codebook_weight=0.0),
        "frozen rows": call(z.detach(), codes),
        "rotation": call(z, codes, gradient="rotation"),
        "gradient of the codes": call(z, codes, gradient="none", beta=0.25),
        "cosine": call(z, codes, metric="cosine"),
        "zero rows": call(t.gaps(70, 24), t.gaps(50, 24), metric="cosine", gradient="rotation"),
        "cosine, rotation": call(z, codes, metric="cosine", gradient="rotation", mask=mask),
        "mask": call(z, codes, mask=mask),
        "mask, gradient of the codes": call(z, codes, mask=mask, gradient="none"),
        "strided": call(t.strided(70, 24), t.strided(50, 24)),
    }


def fsq(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(5, 14, 4), (8, 5, 4, 3)),
        "symmetric": call(t(70, 3), (2, 5, 8), symmetric=True),
    }


def lfq_entropy(t: Inputs) -> dict[str, Call]:
    x = t.unit(70, 6)
    return {
        "plain": call(x),
        "options": call(x, inv_temperature=3.0, scale=0.5),
    }


def select_head(t: Inputs) -> dict[str, Call]:
    x, at, norm, weight, s = t(12, 7, 24), t.integers(7, 12), t.norm(24), t(40, 24), t.number(3.0)
    wide_norm = (torch.ones(24, dtype=t.wide).requires_grad_(), torch.zeros(24, dtype=t.wide).requires_grad_(), 0.03)
    return {
        "plain": call(x, at, norm, weight),
        "first token": call(x, 0, norm, weight, scale=s),
        "scale as a float": call(x, at, norm, weight, scale=3.0),
        "no weight": call(x, at, norm, scale=s),
        "no norm weights": call(x, at, (None, None, 0.03), weight),
        "no norm bias": call(x, 0, (norm[0], None, 0.03), normalize=False),
        "wide norm": call(x, at, wide_norm, weight),
        "as they are": call(x, at, norm, weight, normalize=False, scale=s),
        "clips": call(x, at, norm, weight, clips=3, scale=s),
        "clips, as they are": call(x, 0, norm, weight, clips=4, normalize=False),
        "frozen tower": call(x.detach(), at, norm, weight.detach(), scale=s),
        "strided": call(t.strided(12, 7, 24), at, norm, t.strided(40, 24)),
        "no rows": call(t(0, 7, 24), 0, norm, weight),
    }


def embed_text(t: Inputs) -> dict[str, Call]:
    ids, table, position, mask = t.integers(30, 5, 14), t(30, 24), t(20, 24), t.mask(5, 14)
    return {
        "plain": call(ids, table),
        "CLIP": call(ids.int(), table, position=position),
        "BERT": call(ids, table, position=position, type_embed=t(24), norm=t.norm(24), padding_idx=0),
        "BEiT-3": call(ids, table, position=position, position_offset=2, pad_mask=mask),
        "scaled": call(ids, table, scale=24**0.5, padding_idx=3),
        "norm without weights": call(ids, table, norm=(None, None, 0.03), pad_mask=mask),
        "everything": call(ids, table, position=position, position_offset=5, type_embed=t(24), scale=0.5,
                           norm=(t(24), None, 0.03), padding_idx=1, pad_mask=mask),
        "frozen table": call(ids, table.detach(), position=position, norm=t.norm(24)),
        "strided": call(ids.t(), t.strided(30, 24), position=t.strided(20, 24)),
        "no tokens": call(ids[:, :0], table, position=position),
    }  # fmt: skip


def embed_pair(t: Inputs) -> dict[str, Call]:
    pixels, ids, pad = t.bytes(3, 3, 16, 24), t.integers(30, 3, 7), t.mask(3, 7)
    given = {"weight": t(24, 3, 8, 8), "position": t(12, 24), "table": t(30, 24), "text_position": t(12, 24)}
    cls = {"cls_token": t(24)}
    masked = {"mask": t.mask(3, 6), "mask_token": t(24)}
    return {
        "plain": call(pixels, ids, **given, **cls, bias=t(24), **RGB),
        "no class token": call(t(3, 3, 16, 24), ids.int(), **given),
        "masked": call(pixels, ids, **given, **cls, **masked, mean=0.5),
        "padding": call(pixels, ids, **given, **cls, pad_mask=pad, padding_idx=1),
        "offset": call(pixels, ids, **given, **cls, **masked, pad_mask=pad, position_offset=4, **RGB),
        "unmasked token": call(pixels, ids, **given, **cls, mask_token=masked["mask_token"]),
        "frozen words": call(pixels, ids, **given | {"table": given["table"].detach()}, **cls),
        "frozen patches": call(pixels, ids, **given | {"weight": given["weight"].detach()}, **cls, std=0.5),
    }


def farthest_points(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(3, 150, 3), 40),
        "start": call(t(3, 150, 3), 20, start=5),
        "starts": call(t.strided(3, 150, 3), 20, start=t.integers(150, 3)),
        "ties": call(t.integers(4, 2, 90, 3).to(t.dtype), 80),
        "not finite": call(t.broken(2, 90, 3), 90),
    }


def nearest_neighbors(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(2, 20, 3), t(2, 150, 3), 9),
        "ties": call(t.integers(4, 2, 20, 3).to(t.dtype), t.integers(4, 2, 90, 3).to(t.dtype), 30),
        "all": call(t(1, 20, 3), t(1, 70, 3), 70),
        "not finite": call(t.broken(2, 20, 3), t.broken(2, 90, 3), 60),
        "strided": call(t.strided(2, 20, 3), t.strided(2, 150, 3), 1),
    }


def ball_query(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(2, 20, 3), t(2, 150, 3), 9, 0.8),
        "ties": call(t.integers(4, 2, 20, 3).to(t.dtype), t.integers(4, 2, 90, 3).to(t.dtype), 30, 1.0),
        "not finite": call(t.broken(2, 20, 3), t.broken(2, 90, 3), 9, 0.8),
        "nothing near": call(t.strided(2, 20, 3), t.strided(2, 50, 3), 5, 0.01),
    }


def group_points(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(2, 50, 24), t.integers(50, 2, 12, 9)),
        "strided": call(t.strided(2, 50, 24), t.integers(50, 2, 12, 9).int()),
        "no gradient": call(t.fixed(2, 50, 3), t.integers(50, 2, 12, 9)),
    }


def mini_pointnet(t: Inputs) -> dict[str, Call]:
    layers = t.layers(3, 8, 16, 24, 40)
    return {
        "plain": call(t(2, 7, 16, 3), layers),
        "frozen points": call(t.fixed(9, 32, 3), layers),
        "frozen layers": call(t.strided(9, 16, 3), [(w.detach(), b.detach()) for w, b in layers]),
        "many points": call(t(2, 300, 3), layers),
        "no groups": call(t(0, 16, 3), layers),
    }


def mini_pointnet_training(t: Inputs) -> dict[str, Call]:
    layers = t.layers(3, 8, 16, 24, 40)
    return {
        "plain": call(t(2, 7, 16, 3), layers, t(24)),
        "eps": call(t.fixed(9, 32, 3), layers, t(24), 0.1),
        "many points": call(t(2, 300, 3), layers, t(24)),
    }


def patch_embed(t: Inputs) -> dict[str, Call]:
    u8, real = t.bytes(3, 3, 16, 24), t(3, 3, 16, 24)
    w, bias, position, prefix = t(24, 3, 8, 8), t(24), t(6, 24), {"prefix": t(2, 24), "prefix_position": t(2, 24)}
    masked, keep = {"mask": t.mask(3, 6), "mask_token": t(24)}, t.order(3, 6)[:, :4].contiguous()
    every = RGB | prefix | masked | {"position": position, "type_embed": t(24)}
    norms = {"stem_norm": t.norm(24), "pre_norm": t.norm(24, 0.03)}
    return {
        "plain": call(u8, w, bias, position=position, **prefix, **RGB),
        "floats": call(real, w, bias, position=position, **prefix, **RGB),
        "everything": call(u8, w, bias, **every, **norms),
        "everything, kept": call(real, w, bias, **every, **norms, ids_keep=keep),
        "bytes as numbers": call(u8, w),
        "numbers for mean and std": call(u8, w, mean=0.4, std=0.2),
        "tensors for mean and std": call(u8, w, mean=torch.tensor(RGB["mean"]), std=torch.tensor(RGB["std"])),
        "one channel": call(t.bytes(2, 1, 16, 16), t(24, 1, 8, 8), mean=(0.4,)),
        "position alone": call(u8, w, position=position),
        "prefix alone": call(u8, w, prefix=prefix["prefix"]),
        "mask": call(u8, w, bias, **masked),
        "kept": call(u8, w, bias, ids_keep=keep, position=position, **RGB),
        "kept twice": call(real, w, bias, ids_keep=torch.tensor([[5, 1, 5]] * 3), position=position),
        "type": call(u8, w, type_embed=t(24), **prefix),
        "norm of the stem": call(u8, w, stem_norm=(t(24), None, 0.03), **prefix),
        "norm at the end": call(u8, w, pre_norm=t.norm(24, 0.03), **prefix),
        "frozen weight": call(real, w.detach(), bias, **norms),
        "no gradient": call(u8, w.detach(), bias.detach(), **RGB),
        "padded": call(t.bytes(2, 3, 13, 21), w, bias, padding="zero", position=position, **RGB),
        "padded floats": call(t(2, 13, 21, 3), w, padding="zero", layout="nhwc", **RGB),
        "overlapping": call(t(2, 1, 37, 27), t(24, 1, 16, 16), stride=10, mean=-4.3, std=9.1, **prefix),
        "odd strides": call(t.bytes(2, 3, 23, 31), t(24, 3, 5, 7), stride=(3, 11), **RGB),
        "nhwc": call(t.bytes(2, 16, 24, 3), w, bias, layout="nhwc", **RGB),
        "clip": call(t.bytes(2, 4, 3, 8, 16), t(24, 3, 2, 8, 8), layout="ntchw", position=t(4, 24), **RGB),
        "clip of floats": call(t(2, 3, 4, 8, 16), t(24, 3, 2, 8, 8), bias),
        "still": call(t.bytes(2, 3, 16, 16), t(24, 3, 2, 8, 8), bias, **RGB),
        "still, nhwc": call(t(2, 16, 16, 3), t(24, 3, 2, 8, 8), layout="nhwc"),
        "signal": call(t(2, 6, 40), t(24, 6, 8), stem_norm=norms["stem_norm"]),
        "patches": call(t(2, 5, 48), t(24, 48), bias, layout="patches", mean=(0.1, 0.2, 0.3), std=0.5),
        "patches of bytes": call(t.bytes(2, 5, 48), t(24, 3, 4, 4), layout="patches", **RGB),
        "result in float32": call(u8, w, bias, dtype=torch.float32, **RGB),
        "strided": call(t.strided(3, 3, 16, 24), t.strided(24, 3, 8, 8), position=t.strided(6, 24)),
        "crop": call(t.bytes(2, 3, 40, 40)[:, :, 5:21, 7:31], w, bias, **RGB),
        "no images": call(u8[:0], w, bias, **prefix, **RGB),
    }


def patch_embed_packed(t: Inputs) -> dict[str, Call]:
    w, bias, table, pair = t(24, 12), t(24), t(3, 3, 24), (t(4, 24), t(3, 24))
    two, three = torch.tensor([[2, 3], [1, 6]]), torch.tensor([[2, 3], [0, 4], [3, 4]])
    blocks, naflex = torch.tensor([[2, 2, 4], [1, 4, 2]]), {"keep_aspect": True, "pad_position": "none"}
    return {
        "plain": call(t(12, 12), two, w, bias, table=table),
        "no table": call(t.bytes(18, 12), three, w, **RGB),
        "bytes": call(t.bytes(14, 12), two, w, bias, table=table, channels_last=False, **RGB),
        "SigLIP2": call(t(2, 8, 12), two, w, bias, table=table),
        "NaFlex": call(t(2, 7, 12), two, w, table=t(4, 3, 24), mode="bicubic_aa", **naflex),
        "Qwen3-VL": call(t(24, 12), blocks, w, bias, table=table, mode="bilinear_corners", order="merge2"),
        "Idefics2": call(t(18, 12), three, w, bias, table=t(9, 24), mode="nearest_bucket"),
        "factorised": call(t(12, 12), two, w, table=pair, mode="linear_1d"),
        "NaViT": call(t(9, 12), torch.tensor([[2, 3], [3, 1]]), w, table=pair, mode="lookup"),
        "bicubic": call(t(12, 12), two, w, bias, table=table, mode="bicubic"),
        "kept": call(t(12, 12), two, w, bias, table=table, ids_keep=torch.tensor([5, 0, 7, 9, 6])),
        "padded result": call(t(12, 12), two, w, bias, table=table, padded_length=7),
        "result in float32": call(t(12, 12), two.int(), w, bias, table=table, dtype=torch.float32),
        "frozen weight": call(t.strided(12, 12), two, w.detach(), table=table, mean=0.3, std=0.7),
        "no images": call(t(0, 12), two[:0], w, bias, table=table),
    }


def interpolate_position(t: Inputs) -> dict[str, Call]:
    modes = ("bicubic", "bicubic_aa", "bilinear", "bilinear_aa", "bilinear_corners", "grid_sample", "nearest_bucket")
    table, square, pair = t(3, 2, 24), t(9, 24), (t(5, 24), t(4, 24))
    return {
        "plain": call(table, (4, 3)),
        "ImageBind": call(square, (4, 4), "bicubic_scale"),
        "lookup": call(table, (3, 1), "lookup"),
        "factorised": call(pair, (7, 3), "linear_1d"),
        "aspect": call(square, (4, 2), "bilinear_aa", keep_aspect=True),
        "factorised aspect": call(pair, (6, 3), "bicubic_aa", keep_aspect=True),
        "the same grid": call(table, (3, 2)),
        "no grid": call(table, (0, 3)),
        "strided": call(t.strided(3, 2, 24), (2, 5), "bicubic_aa"),
        **{mode: call(table, (5, 4), mode) for mode in modes},
        **{f"{mode}, smaller": call(t(4, 3, 24), (2, 2), mode) for mode in modes if mode.endswith("aa")},
    }


def resample_weight(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t(24, 3, 8, 8), (5, 11)),
        **{mode: call(t(24, 3, 4, 6), (7, 3), mode=mode) for mode in ("bicubic", "bilinear", "bilinear_aa")},
        "the same size": call(t(24, 3, 8, 8), (8, 8)),
    }


def masked_patch_loss(t: Inputs) -> dict[str, Call]:
    x, mask, few = t(3, 6, 48), t.mask(3, 6), t.order(3, 6) < 4
    videomae = {"patch": (2, 4, 4), "layout": "ntchw", "mean": 0}
    return {
        "plain": call(x, t.bytes(3, 3, 8, 12), mask, patch=4, **RGB),
        "floats": call(x, t.fixed(3, 3, 8, 12), mask, patch=4),
        "numbers for a mask": call(x, t.bytes(3, 3, 8, 12), mask.float(), patch=(4, 4), norm_pix=False, mean=0.5),
        "channels last": call(x, t.bytes(3, 8, 12, 3), mask, patch=4, norm_pix="channel", layout="nhwc", std=0.2),
        "VideoMAE": call(t(2, 5, 96), t.bytes(2, 4, 3, 8, 8), t.order(2, 8) < 5, **videomae),
        "clip": call(t(2, 4, 96), t.fixed(2, 3, 4, 8, 4), t.mask(2, 4), patch=(2, 4, 4), norm_pix="patch"),
        "masked alone": call(t(3, 4, 48), t.bytes(3, 3, 8, 12), few, patch=4, **RGB),
        "strided": call(t.strided(3, 6, 48), t.strided(3, 3, 8, 12).detach(), mask, patch=4),
        "nothing masked": call(x, t.bytes(3, 3, 8, 12), torch.zeros_like(mask), patch=4),
    }


def random_masking(t: Inputs) -> dict[str, Call]:
    return {
        "plain": call(t.fixed(5, 40), 10),
        "all kept": call(t.fixed(5, 40), 40),
    }


def drop_patches(t: Inputs) -> dict[str, Call]:
    return {"plain": call(t.fixed(30), torch.tensor([[2, 3], [4, 6]]), torch.tensor([4, 9]), 13)}


def pack_images(t: Inputs) -> dict[str, Call]:
    images = [t.fixed(3, 8, 16), t.fixed(3, 16, 24)]
    return {
        "plain": call(images, 4),
        "blocks": call(images, 4, order="merge2", channels_last=False),
    }


def sinusoid_1d(t: Inputs) -> dict[str, Call]:
    return {"plain": call(20, 7, temperature=100.0, dtype=t.dtype, device="cpu")}


def sinusoid_2d(t: Inputs) -> dict[str, Call]:
    options = {"temperature": 100.0, "dtype": t.dtype, "device": "cpu"}
    return {"plain": call(5, 7, 24, **options), "rows first": call(5, 7, 24, columns_first=False)}


def linear_cross_entropy(t: Inputs) -> dict[str, Call]:
    x, w, bias, labels = t(3, 15, 24), t(50, 24), t(50), t.integers(50, 3, 15)
    some = labels.where(labels % 4 != 0, -100)
    soft = {"teacher": (t.fixed(3, 15, 20), t.fixed(50, 20), t.fixed(50)), "alpha": 0.4}
    return {
        "plain": call(x, w, labels, chunk=16),
        "ignored": call(x, w, some, bias=bias, chunk=16),
        "ignored index": call(x, w, labels, bias=bias, ignore_index=3),
        "smoothed": call(x, w, some, bias=bias, label_smoothing=0.1, chunk=7),
        "sum": call(x, w, some, bias=bias, reduction="sum", chunk=7),
        "none": call(x, w, some, bias=bias, reduction="none", chunk=7),
        "teacher": call(x, w, some, bias=bias, **soft, chunk=7),
        "teacher, none": call(x, w, some, label_smoothing=0.1, reduction="none", **soft),
        "frozen weight": call(x, w.detach(), labels, chunk=16),
        "frozen hidden": call(x.detach(), w, labels, bias=bias, chunk=16),
        "nothing counts": call(x, w, torch.full_like(labels, -100)),
    }


@functools.cache
def large() -> dict[str, dict[str, Call]]:
    """Sizes above those where eager is the default on a CPU, by operator."""
    t = Inputs(torch.float32)
    x, y, s, m = t.unit(600, 64), t.unit(600, 64), t.number(20.0), t.unit(1100, 32)
    queue, q = t.unit(2100, 64).detach(), t.unit(64, 64)
    soft = {"query_m": queue[:64], "alpha": 0.4, "negatives": 1, "seed": 7}
    pixels, w = t.bytes(28, 3, 224, 224), t(96, 3, 16, 16)
    return {
        "clip_loss": {
            "large": call(x, y, s, normalize=True, metrics=True),
            "large, ids": call(x, y, s, ids=t.integers(400, 600), label_smoothing=0.1),
            "large, store in 16 bits": call(x, y, s, save="store", store_budget=0),
            "large, rows": call(t.unit(300, 64), t.unit(900, 64), s, row_offset=500, decoupled=True),
            "several blocks": call(t.unit(2100, 16), t.unit(2100, 16), s, save="recompute"),
        },
        "siglip_loss": {"large": call(t.unit(700, 64), t.unit(700, 64), s, t.number(-8.0), normalize=True)},
        "distill_clip_loss": {"large": call(m, t.unit(1100, 32), s, t.unit(1100, 24), t.unit(1100, 24), t.number(9.0))},
        "distributed_clip_loss": {"large": call(t.unit(700, 64), t.unit(700, 64), s)},
        "distributed_siglip_loss": {"large": call(m, t.unit(1100, 32), s, -8.0)},
        "global_contrastive_loss": {"large": call(x, y, s, t.fixed(600), t.fixed(600), 0.3)},
        "grouped_clip_loss": {"large": call([x, m], [y, t.unit(1100, 32)], [s, 9.0])},
        "matryoshka_clip_loss": {"large": call(x, y, s, (16, 64))},
        "max_query_similarity": {"large": call(t.unit(60, 32, 64), t.unit(300, 64))},
        "moco_loss": {"large": call(q, q.detach(), queue, t.number(0.1))},
        "queue_itc_loss": {"large": call(q, q.detach(), queue, t.number(0.1), **soft)},
        "similarity_topk": {"large": call(x, t.unit(9000, 64), 20)},
        "hard_negatives": {"large": call(x, y, 20.0, k=2, both=True, seed=7)},
        "nearest_code": {"large": call(t(2000, 32), t(3000, 32))},
        "vector_quantize": {"large": call(t(2000, 32), t(600, 32), gradient="rotation")},
        "embed_text": {"large": call(t.integers(500, 64, 70), t(500, 256), position=t(70, 256), norm=t.norm(256))},
        "nearest_neighbors": {"large": call(t(2, 128, 3), t(2, 1500, 3), 32)},
        "ball_query": {"large": call(t(2, 128, 3), t(2, 1500, 3), 32, 0.5)},
        "mini_pointnet": {"large": call(t(100, 32, 3), t.layers(3, 32, 48, 64, 96))},
        "mini_pointnet_training": {"large": call(t(100, 32, 3), t.layers(3, 32, 48, 64, 96), t(64))},
        "patch_embed": {"large": call(pixels, w, t(96), position=t(196, 96), pre_norm=t.norm(96), **RGB)},
        "interpolate_position": {"large": call(t(24, 24, 48), (31, 20), "bicubic_aa")},
        "masked_patch_loss": {"large": call(t(8, 196, 768), pixels[:8], t.mask(8, 196), patch=16, **RGB)},
        "linear_cross_entropy": {"large": call(t(700, 16), t(20000, 16), t.integers(20000, 700), bias=t(20000))},
    }  # fmt: skip


# former names of operators
NAMES = {"embed_pair": ("embed_pair", "embed_pair")}
VARIANTS: dict[str, Callable[[Inputs], dict[str, Call]]] = {
    f.__name__: f
    for f in (
        *(clip_loss, siglip_loss, distill_clip_loss, distributed_clip_loss, distributed_siglip_loss),
        *(global_contrastive_loss, grouped_clip_loss, matryoshka_clip_loss, hard_negatives),
        *(max_query_similarity, max_query_loss, moco_loss, queue_itc_loss, queue_itc_losses, similarity_topk),
        *(nearest_code, linear_argmax, code_statistics, vector_quantize, fsq, lfq_entropy),
        *(select_head, embed_text, embed_pair),
        *(farthest_points, nearest_neighbors, ball_query, group_points, mini_pointnet, mini_pointnet_training),
        *(patch_embed, patch_embed_packed, interpolate_position, resample_weight, masked_patch_loss, random_masking),
        *(drop_patches, pack_images, sinusoid_1d, sinusoid_2d, linear_cross_entropy),
    )
}
# of these the plain variant also goes through torch.compile
COMPILED = (
    *("clip_loss", "siglip_loss", "distill_clip_loss", "queue_itc_loss", "max_query_similarity", "vector_quantize"),
    *("select_head", "embed_text", "group_points", "mini_pointnet", "patch_embed", "interpolate_position"),
)


# --- rows -------------------------------------------------------------------------------------------------------------


@functools.cache
def find(name: str) -> Callable[..., Any]:
    """The public function of this name, wherever it lives."""
    kernels = import_module("mmfuse.kernels")
    inner = sorted((m.name for m in pkgutil.walk_packages(kernels.__path__, "mmfuse.kernels.") if m.ispkg), key=len)
    for package in ("mmfuse.kernels", "mmfuse.fused", *inner):
        for known in NAMES.get(name, (name,)):
            if inspect.isfunction(fn := getattr(import_module(package), known, None)):
                return fn
    raise SystemExit(f"no package of mmfuse has {name}")


def tensors(tree: Any) -> dict[str, Tensor]:
    return {keystr(path): t for path, t in tree_flatten_with_path(tree)[0] if isinstance(t, Tensor)}


def digest(t: Tensor | None) -> str:
    if t is None:
        return "none"
    content = t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(t.dtype)[6:]}{list(t.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def measured(fn: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, str]:
    """Digests of the results, and of the gradients of a fixed random linear function of them."""
    torch.manual_seed(0)
    results = tensors(fn(*args, **options))
    found = {f"result{name}": digest(t) for name, t in results.items()}
    given = {name: t for name, t in tensors(dict(enumerate(args)) | options).items() if t.requires_grad}
    graph = [t for t in results.values() if t.requires_grad]
    if graph:
        torch.manual_seed(1)
        upstream = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in graph]
        grads = torch.autograd.grad(graph, list(given.values()), upstream, allow_unused=True)
        found |= {f"gradient{name}": digest(t) for name, t in zip(given, grads, strict=True)}
    return found


def rows_of(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(operator | variant | backend | dtype, digests); an implementation that does not take a variant has no row."""
    fn = find(name)
    backends = BACKENDS if "backend" in inspect.signature(fn).parameters else (None,)
    if name == "linear_cross_entropy":
        backends = (None, "chunked", "torch")

    def row(variant: str, given: Call, dtype: torch.dtype, backend: str | None, fn: Any = fn) -> Rows:
        args, options = given
        key = f"{name} | {variant} | {backend or 'default'} | {str(dtype)[6:]}"
        try:
            return {key: measured(fn, args, options | ({"backend": backend} if backend else {}))}
        except mmfuse.UnsupportedError:
            return {}
        except Exception as error:  # noqa: BLE001  the other rows are wanted all the same
            return {key: {"error": f"{type(error).__name__}: {error}".splitlines()[0]}}

    for dtype in DTYPES:
        for variant, given in VARIANTS[name](Inputs(dtype)).items():
            for backend in backends:
                # the interpreter is slow
                if backend != "triton" or variant == "plain" or dtype in (torch.float32, torch.float16):
                    yield from row(variant, given, dtype, backend).items()
    dtype = torch.float32
    plain = VARIANTS[name](Inputs(dtype))["plain"]
    for backend in backends:
        with torch.autocast("cpu", torch.bfloat16):
            eager = row("plain, autocast", plain, dtype, backend)
        yield from eager.items()
        if eager and name in COMPILED and backend in FAST:
            torch._dynamo.reset()
            compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
            yield from row("plain, compiled", plain, dtype, backend, compiled).items()
    for variant, given in large().get(name, {}).items():
        for backend in (b for b in backends if b in FAST):
            yield from row(variant, given, dtype, backend).items()


def untried(name: str) -> list[str]:
    """The parameters of an operator that no variant gives."""
    parameters = list(inspect.signature(find(name)).parameters)
    given = {"backend"}
    for args, options in VARIANTS[name](Inputs(torch.float32)).values():
        given.update(parameters[: len(args)], options)
    return [p for p in parameters if p not in given]


def rows(names: Iterable[str]) -> Rows:
    found: Rows = {}
    for name in names:
        start = time.process_time()
        of_name = dict(rows_of(name))
        found |= of_name
        print(f"{name:26} {len(of_name):5} rows {time.process_time() - start:6.1f} s", file=sys.stderr, flush=True)
    return found


def differences(before: Rows, after: Rows) -> Iterator[str]:
    for key in before | after:
        if key not in after or key not in before:
            yield f"{key}: only {'before' if key in before else 'after'}"
            continue
        old, new = before[key], after[key]
        yield from (f"{key} | {q}: {old.get(q)} -> {new.get(q)}" for q in old | new if old.get(q) != new.get(q))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("operators", nargs="*", metavar="operator", help="by default all")
    given = parser.parse_args()
    names = given.operators or list(VARIANTS)
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"no variants of {', '.join(unknown)}")
    for name in names:
        find(name)  # before any work
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    warnings.simplefilter("ignore")
    print(f"mmfuse of {Path(mmfuse.__file__).parents[1]}", file=sys.stderr)
    found = rows(names)
    if given.what == "write":
        given.file.write_text(json.dumps(found, indent=0))
        wrong = [f"{key}: {of['error']}" for key, of in found.items() if "error" in of]
        wrong += [f"{name}: no variant gives {p}" for name in names for p in untried(name)]
        known = {n for name in VARIANTS for n in NAMES.get(name, (name,))}
        wrong += [f"{name}: no variants" for name in import_module("mmfuse.kernels").__all__ if name not in known]
    else:
        before = {key: of for key, of in json.loads(given.file.read_text()).items() if key.split(" |")[0] in names}
        wrong = list(differences(before, found))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(found)} rows, {len(wrong)} {'errors' if given.what == 'write' else 'differences'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
