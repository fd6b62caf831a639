"""Resampled position tables: the weights of the field's own code, every implementation, and the transposes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from judge import Results, assert_no_worse, compared, judge
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.patch.positions import interpolate_position, resample_weight, sinusoid_1d, sinusoid_2d
from mmfuse.kernels.patch.positions.axes import MODES, axis_matrix, axis_weights
from mmfuse.kernels.patch.positions.reference import interpolate_position as reference
from registered import backends, opcheck

allow_torchvision()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALL = backends(lambda: interpolate_position(torch.ones(1, 1, 1, device=DEVICE), (2, 2)))
# what a mode does not go with: a scale factor is one number, a lookup does not reach beyond its table
GRIDS = {"bicubic_scale": [(6, 6), (2, 2)], "lookup": [(3, 2), (1, 3)]}
SHAPES = [(6, 5), (2, 3), (1, 6)]


def grids(mode: str) -> list[tuple[int, int]]:
    return GRIDS.get(mode, SHAPES)


# --- the weights of the official code -------------------------------------------------------------------------------

G = 7
UNIT = torch.eye(G * G)  # a table whose resampled rows are the weights


def by_vit(h: int, w: int) -> Tensor:
    """transformers' ViT at a patch of one pixel: also CLIP, BLIP-2 and BEiT, which have the same lines."""
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = ViTConfig(hidden_size=G * G, num_attention_heads=G, image_size=G, patch_size=1, num_channels=1)
    stem = ViTEmbeddings(config)
    with torch.no_grad():
        stem.position_embeddings[0, 1:] = UNIT
        return stem.interpolate_pos_encoding(torch.empty(1, h * w + 1, G * G), h, w)[0, 1:]


def by_clip(h: int, w: int) -> Tensor:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    stem = CLIPVisionEmbeddings(
        CLIPVisionConfig(hidden_size=G * G, num_attention_heads=G, image_size=G, patch_size=1, num_channels=1)
    )
    with torch.no_grad():
        stem.position_embedding.weight[1:] = UNIT
        return stem.interpolate_pos_encoding(torch.empty(1, h * w + 1, G * G), h, w)[0, 1:]


def by_blip2(h: int, w: int) -> Tensor:
    from transformers import Blip2VisionConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings

    stem = Blip2VisionEmbeddings(
        Blip2VisionConfig(hidden_size=G * G, num_attention_heads=G, image_size=G, patch_size=1)
    )
    with torch.no_grad():
        stem.position_embedding[0, 1:] = UNIT
        return stem.interpolate_pos_encoding(torch.empty(1, h * w + 1, G * G), h, w)[0, 1:]


def by_beit(h: int, w: int) -> Tensor:
    from transformers import BeitConfig
    from transformers.models.beit.modeling_beit import BeitEmbeddings

    config = BeitConfig(
        hidden_size=G * G, num_attention_heads=G, image_size=G, patch_size=1, use_absolute_position_embeddings=True
    )
    stem = BeitEmbeddings(config)
    with torch.no_grad():
        stem.position_embeddings[0, 1:] = UNIT
        return stem.interpolate_pos_encoding(torch.empty(1, h * w + 1, G * G), h, w)[0, 1:]


def by_timm(h: int, w: int) -> Tensor:
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(UNIT[None], [h, w], num_prefix_tokens=0)[0]


def by_siglip2(h: int, w: int) -> Tensor:
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    shape = torch.tensor([[h, w]])
    return Siglip2VisionEmbeddings.resize_positional_embeddings(UNIT.view(G, G, -1), shape, h * w)[0]


def by_qwen3(h: int, w: int) -> Tensor:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    index, weight = get_vision_interpolation_indices_and_weights(torch.tensor([[1, h, w]]), G, "bilinear", True)
    return torch.zeros(h * w, G * G).scatter_add_(1, index, weight)


