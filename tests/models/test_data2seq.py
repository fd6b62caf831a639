"""Data2Seq: the tokenizers of the 12 modalities against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judge import assert_no_worse
from mmfuse.models.metatransformer import (
    MODALITIES,
    BandEmbed,
    Data2Seq,
    DataEmbedding,
    GraphFeatureTokenizer,
    ImageEmbed,
    PatchEmbedding,
    TabularEmbed,
    VideoEmbed,
    fbank,
    laplacian_eigenvectors,
    neighbouring_bands,
    orthogonal_node_ids,
    zero_padding,
)
from mmfuse.models.metatransformer.series import sinusoids

DIM = 16
TABLE = {"column_idx": {"a": 0, "b": 1, "x": 2}, "cat_embed_input": [("b", 3), ("a", 2)], "continuous_cols": ["x"]}
GRAPH_IDS = {"lap_node_id": True, "lap_node_id_k": 4, "type_id": True}


def graphs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A triangle and an edge."""
    ends = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])
    eigenvectors = torch.randn(5, 3, dtype=dtype)
    node, edge = torch.tensor([[1], [2], [3], [1], [2]]), torch.tensor([[1], [2], [1], [2]])
    data = {"node_num": [3, 2], "edge_num": [3, 1], "node_data": node, "edge_data": edge}
    return data | {"edge_index": ends, "lap_eigvec": eigenvectors}


# modality -> (options, data of a batch of 2, tokens)
EXAMPLES: dict[str, tuple[dict[str, Any], Any, int]] = {
    "text": ({"vocab_size": 9, "length": 7}, torch.tensor([[1, 2, 3], [4, 5, 6]]), 3),
    "image": ({"img_size": 8, "patch_size": 4}, torch.randn(2, 3, 8, 8), 4),
    "point-cloud": ({"sample_ratio": 0.25, "group_size": 4, "group": "knn"}, torch.randn(2, 24, 3), 6),
    "audio": ({"frames": 21, "mels": 16, "patch_size": 8, "stride": 5}, torch.randn(2, 21, 16), 6),
    "video": ({"img_size": 8, "patch_size": 4, "num_frames": 4}, torch.randn(2, 3, 4, 8, 8), 8),
    "infrared": ({"img_size": 8, "patch_size": 4, "in_c": 1}, torch.randn(2, 1, 8, 8), 4),
    "hyperspectral": ({"bands": 12, "patch": 3, "near_band": 3}, torch.randn(2, 3, 3, 12), 13),
    "x-ray": ({"img_size": 8, "patch_size": 4, "in_c": 1}, torch.randn(2, 1, 8, 8), 4),
    "imu": ({}, torch.randn(2, 10, 6), 10),
    "tabular": (TABLE, torch.tensor([[1.0, 2.0, 0.3], [2.0, 0.0, -1.0]]), 3),
    "graph": ({"num_atoms": 5, "num_edges": 4, **GRAPH_IDS}, graphs(), 8),
    "time-series": ({"c_in": 3}, torch.randn(2, 10, 3), 10),
}


def test_all_12_modalities_have_an_example() -> None:
    assert tuple(EXAMPLES) == tuple(MODALITIES) and len(MODALITIES) == 12


@pytest.mark.parametrize("modality", EXAMPLES)
def test_data_to_tokens_and_back_to_every_parameter(modality: str, device: str) -> None:
    options, data, length = EXAMPLES[modality]
    tokenizer = Data2Seq(modality, DIM, **options).to(device)
    data = _to(data, device)
    tokens = tokenizer(data)
    if modality == "graph":
        tokens = tokens[0]
    assert tokens.shape == (2, length, DIM)
    unused = {"temporal_embedding"}  # no marks are given
    named = {k: p for k, p in tokenizer.named_parameters() if p.requires_grad and not unused & set(k.split("."))}
    grads = torch.autograd.grad(tokens.square().sum(), list(named.values()))
    assert all(g.isfinite().all() and g.any() for g in grads)


def _to(data: Any, device: str) -> Any:
    if isinstance(data, dict):
        return {k: _to(v, device) for k, v in data.items()}
    return data.to(device) if isinstance(data, Tensor) else data


