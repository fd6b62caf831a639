"""Streams of rows with an expert for each modality, against two modules side by side and against dense masks."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from mmfuse.fused.multiway import MoMEBlock, MultiwayBlock, MultiwayLayerNorm, MultiwayLinear, path_scale
from mmfuse.kernels.multiway import attention
from mmfuse.kernels.multiway.arguments import runs_of
from mmfuse.kernels.multiway.attention import packed_attention
from mmfuse.kernels.multiway.reference import KINDS
from mmfuse.kernels.multiway.routing import Part, Routing
from registered import reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def packed(x: Tensor, split: int) -> Tensor:
    """The rows of [B, S, D] in the order of `Routing.from_split`."""
    return torch.cat([x[:, :split].flatten(0, 1), x[:, split:].flatten(0, 1)])


@pytest.mark.parametrize("split", [0, 1, 4, 6])
def test_split_is_two_modules_side_by_side(split: int) -> None:
    x, routing = normal(3, 6, 8), Routing.from_split(3, 6, split, device=DEVICE)
    linear, norm = (m.to(DEVICE, torch.float64) for m in (MultiwayLinear(2, 8, 5), MultiwayLayerNorm(2, 8)))
    norm.weight.data.normal_()
    parts = x[:, :split], x[:, split:]
    both = zip(parts, linear.weight, linear.bias, strict=True)
    want = torch.cat([F.linear(t, w, b) for t, w, b in both], dim=1)
    got = linear(packed(x, split), routing)
    torch.testing.assert_close(got, packed(want, split))
    both = zip(parts, norm.weight, norm.bias, strict=True)
    want = torch.cat([F.layer_norm(t, (8,), w, b) for t, w, b in both], dim=1)
    torch.testing.assert_close(norm(packed(x, split), routing), packed(want, split))
    got.sum().backward()
    unused = [e for e, t in enumerate(parts) if not t.numel()]
    assert all(torch.equal(linear.weight.grad[e], torch.zeros_like(linear.weight[e])) for e in unused)


def test_a_routing_of_sizes_is_made_once() -> None:
    kept, q = torch.tensor([1, 2], device=DEVICE), normal(14, 2, 4).requires_grad_()
    with torch.inference_mode():
        one = Routing.from_split(2, 7, 4, device=DEVICE)
    padded, again = Routing.from_split(2, 7, 4, kept, DEVICE), Routing.from_split(2, 7, 4, device=DEVICE)
    assert again is one and padded.offsets is one.offsets
    assert padded.kept.tolist() == [[4, 1], [4, 2]] and one.kept.tolist() == [[4, 3], [4, 3]]
    packed_attention(q, q, q, one).sum().backward()  # what was made in inference mode is saved


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    """As torch has it: a parameter's `grad_dtype` is what its gradients add up in."""
    layer, routing = MultiwayLinear(2, 8, 5).to(DEVICE, torch.bfloat16), Routing.from_split(3, 6, 4, device=DEVICE)
    layer.weight.grad_dtype = torch.float32
    losses = [layer(normal(18, 8).bfloat16(), routing).sum() for _ in range(3)]
    alone = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].float() for loss in losses]
    for loss in losses:
        loss.backward()
    assert torch.equal(layer.weight.grad, sum(alone)) and not torch.equal(layer.weight.grad, sum(alone).bfloat16())


def test_a_stream_without_rows() -> None:
    linear, routing = MultiwayLinear(2, 8, 5).to(DEVICE), Routing.from_split(0, 6, 3, device=DEVICE)
    y = linear(torch.empty(0, 8, device=DEVICE), routing)
    y.sum().backward()
    assert y.shape == (0, 5) and not linear.weight.grad.any()


