"""Derivatives of derivatives, forward mode and torch.func: of every operator the value, or a refusal by name."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import mmfuse
import mmfuse.fused
from mmfuse import UnsupportedError
from mmfuse.kernels._runtime import chosen, operators
from mmfuse.kernels.points import mini_pointnet, mini_pointnet_training
from registered import backends

# those over ranks are tested beside them
OPERATORS = {name: op for name, op in operators().items() if not name.startswith("distributed")}
N, D = 6, 8


def _weights(like: Tensor, *shape: int) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=like.dtype) + len(shape)).square().sin().view(shape)


def _layers(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(_weights(x, out, width), _weights(x, out)) for width, out in ((D, 4), (4, 4), (8, 4), (4, 3))]


# where an operator's own example is made of no numbers, or has no gradient of its features
OTHERS: dict[str, Callable[..., Any]] = {
    "patch_embed": lambda x, **how: mmfuse.patch_embed(x.view(1, 3, 4, 4), _weights(x, 5, 3, 2, 2), **how),
    "patch_embed_packed": lambda x, **how: (
        mmfuse.patch_embed_packed(x.view(1, 4, 12), torch.tensor([[2, 2]]), _weights(x, 5, 12), **how).tokens
    ),
    "mini_pointnet": lambda x, **how: mini_pointnet(x.view(2, 3, D), _layers(x), **how),
    "mini_pointnet_training": lambda x, **how: mini_pointnet_training(
        x.view(2, 3, D), _layers(x), 1 + _weights(x, 4).abs(), **how
    ),
}


def _call(name: str) -> Callable[..., Any]:
    return OTHERS.get(name) or OPERATORS[name].examples[name]


def _curved(name: str, backend: str | None = None) -> Callable[[Tensor], Tensor]:
    """A number of the features that the operator's example is made of, with a second derivative."""
    call = _call(name)

    def number(x: Tensor) -> Tensor:
        found = [t for t in tree_leaves(call(x, backend=backend)) if t.is_floating_point()]
        return sum(((t + 1).square().sum() for t in found), x.new_zeros(()))

    return number


def _features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, D, dtype=torch.float64).to(dtype)


def _differentiable(name: str) -> bool:
    return _curved(name, "torch")(_features().requires_grad_()).requires_grad


DIFFERENTIABLE = [name for name in OPERATORS if _differentiable(name)]


def _implementations(name: str) -> list[str]:
    call, x = _call(name), _features(torch.float32).requires_grad_()
    return [b for b in backends(lambda: call(x)) if b != "torch"]


def test_what_is_differentiable() -> None:
    assert {"clip_loss", "siglip_loss", "patch_embed", "linear_cross_entropy", "mini_pointnet"} <= set(DIFFERENTIABLE)


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in DIFFERENTIABLE for b in _implementations(n)])
def test_a_second_derivative(name: str, backend: str) -> None:
    x, v = _features(), _features()
    if backend == "sdpa":
        with pytest.raises(RuntimeError, match="not implemented"):  # torch's own attention says that it has none
            torch.autograd.functional.hvp(_curved(name, backend), x.float(), v.float())
        return
    with sdpa_kernel(SDPBackend.MATH):  # where torch's attention has it
        want = torch.autograd.functional.hvp(_curved(name, "torch"), x, v)[1]
    got = torch.autograd.functional.hvp(_curved(name, backend), x.float(), v.float())[1]
    assert want.norm() > 0
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms(name: str) -> None:
    f, x, v = _curved(name), _features(), _features()
    g = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.func.grad(f)(x), g)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], (g * v).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, (g * v).sum())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))[1], g)


def test_a_gradient_that_is_batched() -> None:
    x = _features(torch.float32)

    def losses(x: Tensor) -> Tensor:
        one = mmfuse.clip_loss(x, x.flip(0), 2.0, backend="chunked")
        return torch.stack([one, mmfuse.siglip_loss(x, x.flip(0), 2.0, backend="chunked")])

    want = torch.autograd.functional.jacobian(losses, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(losses, x, vectorize=True), want)


def test_transforms_that_are_compiled() -> None:
    x = _features(torch.float32)

    def loss(x: Tensor) -> Tensor:
        return mmfuse.clip_loss(x, x.flip(0), 2.0)

    got = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, torch.func.grad(loss)(x))


def test_a_named_implementation_is_refused() -> None:
    x = _features(torch.float32)
    with pytest.raises(UnsupportedError, match="chunked: torch.func or forward-mode differentiation is active"):
        torch.func.grad(lambda x: mmfuse.clip_loss(x, x, 2.0, backend="chunked"))(x)


def test_a_third_derivative() -> None:
    """The second is plain torch, and what it gives can be differentiated as often as one likes."""
    x = _features()

    def third(backend: str) -> Tensor:
        t = x.clone().requires_grad_()
        y = mmfuse.clip_loss(t, t.flip(0), 2.0, backend=backend)
        for _ in range(3):
            (t_,) = torch.autograd.grad(y, t, create_graph=True)
            y = t_.sin().sum()
        return y

    torch.testing.assert_close(third("chunked"), third("torch"))


def test_the_choice_is_of_a_thread_and_a_task() -> None:
    """And a gradient is computed by what computed the value, wherever it is."""
    x, seen = _features(torch.float32), {}

    def choice() -> str:
        return chosen(lambda: mmfuse.clip_loss(x, x, 1.0))

    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with mmfuse.use_backend("chunked"):
            inside.set()
            leave.wait(30)
            seen["other"] = choice()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    with mmfuse.use_backend("cpu" if "cpu" in _implementations("clip_loss") else "triton"):
        seen["here"] = choice()
        leave.set()
        thread.join()
        assert choice() == seen["here"]
    assert seen["other"] == "chunked" != seen["here"]
    assert choice() == "torch"

    async def task(name: str) -> None:
        with mmfuse.use_backend(name):
            await asyncio.sleep(0)
            seen[name] = choice()

    async def both() -> None:
        await asyncio.gather(task("torch"), task("chunked"))

    asyncio.run(both())
    assert (seen["torch"], seen["chunked"]) == ("torch", "chunked")


def test_a_compiled_choice_is_of_a_thread() -> None:
    x = _features(torch.float32)

    def traced(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append([str(n.target) for n in graph.graph.nodes if "clip_loss" in str(n.target)])
        return graph

    found: list[list[str]] = []
    step = torch.compile(lambda x: mmfuse.clip_loss(x, x, 1.0), backend=traced, fullgraph=True)
    with mmfuse.use_backend("chunked"):
        step(x)
        thread = threading.Thread(target=step, args=(x,))
        thread.start()
        thread.join()
    step(x)
    assert found[0] == ["mmfuse.clip_loss_chunked.default"]
    assert len(found) > 1 and not any(found[1:])


def test_what_has_changed_since_is_no_silent_second_derivative() -> None:
    query, queue = (torch.randn(n, D) for n in (4, 16))
    loss = mmfuse.moco_loss(query.requires_grad_(), torch.randn(4, D), queue, 0.1, backend="chunked")
    queue.zero_()
    torch.autograd.grad(loss, query, retain_graph=True)
    with pytest.raises(RuntimeError, match="keys was changed in place"):
        torch.autograd.grad(loss, query, create_graph=True)
