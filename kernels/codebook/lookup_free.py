"""Codes that are computed, not looked up: finite scalar quantization, and the entropies of lookup-free quantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels._runtime.arguments import check, constant
from mmfuse.kernels._runtime.dtypes import accumulation_dtype


def fsq(z: Tensor, levels: Sequence[int], *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization: every dimension bounded and rounded to its own levels, straight through.

    round(h tanh(z + atanh(o / h)) - o) / (L // 2) with h = (L - 1) 1.001 / 2 and o = 1/2 for an even L, else 0
    (Mentzer et al. 2024); `symmetric`: 2 floor((L - 1) (tanh(z) + 1) / 2 + 1/2) / (L - 1) - 1 (Parker et al. 2024).

    Args:
        z: [..., D], float16, bfloat16, float32 or float64; computed in float32 at least.
        levels: D numbers of levels >= 2; at least 3 unless `symmetric`.

    Returns:
        (z_q in z's shape and dtype, codes int64 [...]); the first dimension of a code is the fastest. The gradient is
        that without the rounding. Deterministic.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if not (isinstance(z, Tensor) and z.is_floating_point()):
        raise TypeError(f"z is {z.dtype if isinstance(z, Tensor) else type(z).__name__}, expected floating-point rows")
    if z.dim() < 1 or z.shape[-1] != len(levels):
        raise ValueError(f"z has shape {tuple(z.shape)}, expected [..., {len(levels)}], a level for each dimension")
    if min(levels) < (2 if symmetric else 3):
        raise ValueError(f"levels is {tuple(levels)}, expected at least {2 if symmetric else 3} of each dimension")
    x = z.to(accumulation_dtype(z.dtype))
    L = constant(levels, z.device).to(x.dtype)
    if symmetric:
        bounded, offset = (L - 1) * (x.tanh() + 1) / 2, torch.zeros_like(L)
        unit = (L - 1) / 2
        level = (bounded + 0.5).floor()
        value = level / unit - 1
    else:
        half = (L - 1) * 1.001 / 2
        offset = torch.where(L % 2 == 0, 0.5, 0.0).to(L)
        bounded = (x + (offset / half).atanh()).tanh() * half - offset
        unit = (L / 2).floor()
        rounded = bounded.round()
        value, level = rounded / unit, rounded + unit
    straight = bounded / unit
    basis = F.pad(L[:-1].long().cumprod(0), (1, 0), value=1)
    codes = (level.detach().long() * basis).sum(-1)
    return (straight + (value - straight).detach()).to(z.dtype), codes


def lfq_entropy(x: Tensor, *, inv_temperature: float = 100.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both entropies of lookup-free quantization without the [N, 2^D] probabilities of its codes.

    The softmax over codes c in {-scale, scale}^D of 2 inv_temperature <x, c> is a product over bits, each
    sigma(4 inv_temperature scale x_j) (Yu et al. 2024, equation 5): a row's entropy is the sum of its bits', and the
    mean probability of a code is an element of P_highT P_low / N, with the probabilities [N, 2^(D/2)] of either half
    of the bits: one product of 2 N 2^D FLOPs.

    Args:
        x: [N, D], float16, bfloat16, float32 or float64; D up to about 20.
        inv_temperature: of the softmax.
        scale: the magnitude of a code's elements.

    Returns:
        (the mean entropy of a row, the entropy of the mean), in nats, in float32 (float64 for float64). NaN without
        rows. Differentiable in x. Deterministic where torch's matrix product is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check("x", x, ("N", "D"))
    if x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one bit")
    logits = 4 * inv_temperature * scale * x.to(accumulation_dtype(x.dtype))
    # log(1 + e^-a) + a sigma(-a) of a = |logit|: no large numbers cancel
    size = logits.abs()
    of_rows = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1).mean()
    bits = torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], 2)
    high, low = (_products(half) for half in bits.tensor_split([x.shape[1] // 2], dim=1))
    p = high.t() @ (low / x.shape[0])
    # entr has the slope inf at a code that no row can reach, and its gradient would be inf times 0
    return of_rows, -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def _products(bits: Tensor) -> Tensor:
    """[N, 2^m] probabilities of every pattern of m bits [N, m, 2]."""
    p = bits.new_ones(bits.shape[0], 1)
    for bit in bits.unbind(1):
        p = (p[:, :, None] * bit[:, None]).flatten(1)
    return p