def test_attention_is_that_of_each_sample() -> None:
    """Pairs, an image alone and a text alone, with padding and a table of relative positions, in one stream."""
    h, d, images, texts = 2, 4, 5, 3
    pairs, kept = torch.arange(2, device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    parts = [
        Part(0, 3, images, torch.tensor([0, 1, 2], device=DEVICE), place=texts),
        Part(1, 2, texts, pairs, kept),
        Part(1, 1, texts, torch.tensor([3], device=DEVICE), torch.tensor([2], device=DEVICE)),
    ]
    routing = Routing.of(parts, 2, samples=4, device=DEVICE)
    q, k, v = (normal(routing.rows, h, d) for _ in range(3))
    bias = normal(h, texts + images, texts + images)
    got = packed_attention(q, k, v, routing, bias=bias)
    assert got.shape == (3 * images + 3 * texts, h * d)
    words = 3 * images  # the first row of a text
    for sample, (image, text, n) in enumerate([(0, 0, 3), (1, 1, 1), (2, None, 0), (None, 2, 2)]):
        rows, keys, places = [], [], []
        if image is not None:
            rows += range(image * images, (image + 1) * images)
            keys += [True] * images
            places += range(texts, texts + images)
        if text is not None:
            rows += range(words + text * texts, words + (text + 1) * texts)
            keys += [i < n for i in range(texts)]
            places += range(texts)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) / d**0.5 + bias[:, places][:, :, places]
        scores = scores.masked_fill(~torch.tensor(keys, device=DEVICE), float("-inf"))
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows]).flatten(1)
        torch.testing.assert_close(got[rows], want, msg=f"sample {sample}")
        assert routing.sample[rows].eq(sample).all()


def test_what_a_segment_sees() -> None:
    routing = Routing.from_split(2, 7, 4, device=DEVICE)
    q, k, v = (normal(14, 1, 4) for _ in range(3))
    sees = (("all", "none"), ("all", "causal"))
    got = packed_attention(q, k, v, routing, sees)
    mask = torch.ones(7, 7, dtype=torch.bool, device=DEVICE)
    mask[:4, 4:], mask[4:, 4:] = False, torch.ones(3, 3, device=DEVICE).tril().bool()
    order = packed(torch.arange(14, device=DEVICE).view(2, 7, 1), 4).flatten()
    q, k, v = (torch.empty_like(t).index_copy(0, order, t).view(2, 7, 4) for t in (q[:, 0], k[:, 0], v[:, 0]))
    want = packed(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 4)
    torch.testing.assert_close(got, want)


def one_after_another(
    q: Tensor, k: Tensor, v: Tensor, from_: Tensor, to: Tensor, m: int, n: int, causal: bool, dropout: float
) -> Tensor:
    """What a variable-length attention computes; behind the last rows it leaves what was there, in gradients too."""
    out = torch.full_like(q, float("nan"))
    dead = torch.arange(len(k), device=k.device)[:, None, None] >= to[-1]
    k, v = (torch.where(dead, t.detach() * float("nan"), t) for t in (k, v))
    pieces = []
    for a, b, c, e in zip(from_, from_[1:], to, to[1:], strict=False):
        assert b - a <= m and e - c <= n
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:e]) / q.shape[2] ** 0.5
        if causal:  # the last query sees the last key
            scores = scores.masked_fill(~torch.ones_like(scores[0]).tril(int((e - c) - (b - a))).bool(), float("-inf"))
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:e]))
    done = torch.cat(pieces)
    return torch.cat([done, out[len(done) :]])


@pytest.mark.parametrize(
    ("sees", "kept"),
    [
        (None, False),
        (None, True),
        ((("all", "none"), ("all", "all")), True),
        ((("all", "none"), ("all", "causal")), False),
        ((("causal", "none"), ("none", "all")), False),
    ],
)
def test_sequences_one_after_another(sees: Any, kept: bool) -> None:
    """What flash attention gets, for each kind of segments; its kernel itself needs a GPU."""
    splits, n = torch.tensor([3, 5, 1, 4], device=DEVICE), torch.tensor([1, 2, 6, 3], device=DEVICE)
    routing = Routing.from_splits(splits, 7, n if kept else None)
    q, k, v = (normal(routing.rows, 2, 8).requires_grad_() for _ in range(3))
    want = packed_attention(q, k, v, routing, sees)
    kinds = [KINDS.index(kind) for of in sees or () for kind in of]
    (got,) = attention._by_sequences(one_after_another, q, k, v, routing.reading, kinds, 0.0)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad((y * y.detach().cos()).sum(), (q, k, v)) for y in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bias": torch.zeros(1, 7, 7)}, "bias is given"),
        ({"dropout": 0.5}, "dropout is 0.5"),
        ({"sees": (("all", "causal"), ("all", "all"))}, "segment 0 sees what comes before in another one"),
        (
            {"sees": (("causal", "all"), ("all", "all"))},
            "segment 0 sees what comes before in another one, or something",
        ),
        ({"sees": (("all", "none"), ("all", "causal")), "kept": torch.tensor([1, 2])}, "segment 1 is causal, and"),
    ],
)
def test_why_attention_is_not_torchs_varlen(options: dict[str, Any], why: str) -> None:
    options = {k: t.to(DEVICE) if isinstance(t, Tensor) else t for k, t in options.items()}
    routing = Routing.from_split(2, 7, 4, options.pop("kept", None), DEVICE)
    q = normal(14, 1, 8).to(torch.bfloat16)
    told = reasons(lambda: packed_attention(q, q, q, routing, **options))
    assert told["torch"] == [] and any(why in reason for reason in told["varlen"]), told
    assert DEVICE == "cuda" or "device is cpu" in told["varlen"]


