"""The meaning of a Q-Former's operations, against dense formulas and against each other, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.qformer.arguments import Tokens
from mmfuse.kernels.qformer.reference import (
    absorbed,
    few_query_attention,
    fold_value_bias,
    project_kv,
    unpacked,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM, WIDTH = 3, 4, 10  # of the attention, and of the image's tokens
D = HEADS * HEAD_DIM


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One row's attention, [Q, H, d] over [N, H, d], head by head."""
    scores = torch.einsum("qhd,nhd->hqn", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqn,nhd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


# --- keys and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", ["never", "for each layer", "once"])
def test_project_kv_is_a_product_for_each_layer(normalised: str) -> None:
    layers, x = 3, normal(2, 5, WIDTH)
    weight, bias = normal(layers, 2, D, WIDTH), normal(layers, 2, D)
    norm = None
    if normalised != "never":
        shape = (layers, WIDTH) if normalised == "for each layer" else (WIDTH,)
        norm = normal(*shape), normal(*shape), 1e-5
    kv = project_kv(x, weight, bias, HEADS, norm)
    assert kv.shape == (2, 5, layers, 2, HEADS, HEAD_DIM)
    for i in range(layers):
        seen = x
        if norm is not None:
            of_layer = (t[i] if t.dim() == 2 else t for t in norm[:2])
            seen = F.layer_norm(x, (WIDTH,), *of_layer, norm[2])
        k, v = (F.linear(seen, weight[i, j], bias[i, j]) for j in range(2))
        dropped = kv[:, :, i, 0].flatten(2) - k
        close(dropped, dropped[:1, :1].expand_as(dropped))  # the same for all keys
        close(kv[:, :, i, 1].flatten(2), v)


def test_a_norm_may_come_after_the_product() -> None:
    """As statistics of a row of x at the product with weights alone: (x - mean) rstd W = rstd (x W - mean sum(W))."""
    x, weight, gamma, beta = 3 * normal(5, WIDTH) + 1, normal(1, 2, D, WIDTH), normal(WIDTH), normal(WIDTH)
    folded = weight[0, 1] * gamma
    mean, rstd = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    want = rstd * (x @ folded.T - mean * folded.sum(1)) + weight[0, 1] @ beta
    close(project_kv(x, weight, None, HEADS, (gamma, beta, 1e-5))[:, 0, 1].flatten(1), want)


def test_the_bias_of_a_key_changes_nothing_and_has_no_gradient() -> None:
    x, weight, bias = normal(2, 5, WIDTH), normal(1, 2, D, WIDTH), normal(1, 2, D).requires_grad_()
    q = normal(2, 3, HEADS, HEAD_DIM)
    k, v = project_kv(x, weight, bias, HEADS)[:, :, 0].unbind(2)
    o = few_query_attention(q, k, v).o
    own = (F.linear(x, weight[0, j], bias[0, j]).unflatten(-1, (HEADS, HEAD_DIM)) for j in range(2))
    close(o, few_query_attention(q, *own).o)
    o.square().sum().backward()
    assert not bias.grad[0, 0].any() and bias.grad[0, 1].all()


def test_gradients_of_a_folded_norm_without_that_of_x() -> None:
    layers, x = 3, normal(2, 5, WIDTH)
    weight, bias, gamma, beta = (
        normal(*shape).requires_grad_()
        for shape in ((layers, 2, D, WIDTH), (layers, 2, D), (layers, WIDTH), (layers, WIDTH))
    )
    dy = normal(2, 5, layers, 2, HEADS, HEAD_DIM)
    project_kv(x, weight, bias, HEADS, (gamma, beta, 1e-5)).backward(dy)
    x_hat = F.layer_norm(x, (WIDTH,), eps=1e-5).flatten(0, 1)
    dy = dy.flatten(4).flatten(0, 1)  # [B N, L, 2, D]
    product = torch.einsum("nljd,ne->ljde", dy, x_hat)
    total = dy.sum(0) * integers(0, 1)[:, None]  # a key's bias is not there
    w = weight.detach()
    close(gamma.grad, (w * product).sum((1, 2)))
    close(beta.grad, torch.einsum("ljde,ljd->le", w, total))
    close(weight.grad, product * gamma.detach()[:, None, None] + total[..., None] * beta.detach()[:, None, None])
    close(bias.grad, total)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3, 32])
