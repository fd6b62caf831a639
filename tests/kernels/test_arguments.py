"""What does not fit is an error that names it, whatever implementation would have met it first."""

from __future__ import annotations

import pytest
import torch

from mmfuse.fused.language import linear_cross_entropy
from mmfuse.kernels.codebook import code_statistics
from mmfuse.kernels.contrastive import clip_loss, distill_clip_loss, hard_negatives, siglip_loss
from mmfuse.kernels.patch import interpolate_position, masked_patch_loss, patch_embed, patch_embed_packed
from mmfuse.kernels.points import ball_query, farthest_points, mini_pointnet_training, nearest_neighbors
from mmfuse.kernels.text import embed_pair, embed_text

X, IDS = torch.ones(3, 4), torch.zeros(1, 3, dtype=torch.int64)
CLOUD, META = torch.ones(1, 5, 3), torch.ones(3, 4, device="meta")
PIXELS, WEIGHT = torch.ones(1, 3, 2, 2), torch.ones(4, 3, 2, 2)
PAIR = {"pixels": PIXELS, "ids": IDS, "weight": WEIGHT, "position": X, "table": X, "text_position": torch.ones(5, 4)}
GRIDS = torch.tensor([[1, 3]])
LAYERS = [(torch.ones(shape), torch.ones(shape[0])) for shape in ((2, 3), (2, 2), (2, 4), (2, 2))]
MASK = torch.tensor([[True]])
RECONSTRUCTION = {"prediction": torch.ones(1, 1, 12), "pixels": PIXELS, "mask": MASK, "patch": 2}
WORDS = {"hidden": X, "weight": X, "labels": torch.zeros(3, dtype=torch.int64)}

CASES = {
    # numbers that are no integers
    "clip": (clip_loss, (X, X, 1.0), {"row_offset": 0.0}, TypeError, "row_offset is 0.0, expected an integer"),
    "distill": (distill_clip_loss, (X, X, 1.0, X, X, 1.0), {"row_offset": None}, TypeError, "row_offset is None"),
    "siglip": (siglip_loss, (X, X, 1.0), {"row_offset": 0.5, "negative_only": True}, TypeError, "row_offset is 0.5"),
    "negatives": (hard_negatives, (X, X, 1.0), {"row_offset": "x"}, TypeError, "row_offset is 'x'"),
    "statistics": (code_statistics, (X, IDS[0], 2.5), {}, TypeError, "K is 2.5, expected an integer"),
    "neighbours": (nearest_neighbors, (CLOUD, CLOUD, 2.5), {}, TypeError, "k is 2.5, expected an integer"),
    "ball": (ball_query, (CLOUD, CLOUD, True, 1.0), {}, TypeError, "k is True, expected an integer"),
    "farthest": (farthest_points, (CLOUD, 2.0), {}, TypeError, "k is 2.0, expected an integer"),
    "grid": (interpolate_position, (X[:, None], (2.5, 2)), {}, TypeError, "grid's size is 2.5, expected an integer"),
    "words": (embed_text, (IDS, X), {"padding_idx": 1.0}, TypeError, "padding_idx is 1.0, expected an integer"),
    "offset": (embed_text, (IDS, X), {"position_offset": 0.0}, TypeError, "position_offset is 0.0"),
    "pair": (embed_pair, (), PAIR | {"padding_idx": "x"}, TypeError, "padding_idx is 'x'"),
    "stride": (patch_embed, (PIXELS, WEIGHT), {"stride": 1.5}, ValueError, "stride is 1.5, expected a positive"),
    "packed": (patch_embed_packed, (X, GRIDS, X), {"padded_length": 3.0}, TypeError, "padded_length is 3.0"),
    "packed, negative": (patch_embed_packed, (X, GRIDS, X), {"padded_length": -1}, ValueError, "padded_length is -1"),
    # other objects
    "pixels": (embed_pair, (), PAIR | {"pixels": None}, TypeError, "pixels is NoneType, expected a tensor"),
    "weight": (embed_pair, (), PAIR | {"weight": X}, ValueError, "weight has shape .3, 4., expected .4, C, P, P'."),
    "position": (embed_pair, (), PAIR | {"position": 1.0}, TypeError, "position is float, expected a tensor"),
    "cls_token": (embed_pair, (), PAIR | {"cls_token": 1.0}, TypeError, "cls_token is float, expected a tensor"),
    "dtype": (patch_embed_packed, (X, GRIDS, X), {"dtype": "x"}, TypeError, "dtype is 'x', expected a floating-point"),
    "loss's pixels": (masked_patch_loss, (), RECONSTRUCTION | {"pixels": 1}, TypeError, "pixels is int"),
    "loss's mask": (masked_patch_loss, (), RECONSTRUCTION | {"mask": None}, TypeError, "mask is NoneType"),
    "eps": (mini_pointnet_training, (CLOUD, LAYERS, X[0, :2]), {"eps": None}, TypeError, "eps is None, expected a num"),
    "norm's eps": (embed_text, (IDS, X), {"norm": (None, None, "x")}, TypeError, "norm's eps is 'x', expected"),
    "teacher": (linear_cross_entropy, (), WORDS | {"teacher": 1}, TypeError, "teacher is int"),
    "hidden": (linear_cross_entropy, (), WORDS | {"hidden": None}, TypeError, "hidden is NoneType, expected a tensor"),
    "labels": (linear_cross_entropy, (), WORDS | {"labels": 3}, TypeError, "labels is int, expected a tensor"),
    "chunk": (linear_cross_entropy, (), WORDS | {"chunk": 1.5}, TypeError, "chunk is 1.5, expected an integer"),
    # tensors on another device
    "mean": (masked_patch_loss, (), RECONSTRUCTION | {"mean": META[0, :3]}, ValueError, "mean is on meta"),
    "tables": (interpolate_position, ((X, META), (2, 2)), {"mode": "linear_1d"}, ValueError, "table.1. is on meta"),
    "vocabulary": (linear_cross_entropy, (), WORDS | {"weight": META}, ValueError, "weight is on meta, expected cpu"),
    "bias": (linear_cross_entropy, (), WORDS | {"bias": META[:, 0]}, ValueError, "bias is on meta, expected cpu"),
}


@pytest.mark.parametrize("backend", [None, "chunked", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_the_error_names_the_argument(case, backend):
    function, args, options, error, message = CASES[case]
    with pytest.raises(error, match=message):
        function(*args, **options, backend=backend)
