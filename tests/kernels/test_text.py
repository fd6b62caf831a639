"""embed_text and embed_pair: every implementation against eager, BERT's, CLIP's and BEiT-3's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from judge import Results, cast, judge
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.text import blocked, embed_pair, embed_text
from mmfuse.kernels.text.op import WORDS
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
ALL = backends(lambda: embed_text(PROBE, torch.ones(1, 3, device=DEVICE)))
FUSED = [n for n in ALL if n != "torch"]
B, L, V, D = 3, 5, 11, 24
CASES: dict[str, dict[str, Any]] = {
    "clip": {"position": True},
    "bert": {"position": True, "type_embed": True, "norm": True, "padding_idx": 0},
    "beit-3": {"position": True, "position_offset": 2, "pad_mask": True, "padding_idx": 1},
    "t5": {"scale": D**0.5},
    "norm and padding": {"type_embed": True, "norm": True, "pad_mask": True, "scale": 0.5},
}


def draw(dtype: torch.dtype, **case: Any) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """(ids, options, the leaves by name)."""
    ids = torch.randint(0, V, (B, L), device=DEVICE)
    ids[:, -2:] = 1

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    leaves = {"table": leaf(V, D)}
    options = {k: v for k, v in case.items() if k in ("position_offset", "scale", "padding_idx")}
    if case.get("position"):
        leaves["position"] = leaf(L + 3, D)
    if case.get("type_embed"):
        leaves["type_embed"] = leaf(D)
    if case.get("norm"):
        leaves |= {"gamma": leaf(D), "beta": leaf(D)}
    if case.get("pad_mask"):
        options["pad_mask"] = ids == 1
    return ids, options, leaves


def ours(ids: Tensor, options: dict[str, Any], leaves: dict[str, Tensor], backend: str | None) -> Tensor:
    given = {k: t for k, t in leaves.items() if k in ("position", "type_embed")}
    norm = (leaves["gamma"], leaves["beta"], 1e-5) if "gamma" in leaves else None
    return embed_text(ids, leaves["table"], norm=norm, backend=backend, **given, **options)


def eager(ids: Tensor, options: dict[str, Any], leaves: dict[str, Tensor]) -> Tensor:
    x = F.embedding(ids, leaves["table"], options.get("padding_idx")) * options.get("scale", 1.0)
    if "position" in leaves:
        offset = options.get("position_offset", 0)
        x = x + F.embedding(torch.arange(offset, offset + L, device=DEVICE), leaves["position"])
    if "type_embed" in leaves:
        x = x + leaves["type_embed"]
    if "gamma" in leaves:
        x = F.layer_norm(x, (D,), leaves["gamma"], leaves["beta"], 1e-5)
    return x * (1 - options["pad_mask"][..., None].to(x.dtype)) if "pad_mask" in options else x


def with_gradients(out: Tensor, leaves: dict[str, Tensor], g: Tensor) -> Results:
    grads = torch.autograd.grad(out, list(leaves.values()), g.to(out.dtype))
    return {"out": out.detach(), **{f"d {k}": t for k, t in zip(leaves, grads, strict=True)}}


def leaves_of(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.detach().requires_grad_() for k, t in cast(given, dtype).items()}


def rows(backends: list[str], dtypes: list[torch.dtype]) -> pytest.MarkDecorator:
    """Each implementation with the dtypes that it takes; the reference, whose formula is eager's, in float64."""
    nothing = {("triton", torch.float64 if GPU else torch.bfloat16)}
    found = [(b, t) for b in backends for t in dtypes if (b, t) not in nothing and (b != "torch" or t == torch.float64)]
    return pytest.mark.parametrize("backend, dtype", found, ids=[f"{b}-{t}" for b, t in found])


