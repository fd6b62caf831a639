from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse._compat import allow_torchvision
from mmfuse.models import create, load_official
from mmfuse.models.metatransformer import MetaTransformer
from mmfuse.models.metatransformer.video import Attention

ENCODER = {"dim": 32, "depth": 2, "num_heads": 4}
HYPER = {"image_size": 1, "near_band": 1, "num_patches": 10, "num_classes": 4, "dim": 32}
POINTS = {
    "embed_dim": 32,
    "embed_args": {"NAME": "PointPatchEmbed", "sample_ratio": 0.25, "group_size": 6, "group": "knn"},
}
GRAPH = dict.fromkeys(("num_in_degree", "num_out_degree", "num_spatial", "num_edge_dis", "multi_hop_max_dist"), 1) | {
    "num_atoms": 5,
    "num_edges": 4,
    "edge_type": "x",
    "num_encoder_layers": 2,
    "embedding_dim": 32,
    "num_attention_heads": 4,
    "lap_node_id": True,
    "lap_node_id_k": 3,
    "type_id": True,
}
SERIES = {"enc_in": 3, "dec_in": 3, "c_out": 3, "d_model": 32, "n_heads": 4, "d_ff": 48, "max_len": 32}
VIDEO = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "all_frames": 4, "num_classes": 4}


def one(config: dict[str, Any], encoder: dict[str, Any] = ENCODER) -> MetaTransformer:
    """A model with one component, "task", whose weights are not near zero."""
    model = create("metatransformer", {"encoder": encoder, "components": {"task": config}})
    for weight in (p for p in model.parameters() if p.dim() > 1):
        weight.data.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize(("preset", "millions"), [("base-patch16", 85), ("large-patch14", 302)])
def test_the_shared_encoder_has_the_published_size(preset: str, millions: int) -> None:
    with torch.device("meta"):
        model = create("metatransformer", preset)
    assert sum(p.numel() for p in model.parameters()) // 10**6 == millions


def test_the_encoder_is_frozen_and_passes_gradients() -> None:
    model = one(HYPER)
    loss = model("task", torch.randn(2, 10, 1)).square().sum()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    grads = torch.autograd.grad(loss, list(model.get_submodule("task").parameters()))
    assert all(g.any() for g in grads)


def test_official_files_load() -> None:
    source, bands = one(HYPER), torch.randn(2, 10, 1)
    state = source.state_dict()
    task = {k.removeprefix("task.").replace("encoder.", "transformer."): t for k, t in state.items()}
    model = one(HYPER)
    load_official(model, task)
    assert torch.equal(model("task", bands), source("task", bands))
    encoder = create("metatransformer", {"encoder": ENCODER})
    file = {k.removeprefix("encoder."): t for k, t in state.items() if k.startswith("encoder.")}
    load_official(encoder, file)
    assert torch.equal(encoder.encoder[1].mlp.fc2.weight, source.encoder[1].mlp.fc2.weight)
    with pytest.raises(ValueError, match=r"missing: encoder\.0\.norm1\.weight \(32,\)"):
        load_official(encoder, {k: t for k, t in file.items() if k != "0.norm1.weight"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"components": {}}, "config has no encoder"),
        ({"encoder": ENCODER | {"num_heads": 5}}, "dim is 32, expected a multiple of num_heads 5"),
        ({"encoder": ENCODER, "parts": {}}, "unknown key 'parts'"),
        ({"encoder": ENCODER, "components": {"a": {}}}, "component 'a' has none of the keys modality, near_band"),
        ({"encoder": ENCODER, "components": {"half": HYPER}}, "the name 'half', expected no dot"),
        ({"encoder": ENCODER, "components": {"a.b": HYPER}}, r"the name 'a\.b', expected no dot"),
        (
            {"encoder": ENCODER, "components": {"a": {"modality": "imu", "num_classes": 2, "tokenizer": {"axes": 3}}}},
            "tokenizer of modality 'imu': .*'axes'",
        ),
        ({"encoder": ENCODER, "components": {"a": HYPER | {"mode": "RNN"}}}, "mode is 'RNN', expected 'ViT' or 'CAF'"),
        ({"encoder": ENCODER, "components": {"a": HYPER | {"bands": 1}}}, "unknown key 'bands'"),
        (
            {"encoder": ENCODER, "components": {"a": SERIES | {"task_name": "x"}}},
            "task_name is 'x', expected one of",
        ),
        ({"encoder": ENCODER, "components": {"a": POINTS | {"global_feat": "cls,sum"}}}, "global_feat names 'sum'"),
        ({"encoder": ENCODER, "components": {"a": POINTS | {"norm_args": "bn"}}}, "norm_args has norm 'bn'"),
        ({"encoder": ENCODER, "components": {"a": GRAPH | {"performer": True}}}, "performer is True, expected False"),
        ({"encoder": ENCODER, "components": {"a": GRAPH | {"attention": "x"}}}, "attention is 'x', expected 'graphs'"),
        ({"encoder": ENCODER, "components": {"a": VIDEO | {"cos_attn": True, "qk_scale": 1.0}}}, "qk_scale is 1.0"),
        ({"encoder": ENCODER, "components": {"a": {"vit": {}, "ast": {"input_fdim": 128}}}}, "10 x 100|1000 patches"),
    ],
)
def test_create_names_what_does_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("metatransformer", config)