def test_tokens_of_several_modalities_are_one_sequence() -> None:
    parts = [Data2Seq(name, DIM, **EXAMPLES[name][0])(EXAMPLES[name][1]) for name in ("image", "text", "imu")]
    assert torch.cat(parts, dim=1).shape == (2, 4 + 3 + 10, DIM)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Data2Seq("smell", DIM), "modality is 'smell', expected one of text, image, point-cloud, "),
        (
            lambda: ImageEmbed(8, 4)(torch.zeros(1, 3, 8, 12)),
            r"pixels has shape \(1, 3, 8, 12\), expected \[B, 3",
        ),
        (lambda: fbank(torch.zeros(1, 99), 16000), r"shape \(1, 99\), expected \[B, at least 400 samples\]"),
        (lambda: neighbouring_bands(torch.zeros(1, 2, 3, 5), 1), r"expected \[N, p, p, bands\]"),
        (lambda: neighbouring_bands(torch.zeros(1, 2, 2, 5), 0), "near_band is 0, expected at least 1"),
        (lambda: BandEmbed(2, 3, DIM)(torch.zeros(1, 4, 2)), r"shape \(1, 4, 2\), expected \[N, at most 3, 2\]"),
        (lambda: DataEmbedding(2, DIM)(torch.zeros(1, 4, 3)), r"x has shape \(1, 4, 3\), expected \[B, L, 2\]"),
        (lambda: DataEmbedding(2, DIM, max_len=3)(torch.zeros(1, 4, 2)), "4 steps, expected at most max_len 3"),
        (lambda: DataEmbedding(2, DIM, "sines"), "embed_type is 'sines', expected 'fixed', 'learned' or 'timeF'"),
        (lambda: DataEmbedding(2, DIM, "timeF", "y"), "freq is 'y', expected one of h, t, s"),
        (lambda: DataEmbedding(2, 15), "d_model is 15, expected an even number"),
        (
            lambda: DataEmbedding(2, DIM, freq="t")(torch.zeros(1, 4, 2), torch.zeros(1, 4, 4)),
            r"marks has shape \(1, 4, 4\), expected \[B, L, month, day, weekday, hour, minute\]",
        ),
        (
            lambda: DataEmbedding(2, DIM, "timeF")(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3)),
            r"marks has shape \(1, 4, 3\), expected \[B, L, 4\]",
        ),
        (
            lambda: DataEmbedding(2, DIM)(torch.zeros(1, 4, 2), torch.zeros(1, 3, 4)),
            r"marks has shape \(1, 3, 4\), expected \[B, L, M\] with \[1, 4\]",
        ),
        (lambda: BandEmbed(1, 3, DIM)(torch.zeros(4)), r"shape \(4,\), expected \[N, at most 3, 1\]"),
        (
            lambda: GraphFeatureTokenizer(5, 4, DIM)(graphs() | {"node_num": [3, 3]}),
            r"node_num \[3, 3\] and edge_num \[3, 1\] do not fit: node_data has 5 rows, edge_data 4, edge_index 4",
        ),
        (lambda: Data2Seq("tabular", DIM, column_idx={"x": 0}), "embed_continuous is True, continuous_cols None"),
        (
            lambda: TabularEmbed(**TABLE)(torch.zeros(1, 2)),
            r"table has shape \(1, 2\), expected \[B, 3\], as column_idx",
        ),
        (lambda: zero_padding(torch.zeros(2, 9), 8), r"shape \(2, 9\), expected \[B, at most 8\]"),
        (lambda: TabularEmbed({"x": 0}, continuous_cols=["x"]), "embed_continuous is False"),
        (lambda: TabularEmbed(**TABLE, cont_norm_layer="group"), "cont_norm_layer is 'group', expected 'batchnorm'"),
        (lambda: TabularEmbed(**TABLE, cat_embed_activation="sin"), "activation is 'sin', expected one of relu"),
    ],
)
def test_errors_name_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("modality", ["text", "point-cloud", "video", "hyperspectral", "tabular"])
def test_exports_for_batches_of_any_size(modality: str) -> None:
    options, data, _ = EXAMPLES[modality]
    tokenizer = Data2Seq(modality, DIM, **options).eval()
    program = torch.export.export(
        tokenizer, (data,), dynamic_shapes=(({0: torch.export.Dim("batch", min=2)},),), strict=False
    )
    three = torch.cat([data, data[:1]])
    torch.testing.assert_close(program.module()(three), tokenizer(three))


