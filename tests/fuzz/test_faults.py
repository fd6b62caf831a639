"""The properties can fail: each implementation of a few operators with one fault planted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from fuzz.calls import of  # noqa: E402
from fuzz.properties import check  # noqa: E402
from fuzz.strategies import DEVICE  # noqa: E402
from mmfuse.kernels._runtime import operators  # noqa: E402

Pass = Callable[..., Any]


def contiguous(x: Tensor) -> Tensor:
    """What lies in memory where x would if it were contiguous."""
    fits = x.storage_offset() + x.numel() <= x.untyped_storage().nbytes() // x.element_size()
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()) if fits else x


def ignored_strides(method: Pass) -> Pass:
    return lambda x, *others: method(contiguous(x), *others)


def written_argument(method: Pass) -> Pass:
    def call(x: Tensor, *others: Any) -> Any:
        found = method(x, *others)
        x.detach().neg_()
        return found

    return call


def two_runs(method: Pass) -> Pass:
    runs = []

    def call(*args: Any) -> Any:
        runs.append(0)
        first, *others = method(*args)
        return first * (1 + 1e-6 * (len(runs) % 2 == 0)), *others

    return call


def last_row(method: Pass) -> Pass:
    def call(*args: Any) -> Any:
        row_max, row_sum, *others = method(*args)
        return row_max, torch.cat([row_sum[:-1], 1.5 * row_sum[-1:]]), *others

    return call


def scaled_gradient(method: Pass) -> Pass:
    def call(*args: Any) -> Any:
        dx, *others = method(*args)
        return None if dx is None else 1.1 * dx, *others

    return call


def hidden_nan(method: Pass) -> Pass:
    return lambda *args: tuple(t if t is None else t.nan_to_num() for t in method(*args))


def off_by_one(method: Pass) -> Pass:
    return lambda x, weight, *others: (method(x, weight, *others) + 1) % len(weight)


def forgotten_mask(method: Pass) -> Pass:
    return lambda x, weight, scale, bias, mask, exact: method(x, weight, scale, bias, None, exact)


# where, what, and how it is noticed
FAULTS = (
    ("clip_loss", "stats", last_row, "error"),
    ("clip_loss", "stats", ignored_strides, "error|finite"),
    ("clip_loss", "stats", written_argument, "wrote into an argument"),
    ("clip_loss", "stats", two_runs, "differs between two runs"),
    ("clip_loss", "grad", scaled_gradient, "error"),
    ("siglip_loss", "sigmoid", hidden_nan, "where float64 has nan"),
    ("nearest_code", "code_argmax", off_by_one, "is tensor"),
    ("nearest_code", "code_argmax", forgotten_mask, "is tensor"),
    ("nearest_code", "code_argmax", ignored_strides, "is tensor"),
)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "triton"])
@pytest.mark.parametrize("name, method, fault, seen", FAULTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_planted_fault_is_found(name, method, fault, seen, backend, monkeypatch):
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("the tensors are on a GPU")
    implementation = operators()[name].implementations[backend]
    inner = implementation.passes

    class Planted:
        @functools.cached_property
        def faulty(self) -> Any:
            return fault(getattr(inner, method))

        def __getattr__(self, attribute: str) -> Any:
            return self.faulty if attribute == method else getattr(inner, attribute)

    monkeypatch.setattr(implementation, "passes", Planted())

    @settings(
        max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(of(name, (1, 3, 5), (torch.float32,), "negated"))
    def holds(call):
        check(call, (backend,))

    with pytest.raises(AssertionError, match=seen):
        holds()
