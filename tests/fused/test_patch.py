"""`vit_tokens` against the layers it replaces. PatchEmbed is tested beside timm's, in test_accelerate_stems.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from judge import assert_no_worse
from mmfuse import use_backend
from mmfuse.fused import vit_tokens


class Layers(nn.Module):
    """The rows of 2 x 3 patches, and what remains of the pixels."""

    def __init__(self, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, 16, (5, 4), stride=(5, 4), bias=bias)
        self.cls = nn.Parameter(torch.randn(16))
        self.position = nn.Parameter(torch.randn(1 + 6, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.proj(pixels).flatten(2).mT
        return torch.cat([self.cls.expand(len(patches), 1, -1), patches], dim=1) + self.position

    def fused(self, pixels: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        return vit_tokens(pixels, self.proj, self.cls, self.position, ids_keep=ids_keep)


@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(10, 12), (13, 15)])
def test_tokens_and_gradients(size: tuple[int, int], bias: bool, backend: str, device: str) -> None:
    eager, pixels = Layers(bias).to(device), torch.randn(2, 3, *size, device=device)
    exact, grad = copy.deepcopy(eager).double(), torch.randn(2, 7, 16, device=device)
    with use_backend(backend):
        got = eager.fused(pixels)
        got_grads = torch.autograd.grad(got, [*eager.parameters()], grad)
    own, true = eager(pixels), exact(pixels.double())
    assert_no_worse(got, own, true)
    own_grads = torch.autograd.grad(own, [*eager.parameters()], grad)
    true_grads = torch.autograd.grad(true, [*exact.parameters()], grad.double())
    names = [name for name, _ in eager.named_parameters()]
    for name, *grads in zip(names, got_grads, own_grads, true_grads, strict=True):
        assert_no_worse(*grads, name)


def test_kept_patches() -> None:
    layers, pixels = Layers(bias=True).double(), torch.randn(2, 3, 10, 12, dtype=torch.float64)
    keep = torch.tensor([[5, 0], [2, 3]])
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + keep], dim=1)
    expected = layers(pixels).gather(1, rows[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(layers.fused(pixels, keep), expected)


def test_the_residual_stream_is_as_wide_as_the_weights_under_autocast() -> None:
    layers, pixels = Layers(bias=True), torch.randn(2, 3, 10, 12)
    exact = copy.deepcopy(layers).double()(pixels.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = layers.fused(pixels), layers(pixels)
    assert got.dtype == eager.dtype == torch.float32
    assert_no_worse(got, eager, exact)
