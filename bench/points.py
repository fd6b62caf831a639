"""Point clouds: sampling, neighbours and the mini-PointNet against the published PyTorch code.

Sampling: k of N points, k N squared distances of 8 floating-point operations. Neighbours: the 32 nearest of N points
for each of G queries, or the first 32 within a radius, G N distances. Mini-PointNet: B G groups of 32 points, of widths
in the proportions of Meta-Transformer's 3-128-256-512-768.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Anchor, Case, Check, Load, relative
from mmfuse.bench.providers import chosen, compiled, eager, ours
from mmfuse.kernels._runtime import Op
from mmfuse.kernels.points import (
    ball_query,
    farthest_points,
    group_points,
    mini_pointnet,
    mini_pointnet_training,
    nearest_neighbors,
)
from mmfuse.kernels.points.op import BALL, FARTHEST, NEAREST
from mmfuse.kernels.points.pointnet.op import POINTNET, TRAINING

_K = 32
_RADIUS = 0.15


def _widths(D: int) -> tuple[int, ...]:
    return 3, D // 6, D // 3, 2 * D // 3, D


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    points = torch.empty(1, 8, 3, device=device, dtype=dtype)
    return points, points


def _different(got: Tensor, want: Tensor) -> float:
    """A hundredth of the share of other indices: rounding decides between points that are equally far."""
    return (got != want).double().mean().item() / 100


def _default(baselines: list[str], op: Op, device: torch.device, dtype: torch.dtype) -> list[str]:
    first = chosen(op, 1 if op is FARTHEST else 2, _probe(device, dtype))
    named = ["mmfuse-triton"] if device.type == "cuda" and first != "triton" and op is not FARTHEST else []
    return [*baselines, "mmfuse", *named, "mmfuse-chunked"]


def _distances(of: Callable[..., tuple[Tensor, Tensor]]) -> Load:
    """All distances of an operation, as products of matrices."""

    def load(device: torch.device, dtype: torch.dtype) -> Any:
        def run(*inputs: Any) -> Tensor:
            query, points = (t.float() for t in of(*inputs))
            return torch.cdist(query, points)

        return run

    return load


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
    if device.type != "cpu":
        raise NotImplementedError("needs a CPU")
    fpsample: Any = import_module("fpsample")

    def run(points: Tensor, k: int) -> Tensor:
        found = [fpsample.fps_sampling(p.numpy(), k, start_idx=0).astype("int64") for p in points.float()]
        return torch.stack([torch.from_numpy(i) for i in found])

    return run


def _samples(device: torch.device, dtype: torch.dtype, B: int, N: int, k: int) -> tuple[Any, ...]:
    return torch.rand(B, N, 3, device=device).to(dtype), k


def _farthest(points: Tensor, k: int, **options: Any) -> Tensor:
    return farthest_points(points, k, **options)


# --- neighbours -----------------------------------------------------------------------------------------------------


def openpoints_knn(query: Tensor, points: Tensor) -> Tensor:
    """openpoints' KNN: the k smallest down each column."""
    d = torch.cdist(points.float(), query.float())
    return d.topk(k=_K, dim=1, largest=False).indices.transpose(1, 2).contiguous()


def eager_knn(query: Tensor, points: Tensor) -> Tensor:
    """The same along rows, which torch does faster, one cloud at a time."""
    return torch.stack(
        [
            torch.cdist(q, p).topk(_K, 1, largest=False).indices
            for q, p in zip(query.float(), points.float(), strict=True)
        ]
    )


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
    c, c1, c2, c3, d = _widths(D)
    layers = []
    for outputs, inputs in ((c1, c), (c2, c1), (c3, 2 * c2), (d, c3)):
        layers += [torch.randn(outputs, inputs, device=device) / inputs**0.5, torch.randn(outputs, device=device)]
    groups = torch.randn(B, G, _K, c, device=device)
    return groups.to(dtype), *(t.to(dtype).requires_grad_() for t in layers)


def _few_groups(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.empty(2, 2, 3, device=device, dtype=dtype),)


def _total(y: Tensor) -> Tensor:
    # weights that differ, so that a gradient in the wrong place shows
    return (y.float() * torch.linspace(0.5, 1.5, y.shape[-1], device=y.device)).sum() / y.shape[0]


