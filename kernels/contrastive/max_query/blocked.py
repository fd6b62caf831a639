"""The largest similarity over the queries as a loop over blocks of images, so that no [B, Q, N] tensor is held.

u_ij = max_k <q_ik, t_j>,  k*_ij the first k that reaches it        q [B, Q, D], t [N, D]
dq_ik = sum_j [k*_ij = k] g_ij t_j,   dt_j = sum_i g_ij q_i,k*_ij   g = dL/du [B, N]
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime import products
from mmfuse.kernels._runtime.dtypes import accumulation_dtype

# a block of products stays in the cache between the matrix product and the maximum
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# the compiled gradient is sparse: its images are copied in blocks only to be float32
_SPARSE_ROWS = 256


def index_dtype(queries: int) -> torch.dtype:
    return torch.uint8 if queries <= 256 else torch.int32


class TorchTile:
    """The passes over a block of m images in plain torch, any float dtype, any device."""

    grad_rows = None  # the gradient holds a block of the products' size

    @staticmethod
    def query_max(s: Tensor, u: Tensor, k: Tensor) -> None:
        """The maximum u [m, N] of s [m, Q, N] over its queries, and the first index k that reaches it."""
        largest, index = s.max(1)
        u.copy_(largest)
        k.copy_(index)

    @staticmethod
    def query_grad(g: Tensor, k: Tensor, q: Tensor, t: Tensor, dq: Tensor, dt: Tensor) -> None:
        """Write dq [m, Q, D] and add to dt [N, D]; an empty one is not wanted."""
        m, queries, d = q.shape
        # each text's gradient, in the row of the query that it goes to: both sums are matrix products
        a = g.new_zeros(m, queries, len(t)).scatter_(1, k.long()[:, None], g[:, None]).flatten(0, 1)
        if dq.numel():
            products.mm(a, t, dq.view(-1, d))
        if dt.numel():
            products.add_mm_(dt, a.t(), q.reshape(-1, d))


def compiled_tile(namespace: Any) -> SimpleNamespace:
    """The same passes from the compiled part, in float32."""
    return SimpleNamespace(
        query_max=namespace.query_max.default, query_grad=namespace.query_grad.default, grad_rows=_SPARSE_ROWS
    )


def _spans(image: Tensor, n: int, rows: int | None = None) -> list[tuple[int, int]]:
    """Of `rows` images, or as many as have a block's worth of products with n texts."""
    b, queries, _ = image.shape
    if rows is None:
        rows = max(1, _BLOCK_BYTES[image.device.type] // max(1, queries * n * accumulation_dtype(image.dtype).itemsize))
    return [(i, min(i + rows, b)) for i in range(0, b, rows)]


def maximum(tile: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """(u [B, N] in the accumulation dtype, k* [B, N])."""
    (b, queries, d), n = image.shape, len(text)
    acc = accumulation_dtype(image.dtype)
    u = torch.empty(b, n, dtype=acc, device=image.device)
    k = torch.empty(b, n, dtype=index_dtype(queries), device=image.device)
    t = products.operand(text, acc).t()
    spans = _spans(image, n) if n else []
    block = torch.empty(max((j - i for i, j in spans), default=0) * queries, n, dtype=acc, device=image.device)
    for i, j in spans:
        q = products.operand(image[i:j].reshape(-1, d), acc)
        s = products.mm(q, t, block[: len(q)])
        tile.query_max(s.view(j - i, queries, n), u[i:j], k[i:j])
    return u, k


def gradient(
    tile: Any, g: Tensor, k: Tensor, image: Tensor, text: Tensor, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    """(dq [B, Q, D], dt [N, D]) for g [B, N] in the accumulation dtype; what is not needed is empty."""
    acc, empty = g.dtype, g.new_empty(0)
    dq = image.new_zeros(image.shape if need_image else (0,))
    dt = text.new_zeros(text.shape if need_text else (0,), dtype=acc)
    t = text.to(acc).contiguous()
    for i, j in _spans(image, len(text), tile.grad_rows):
        q = image[i:j].to(acc).contiguous()
        part = empty if not need_image else dq[i:j] if image.dtype == acc else torch.empty_like(q)
        tile.query_grad(g[i:j], k[i:j], q, t, part, dt)
        if need_image and image.dtype != acc:
            dq[i:j] = part
    return dq, dt.to(text.dtype)
