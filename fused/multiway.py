"""Layers with an expert for each modality, over a stream of rows in which those of an expert lie together.

VLMo (Bao et al. 2021, arXiv:2111.02358), BEiT-3 (Wang et al. 2022, arXiv:2208.10442) and Mixture-of-Transformers (Liang
et al. 2024, arXiv:2411.04996), whose layer BAGEL has. A `Routing` says which rows are whose; it is an argument of every
forward, never a state of the module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.acceleration.plain import are_plain
from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear, routed_rms_norm
from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.op import Activation

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Experts(nn.Module):
    """Parameters of E experts. Their first sizes may be joined or split: [E, N, K], [E N, K] and [E, 3, N / 3, K] are
    the same numbers in the same order, and one is loaded as the other, or as the shards that a rank has of it."""

    experts: int

    def stacked(self, name: str, t: Tensor) -> Tensor:
        """A parameter as [E, N, K] or [E, N]."""
        ends = t.shape[-1:] if isinstance(self, MultiwayLinear) and name == "weight" else ()
        return t.reshape(self.experts, -1, *ends)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in self._parameters.items():
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and _same_numbers(given.shape, own.shape):
                state_dict[prefix + name] = _sharded_like(own, given.reshape(own.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _same_numbers(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one shape is the other with neighbouring sizes joined."""
    few, many = sorted((set(accumulate(reversed(shape), int.__mul__)) for shape in (a, b)), key=len)
    return few <= many and math.prod(a) == math.prod(b)


def _sharded_like(own: Any, t: Tensor) -> Tensor:
    if not hasattr(own, "placements") or hasattr(t, "placements"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, own.device_mesh, own.placements, src_data_rank=None)