def by_idefics2(h: int, w: int) -> Tensor:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = Idefics2VisionConfig(hidden_size=G * G, num_attention_heads=G, image_size=G, patch_size=1, num_channels=1)
    stem = Idefics2VisionEmbeddings(config)
    with torch.no_grad():
        stem.position_embedding.weight.copy_(UNIT)
        stem.patch_embedding.weight.zero_(), stem.patch_embedding.bias.zero_()
        return stem(torch.zeros(1, 1, h, w), torch.ones(1, h, w, dtype=torch.bool))[0]


def naflex(h: int, w: int, **options: object) -> Tensor:
    """timm's NaFlex stem with a projection of nothing."""
    from timm.models.naflexvit import NaFlexEmbeds

    stem = NaFlexEmbeds(
        1, 1, G * G, proj_type="linear", class_token=False, pos_embed_grid_size=(G, G), **options
    )  # fmt: skip
    coord = torch.cartesian_prod(torch.arange(h), torch.arange(w))[None]
    with torch.no_grad():
        stem.proj.weight.zero_(), stem.proj.bias.zero_()
        if stem.pos_embed is not None:
            stem.pos_embed.copy_(UNIT.view(1, G, G, -1))
        else:
            stem.pos_embed_y.copy_(UNIT[:G]), stem.pos_embed_x.copy_(UNIT[G : 2 * G])
        return stem(torch.zeros(1, h * w, 1), patch_coord=coord)[0][0]


def by_imagebind(h: int, w: int) -> Tensor:
    """Its `interpolate_pos_encoding_2d`."""
    x = UNIT.reshape(1, G, G, -1).permute(0, 3, 1, 2)
    y = F.interpolate(x, scale_factor=math.sqrt(h * w / G**2), mode="bicubic")
    return y.permute(0, 2, 3, 1).flatten(0, 2)


OFFICIAL = {
    "ViT": (by_vit, "bicubic"),
    "CLIP": (by_clip, "bicubic"),
    "BLIP-2": (by_blip2, "bicubic"),
    "BEiT": (by_beit, "bicubic"),
    "timm": (by_timm, "bicubic_aa"),
    "NaFlex": (naflex, "bicubic_aa"),
    "SigLIP2": (by_siglip2, "bilinear_aa"),
    "Qwen3-VL": (by_qwen3, "bilinear_corners"),
    "Idefics2": (by_idefics2, "nearest_bucket"),
    "ImageBind": (by_imagebind, "bicubic_scale"),
    "grid_sample": (lambda h, w: naflex(h, w, pos_embed_use_grid_sample=True), "grid_sample"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_weights_are_the_official_ones_bit_for_bit(name: str) -> None:
    official, mode = OFFICIAL[name]
    for h, w in [(11, 11), (3, 3)] if mode == "bicubic_scale" else [(11, 9), (3, 13), (5, 4), (1, 6), (7, 7)]:
        got, expected = interpolate_position(UNIT, (h, w), mode, backend="torch"), official(h, w)
        if mode == "grid_sample":  # sampled in two dimensions at once, in another order of products
            assert_no_worse(got, expected, interpolate_position(UNIT.double(), (h, w), mode, backend="torch"))
        else:
            assert torch.equal(got, expected), (h, w)
        # as products of the two axes: what falls on the border twice may be rounded otherwise
        blocks = interpolate_position(UNIT, (h, w), mode, backend="chunked")
        inner = (
            slice(None) if mode in ("bicubic_aa", "bilinear_aa", "bilinear_corners", "nearest_bucket") else ~edge(h, w)
        )
        assert torch.equal(blocks[inner], got[inner]), (h, w)
        assert (blocks - got).abs().max() <= 2 * torch.finfo(torch.float32).eps


def edge(h: int, w: int) -> Tensor:
    """The targets that see beyond the border."""
    seen = [(0.5 + torch.arange(n)) * G / n - 0.5 for n in (h, w)]
    y, x = ((at < 1) | (at >= G - 2) for at in seen)
    return (y[:, None] | x).flatten()


@pytest.mark.parametrize("sampled", [False, True])
def test_factorised_tables_are_naflex(sampled: bool) -> None:
    y, x = UNIT[:G], UNIT[G : 2 * G]
    for h, w in [(11, 9), (3, 13), (1, 6), (7, 7)]:
        got = interpolate_position((y, x), (h, w), "linear_1d")
        expected = naflex(h, w, pos_embed="factorized", pos_embed_use_grid_sample=sampled)
        if not sampled:
            assert torch.equal(got, expected), (h, w)
        else:  # its coordinates go through an affine grid of the batch
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_aspect_ratio_is_kept_as_naflex_does() -> None:
    for h, w in [(11, 4), (3, 13)]:
        expected = naflex(h, w, pos_embed_ar_preserving=True)
        assert torch.equal(
            interpolate_position(UNIT, (h, w), "bicubic_aa", keep_aspect=True, backend="torch"), expected
        )


@pytest.mark.parametrize("mode", MODES)
def test_closed_weights_are_those_of_the_functions(mode: str) -> None:
    for source, size in [(7, 11), (7, 3), (16, 1), (5, 5), (14, 37)]:
        size = min(size, source) if mode == "lookup" else size
        index = torch.arange(size)
        for dtype in (torch.float32, torch.float64):
            got = axis_weights(mode, index, torch.full_like(index, size), source, dtype)
            expected = axis_matrix(mode, size, source, dtype, torch.device("cpu"))
            # a coordinate up to `size` is rounded once more or less
            assert (got - expected).abs().max() <= 8 * max(1, source / 4) * torch.finfo(dtype).eps
            torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))


