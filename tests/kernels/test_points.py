"""Sampling, neighbours and grouping of point clouds: every implementation against plain loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfuse
from judge import assert_no_worse
from mmfuse.kernels.points import ball_query, farthest_points, group_points, nearest_neighbors, op
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.zeros(1, 8, 3, device=DEVICE)
FIRST = torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
SAMPLERS, NEIGHBOURS, BALLS, GROUPERS = (
    backends(call)
    for call in (
        lambda: farthest_points(PROBE, 1),
        lambda: nearest_neighbors(PROBE, PROBE, 1),
        lambda: ball_query(PROBE, PROBE, 1, 1.0),
        lambda: group_points(PROBE, FIRST),
    )
)
DTYPES = [torch.float32, torch.float16, torch.float64]


def cloud(b: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, n, 3, device=DEVICE).to(dtype)


def lattice(b: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points of which many coincide and most distances are equal, exactly in every dtype."""
    return torch.randint(-2, 3, (b, n, 3), device=DEVICE).to(dtype)


def skip_unless(available: list[str], backend: str, why: str) -> None:
    if backend not in available:
        pytest.skip(f"{backend} does not take {why}")


# --- farthest points ------------------------------------------------------------------------------------------------


def published_loop(xyz: Tensor, npoint: int) -> Tensor:
    """The sampling loop of PointNet++ in PyTorch, from index 0."""
    b, n, _ = xyz.shape
    centroids = torch.zeros(b, npoint, dtype=torch.long, device=xyz.device)
    distance = torch.full((b, n), 1e10, dtype=xyz.dtype, device=xyz.device)
    farthest = torch.zeros(b, dtype=torch.long, device=xyz.device)
    rows = torch.arange(b, device=xyz.device)
    for i in range(npoint):
        centroids[:, i] = farthest
        distance = torch.minimum(distance, ((xyz - xyz[rows, farthest][:, None]) ** 2).sum(-1))
        farthest = distance.max(-1)[1]
    return centroids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [cloud, lattice])
@pytest.mark.parametrize("backend", SAMPLERS)
def test_farthest_points_are_those_of_the_loop(backend: str, make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    points = make(3, 700, dtype)
    skip_unless(backends(lambda: farthest_points(points, 1)), backend, str(dtype))
    index = farthest_points(points, 40, backend=backend)
    assert index.dtype == torch.int64
    assert torch.equal(index, published_loop(points.to(torch.promote_types(dtype, torch.float32)), 40))


@pytest.mark.parametrize("n", [1, 255, 257, 1025, 4097, 8193])
@pytest.mark.parametrize("backend", [b for b in SAMPLERS if b != "torch"])
def test_sizes_of_clouds(backend: str, n: int) -> None:
    points = cloud(2, n)
    assert torch.equal(
        farthest_points(points, min(n, 6), backend=backend), farthest_points(points, min(n, 6), backend="torch")
    )


@pytest.mark.parametrize("backend", SAMPLERS)
def test_every_point_is_taken_once(backend: str) -> None:
    index = farthest_points(cloud(2, 90), 90, backend=backend)
    assert torch.equal(index.sort(1).values, torch.arange(90, device=DEVICE).expand(2, 90))


@pytest.mark.parametrize("backend", SAMPLERS)
def test_points_near_the_origin_are_not_skipped(backend: str) -> None:
    points = torch.tensor([[[5.0, 0, 0], [5, 0, 0], [1e-4, 0, 0], [-1, 0, 0]]], device=DEVICE)
    assert farthest_points(points, 4, backend=backend).tolist() == [[0, 3, 2, 0]]


@pytest.mark.parametrize("backend", SAMPLERS)
def test_where_sampling_starts(backend: str) -> None:
    points = cloud(3, 50)
    start = torch.tensor([7, 0, 49], device=DEVICE)
    index = farthest_points(points, 5, start=start, backend=backend)
    assert torch.equal(index[:, 0], start)
    for i, s in enumerate(start.tolist()):
        assert torch.equal(index[i], farthest_points(points, 5, start=s, backend=backend)[i])


@pytest.mark.parametrize("backend", SAMPLERS)
def test_what_is_not_finite_comes_last(backend: str) -> None:
    points = cloud(1, 40)
    points[0, 3, 1], points[0, 9, 0], points[0, 20, 2] = torch.nan, torch.inf, -torch.inf
    finite = [i for i in range(40) if i not in (3, 9, 20)]
    assert sorted(farthest_points(points, 37, backend=backend)[0].tolist()) == finite
    assert farthest_points(points * torch.nan, 3, backend=backend).tolist() == [[0, 0, 0]]


# --- neighbours -----------------------------------------------------------------------------------------------------


def by_sorting(query: Tensor, points: Tensor) -> Tensor:
    d = ((query.double()[:, :, None] - points.double()[:, None]) ** 2).sum(-1)
    return d.nan_to_num(torch.inf, torch.inf).sort(dim=2, stable=True).indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (130, 1), (300, 9), (33, 33)])
