"""Cosmos 3's `DomainAwareLinear`, a linear layer for each embodiment, without a weight gathered for each token.

diffusers takes every token's matrix out of the table. Here the tokens of a domain lie together, and its matrix is read
where it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels import Routing, routed_linear
from mmfuse.kernels._runtime.arguments import autocast_dtype
from mmfuse.kernels._runtime.dispatch import forced_backend


def forward(linear: Any, x: Tensor, domain_id: Tensor) -> Tensor:
    """x [T, K] or [B, S, K] with T or B domains; its own forward runs in a graph, and for what it refuses."""
    table, bias, experts = linear.fc.weight, linear.bias.weight, linear.num_domains
    ids = domain_id.reshape(-1).to(x.device, torch.long)
    fits = x.dim() in (2, 3) and x.shape[0] == len(ids) and x.shape[-1] == linear.input_size
    fits = fits and (x.dtype == table.dtype or autocast_dtype(x) is not None)
    if torch.compiler.is_compiling() or not fits or bool(((ids < 0) | (ids >= experts)).any()):
        return type(linear).forward(linear, x, domain_id)
    routing = Routing.from_ids(ids if x.dim() == 2 else ids.repeat_interleave(x.shape[1]), experts)
    if routing.bounds is None:  # the host has waited for the domains already, as it does in diffusers
        routing = dataclasses.replace(routing, bounds=tuple(routing.offsets.tolist()))
    weight = table.view(experts, linear.input_size, linear.output_size).transpose(1, 2)
    within = bias.dtype == (autocast_dtype(x) or x.dtype)
    y = routing.unpack(routed_linear(routing.pack(x.flatten(0, -2)), weight, bias if within else None, routing))
    y = y.view(*x.shape[:-1], linear.output_size)
    # diffusers adds a bias of a wider dtype to the product of autocast as it is
    return y if within else y + F.embedding(ids, bias).view(len(ids), *[1] * (x.dim() - 2), -1)


def few_gathered(linear: Any, x: Any = None, domain_id: Any = None) -> bool:
    """Whether so few weights are gathered that diffusers' own code is the faster one, measured on a CPU."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or forced_backend() is not None:
        return False
    n = x.shape[0]
    return n * linear.input_size * linear.output_size < 1 << 23 or n < 4 * linear.num_domains


def reason_against(linear: Any) -> str | None:
    """Why a layer has to keep its own forward, or None."""
    tables = linear.fc, linear.bias
    if any(m.padding_idx is not None or m.max_norm is not None or m.sparse or m.scale_grad_by_freq for m in tables):
        return "its tables have a padding_idx, a max_norm, sparse gradients or such scaled by frequency"
    return None
