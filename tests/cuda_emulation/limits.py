"""What a card refuses: the operator raises, its next call works, and the library says which card it has no code for."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cuda_emulation.plugin import EMULATOR
from mmfuse.kernels._runtime import library
from mmfuse.kernels.points import farthest_points
from mmfuse.kernels.points.op import _MOST_COORDINATES, _SHARED_BYTES
from mmfuse.kernels.qformer import few_query_attention
from mmfuse.kernels.qformer.op import STATIC_BYTES, shared_bytes

SMALL, LARGE = torch.rand(1, 300, 3), torch.rand(1, _MOST_COORDINATES + 1, 3)


def card(shared_bytes: int, has_code: bool = True) -> None:
    EMULATOR.emulation_card(ctypes.c_size_t(shared_bytes), has_code)


def test_an_error_is_not_the_next_calls() -> None:
    card(101_376)
    with pytest.raises(RuntimeError, match="invalid argument"):
        farthest_points(LARGE, 4, backend="cuda")
    assert torch.equal(farthest_points(SMALL, 4, backend="cuda"), farthest_points(SMALL, 4, backend="torch"))


def test_the_shared_memory_of_many_points() -> None:
    card(_SHARED_BYTES)
    farthest_points(LARGE, 2, backend="cuda")
    card(_SHARED_BYTES - 1)
    with pytest.raises(RuntimeError, match="shared memory"):
        farthest_points(LARGE, 2, backend="cuda")


def test_the_shared_memory_of_many_keys() -> None:
    q, kv = torch.rand(1, 33, 1, 64).half(), torch.rand(1, 130, 1, 64).half()
    wanted = shared_bytes(33, 130, 64, 2) + STATIC_BYTES
    card(wanted)
    few_query_attention(q, kv, kv, backend="cuda")
    card(wanted - 1)
    with pytest.raises(RuntimeError, match="shared memory"):
        few_query_attention(q, kv, kv, backend="cuda")


def test_a_card_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    error_on = library.error_on.__wrapped__  # type: ignore[attr-defined]
    assert error_on(torch.device("cpu")) is None
    card(_SHARED_BYTES, has_code=False)
    assert "does not run on Old GPU: no kernel image" in error_on(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        farthest_points(SMALL, 4, backend="cuda")