def convolutions(x: Tensor, *layers: Tensor) -> Tensor:
    """openpoints' PointPatchEmbed: 1x1 convolutions of [B, C, G, k], the global feature repeated and concatenated."""
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = zip(layers[::2], layers[1::2], strict=True)

    def conv(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(h, w[:, :, None, None], b)

    f = conv(conv(x.permute(0, 3, 1, 2).contiguous(), w1, b1).relu(), w2, b2)
    f = torch.cat([f.max(-1, keepdim=True)[0].expand(-1, -1, -1, f.shape[-1]), f], 1)
    y = conv(conv(f, w3, b3).relu(), w4, b4).max(-1)[0]
    return _total(y.transpose(1, 2))


def linears(x: Tensor, *layers: Tensor) -> Tensor:
    """The same with linear layers on [B, G, k, C]."""
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = zip(layers[::2], layers[1::2], strict=True)
    f = F.linear(F.linear(x, w1, b1).relu(), w2, b2)
    f = torch.cat([f.max(2, keepdim=True)[0].expand(-1, -1, f.shape[2], -1), f], 3)
    return _total(F.linear(F.linear(f, w3, b3).relu(), w4, b4).max(2)[0])


def _pointnet(x: Tensor, *layers: Tensor, **options: Any) -> Tensor:
    return _total(mini_pointnet(x, list(zip(layers[::2], layers[1::2], strict=True)), **options))


def normalised(x: Tensor, *layers: Tensor) -> Tensor:
    """The linear layers with batch normalisation of the third one's product, by this batch."""
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = zip(layers[::2], layers[1::2], strict=True)
    f = F.linear(F.linear(x, w1, b1).relu(), w2, b2)
    f = torch.cat([f.max(2, keepdim=True)[0].expand(-1, -1, f.shape[2], -1), f], 3)
    h = F.linear(f, w3).flatten(0, 2)
    h = F.batch_norm(h, None, None, torch.ones_like(b3), b3, training=True).view(*f.shape[:3], -1)
    return _total(F.linear(h.relu(), w4, b4).max(2)[0])


def _rounded(got: Tensor, want: Tensor) -> float:
    """A quarter of the distance: eager's gradients in bfloat16 are themselves a tenth away from float64's."""
    return relative(got, want) / 4


def _pointnet_training(x: Tensor, *layers: Tensor, **options: Any) -> Tensor:
    scale = torch.ones_like(layers[5])
    return _total(mini_pointnet_training(x, list(zip(layers[::2], layers[1::2], strict=True)), scale, **options)[0])


def _trained_groups(device: torch.device, dtype: torch.dtype, B: int, G: int, D: int) -> tuple[Tensor, ...]:
    x, *layers = _groups(device, dtype, B, G, D)
    layers[3].requires_grad_(False)  # normalisation takes the second bias out: its gradient is rounding alone
    return x, *layers


def _products(device: torch.device, dtype: torch.dtype) -> Any:
    """The forward's products, one after another."""

    def run(x: Tensor, *layers: Tensor) -> Tensor:
        w1, w2, w3, w4 = layers[::2]
        f = x.flatten(0, 2) @ w1.t() @ w2.t()
        half = w3.shape[1] // 2
        return (f @ w3[:, half:].t() + (f[::_K] @ w3[:, :half].t()).repeat(_K, 1)) @ w4.t()

    return run


def _forward_flops(B: int, G: int, D: int) -> float:
    c, c1, c2, c3, d = _widths(D)
    return 2 * B * G * (_K * (c * c1 + c1 * c2 + c2 * c3 + c3 * d) + c2 * c3)


def _flops(mode: str, B: int, G: int, D: int) -> float:
    c, c1, c2, c3, d = _widths(D)
    # backward: two products for each, but one for the first, and one neighbour of each output for the last
    backward = 2 * B * G * (_K * (c * c1 + 2 * c1 * c2 + 2 * c2 * c3) + 2 * c2 * c3 + 2 * c3 * d)
    return _forward_flops(B, G, D) + (0 if mode == "fwd" else backward)


def _parameters(D: int) -> int:
    c, c1, c2, c3, d = _widths(D)
    return c * c1 + c1 * c2 + 2 * c2 * c3 + c3 * d


# what a search for points near centres is measured by
_SEARCH: dict[str, Any] = {
    "dims": ("B", "N", "G"),
    "shapes": {
        "cpu": [{"B": b, "N": n, "G": g} for b, n, g in ((1, 1024, 256), (1, 8192, 512), (1, 8192, 2048))],
        "cuda": [{"B": b, "N": n, "G": g} for b, n, g in ((128, 1024, 256), (32, 8192, 2048), (32, 16384, 1024))],
    },
    "growth": "G",
    "small": {"B": 2, "N": 70, "G": 5},
    "flops": lambda mode, B, N, G: 8 * B * N * G,
    "bytes": lambda mode, itemsize, B, N, G: 3 * B * (N + G) * itemsize + 8 * B * G * _K,
    "anchors": {"distances": Anchor(_distances(lambda q, p: (q, p)), lambda B, N, G: 8 * B * N * G)},
    "anchor": lambda provider, mode: "distances",
    "modes": ("fwd",),
    "judged": False,
    "distance": _different,
}

CASES = [
    Case(
        name="farthest_points",
        inputs=_samples,
        outputs=("index",),
        providers={"eager": eager(pointnet_loop), "fpsample": _fpsample, **ours(FARTHEST, _farthest, _probe)},
        definitions=("eager",),
        chosen=partial(chosen, FARTHEST, 1),
        default=lambda device, dtype: _default(
            ["eager", *(["fpsample"] if device.type == "cpu" else [])], FARTHEST, device, dtype
        ),
        dims=("B", "N", "k"),
        shapes={
            "cpu": [{"B": b, "N": n, "k": k} for b, n, k in ((1, 1024, 256), (1, 8192, 512), (1, 8192, 2048))],
            # ModelNet40 with Meta-Transformer, and OneLLM
            "cuda": [{"B": b, "N": n, "k": k} for b, n, k in ((128, 1024, 256), (32, 8192, 512), (32, 16384, 1024))],
        },
        growth="k",
        small={"B": 2, "N": 300, "k": 20},
        flops=lambda mode, B, N, k: 8 * B * N * k,
        bytes=lambda mode, itemsize, B, N, k: 3 * B * N * itemsize + 8 * B * k,
        anchors={"distances": Anchor(_distances(lambda p, k: (p[:, :k], p)), lambda B, N, k: 8 * B * N * k)},
        anchor=lambda provider, mode: "distances",
        modes=("fwd",),
        judged=False,
        distance=_different,
    ),
    Case(
        name="nearest_neighbors",
        inputs=_pairs,
        outputs=("index",),
        providers={
            "openpoints": eager(openpoints_knn),
            "eager": eager(eager_knn),
            **ours(NEAREST, _nearest, _probe),
        },
        definitions=("eager", "openpoints"),
        chosen=partial(chosen, NEAREST, 2),
        default=partial(_default, ["openpoints", "eager"], NEAREST),
        **_SEARCH,
    ),
    Case(
        name="ball_query",
        inputs=_pairs,
        outputs=("index",),
        providers={"eager": eager(pointnet_ball), **ours(BALL, _ball, _probe)},
        definitions=("eager",),
        chosen=partial(chosen, BALL, 2),
        default=lambda device, dtype: ["eager", "mmfuse", "mmfuse-chunked"],
        **_SEARCH,
    ),
    Case(
        name="mini_pointnet",
        inputs=_groups,
        outputs=("total", *(f"d {kind}{i}" for i in range(1, 5) for kind in ("weight", "bias"))),
        providers={
            "openpoints": eager(convolutions),
            "eager": eager(linears),
            "compile": compiled(eager(linears)),
            **ours(POINTNET, _pointnet, _few_groups),
        },
        definitions=("eager", "openpoints"),
        chosen=lambda inputs, backend=None: chosen(POINTNET, 9, (inputs[0].flatten(0, 1), *inputs[1:]), backend),
        default=partial(_default, ["openpoints", "eager", "compile"], POINTNET),
        dims=("B", "G", "D"),
        shapes={
            "cpu": [{"B": b, "G": g, "D": 768} for b, g in ((1, 64), (4, 64), (4, 256))],
            "cuda": [{"B": b, "G": g, "D": 768} for b, g in ((8, 64), (32, 64), (128, 64), (32, 512))],
        },
        growth="G",
        small={"B": 2, "G": 3, "D": 24},
        flops=_flops,
        bytes=lambda mode, itemsize, B, G, D: (
            ((3 * _K + D) * B * G + _parameters(D) * (1 if mode == "fwd" else 2)) * itemsize
        ),
        anchors={"products": Anchor(_products, _forward_flops)},
        anchor=lambda provider, mode: "products",
    ),
    Case(
        name="mini_pointnet_training",
        inputs=_trained_groups,
        outputs=("total", *(f"d {name}" for name in ("w1", "b1", "w2", "w3", "b3", "w4", "b4"))),
        providers={
            "eager": eager(normalised),
            "compile": compiled(eager(normalised)),
            **ours(TRAINING, _pointnet_training, _few_groups),
        },
        definitions=("eager",),
        chosen=lambda inputs, backend=None: chosen(TRAINING, 9, (inputs[0].flatten(0, 1), *inputs[1:]), backend),
        default=partial(_default, ["eager", "compile"], TRAINING),
        dims=("B", "G", "D"),
        shapes={
            "cpu": [{"B": b, "G": g, "D": 768} for b, g in ((1, 64), (4, 64), (4, 256))],
            "cuda": [{"B": b, "G": g, "D": 768} for b, g in ((8, 64), (32, 64), (128, 64), (32, 512))],
        },
        growth="G",
        small={"B": 2, "G": 3, "D": 24},
        flops=_flops,
        bytes=lambda mode, itemsize, B, G, D: (
            ((3 * _K + D) * B * G + _parameters(D) * (1 if mode == "fwd" else 2)) * itemsize
        ),
        anchors={"products": Anchor(_products, _forward_flops)},
        anchor=lambda provider, mode: "products",
        distance=_rounded,
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _lattice(device: torch.device) -> dict[str, Tensor]:
    """Distances that every dtype holds exactly."""
    return {n: torch.randint(-4, 5, (2, m, 3), device=device).float() for n, m in (("query", 17), ("points", 150))}


def _indices(find: Callable[..., Tensor]) -> Callable[[dict[str, Tensor], str], dict[str, Tensor]]:
    return lambda inputs, backend: {"index": find(inputs["query"], inputs["points"], backend=backend).double()}


def _grouping(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    features = inputs["points"].detach().requires_grad_()
    idx = nearest_neighbors(inputs["query"], inputs["points"], 8, backend="torch")
    grouped = group_points(features, idx, backend=backend)
    grad = torch.autograd.grad(grouped, features, torch.sin(grouped.detach() + idx[..., None]))[0]
    return {"groups": grouped.detach(), "d features": grad}


def _layers(device: torch.device) -> dict[str, Tensor]:
    groups = {"groups": torch.randn(9, 8, 5, device=device)}
    for i, (outputs, inputs) in enumerate(((16, 5), (12, 16), (20, 24), (24, 20)), 1):
        groups |= {f"w{i}": torch.randn(outputs, inputs, device=device) / inputs**0.5}
        groups |= {f"b{i}": torch.randn(outputs, device=device)}
    return groups


def _tokens(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    given = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    x, *rest = given.values()
    y = mini_pointnet(x, list(zip(rest[::2], rest[1::2], strict=True)), backend=backend)
    grads = torch.autograd.grad(_total(y), list(given.values()))
    return {"tokens": y.detach()} | {f"d {k}": g for k, g in zip(given, grads, strict=True)}


def _trained(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    given = {k: v.detach().requires_grad_() for k, v in inputs.items() if k != "b2"}
    x, *rest = (inputs | given).values()
    # the second bias has no gradient: what normalises takes it out
    y, mean, var = mini_pointnet_training(
        x, list(zip(rest[::2], rest[1::2], strict=True)), torch.ones_like(inputs["b3"]), backend=backend
    )
    grads = torch.autograd.grad(_total(y), list(given.values()))
    return {"tokens": y.detach(), "mean": mean, "var": var} | {f"d {k}": g for k, g in zip(given, grads, strict=True)}


CHECKS = [
    Check(
        "farthest_points", "N=150 k=40", _lattice,
        _indices(lambda query, points, **options: farthest_points(points, 40, **options)),
    ),
    Check("nearest_neighbors", "G=17 N=150 k=8", _lattice, _indices(lambda q, p, **o: nearest_neighbors(q, p, 8, **o))),
    Check("ball_query", "G=17 N=150 k=8", _lattice, _indices(lambda q, p, **o: ball_query(q, p, 8, 2.5, **o))),
    Check("group_points", "G=17 N=150 k=8", _lattice, _grouping),
    Check("mini_pointnet", "M=9 k=8 widths 5-16-12-20-24", _layers, _tokens),
    Check("mini_pointnet_training", "M=9 k=8 widths 5-16-12-20-24", _layers, _trained),
]  # fmt: skip
