"""Selections by similarity: hard negatives against the official loop, the top k against torch and faiss's flat index.

Hard negatives: B unit images and texts of D dimensions, a text drawn for each image and an image for each text. Top k:
the 10 best of a gallery of N for each of B queries. Each needs one product, 2 B N D floating-point operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check, relative
from mmfuse.bench.inputs import TEMPERATURE, computed, unit, units
from mmfuse.bench.providers import eager, faiss, formula, products
from mmfuse.kernels import hard_negatives, similarity_topk

_SCALE = 1 / TEMPERATURE
_K = 10


# --- hard negatives -------------------------------------------------------------------------------------------------


def _drawn(image: Tensor, text: Tensor, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean similarity of what was drawn, by which random draws can be compared."""
    to_texts = (image * text[texts]).sum(-1, dtype=torch.float32)
    return to_texts.mean(), (text * image[images]).sum(-1, dtype=torch.float32).mean()


def albef(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """ALBEF, model_pretrain.py: one draw and one synchronisation for each row, in both directions."""
    drawn = [
        torch.tensor([torch.multinomial(w, 1).item() for w in _weights(x, y)], device=x.device)
        for x, y in ((image, text), (text, image))
    ]
    return _drawn(image, text, *drawn)


def batched(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one torch.multinomial for all rows."""
    drawn = [torch.multinomial(_weights(x, y), 1)[:, 0] for x, y in ((image, text), (text, image))]
    return _drawn(image, text, *drawn)


def _weights(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(_SCALE * (x @ y.T).float(), dim=1).fill_diagonal_(0)


def _negatives(image: Tensor, text: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    texts, images = hard_negatives(image, text, _SCALE, both=True, **options)
    return _drawn(image, text, texts[:, 0], images[:, 0])


# --- top k ----------------------------------------------------------------------------------------------------------


def eager_topk(queries: Tensor, gallery: Tensor) -> Tensor:
    return torch.topk(queries @ gallery.T, _K)[0]


def _topk(queries: Tensor, gallery: Tensor, **options: Any) -> Tensor:
    return similarity_topk(queries, gallery, _K, **options)[0]


# --- cases ----------------------------------------------------------------------------------------------------------


CASES = [
    Case(
        name="hard_negatives",
        op="hard_negatives",
        ours=_negatives,
        peers={"eager": eager(albef), "batched": eager(batched)},
        definitions=("eager", "batched"),
        inputs=lambda device, dtype, B, D: (unit(device, dtype, B, D), unit(device, dtype, B, D)),
        outputs=("similarity of the texts", "similarity of the images"),
        cpu=[{"B": b, "D": 256} for b in (256, 1024, 4096)],
        cuda=[{"B": b, "D": 256} for b in (512, 4096, 16384)],
        growth="B",
        small={"B": 512, "D": 32},
        flops=lambda mode, B, D: 2 * B * B * D,
        bytes=lambda mode, itemsize, B, D: 2 * B * D * itemsize + 16 * B,
        anchors=products(lambda image, text: [(image, text, 1)], lambda B, D: 2 * B * B * D),
        modes=("fwd",),
        judged=False,
        # draws differ: a mean of 512 of them by some 6 %, and uniform draws have none of the similarity
        distance=lambda got, want: relative(got, want) / 100,
    ),
    Case(
        name="topk",
        op="similarity_topk",
        ours=_topk,
        peers={**formula(eager_topk), "faiss": faiss("IndexFlatIP", _K, lambda values, index: values)},
        inputs=lambda device, dtype, B, N, D: (unit(device, dtype, B, D), unit(device, dtype, N, D)),
        outputs=("values",),
        cpu=[{"B": b, "N": n, "D": 256} for b, n in ((256, 10000), (1000, 10000), (1000, 100000), (10000, 100000))],
        cuda=[{"B": b, "N": n, "D": 256} for b, n in ((1000, 100000), (10000, 100000), (10000, 1000000))],
        growth="N",
        small={"B": 9, "N": 300, "D": 32},
        flops=lambda mode, B, N, D: 2 * B * N * D,
        bytes=lambda mode, itemsize, B, N, D: (B + N) * D * itemsize + 12 * B * _K,
        anchors=products(lambda queries, gallery: [(queries, gallery, 1)], lambda B, N, D: 2 * B * N * D),
        modes=("fwd",),
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_negatives(query: Tensor, keys: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return hard_negatives(query, keys, _SCALE, k=2, mixture=1e-4, seed=1, both=True, backend=backend)


_INPUTS = units(query=(37, 48), keys=(129, 48))

CHECKS = [
    Check("hard_negatives", "B=37 N=129 D=48", _INPUTS, computed(_check_negatives, "keys", "queries")),
    Check("similarity_topk", "B=37 N=129 D=48", _INPUTS, computed(_topk, "values")),
]