def test_a_call_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="name is 'text', expected one of task"):
        one(HYPER)("text")
    tokenizer = one({"img_size": 8, "patch_size": 4, "embed_dim": 8})
    with pytest.raises(ValueError, match="width 8, expected 32 as the encoder's dim"):
        tokenizer("task", torch.zeros(1, 3, 8, 8))


def test_x_ray_is_timms_vit_around_the_encoder() -> None:
    allow_torchvision()
    timm = pytest.importorskip("timm.models.vision_transformer")
    vit = timm.VisionTransformer(32, 16, num_classes=3, embed_dim=32, depth=2, num_heads=4).eval()
    model = one({"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 4, "num_classes": 3})
    for block in vit.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5
    state = {k: torch.randn_like(t) * 0.1 for k, t in vit.state_dict().items()}
    vit.load_state_dict(state)
    load_official(model, state)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model("task", pixels), vit(pixels))


def test_hyperspectral_modes_are_one_model() -> None:
    bands = torch.randn(2, 10, 1)
    models = [one(HYPER | {"mode": mode, "depth": 5, "heads": 2, "mlp_dim": 9}) for mode in ("ViT", "CAF")]
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*(model("task", bands) for model in models))


# --- graphs ---------------------------------------------------------------------------------------------------------


def graphs(nodes: Tensor) -> dict[str, Any]:
    """Two paths, of three nodes and of two."""
    ends, eigenvectors = torch.tensor([[0, 1, 0], [1, 2, 1]]), torch.linspace(-1, 1, 15).view(5, 3)
    data = {"node_num": [3, 2], "edge_num": [2, 1], "node_data": nodes[:, None], "edge_data": torch.ones(3, 1).long()}
    return data | {"edge_index": ends, "lap_eigvec": eigenvectors}


def test_published_graph_tokens_see_no_node() -> None:
    model = one(GRAPH)
    states, graph_rep = model("task", graphs(torch.tensor([1, 2, 3, 1, 2])))
    assert len(states) == 3 and states[0].shape == (7, 2, 32)
    torch.testing.assert_close(graph_rep, model("task", graphs(torch.tensor([4, 3, 2, 1, 2])))[1])
    torch.testing.assert_close(graph_rep[0], graph_rep[1])


def test_graph_tokens_see_their_own_graph_without_the_padding() -> None:
    model = one(GRAPH | {"attention": "tokens", "encoder_normalize_before": True})
    both = model("task", graphs(torch.tensor([1, 2, 3, 1, 2])))[1]
    other = model("task", graphs(torch.tensor([4, 2, 3, 1, 2])))[1]
    assert not torch.allclose(both[0], other[0]) and not torch.allclose(both[0], both[1])
    torch.testing.assert_close(both[1], other[1])
    data = graphs(torch.tensor([1, 2, 3, 1, 2]))
    second = {"node_num": [2], "edge_num": [1], "node_data": data["node_data"][3:], "edge_data": data["edge_data"][2:]}
    second |= {"edge_index": data["edge_index"][:, 2:], "lap_eigvec": data["lap_eigvec"][3:]}
    torch.testing.assert_close(model("task", second)[1][0], both[1])