# --- every implementation -------------------------------------------------------------------------------------------


def gradient_of(table: Tensor, grid: tuple[int, int], mode: str, backend: str | None) -> tuple[Tensor, Tensor]:
    table = table.detach().requires_grad_()
    out = interpolate_position(table, grid, mode, backend=backend)
    g = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, table, g)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [b for b in ALL if b != "torch"])
def test_values_and_gradients(backend: str, mode: str, dtype: torch.dtype) -> None:
    interpreted = backend == "triton" and not GPU
    if interpreted and dtype != torch.float32:
        pytest.skip("16 bits in the interpreter are no GPU's")
    sizes = grids(mode)[-1 if interpreted else 0 :]

    def run(table: Tensor, name: str) -> Results:
        found = [t.flatten() for grid in sizes for t in gradient_of(table, grid, mode, name)]
        return {"values and gradients": torch.cat(found)}

    def draw() -> Tensor:
        return torch.randn(4, 4 if mode == "bicubic_scale" else 3, 8, device=DEVICE)

    judge(compared(run, draw, backend, dtype, draws=2))


@pytest.mark.skipif("triton" not in ALL, reason="no triton")
@pytest.mark.parametrize("mode", ["bicubic_aa", "bicubic", "bilinear_corners"])
def test_triton_takes_float64(mode: str) -> None:
    table = torch.randn(3, 2, 4, dtype=torch.float64, device=DEVICE)
    for got, expected in zip(*(gradient_of(table, (4, 3), mode, b) for b in ("triton", "torch")), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_transpose(mode: str) -> None:
    for h, w in grids(mode):
        table = torch.randn(4, 4 if mode == "bicubic_scale" else 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: interpolate_position(t, (h, w), mode, backend="chunked"), table)  # noqa: B023
    y, x = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    if mode not in ("bicubic_scale", "lookup"):
        assert torch.autograd.gradcheck(lambda *t: interpolate_position(t, (6, 2), mode, backend="chunked"), (y, x))


def test_two_runs_are_equal_and_strides_do_not_matter() -> None:
    table = torch.randn(8, 5, 4, device=DEVICE).permute(2, 1, 0)[:, 1:]
    for backend in (b for b in ALL if b != "triton" or GPU):
        one, two = (gradient_of(t, (7, 9), "bicubic_aa", backend) for t in (table, table.contiguous()))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("backend", [None, *ALL])
def test_empty_and_equal_grids(backend: str | None) -> None:
    table = torch.randn(3, 3, 4, device=DEVICE, requires_grad=True)
    for grid in ((0, 5), (4, 0)):
        out = interpolate_position(table, grid, backend=backend)
        assert out.shape == (0, 4)
        assert not torch.autograd.grad(out.sum(), table)[0].any()
    assert torch.equal(
        interpolate_position(table.flatten(0, 1), (3, 3), "bicubic_aa", backend=backend), table.flatten(0, 1)
    )


def test_compiled_and_checked() -> None:
    table = torch.randn(4, 4, 8, device=DEVICE, requires_grad=True)

    def fn(t: Tensor) -> Tensor:
        return interpolate_position(t, (5, 6), "bicubic", backend="chunked")

    assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(table), fn(table))
    opcheck(lambda: interpolate_position(table, (5, 6), "bilinear_aa", backend="chunked"))


