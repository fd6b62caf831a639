"""CLIP's loss against other targets than the diagonal, and two of them at once.

    distill_clip      beside it the cross-entropy with a teacher's softmaxes (open_clip's DistillClipLoss)
    multi_positive    five texts for each image: every pair of equal ids is positive
    grouped_clip      VLMo's two contrastive problems of one step

N pairs of unit features of D dimensions (T of the teacher's). A problem takes a product of 2 N^2 D floating-point
operations for its logits, and two for the gradients unless it is the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse._compat import allow_torchvision
from mmfuse.bench import inputs
from mmfuse.bench.cases import Case, Check
from mmfuse.bench.inputs import differentiated, units
from mmfuse.bench.providers import Anchor, amp, formula, products
from mmfuse.bench.suites.contrastive import eager_clip
from mmfuse.kernels import clip_loss, distill_clip_loss, grouped_clip_loss

_POSITIVES = 5  # captions per image, as in COCO and Flickr30k


def _distill_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int, T: int) -> tuple[Tensor, ...]:
    teacher = inputs.clip(device, dtype, N, T)
    return *inputs.clip(device, dtype, N, D), *(t.detach() for t in teacher)


def _multi_positive_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    ids = torch.arange(N, device=device) // _POSITIVES
    return *inputs.clip(device, dtype, N, D), ids[torch.randperm(N, device=device)]


def _grouped_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    return *inputs.clip(device, dtype, N, D), *inputs.clip(device, dtype, N, D)


# --- what the field computes ----------------------------------------------------------------------------------------


def eager_distill(*features: Tensor) -> Tensor:
    """open_clip's DistillClipLoss in one process, its two terms added up as its training does."""
    image, text, scale, t_image, t_text, t_scale = features
    distill = torch.zeros((), device=image.device)
    for x, y, x_t, y_t in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        teacher = (t_scale * x_t @ y_t.T).softmax(dim=1)
        distill = distill - (teacher * (scale * x @ y.T).log_softmax(dim=1)).sum(dim=1).mean(dim=0) / 2
    return eager_clip(image, text, scale) + distill


def _open_clip(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    allow_torchvision()
    from open_clip.loss import DistillClipLoss

    loss = DistillClipLoss()
    return amp(lambda *features: sum(loss(*features)))


def eager_multi_positive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """ALBEF's targets for retrieval: equal ids, each row divided by their number."""
    same = (ids[:, None] == ids).float()
    targets = same / same.sum(1, keepdim=True)
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2


def eager_grouped(*features: Tensor) -> Tensor:
    """One loss after the other."""
    return eager_clip(*features[:3]) + eager_clip(*features[3:])


# --- ours -----------------------------------------------------------------------------------------------------------


def _distill(*features: Tensor, backend: str | None = None) -> Tensor:
    contrastive, distill = distill_clip_loss(*features, backend=backend)
    return contrastive + distill


def _multi_positive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, backend: str | None = None) -> Tensor:
    return clip_loss(image, text, scale, ids=ids, backend=backend)


def _grouped(*features: Tensor, backend: str | None = None) -> Tensor:
    return grouped_clip_loss(features[::3], features[1::3], features[2::3], backend=backend).sum()


# --- cases ----------------------------------------------------------------------------------------------------------


def _flops(mode: str, N: int, D: int, T: int = 0, problems: int = 1) -> float:
    return 2 * N * N * (problems * D * (1 if mode == "fwd" else 3) + T)


def _bytes(mode: str, itemsize: int, N: int, D: int, T: int = 0, problems: int = 1) -> float:
    return 2 * N * itemsize * (problems * D * (1 if mode == "fwd" else 2) + T)


def _case(problems: int, sides: Callable[..., list[tuple[Tensor, Tensor, int]]], **facts: Any) -> Case:
    flops, (_, *others) = partial(_flops, problems=problems), facts["cpu"][0]

    def gemms(mode: str, count: int) -> dict[str, Anchor]:
        return products(partial(sides, count), partial(flops, mode), f"gemm {mode}")

    return Case(
        growth="N",
        small={"N": 40} | dict.fromkeys(others, 32),
        flops=flops,
        bytes=partial(_bytes, problems=problems),
        anchors=gemms("fwd", 1) | gemms("fwd+bwd", 3),
        beside=lambda provider, mode: f"gemm {mode}",
        **facts,
    )


_OUTPUTS = ("loss", "d image", "d text", "d logit_scale")

CASES = [
    _case(
        1,
        lambda count, *t: [(*t[:2], count), (*t[3:5], 1)],
        name="distill_clip",
        op="distill_clip_loss",
        ours=_distill,
        peers={**formula(eager_distill), "open_clip": _open_clip},
        definitions=("eager", "open_clip"),
        spare=lambda: "open_clip",
        inputs=_distill_inputs,
        outputs=_OUTPUTS,
        # TinyCLIP: a ViT-B as the teacher of a smaller model, and a ViT-L as that of a ViT-B
        cpu=[{"N": n, "D": 512, "T": 512} for n in (512, 2048)],
        cuda=[{"N": n, "D": 512, "T": 768} for n in (4096, 16384)],
    ),
    _case(
        1,
        lambda count, *t: [(*t[:2], count)],
        name="multi_positive",
        op="clip_loss",
        ours=_multi_positive,
        peers=formula(eager_multi_positive),
        inputs=_multi_positive_inputs,
        outputs=_OUTPUTS,
        cpu=[{"N": n, "D": 512} for n in (512, 2048)],
        cuda=[{"N": n, "D": 512} for n in (4096, 16384)],
    ),
    _case(
        2,
        lambda count, *t: [(*t[:2], count), (*t[3:5], count)],
        name="grouped_clip",
        op="grouped_clip_loss",
        ours=_grouped,
        peers=formula(eager_grouped),
        inputs=_grouped_inputs,
        outputs=("loss", *(f"d {t}{i}" for i in (1, 2) for t in ("image", "text", "logit_scale"))),
        cpu=[{"N": n, "D": 768} for n in (384, 1024)],
        cuda=[{"N": 1024, "D": 768}],
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _groups(scale: float, *names: str) -> inputs.Inputs:
    """A pair of features and their scale for each of the `names`."""
    of_each: dict[str, Any] = {"image": (129, 96), "text": (129, 96), "scale": scale}
    return units(**{name + what: fact for name in names for what, fact in of_each.items()})


def _with_ids(scale: float) -> inputs.Inputs:
    of_ids = partial(torch.randint, 40, (129,))
    return lambda device: inputs.features(scale=scale)(device) | {"ids": of_ids(device=device)}


CHECKS = [
    Check(op, f"{name}, scale {scale:g}", draw(scale), differentiated(loss))
    for op, name, draw, loss in (
        ("distill_clip_loss", "N=129 D=96", lambda scale: _groups(scale, "", "teacher "), _distill),
        ("clip_loss", "N=129 of 40 ids", _with_ids, _multi_positive),
        ("grouped_clip_loss", "two groups", lambda scale: _groups(scale, "first ", "second "), _grouped),
    )
    for scale in (14.3, 100.0)
]