def test_graph_options() -> None:
    data = graphs(torch.tensor([1, 2, 3, 1, 2]))
    plain = one(GRAPH)
    options = {"embed_scale": 2.0, "traceable": True, "q_noise": 0.1, "layernorm_style": "prenorm"}
    model = one(GRAPH | options | {"apply_graphormer_init": True, "dropout": 0.0})
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (
        ["task.quant_noise.weight", "task.final_layer_norm.weight", "task.final_layer_norm.bias"],
        [],
    )
    states, graph_rep = model("task", data)
    scaled = 2 * plain.tokens("task", data) @ model.get_submodule("task").quant_noise.weight.T
    torch.testing.assert_close(states[0], scaled.transpose(0, 1))
    last, _ = model("task", data, last_state_only=True)
    assert torch.equal(last[0], states[-1]) and torch.equal(graph_rep, states[-1][0])


# --- time series ----------------------------------------------------------------------------------------------------


def test_forecasts_do_not_look_ahead() -> None:
    model = one(SERIES | {"task_name": "short_term_forecast", "pred_len": 4, "embed": "learned", "freq": "t"})
    x, marks = torch.randn(2, 12, 3), torch.randint(1, 4, (2, 12, 5))
    dec, dec_marks = torch.randn(2, 10, 3), torch.randint(1, 4, (2, 10, 5))
    got = model("task", x, marks, dec, dec_marks)
    assert got.shape == (2, 4, 3)
    changed = dec_marks.clone()
    changed[:, 8:] = 0
    moved = model("task", x, marks, dec, changed)
    torch.testing.assert_close(moved[:, :2], got[:, :2])
    assert not torch.allclose(moved[:, 2:], got[:, 2:])


@pytest.mark.parametrize(("task", "marked"), [("imputation", True), ("anomaly_detection", False)])
def test_every_step_is_filled_in(task: str, marked: bool) -> None:
    model = one(SERIES | {"task_name": task, "embed": "timeF"})
    x, marks = torch.randn(2, 12, 3), torch.randn(2, 12, 4)
    got = model("task", x, marks)
    projection = model.get_submodule("task").projection
    torch.testing.assert_close(got, projection(model.encoder(model.tokens("task", x, marks))))
    assert torch.allclose(got, model("task", x)) != marked


def test_a_padded_series_is_classified_by_its_real_steps() -> None:
    model = one(SERIES | {"task_name": "classification", "seq_len": 12, "num_class": 5})
    x, real = torch.randn(2, 12, 3), torch.arange(12).expand(2, -1).lt(9).float()
    got = model("task", x, real)
    task = model.get_submodule("task")
    features = F.gelu(model.encoder(task.enc_embedding(x))) * real[..., None]
    torch.testing.assert_close(got, task.projection(features.flatten(1)))
    assert got.shape == (2, 5)


# --- point clouds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [False, True])
def test_parts_of_a_point_cloud(distill: bool) -> None:
    model = one(POINTS | {"global_feat": "mean,cls,max", "distill": distill})
    points = torch.randn(2, 48, 3)
    _, _, x = model.get_submodule("task").features(model.encoder, points)
    groups = x[:, 2 if distill else 1 :]
    assert groups.shape == (2, 12, 32)
    parts = torch.cat([groups.mean(1), x[:, 0], groups.amax(1)], 1)
    torch.testing.assert_close(model("task", points), parts)
    if distill:
        parts, token = model.train()("task", points)
        assert parts.shape == (2, 96) and token.shape == (2, 32)


