"""Mixture-of-Transformers' layer against one that gathers and scatters each expert's rows, as BAGEL's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse import use_backend
from mmfuse.fused import multiway
from mmfuse.fused.multiway import MoTBlock, from_bagel, to_bagel
from mmfuse.kernels.multiway import packed_attention
from mmfuse.kernels.multiway.routing import Part, Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES, WORDS, PATCHES = 3, 4, 5
# words see those before them, patches everything
SEES = (("causal", "none"), ("all", "all"))
SIZES = {"width": 16, "heads": 4, "hidden": 12, "kv_heads": 2}


class Double(nn.Module):
    """Samples [B, S, D], words first: plain modules under BAGEL's names, for each modality its own."""

    def __init__(self, width: int, heads: int, hidden: int, kv_heads: int, bias: bool = True, qk_norm: bool = True):
        super().__init__()
        self.sizes, d = (heads, kv_heads, width // heads), width // heads
        self.self_attn = nn.Module()
        for end in ("", "_moe_gen"):
            attention, mlp = self.self_attn, nn.Module()
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                setattr(attention, f"{name}_proj{end}", nn.Linear(width, n * d, bias))
            setattr(attention, f"o_proj{end}", nn.Linear(width, width, bias=False))
            for name in ("q_norm", "k_norm") if qk_norm else ():
                setattr(attention, f"{name}{end}", nn.RMSNorm(d, eps=1e-6))
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, f"{name}{end}", nn.RMSNorm(width, eps=1e-6))
            mlp.gate_proj, mlp.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
            mlp.down_proj = nn.Linear(hidden, width, bias=False)
            setattr(self, f"mlp{end}", mlp)

    def each(self, x: Tensor, words: Tensor, of: Callable[[str, Tensor], Tensor]) -> Tensor:
        y = of("", x[words])
        out = y.new_zeros(*x.shape[:2], *y.shape[1:])
        out[words], out[~words] = y, of("_moe_gen", x[~words])
        return out

    def forward(self, x: Tensor, words: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        (heads, kv_heads, d), attention = self.sizes, self.self_attn

        def module(name: str) -> Callable[[str, Tensor], Tensor]:
            return lambda end, t: (getattr(attention, name + end, None) or getattr(self, name + end))(t)

        h = self.each(x, words, module("input_layernorm"))
        q, k, v = (
            self.each(h, words, module(f"{name}_proj")).unflatten(2, (n, d))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if hasattr(attention, "q_norm"):
            q, k = (self.each(t, words, module(f"{name}_norm")) for name, t in (("q", q), ("k", k)))
        if rotary is not None:
            cos, sin = (t[:, :, None] for t in rotary)
            half = d // 2
            q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.repeat_interleave(heads // kv_heads, 1).mT / d**0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        h = (weights @ v.repeat_interleave(heads // kv_heads, 1)).transpose(1, 2).flatten(2)
        x = x + self.each(h, words, module("o_proj"))
        h = self.each(x, words, module("post_attention_layernorm"))

        def network(end: str, t: Tensor) -> Tensor:
            mlp = getattr(self, f"mlp{end}")
            return mlp.down_proj(F.silu(mlp.gate_proj(t)) * mlp.up_proj(t))

        return x + self.each(h, words, network)


def doubled(**options: bool) -> Double:
    double = Double(**SIZES, **options)
    for p in double.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    return double.to(DEVICE, torch.float64)


def setting() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Samples, which of their rows are words, what sees what, and positions."""
    s = WORDS + PATCHES
    x = torch.randn(SAMPLES, s, SIZES["width"], dtype=torch.float64, device=DEVICE)
    words = (torch.arange(s, device=DEVICE) < WORDS).expand(SAMPLES, s)
    mask = torch.ones(s, s, dtype=torch.bool, device=DEVICE).tril()
    mask[WORDS:] = True
    angle = torch.randn(SAMPLES, s, 2, dtype=torch.float64, device=DEVICE).repeat(1, 1, 2)
    return x, words, mask, (angle.cos(), angle.sin())


def packed(t: Tensor) -> Tensor:
    return torch.cat([t[:, :WORDS].flatten(0, 1), t[:, WORDS:].flatten(0, 1)])


@pytest.mark.parametrize("backend", ["slices", "torch"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "qk_norm": False}])
def test_parity(options: dict[str, bool], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, by BAGEL's names."""
    monkeypatch.setattr(multiway, "packed_attention", partial(packed_attention, backend="torch"))
    double = doubled(**options)
    block = MoTBlock(2, **SIZES, qkv_bias=options.get("bias", True), qk_norm=options.get("qk_norm", True))
    block = block.to(DEVICE, torch.float64)
    block.load_state_dict(from_bagel(double.state_dict()))
    x, words, mask, rotary = setting()
    routing = Routing.of([Part(0, SAMPLES, WORDS), Part(1, SAMPLES, PATCHES)], 2, device=DEVICE)
    rows = packed(x).requires_grad_()
    x.requires_grad_()
    want = packed(double(x, words, mask, rotary))
    with use_backend(backend):
        got = block(rows, routing, SEES, tuple(map(packed, rotary)))
        for y in (got, want):
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(rows.grad, packed(x.grad))
    grads = from_bagel({name: p.grad for name, p in double.named_parameters()})
    torch.testing.assert_close({name: p.grad for name, p in block.named_parameters()}, grads)


def test_weights_go_back() -> None:
    given = doubled().state_dict()
    back = to_bagel(from_bagel(given), SIZES["heads"], SIZES["kv_heads"])
    assert back.keys() == given.keys()
    assert all(torch.equal(t, given[key]) for key, t in back.items())


def test_experts_begin_as_one_dense_layer() -> None:
    dense = {key: t for key, t in doubled().state_dict().items() if "_moe_gen" not in key}
    found = from_bagel(dense, experts=3)
    block = MoTBlock(3, **SIZES).to(DEVICE, torch.float64)
    block.load_state_dict(found)
    assert torch.equal(block.down.weight[2], dense["mlp.down_proj.weight"])
    x = torch.randn(9, 16, dtype=torch.float64, device=DEVICE)
    one = Routing.of([Part(0, 1, 9)], 3, device=DEVICE)
    three = Routing.of([Part(2, 1, 4), Part(0, 1, 2), Part(1, 1, 3)], 3, device=DEVICE)
    torch.testing.assert_close(block(x, three), block(x, one))


def test_names_that_do_not_fit() -> None:
    given = doubled().state_dict()
    with pytest.raises(ValueError, match="state has no self_attn.k_proj.weight"):
        from_bagel({key: t for key, t in given.items() if key != "self_attn.k_proj.weight"})
    with pytest.raises(ValueError, match="state has lm_head, expected the names"):
        from_bagel(given | {"lm_head": torch.zeros(1)})
    with pytest.raises(ValueError, match="experts is 3, expected 2"):
        from_bagel(given, experts=3)
    with pytest.raises(ValueError, match="kv_heads is 3, expected a divisor of the 4 heads"):
        MoTBlock(2, 16, 4, 12, kv_heads=3)
