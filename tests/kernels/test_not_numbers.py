"""What is not a number is seen in the rows that it belongs to and in no others, in every implementation."""

from __future__ import annotations

import math

import pytest
import torch

from mmfuse import UnsupportedError
from mmfuse.fused.language import linear_cross_entropy
from mmfuse.kernels._runtime import operators
from mmfuse.kernels.codebook import code_statistics, linear_argmax, nearest_code
from mmfuse.kernels.codebook.op import assign_code
from mmfuse.kernels.contrastive import clip_loss, distill_clip_loss, moco_loss, siglip_loss
from mmfuse.kernels.patch import interpolate_position, masked_patch_loss, patch_embed, patch_embed_packed
from mmfuse.kernels.points import mini_pointnet_training

INF, NAN = math.inf, math.nan


def each_implementation_of(name):
    return pytest.mark.parametrize("backend", operators()[name].implementations)


def of(backend, function, *args, **options):
    try:
        return function(*args, **options, backend=backend)
    except UnsupportedError as error:
        pytest.skip(str(error))


# --- codebooks ------------------------------------------------------------------------------------------------------


@each_implementation_of("nearest_code")
def test_an_infinite_code_is_no_tie_of_all(backend, device):
    z = torch.tensor([[1.0, 0.1], [0.1, 1.0]], device=device)
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-INF, 0.0]], device=device)
    assert of(backend, nearest_code, z, codes).tolist() == [0, 1]
    assert of(backend, linear_argmax, z, codes).tolist() == [0, 1]
    bias = torch.tensor([0.0, 0.0, INF], device=device)
    assert of(backend, linear_argmax, z, codes.nan_to_num(0, 0, 0), bias).tolist() == [2, 2]


@each_implementation_of("code_statistics")
def test_a_row_counts_for_its_code_alone(backend, device):
    z = torch.tensor([[1.0], [NAN], [2.0]], device=device)
    counts, sums = of(backend, code_statistics, z, torch.tensor([0, 1, 0], device=device), 3)
    assert counts.tolist() == [2, 1, 0]
    assert sums[:, 0].isnan().tolist() == [False, True, False] and sums[0, 0] == 3 and sums[2, 0] == 0


@each_implementation_of("vector_quantize")
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_quantized_rows_keep_to_themselves(gradient, backend, device):
    z = torch.tensor([[0.0, 0.0], [0.9, 0.1], [NAN, 1.0], [0.2, 0.8]], device=device, requires_grad=True)
    codes = torch.tensor([[0.1, 0.1], [1.0, 0.0], [0.0, 1.0], [-INF, -INF]], device=device, requires_grad=True)
    of_rows = torch.tensor([0, 1, -1, 2], device=device)
    z_q, loss = of(backend, assign_code, z, codes, of_rows, gradient=gradient)
    # a row of zeros has no direction to turn, and gets its code all the same
    torch.testing.assert_close(z_q[[0, 1, 3]], codes[:3])
    assert z_q[2].tolist() == [0, 0] and loss.isfinite()
    (loss + z_q.sum()).backward()
    assert z.grad.isfinite().all() and z.grad[2].tolist() == [0, 0]
    assert codes.grad.isfinite().all() and codes.grad[3].tolist() == [0, 0]


# --- losses ---------------------------------------------------------------------------------------------------------


def features(n, device):
    return [torch.randn(n, 4, device=device, requires_grad=True) for _ in range(2)]


@each_implementation_of("clip_loss")
def test_an_infinite_positive_is_no_loss_of_0(backend, device):
    image, text = (t.detach() for t in features(3, device))
    image[1], text[1, 0] = INF, INF
    image[1, 1:] = 0
    assert of(backend, clip_loss, image, text, 1.0).isnan()


@each_implementation_of("moco_loss")
def test_an_infinite_own_key_is_no_loss_of_0(backend, device):
    query, key = features(3, device)
    with torch.no_grad():
        key[1] = torch.tensor([INF, 0, 0, 0])
        query[1] = torch.tensor([1.0, 0, 0, 0])
    loss = of(backend, moco_loss, query, key, torch.randn(5, 4, device=device), 1.0)
    loss.backward()
    assert loss.isnan() and query.grad.isfinite().all(1).tolist() == [True, False, True]


