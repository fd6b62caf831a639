"""Codebooks: the nearest code, and a training step of BEiT-v2's quantizer, against the published lines.

N rows of D dimensions against K unit codes. The scores take 2 N K D floating-point
operations; everything else is one pass over the rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.bench.cases import Case, Check, relative
from mmfuse.bench.inputs import computed, differentiated, leaf, unit, weighted
from mmfuse.bench.providers import eager, faiss, formula, products, then
from mmfuse.fused.quantizer import NormEMAVectorQuantizer
from mmfuse.kernels import nearest_code, vector_quantize
from mmfuse.kernels._runtime import use_backend
from mmfuse.kernels.codebook import code_statistics, linear_argmax

_BETA, _DECAY = 1.0, 0.99


def _differing(got: Tensor, want: Tensor) -> float:
    """The share of rows with another code: the published lines take the code of a rounded distance."""
    return (got != want).double().mean().item()


def _moved(got: Tensor, want: Tensor) -> float:
    """Of gradients the share of rows with another one, which another code explains; of a loss its distance."""
    if got.dim() == 0:
        return relative(got, want)
    gap, size = (t.double().norm(dim=1) for t in (got - want, want))
    return 1 - (gap <= 0.1 * size).double().mean().item()


# --- the nearest code -----------------------------------------------------------------------------------------------


def distances(z: Tensor, codebook: Tensor) -> Tensor:
    """BEiT-v2 and taming-transformers: the matrix of distances and its argmin."""
    d = z.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * torch.einsum("bd,nd->bn", z, codebook)
    return torch.argmin(d, 1).double()


def beit2_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """BEiT-v2's quantizer in evaluation: the codes and how often each was used, from a one-hot matrix."""
    codes = distances(z, codebook).long()
    F.embedding(codes, codebook)
    F.one_hot(codes, len(codebook)).type(z.dtype).sum(0)
    return codes.double()


def loop(z: Tensor, codebook: Tensor) -> Tensor:
    """What one would write by hand: an argmax for each block of rows."""
    bias = -0.5 * codebook.pow(2).sum(1)
    return torch.cat([torch.addmm(bias, block, codebook.t()).argmax(1) for block in z.split(512)]).double()


def _vector_quantize_pytorch(device: torch.device, dtype: torch.dtype) -> Any:
    """vector-quantize-pytorch's codebook in evaluation."""
    from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

    @cache
    def module(k: int, d: int) -> Any:
        return Codebook(d, k).to(device).eval()

    def run(z: Tensor, codebook: Tensor) -> Tensor:
        book = module(*codebook.shape)
        book.embed.copy_(codebook)
        return book(z[None])[1][0].double()

    return run


