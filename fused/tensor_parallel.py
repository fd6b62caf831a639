"""Experts in shards over ranks: tensor parallelism (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053).

A rank r has some of the heads, and of the hidden features of the FFN, of every expert: whatever the modalities of a
batch are, all ranks have the same work. All have the same rows. For attention and for the FFN they sum once forward and
once backward.

    columns:  z_r = LN(x) W_r^T + b_r                        dx = sum over r of its gradient by each rank's columns
    rows:     y = b + sum over r of h_r W_r^T                dh_r = dy W_r
    LN of [h_1 ... h_R]:  mean = mean of mean_r,             variance = mean of variance_r + variance of mean_r

The last is BEiT-3's norm before a second product: two numbers of each row travel forward, and two backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from mmfuse.fused.multiway import MoMEBlock, MoTBlock, MultiwayBlock, MultiwayFFN, MultiwayLayerNorm, MultiwayLinear
from mmfuse.fused.multiway import normed as given_norm
from mmfuse.kernels import Routing, routed_linear
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.dtypes import accumulation_dtype, cast
from mmfuse.kernels.multiway.arguments import Ending, runs_of
from mmfuse.kernels.multiway.op import Activation
from mmfuse.kernels.multiway.reference import ended, routed


def shard_experts(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the experts in `module` over the ranks of `mesh`, in place; returns it.

    Of a `MultiwayBlock` attention by heads and the FFN by its hidden features; of a `MoMEBlock`, whose attention is not
    the experts', the FFN. What is split becomes a DTensor, of a gradient like it; everything else is on each rank, and
    so are inputs and outputs. Weights are those of the first rank. Stochastic depth is drawn by the first rank.

    Call it before an optimizer is made, and before `fully_shard` over another dimension of the mesh. Whatever takes all
    parameters as one list (`foreach` optimizers, `clip_grad_norm_`) takes DTensors and others within
    `torch.distributed.tensor.experimental.implicit_replication()`. The weight of queries, keys and values is then
    [E, 3, D, D]; `load_state_dict` takes the state of a module that is split, and of one that is not, and `whole_state`
    gives the latter's.

    Args:
        module: with any such layers in it.
        mesh: of one dimension, e.g. `init_device_mesh("cuda", (8,))`.

    Raises:
        ValueError: the mesh has more dimensions; heads or hidden features are no multiple of the ranks; no such layer.
        UnsupportedError: a layer is a `MoTBlock`, split already, flattened, or has children of other classes.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions, expected 1, such as mesh['tp']")
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, (MultiwayBlock, MultiwayFFN, MoTBlock))]
    if not found:
        raise ValueError(f"{type(module).__name__} has no MultiwayBlock and no MultiwayFFN, expected some to split")
    for name, m in found:  # all is checked before anything is changed
        _check(name or type(m).__name__, m, mesh.size())
    for p in module.parameters():
        if not p.is_meta:
            p.data = distribute_tensor(p.data, mesh, [Replicate()]).to_local()
    for _, m in found:
        parts = 3 if isinstance(m, MultiwayBlock) else 1
        for child, kind, dim, n in zip(_children(m), (_Columns, _Norm, _Rows), (1, 1, 2), (parts, 1, 1), strict=True):
            if child is not None:
                _split(child, kind, mesh, dim, n)
    for of in module.modules():
        if isinstance(of, (MultiwayBlock, MoMEBlock)):
            of.mesh = mesh
    return module


def _children(m: Any) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """The product whose columns are split, the norm of what it gives, and the product whose rows are."""
    return (m.qkv, m.inner_norm, m.out) if isinstance(m, MultiwayBlock) else (m.fc1, m.norm, m.fc2)


def _check(name: str, m: Any, ranks: int) -> None:
    if isinstance(m, MoTBlock):
        raise UnsupportedError(f"{name} is a MoTBlock, expected a MultiwayBlock or MultiwayFFN")
    kinds = (MultiwayLinear, MultiwayLayerNorm, MultiwayLinear)
    for child, kind, dims in zip(_children(m), kinds, (3, 2, 3), strict=True):
        if child is None:
            continue
        if type(child) is not kind:
            raise UnsupportedError(f"{name} has a {type(child).__name__}, expected a {kind.__name__}")
        shape = tuple(child.get_parameter("weight").shape)
        if len(shape) != dims:
            raise UnsupportedError(f"{name} has a weight of shape {shape}, expected {dims} dimensions")
    what, n = ("heads", m.heads) if isinstance(m, MultiwayBlock) else ("hidden features", m.fc1.weight.shape[1])
    if n % ranks:
        raise ValueError(f"{name} has {n} {what}, expected a multiple of the {ranks} ranks")


def _split(m: Any, kind: type[nn.Module], mesh: DeviceMesh, dim: int, parts: int) -> None:
    """Parameters with a dimension `dim` as shards of it; where it has several parts, of each of them."""
    for name, p in m.named_parameters(recurse=False):
        if p.dim() > dim:
            t, at = (p.detach(), dim) if parts == 1 else (p.detach().unflatten(dim, (parts, -1)), dim + 1)
            setattr(m, name, nn.Parameter(distribute_tensor(t, mesh, [Shard(at)], src_data_rank=None), p.requires_grad))
    m.__class__, m.mesh = kind, mesh  # hooks and names stay, as with fully_shard


# --- between ranks --------------------------------------------------------------------------------------------------


def _local(t: Tensor) -> Tensor:
    """A rank's shard."""
    assert isinstance(t, DTensor)
    return t.to_local()