@each_implementation_of("distill_clip_loss")
def test_an_infinite_positive_of_a_student_is_no_loss_of_0(backend, device):
    image, text = (t.detach() for t in features(3, device))
    image[1], text[1] = (torch.tensor([x, 0, 0, 0]) for x in (INF, 1.0))
    contrastive, distill = of(backend, distill_clip_loss, image, text, 1.0, *features(3, device), 1.0)
    assert contrastive.isnan() and distill.isnan()


@each_implementation_of("siglip_loss")
def test_an_infinite_positive_costs_nothing(backend, device):
    image, text = (torch.tensor([[x]], device=device) for x in (INF, 1.0))
    assert of(backend, siglip_loss, image, text, 1.0) == 0


@each_implementation_of("clip_loss")
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_direction_without_weight_counts_for_nothing(decoupled, backend, device):
    image, text = features(4, device)
    with torch.no_grad():
        image[1] = NAN
    of(backend, clip_loss, image, text, 1.0, weights=(1.0, 0.0), decoupled=decoupled).backward()
    assert image.grad.isfinite().all(1).tolist() == [True, False, True, True]


@each_implementation_of("clip_loss")
def test_texts_without_an_image_are_not_seen_from_the_texts(backend, device):
    image, text = features(5, device)
    with torch.no_grad():
        text[0] = NAN
    loss = of(backend, clip_loss, image[:3], text, 1.0, weights=(0.0, 1.0), row_offset=1)
    loss.backward()
    assert loss.isfinite() and text.grad.isfinite().all() and image.grad.isfinite().all()
    ids = torch.tensor([7, 1, 2, 1, 3], device=device)
    loss = of(backend, clip_loss, image[:3], text, 1.0, weights=(0.0, 1.0), row_offset=1, ids=ids)
    alone = clip_loss(image[:3], text[1:4], 1.0, weights=(0.0, 1.0), ids=ids[1:4], backend="torch")
    torch.testing.assert_close(loss, alone)


@each_implementation_of("distill_clip_loss")
@pytest.mark.parametrize("of_teacher", [False, True])
def test_distilling_in_one_direction(of_teacher, backend, device):
    image, text, t_image, t_text = (*features(4, device), *features(4, device))
    with torch.no_grad():
        (t_image if of_teacher else image)[1] = NAN
    given = (image, text, 1.0, t_image, t_text, 1.0)
    contrastive, distill = of(backend, distill_clip_loss, *given, weights=(1.0, 0.0))
    (contrastive + distill).backward()
    for t in (image, t_image):
        assert t.grad[[0, 2, 3]].isfinite().all() and not t.grad[1].isfinite().all()


@each_implementation_of("clip_loss")
def test_smoothing_of_equal_pairs(backend, device):
    """All logits are equal: the loss is log N, whatever is kept for the gradient."""
    x = torch.randn(1, 5, device=device).half().expand(6, 5).detach().requires_grad_()
    weights, options = (0.0, 2.0), {"label_smoothing": 1.0, "normalize": True}
    loss = of(backend, clip_loss, x, x, 14.3, weights=weights, save="store", **options)
    assert abs(loss.item() - 2 * math.log(6)) < 2e-5


