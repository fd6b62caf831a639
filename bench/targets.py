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
from mmfuse.bench.cases import Anchor, Case, Check, Load, differentiated
from mmfuse.bench.contrastive import eager_clip
from mmfuse.bench.providers import amp, chosen, compiled, eager, ours
from mmfuse.kernels._runtime import Op
from mmfuse.kernels.contrastive import clip_loss, distill_clip_loss, grouped_clip_loss
from mmfuse.kernels.contrastive.distill.op import DISTILL
from mmfuse.kernels.contrastive.grouped.op import GROUPED
from mmfuse.kernels.contrastive.op import CLIP

_TEMPERATURE = 0.07
_POSITIVES = 5  # captions per image, as in COCO and Flickr30k

_Fn = Callable[..., Tensor]
_Sides = Callable[..., list[tuple[Tensor, Tensor]]]  # the pairs of features among the inputs


def _pair(device: torch.device, dtype: torch.dtype, N: int, D: int) -> list[Tensor]:
    image, noise = (F.normalize(torch.randn(N, D, device=device), dim=-1) for _ in range(2))
    text = F.normalize(0.3 * image + 0.954 * noise, dim=-1)
    return [t.to(dtype).requires_grad_() for t in (image, text)]


def _scale(device: torch.device, dtype: torch.dtype) -> Tensor:
    # parameters are float32 beside 16-bit features
    acc = torch.promote_types(dtype, torch.float32)
    return torch.tensor(1 / _TEMPERATURE, dtype=acc, device=device, requires_grad=True)


def _distill_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int, T: int) -> tuple[Tensor, ...]:
    teacher = (*_pair(device, dtype, N, T), _scale(device, dtype))
    return *_pair(device, dtype, N, D), _scale(device, dtype), *(t.detach() for t in teacher)


def _multi_positive_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    ids = torch.arange(N, device=device) // _POSITIVES
    return *_pair(device, dtype, N, D), _scale(device, dtype), ids[torch.randperm(N, device=device)]


def _grouped_inputs(device: torch.device, dtype: torch.dtype, N: int, D: int) -> tuple[Tensor, ...]:
    return tuple(t for _ in range(2) for t in (*_pair(device, dtype, N, D), _scale(device, dtype)))


# --- what the field computes ----------------------------------------------------------------------------------------


def eager_distill(*features: Tensor) -> Tensor:
    """open_clip's DistillClipLoss in one process, its two terms added up as its training does."""
    image, text, scale, t_image, t_text, t_scale = features
    distill = torch.zeros((), device=image.device)
    for x, y, x_t, y_t in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        teacher = (t_scale * x_t @ y_t.T).softmax(dim=1)
        distill = distill - (teacher * (scale * x @ y.T).log_softmax(dim=1)).sum(dim=1).mean(dim=0) / 2
    return eager_clip(image, text, scale) + distill


def _open_clip(device: torch.device, dtype: torch.dtype) -> _Fn:
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