def test_a_full_batch_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, no flash attention is faster."""
    masks, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(k["attn_mask"]) or own(*a, **k))
    qkv, kept = normal(3, 14, 1, 4), torch.tensor([1, 2], device=DEVICE)
    packed_attention(*qkv, Routing.from_split(2, 7, 4, device=DEVICE))
    packed_attention(*qkv, Routing.from_splits(torch.tensor([4, 2], device=DEVICE), 7))
    packed_attention(*qkv, Routing.from_split(2, 7, 4, kept, DEVICE))
    assert [mask is None for mask in masks] == [True, True, False]


def test_errors_of_attention() -> None:
    routing, q = Routing.from_split(2, 7, 4, device=DEVICE), normal(14, 2, 4)
    for call, error, message in (
        (
            lambda: packed_attention(q, q[:, :1], q, routing),
            ValueError,
            r"v has shape \(14, 2, 4\), expected \[14, 1, 4\], as k",
        ),
        (
            lambda: packed_attention(q[1:], q, q, routing),
            ValueError,
            r"q has shape \(13, 2, 4\), expected \[14, H, d\]",
        ),
        (lambda: packed_attention(q, q, q.float(), routing), TypeError, "v has dtype torch.float32, expected"),
        (lambda: packed_attention(q, q, q, None), TypeError, "routing is NoneType, expected a Routing"),
        (lambda: packed_attention(q, q, q, routing, [["all"]]), ValueError, "expected 2 x 2 of none, causal, all"),
        (lambda: packed_attention(q, q, q, routing, bias=q), ValueError, "bias has shape"),
        (
            lambda: packed_attention(q, q, q, routing, bias=normal(2, 3, 3)),
            ValueError,
            "bias has 3 places, expected at least 4 as routing",
        ),
        (lambda: packed_attention(q, q, q, routing, bias=normal(2, 7, 8)), ValueError, "bias has shape"),
        (lambda: packed_attention(q, q, q, routing, dropout=2), ValueError, "dropout is 2, expected a probability"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_branch_is_dropped_for_a_whole_sample_or_for_each_of_its_parts() -> None:
    routing = Routing.from_split(64, 5, 3, device=DEVICE)
    x = normal(routing.rows, 8)
    assert path_scale(x, routing, 0.0) is None
    for separately in (False, True):
        kept = path_scale(x, routing, 0.5, separately)
        image, text = kept[: 64 * 3].view(64, 3), kept[64 * 3 :].view(64, 2)
        assert set(kept.tolist()) == {0.0, 2.0}
        assert (image == image[:, :1]).all() and (text == text[:, :1]).all()
        assert (image[:, 0] == text[:, 0]).all() == (not separately)


@pytest.mark.parametrize("kind", [MultiwayBlock, MoMEBlock])
def test_a_layer_drops_branches_in_training_alone(kind: type[MultiwayBlock | MoMEBlock]) -> None:
    routing = Routing.from_split(4, 5, 3, device=DEVICE)
    x, block = normal(routing.rows, 8), kind(2, 8, 2, 16, drop_path=0.5).to(DEVICE, torch.float64)
    assert not torch.equal(block(x, routing), block(x, routing))
    assert torch.equal(block.eval()(x, routing), block(x, routing))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routing.from_split(2, 5, 6), "split is 6, expected 0 <= split <= 5, the length"),
        (lambda: Routing.of([Part(2, 1, 1)], 2), r"parts\[0\] has expert 2, expected 0 <= expert < 2"),
        (lambda: Routing.of([Part(0, 3, 1)], 1, samples=2), r"parts\[0\] has 3 sequences, expected at most 2"),
        (lambda: Routing.of([Part(0, 3, 1, kept=torch.ones(2, dtype=torch.int64))], 1), r"parts\[0\].kept has shape"),
        (lambda: Routing.from_split(2, 5, 2).mapped([0], 1), r"runs is \(0,\), expected 2 experts from 0 to 0"),
        (lambda: MultiwayBlock(2, 9, 2, 16), "width is 9 with 2 heads"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_another_phase_has_other_experts_for_the_same_rows() -> None:
    routing = Routing.from_split(2, 5, 3, device=DEVICE)
    upper = routing.mapped([2, 2], 3)
    assert upper.slices() == [(2, slice(0, 6)), (2, slice(6, 10))] and upper.first is routing.first


# --- routings -------------------------------------------------------------------------------------------------------


def test_splits_that_differ() -> None:
    """From 0 to the length, in the order of experts, with the attention of each sample and the caller's order back."""
    splits, kept = torch.tensor([3, 0, 5, 1], device=DEVICE), torch.tensor([1, 4, 0, 2], device=DEVICE)
    routing, x = Routing.from_splits(splits, 5, kept), normal(20, 8)
    stream = routing.pack(x)
    of_samples = [t.split([s, 5 - s]) for t, s in zip(x.split(5), splits.tolist(), strict=True)]
    torch.testing.assert_close(stream, torch.cat([t for of in zip(*of_samples, strict=True) for t in of]))
    assert torch.equal(routing.unpack(stream), x)
    assert routing.sample.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3, 0, 0, 1, 1, 1, 1, 1, 3, 3, 3, 3]
    assert routing.experts_of(20).tolist() == [0] * 9 + [1] * 11
    qkv = normal(20, 3, 2, 4)
    got = routing.unpack(packed_attention(*routing.pack(qkv).unbind(1), routing)).split(5)
    for y, of, split, n in zip(got, qkv.split(5), splits.tolist(), kept.tolist(), strict=True):
        q, k, v = of.permute(1, 2, 0, 3)
        want = F.scaled_dot_product_attention(q, k[:, : split + n], v[:, : split + n])
        torch.testing.assert_close(y, want.transpose(0, 1).flatten(1))