def flatten_experts(module: nn.Module) -> nn.Module:
    """Every parameter [E, N, K] of the experts in `module` as [E N, K], in place, and [E, N] as [E N]; returns it.

    `fully_shard` (FSDP2) then shards it evenly over any number of ranks; call this before, and before an optimizer is
    made. Experts are views of the one parameter. `load_state_dict` takes either form; `whole_state` gives the first.
    """
    for m in module.modules():
        if isinstance(m, _Experts):
            for name, p in m.named_parameters(recurse=False):
                flat = m.stacked(name, p.detach()).flatten(0, 1)
                if flat.shape != p.shape:
                    setattr(m, name, nn.Parameter(flat, p.requires_grad))
    return module


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` as it was before `flatten_experts`, `shard_experts` or `fully_shard`.

    Experts are [E, N, K], and what ranks have in shards is gathered: a collective, for which all of them call it.
    """
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in module.state_dict().items()}
    for path, m in module.named_modules():
        if isinstance(m, _Experts):
            for name in m._parameters:
                if (key := f"{path}.{name}".lstrip(".")) in state:
                    state[key] = m.stacked(name, state[key])
    return state


class MultiwayLinear(_Experts):
    """[T, K] to [T, N], with weight [E, N, K] and bias [E, N]; initialised as `nn.Linear`."""

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.experts = experts
        layers = [nn.Linear(in_features, out_features, bias) for _ in range(experts)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])) if bias else None

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        residual: Tensor | None = None,
        row_scale: Tensor | None = None,
        norm: MultiwayLayerNorm | None = None,
        activation: Activation = "none",
        scale: Tensor | None = None,
    ) -> Tensor:
        """residual, row_scale, activation and scale as in `routed_linear`; norm: of x, before the product."""
        x, before = normed(x, routing, norm)
        return routed_linear(
            x, self.weight, self.bias, routing,
            activation=activation, input_norm=before, residual=residual, scale=scale, row_scale=row_scale,
        )  # fmt: skip


class MultiwayLayerNorm(_Experts):
    """[T, D] to [T, D], with weight and bias [E, D]."""

    def __init__(self, experts: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(experts, width)), nn.Parameter(torch.zeros(experts, width))
        self.experts, self.eps = experts, eps

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return routed_layer_norm(x, self.weight, self.bias, routing, self.eps)


Before = tuple[Tensor, Tensor, float]


def normed(x: Tensor, routing: Routing, norm: MultiwayLayerNorm | None) -> tuple[Tensor, Before | None]:
    """x, and the norm as an operator takes it; a norm that is more than its tensors is called."""
    if norm is None:
        return x, None
    plain = are_plain((MultiwayLayerNorm,), norm)
    return (x, (norm.weight, norm.bias, norm.eps)) if plain else (norm(x, routing), None)


class MultiwayRMSNorm(_Experts):
    """[T, ..., D] over its last dimension, with weight [E, D]; every row of [T] has one expert."""

    def __init__(self, experts: int, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, width))
        self.experts, self.eps = experts, eps

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        n = x[:1].numel() // x.shape[-1] if len(x) else 1
        if n > 1:
            bounds = None if routing.bounds is None else tuple(n * b for b in routing.bounds)
            routing = dataclasses.replace(routing, offsets=n * routing.offsets, bounds=bounds)
        return routed_rms_norm(x.flatten(0, -2), self.weight, routing, self.eps).view_as(x)


class MultiwayFFN(nn.Module):
    """fc2(norm(gelu(fc1(x)))), the norm only with `sub_norm` (Magneto, arXiv:2210.06423)."""

    def __init__(self, experts: int, width: int, hidden: int, sub_norm: bool = False, eps: float = 1e-5):
        super().__init__()
        self.fc1 = MultiwayLinear(experts, width, hidden)
        self.norm = MultiwayLayerNorm(experts, hidden, eps) if sub_norm else None
        self.fc2 = MultiwayLinear(experts, hidden, width)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        norm: MultiwayLayerNorm | None = None,
    ) -> Tensor:
        """residual [T, N], scale [N] and row_scale [T] as in `routed_ffn`; norm: of x, before the first product."""
        fc1, fc2, inner = self.fc1, self.fc2, self.norm
        linears = are_plain((MultiwayLinear,), fc1, fc2)
        if not linears or (inner is not None and not are_plain((MultiwayLayerNorm,), inner)):
            h = fc1(x, routing, norm=norm, activation="gelu")
            return fc2(h, routing, residual, row_scale, inner, scale=scale)
        x, before = normed(x, routing, norm)
        return routed_ffn(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, routing,
            norm=None if inner is None else (inner.weight, inner.bias, inner.eps), input_norm=before,
            residual=residual, scale=scale, row_scale=row_scale,
        )  # fmt: skip


class MultiwayBlock(nn.Module):
    """BEiT-3's layer: x + out(norm(attention(qkv(norm(x))))), then x + ffn(norm(x)); only the attention is shared.

    Args:
        experts: E. width, heads, hidden: of the layer.
        sub_norm: norms also before `out` and before the second product of the FFN.
        drop_path: probability that a sample skips a branch in training, its image and its text together.
    """

    mesh: DeviceMesh | None = None  # of ranks that have its experts in shards

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        hidden: int,
        sub_norm: bool = True,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.heads, self.drop_path = _heads_of(width, heads), drop_path
        self.attention_norm = MultiwayLayerNorm(experts, width, eps)
        self.qkv = MultiwayLinear(experts, width, 3 * width)
        self.inner_norm = MultiwayLayerNorm(experts, width, eps) if sub_norm else None
        self.out = MultiwayLinear(experts, width, width)
        self.ffn_norm = MultiwayLayerNorm(experts, width, eps)
        self.ffn = MultiwayFFN(experts, width, hidden, sub_norm, eps)

    def forward(self, x: Tensor, routing: Routing, sees: Sequence[Sequence[str]] | None = None) -> Tensor:
        q, k, v = self.project(x, routing)
        return self.finish(x, packed_attention(q, k, v, routing, sees), routing)

    def project(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [T, heads, width / heads]."""
        qkv = self.qkv(x, routing, norm=self.attention_norm)
        q, k, v = qkv.unflatten(1, (3, -1, x.shape[1] // self.heads)).unbind(1)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, routing: Routing) -> Tensor:
        """The layer's output, from its input and what its heads found, both [T, width]."""
        probability = self.drop_path if self.training else 0.0
        x = self.out(attended, routing, x, path_scale(x, routing, probability, mesh=self.mesh), self.inner_norm)
        kept = path_scale(x, routing, probability, mesh=self.mesh)
        return self.ffn(x, routing, x, row_scale=kept, norm=self.ffn_norm)


class MoMEBlock(nn.Module):
    """VLMo's layer: shared norm and attention, then a norm and an FFN for each modality, each branch scaled.

    Args:
        experts: E. width, heads, hidden: of the layer.
        layer_scale: initial scale of both branches, shared by the experts; None for none.
        drop_path: probability that a sample skips a branch in training; where its parts have different experts, each
            part for itself.
    """

    mesh: DeviceMesh | None = None  # of ranks that have its experts in shards

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        hidden: int,
        layer_scale: float | None = 0.1,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.heads, self.drop_path = _heads_of(width, heads), drop_path
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # a key's bias would add the same to all scores of a query
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) if qkv_bias else None for _ in "qv")
        self.proj = nn.Linear(width, width)
        self.norm2, self.mlp = MultiwayLayerNorm(experts, width, eps), MultiwayFFN(experts, width, hidden)
        scaled = layer_scale is not None
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((width,), layer_scale)) if scaled else None for _ in range(2)
        )

    def forward(self, x: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
        """x [T, D]; bias [heads, P, P], of relative positions."""
        of_qkv = None
        if self.q_bias is not None and self.v_bias is not None:
            of_qkv = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        normed = self.norm1(x)
        if are_plain((nn.Linear,), self.qkv):
            qkv = F.linear(normed, self.qkv.weight, of_qkv)
        else:
            qkv = self.qkv(normed) if of_qkv is None else self.qkv(normed) + of_qkv
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        probability = self.drop_path if self.training else 0.0
        branch = self.proj(packed_attention(q, k, v, routing, bias=bias))
        branch = branch if self.gamma_1 is None else branch * self.gamma_1
        kept = path_scale(x, routing, probability, mesh=self.mesh)
        x = x + (branch if kept is None else branch * kept[:, None])
        kept = path_scale(x, routing, probability, True, self.mesh)
        return self.mlp(x, routing, x, self.gamma_2, kept, self.norm2)


class MoTBlock(nn.Module):
    """Mixture-of-Transformers' layer, and BAGEL's (Deng et al. 2025, arXiv:2505.14683): all but attention is routed.

    x + out(attention(norm(q), norm(k), v)), then x + down(silu(gate(norm(x))) up(norm(x))); norms are RMSNorms.

    Args:
        experts: E. width, heads, hidden: of the layer.
        kv_heads: heads of keys and values, each for heads / kv_heads of the queries; by default as many as heads.
        qkv_bias: of queries, keys and values. qk_norm: norms over each head's queries and keys.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        hidden: int,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads, self.kv_heads = _heads_of(width, heads), heads if kv_heads is None else kv_heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, expected a divisor of the {heads} heads")
        d = width // heads
        self.attention_norm, self.ffn_norm = (MultiwayRMSNorm(experts, width, eps) for _ in range(2))
        self.qkv = MultiwayLinear(experts, width, (heads + 2 * self.kv_heads) * d, qkv_bias)
        self.q_norm, self.k_norm = (MultiwayRMSNorm(experts, d, eps) if qk_norm else None for _ in "qk")
        self.out = MultiwayLinear(experts, width, width, bias=False)
        self.gate_up = MultiwayLinear(experts, width, 2 * hidden, bias=False)
        self.down = MultiwayLinear(experts, hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        sees: Sequence[Sequence[str]] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [T, D]; sees as in `packed_attention`; rotary: cosine and sine [T, D / heads] of each row's position."""
        h = self.qkv(self.attention_norm(x, routing), routing)
        q, k, v = h.unflatten(1, (-1, x.shape[1] // self.heads)).split([self.heads, *[self.kv_heads] * 2], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, routing), self.k_norm(k, routing)
        if rotary is not None:
            q, k = (_rotated(t, *rotary) for t in (q, k))
        x = self.out(packed_attention(q, k, v, routing, sees), routing, x)
        h = self.ffn_norm(x, routing)
        if not are_plain((MultiwayLinear,), self.gate_up, self.down):
            return self.down(self.gate_up(h, routing, activation="swiglu"), routing, x)
        return routed_ffn(
            h, self.gate_up.weight, None, self.down.weight, None, routing, activation="swiglu", residual=x
        )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of [T, H, d], the halves of d as pairs."""
    a, b = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]).to(x.dtype)


def from_bagel(state: Mapping[str, Tensor], experts: int = 2) -> dict[str, Tensor]:
    """A `MoTBlock`'s state from a layer's of BAGEL: names without `_moe_gen` are expert 0's, those with it expert 1's.

    A layer of Qwen2 or Qwen3 without `_moe_gen` begins all experts with its weights.

    Raises:
        ValueError: keys are left over, or missing.
    """
    left, found = dict(state), dict[str, Tensor]()
    for ours, theirs in _BAGEL.items():
        for of in ("weight", "bias"):
            names = [f"{name}.{of}" for name in theirs]
            if not any(name in left for name in names):
                continue
            if missing := [name for name in names if name not in left]:
                raise ValueError(f"state has no {', '.join(missing)}")
            each = [torch.cat([left.pop(name) for name in names])]
            if any(_generating(name) in left for name in names):
                each.append(torch.cat([left.pop(_generating(name)) for name in names]))
            if len(each) > 1 and experts != 2:
                raise ValueError(f"experts is {experts}, expected 2: state has two of {names[0]}")
            found[f"{ours}.{of}"] = torch.stack(each if len(each) == experts else each * experts)
    if left:
        raise ValueError(f"state has {', '.join(left)}, expected the names of BAGEL's layer")
    return found


def to_bagel(state: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The state of BAGEL's layer from that of a `MoTBlock` of two experts with so many heads."""
    found = dict[str, Tensor]()
    for key, experts in state.items():
        module, _, of = key.rpartition(".")
        names = [f"{name}.{of}" for name in _BAGEL[module]]
        shares = {"qkv": [heads, kv_heads, kv_heads], "gate_up": [1, 1]}.get(module, [1])
        unit = experts.shape[1] // sum(shares)
        for expert, of_expert in zip(experts, (names, list(map(_generating, names))), strict=True):
            found |= dict(zip(of_expert, expert.split([n * unit for n in shares]), strict=True))
    return found


_BAGEL = {
    "attention_norm": ["input_layernorm"],
    "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "out": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def _generating(name: str) -> str:
    """The name of the same parameter of the expert that generates images."""
    module, _, of = name.rpartition(".")
    outer, dot, inner = module.partition(".")
    return f"mlp_moe_gen.{inner}.{of}" if outer == "mlp" else f"{outer}{dot}{inner}_moe_gen.{of}"


def path_scale(
    x: Tensor, routing: Routing, probability: float, separately: bool = False, mesh: DeviceMesh | None = None
) -> Tensor | None:
    """The factor [T] of each row: 0 for samples drawn with `probability`, for others 1 over what is left of it.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382); None where nothing is dropped. `separately`: the parts of a
    sample that have different experts are drawn each for itself. `mesh`: of ranks that all take the first one's draw.
    """
    if probability == 0 or not len(x):
        return None
    columns = routing.experts if separately else 1
    factor = x.new_empty(len(routing.first), columns).bernoulli_(1 - probability) / (1 - probability)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, Shard

        # gathered: a compiler has to see the same graph on every rank, or may order the collectives differently
        factor = DTensor.from_local(factor[None], mesh, [Shard(0)], run_check=False).full_tensor()[0]
    return factor[routing.sample, routing.experts_of(len(x)) if separately else 0]


def _heads_of(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"width is {width} with {heads} heads, expected a multiple of the heads")
    return heads
