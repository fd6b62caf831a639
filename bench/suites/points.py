"""Point clouds: sampling, neighbours and the mini-PointNet against the published PyTorch code.

Sampling: k of N points, k N squared distances of 8 floating-point operations. Neighbours: the 32 nearest of N points
for each of G queries, or the first 32 within a radius, G N distances. Mini-PointNet: B G groups of 32 points, of widths
in the proportions of Meta-Transformer's 3-128-256-512-768.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check, relative
from mmfuse.bench.inputs import computed, differentiated, weighted
from mmfuse.bench.providers import Anchor, Only, eager, formula, then
from mmfuse.kernels.points import (
    ball_query,
    farthest_points,
    group_points,
    mini_pointnet,
    mini_pointnet_training,
    nearest_neighbors,
)

_K = 32
_RADIUS = 0.15


def _widths(D: int) -> tuple[int, ...]:
    return 3, D // 6, D // 3, 2 * D // 3, D


def _different(got: Tensor, want: Tensor) -> float:
    """A hundredth of the share of other indices: rounding decides between points that are equally far."""
    return (got != want).double().mean().item() / 100


def _distances(of: Callable[..., tuple[Tensor, Tensor]], flops: Callable[..., float]) -> Anchor:
    """All distances of an operation, as products of matrices."""
    return Anchor(lambda device, dtype: then(lambda pair: torch.cdist(pair[0].float(), pair[1].float()), of), flops)


# --- farthest points ------------------------------------------------------------------------------------------------


def pointnet_loop(points: Tensor, k: int) -> Tensor:
    """The loop of the PyTorch PointNet++, from index 0."""
    points = points.float()
    b, n, _ = points.shape
    index = torch.zeros(b, k, dtype=torch.long, device=points.device)
    distance = torch.ones(b, n, device=points.device) * 1e10
    farthest = torch.zeros(b, dtype=torch.long, device=points.device)
    clouds = torch.arange(b, device=points.device)
    for i in range(k):
        index[:, i] = farthest
        d = torch.sum((points - points[clouds, farthest, :].view(b, 1, 3)) ** 2, -1)
        nearer = d < distance
        distance[nearer] = d[nearer]
        farthest = torch.max(distance, -1)[1]
    return index


def _fpsample(device: torch.device, dtype: torch.dtype) -> Any:
    """fpsample's exact loop in Rust, a cloud at a time."""
    fpsample: Any = import_module("fpsample")

    def run(points: Tensor, k: int) -> Tensor:
        found = [fpsample.fps_sampling(p.numpy(), k, start_idx=0).astype("int64") for p in points.float()]
        return torch.stack([torch.from_numpy(i) for i in found])

    return run


def _samples(device: torch.device, dtype: torch.dtype, B: int, N: int, k: int) -> tuple[Any, ...]:
    return torch.rand(B, N, 3, device=device).to(dtype), k


# --- neighbours -----------------------------------------------------------------------------------------------------


def openpoints_knn(query: Tensor, points: Tensor) -> Tensor:
    """openpoints' KNN: the k smallest down each column."""
    d = torch.cdist(points.float(), query.float())
    return d.topk(k=_K, dim=1, largest=False).indices.transpose(1, 2).contiguous()


def eager_knn(query: Tensor, points: Tensor) -> Tensor:
    """The same along rows, which torch does faster, one cloud at a time."""
    clouds = zip(query.float(), points.float(), strict=True)
    return torch.stack([torch.cdist(q, p).topk(_K, 1, largest=False).indices for q, p in clouds])


def _pairs(device: torch.device, dtype: torch.dtype, B: int, N: int, G: int) -> tuple[Tensor, Tensor]:
    points = torch.rand(B, N, 3, device=device).to(dtype)
    return points[:, :G].contiguous(), points


def _nearest(query: Tensor, points: Tensor, **options: Any) -> Tensor:
    return nearest_neighbors(query, points, _K, **options)


def pointnet_ball(query: Tensor, points: Tensor) -> Tensor:
    """PointNet++'s query_ball_point in PyTorch: every index in a matrix, sorted."""
    query, points = query.float(), points.float()
    far = torch.cdist(query, points) >= _RADIUS
    index = torch.arange(points.shape[1], device=points.device).expand(far.shape).masked_fill(far, points.shape[1])
    index = index.sort(-1)[0][:, :, :_K]
    return torch.where(index == points.shape[1], index[:, :, :1], index)


def _ball(query: Tensor, points: Tensor, **options: Any) -> Tensor:
    return ball_query(query, points, _K, _RADIUS, **options)


# --- mini-PointNet --------------------------------------------------------------------------------------------------


def _groups(device: torch.device, dtype: torch.dtype, B: int, G: int, D: int) -> tuple[Tensor, ...]:
    layers = _layers(device, *_widths(D))
    groups = torch.randn(B, G, _K, 3, device=device)
    return groups.to(dtype), *(t.to(dtype).requires_grad_() for t in layers)