def test_one_split_is_many_that_are_equal() -> None:
    one, many = Routing.from_split(3, 6, 4, device=DEVICE), Routing.from_splits(torch.tensor([4] * 3), 6, device=DEVICE)
    for name in ("offsets", "first", "lengths", "kept", "sample"):
        assert torch.equal(getattr(one, name), getattr(many, name)), name
    assert (one.runs, one.bounds, one.longest) == (many.runs, many.bounds, many.longest)


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_ids_are_sorted_and_stay_in_their_order(backend: str | None, experts: int, dtype: torch.dtype) -> None:
    """By the compiled part, where there is one, and by the formula."""
    ids = torch.randint(experts, (100,), device=DEVICE, dtype=dtype)[::2] // 2 * 2  # every second expert has no rows
    with nullcontext() if backend is None else mmfuse.use_backend(backend):
        routing = Routing.from_ids(ids, experts)
    assert torch.equal(routing.order, ids.argsort(stable=True))
    assert torch.equal(routing.experts_of(50), ids.sort().values.long())
    assert torch.equal(routing.offsets, F.pad(torch.bincount(ids, minlength=experts).cumsum(0), (1, 0)))
    assert DEVICE == "cuda" or routing.bounds == tuple(routing.offsets.tolist())
    x = normal(50, 3).requires_grad_()
    assert torch.equal(routing.unpack(routing.pack(x)), x)
    assert torch.autograd.gradcheck(routing.pack, x) and torch.autograd.gradgradcheck(routing.pack, x)


def test_no_rows() -> None:
    ids = torch.empty(0, device=DEVICE, dtype=torch.int64)
    for routing in (Routing.from_ids(ids, 3), Routing.from_splits(ids, 4), Routing.from_splits(ids.new_zeros(2), 0)):
        assert routing.pack(normal(0, 2)).shape == (0, 2) and not routing.offsets.any()
        assert not routing.experts_of(0).numel()


def test_runs_of_an_expert_that_lie_together_are_one_product() -> None:
    routing = Routing.of([Part(e, 2, 3) for e in (0, 0, 1, 1, 0)], 2, device=DEVICE)
    slices = runs_of(routing, normal(30, 4)).slices()
    assert slices == [(0, slice(0, 12)), (1, slice(12, 24)), (0, slice(24, 30))]