def test_the_width_is_given_once() -> None:
    with pytest.raises(TypeError, match="embed_dim"):
        Data2Seq("image", DIM, embed_dim=2 * DIM)


def test_no_graphs() -> None:
    nothing = {"node_num": [], "edge_num": [], "edge_index": torch.zeros(2, 0, dtype=torch.int64)}
    nothing |= {name: torch.zeros(0, 1, dtype=torch.int64) for name in ("node_data", "edge_data")}
    tokens, padding, ends = GraphFeatureTokenizer(5, 4, DIM, type_id=True)(nothing)
    assert (tokens.shape, padding.shape, ends.shape) == ((0, 2, DIM), (0, 2), (0, 0, 2))


# --- pictures, video, sound -----------------------------------------------------------------------------------------


def test_pixels_past_the_last_whole_patch_are_dropped_as_a_convolution_does() -> None:
    for embed, pixels in (
        (ImageEmbed((9, 14), (4, 3), embed_dim=DIM), torch.randn(2, 3, 9, 14)),
        (VideoEmbed((9, 14), (4, 3), embed_dim=DIM, num_frames=5), torch.randn(2, 3, 5, 9, 14)),
        (VideoEmbed(8, 4, embed_dim=DIM), torch.randn(2, 3, 6, 8, 8)),
    ):
        embed.double()
        torch.testing.assert_close(embed(pixels.double()), embed.proj(pixels.double()).flatten(2).mT)


def test_the_filter_bank_is_kaldis() -> None:
    module = pytest.importorskip("transformers.models.audio_spectrogram_transformer")
    from transformers.models.audio_spectrogram_transformer import (
        feature_extraction_audio_spectrogram_transformer as ast,
    )

    sound = torch.randn(4000, dtype=torch.float64) * torch.linspace(0, 1, 4000)
    sound = sound - sound.mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "is_speech_available", lambda: False)  # its own numpy version of Kaldi's, in float64
        extractor = module.ASTFeatureExtractor(num_mel_bins=64, max_length=23, do_normalize=False)
        expected = np.stack(extractor(sound.numpy(), sampling_rate=16000)["input_values"])[0]
    torch.testing.assert_close(
        fbank(sound[None], 16000, mels=64)[0], torch.tensor(expected).double(), rtol=0, atol=2e-6
    )


def test_a_tone_is_loudest_in_its_band() -> None:
    time = torch.arange(8000) / 8000
    for pitch in (300.0, 1000.0, 3000.0):
        mel, lowest, highest = (1127 * math.log(1 + f / 700) for f in (pitch, 20.0, 4000.0))
        band = fbank((2 * math.pi * pitch * time).sin()[None], 8000, mels=40)[0].mean(0).argmax().item()
        assert abs(band - ((mel - lowest) / (highest - lowest) * 41 - 1)) <= 1


# --- hyperspectral --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "near_band", "order"),
    [(1, 1, (0,)), (1, 5, (-2, -1, 0, 1, 2)), (1, 4, (-2, -1, 0, 1)), (2, 5, (-1, -2, 0, 1, 2)), (3, 3, (-1, 0, 1))],
)
def test_bands_see_their_neighbours_round_the_end(size: int, near_band: int, order: tuple[int, ...]) -> None:
    cube = torch.randn(2, size, size, 7)
    got = neighbouring_bands(cube, near_band)
    for band in range(7):
        expected = torch.cat([cube[..., (band + shift) % 7].flatten(1) for shift in order], 1)
        assert torch.equal(got[:, band], expected)


@pytest.mark.parametrize("values", [1, 3])
def test_band_tokens(values: int) -> None:
    embed = BandEmbed(values, 9, DIM)
    bands = torch.randn(4, 7, values)

    def official(dtype: torch.dtype) -> Tensor:
        p = {k: t.to(dtype) for k, t in embed.named_parameters()}
        x = F.linear(bands.to(dtype), p["patch_to_embedding.weight"], p["patch_to_embedding.bias"])
        return torch.cat([p["cls_token"].expand(4, -1, -1), x], 1) + p["pos_embedding"][:, :8]

    assert_no_worse(embed(bands), official(torch.float32), official(torch.float64))


# --- time series and IMU --------------------------------------------------------------------------------------------


