"""Ragged batches of patches: every implementation against the definition, and the definition against the real stems."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfuse
from judge import Results, cast, compared, judge
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.patch.positions import interpolate_position
from mmfuse.kernels.patch.ragged import drop_patches, pack_first_fit, pack_images, patch_embed_packed
from mmfuse.kernels.patch.ragged.layout import layout, layout_of
from registered import backends, opcheck

allow_torchvision()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(1, 1, device=DEVICE)
ALL = backends(lambda: patch_embed_packed(PROBE, PROBE.new_ones((1, 2), dtype=torch.int64), PROBE))
OURS = [n for n in ALL if n != "torch"]
K, D = 12, 16

# name: (grids, rows of each image in [B, L, K] or 0, shape of the table or of two, options)
CASES: dict[str, tuple[list[tuple[int, ...]], int, Any, dict[str, Any]]] = {
    "no table": ([(2, 3), (4, 1)], 0, None, {}),
    "siglip2": ([(2, 3), (1, 6), (4, 2)], 8, (3, 3), {}),
    "naflex": ([(2, 3), (1, 6)], 7, (4, 3), {"mode": "bicubic_aa", "pad_position": "none", "keep_aspect": True}),
    "packed with an empty image": ([(2, 3), (0, 4), (3, 4)], 0, (3, 3), {}),
    "one image": ([(1, 5)], 0, (3, 2), {"mode": "bicubic"}),
    "qwen3-vl": ([(2, 2, 4), (1, 4, 2)], 0, (3, 3), {"mode": "bilinear_corners", "order": "merge2"}),
    "factorised": ([(2, 3), (3, 4)], 0, ((4,), (3,)), {"mode": "linear_1d"}),
    "navit": ([(2, 3), (3, 1)], 0, ((4,), (3,)), {"mode": "lookup"}),
    "idefics2": ([(2, 5), (3, 1)], 0, (3, 3), {"mode": "nearest_bucket"}),
    "kept": ([(2, 3), (1, 6)], 0, (3, 3), {"ids_keep": [5, 0, 7, 9, 6]}),
    "padded result": ([(2, 3), (0, 1), (1, 4)], 0, (3, 3), {"padded_length": 7}),
    "no image": ([], 0, (3, 3), {}),
    "only empty images": ([(0, 3), (0, 0)], 0, (3, 3), {}),
}


Given = tuple[dict[str, Tensor], dict[str, Any]]


def make(name: str, pixels: str = "float") -> Given:
    """(tensors that are differentiated, options)."""
    grids, padded, shape, options = CASES[name]
    g = torch.tensor(grids, dtype=torch.int64).view(len(grids), -1 if grids else 2)
    rows = (len(grids), padded, K) if padded else (int(g.prod(1).sum()), K)
    x = torch.randint(0, 256, rows, dtype=torch.uint8) if pixels == "uint8" else torch.randn(rows)
    options = dict(options, grids=g.to(DEVICE))
    if "ids_keep" in options:
        options["ids_keep"] = torch.tensor(options["ids_keep"], device=DEVICE)
    tensors = {"patches": x, "weight": torch.randn(D, K), "bias": torch.randn(D)}
    if isinstance(shape, tuple) and isinstance(shape[0], tuple):
        tensors |= {"rows": torch.randn(*shape[0], D), "columns": torch.randn(*shape[1], D)}
    elif shape:
        tensors["table"] = torch.randn(*shape, D)
    return {k: t.to(DEVICE) for k, t in tensors.items()}, options


def results(embed: Callable[..., Tensor], given: Given) -> Results:
    """The tokens, and the gradients of all that has one."""
    tensors, options = given
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t.is_floating_point()}
    out = embed(**arguments(tensors | leaves), **options)
    g = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), g)
    return {"tokens": out.detach(), **{f"d {k}": t for k, t in zip(leaves, grads, strict=True)}}


def arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    named: dict[str, Any] = dict(tensors)
    return named | {"table": (named.pop("rows"), named.pop("columns"))} if "rows" in named else named


def tokens(given: Given, backend: str | None) -> Results:
    return results(lambda **named: patch_embed_packed(**named, backend=backend).tokens, given)


def written_out(
    patches: Tensor, weight: Tensor, bias: Tensor, table: Any = None, *, grids: Tensor, mode: str = "bilinear_aa",
    keep_aspect: bool = False, order: str = "raster", ids_keep: Tensor | None = None, pad_position: str = "first",
    padded_length: int | None = None,
) -> Tensor:  # fmt: skip
    """Image by image: the products, and the table resampled to the grid, a row for each patch of each frame."""
    found, begin = [], 0
    for i, grid in enumerate(grids.tolist()):
        (frames, h, w), n = (1, *grid)[-3:], prod(grid)
        y = (patches[i] if patches.dim() == 3 else patches[begin : begin + n]) @ weight.t() + bias
        if table is not None and n:
            at = torch.arange(h * w).view(h, w)
            at = at.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2) if order == "merge2" else at
            own = interpolate_position(table, (h, w), mode, keep_aspect=keep_aspect, backend="torch")
            own = own[at.flatten().to(DEVICE)].repeat(frames, 1)
            past = own[:1] if pad_position == "first" else torch.zeros_like(own[:1])
            y = y + torch.cat([own, past.expand(len(y) - n, -1)])
        found.append(y if padded_length is None else F.pad(y, (0, 0, 0, padded_length - n)))
        begin += n
    if patches.dim() == 3 or padded_length is not None:
        return torch.stack(found)
    y = torch.cat([*found, patches[:0] @ weight.t()])
    return y if ids_keep is None else y[ids_keep]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_formula(name: str) -> None:
    given = cast(make(name), torch.float64)
    got = tokens(given, "torch")
    if name in ("no image", "only empty images"):
        assert got["tokens"].shape == (0, D) and not any(t.any() for t in got.values())
    else:
        torch.testing.assert_close(got, results(written_out, given), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", OURS)
def test_tokens_and_gradients(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend == "triton" and not GPU and dtype != torch.float32:
        pytest.skip("16 bits in the interpreter are no GPU's")
    if backend == "triton" and not GPU and name in ("naflex", "one image", "navit", "idefics2"):
        pytest.skip("slow in the interpreter; these modes are tested with the positions")
    judge(compared(tokens, lambda: make(name), backend, dtype, draws=2))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("backend", OURS)
def test_bytes_are_normalised_inside(backend: str, channels_last: bool) -> None:
    values = {"mean": [0.4, 0.5, 0.6], "std": (0.2, 0.3, 0.25), "channels_last": channels_last}

    def draw() -> Given:
        tensors, options = make("siglip2", pixels="uint8")
        return tensors, options | values

    judge(compared(tokens, draw, backend, draws=2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_reference_normalises_bytes(channels_last: bool) -> None:
    tensors, options = cast(make("siglip2", pixels="uint8"), torch.float64)
    values = {"mean": [0.4, 0.5, 0.6], "std": (0.2, 0.3, 0.25), "channels_last": channels_last}
    c = torch.arange(K) % 3 if channels_last else torch.arange(K) // 4
    mean, std = (torch.tensor(values[k], dtype=torch.float64)[c].to(DEVICE) for k in ("mean", "std"))
    got = tokens((tensors, options | values), "torch")
    want = results(written_out, (tensors | {"patches": (tensors["patches"].double() / 255 - mean) / std}, options))
    assert want.keys() - got.keys() == {"d patches"}
    torch.testing.assert_close(got, {k: want[k] for k in got}, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["siglip2", "qwen3-vl", "factorised", "kept", "padded result"])
def test_gradcheck(name: str) -> None:
    tensors, options = cast(make(name), torch.float64)
    keys = [k for k in tensors if k in ("weight", "bias", "table", "rows", "patches")]

    def fn(*values: Tensor) -> Tensor:
        named = arguments({**tensors, **dict(zip(keys, values, strict=True))})
        return patch_embed_packed(**named, **options, backend=OURS[-1]).tokens

    assert torch.autograd.gradcheck(fn, tuple(tensors[k].requires_grad_() for k in keys), fast_mode=True)


# --- the real stems -------------------------------------------------------------------------------------------------


def test_siglip2() -> None:
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    stem = Siglip2VisionEmbeddings(Siglip2VisionConfig(hidden_size=12, num_patches=16, patch_size=2, num_channels=3))
    pixels, shapes = torch.randn(3, 10, 12), torch.tensor([(2, 5), (3, 3), (1, 7)])
    expected = stem(pixels, shapes)
    weight, bias, table = stem.patch_embedding.weight, stem.patch_embedding.bias, stem.position_embedding.weight
    got = patch_embed_packed(pixels, shapes, weight, bias, table=table)
    torch.testing.assert_close(got.tokens, expected)
    assert got.cu_seqlens.tolist() == [0, 10, 19, 26] and got.cu_seqlens.dtype == torch.int32
    g = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad(t, (weight, bias, table), g) for t in (got.tokens, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factorised", [False, True])
def test_naflex(factorised: bool) -> None:
    from timm.models.naflexvit import NaFlexEmbeds

    kind = "factorized" if factorised else "learned"
    stem = NaFlexEmbeds(2, 3, 12, proj_type="linear", class_token=False, pos_embed=kind, pos_embed_grid_size=(4, 3))
    pixels, coord = torch.randn(2, 9, 12), torch.zeros(2, 9, 2, dtype=torch.int64)
    shapes = torch.tensor([(2, 4), (3, 1)])
    for i, (h, w) in enumerate(shapes.tolist()):
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    with torch.no_grad():
        expected = stem(pixels, patch_coord=coord)[0]
    table = (stem.pos_embed_y[0], stem.pos_embed_x[0]) if factorised else stem.pos_embed[0]
    mode = "linear_1d" if factorised else "bicubic_aa"
    got = patch_embed_packed(
        pixels, shapes, stem.proj.weight, stem.proj.bias, table=table, mode=mode, pad_position="none"
    )  # fmt: skip
    torch.testing.assert_close(got.tokens, expected)
    assert torch.equal(got.ids[0, :8], coord[0, :8])


def test_qwen3_vl() -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    config = Qwen3VLVisionConfig(hidden_size=8, patch_size=2, in_channels=3)
    stem, table = Qwen3VLVisionPatchEmbed(config), torch.randn(25, 8)
    grids = torch.tensor([(2, 4, 2), (1, 2, 6)])
    pixels = torch.randn(28, 3 * 2 * 2 * 2)
    index, share = get_vision_interpolation_indices_and_weights(grids, 5, "bilinear", True, 2)
    with torch.no_grad():
        expected = stem(pixels) + (table[index] * share[:, :, None]).sum(1)
    weight, bias = stem.proj.weight.flatten(1), stem.proj.bias
    got = patch_embed_packed(pixels, grids, weight, bias, table=table, mode="bilinear_corners", order="merge2")
    torch.testing.assert_close(got.tokens, expected)
    assert torch.equal(got.ids, get_vision_position_ids(grids, 2, include_temporal=True))


def test_idefics2() -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = Idefics2VisionConfig(hidden_size=12, image_size=10, patch_size=2, num_attention_heads=2)
    stem = Idefics2VisionEmbeddings(config)
    pixels = torch.randn(1, 3, 6, 8)
    with torch.no_grad():
        expected = stem(pixels, torch.ones(1, 3, 4, dtype=torch.bool))
    patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(12, 12)
    weight, bias, table = stem.patch_embedding.weight, stem.patch_embedding.bias, stem.position_embedding.weight
    got = patch_embed_packed(
        patches, torch.tensor([(3, 4)]), weight.flatten(1), bias, table=table, mode="nearest_bucket"
    )  # fmt: skip
    torch.testing.assert_close(got.tokens, expected[0])


# --- the rest of the contract ---------------------------------------------------------------------------------------


def test_nothing_is_read_from_the_device() -> None:
    """A fake tensor has no values: asking for one raises, as waiting for a GPU would."""
    with FakeTensorMode():
        grids, noise = torch.ones(3, 2, dtype=torch.int64), torch.rand(20)
        for options in ({"padded_in": 8}, {"padded_out": 8}, {"ids_keep": torch.ones(4, dtype=torch.int64)}, {}):
            at = layout(grids, 24 if "padded_in" in options else 20, merge=2, keep_aspect=True, **options)
            assert at.cu_seqlens.shape == (4,)
        assert drop_patches(noise, grids, torch.ones(3, dtype=torch.int64), 3).shape == (3,)
        weight, table = torch.randn(6, 4), torch.randn(9, 6)
        for padded in (None, 8):
            out = patch_embed_packed(
                torch.randn(20, 4), grids, weight, table=table, padded_length=padded, backend="torch"
            )  # fmt: skip
            assert out.tokens.shape == ((20, 6) if padded is None else (3, 8, 6))


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{}, {"padded_out": 17}, {"padded_in": 17}, {"padded_in": 17, "pad_first": True}, {"keep_aspect": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "sizes", [[[2, 4], [0, 6], [2, 4], [4, 2]], [[1, 2, 4], [2, 0, 2], [2, 2, 4]], [[2, 2]]], ids=str
)
def test_the_host_finds_places_as_the_device(sizes: list[list[int]], how: dict[str, Any], merge: int) -> None:
    grids = torch.tensor(sizes)
    rows = len(sizes) * how["padded_in"] if "padded_in" in how else 29
    of_host, of_device = layout_of(sizes, rows, merge=merge, **how), layout(grids, rows, merge=merge, **how)
    for got, want in zip(of_host, of_device, strict=True):
        assert (got is None) == (want is None)
        assert want is None or got.dtype == want.dtype and torch.equal(got, want)


def test_what_lies_past_the_end_has_no_position() -> None:
    tensors, options = make("one image")
    longer = {**tensors, "patches": torch.cat([tensors["patches"], torch.randn(3, K, device=DEVICE)])}
    plain = F.linear(longer["patches"], tensors["weight"], tensors["bias"])
    for backend in (b for b in ALL if b != "triton" or GPU):
        out = patch_embed_packed(**longer, **options, backend=backend)
        torch.testing.assert_close(out.tokens[5:], plain[5:])
        torch.testing.assert_close(out.tokens[:5], patch_embed_packed(**tensors, **options, backend=backend).tokens)
        assert not out.ids[5:].any()


def test_strides_and_runs_do_not_matter() -> None:
    tensors, options = make("siglip2")
    strided = {k: t.movedim(-1, 0).contiguous().movedim(0, -1) for k, t in tensors.items()}
    for backend in (b for b in ALL if b != "triton" or GPU):
        one, two, other = (tokens((t, options), backend) for t in (tensors, tensors, strided))
        for key in one:
            assert torch.equal(one[key], two[key])
            torch.testing.assert_close(other[key], one[key])


def test_compiled_and_checked() -> None:
    tensors, options = make("kept")
    fn = torch.compile(
        lambda **t: patch_embed_packed(**t, **options, backend=OURS[-1]).tokens, fullgraph=True, backend="aot_eager"
    )
    expected = patch_embed_packed(**tensors, **options, backend=OURS[-1]).tokens
    torch.testing.assert_close(fn(**tensors), expected)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    opcheck(lambda: patch_embed_packed(**leaves, **options, backend="chunked").tokens)


def test_autocast_and_dtype() -> None:
    tensors, options = make("siglip2")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert patch_embed_packed(**tensors, **options).tokens.dtype == torch.bfloat16
        assert patch_embed_packed(**tensors, **options, dtype=torch.float32).tokens.dtype == torch.float32


def test_only_what_is_asked_for_has_a_gradient() -> None:
    tensors, options = make("siglip2")
    tensors["table"].requires_grad_()
    out = patch_embed_packed(**tensors, **options).tokens
    out.sum().backward()
    assert tensors["weight"].grad is None
    # every token has weights that add up to one
    torch.testing.assert_close(tensors["table"].grad.sum(), torch.tensor(float(out.numel()), device=DEVICE))


def test_errors_name_the_argument() -> None:
    x, w, g = torch.randn(6, K), torch.randn(D, K), torch.tensor([(2, 3)])
    table = torch.randn(9, D)
    for error, match, call in (
        (ValueError, "patches", lambda: patch_embed_packed(x[:, :5], g, w)),
        (ValueError, "grids", lambda: patch_embed_packed(x, g[0], w)),
        (TypeError, "grids", lambda: patch_embed_packed(x, g.float(), w)),
        (ValueError, "add up to 12", lambda: patch_embed_packed(x, torch.tensor([(3, 4)]), w)),
        (ValueError, "negative", lambda: patch_embed_packed(x, -g, w)),
        (ValueError, "merge2", lambda: patch_embed_packed(x, g, w, order="merge2")),
        (ValueError, "order", lambda: patch_embed_packed(x, g, w, order="column")),
        (ValueError, "at most 4", lambda: patch_embed_packed(x, g, w, padded_length=4)),
        (ValueError, "ids_keep", lambda: patch_embed_packed(x, g, w, ids_keep=torch.tensor([6]))),
        (ValueError, "table", lambda: patch_embed_packed(x, g, w, table=table[:, :3])),
        (ValueError, "mode", lambda: patch_embed_packed(x, g, w, table=table, mode="linear_1d")),
        (ValueError, "mean", lambda: patch_embed_packed(x, g, w, mean=[0.5] * 5)),
        (ValueError, "bias", lambda: patch_embed_packed(x, g, w, torch.randn(3))),
        (ValueError, "pad_position", lambda: patch_embed_packed(x, g, w, pad_position="last")),
        (ValueError, "one of them", lambda: patch_embed_packed(x, g, w, ids_keep=g[0], padded_length=6)),
        (ValueError, "lengths", lambda: pack_first_fit([5], 4)),
        (ValueError, "keep", lambda: drop_patches(torch.rand(6), g, torch.tensor([1, 2]), 3)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(mmfuse.UnsupportedError):
        patch_embed_packed(x, g, w, backend="cpu")


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "merge2"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_packed_images_are_the_patches_of_a_convolution(channels_last: bool, order: str) -> None:
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((8, 4), (4, 12))]
    images[0] = F.pad(images[0], (1, 2))[:, :, 1:-2]  # a crop
    patches, grids = pack_images(images, 2, order=order, channels_last=channels_last)
    assert patches.dtype == torch.uint8 and grids.tolist() == [[4, 2], [2, 6]]
    weight, mean = torch.randn(D, 3, 2, 2), [0.4, 0.5, 0.6]
    flat = weight.permute(0, 2, 3, 1).flatten(1) if channels_last else weight.flatten(1)
    out = patch_embed_packed(patches, grids, flat, mean=mean, order=order, channels_last=channels_last)
    for image, first, last in zip(images, out.cu_seqlens[:-1], out.cu_seqlens[1:], strict=True):
        pixels = image / 255 - torch.tensor(mean)[:, None, None]
        expected = F.conv2d(pixels, weight, stride=2)
        y, x = out.ids[first:last].unbind(1)
        torch.testing.assert_close(out.tokens[first:last], expected[:, y, x].t(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="images"):
        pack_images([images[0][:, 1:]], 2, order=order)


def test_first_fit() -> None:
    assert pack_first_fit([3, 5, 2, 4, 1], 6) == [[0, 2, 4], [1], [3]]
    assert pack_first_fit([3, 5, 2, 4, 1], 6, sort=True) == [[1, 4], [3, 2], [0]]
    assert pack_first_fit([], 6) == [] and pack_first_fit([0, 6], 6) == [[0, 1]]


def test_dropped_patches_are_those_with_the_most_noise() -> None:
    grids, keep = torch.tensor([(2, 3), (0, 2), (2, 2)]), torch.tensor([2, 0, 3])
    noise = torch.rand(10)
    ids = drop_patches(noise, grids, keep, 5)
    assert ids[:2].tolist() == noise[:6].argsort()[:2].tolist()
    assert (ids[2:] - 6).tolist() == noise[6:].argsort()[:3].tolist()
    out = patch_embed_packed(torch.randn(10, K), grids, torch.randn(D, K), ids_keep=ids)
    assert out.cu_seqlens.tolist() == [0, 2, 2, 5]