def _products(sides: _Sides, mode: str, flops: Callable[..., float]) -> Anchor:
    """X YT of each side, and G Y and GT X of those that are trained."""

    def load(device: torch.device, dtype: torch.dtype) -> _Fn:
        kept: dict[int, list[Tensor]] = {}

        def run(*inputs: Tensor) -> Tensor:
            for i, (x, y) in enumerate(sides(*inputs)):
                # fresh memory costs page faults, which are no part of a product
                if i not in kept:
                    kept[i] = [x.new_empty(len(x), len(y)), torch.empty_like(x), torch.empty_like(y)]
                u, gx, gy = kept[i]
                torch.mm(x, y.T, out=u)
                if mode != "fwd" and x.requires_grad:
                    torch.mm(u, y, out=gx)
                    torch.mm(u.T, x, out=gy)
            return u

        def without_graph(*inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return run(*inputs)

        return without_graph

    return Anchor(load, partial(flops, mode))


def _default(op: Op, probe: Any, baseline: list[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    other = device.type == "cuda" and op.select(*probe(device, dtype)).name != "triton"
    return [*baseline, "compile", "mmfuse", *(["mmfuse-triton"] if other else []), "mmfuse-chunked"]


def _case(
    name: str,
    op: Op,
    loss: _Fn,
    formula: _Fn,
    inputs: Callable[..., tuple[Tensor, ...]],
    sides: _Sides,
    shapes: dict[str, list[dict[str, int]]],
    outputs: tuple[str, ...] = ("loss", "d image", "d text", "d logit_scale"),
    choice: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda inputs: inputs[:2],
    problems: int = 1,
    third: dict[str, Load] | None = None,
) -> Case:
    def probe(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        return choice(inputs(device, dtype, **dict.fromkeys(dims, 64)))

    third = third or {}
    dims = tuple(shapes["cpu"][0])
    flops = partial(_flops, problems=problems)
    return Case(
        name=name,
        inputs=inputs,
        outputs=outputs,
        providers={"eager": eager(formula), **third, "compile": compiled(eager(formula)), **ours(op, loss, probe)},
        definitions=("eager", *third),
        chosen=lambda inputs, backend=None: chosen(op, 3, choice(inputs), backend),
        default=partial(_default, op, probe, ["eager"]),
        dims=dims,
        shapes=shapes,
        growth="N",
        small={"N": 40} | dict.fromkeys(dims[1:], 32),
        flops=flops,
        bytes=partial(_bytes, problems=problems),
        anchors={f"gemm {mode}": _products(sides, mode, flops) for mode in ("fwd", "fwd+bwd")},
        anchor=lambda provider, mode: f"gemm {mode}",
    )


CASES = [
    _case(
        "distill_clip",
        DISTILL,
        _distill,
        eager_distill,
        _distill_inputs,
        lambda *t: [t[:2], t[3:5]],
        # TinyCLIP: a ViT-B as the teacher of a smaller model, and a ViT-L as that of a ViT-B
        {
            "cpu": [{"N": n, "D": 512, "T": 512} for n in (512, 2048)],
            "cuda": [{"N": n, "D": 512, "T": 768} for n in (4096, 16384)],
        },
        third={"open_clip": _open_clip},
    ),
    _case(
        "multi_positive",
        CLIP,
        _multi_positive,
        eager_multi_positive,
        _multi_positive_inputs,
        lambda *t: [t[:2]],
        {
            "cpu": [{"N": n, "D": 512} for n in (512, 2048)],
            "cuda": [{"N": n, "D": 512} for n in (4096, 16384)],
        },
        choice=lambda inputs: (*inputs[:2], inputs[3]),
    ),
    _case(
        "grouped_clip",
        GROUPED,
        _grouped,
        eager_grouped,
        _grouped_inputs,
        lambda *t: [t[:2], t[3:5]],
        {"cpu": [{"N": n, "D": 768} for n in (384, 1024)], "cuda": [{"N": 1024, "D": 768}]},
        outputs=("loss", *(f"d {t}{i}" for i in (1, 2) for t in ("image", "text", "logit_scale"))),
        problems=2,
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_inputs(*names: str, scale: float = 14.3, ids: bool = False) -> Callable[[torch.device], dict[str, Tensor]]:
    """A pair of features and their scale for each of the `names`."""

    def inputs(device: torch.device) -> dict[str, Tensor]:
        given: dict[str, Tensor] = {}
        for name in names:
            for side in ("image", "text"):
                given[f"{name}{side}"] = F.normalize(torch.randn(129, 96), dim=-1).to(device)
            given[f"{name}scale"] = torch.tensor(scale, device=device)
        return given | ({"ids": torch.randint(40, (129,), device=device)} if ids else {})

    return inputs


def _with_ids(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return inputs["image"], inputs["text"], inputs["ids"]


CHECKS = [
    Check(
        op, f"{name}, scale {scale:g}", _check_inputs(*names, scale=scale, ids=ids), differentiated(loss), **arguments
    )
    for op, name, loss, names, ids, arguments in (
        ("distill_clip_loss", "N=129 D=96", _distill, ("", "teacher "), False, {}),
        ("clip_loss", "N=129 of 40 ids", _multi_positive, ("",), True, {"arguments": _with_ids}),
        ("grouped_clip_loss", "two groups", _grouped, ("first ", "second "), False, {}),
    )
    for scale in (14.3, 100.0)
]
