"""The point-cloud embeddings against the published forward, layer by layer in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from judge import assert_no_worse
from mmfuse.fused import points as embeds
from mmfuse.fused.points import (
    OneLLMPointEmbed,
    P3Embed,
    PointBertEncoder,
    PointBertGroup,
    PointPatchEmbed,
)
from mmfuse.kernels.points import farthest_points

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def knn(support: Tensor, query: Tensor, k: int) -> Tensor:
    return torch.cdist(support, query).topk(k, dim=1, largest=False).indices.transpose(1, 2)


def grouped(features: Tensor, idx: Tensor) -> Tensor:
    """[B, C, G, k] of [B, C, N], as openpoints' grouping_operation."""
    return torch.stack([f[:, i] for f, i in zip(features, idx, strict=True)])


def published_groups(m: Any, p: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = farthest_points(p, count, backend="torch")
    centre = p.gather(1, chosen[..., None].expand(-1, -1, 3))
    g = m.grouper
    if g.ball:
        d = torch.cdist(centre, p)
        idx = torch.zeros(*centre.shape[:2], g.group_size, dtype=torch.int64, device=p.device)
        for b, i in ((b, i) for b in range(len(p)) for i in range(count)):
            inside = (d[b, i] < g.radius).nonzero()[: g.group_size, 0]
            idx[b, i, :], idx[b, i, : len(inside)] = inside[0], inside
    else:
        idx = knn(p, centre, g.group_size)
    dp = grouped(p.transpose(1, 2), idx)
    if g.relative:
        dp = dp - centre.transpose(1, 2)[..., None]
    if g.normalize and g.ball and g.relative:
        dp = dp / g.radius
    elif g.normalize and not g.ball:
        dp = dp / dp.square().sum(1).sqrt().amax((1, 2)).view(-1, 1, 1, 1)
    return centre, dp, grouped(x, idx), x.gather(2, chosen[:, None].expand(-1, x.shape[1], -1))[..., None]


def published_layers(conv1: nn.Module, conv2: nn.Module, f: Tensor, pool: Any) -> Tensor:
    f = conv1(f)
    return pool(conv2(torch.cat([pool(f).expand(-1, -1, -1, f.shape[-1]), f], 1))).squeeze(-1)


def published_patch(m: PointPatchEmbed, p: Tensor, x: Tensor) -> Tensor:
    _, dp, fj, fi = published_groups(m, p, x, int(p.shape[1] * m.sample_ratio))
    f = {"dp": [dp], "fj": [fj], "dp_fj": [dp, fj], "dp_df": [dp, fj - fi], "df": [fj - fi]}[m.feature_type]
    return published_layers(m.conv1, m.conv2, torch.cat(f, 1), m.pool)


def published_p3(m: P3Embed, p: Tensor, x: Tensor) -> Tensor:
    for conv1, conv2 in m.convs:
        centre, dp, fj, fi = published_groups(m, p, x, p.shape[1] // 4)
        pi = centre.transpose(1, 2)[..., None].expand_as(dp)
        f = {"dp_fj": [dp, fj], "dp_fj_df": [dp, fj, fj - fi], "pi_dp_fj_df": [pi, dp, fj, fj - fi],
             "dp_df": [dp, fj - fi]}.get(m.feature_type, [fj])  # fmt: skip
        p, x = centre, published_layers(conv1, conv2, torch.cat(f, 1), m.pool)
    return x


PUBLISHED = {PointPatchEmbed: published_patch, P3Embed: published_p3}
OPTIONS: list[tuple[type, dict[str, Any]]] = [
    (PointPatchEmbed, {"feature_type": "dp", "channels": [7, 5, 8]}),
    (PointPatchEmbed, {"feature_type": "dp_df", "normalize_dp": True}),
    (PointPatchEmbed, {"feature_type": "dp_fj", "group": "ballquery", "radius": 0.9}),
    (PointPatchEmbed, {"feature_type": "df", "group": "ballquery", "radius": 0.9, "normalize_dp": True}),
    (PointPatchEmbed, {"feature_type": "fj", "norm_args": None}),
    (PointPatchEmbed, {"norm_args": {"norm": "in2d"}, "relative_xyz": False}),
    (PointPatchEmbed, {"act_args": {"act": "leakyrelu", "negative_slope": 0.2}}),
    (PointPatchEmbed, {"conv_args": {"order": "norm-act-conv"}, "reduction": "mean"}),
    (PointPatchEmbed, {"layers": 6}),
    (P3Embed, {}),
    (P3Embed, {"feature_type": "dp_fj_df", "norm_args": {"norm": "ln2d"}}),
    (P3Embed, {"feature_type": "pi_dp_fj_df", "sample_ratio": 0.25}),
    (P3Embed, {"feature_type": "df", "reduction": "avg"}),
    (P3Embed, {"norm_args": {"norm": "bn", "momentum": None, "affine": False}}),
]


def made(cls: type, options: dict[str, Any], **more: Any) -> Any:
    common = {"sample_ratio": 0.0625 if cls is P3Embed else 0.25, "group_size": 5, "group": "knn", "embed_dim": 8}
    m = cls(NAME=cls.__name__, **common | options | more)
    for layer in m.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -1, 2)
                nn.init.normal_(layer.bias)
    return m.to(DEVICE)


def results(cls: type, options: dict[str, Any], training: bool, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Tokens, gradients and buffers of ours in this dtype, of the published forward in it, and of that in float64."""
    channels = 3 if options.get("feature_type") == "dp" else 4
    points, features = torch.rand(2, 84, 3, device=DEVICE) * 2, torch.randn(2, channels, 84, device=DEVICE)
    m = made(cls, options, in_channels=channels).train(training)
    found = []
    for published, kind in ((False, dtype), (True, dtype), (True, torch.float64)):
        own = copy.deepcopy(m).to(kind)
        p, x = (t.to(kind, copy=True).requires_grad_() for t in (points, features))
        y = PUBLISHED[cls](own, p, x) if published else own(p, x)[1][-1]
        leaves = {"points": p, "features": x} | dict(own.named_parameters())
        if options.get("normalize_dp"):
            leaves.pop("points")  # openpoints' gradient of a length of zero is NaN
        weight = torch.linspace(0.5, 1.5, y.numel(), device=DEVICE).view_as(y).to(kind)
        grads = torch.autograd.grad((y * weight).square().sum(), list(leaves.values()), allow_unused=True)
        each = {"tokens": y.detach()} | dict(own.named_buffers())
        found.append(each | {f"d {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None})
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    "cls, options", OPTIONS, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(map(str, v.values()))
)
def test_the_published_forward(
    cls: type, options: dict[str, Any], training: bool, taken_from: Callable[..., None]
) -> None:
    taken_from()
    got, expected, _ = results(cls, options, training, torch.float64)
    assert list(got) == list(expected)
    for name, value in expected.items():
        # a bias before a normalisation has no gradient, and what is found is rounding
        size = max(1.0, value.abs().max().item())
        assert got[name].shape == value.shape and (got[name] - value).abs().max() <= 1e-10 * size, name


@pytest.mark.parametrize("fused", [False, True], ids=["small", "fused"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_float32(training: bool, fused: bool, taken_from: Callable[..., None]) -> None:
    """By the rule for tolerance: the layers one after another, as for so few points on a CPU, and fused."""
    if fused:
        taken_from()
    # the layers one after another have eager's own errors: of these, few draws have most
    draws = [results(*OPTIONS[1], training, torch.float32) for _ in range(12 if fused else 100)]
    for name in draws[0][0]:
        # no gradient: a bias before a normalisation; integers
        if (name == "d conv1.1.0.bias" and training) or name.endswith("tracked"):
            continue
        got, eager, exact = (torch.stack([draw[i][name] for draw in draws]) for i in range(3))
        assert_no_worse(got, eager, exact.double(), name)


def test_fused_and_plain_layers() -> None:
    """Which layers are one operator."""

    def layers(m: PointPatchEmbed) -> Any:
        return embeds._layers(m.conv1, m.conv2)

    assert layers(made(PointPatchEmbed, {})) is not None
    assert layers(made(PointPatchEmbed, {"norm_args": None})) is not None
    assert layers(made(PointPatchEmbed, {"norm_args": "in"})) is None
    assert layers(made(PointPatchEmbed, {"act_args": "gelu"})) is None
    assert layers(made(PointPatchEmbed, {"layers": 6})) is None
    stage = made(P3Embed, {}).convs[0]
    assert embeds._layers(*stage) is None and embeds._layers(*stage.eval()) is not None


def test_features_are_the_coordinates_by_default() -> None:
    m, points = made(PointPatchEmbed, {}).eval(), torch.rand(2, 40, 3, device=DEVICE)
    (p, centre), (x, tokens) = m(points)
    assert p is points and centre.shape == (2, 10, 3) and tokens.shape == (2, m.out_channels, 10)
    assert torch.equal(x, points.transpose(1, 2)) and torch.equal(tokens, m(points, x)[1][1])
    stages = made(P3Embed, {"group_size": 2}).eval()
    assert [t.shape[1] for t in stages(points)[0]] == [40, 10, 2]
    assert stages.channel_list == [3, 4, 8] and stages.out_channels == 8


def test_random_centres() -> None:
    m = made(PointPatchEmbed, {"subsample": "random"}).eval()
    assert m(torch.rand(2, 40, 3, device=DEVICE))[1][1].shape == (2, 8, 10)


def test_fewer_points_than_asked_for() -> None:
    points = torch.rand(1, 12, 3, device=DEVICE)
    with pytest.raises(ValueError, match="k is 5, expected at least 1 and at most the 4 points of a cloud"):
        made(P3Embed, {}).eval()(torch.rand(1, 16, 3, device=DEVICE))
    with pytest.raises(ValueError, match="k is 32, expected at least 1 and at most the 12 points of a cloud"):
        made(PointPatchEmbed, {"group_size": 32})(points)
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        made(PointPatchEmbed, {})(points[:, :3])
    with pytest.raises(ValueError, match="k is 13, expected at least 1 and at most the 12 points"):
        PointBertGroup(13, 4)(points)


def test_wrong_options() -> None:
    for options, message in (
        ({"feature_type": "assa"}, "feature_type is 'assa', expected one of dp, fj"),
        ({"subsample": "voxel"}, "subsample is 'voxel', expected 'fps' or 'random'"),
        ({"group": "grid"}, "group is 'grid', expected 'ballquery' or 'knn'"),
        ({"norm_args": "bn1d"}, "norm is 'bn1d', expected one of bn, in, ln"),
        ({"act_args": "swiglu"}, "act is 'swiglu'"),
        ({"conv_args": {"order": "act-conv"}}, "order is 'act-conv'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(PointPatchEmbed, options)


@pytest.mark.parametrize("fused", [False, True], ids=["small", "fused"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_point_bert(training: bool, fused: bool, taken_from: Callable[..., None]) -> None:
    if fused:
        taken_from()
    points = torch.randn(2, 60, 3, device=DEVICE)
    neighbourhood, centre = PointBertGroup(7, 6)(points)
    assert torch.equal(centre, points.gather(1, farthest_points(points, 7)[..., None].expand(-1, -1, 3)))
    idx = knn(points, centre, 6)
    same = torch.stack([p[i] for p, i in zip(points, idx, strict=True)]) - centre[:, :, None]
    assert torch.equal(neighbourhood, same)

    m = PointBertEncoder(16).to(DEVICE).train(training)
    assert {k.split(".")[0] for k in m.state_dict()} == {"first_conv", "second_conv"}
    tokens = {}
    for name, dtype in (("got", torch.float32), ("eager", torch.float32), ("exact", torch.float64)):
        own, groups = copy.deepcopy(m).to(dtype), neighbourhood.to(dtype)
        if name == "got":
            tokens[name] = own(groups)
        else:
            f = own.first_conv(groups.flatten(0, 1).transpose(2, 1))
            f = torch.cat([f.max(2, keepdim=True)[0].expand(-1, -1, 6), f], 1)
            tokens[name] = own.second_conv(f).max(2)[0].view(2, 7, 16)
        tokens[name + " mean"] = own.second_conv[1].running_mean
        tokens[name + " var"] = own.first_conv[1].running_var
    for part in ("", " mean", " var"):
        assert_no_worse(*(tokens[n + part].detach() for n in ("got", "eager", "exact")), part)


def test_point_bert_in_a_process_group(monkeypatch: pytest.MonkeyPatch, taken_from: Callable[..., None]) -> None:
    """Every parameter gets a gradient, for which DistributedDataParallel waits; SyncBatchNorm keeps its statistics."""
    taken_from()
    m, groups = PointBertEncoder(16).to(DEVICE), torch.randn(2, 7, 6, 3, device=DEVICE)
    m(groups).sum().backward()
    assert all(p.grad is not None for p in m.parameters())
    assert not m.first_conv[0].bias.grad.any() and not m.second_conv[0].bias.grad.any()

    def fused(*_: Any) -> Tensor:
        raise AssertionError("the operator's statistics are of one process")

    monkeypatch.setattr(embeds, "_fused", fused)
    with pytest.raises(AssertionError, match="of one process"):
        m(groups)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(m)(groups).shape == (2, 7, 16)


def test_onellm() -> None:
    m = OneLLMPointEmbed(sample_number=9, group_size=4, channels=10).to(DEVICE)
    assert {k: tuple(v.shape) for k, v in m.state_dict().items()} == {
        "conv1.weight": (10, 6, 1, 1),
        "conv1.bias": (10,),
    }
    x = torch.randn(2, 50, 6, device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.float64):
        p = x[..., 3:]
        centre = p.gather(1, farthest_points(p, 9)[..., None].expand(-1, -1, 3))
        groups = grouped(x.transpose(1, 2), knn(p, centre, 4)).to(dtype)
        results.append(copy.deepcopy(m).to(dtype).conv1(groups).max(-1, keepdim=True)[0].detach())
    assert_no_worse(m(x).detach(), *results)
    with pytest.raises(ValueError, match="kernel_size, stride are 3, 1"):
        OneLLMPointEmbed(kernel_size=3)