def test_errors_name_the_argument() -> None:
    table = torch.randn(9, 4)
    for error, match, call in (
        (ValueError, "mode", lambda: interpolate_position(table, (2, 2), "cubic")),
        (ValueError, "mode", lambda: interpolate_position(table, (2, 2), "linear_1d")),
        (ValueError, "square number", lambda: interpolate_position(table[:8], (2, 2))),
        (ValueError, "squares", lambda: interpolate_position(table, (2, 3), "bicubic_scale")),
        (ValueError, "at most", lambda: interpolate_position(table, (4, 3), "lookup")),
        (TypeError, "dtype", lambda: interpolate_position(table.long(), (2, 2))),
        (TypeError, "pair", lambda: interpolate_position((table, table, table), (2, 2), "linear_1d")),
        (ValueError, "grid", lambda: interpolate_position(table, (-1, 2))),
        (ValueError, "grid is 3, expected two numbers", lambda: interpolate_position(table, 3)),
        (ValueError, "size", lambda: resample_weight(torch.randn(2, 3, 4, 4), (0, 4))),
        (ValueError, "dim", lambda: sinusoid_2d(2, 2, 6)),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(mmfuse.UnsupportedError):
        interpolate_position(table, (2, 2), backend="cpu")


# --- FlexiViT and sinusoids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (20, 12), (14, 15)])
def test_weights_of_another_patch_size_are_timms(size: tuple[int, int]) -> None:
    from timm.layers.patch_embed import resample_patch_embed

    weight = torch.randn(3, 2, 10, 10)
    resize = torch.einsum(
        "yi,xj->yxij", *(axis_matrix("bicubic_aa", n, 10, torch.float64, torch.device("cpu")) for n in size)
    )
    exact = weight.double().flatten(2) @ torch.linalg.pinv(resize.flatten(2).flatten(0, 1))
    got = resample_weight(weight, size)
    assert_no_worse(got, resample_patch_embed(weight, list(size)), exact.view(3, 2, *size))


def test_a_resized_patch_has_the_same_response() -> None:
    # exactly so where the patch grows: pinv(R) R = 1
    weight = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    pixels = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    larger = F.interpolate(pixels, (9, 12), mode="bicubic", antialias=True)
    resampled = resample_weight(weight, (9, 12))
    torch.testing.assert_close((resampled * larger).sum((1, 2, 3)), (weight * pixels).sum((1, 2, 3)))
    small = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resample_weight(w, (4, 2)), small)


def test_sinusoids_are_the_official_tables() -> None:
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    assert torch.equal(sinusoid_1d(20, 12), get_sinusoid_encoding_table(20, 12)[0])
    rows_first = sinusoid_2d(3, 5, 16, columns_first=False)
    assert torch.equal(rows_first, build_2d_sinusoidal_position_embedding(3, 5, 16))
    assert torch.equal(sinusoid_2d(3, 5, 16), torch.cat([rows_first[:, 8:], rows_first[:, :8]], 1))


def test_the_reference_is_differentiable_as_it_stands() -> None:
    table = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: reference(t, 5, 2, (5, 5), "bicubic"), table)
