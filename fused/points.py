"""Point clouds to tokens: the embeddings of openpoints (Meta-Transformer), Point-BERT and OneLLM.

Same constructors, outputs and `state_dict` keys as published. Sampling, neighbours and grouping are mmfuse's operators;
the mini-PointNet is one operator where its layers are those of `mini_pointnet`, with batch normalisation folded in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels.contrastive.max_query import max_query_similarity
from mmfuse.kernels.points import (
    ball_query,
    farthest_points,
    group_points,
    mini_pointnet,
    mini_pointnet_training,
    nearest_neighbors,
)
from mmfuse.kernels.points.pointnet.blocked import Layers
from mmfuse.kernels.points.pointnet.op import POINTNET

Layer = tuple[Any, Any, Any]  # a 1x1 convolution, its normalisation, its activation


class PointPatchEmbed(nn.Module):
    """openpoints' PointPatchEmbed: groups around farthest points, a mini-PointNet, a token for each group.

    Constructor arguments are the published ones; what `embed_args` holds besides them is ignored. `norm_args` names bn,
    in or ln ("bn1d", the published default, cannot be built there).
    """

    feature_types = ("dp", "fj", "dp_fj", "dp_df", "df")

    def __init__(
        self,
        sample_ratio: float = 0.0625,
        group_size: int = 32,
        in_channels: int = 3,
        layers: int = 4,
        embed_dim: int = 256,
        channels: Sequence[int] | None = None,
        subsample: str = "fps",
        group: str = "ballquery",
        normalize_dp: bool = False,
        radius: float = 0.1,
        feature_type: str = "dp_df",
        relative_xyz: bool = True,
        norm_args: str | dict[str, Any] | None = "bn",
        act_args: str | dict[str, Any] | None = "relu",
        conv_args: dict[str, Any] | None = None,
        reduction: str = "max",
        **kwargs: Any,
    ):
        super().__init__()
        _check_feature_type(self, feature_type)
        self.sample_ratio, self.feature_type = sample_ratio, feature_type
        self.grouper = _Grouper(group_size, subsample, group, radius, relative_xyz, normalize_dp)
        self.pool = _pool(reduction)
        first = _CHANNELS[feature_type](in_channels)
        if channels is None:
            widths = [first, *_widths(embed_dim, layers)]
        else:
            widths = [first, *channels, embed_dim]
            layers = len(widths) - 1
        block = partial(_conv_block, norm_args=norm_args, act_args=act_args, **(conv_args or {}))
        self.conv1, self.conv2 = _pointnet(widths, block, plain_last=True)
        self.out_channels = embed_dim
        self.channel_list = [in_channels, embed_dim]

    def forward(self, points: Tensor, features: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """([points, centres [B, G, 3]], [features, tokens [B, D, G]]) of points [B, N, 3] and features [B, C, N].

        G = int(N sample_ratio). Features are the coordinates where there are none.

        Raises:
            ValueError: there are fewer points than groups or neighbours ask for.
        """
        if features is None:
            features = points.transpose(1, 2)
        groups = self.grouper(points, features, int(points.shape[1] * self.sample_ratio))
        tokens = _embed(self.conv1, self.conv2, groups.aggregated(self.feature_type), self.pool)
        return [points, groups.centre], [features, tokens]


class P3Embed(nn.Module):
    """openpoints' P3Embed: stages that keep a quarter of the points each, with twice the channels.

    Constructor arguments are the published ones; what `embed_args` holds besides them is ignored. As published, every
    stage keeps N // 4 points whatever `scale` is, and features "dp" and "df" are the neighbours' own.
    """

    feature_types = ("dp", "fj", "df", "dp_fj", "dp_df", "dp_fj_df", "pi_dp_fj_df")

    def __init__(
        self,
        sample_ratio: float = 0.0625,
        scale: int = 4,
        group_size: int = 32,
        in_channels: int = 3,
        layers: int = 4,
        embed_dim: int = 256,
        subsample: str = "fps",
        group: str = "ballquery",
        normalize_dp: bool = False,
        radius: float = 0.1,
        feature_type: str = "dp_df",
        relative_xyz: bool = True,
        norm_args: str | dict[str, Any] | None = "bn",
        act_args: str | dict[str, Any] | None = "relu",
        conv_args: dict[str, Any] | None = None,
        reduction: str = "max",
        **kwargs: Any,
    ):
        super().__init__()
        _check_feature_type(self, feature_type)
        self.feature_type = feature_type
        self.grouper = _Grouper(group_size, subsample, group, radius, relative_xyz, normalize_dp)
        self.pool = _pool(reduction)
        block = partial(_conv_block, norm_args=norm_args, act_args=act_args, **(conv_args or {}))
        stages = int(math.log(1 / sample_ratio, scale))
        width = embed_dim // 2 ** (stages - 1)
        self.convs = nn.ModuleList()
        self.channel_list = [in_channels]
        for _ in range(stages):
            widths = [_CHANNELS[feature_type](self.channel_list[-1]), *_widths(width, layers)]
            self.convs.append(nn.ModuleList(_pointnet(widths, block, plain_last=False)))
            self.channel_list.append(width)
            width *= 2
        self.out_channels = self.channel_list[-1]

    def forward(self, points: Tensor, features: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The points [B, N, 3], [B, N // 4, 3], ... and features [B, C, N], [B, D1, N // 4], ... of every stage.

        Features are the coordinates where there are none.

        Raises:
            ValueError: a stage has fewer points than groups or neighbours ask for.
        """
        if features is None:
            features = points.transpose(1, 2)
        kind = "fj" if self.feature_type in ("dp", "df") else self.feature_type
        out_points, out_features = [points], [features]
        stage: Any
        for stage in self.convs:
            conv1, conv2 = stage
            groups = self.grouper(out_points[-1], out_features[-1], out_points[-1].shape[1] // 4)
            out_features.append(_embed(conv1, conv2, groups.aggregated(kind), self.pool))
            out_points.append(groups.centre)
        return out_points, out_features


class PointBertGroup(nn.Module):
    """Point-BERT's Group: neighbourhoods [B, G, k, 3], relative to their centres [B, G, 3], of points [B, N, 3]."""

    def __init__(self, num_group: int, group_size: int):
        super().__init__()
        self.num_group, self.group_size = num_group, group_size

    def forward(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        centre = _rows(xyz, farthest_points(xyz, self.num_group))
        idx = nearest_neighbors(centre, xyz, self.group_size)
        return group_points(xyz, idx) - centre[:, :, None], centre


class PointBertEncoder(nn.Module):
    """Point-BERT's Encoder: tokens [B, G, encoder_channel] of neighbourhoods [B, G, k, 3]."""

    def __init__(self, encoder_channel: int):
        super().__init__()
        self.encoder_channel = encoder_channel
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(inplace=True), nn.Conv1d(128, 256, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Conv1d(512, encoder_channel, 1)
        )

    def forward(self, point_groups: Tensor) -> Tensor:
        layers: list[Layer] = []
        for conv, norm, act, last in (self.first_conv, self.second_conv):
            layers += [(conv, norm, act), (last, None, None)]
        # others, as SyncBatchNorm, have their own statistics
        known = all(type(norm) is nn.BatchNorm1d for _, norm, _ in layers[::2])
        if known and _gains(layers, point_groups):
            return _fused(layers, point_groups)
        f = self.first_conv(point_groups.flatten(0, 1).transpose(1, 2))
        f = torch.cat([_max(f).expand_as(f), f], 1)
        return _max(self.second_conv(f))[..., 0].unflatten(0, point_groups.shape[:2])


class OneLLMPointEmbed(nn.Module):
    """OneLLM's PointPatchEmbed: one layer and a maximum over the neighbours of farthest points.

    Only sums over a neighbourhood's `in_channels` are made, and of the products [B, G, k, channels] nothing is kept but
    where the maxima are.
    """

    def __init__(
        self,
        sample_ratio: float = 0.0625,
        sample_number: int = 1024,
        group_size: int = 32,
        in_channels: int = 6,
        channels: int = 1024,
        kernel_size: int = 1,
        stride: int = 1,
        normalize_dp: bool = False,
        relative_xyz: bool = True,
    ):
        super().__init__()
        if (kernel_size, stride) != (1, 1):
            raise ValueError(f"kernel_size, stride are {kernel_size}, {stride}, expected 1, 1: groups are not a grid")
        self.sample_ratio, self.sample_number, self.group_size = sample_ratio, sample_number, group_size
        self.conv1 = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, G, 1] of x [B, N, in_channels], whose coordinates are those from the fourth on."""
        points = x[..., 3:]
        centre = _rows(points, farthest_points(points, self.sample_number))
        groups = group_points(x, nearest_neighbors(centre, points, self.group_size))
        bias: Any = self.conv1.bias
        tokens = max_query_similarity(groups.flatten(0, 1), self.conv1.weight.flatten(1)) + bias
        tokens = tokens.to(x.dtype)
        return tokens.view(*groups.shape[:2], -1).transpose(1, 2)[..., None]


# --- groups ---------------------------------------------------------------------------------------------------------

# input channels for features of C channels; dp are coordinates, fj features, df their difference to the centre's
_CHANNELS: dict[str, Callable[[int], int]] = {
    "dp": lambda c: 3,
    "fj": lambda c: c,
    "df": lambda c: c,
    "dp_fj": lambda c: 3 + c,
    "dp_df": lambda c: 3 + c,
    "dp_fj_df": lambda c: 3 + 2 * c,
    "pi_dp_fj_df": lambda c: 6 + 2 * c,
}


def _check_feature_type(embed: PointPatchEmbed | P3Embed, feature_type: str) -> None:
    if feature_type not in embed.feature_types:
        raise ValueError(f"feature_type is {feature_type!r}, expected one of {', '.join(embed.feature_types)}")


def _rows(x: Tensor, idx: Tensor) -> Tensor:
    """[B, G, C]: the rows of x [B, N, C] that idx [B, G] names."""
    return group_points(x, idx[..., None])[:, :, 0]


class _Grouper:
    """Chooses centres and their neighbours, as openpoints' KNNGroup and QueryAndGroup."""

    def __init__(
        self, group_size: int, subsample: str, group: str, radius: float, relative_xyz: bool, normalize_dp: bool
    ):
        subsample, group = subsample.lower(), group.lower()
        if subsample != "fps" and "random" not in subsample:
            raise ValueError(f"subsample is {subsample!r}, expected 'fps' or 'random'")
        self.ball = "ball" in group or "query" in group
        if not self.ball and "knn" not in group:
            raise ValueError(f"group is {group!r}, expected 'ballquery' or 'knn'")
        self.group_size, self.random, self.radius = group_size, subsample != "fps", radius
        self.relative, self.normalize = relative_xyz, normalize_dp

    def __call__(self, points: Tensor, features: Tensor, groups: int) -> _Groups:
        b, n, _ = points.shape
        if self.random:
            chosen = torch.randint(0, n, (b, groups), device=points.device)
        else:
            chosen = farthest_points(points, groups)
        centre = _rows(points, chosen)
        if self.ball:
            idx = ball_query(centre, points, self.group_size, self.radius)
        else:
            idx = nearest_neighbors(centre, points, self.group_size)
        dp = group_points(points, idx)
        if self.relative:
            dp = dp - centre[:, :, None]
        if self.normalize and self.ball and self.relative:
            dp = dp / self.radius
        elif self.normalize and not self.ball:
            dp = dp / dp.norm(dim=3).amax((1, 2)).view(-1, 1, 1, 1)
        return _Groups(centre, dp, features.transpose(1, 2), chosen, idx)


class _Groups:
    """Centres [B, G, 3], neighbours' coordinates dp [B, G, k, 3], and where both are among features [B, N, C]."""

    def __init__(self, centre: Tensor, dp: Tensor, features: Tensor, chosen: Tensor, idx: Tensor):
        self.centre, self.dp, self.features, self.chosen, self.idx = centre, dp, features, chosen, idx

    def aggregated(self, feature_type: str) -> Tensor:
        """[B, G, k, C']: what `feature_type` names, side by side."""
        if feature_type == "dp":
            return self.dp
        parts = {"dp": self.dp, "fj": group_points(self.features, self.idx)}
        if "df" in feature_type:
            parts["df"] = parts["fj"] - _rows(self.features, self.chosen)[:, :, None]
        if "pi" in feature_type:
            parts["pi"] = self.centre[:, :, None].expand_as(self.dp)
        return torch.cat([parts[name] for name in feature_type.split("_")], 3)


# --- layers ---------------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [B, C, H, W]."""

    def __init__(self, num_channels: int, **kwargs: Any):
        super().__init__(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


_NORMS: dict[str, Callable[..., nn.Module]] = {"bn": nn.BatchNorm2d, "in": nn.InstanceNorm2d, "ln": LayerNorm2d}
_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU,
    "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "prelu": nn.PReLU, "celu": nn.CELU, "selu": nn.SELU, "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "hard_sigmoid": nn.Hardsigmoid, "hard_swish": nn.Hardswish,
}  # fmt: skip


def _named(kind: str, args: str | dict[str, Any] | None, table: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that {kind: name, ...} or a name names, and its other arguments."""
    options = {kind: args} if isinstance(args, str) else dict(args or {})
    name = options.pop(kind, None)
    if name is None:
        return None, options
    known = str(name).lower().removesuffix("2d")
    if known not in table:
        raise ValueError(f"{kind} is {name!r}, expected one of {', '.join(table)}")
    return table[known], options


def _conv_block(
    inputs: int, outputs: int, plain: bool, norm_args: Any, act_args: Any, order: str = "conv-norm-act",
    bias: bool = True, **conv_args: Any,
) -> nn.Sequential:  # fmt: skip
    """openpoints' create_convblock2d; a plain one has neither normalisation nor activation."""
    if order not in ("conv-norm-act", "norm-act-conv", "conv-act-norm"):
        raise ValueError(f"order is {order!r}, expected 'conv-norm-act', 'norm-act-conv' or 'conv-act-norm'")
    norm, norm_options = _named("norm", None if plain else norm_args, _NORMS)
    act, act_options = _named("act", None if plain else act_args, _ACTIVATIONS)
    act_options.pop("inplace", None)
    parts: dict[str, nn.Module] = {"conv": nn.Conv2d(inputs, outputs, 1, bias=bias and norm is None, **conv_args)}
    if norm is not None:
        parts["norm"] = norm(inputs if order == "norm-act-conv" else outputs, **norm_options)
    if act is not None:
        parts["act"] = act(**act_options)
    return nn.Sequential(*(parts[name] for name in order.split("-") if name in parts))


def _widths(embed_dim: int, layers: int) -> list[int]:
    return [embed_dim] * (layers // 2) + [embed_dim * 2] * (layers // 2 - 1) + [embed_dim]


def _pointnet(widths: list[int], block: Any, plain_last: bool) -> list[nn.Sequential]:
    """The convolutions before and after the first maximum, which doubles the channels."""
    layers, half = len(widths) - 1, (len(widths) - 1) // 2
    conv1 = [block(widths[i], widths[i + 1], plain=i == half - 1) for i in range(half)]
    conv2 = [
        block(widths[i] * (2 if i == half else 1), widths[i + 1], plain=plain_last and i == layers - 1)
        for i in range(half, layers)
    ]
    return [nn.Sequential(*conv1), nn.Sequential(*conv2)]


def _pool(reduction: str) -> Callable[[Tensor], Tensor]:
    if reduction in ("mean", "avg", "meanpool", "avgpool"):
        return _mean
    return _max


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _max(x: Tensor) -> Tensor:
    return x.max(-1, keepdim=True)[0]


# --- the mini-PointNet ----------------------------------------------------------------------------------------------


def _embed(conv1: nn.Sequential, conv2: nn.Sequential, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, D, G] of groups x [B, G, k, C]."""
    layers = _layers(conv1, conv2) if pool is _max else None
    if layers is not None and _gains(layers, x):
        return _fused(layers, x).transpose(1, 2)
    f = conv1(x.permute(0, 3, 1, 2).contiguous())
    return pool(conv2(torch.cat([pool(f).expand_as(f), f], 1))).squeeze(-1)


def _layers(conv1: nn.Sequential, conv2: nn.Sequential) -> list[Layer] | None:
    """The four layers that `mini_pointnet` takes, or None where these are others."""
    if len(conv1) != 2 or len(conv2) != 2:
        return None
    layers: list[Layer] = []
    for i, block in enumerate((*conv1, *conv2)):
        kinds = [type(part) for part in block]
        conv, norm = kinds[:1] == [nn.Conv2d], nn.BatchNorm2d in kinds[1:2]
        act = kinds[1 + norm :] == [nn.ReLU]
        if not conv or len(kinds) != 1 + norm + act or act != (i in (0, 2)) and not (i == 3 and act):
            return None
        if i == 3 and norm and _uses_batch(block[1]):
            return None  # its statistics need every product that the maximum drops
        layers.append((block[0], block[1] if norm else None, block[-1] if act else None))
    return layers


def _gains(layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether the operator would be more than these layers one after another."""
    x = x.detach().flatten(0, -3)
    return POINTNET.choose((x, Layers(*(None,) * 6, layers[3][0].weight, None))) != "torch"


def _fused(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """[B, G, D] of groups x [B, G, k, C]."""
    (conv1, norm1, _), (conv2, _, _), (conv3, norm3, _), (conv4, norm4, act4) = layers
    count = x.numel() // max(1, x.shape[-1])
    if norm1 is not None and _uses_batch(norm1):
        w1 = conv1.weight.flatten(1)
        mean, var = _product_statistics(x, w1)
        _update(norm1, mean, var, conv1.bias, count)
        scale = (var + norm1.eps).rsqrt() * _or(norm1.weight, 1)
        first = (w1 * scale[:, None], _or(norm1.bias, 0) - mean * scale + _without_effect(conv1.bias))
    else:
        first = _folded(conv1, norm1)
    if norm3 is not None and _uses_batch(norm3):
        w3 = conv3.weight.flatten(1)
        scale = w3.new_ones(len(w3)) if norm3.weight is None else norm3.weight
        shift = torch.zeros_like(scale) if norm3.bias is None else norm3.bias
        third = (w3, shift + _without_effect(conv3.bias))
        pairs = [_as(x, pair) for pair in (first, _folded(conv2, None), third, _folded(conv4, norm4))]
        y, mean, var = mini_pointnet_training(x, pairs, scale, norm3.eps)
        _update(norm3, mean, var, conv3.bias, count)
    else:
        third = _folded(conv3, norm3)
        pairs = [_as(x, pair) for pair in (first, _folded(conv2, None), third, _folded(conv4, norm4))]
        y = mini_pointnet(x, pairs)
    # a rising function of the maximum is the maximum of the function
    return y if act4 is None else act4(y)


def _as(x: Tensor, layer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return layer[0].to(x.dtype), layer[1].to(x.dtype)


def _uses_batch(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def _folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(weight [out, in], bias [out]) of a 1x1 convolution and the normalisation after it, by running statistics."""
    w = conv.weight.flatten(1)
    b = w.new_zeros(len(w)) if conv.bias is None else conv.bias
    if norm is None:
        return w, b
    scale = (norm.running_var + norm.eps).rsqrt() * _or(norm.weight, 1)
    return w * scale[:, None], (b - norm.running_mean) * scale + _or(norm.bias, 0)


def _without_effect(bias: Tensor | None) -> Tensor | float:
    """The batch's mean takes a bias away; its gradient is 0 and not none, which DistributedDataParallel waits for."""
    return 0.0 if bias is None else 0 * bias


def _or(t: Tensor | None, value: float) -> Tensor | float:
    return value if t is None else t


@torch.no_grad()
def _update(norm: Any, mean: Tensor, var: Tensor, bias: Tensor | None, count: int) -> None:
    """The running statistics, after a batch of `count` products with this mean and biased variance without the bias."""
    if count <= 1:
        raise ValueError(f"groups have {count} points in all, expected more than 1 for batch normalisation")
    if not norm.training or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    share: Any = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, batch in (
        (norm.running_mean, mean + _or(bias, 0)), (norm.running_var, var * (count / (count - 1)))
    ):  # fmt: skip
        running.copy_(running * (1 - share) + batch * share)


def _product_statistics(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of W x over all points, from the moments of the few channels of x; in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    mean = rows.mean(0)
    centred = rows - mean
    w64 = w.double()
    var = ((w64 @ (centred.t() @ centred / len(rows))) * w64).sum(1)
    return (w64 @ mean).to(w.dtype), var.to(w.dtype)
