"""Modality experts under what people do with modules: hooks, adapters, parametrizations, one parameter for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mmfuse import use_backend
from mmfuse.fused.multiway import MoMEBlock, MoTBlock, MultiwayBlock, MultiwayLinear, flatten_experts, whole_state
from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS: dict[str, Callable[[], nn.Module]] = {
    "MultiwayBlock": lambda: MultiwayBlock(2, 16, 4, 24),
    "MoMEBlock": lambda: MoMEBlock(2, 16, 4, 24),
    "MoTBlock": lambda: MoTBlock(2, 16, 4, 24),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def block(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = KINDS[kind]().to(DEVICE, torch.float64)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def result(module: nn.Module, routing: Routing | None = None, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    module.zero_grad()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(15, 16, generator=draw, dtype=torch.float64).to(DEVICE).requires_grad_()
    y = (run or module)(x, routing or Routing.from_split(3, 5, 2, device=DEVICE))
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close([t.reshape(of.shape) for t, of in zip(got, want, strict=True)], want)


# --- children that are more than their tensors ------------------------------------------------------------------------


@EACH
def test_every_child_is_called_once_it_has_a_hook(kind: str) -> None:
    module = block(kind)
    want, heard = result(module), set[str]()
    names = [name for name, _ in module.named_modules() if name]
    for name in names:
        hook = module.get_submodule(name).register_forward_hook(lambda *_, n=name: heard.add(n))
        assert_same(result(module), want)
        assert heard == {name}
        hook.remove()
        heard.clear()


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


@EACH
def test_parametrizations_of_every_weight(kind: str) -> None:
    plain = block(kind)
    for name, child in plain.named_modules():
        if not isinstance(getattr(child, "weight", None), nn.Parameter):
            continue
        module = copy.deepcopy(plain)
        parametrize.register_parametrization(module.get_submodule(name), "weight", Larger())
        scaled = copy.deepcopy(plain)
        scaled.get_submodule(name).weight.data *= 3
        torch.testing.assert_close(result(module)[:2], result(scaled)[:2], msg=lambda m, n=name: f"{n}: {m}")


@EACH
def test_adapters_of_every_expert(kind: str) -> None:
    """LoRA on a parameter of three dimensions, which each expert has for itself; merged, it is the same."""
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    peft = pytest.importorskip("peft")
    linears = [name for name, m in block(kind).named_modules() if isinstance(m, MultiwayLinear)]
    for name in linears:
        model = nn.ModuleDict({"block": block(kind)})
        before = result(model, run=model["block"])
        config = peft.LoraConfig(target_parameters=[f"{name}.weight"], r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        after = result(adapted, run=model["block"])
        assert not torch.allclose(after[0], before[0]), name
        trained = [p.grad for p in adapted.parameters() if p.requires_grad]
        assert len(trained) == 2 and all(g.any() for g in trained), name
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(result(merged, run=merged["block"])[:2], after[:2])


def test_an_adapter_of_the_attention_that_experts_share() -> None:
    module = block("MoMEBlock")
    changed = copy.deepcopy(module)
    changed.qkv.weight.data *= 2
    module.qkv = nn.Sequential(module.qkv, Twice())
    assert_same(result(module)[:2], result(changed)[:2])


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@EACH
def test_checkpoints_and_copies(kind: str) -> None:
    module = block(kind)
    want = result(module)
    assert_same(result(copy.deepcopy(module)), want)
    assert_same(result(module, run=lambda x, routing: checkpoint(module, x, routing, use_reentrant=False)), want)


# --- one parameter [E N, K] ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "triton", "slices", "torch"])
def test_operators_take_experts_one_after_another(backend: str | None) -> None:
    torch.manual_seed(0)
    dtype, routing = torch.float32, Routing.from_split(3, 5, 2, device=DEVICE)
    x = torch.randn(15, 16, device=DEVICE)
    shapes = ((2, 24, 16), (2, 24), (2, 24), (2, 24), (2, 8, 24), (2, 8), (2, 16), (2, 16))
    whole = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    found = []
    for parameters in (whole, [t.flatten(0, 1) for t in whole]):
        leaves = w1, b1, gamma, beta, w2, b2, before, after = [t.clone().requires_grad_() for t in parameters]
        with use_backend(backend) if backend else torch.enable_grad():
            y = routed_ffn(x, w1, b1, w2, b2, routing, norm=(gamma, beta, 1e-5), input_norm=(before, after, 1e-5))
            z = routed_linear(x, w1, b1, routing, activation="gelu")
            n = routed_layer_norm(x, before, after, routing)
        grads = torch.autograd.grad(y.square().sum() + z.square().sum() + n.square().sum(), leaves)
        assert [g.shape for g in grads] == [t.shape for t in parameters]
        found.append([y, z, n, *(g.reshape(shape) for g, shape in zip(grads, shapes, strict=True))])
    assert all(map(torch.equal, *found))


@EACH
def test_flat_experts_are_the_same_module(kind: str) -> None:
    module, other = block(kind), block(kind)
    flat = flatten_experts(flatten_experts(copy.deepcopy(module)))
    assert flat.get_submodule("mlp.fc1" if kind == "MoMEBlock" else "qkv").weight.dim() == 2
    assert_same(result(flat), result(module))
    want = module.state_dict()
    assert [(k, t.shape) for k, t in whole_state(flat).items()] == [(k, t.shape) for k, t in want.items()]
    assert all(torch.equal(t, want[key]) for key, t in whole_state(flat).items())
    for p in other.parameters():
        p.data.normal_()
    for to, of in ((flat, other), (module, flat)):  # each state is loaded by either
        to.load_state_dict(of.state_dict())
        assert_same(result(to), result(other))


def test_other_shapes_are_not_loaded() -> None:
    for shape in ((4, 12, 16), (2, 16, 24), (2 * 24 * 16 + 1,), (47, 16)):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            MultiwayLinear(2, 16, 24).load_state_dict({"weight": torch.zeros(shape), "bias": torch.zeros(2, 24)})


def test_experts_that_do_not_divide_a_parameter() -> None:
    routing: Any = Routing.from_split(3, 5, 2)
    with pytest.raises(ValueError, match=r"weight has shape \(23, 16\), expected \[2, N, 16\], one for each expert"):
        routed_linear(torch.zeros(15, 16), torch.zeros(23, 16), None, routing)
    with pytest.raises(ValueError, match=r"bias has shape \(2, 12\), expected \[2, 24\]"):
        routed_linear(torch.zeros(15, 16), torch.zeros(48, 16), torch.zeros(24), routing)