def test_runs_that_are_given() -> None:
    routing = Routing.from_cu_seqlens(torch.tensor([0, 2, 2, 7], dtype=torch.int32), [1, 0, 1], experts=3)
    assert routing.slices() == [(1, slice(0, 2)), (1, slice(2, 7))] and routing.rows == 7
    assert routing.experts_of(7).tolist() == [1] * 7 and routing.experts == 3
    assert Routing.from_cu_seqlens(torch.tensor([0, 2, 3]), [1, 0]).experts == 2


def test_the_host_does_not_wait_for_bounds() -> None:
    """On another device they are never read: meta tensors have nothing to read."""
    ids = torch.zeros(6, dtype=torch.int64, device="meta")
    made = [
        Routing.from_ids(ids, 2),
        Routing.from_splits(ids, 4, ids),
        Routing.from_cu_seqlens(ids[:3], [0, 1]),
    ]
    for routing in made:
        assert routing.bounds is None and routing.offsets.shape == (3,) and routing.experts_of(6).shape == (6,)
        with pytest.raises(ValueError, match="routing has its bounds on meta, expected them on the host"):
            routing.slices()
    # those that the host has are for a stream elsewhere too
    assert Routing.from_splits(torch.tensor([1, 2]), 4, device="meta").bounds == (0, 3, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ids: Routing.from_ids(ids, 2), "ids has 2, expected 0 <= id < 2, the experts"),
        (lambda ids: Routing.from_splits(ids, 1), "splits has 2, expected 0 <= split < 2, at most the length 1"),
        (
            lambda ids: Routing.from_cu_seqlens(ids, [0]),
            r"cu_seqlens has shape \(3,\), expected \[2\], one for each run",
        ),
        (
            lambda ids: Routing.from_cu_seqlens(ids.flip(0), [0, 1]),
            r"cu_seqlens is \(2, 1, 0\), expected numbers from 0",
        ),
        (lambda ids: Routing.from_cu_seqlens(ids, [0, 2], 2), r"runs is \(0, 2\), expected 2 experts from 0 to 1"),
        (lambda ids: Routing.from_ids(ids, 3).pack(normal(4, 2).cpu()), "x has 4 rows, expected 3 as routing"),
        (
            lambda ids: packed_attention(*normal(3, 3, 1, 2).cpu().unbind(1), Routing.from_ids(ids, 3)),
            "routing has no samples, expected one of Routing.of",
        ),
        (lambda ids: Routing.of([], 2), "parts is empty"),
        (lambda ids: Routing.of([Part(0, 3, -1)], 1), r"parts\[0\].length is -1, expected at least 0"),
        (lambda ids: Routing.from_split(-2, 3, 1), "samples is -2, expected at least 0"),
        (lambda ids: Routing.from_splits(ids[:0], -1), "length is -1, expected at least 0"),
        (lambda ids: Routing.of([Part(0, 3, 1, ids - 1)], 1), r"parts\[0\].samples has -1, expected 0"),
        (lambda ids: Routing.of([Part(0, 3, 1, ids + 1)], 1), r"parts\[0\].samples has 3, .* < 3, the number of"),
        (lambda ids: Routing.of([Part(0, 3, 1, ids // 2)], 1), "samples of a part has one twice"),
        (lambda ids: Routing.of([Part(0, 3, 1, kept=ids)], 1), r"parts\[0\].kept has 2, expected .* < 2, the length"),
        (lambda ids: Routing.from_splits(ids, 3, ids - 1), "kept has -1, expected 0 <= kept < 4, the length"),
    ],
)
def test_errors_of_routings(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("runs", [[0, 0.5], torch.tensor([0, 1])])
def test_experts_are_integers(runs) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match="expected an integer"):
        Routing.from_cu_seqlens(torch.tensor([0, 1, 2]), runs, 2)


@pytest.mark.parametrize("wrong", [[0], "0", 0.0, True])
def test_what_is_no_integer_is_named(wrong: Any) -> None:
    for name, expert, experts, samples in (
        ("parts[0].expert", wrong, 2, 1),
        ("experts", 0, wrong, 1),
        ("samples", 0, 1, wrong),
    ):
        with pytest.raises(TypeError, match=re.escape(f"{name} is {wrong!r}, expected an integer")):
            Routing.of([Part(expert, 1, 3)], experts, samples)
