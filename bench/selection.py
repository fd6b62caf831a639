"""Selections by similarity: hard negatives against the official loop, the top k against torch and faiss's flat index.

Hard negatives: B unit images and texts of D dimensions, a text drawn for each image and an image for each text. Top k:
the 10 best of a gallery of N for each of B queries. Each needs one product, 2 B N D floating-point operations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, relative
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels.contrastive.negatives.op import NEGATIVES, hard_negatives
from mmfuse.kernels.contrastive.topk.op import TOPK, similarity_topk

_SCALE = 1 / 0.07
_K = 10


def _features(device: torch.device, dtype: torch.dtype, *sizes: int, D: int) -> tuple[Tensor, ...]:
    return tuple(F.normalize(torch.randn(n, D, device=device), dim=-1).to(dtype) for n in sizes)


def _product(device: torch.device, dtype: torch.dtype) -> Any:
    kept: list[Tensor] = []

    def run(x: Tensor, y: Tensor) -> Tensor:
        if not kept:  # fresh memory costs page faults, which are no part of a product
            kept.append(x.new_empty(len(x), len(y)))
        return torch.mm(x, y.T, out=kept[0])

    return run


# --- hard negatives -------------------------------------------------------------------------------------------------


def _drawn(image: Tensor, text: Tensor, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean similarity of what was drawn, by which random draws can be compared."""
    to_texts = (image * text[texts]).sum(-1, dtype=torch.float32)
    return to_texts.mean(), (text * image[images]).sum(-1, dtype=torch.float32).mean()


def albef(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """ALBEF, model_pretrain.py: one draw and one synchronisation for each row, in both directions."""
    drawn = []
    for x, y in ((image, text), (text, image)):
        weights = F.softmax(_SCALE * (x @ y.T).float(), dim=1)
        weights.fill_diagonal_(0)
        drawn.append(torch.tensor([torch.multinomial(w, 1).item() for w in weights], device=x.device))
    return _drawn(image, text, *drawn)


def batched(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one torch.multinomial for all rows."""
    drawn = []
    for x, y in ((image, text), (text, image)):
        weights = F.softmax(_SCALE * (x @ y.T).float(), dim=1)
        weights.fill_diagonal_(0)
        drawn.append(torch.multinomial(weights, 1)[:, 0])
    return _drawn(image, text, *drawn)


def _negatives(image: Tensor, text: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    texts, images = hard_negatives(image, text, _SCALE, both=True, **options)
    return _drawn(image, text, texts[:, 0], images[:, 0])


# --- top k ----------------------------------------------------------------------------------------------------------


def eager_topk(queries: Tensor, gallery: Tensor) -> Tensor:
    return torch.topk(queries @ gallery.T, _K)[0]


def _faiss(device: torch.device, dtype: torch.dtype) -> Any:
    """faiss's exact index on the CPU, filled in the same call."""
    if device.type != "cpu" or dtype != torch.float32:
        raise NotImplementedError("needs float32 on a CPU")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def run(queries: Tensor, gallery: Tensor) -> Tensor:
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery.numpy())
        return torch.from_numpy(index.search(queries.numpy(), _K)[0])

    return run


def _topk(queries: Tensor, gallery: Tensor, **options: Any) -> Tensor:
    return similarity_topk(queries, gallery, _K, **options)[0]


# --- cases ----------------------------------------------------------------------------------------------------------


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    features = torch.empty(16, 1, device=device, dtype=dtype)
    return features, features


def _default(baselines: list[str], op: Any, device: torch.device, dtype: torch.dtype) -> list[str]:
    first = chosen(op, 2, _probe(device, dtype))
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" else []
    return [*baselines, "mmfuse", *named, "mmfuse-chunked"]


CASES = [
    Case(
        name="hard_negatives",
        inputs=lambda device, dtype, B, D: _features(device, dtype, B, B, D=D),
        outputs=("similarity of the texts", "similarity of the images"),
        providers={
            "eager": eager(albef),
            "batched": eager(batched),
            **ours(NEGATIVES, _negatives, _probe),
        },
        definitions=("eager", "batched"),
        chosen=partial(chosen, NEGATIVES, 2),
        default=partial(_default, ["eager", "batched"], NEGATIVES),
        dims=("B", "D"),
        shapes={
            "cpu": [{"B": b, "D": 256} for b in (256, 1024, 4096)],
            "cuda": [{"B": b, "D": 256} for b in (512, 4096, 16384)],
        },
        growth="B",
        small={"B": 512, "D": 32},
        flops=lambda mode, B, D: 2 * B * B * D,
        bytes=lambda mode, itemsize, B, D: 2 * B * D * itemsize + 16 * B,
        anchors={"product": Anchor(_product, lambda B, D: 2 * B * B * D)},
        anchor=lambda provider, mode: "product",
        modes=("fwd",),
        judged=False,
        # draws differ: a mean of 512 of them by some 6 %, and uniform draws have none of the similarity
        distance=lambda got, want: relative(got, want) / 100,
    ),
    Case(
        name="topk",
        inputs=lambda device, dtype, B, N, D: _features(device, dtype, B, N, D=D),
        outputs=("values",),
        providers={
            "eager": eager(eager_topk),
            "compile": compiled(eager(eager_topk)),
            "faiss": _faiss,
            **ours(TOPK, _topk, _probe),
        },
        definitions=("eager",),
        chosen=partial(chosen, TOPK, 2),
        default=lambda device, dtype: _default(
            ["eager", "compile", *(["faiss"] if device.type == "cpu" else [])], TOPK, device, dtype
        ),
        dims=("B", "N", "D"),
        shapes={
            "cpu": [
                {"B": b, "N": n, "D": 256} for b, n in ((256, 10000), (1000, 10000), (1000, 100000), (10000, 100000))
            ],
            "cuda": [{"B": b, "N": n, "D": 256} for b, n in ((1000, 100000), (10000, 100000), (10000, 1000000))],
        },
        growth="N",
        small={"B": 9, "N": 300, "D": 32},
        flops=lambda mode, B, N, D: 2 * B * N * D,
        bytes=lambda mode, itemsize, B, N, D: (B + N) * D * itemsize + 12 * B * _K,
        anchors={"product": Anchor(_product, lambda B, N, D: 2 * B * N * D)},
        anchor=lambda provider, mode: "product",
        modes=("fwd",),
    ),
]


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    query, keys = (F.normalize(torch.randn(n, 48), dim=-1).to(device) for n in (37, 129))
    return {"query": query, "keys": keys}


def _check_negatives(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    drawn = hard_negatives(
        inputs["query"], inputs["keys"], _SCALE, k=2, mixture=1e-4, seed=1, both=True, backend=backend
    )
    return {name: t.double() for name, t in zip(("keys", "queries"), drawn, strict=True)}


def _check_topk(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    return {"values": similarity_topk(inputs["query"], inputs["keys"], _K, backend=backend)[0]}


CHECKS = [
    Check("hard_negatives", "B=37 N=129 D=48", _check_inputs, _check_negatives),
    Check("similarity_topk", "B=37 N=129 D=48", _check_inputs, _check_topk),
]