def _layers(device: torch.device, c: int, c1: int, c2: int, c3: int, d: int) -> list[Tensor]:
    """Four weights, each with its bias."""
    layers = []
    for outputs, inputs in ((c1, c), (c2, c1), (c3, 2 * c2), (d, c3)):
        layers += [torch.randn(outputs, inputs, device=device) / inputs**0.5, torch.randn(outputs, device=device)]
    return layers


def _total(y: Tensor) -> Tensor:
    # weights that differ, so that a gradient in the wrong place shows
    return (y.float() * torch.linspace(0.5, 1.5, y.shape[-1], device=y.device)).sum() / y.shape[0]


def _of(layers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer."""
    return list(zip(layers[::2], layers[1::2], strict=True))


def convolutions(x: Tensor, *layers: Tensor) -> Tensor:
    """openpoints' PointPatchEmbed: 1x1 convolutions of [B, C, G, k], the global feature repeated and concatenated."""
    first, second, third, fourth = ((w[:, :, None, None], b) for w, b in _of(layers))
    f = F.conv2d(F.conv2d(x.permute(0, 3, 1, 2).contiguous(), *first).relu(), *second)
    f = torch.cat([f.max(-1, keepdim=True)[0].expand(-1, -1, -1, f.shape[-1]), f], 1)
    return _total(F.conv2d(F.conv2d(f, *third).relu(), *fourth).max(-1)[0].transpose(1, 2))


def linears(x: Tensor, *layers: Tensor) -> Tensor:
    """The same with linear layers on [B, G, k, C]."""
    first, second, third, fourth = _of(layers)
    h = F.linear(_with_maximum(F.linear(F.linear(x, *first).relu(), *second)), *third)
    return _total(F.linear(h.relu(), *fourth).max(2)[0])


def normalised(x: Tensor, *layers: Tensor) -> Tensor:
    """The linear layers with batch normalisation of the third one's product, by this batch."""
    first, second, (w3, b3), fourth = _of(layers)
    h = F.linear(_with_maximum(F.linear(F.linear(x, *first).relu(), *second)), w3)
    flat = F.batch_norm(h.flatten(0, 2), None, None, torch.ones_like(b3), b3, training=True)
    return _total(F.linear(flat.view_as(h).relu(), *fourth).max(2)[0])


def _with_maximum(f: Tensor) -> Tensor:
    return torch.cat([f.max(2, keepdim=True)[0].expand(-1, -1, f.shape[2], -1), f], 3)


def _tokens(x: Tensor, *layers: Tensor, **options: Any) -> Tensor:
    return mini_pointnet(x, _of(layers), **options)


def _training(x: Tensor, *layers: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return mini_pointnet_training(x, _of(layers), torch.ones_like(layers[5]), **options)


def _rounded(got: Tensor, want: Tensor) -> float:
    """A quarter of the distance: eager's gradients in bfloat16 are themselves a tenth away from float64's."""
    return relative(got, want) / 4


def _trained_groups(device: torch.device, dtype: torch.dtype, B: int, G: int, D: int) -> tuple[Tensor, ...]:
    x, *layers = _groups(device, dtype, B, G, D)
    layers[3].requires_grad_(False)  # normalisation takes the second bias out: its gradient is rounding alone
    return x, *layers


def _products(x: Tensor, *layers: Tensor) -> Tensor:
    """The forward's products, one after another."""
    w1, w2, w3, w4 = layers[::2]
    f = x.flatten(0, 2) @ w1.t() @ w2.t()
    half = w3.shape[1] // 2
    return (f @ w3[:, half:].t() + (f[::_K] @ w3[:, :half].t()).repeat(_K, 1)) @ w4.t()


def _flops(mode: str, B: int, G: int, D: int) -> float:
    c, c1, c2, c3, d = _widths(D)
    forward = 2 * B * G * (_K * (c * c1 + c1 * c2 + c2 * c3 + c3 * d) + c2 * c3)
    # two products for each, but one for the first, and one neighbour of each output for the last
    backward = 2 * B * G * (_K * (c * c1 + 2 * c1 * c2 + 2 * c2 * c3) + 2 * c2 * c3 + 2 * c3 * d)
    return forward + (0 if mode == "fwd" else backward)


def _pointnet_bytes(mode: str, itemsize: int, B: int, G: int, D: int) -> float:
    c, c1, c2, c3, d = _widths(D)
    parameters = c * c1 + c1 * c2 + 2 * c2 * c3 + c3 * d
    return ((3 * _K + D) * B * G + parameters * (1 if mode == "fwd" else 2)) * itemsize


_indices = partial(Case, outputs=("index",), modes=("fwd",), judged=False, distance=_different)

_search = partial(
    _indices,
    inputs=_pairs,
    cpu=[{"B": b, "N": n, "G": g} for b, n, g in ((1, 1024, 256), (1, 8192, 512), (1, 8192, 2048))],
    cuda=[{"B": b, "N": n, "G": g} for b, n, g in ((128, 1024, 256), (32, 8192, 2048), (32, 16384, 1024))],
    growth="G",
    small={"B": 2, "N": 70, "G": 5},
    flops=lambda mode, B, N, G: 8 * B * N * G,
    bytes=lambda mode, itemsize, B, N, G: 3 * B * (N + G) * itemsize + 8 * B * G * _K,
    anchors={"distances": _distances(lambda q, p: (q, p), lambda B, N, G: 8 * B * N * G)},
)

_pointnet = partial(
    Case,
    cpu=[{"B": b, "G": g, "D": 768} for b, g in ((1, 64), (4, 64), (4, 256))],
    cuda=[{"B": b, "G": g, "D": 768} for b, g in ((8, 64), (32, 64), (128, 64), (32, 512))],
    growth="G",
    small={"B": 2, "G": 3, "D": 24},
    flops=_flops,
    bytes=_pointnet_bytes,
    anchors={"products": Anchor(lambda device, dtype: _products, partial(_flops, "fwd"))},
)

CASES = [
    _indices(
        name="farthest_points",
        op="farthest_points",
        ours=farthest_points,
        peers={"eager": eager(pointnet_loop), "fpsample": Only("cpu", _fpsample)},
        inputs=_samples,
        cpu=[{"B": b, "N": n, "k": k} for b, n, k in ((1, 1024, 256), (1, 8192, 512), (1, 8192, 2048))],
        # ModelNet40 with Meta-Transformer, and OneLLM
        cuda=[{"B": b, "N": n, "k": k} for b, n, k in ((128, 1024, 256), (32, 8192, 512), (32, 16384, 1024))],
        growth="k",
        small={"B": 2, "N": 300, "k": 20},
        flops=lambda mode, B, N, k: 8 * B * N * k,
        bytes=lambda mode, itemsize, B, N, k: 3 * B * N * itemsize + 8 * B * k,
        anchors={"distances": _distances(lambda p, k: (p[:, :k], p), lambda B, N, k: 8 * B * N * k)},
    ),
    _search(
        name="nearest_neighbors",
        op="nearest_neighbors",
        ours=_nearest,
        peers={"openpoints": eager(openpoints_knn), "eager": eager(eager_knn)},
        definitions=("eager", "openpoints"),
    ),
    _search(
        name="ball_query",
        op="ball_query",
        ours=_ball,
        peers={"eager": eager(pointnet_ball)},
    ),
    _pointnet(
        name="mini_pointnet",
        op="mini_pointnet",
        ours=then(_total, _tokens),
        peers={"openpoints": eager(convolutions), **formula(linears)},
        definitions=("eager", "openpoints"),
        inputs=_groups,
        outputs=("total", *(f"d {kind}{i}" for i in range(1, 5) for kind in ("weight", "bias"))),
    ),
    _pointnet(
        name="mini_pointnet_training",
        op="mini_pointnet_training",
        ours=then(lambda found: _total(found[0]), _training),
        peers=formula(normalised),
        inputs=_trained_groups,
        outputs=("total", *(f"d {name}" for name in ("w1", "b1", "w2", "w3", "b3", "w4", "b4"))),
        distance=_rounded,
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _lattice(device: torch.device) -> dict[str, Tensor]:
    """Distances that every dtype holds exactly."""
    return {n: torch.randint(-4, 5, (2, m, 3), device=device).float() for n, m in (("query", 17), ("points", 150))}


def _sampled(query: Tensor, points: Tensor, backend: str | None) -> Tensor:
    return farthest_points(points, 40, backend=backend)


def _grouped(query: Tensor, points: Tensor, backend: str | None) -> Tensor:
    return group_points(points, nearest_neighbors(query, points, 8, backend="torch"), backend=backend)


def _layers_by_name(device: torch.device) -> dict[str, Tensor]:
    groups, layers = torch.randn(9, 8, 5, device=device), _layers(device, 5, 16, 12, 20, 24)
    return {"groups": groups} | dict(zip(["w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4"], layers, strict=True))


CHECKS = [
    Check("farthest_points", "N=150 k=40", _lattice, computed(_sampled, "index")),
    Check("nearest_neighbors", "G=17 N=150 k=8", _lattice, computed(partial(nearest_neighbors, k=8), "index")),
    Check("ball_query", "G=17 N=150 k=8", _lattice, computed(partial(ball_query, k=8, radius=2.5), "index")),
    Check(
        "group_points", "G=17 N=150 k=8", _lattice, differentiated(_grouped, ("groups",), weighted, constants=["query"])
    ),
    Check(
        "mini_pointnet", "M=9 k=8 widths 5-16-12-20-24", _layers_by_name, differentiated(_tokens, ("tokens",), _total)
    ),
    Check(
        "mini_pointnet_training",
        "M=9 k=8 widths 5-16-12-20-24",
        _layers_by_name,
        # the second bias has no gradient: what normalises takes it out
        differentiated(_training, ("tokens", "mean", "var"), _total, constants=("b2",)),
    ),
]