def test_attention_of_rows_that_share_images(queries: int) -> None:
    q, (k, v) = normal(4, queries, HEADS, HEAD_DIM), normal(2, 3, 7, HEADS, HEAD_DIM)
    of, lengths = integers(2, 0, 2, 1), integers(7, 1, 4)
    o, lse = few_query_attention(q, k, v, of, lengths)
    for b, i in enumerate(of.tolist()):
        n = lengths[i]
        want = dense(q[b], k[i, :n], v[i, :n])
        close(o[b], want[0])
        close(lse[b], want[1])


def test_the_same_queries_for_every_image() -> None:
    q, (k, v) = normal(1, 3, HEADS, HEAD_DIM), normal(2, 4, 7, HEADS, HEAD_DIM)
    got, want = few_query_attention(q, k, v), few_query_attention(q.expand(4, -1, -1, -1), k, v)
    close(got.o, want.o)
    close(got.lse, want.lse)


def test_a_row_without_keys_is_0_and_so_are_its_gradients() -> None:
    q, k, v = (normal(2, 3, HEADS, HEAD_DIM).requires_grad_() for _ in range(3))
    o, lse = few_query_attention(q, k, v, lengths=integers(0, 2))
    assert not o[0].any() and lse[0].eq(-torch.inf).all() and lse[1].isfinite().all()
    o.square().sum().backward()
    for t in (q, k, v):
        assert not t.grad[0].any() and t.grad[1].any()


def test_gradients_of_shared_images_are_summed() -> None:
    q, of = normal(3, 2, HEADS, HEAD_DIM), integers(1, 1, 0)
    k, v = (normal(2, 5, HEADS, HEAD_DIM).requires_grad_() for _ in range(2))
    g = normal(3, 2, HEADS, HEAD_DIM)
    got = torch.autograd.grad(few_query_attention(q, k, v, of).o, (k, v), g)
    want = [torch.zeros_like(k), torch.zeros_like(v)]
    for b, i in enumerate(of.tolist()):
        for total, part in zip(want, torch.autograd.grad(dense(q[b], k[i], v[i])[0], (k, v), g[b]), strict=True):
            total += part
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_packed_keys() -> None:
    q, (k, v) = normal(3, 2, HEADS, HEAD_DIM), normal(2, 9, HEADS, HEAD_DIM)
    bounds = [0, 4, 4, 9]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    (padded_k, lengths), (padded_v, _) = unpacked(k, cu_seqlens, 5), unpacked(v, cu_seqlens, 5)
    o = few_query_attention(q, padded_k, padded_v, lengths=lengths).o
    for b in (0, 2):
        rows = slice(bounds[b], bounds[b + 1])
        close(o[b], dense(q[b], k[rows], v[rows])[0])
    assert not o[1].any()


def test_dropout_drops_probabilities_and_keeps_their_mean() -> None:
    q, k = normal(1, 1, 1, HEAD_DIM), normal(2000, 8, 1, HEAD_DIM)
    v = torch.eye(8, dtype=torch.float64, device=DEVICE)[None, :, None].expand(2000, -1, -1, -1)
    torch.manual_seed(0)
    o = few_query_attention(q, k, v, dropout=0.25).o.flatten(1)  # the probabilities themselves
    p = few_query_attention(q, k, v).o.flatten(1)
    kept = o != 0
    close(o[kept], p[kept] / 0.75)
    # 16000 draws: 4 standard deviations
    assert abs(kept.double().mean().item() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / kept.numel())
    torch.manual_seed(0)
    assert torch.equal(o, few_query_attention(q, k, v, dropout=0.25).o.flatten(1))


# --- weights on the other side --------------------------------------------------------------------------------------


def test_absorbed_is_materialised_with_the_biases_dropped_and_folded() -> None:
    x, q = normal(2, 7, WIDTH), normal(2, 3, HEADS, HEAD_DIM)
    weight, bias, out, out_bias = normal(1, 2, D, WIDTH), normal(1, 2, D), normal(6, D), normal(6)
    k, v = (F.linear(x, weight[0, j], bias[0, j]).unflatten(-1, (HEADS, HEAD_DIM)) for j in range(2))
    want = F.linear(few_query_attention(q, k, v).o.flatten(2), out, out_bias)
    got = absorbed(q, Tokens(x, *weight[0], None, None, None)).o.flatten(2)
    close(F.linear(got, out, fold_value_bias(out, out_bias, bias[0, 1])), want)