@pytest.mark.parametrize("backend", ["chunked", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_ignored_tokens_count_in_nothing(compiled, reduction, backend, device):
    hidden, other = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(5, 3, device=device, requires_grad=True), torch.randn(5, device=device)
    with torch.no_grad():
        hidden[1] = other[1] = NAN
    labels = torch.tensor([2, -100, 0, 4], device=device)

    def loss(hidden, weight):
        teacher = (other.detach(), weight.detach(), bias)
        options = {"reduction": reduction, "chunk": 2, "backend": backend}
        return linear_cross_entropy(hidden, weight, labels, teacher=teacher, alpha=0.3, **options).sum()

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    function(hidden, weight).backward()
    assert hidden.grad.isfinite().all() and hidden.grad[1].tolist() == [0] * 3 and weight.grad.isfinite().all()


# --- patches --------------------------------------------------------------------------------------------------------


@each_implementation_of("patch_embed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_mask_token_is_seen_where_it_stands(dtype, backend, device):
    pixels, weight = torch.ones(1, 1, 2, 6, device=device, dtype=dtype), torch.ones(4, 1, 2, 2, device=device)
    token = torch.full((4,), NAN, device=device, requires_grad=True)
    mask = torch.tensor([[False, True, False]], device=device)
    out = of(backend, patch_embed, pixels, weight, mask=mask, mask_token=token)
    assert out.isnan().all(2).tolist() == mask.tolist() and out.isfinite().all(2).tolist() == (~mask).tolist()
    # nor is what comes back for other tokens seen in its gradient
    g = torch.ones_like(out)
    g[0, 0] = NAN
    out.backward(g)
    assert token.grad.tolist() == [1] * 4


@each_implementation_of("masked_patch_loss")
def test_a_patch_that_is_not_masked_counts_for_nothing(backend, device):
    prediction = torch.randn(1, 3, 4, device=device)
    prediction[0, 1] = NAN
    prediction.requires_grad_()
    mask = torch.tensor([[True, False, True]], device=device)
    loss = of(backend, masked_patch_loss, prediction, torch.rand(1, 1, 2, 6, device=device), mask, patch=2)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all() and prediction.grad[0, 1].tolist() == [0] * 4


@each_implementation_of("patch_embed_packed")
def test_an_empty_image_has_no_position(backend, device):
    weight, grids = torch.ones(3, 2, device=device), torch.tensor([[0, 2], [1, 2], [2, 0]], device=device)
    table = torch.randn(2, 2, 3, device=device, requires_grad=True)
    tokens = of(backend, patch_embed_packed, torch.zeros(3, 4, 2, device=device), grids, weight, table=table).tokens
    assert (tokens[[0, 2]] == 0).all() and (tokens[1] != 0).all()
    tokens.sum().backward()
    # two patches and two rows past them, each with weights that add up to 1
    torch.testing.assert_close(table.grad.sum((0, 1)), torch.full((3,), 4.0, device=device))


@each_implementation_of("patch_embed_packed")
@pytest.mark.parametrize("images", [0, 2])
def test_no_patches_at_all(images, backend, device):
    weight, grids = torch.ones(3, 2, device=device), torch.zeros(images, 2, dtype=torch.int64, device=device)
    table = torch.randn(2, 2, 3, device=device, requires_grad=True)
    for patches, options in (((0, 2), {}), ((1, 2), {"padded_length": 0}), ((images, 0, 2), {})):
        given = (torch.zeros(patches, device=device), grids, weight)
        tokens, _, ids = of(backend, patch_embed_packed, *given, table=table, **options)
        shape = (0,) if patches == (0, 2) else (images, 0)
        assert tokens.shape == (*shape, 3) and ids.shape == (*shape, 2)
        (grad,) = torch.autograd.grad(tokens.sum(), table)
        assert (grad == 0).all()


@each_implementation_of("interpolate_position")
@pytest.mark.parametrize("mode", ["bicubic", "bicubic_aa", "bilinear_aa"])
@pytest.mark.parametrize("grid", [(5, 1), (2, 1), (1, 1)])
def test_one_column_is_one_row_turned(grid, mode, backend, device):
    table = torch.randn(4, 3, 2, device=device)
    column = of(backend, interpolate_position, table, grid, mode)
    row = interpolate_position(table.transpose(0, 1).contiguous(), grid[::-1], mode, backend="chunked")
    torch.testing.assert_close(column, row)


# --- points ---------------------------------------------------------------------------------------------------------


@each_implementation_of("mini_pointnet_training")
def test_statistics_of_huge_numbers(backend, device):
    """Their variance is no number only where it is too large itself."""
    shapes = ((2, 3), (2, 2), (2, 4), (2, 2))
    layers = [(torch.zeros(shape, device=device), torch.full(shape[:1], 1e30, device=device)) for shape in shapes]
    layers[1] = (layers[1][0], torch.ones(2, device=device))
    layers[2] = (torch.full((2, 4), 1e25, device=device), torch.zeros(2, device=device))
    groups, scale = torch.randn(3, 4, 3, device=device), torch.ones(2, device=device)
    _, mean, var = of(backend, mini_pointnet_training, groups, layers, scale)
    torch.testing.assert_close(mean, torch.full((2,), 4e25, device=device))
    assert var.isfinite().all()