def test_steps_are_on_a_circle() -> None:
    embed = DataEmbedding(3, DIM, dropout=0.0).double()
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    position = sinusoids(8, DIM).double()
    torch.testing.assert_close(embed(x.roll(3, 1)) - position, (embed(x) - position).roll(3, 1))
    assert torch.equal(sinusoids(4, 4)[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize(("freq", "columns"), [("h", "month day weekday hour"), ("t", "month day weekday hour minute")])
@pytest.mark.parametrize("embed_type", ["fixed", "learned"])
def test_marks_are_rows_of_tables(embed_type: str, freq: str, columns: str) -> None:
    embed = DataEmbedding(1, DIM, embed_type, freq, dropout=0.0)
    x, marks = torch.randn(2, 5, 1), torch.randint(1, 4, (2, 5, 5))
    tables = embed.temporal_embedding.state_dict()
    expected = embed(x)
    for i, name in enumerate(columns.split()):
        table = tables[f"{name}_embed.emb.weight" if embed_type == "fixed" else f"{name}_embed.weight"]
        expected = expected + table[marks[..., i]]
    torch.testing.assert_close(embed(x, marks.float()), expected)


@pytest.mark.parametrize(("freq", "features"), [("h", 4), ("t", 5), ("s", 6), ("m", 1), ("w", 2), ("d", 3), ("b", 3)])
def test_marks_as_numbers(freq: str, features: int) -> None:
    embed = DataEmbedding(1, DIM, "timeF", freq, dropout=0.0)
    x, marks = torch.randn(2, 5, 1), torch.randn(2, 5, features)
    torch.testing.assert_close(embed(x, marks), embed(x) + marks @ embed.temporal_embedding.embed.weight.T)


def test_windows_of_a_series() -> None:
    embed = PatchEmbedding(DIM, patch_len=4, stride=3, padding=2, dropout=0.0)
    x = torch.randn(2, 5, 9)
    tokens, variables = embed(x)
    assert variables == 5 and tokens.shape == (10, 3, DIM)
    last = torch.cat([x[1, 4, 6:], x[1, 4, -1:]])  # the last value repeated
    torch.testing.assert_close(tokens[9, 2], embed.value_embedding(last) + sinusoids(3, DIM)[2])


# --- graphs ---------------------------------------------------------------------------------------------------------

ALL_IDS = GRAPH_IDS | {"rand_node_id": True, "rand_node_id_dim": 3, "orf_node_id": True, "orf_node_id_dim": 4}


def test_node_ids_in_parts_are_the_concatenated_product() -> None:
    embed = GraphFeatureTokenizer(5, 4, DIM, **ALL_IDS).double()
    data = graphs(torch.float64)
    rand, gaussian = torch.rand(5, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    tokens, padding, ends = embed(data, rand_node_id=rand, orf_gaussian=gaussian)
    ids = {
        embed.rand_encoder: F.normalize(rand, dim=1),
        embed.orf_encoder: F.pad(
            torch.cat([orthogonal_node_ids(gaussian)[0], orthogonal_node_ids(gaussian)[1, :2]]), (0, 1)
        ),
        embed.lap_encoder: F.pad(data["lap_eigvec"], (0, 1)),
    }
    of = [[(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)], [(0, 0), (1, 1), (0, 1), (0, 0), (0, 0), (0, 0)]]
    assert ends.tolist() == [[list(pair) for pair in graph] for graph in of]
    assert padding.tolist() == [[False] * 8, [False] * 5 + [True] * 3]
    assert not tokens[1, 5:].any()
    torch.testing.assert_close(tokens[:, 0], embed.graph_token.weight.expand(2, -1))
    torch.testing.assert_close(tokens[:, 1], embed.null_token.weight.expand(2, -1))
    for graph, first_node, first_edge, nodes in ((0, 0, 0, 3), (1, 3, 3, 2)):
        for place, (u, v) in enumerate(of[graph][: nodes + (3, 1)[graph]]):
            expected = embed.order_encoder.weight[int(u == v)].clone()
            if place < nodes:
                expected += embed.atom_encoder(data["node_data"][first_node + u]).sum(0)
            else:
                expected += embed.edge_encoder(data["edge_data"][first_edge + place - nodes]).sum(0)
            for encoder, p in ids.items():
                expected += encoder(torch.cat([p[first_node + u], p[first_node + v]]))
            torch.testing.assert_close(tokens[graph, 2 + place], expected)


def test_draws_of_a_graph() -> None:
    embed = GraphFeatureTokenizer(5, 4, DIM, lap_node_id_sign_flip=True, **ALL_IDS)
    data = graphs()
    draws = {"rand_node_id": torch.rand(5, 3), "orf_gaussian": torch.randn(2, 3, 3)}
    as_tensors = data | {name: torch.tensor(data[name]) for name in ("node_num", "edge_num")}
    kept = embed.eval()(data, **draws)[0]
    assert torch.equal(kept, embed(as_tensors, **draws)[0])
    flipped = data | {"lap_eigvec": data["lap_eigvec"] * torch.tensor([-1.0] * 3 + [1.0] * 2)[:, None]}
    signs = torch.tensor([[-1] * 4, [1] * 4])
    torch.testing.assert_close(embed.train()(data, signs=signs, **draws)[0], embed.eval()(flipped, **draws)[0])
    perturb = torch.randn(2, 3, DIM)
    moved = embed(data, perturb, **draws)[0] - kept
    torch.testing.assert_close(moved[0, 2:5], perturb[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved[1, 2:4], perturb[1, :2], atol=1e-6, rtol=1e-5)
    assert not moved[:, 5:].any()


def test_laplacian_eigenvectors_of_a_cycle() -> None:
    node = torch.arange(6)
    ends = torch.stack([node, (node + 1) % 6])
    vectors = laplacian_eigenvectors(torch.cat([ends, ends.flip(0)], 1), 6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6))
    torch.testing.assert_close(vectors[:, 0].abs(), torch.full((6,), 6**-0.5))
    smooth = ((vectors - vectors.roll(1, 0)) ** 2).sum(0) / 2
    torch.testing.assert_close(smooth, 1 - torch.tensor([0, 1, 1, 2, 2, 3]).mul(math.pi / 3).cos(), atol=1e-5, rtol=0)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_columns_of_a_table() -> None:
    embed = TabularEmbed(**TABLE, embed_continuous=True, use_cat_bias=True, input_dim=DIM).eval()
    table = torch.tensor([[1.0, 2.0, 0.3], [2.0, 5.0, -1.0]])
    tokens, rest = embed(table)
    assert rest is None
    columns, values = embed.cat_and_cont_embed.cat_embed, embed.cat_and_cont_embed.cont_embed
    torch.testing.assert_close(tokens[:, 0], columns.embed.weight[[2, 5]] + columns.bias[0])  # b comes first
    torch.testing.assert_close(tokens[:, 1], columns.embed.weight[[1, 2]] + columns.bias[1])
    torch.testing.assert_close(tokens[:, 2], table[:, 2:] * values.weight + values.bias)


def test_continuous_columns_may_pass_beside_the_encoder() -> None:
    embed = TabularEmbed(**TABLE, cont_norm_layer="batchnorm", input_dim=DIM).train()
    tokens, rest = embed(torch.tensor([[1.0, 2.0, 4.0], [2.0, 5.0, 6.0]]))
    assert tokens.shape == (2, 2, DIM)
    torch.testing.assert_close(rest, torch.tensor([[-1.0], [1.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("add", [False, True])
def test_values_of_a_column_share_a_part(add: bool) -> None:
    embed = TabularEmbed(**TABLE, shared_embed=True, add_shared_embed=add, input_dim=DIM).eval()
    tokens, _ = embed(torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 0.0]]))
    own = embed.cat_and_cont_embed.cat_embed.embed["emb_layer_b"]
    if add:
        torch.testing.assert_close(tokens[:, 0], own.embed.weight[[2, 0]] + own.shared_embed)
    else:
        assert own.shared_embed.shape == (1, DIM // 4) and torch.equal(*tokens[:, 0, : DIM // 4])
        assert torch.equal(tokens[:, 0, DIM // 4 :], own.embed.weight[[2, 0], DIM // 4 :])


@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_column_drops_out(shared: bool) -> None:
    options = {"cat_embed_dropout": 0.5, "full_embed_dropout": True, "shared_embed": shared, "frac_shared_embed": 0.0}
    embed = TabularEmbed(**TABLE, **options, input_dim=DIM).train()
    dropped = torch.stack([embed(torch.ones(4, 3))[0].eq(0).flatten(2).all(2) for _ in range(50)])  # [50, 4, 2]
    assert (dropped == dropped[:, :1]).all()
    assert dropped[:, 0].sum(0).min() > 10 and dropped[:, 0].sum(0).max() < 40