def dalle_codes(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DALL-E's dVAE: the argmax of the encoder's last convolution, 1 x 1, over its rows."""
    return F.linear(x, weight, bias).argmax(1).double()


def _features(device: torch.device, dtype: torch.dtype, N: int, K: int, D: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in ((N, D), (K, D), (K,)))


# --- a training step of BEiT-v2's quantizer -------------------------------------------------------------------------


def beit2(z: Tensor, codebook: Tensor, sizes: Tensor, moved: Tensor) -> Tensor:
    """norm_ema_quantizer.py in training; the codes that its moving average leaves are written to `moved`."""
    k, d = codebook.shape
    z = F.normalize(z.permute(0, 2, 3, 1), p=2, dim=-1)
    flat = z.reshape(-1, d)
    codes = distances(flat, codebook).long()
    z_q = F.embedding(codes, codebook).view(z.shape)
    one_hot = F.one_hot(codes, k).type(flat.dtype)
    with torch.no_grad():
        bins = one_hot.sum(0)
        sizes.mul_(_DECAY).add_(bins, alpha=1 - _DECAY)
        empty = bins == 0
        means = F.normalize((flat.t() @ one_hot / bins.masked_fill(empty, 1.0)).t(), p=2, dim=-1)
        means = torch.where(empty[:, None], codebook, means.to(codebook.dtype))
        moved.copy_(F.normalize(codebook * _DECAY + means * (1 - _DECAY), p=2, dim=-1))
    loss = _BETA * F.mse_loss(z_q.detach(), z)
    return loss + (z + (z_q - z).detach()).float().mean()


def _step(z: Tensor, codebook: Tensor, sizes: Tensor, moved: Tensor, backend: str | None = None) -> Tensor:
    quantizer = _module(*codebook.shape)
    moved.copy_(codebook)
    quantizer.embedding.weight.data, quantizer.cluster_size = moved, sizes
    with use_backend(backend) if backend else nullcontext():
        z_q, loss, _ = quantizer(z)
    return loss + z_q.float().mean()


@cache
def _module(k: int, d: int) -> NormEMAVectorQuantizer:
    return NormEMAVectorQuantizer(k, d, _BETA, _DECAY)


def _maps(device: torch.device, dtype: torch.dtype, N: int, K: int, D: int) -> tuple[Tensor, ...]:
    z, codebook = leaf(device, dtype, 1, D, N, 1), unit(device, dtype, K, D)
    return z, codebook, torch.zeros(K, device=device), torch.empty_like(codebook)


# --- cases ----------------------------------------------------------------------------------------------------------


def _flops(mode: str, N: int, K: int, D: int) -> float:
    return 2 * N * K * D


_case = partial(
    Case,
    # BEiT-v2: 196 patches of 16 to 1024 images
    cpu=[{"N": n, "K": 8192, "D": 32} for n in (784, 3136, 12544, 50176)],
    cuda=[{"N": n, "K": 8192, "D": 32} for n in (12544, 50176, 200704)],
    growth="N",
    flops=_flops,
    anchors=products(lambda z, codebook, *_: [(z.reshape(-1, codebook.shape[1]), codebook, 1)], partial(_flops, "fwd")),
)

CASES = [
    _case(
        name="nearest_code",
        op="nearest_code",
        ours=then(Tensor.double, nearest_code),
        peers={
            "beit2": eager(beit2_codes),
            **formula(distances),
            "loop": eager(loop),
            "vector-quantize-pytorch": _vector_quantize_pytorch,
            "faiss": faiss("IndexFlatL2", 1, lambda values, index: index[:, 0].double()),
        },
        definitions=("eager", "beit2"),
        inputs=lambda device, dtype, N, K, D: (unit(device, dtype, N, D), unit(device, dtype, K, D)),
        outputs=("codes",),
        small={"N": 70, "K": 50, "D": 16},
        bytes=lambda mode, itemsize, N, K, D: (N + K) * D * itemsize + 8 * N,
        modes=("fwd",),
        distance=_differing,
    ),
    _case(
        name="linear_argmax",
        op="linear_argmax",
        ours=then(Tensor.double, linear_argmax),
        peers=formula(dalle_codes),
        inputs=_features,
        outputs=("codes",),
        # 14 x 14 codes of 112 x 112 pixels, as BEiT takes them
        cpu=[{"N": n, "K": 8192, "D": 2048} for n in (196, 784, 3136)],
        cuda=[{"N": n, "K": 8192, "D": 2048} for n in (12544, 50176)],
        small={"N": 70, "K": 50, "D": 16},
        bytes=lambda mode, itemsize, N, K, D: ((N + K) * D + K) * itemsize + 8 * N,
        modes=("fwd",),
        distance=_differing,
    ),
    _case(
        name="quantizer",
        op="nearest_code",
        ours=_step,
        peers=formula(beit2),
        inputs=_maps,
        outputs=("loss", "d z"),
        small={"N": 100, "K": 40, "D": 16},
        # z is read, z_q and dz are written, with what comes back for z_q
        bytes=lambda mode, itemsize, N, K, D: ((2 if mode == "fwd" else 4) * N + 2 * K) * D * itemsize,
        distance=_moved,
    ),
]


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_inputs(device: torch.device) -> dict[str, Tensor]:
    return {"z": torch.randn(45, 24, device=device), "codebook": torch.randn(140, 24, device=device)}


def _statistics_inputs(device: torch.device) -> dict[str, Tensor]:
    return {"z": torch.randn(200, 24, device=device), "codes": torch.randint(0, 20, (200,), device=device)}


def _both(z: Tensor, codebook: Tensor, backend: str | None) -> list[Tensor]:
    return [nearest_code(z, codebook, metric=metric, backend=backend) for metric in ("euclidean", "cosine")]


def _quantize(z: Tensor, codebook: Tensor, backend: str | None) -> Tensor:
    z_q, _, loss = vector_quantize(z, codebook, beta=0.25, gradient="rotation", backend=backend)
    return loss + weighted(z_q) / z_q.numel()


CHECKS = [
    Check("nearest_code", "N=45 K=140 D=24", _check_inputs, computed(_both, "euclidean", "cosine")),
    Check("linear_argmax", "N=45 K=140 D=24", _check_inputs, computed(linear_argmax, "codes")),
    Check(
        "code_statistics",
        "N=200 K=20 D=24",
        _statistics_inputs,
        computed(lambda z, codes, backend: code_statistics(z, codes, 20, backend=backend), "counts", "sums"),
    ),
    Check("vector_quantize", "N=45 K=140 D=24", _check_inputs, differentiated(_quantize)),
]