def test_positions_of_points_before_each_block_or_the_first() -> None:
    points, models = torch.randn(2, 48, 3), [one(POINTS | {"add_pos_each_block": each}) for each in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    each, first = (model.get_submodule("task").features(model.encoder, points)[2] for model in models)
    tokens, task = models[0].tokens("task", points), models[0].get_submodule("task")
    position = task.embed(points)[3]
    blocks = [lambda x, block=block: block(x, 4, 1e-5, None) for block in models[0].encoder]
    torch.testing.assert_close(each, task.norm(blocks[1](blocks[0](tokens) + position)))
    torch.testing.assert_close(first, task.norm(blocks[1](blocks[0](tokens))))


def test_a_point_decoder_gets_all_tokens() -> None:
    model = one(POINTS | {"embed_args": POINTS["embed_args"] | {"NAME": "P3Embed", "sample_ratio": 0.0625}})
    points = torch.randn(2, 96, 3)
    p_list, x_list = model.get_submodule("task").seg_features(model.encoder, points)
    assert [p.shape[1] for p in p_list] == [96, 24, 6] and [x.shape[2] for x in x_list] == [96, 24, 7]


# --- audio and video ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pretrained", "size", "kernel"), [(True, (54, 44), 32), (False, (26, 26), 16)])
def test_audio_reads_its_first_two_patches(pretrained: bool, size: tuple[int, int], kernel: int) -> None:
    ast = {"label_dim": 5, "input_fdim": size[1], "input_tdim": size[0], "imagenet_pretrain": pretrained}
    model = one({"vit": {"embed_dim": 32, "num_heads": 2, "num_classes": 3}, "ast": ast})
    v, head = model.get_submodule("task").v, model.get_submodule("task").mlp_head
    sound = torch.randn(2, *size)
    patches = F.conv2d(sound.mT[:, None], v.patch_embed.proj.weight, v.patch_embed.proj.bias, stride=10)
    assert v.patch_embed.proj.kernel_size == (kernel, kernel)
    x = model.encoder(patches.flatten(2).mT + v.pos_embed, heads=2, eps=1e-6)
    torch.testing.assert_close(model("task", sound), head(v.norm(x)[:, :2].mean(1)))


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": True, "qk_scale": 0.3},
        {"qkv_bias": True, "cos_attn": True, "init_values": 0.1},
        {"use_mean_pooling": False, "use_learnable_pos_emb": True, "tubelet_size": 1, "norm_eps": 1e-6},
    ],
)
def test_video(options: dict[str, Any]) -> None:
    model = one(VIDEO | options)
    video, clip = model.get_submodule("task"), torch.randn(2, 3, 4, 8, 8)
    x = video.patch_embed.proj(clip).flatten(2).mT + video.pos_embed
    torch.testing.assert_close(model.tokens("task", clip), x)
    for block in video.blocks:
        gammas = (block.gamma_1, block.gamma_2) if options.get("init_values") else (1, 1)
        x = x + gammas[0] * attention(block.attn, block.norm1(x))
        x = x + gammas[1] * block.mlp(block.norm2(x))
    x = video.fc_norm(x.mean(1)) if video.fc_norm is not None else video.norm(x[:, 0])
    torch.testing.assert_close(model("task", clip), video.head(x))
    if options.get("use_learnable_pos_emb"):
        assert model.tokens("task", clip).sum().grad_fn is not None
        model.tokens("task", clip).sum().backward()
        assert video.pos_embed.grad is None  # as published


def attention(attn: Attention, x: Tensor) -> Tensor:
    q, k, v = attn.qkv.weight.chunk(3)
    zero = torch.zeros(len(q))
    q = F.linear(x, q, zero if attn.q_bias is None else attn.q_bias)
    v = F.linear(x, v, zero if attn.v_bias is None else attn.v_bias)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, F.linear(x, k), v))
    if attn.cos_attn:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * attn.scale.exp().clamp(max=100)
    else:
        logits = q @ k.mT * (attn.qk_scale or 1 / math.sqrt(q.shape[-1]))
    return attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("embed_continuous", [False, True])
def test_table(cls_token: bool, embed_continuous: bool) -> None:
    names = (["cls_token"] if cls_token else []) + ["a", "b"]
    config = {
        "column_idx": {name: i for i, name in enumerate([*names, "x"])},
        "cat_embed_input": [(name, 1 if name == "cls_token" else 3) for name in names],
        "continuous_cols": ["x"],
        "embed_continuous": embed_continuous,
        "input_dim": 32,
        "encoder_num_heads": 2,
        "mlp_hidden_dims": [12, 6],
        "mlp_batchnorm": True,
        "mlp_linear_first": False,
    }
    model = one(config)
    table = torch.cat([torch.ones(3, len(names)), torch.randn(3, 1)], 1)
    tokens, mlp = model.tokens("task", table), model.get_submodule("task").mlp
    x = model.encoder(tokens, heads=2)
    x = x[:, 0] if cls_token else x.flatten(1)
    x = x if embed_continuous else torch.cat([x, table[:, -1:]], 1)
    torch.testing.assert_close(model("task", table), mlp(x))
    first, last = (mlp.mlp.get_submodule(f"dense_layer_{i}") for i in range(2))
    assert [type(layer).__name__ for layer in first] == ["BatchNorm1d", "Dropout", "Linear", "ReLU"]
    assert [type(layer).__name__ for layer in last] == ["Dropout", "Linear", "ReLU"]