@pytest.mark.parametrize("backend", NEIGHBOURS)
def test_equally_near_points_come_in_order(backend: str, n: int, k: int, dtype: torch.dtype) -> None:
    query, points = lattice(2, 19, dtype), lattice(2, n, dtype)
    skip_unless(backends(lambda: nearest_neighbors(query, points, k)), backend, f"{dtype}, k = {k}")
    index = nearest_neighbors(query, points, k, backend=backend)
    assert index.dtype == torch.int64
    assert torch.equal(index, by_sorting(query, points)[..., :k])


@pytest.mark.parametrize("backend", [b for b in NEIGHBOURS if b != "torch"])
def test_every_implementation_finds_the_same_neighbours(backend: str) -> None:
    n = 300 if backend == "triton" and not GPU else 9000
    query, points = cloud(2, 21) * 1e-3 + 7, cloud(2, n) * 1e-3 + 7
    assert torch.equal(
        nearest_neighbors(query, points, 12, backend=backend), nearest_neighbors(query, points, 12, backend="torch")
    )


@pytest.mark.parametrize("backend", NEIGHBOURS)
def test_distances_are_not_expanded(backend: str) -> None:
    """|p|^2 + |q|^2 - 2 pq would lose all that tells these points apart."""
    points = torch.full((1, 64, 3), 4096.0, device=DEVICE)
    points[0, :, 0] += torch.arange(64, device=DEVICE) / 64
    index = nearest_neighbors(points[:, 10:11], points, 3, backend=backend)
    assert index.tolist() == [[[10, 9, 11]]]


@pytest.mark.parametrize("backend", NEIGHBOURS)
def test_nan_is_infinitely_far(backend: str) -> None:
    query, points = cloud(2, 6), cloud(2, 50)
    points[0, 4, 0], points[0, 30, 2], query[1, 2] = torch.nan, torch.inf, torch.nan
    index = nearest_neighbors(query, points, 50, backend=backend)
    assert torch.equal(index, by_sorting(query, points))
    assert index[0, :, -2:].tolist() == [[4, 30]] * 6 and index[1, 2].tolist() == list(range(50))