@rows(ALL, [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_worse_than_eager(backend: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    g = torch.randn(B, L, D, device=DEVICE)

    def results() -> tuple[Results, ...]:
        ids, options, drawn = draw(dtype, **case)
        leaves, exact = leaves_of(drawn, dtype), leaves_of(drawn, torch.float64)
        got = with_gradients(ours(ids, options, leaves, backend), leaves, g)
        assert all(t.dtype == dtype for t in got.values())
        both = (with_gradients(eager(ids, options, given), given, g) for given in (leaves, exact))
        return got, *both

    judge(results() for _ in range(2))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("tokens", "ids"), [(1, 3), (8, 2), (50, 3), (64, 1), (100, 40)])
def test_rows_of_the_same_id_are_added_in_order(backend: str, tokens: int, ids: int) -> None:
    """Runs within a chunk, over several, ending with one; whole numbers, whose sum has one value."""
    keys = torch.randint(0, ids, (tokens, 1), device=DEVICE)
    dx = torch.randint(-9, 9, (tokens, 1, 40), device=DEVICE).float()
    for pad in (None, 0):
        want = torch.zeros(ids, 40, device=DEVICE).index_add_(0, keys[:, 0], dx[:, 0])
        want[: 0 if pad is None else 1] = 0
        assert torch.equal(WORDS[backend].rows_summed(dx, keys, ids, pad), want)


@pytest.mark.parametrize("backend", FUSED)
def test_padding_is_exactly_zero_and_gives_nothing(backend: str) -> None:
    ids, options, leaves = draw(torch.float32, **CASES["norm and padding"])
    leaves["table"].data[1] = 1e9
    found = with_gradients(ours(ids, options, leaves, backend), leaves, torch.ones(B, L, D, device=DEVICE))
    assert (found["out"][ids == 1] == 0).all()
    assert (found["d table"][1] == 0).all() and all(t.abs().max() < 1e3 for t in found.values())


@pytest.mark.parametrize("backend", ALL)
def test_views_and_nothing(backend: str) -> None:
    ids, options, leaves = draw(torch.float32, **CASES["bert"])
    want = ours(ids, options, leaves, backend)
    other = {k: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for k, t in leaves.items()}
    assert torch.equal(ours(ids.t().contiguous().t().int(), options, other, backend), want)
    assert ours(ids[:0], options, leaves, backend).shape == (0, L, D)
    assert ours(ids[:, :0], options, leaves, backend).shape == (B, 0, D)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, options, leaves = draw(torch.float32, **CASES["norm and padding"])
    want = ours(ids, options, leaves, "chunked")
    monkeypatch.setattr(blocked, "_BLOCK", 1)
    assert torch.equal(ours(ids, options, leaves, "chunked"), want)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str) -> None:
    ids, options, leaves = draw(torch.float32, **CASES["norm and padding"])
    opcheck(lambda: ours(ids, options, leaves, backend))
    opcheck(lambda: embed_text(ids, leaves["table"], padding_idx=1, backend=backend))


def test_compile_and_export() -> None:
    ids, options, leaves = draw(torch.float32, **CASES["bert"])
    torch._dynamo.reset()
    compiled = torch.compile(lambda i, t: ours(i, options, t, None), fullgraph=True, backend="aot_eager")
    g = torch.ones(B, L, D, device=DEVICE)
    got, want = (with_gradients(out, leaves, g) for out in (compiled(ids, leaves), ours(ids, options, leaves, None)))
    torch.testing.assert_close(got, want)

    class Embed(nn.Module):
        def forward(self, i: Tensor, table: Tensor, position: Tensor) -> Tensor:
            return embed_text(i, table, position=position)

    program = torch.export.export(Embed(), (ids, leaves["table"], leaves["position"]))
    torch.testing.assert_close(
        program.module()(ids, leaves["table"], leaves["position"]),
        embed_text(ids, leaves["table"], position=leaves["position"]),
    )


def test_errors() -> None:
    ids, _, leaves = draw(torch.float32, **CASES["bert"])
    table, position = leaves["table"], leaves["position"]
    for message, options in (
        ("position has 8 rows, expected at least 5 . position_offset 4", {"position": position, "position_offset": 4}),
        ("position has shape .8, 5., expected .P, 24.", {"position": position[:, :5]}),
        ("type_embed has shape .3,., expected .24.", {"type_embed": table[0, :3]}),
        ("norm is 1, expected .weight", {"norm": 1}),
        ("padding_idx is 11, expected 0 <= padding_idx < 11", {"padding_idx": 11}),
    ):
        with pytest.raises(ValueError, match=message):
            embed_text(ids, table, **options)
    with pytest.raises(TypeError, match="ids has dtype torch.float32, expected torch.int64 or torch.int32"):
        embed_text(ids.float(), table)
    with pytest.raises(TypeError, match="pad_mask has dtype torch.int64, expected torch.bool"):
        embed_text(ids, table, pad_mask=ids)
    with pytest.raises(TypeError, match="position has dtype torch.float64, expected torch.float32"):
        embed_text(ids, table, position=position.double())
    if not GPU:
        with pytest.raises(ValueError, match="ids has 12, expected 0 <= id < 11, the rows of table"):
            embed_text(torch.full((1, 2), 12), table)


# --- inside the field's models --------------------------------------------------------------------------------------


def test_bert_and_clip_of_transformers() -> None:
    allow_torchvision()
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(1, V, (B, L), device=DEVICE)
    config = transformers.BertConfig(vocab_size=V, hidden_size=D, num_attention_heads=2, max_position_embeddings=9)
    bert = transformers.models.bert.modeling_bert.BertEmbeddings(config).eval().to(DEVICE)
    norm = (bert.LayerNorm.weight, bert.LayerNorm.bias, bert.LayerNorm.eps)
    got = embed_text(
        ids, bert.word_embeddings.weight, position=bert.position_embeddings.weight, norm=norm, padding_idx=0,
        type_embed=bert.token_type_embeddings.weight[0],
    )  # fmt: skip
    torch.testing.assert_close(got, bert(ids))
    config = transformers.CLIPTextConfig(vocab_size=V, hidden_size=D, num_attention_heads=2, max_position_embeddings=9)
    clip = transformers.models.clip.modeling_clip.CLIPTextEmbeddings(config).to(DEVICE)
    got = embed_text(ids, clip.token_embedding.weight, position=clip.position_embedding.weight)
    torch.testing.assert_close(got, clip(ids))


# --- BEiT-3 ---------------------------------------------------------------------------------------------------------


def beit3(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    leaves = {"pixels": leaf(B, 3, 8, 12), "weight": leaf(D, 3, 4, 4), "bias": leaf(D), "cls_token": leaf(D)}
    leaves |= {"position": leaf(9, D), "table": leaf(V, D), "text_position": leaf(12, D), "mask_token": leaf(D)}
    ids = torch.randint(0, V, (B, L), device=DEVICE)
    options = {"ids": ids, "pad_mask": ids < 3, "mask": torch.rand(B, 6, device=DEVICE) < 0.4}
    return leaves, options


BOTH = [n for n in backends(lambda: embed_pair(**beit3(torch.float32)[0], **beit3(torch.float32)[1])) if n != "cuda"]


def written_out(leaves: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """torchscale 0.3, embedding.py, multiway_network.py and encoder.py."""
    x = F.conv2d(leaves["pixels"], leaves["weight"], leaves["bias"], stride=4).flatten(2).transpose(1, 2)
    w = options["mask"][..., None].to(x.dtype)
    x = x * (1 - w) + leaves["mask_token"] * w
    x = torch.cat([leaves["cls_token"].expand(B, 1, D), x], 1) + leaves["position"][2:9]
    y = F.embedding(options["ids"], leaves["table"]) + leaves["text_position"][2 : 2 + L]
    padded = torch.cat([torch.zeros(B, 7, dtype=torch.bool, device=DEVICE), options["pad_mask"]], 1)
    return torch.cat([x, y], 1) * (1 - padded[..., None].to(x.dtype))


@rows(BOTH, [torch.float64, torch.float32, torch.float16])
def test_embed_pair(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("cpu does not take float64")
    g = torch.randn(B, 7 + L, D, device=DEVICE)

    def results() -> tuple[Results, ...]:
        drawn, options = beit3(dtype)
        leaves, exact = leaves_of(drawn, dtype), leaves_of(drawn, torch.float64)
        got = with_gradients(embed_pair(backend=backend, **leaves, **options), leaves, g)
        both = (with_gradients(written_out(given, options), given, g) for given in (leaves, exact))
        return got, *both

    judge(results() for _ in range(2))


def test_torchscales_modules() -> None:
    embedding = pytest.importorskip("torchscale.component.embedding")
    multiway = pytest.importorskip("torchscale.component.multiway_network")
    vision = embedding.VisionEmbedding(8, 4, 3, D, contain_mask_token=True, prepend_cls_token=True).to(DEVICE)
    text = embedding.TextEmbedding(V, D).to(DEVICE)
    tables = [
        embedding.PositionalEmbedding(vision.num_position_embeddings() + 2, D),
        embedding.PositionalEmbedding(20, D),
    ]
    positions = multiway.MutliwayEmbedding(tables).to(DEVICE)
    nn.init.normal_(vision.cls_token)
    nn.init.normal_(vision.mask_token)
    pixels, ids = torch.randn(B, 3, 8, 8, device=DEVICE), torch.randint(0, V, (B, L), device=DEVICE)
    mask, pad = torch.rand(B, 4, device=DEVICE) < 0.4, ids < 3
    x = torch.cat([vision(pixels, mask), text(ids)], 1)
    positions.split_position = 5
    x = x + positions(x)
    padded = torch.cat([torch.zeros(B, 5, dtype=torch.bool, device=DEVICE), pad], 1)
    want = x * (1 - padded[..., None].type_as(x))
    got = embed_pair(
        pixels, ids, weight=vision.proj.weight, bias=vision.proj.bias, cls_token=vision.cls_token[0, 0],
        position=positions.A.weight, table=text.weight, text_position=positions.B.weight, mask=mask,
        mask_token=vision.mask_token[0, 0], pad_mask=pad,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


def test_embed_pair_without_a_class_token_or_a_mask() -> None:
    leaves, options = beit3()
    fewer = {k: t for k, t in leaves.items() if k != "cls_token"}
    mask = options.pop("mask")
    got = embed_pair(**fewer, **options)
    want = written_out(leaves | {"position": leaves["position"].roll(1, 0)}, options | {"mask": mask & False})[:, 1:]
    torch.testing.assert_close(got, want)
    assert (torch.autograd.grad(got.sum(), fewer["mask_token"], materialize_grads=True)[0] == 0).all()


@pytest.mark.parametrize("backend", [n for n in BOTH if n != "torch"])
def test_embed_pair_opcheck(backend: str) -> None:
    leaves, options = beit3(torch.float32)
    opcheck(lambda: embed_pair(backend=backend, **leaves, **options))


def test_embed_pair_compiles() -> None:
    leaves, options = beit3(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: embed_pair(**t, **options), fullgraph=True, backend="aot_eager")
    g = torch.ones(B, 7 + L, D, device=DEVICE)
    got, want = (with_gradients(out, leaves, g) for out in (compiled(leaves), embed_pair(**leaves, **options)))
    torch.testing.assert_close(got, want)


def test_embed_pair_errors() -> None:
    leaves, options = beit3(torch.float32)
    for message, other in (
        (r"ids has shape \(2, 5\), expected \[3, L\] as pixels", {"ids": options["ids"][:2]}),
        (
            "position has shape .8, 24., expected at least 7 rows . position_offset 2",
            {"position": leaves["position"][:8]},
        ),
        ("cls_token has shape .3,., expected .24.", {"cls_token": leaves["cls_token"][:3]}),
        (
            "weight has shape .24, 3, 4, 4., expected .5, C, P, P'. as table",
            {"table": leaves["table"][:, :5], "text_position": leaves["text_position"][:, :5]},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            embed_pair(**leaves | options | other)
