"""CUDA graphs of whole encoders; without a GPU against a graph that notes and repeats what was called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse.fused import QFormer, QFormerConfig, captured, graphs


class Graph:
    """Repeats the function that was called while it was open."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call()


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graph that is open, if one is."""
    opened: list[Graph] = []

    @contextmanager
    def open_(graph: Graph) -> Iterator[None]:
        opened.append(graph)
        yield
        opened.pop()

    for name, value in (
        ("CUDAGraph", Graph), ("graph", open_), ("Stream", Stream), ("current_stream", Stream),
        ("stream", lambda side: nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    # tensors of a CPU pass for such of a GPU
    monkeypatch.setattr(graphs, "_ON", "cpu")
    return opened


def test_calls_are_of_their_own_inputs(noted: list[Graph]) -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    seen: list[bool] = []

    def fn(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        seen.append(torch.is_grad_enabled())
        out = x * weight + y
        if noted:
            noted[0].calls.append(lambda: out.copy_(x * weight + y))
        return {"out": out}

    x, y = torch.ones(4, 2), torch.zeros(4, 2)
    run = captured(fn, x, y)
    assert seen == [False] * 4
    first = run(x + 1, y)["out"]
    second = run(x, y + 5)["out"]
    assert len(seen) == 4 and not first.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(first, 2 * weight.expand(4, 2))
        torch.testing.assert_close(second, weight.expand(4, 2) + 5)
        weight += 1
        torch.testing.assert_close(run(x, y)["out"], weight.expand(4, 2))
    assert x.eq(1).all() and y.eq(0).all()


def test_what_does_not_fit(noted: list[Graph]) -> None:
    run = captured(torch.neg, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"inputs\[0\] has shape \(3, 2\), expected \[2, 3\], as the example's"):
        run(torch.ones(3, 2))
    with pytest.raises((TypeError, ValueError), match=r"inputs\[0\] .*float64"):
        run(torch.ones(2, 3).double())
    with pytest.raises(TypeError, match="2 inputs, expected 1"):
        run(torch.ones(2, 3), torch.ones(2, 3))


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match=r"inputs\[0\] is on cpu, expected a cuda device"):
        captured(torch.neg, torch.ones(1))


@pytest.mark.gpu
def test_a_q_former_is_the_same() -> None:
    config = QFormerConfig(24, 64, 2, 4, 128, text=False)
    model = QFormer(config).eval().cuda()
    query, x = torch.randn(1, 5, 64).cuda(), torch.randn(2, 9, 24).cuda()

    def encode(x: Tensor) -> Tensor:
        return model(query, kv=model.project(x))[0]

    run = captured(encode, torch.zeros_like(x))
    with torch.no_grad():
        torch.testing.assert_close(run(x), encode(x))
