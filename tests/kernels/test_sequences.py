"""What attentions of other libraries get, which know sequences of rows: stand-ins with their documented arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels import few_query_attention, packed_attention
from mmfuse.kernels._runtime import sequences as libraries
from mmfuse.kernels.multiway import Routing, attention
from mmfuse.kernels.qformer import sequences
from mmfuse.kernels.qformer.arguments import Keys
from registered import reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a module in the place of one that is not installed."""

    def put(name: str, **members: Any) -> None:
        parts = name.split(".")
        for of in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            monkeypatch.setitem(sys.modules, of, ModuleType(of))
        vars(sys.modules[name]).update(members)
        forget()

    def forget() -> None:
        libraries.flash_function.cache_clear()
        libraries._xformers_is_missing.cache_clear()

    yield put
    forget()


def by_torch(q: Tensor, k: Tensor, v: Tensor, from_: list[int], to: list[int]) -> Tensor:
    """Each sequence by torch's attention; what is not written is no number."""
    out = torch.full_like(q, torch.nan)
    for a, b, c, e in zip(from_, from_[1:], to, to[1:], strict=False):
        given = (t.transpose(0, 1) for t in (q[a:b], k[c:e], v[c:e]))
        out[a:b] = F.scaled_dot_product_attention(*given).transpose(0, 1)
    return out


def one_by_one(q, k, v, from_, to, m, n, causal, deterministic):  # type: ignore[no-untyped-def]
    assert deterministic and not causal and from_.dtype == to.dtype == torch.int32
    assert q.dim() == k.dim() == 3 and k.shape == v.shape and len(from_) == len(to)
    assert from_.diff().max() <= m and to.diff().max() <= n and from_[0] == to[0] == 0
    return by_torch(q, k, v, from_.tolist(), to.tolist())


def of_version_2(  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False, deterministic=False
):
    return one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic)


def of_version_4(  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    deterministic=False,
):  # fmt: skip
    return one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic), None


class BlockDiagonalMask(SimpleNamespace):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):  # type: ignore[no-untyped-def]
        assert all(type(n) is int for n in (*q_seqlen, *kv_seqlen)) and len(q_seqlen) == len(kv_seqlen)
        return cls(q=q_seqlen, kv=kv_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):  # type: ignore[no-untyped-def]
    """Of [1, rows, heads, d], as many rows as the mask's sequences have."""
    assert query.dim() == 4 and len(query) == len(key) == len(value) == 1 and p == 0.0
    assert query.shape[1] == sum(attn_bias.q) and key.shape[1] == value.shape[1] == sum(attn_bias.kv)
    from_, to = ([sum(n[:i]) for i in range(len(n) + 1)] for n in (attn_bias.q, attn_bias.kv))
    return by_torch(query[0], key[0], value[0], from_, to)[None]


@pytest.fixture(params=["flash_attn", "flash_attn.cute", "xformers"])
def adapter(request: pytest.FixtureRequest, library: Any) -> Callable[..., Tensor]:
    if request.param == "xformers":
        library("xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
        sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
        return libraries.xformers
    library(request.param, flash_attn_varlen_func=of_version_2 if request.param == "flash_attn" else of_version_4)
    assert libraries.no_flash(0.0) is None
    undropped = None if request.param == "flash_attn" else "dropout is 0.5, this version has none"
    assert libraries.no_flash(0.5) == undropped
    return libraries.flash


def test_packed_attention(adapter: Callable[..., Tensor]) -> None:
    n, kept = (torch.tensor(t, device=DEVICE) for t in ([3, 5, 0, 4], [1, 2, 6, 3]))
    routing = Routing.from_splits(n, 7, kept)
    q, k, v = (torch.randn(28, 2, 8, device=DEVICE) for _ in range(3))
    (got,) = attention._by_sequences(adapter, q, k, v, routing.reading, [], 0.0)
    torch.testing.assert_close(got, packed_attention(q, k, v, routing, backend="torch"))


ROWS: dict[str, dict[str, Any]] = {
    "an image for each row": {},
    "shared": {"kv_index": [2, 0, 2, 2, 0]},
    "lengths": {"lengths": [4, 0, 2]},
    "lengths, shared": {"lengths": [4, 0, 2], "kv_index": [1, 2, 0, 2]},
    "packed": {"cu_seqlens": [1, 4, 4, 9]},
    "packed, shared": {"cu_seqlens": [1, 4, 4, 9], "kv_index": [2, 2, 1, 0]},
}


@pytest.mark.parametrize("one", [True, False], ids=["the same queries", "queries of each row"])
@pytest.mark.parametrize("name", ROWS)
def test_few_query_attention(name: str, one: bool, adapter: Callable[..., Tensor]) -> None:
    """Values and gradients, and none of what belongs to no image."""
    of = {key: torch.tensor(v, device=DEVICE) for key, v in ROWS[name].items()}
    packed = "cu_seqlens" in of
    rows = 1 if one else len(of.get("kv_index", range(3)))
    q = torch.randn(rows, 3, 2, 8, dtype=torch.float64, device=DEVICE).requires_grad_()
    shape = (11, 2, 8) if packed else (3, 5, 2, 8)
    k, v = (torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(2))

    def by_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = (of.get(name) for name in ("kv_index", "lengths", "cu_seqlens"))
        return sequences.attend(adapter, q, Keys(k, v, *given, 5), 0.0).o

    wanted = partial(few_query_attention, **of, longest=5 if packed else None, backend="torch")
    results = []
    for run in (by_library, lambda *given: wanted(*given).o):
        o = run(q, k, v)
        g = torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=DEVICE).view_as(o)
        results.append((o.detach(), *torch.autograd.grad(o, (q, k, v), g)))
    torch.testing.assert_close(*results)


def test_reasons(library: Any) -> None:
    library("flash_attn", flash_attn_varlen_func=lambda q, k, v: q)
    assert libraries.no_flash(0.0) == (
        "this flash_attn has no deterministic gradients, flash_attn.cute is not there: ModuleNotFoundError"
    )
    q, k = torch.randn(1, 3, 2, 12, device=DEVICE), torch.randn(1, 5, 2, 12, device=DEVICE)
    told = reasons(lambda: few_query_attention(q, k, k, return_lse=True))
    for name in ("flash_attn", "xformers"):
        assert {"d is 12, expected a multiple of 8 up to 256", "lse is asked for, which it keeps to itself"} <= {
            *told[name]
        }
    none = reasons(lambda: few_query_attention(q, k[:, :0], k[:, :0]))
    assert "there are no queries or no keys" in none["xformers"]
    if DEVICE == "cpu":
        assert "device is cpu" in told["flash_attn"] and "device is cpu" in told["xformers"]
    else:
        told = reasons(lambda: few_query_attention(q.double(), k.double(), k.double()))
        assert "dtype is torch.float64, it has 32 bits at most" in told["xformers"]