@pytest.mark.parametrize("backend", ["chunked"])
def test_blocks_do_not_change_the_neighbours(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, points = lattice(2, 30), lattice(2, 200)
    monkeypatch.setattr("mmfuse.kernels.points.blocked._BLOCK_BYTES", {"cpu": 20000, "cuda": 20000})
    assert torch.equal(nearest_neighbors(query, points, 7, backend=backend), by_sorting(query, points)[..., :7])
    assert torch.equal(
        ball_query(query, points, 7, 1.1, backend=backend), ball_query(query, points, 7, 1.1, backend="torch")
    )


@pytest.mark.parametrize("backend", BALLS)
def test_ball_query_takes_the_first_points_of_a_ball(backend: str) -> None:
    query, points = cloud(2, 15), cloud(2, 150)
    query[0, 0], query[1, 1], points[1, 3, 0] = 50.0, torch.nan, torch.nan
    d = ((query[:, :, None] - points[:, None]) ** 2).sum(-1)
    index = ball_query(query, points, 6, 0.7, backend=backend)
    for b in range(2):
        for g in range(15):
            inside = [j for j, x in enumerate(d[b, g].tolist()) if x < 0.7**2][:6]
            assert index[b, g].tolist() == inside + [inside[0] if inside else 0] * (6 - len(inside))


@pytest.mark.parametrize("backend", BALLS)
def test_a_ball_has_no_border(backend: str) -> None:
    points = lattice(1, 200)
    query = points[:, :5]
    inside = ball_query(query, points, 3, 1.0, backend=backend)
    assert torch.equal(points[0][inside[0]], query[0][:, None].expand(5, 3, 3))


def test_what_a_card_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(b: int, n: int) -> Any:
        return SimpleNamespace(shape=(b, n, 3), is_cuda=True, device=torch.device("cuda", 0))

    for has, why in ((232_448, None), (101_376, "8193 points need 131584 bytes of shared memory, this GPU has 101376")):
        monkeypatch.setattr(op, "shared_memory", lambda device, has=has: has)
        assert op._many_points(on_a_gpu(1, 8192)) is None and op._many_points(on_a_gpu(1, 8193)) == why
    assert op._many_clouds(on_a_gpu(65_535, 1)) is None
    for operator, names in ((op.NEAREST, ("cuda", "triton")), (op.BALL, ("cuda",))):
        for name in names:
            reasons = [reason(on_a_gpu(65_536, 1)) for reason in operator.implementations[name].against[-1:]]
            assert reasons == ["65536 clouds, more than the 65535 of a launch"], name


# --- grouping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 130])
@pytest.mark.parametrize("backend", GROUPERS)
def test_groups_and_their_gradient(backend: str, channels: int, dtype: torch.dtype) -> None:
    features = torch.randn(3, 40, channels, device=DEVICE).to(dtype).requires_grad_()
    idx = torch.randint(0, 40, (3, 9, 20), device=DEVICE)
    idx[:, :2] = 5
    skip_unless(backends(lambda: group_points(features, idx)), backend, str(dtype))
    grouped = group_points(features, idx, backend=backend)
    assert torch.equal(grouped, torch.stack([f[i] for f, i in zip(features, idx, strict=True)]))
    g = torch.randn(grouped.shape, device=DEVICE).to(dtype)
    got = [torch.autograd.grad(grouped, features, g, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*got)
    exact, eager = (
        torch.zeros(features.shape, dtype=t, device=DEVICE).index_put_(
            (torch.arange(3, device=DEVICE)[:, None, None], idx), g.to(t), accumulate=True
        )
        for t in (torch.float64, dtype)
    )
    assert_no_worse(got[0], eager, exact)


@pytest.mark.parametrize("backend", GROUPERS)
def test_grouping_takes_any_strides_and_integers(backend: str) -> None:
    features = torch.randn(2, 5, 30, device=DEVICE).transpose(1, 2)
    idx = torch.randint(0, 30, (2, 4, 7), device=DEVICE, dtype=torch.int32)
    expected = group_points(features.contiguous(), idx.long(), backend="torch")
    assert torch.equal(
        group_points(features, idx.transpose(1, 2).contiguous().transpose(1, 2), backend=backend), expected
    )


def test_gradcheck_of_grouping() -> None:
    features = torch.randn(2, 6, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    idx = torch.randint(0, 6, (2, 3, 4), device=DEVICE)
    assert torch.autograd.gradcheck(lambda f: group_points(f, idx), features)


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NEIGHBOURS)
def test_strided_and_empty_clouds(backend: str) -> None:
    query, points = cloud(2, 8), cloud(2, 30)
    wide = torch.cat([points, points], 2)[:, :, 3:].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(nearest_neighbors(query, wide, 4, backend=backend), by_sorting(query, points)[..., :4])
    assert nearest_neighbors(query[:0], points[:0], 4, backend=backend).shape == (0, 8, 4)
    assert nearest_neighbors(query[:, :0], points, 4, backend=backend).shape == (2, 0, 4)


def test_empty_batches() -> None:
    points = cloud(0, 30)
    for backend in SAMPLERS:
        assert farthest_points(points, 4, backend=backend).shape == (0, 4)
    for backend in BALLS:
        assert ball_query(points[:, :8], points, 4, 1.0, backend=backend).shape == (0, 8, 4)
    for backend in GROUPERS:
        features = points.clone().requires_grad_()
        grouped = group_points(features, torch.zeros(0, 5, 2, dtype=torch.int64, device=DEVICE), backend=backend)
        assert grouped.shape == (0, 5, 2, 3)
        assert torch.autograd.grad(grouped.sum(), features)[0].shape == (0, 30, 3)
        features = torch.ones(2, 0, 3, device=DEVICE, requires_grad=True)  # clouds without points, groups of none
        grouped = group_points(features, torch.zeros(2, 0, 4, dtype=torch.int64, device=DEVICE), backend=backend)
        assert grouped.shape == (2, 0, 4, 3)
        assert torch.autograd.grad(grouped.sum(), features)[0].shape == (2, 0, 3)


def test_inputs_stay_and_no_gradient_flows_through_indices() -> None:
    points = cloud(2, 30)
    before = points.clone()
    points.requires_grad_()
    for index in (
        farthest_points(points, 5), nearest_neighbors(points, points, 5), ball_query(points, points, 5, 1.0)
    ):  # fmt: skip
        assert not index.requires_grad
    assert torch.equal(points, before)


def test_opcheck() -> None:
    points, features = lattice(2, 30), cloud(2, 30).requires_grad_()
    idx = torch.randint(0, 30, (2, 4, 3), device=DEVICE)
    opcheck(lambda: farthest_points(points, 3, start=0, backend=SAMPLERS[0]))
    opcheck(lambda: nearest_neighbors(points[:, :4], points, 3, backend=NEIGHBOURS[0]))
    opcheck(lambda: ball_query(points[:, :4], points, 3, 1.5, backend=BALLS[0]))
    opcheck(lambda: group_points(features, idx, backend=GROUPERS[0]))


def test_compile() -> None:
    def groups(points: Tensor) -> Tensor:
        centre = group_points(points, farthest_points(points, 6)[..., None])[:, :, 0]
        return group_points(points, nearest_neighbors(centre, points, 4)) - centre[:, :, None]

    points = cloud(2, 60).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(groups, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(points), groups(points))
    grads = [torch.autograd.grad(f(points).square().sum(), points)[0] for f in (compiled, groups)]
    assert torch.equal(*grads)


def test_errors() -> None:
    points = cloud(2, 10)
    with pytest.raises(ValueError, match="k is 11, expected at least 1 and at most the 10 points of a cloud"):
        farthest_points(points, 11)
    for find in (nearest_neighbors, lambda q, p, k: ball_query(q, p, k, 1.0)):
        for k in (0, 11):
            with pytest.raises(ValueError, match=f"k is {k}, expected at least 1 and at most the 10 points"):
                find(points, points, k)
        with pytest.raises(ValueError, match=r"query has shape \(1, 10, 3\), expected \[2, G, 3\] as points"):
            find(points[:1], points, 3)
        with pytest.raises(TypeError, match="query has dtype torch.float64, expected torch.float32"):
            find(points.double(), points, 3)
    for radius in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="radius is"):
            ball_query(points, points, 3, radius)
    with pytest.raises(ValueError, match=r"points has shape \(2, 10, 4\), expected \[B, N, 3\]"):
        farthest_points(torch.ones(2, 10, 4, device=DEVICE), 3)
    with pytest.raises(TypeError, match="points has dtype torch.int64"):
        farthest_points(torch.ones(2, 10, 3, dtype=torch.int64, device=DEVICE), 3)
    with pytest.raises(ValueError, match="start is 10, expected an index of the 10 points"):
        farthest_points(points, 3, start=10)
    with pytest.raises(TypeError, match="start is float, expected a tensor"):
        farthest_points(points, 3, start=1.0)
    with pytest.raises(ValueError, match=r"start has shape \(3,\), expected \[2\]"):
        farthest_points(points, 3, start=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"idx has shape \(2, 3\), expected \[2, G, k\]"):
        group_points(points, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(TypeError, match="idx has dtype torch.float32, expected integers"):
        group_points(points, points)
    with pytest.raises(mmfuse.UnsupportedError, match="not an implementation of farthest_points"):
        farthest_points(points, 3, backend="triton")


@pytest.mark.skipif(GPU, reason="a GPU's indices are not read")
@pytest.mark.parametrize("wrong", [-1, 10])
def test_indices_out_of_range(wrong: int) -> None:
    points, idx = cloud(2, 10), torch.zeros(2, 3, 4, dtype=torch.int64)
    idx[0, 1, 2] = wrong
    for backend in GROUPERS:
        with pytest.raises(ValueError, match=f"idx has {wrong}, expected 0 <= idx < 10, the points of a cloud"):
            group_points(points, idx, backend=backend)
    with pytest.raises(ValueError, match=f"start has {wrong}, expected 0 <= start < 10"):
        farthest_points(points, 3, start=torch.tensor([0, wrong]))


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    points = cloud(2, 500)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in SAMPLERS:
            index = farthest_points(points, 9, backend=backend)
        centre = group_points(points, index[..., None])[:, :, 0]
        for backend in NEIGHBOURS:
            nearest_neighbors(centre, points, 5, backend=backend)
        for backend in BALLS:
            ball_query(centre, points, 5, 0.5, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(GPU, reason="a GPU would have to be waited for")
@pytest.mark.parametrize("backend", [None, *backends(lambda: farthest_points(torch.ones(1, 2, 3), 1))])
def test_a_start_out_of_range_raises_in_a_graph_too(backend: str | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda points, start: farthest_points(points, 4, start=start, backend=backend), backend="aot_eager"
    )
    points = torch.randn(2, 30, 3)
    assert compiled(points, torch.tensor([0, 29]))[:, 0].tolist() == [0, 29]
    for start in (-1, 30, 10**8):
        with pytest.raises(ValueError, match=f"start has {start}, expected 0 <= start < 30"):
            compiled(points, torch.tensor([0, start]))