def _as(t: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(t, mesh, [placement], run_check=False)


def _same(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """What is the same on all ranks; its gradient is the sum of theirs."""
    return _as(t, mesh, Replicate()).to_local(grad_placements=[Partial()])


def _summed(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over ranks, with the same gradient on all of them."""
    return _as(t, mesh, Partial()).redistribute(placements=[Replicate()]).to_local()


class _Standardised(torch.autograd.Function):
    """(h - mean) / sqrt(variance + eps) of rows of which each rank has as many columns: [T, D / R]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, eps: float, mesh: DeviceMesh) -> Tensor:
        moments = torch.stack(torch.var_mean(cast(h, accumulation_dtype(h.dtype)), 1, correction=0))
        variances, means = _as(moments[:, None], mesh, Shard(1)).full_tensor()  # [R, T] each
        mean = means.mean(0)
        rstd = (variances.mean(0) + (means - mean).square().mean(0) + eps).rsqrt()
        ctx.save_for_backward(h, mean, rstd)
        ctx.mesh = mesh
        return cast((h - mean[:, None]) * rstd[:, None], h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        h, mean, rstd = ctx.saved_tensors
        xhat = (h - mean[:, None]) * rstd[:, None]
        sums = _summed(torch.stack([g.sum(1, dtype=mean.dtype), (g * xhat).sum(1)]), ctx.mesh)
        a, b = sums[..., None] / (h.shape[1] * ctx.mesh.size())
        return cast(rstd[:, None] * (g - a - xhat * b), h.dtype), None, None


# --- modules --------------------------------------------------------------------------------------------------------


class _Columns(MultiwayLinear):
    """[T, K] to a rank's [T, N / R]: weight [E, N, K] or [E, 3, N / 3, K] as shards of N."""

    mesh: DeviceMesh

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        routing: Routing,
        norm: MultiwayLayerNorm | None = None,
        activation: Activation = "none",
    ) -> Tensor:
        x, before = given_norm(x, routing, norm)
        if before is not None:
            before = (_same(before[0], self.mesh), _same(before[1], self.mesh), before[2])
        weight = _local(self.weight).flatten(1, -2)
        bias = None if self.bias is None else _local(self.bias).flatten(1)
        return routed_linear(_same(x, self.mesh), weight, bias, routing, activation=activation, input_norm=before)


class _Rows(MultiwayLinear):
    """A rank's [T, K / R] to [T, N]: weight [E, N, K] as shards of K, and the whole bias."""

    mesh: DeviceMesh

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        routing: Routing,
        residual: Tensor | None = None,
        row_scale: Tensor | None = None,
        norm: MultiwayLayerNorm | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        x, bias = x if norm is None else norm(x, routing), self.bias
        y = _summed(routed_linear(x, _local(self.weight), None, routing), self.mesh)
        if bias is not None:
            y = routed(y, routing.experts, runs_of(routing, y), lambda rows, e: rows + cast(bias[e], rows.dtype))
        return ended(y, Ending(residual, scale, row_scale))


class _Norm(MultiwayLayerNorm):
    """LayerNorm of [T, D] of which a rank has [T, D / R]: weight and bias [E, D] as shards of D."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        gamma, beta = (cast(_local(t), x.dtype) for t in (self.weight, self.bias))
        x = _Standardised.apply(x, self.eps, self.mesh)
        return routed(x, routing.experts, runs_of(routing, x), lambda rows, e: torch.addcmul(beta[e], rows, gamma[e]))
