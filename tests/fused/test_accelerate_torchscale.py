"""accelerate() on torchscale's multiway encoder, the real one of BEiT-3 at random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import mmfuse
from judge import judge
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration.rules import RULES

allow_torchvision()
beit3 = pytest.importorskip("torchscale.model.BEiT3")
from torchscale.architecture.config import EncoderConfig  # noqa: E402
from torchscale.architecture.encoder import Encoder, EncoderLayer  # noqa: E402
from torchscale.component.embedding import PositionalEmbedding  # noqa: E402
from torchscale.component.feedforward_network import FeedForwardNetwork  # noqa: E402
from torchscale.component.multihead_attention import MultiheadAttention  # noqa: E402
from torchscale.component.multiway_network import MultiwayNetwork, MutliwayEmbedding  # noqa: E402

SMALL = {
    **{"img_size": 16, "patch_size": 8, "vocab_size": 20, "multiway": True, "no_output_layer": True},
    **{"encoder_embed_dim": 16, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 24, "encoder_layers": 2},
}
IMAGE = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
IDS = torch.arange(8).view(2, 4)
PADDING = torch.tensor([[False] * 4, [False, True, True, True]])
# words see the image and the words in front of them
CAPTION = torch.ones(9, 9).triu(1).long()
CAPTION[5:, :5] = 0
CALLS: dict[str, dict[str, Any]] = {
    "image": {"visual_tokens": IMAGE},
    "masked image": {"visual_tokens": IMAGE, "vision_masked_position": torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])},
    "text": {"textual_tokens": IDS},
    "padded text": {"textual_tokens": IDS, "text_padding_position": PADDING},
    "pair": {"visual_tokens": IMAGE, "textual_tokens": IDS},
    "padded pair": {"visual_tokens": IMAGE, "textual_tokens": IDS, "text_padding_position": PADDING},
    "padding in front": {"visual_tokens": IMAGE, "textual_tokens": IDS, "text_padding_position": PADDING.flip(1)},
    "caption": {"visual_tokens": IMAGE, "textual_tokens": IDS, "attn_mask": CAPTION},
    "padded caption": {
        "visual_tokens": IMAGE, "textual_tokens": IDS, "text_padding_position": PADDING, "attn_mask": CAPTION.float(),
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "BEiT-3": {},
    "scaled embeddings and their norm": {"no_scale_embedding": False, "layernorm_embedding": True},
    "no sub-norm, silu": {"subln": False, "activation_fn": "swish"},
    "norms behind, DeepNorm": {"deepnorm": True, "subln": False, "encoder_normalize_before": False},
    "no norm at the end": {"normalize_output": False},
    "words at the end": {"no_output_layer": False},
}


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = beit3.BEiT3(EncoderConfig(**SMALL | {"layernorm_embedding": False, "no_scale_embedding": True} | options))
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.eval()


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torchscale's, and the accelerated one."""
    eager, fused = (model(**options).to(dtype) for _ in range(2))
    mmfuse.accelerate(fused, strict=True)
    return eager, fused


def results(of: nn.Module, call: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    of.zero_grad()
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    out = of(**cast)
    y = out["encoder_out"]
    (y * torch.linspace(-1, 2, y.numel(), dtype=dtype).sin().view_as(y)).sum().backward()
    found = {k: v.detach() for k, v in out.items() if isinstance(v, Tensor)}
    return found | {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 5e-6) -> None:
    """In units of the largest number; torchscale computes GELU and softmax in float32, float64 models' too."""
    assert list(got) == list(want)
    largest = max(t.abs().max().item() for name, t in want.items() if "." in name)
    for name, t in want.items():
        if t.dtype == torch.bool:
            assert torch.equal(got[name], t)
            continue
        # gradients that are 0 but for rounding, as of the biases of keys, count in units of the others
        size = max(t.abs().max().item(), 0.1 * largest * ("." in name))
        torch.testing.assert_close(got[name], t, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


def by_module(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A weight and its bias as one tensor, and all of an attention as one.

    The gradient of the keys' bias is 0 but for rounding, and those of queries and keys are less exact in torch's fused
    attention than in torchscale's products.
    """
    of: dict[str, list[Tensor]] = {}
    for name, t in found.items():
        if t.is_floating_point():
            attention, _, inside = name.partition("self_attn.")
            module = attention if inside else name.removesuffix(".weight").removesuffix(".bias")
            of.setdefault(module, []).append(t.flatten())
    return {name: torch.cat(parts) for name, parts in of.items()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("call", CALLS)
def test_parity(call: str, config: str) -> None:
    """An expert without rows has no gradient, as it has none in torchscale."""
    if config not in ("BEiT-3", "scaled embeddings and their norm") and call not in ("image", "padded pair"):
        pytest.skip("what a call has does not depend on it")
    eager, fused = pair(torch.float64, **CONFIGS[config])
    with no_own_code():
        got = results(fused, CALLS[call], torch.float64)
    assert_same(got, results(eager, CALLS[call], torch.float64))


@contextmanager
def no_own_code() -> Iterator[None]:
    """Within it torchscale's attention fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torchscale's own attention runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiheadAttention, "forward", fail)
        yield


def draws(call: str) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """The accelerated model's results, torchscale's, and those in float64."""
    for _ in range(4):
        eager, fused = pair()
        for p, q in zip(eager.parameters(), fused.parameters(), strict=True):
            q.data.copy_(nn.init.normal_(p.data, std=0.3))
        yield tuple(by_module(results(m, CALLS[call])) for m in (fused, eager)) + (
            by_module(results(eager.double(), CALLS[call], torch.float64)),
        )


@pytest.mark.parametrize("call", ["padded pair", "padded caption", "image"])
def test_as_exact_as_torchscale(call: str) -> None:
    judge(draws(call))


@pytest.mark.parametrize("split", [-1, 0, 1, 4, 6])
def test_a_layer_alone(split: int) -> None:
    torch.manual_seed(0)
    eager = EncoderLayer(EncoderConfig(**SMALL), depth=0).double()
    fused = copy.deepcopy(eager)
    mmfuse.accelerate(fused, strict=True)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    found = []
    for layer in (eager, fused):
        x = torch.linspace(-1, 1, 192, dtype=torch.float64).sin().view(2, 6, 16).requires_grad_()
        y, aux = layer(x, padding, multiway_split_position=split)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad, **grads})
        assert aux is None
    assert_same(found[1], found[0])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 12),
    "linear without bias": lambda: nn.Linear(16, 12, bias=False),
    "norm": lambda: nn.LayerNorm(16, eps=1e-3),
    "network": lambda: FeedForwardNetwork(16, 24, "gelu", 0.0, 0.0, 1e-5, subln=True),
    "network, silu": lambda: FeedForwardNetwork(16, 24, "swish", 0.5, 0.5, 1e-5),
}


def both(of: nn.Module) -> tuple[nn.Module, nn.Module]:
    for p in of.parameters():
        nn.init.normal_(p, std=0.3)
    eager = of.double().eval()
    fused = copy.deepcopy(eager)
    mmfuse.accelerate(fused, strict=True)
    return eager, fused


@contextmanager
def not_called(expert: nn.Module) -> Iterator[None]:
    """Within it modules of its class fail."""

    def fail(*args: Any) -> None:
        raise AssertionError("an expert is called")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(expert), "forward", fail)
        yield


@pytest.mark.parametrize("module", MODULES)
def test_a_pair_alone(module: str) -> None:
    eager, fused = both(MultiwayNetwork(MODULES[module]()))
    for split in (1, 4, 6, -1, 0):
        found = []
        for of in (eager, fused):
            of.split_position = split
            of.zero_grad()
            x = torch.linspace(-1, 1, 192, dtype=torch.float64).sin().view(2, 6, 16).requires_grad_()
            with not_called(of.A) if of is fused and split > 0 else nullcontext():
                y = of(x)
            (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
            grads = {f".{name}": p.grad for name, p in of.named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), ".x": x.grad, **grads})
            assert y.is_contiguous()
        assert_same(found[1], found[0])


def test_tables_of_positions_alone() -> None:
    """[1, S, D]; given positions, and one beyond the tables, are torchscale's."""
    eager, fused = both(MutliwayEmbedding([PositionalEmbedding(8, 16), PositionalEmbedding(7, 16)]))
    for split, length in ((3, 7), (6, 6), (-1, 6), (0, 5)):
        found = []
        for of in (eager, fused):
            of.split_position = split
            of.zero_grad()
            with not_called(of.A) if of is fused else nullcontext():
                y = of(torch.zeros(2, length, 16), positions=None)
            y.square().sum().backward()
            grads = {f".{name}": p.grad for name, p in of.named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), **grads})
        assert_same(found[1], found[0], 0)
    fused.split_position = eager.split_position = 0
    given = torch.tensor([[4, 2]])
    assert torch.equal(fused(torch.zeros(1, 2), positions=given), eager(torch.zeros(1, 2), positions=given))
    with pytest.raises(IndexError):
        fused(torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (lambda: MultiwayNetwork(nn.Linear(4, 4), dim=2), "it splits dimension 2, expected 1"),
        (lambda: MultiwayNetwork(nn.LayerNorm(4, elementwise_affine=False)), "no weight or bias"),
        (lambda: MultiwayNetwork(nn.Conv1d(4, 4, 1)), "its A is Conv1d"),
        (lambda: MultiwayNetwork(FeedForwardNetwork(4, 4, "relu", 0, 0, 1e-5)), "its activation is relu"),
        (lambda: MutliwayEmbedding([PositionalEmbedding(4, 4, padding_idx=2)] * 2), "have a padding_idx"),
    ],
)
def test_a_pair_that_is_left(pair: Callable[[], nn.Module], why: str) -> None:
    (left,) = mmfuse.accelerate(pair()).left
    assert why in left.why


@pytest.mark.usefixtures("stepping_aside")
def test_on_a_cpu_a_pair_alone_is_torchscales() -> None:
    _, fused = both(MultiwayNetwork(nn.Linear(16, 12)))
    fused.split_position = 3
    x = torch.zeros(2, 6, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="is called"), not_called(fused.A):
        fused(x)
    with not_called(fused.A), mmfuse.use_backend("torch"):
        fused(x)


def test_paths_are_dropped_by_the_same_draws() -> None:
    eager, fused = (m.train() for m in pair(torch.float64, drop_path_rate=0.5))
    found = []
    for of in (eager, fused, fused):
        torch.manual_seed(3)
        found.append(results(of, CALLS["pair"], torch.float64))
    assert_same(found[1], found[0])
    assert_same(found[2], found[1], 0)
    assert not torch.equal(found[0]["encoder_out"], results(fused, CALLS["pair"], torch.float64)["encoder_out"])


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_its_own_code_drops_activations(name: str) -> None:
    eager, fused = (m.train() for m in pair(**{name: 0.5}))
    for module in fused.modules():
        if type(module).__name__ == "MultiwayNetwork":  # which are fused by themselves
            mmfuse.decelerate(module)
    found = []
    for of in (eager, fused):
        torch.manual_seed(3)
        found.append(results(of, CALLS["pair"]))
    assert_same(found[1], found[0], 0)
    eager.eval(), fused.eval()
    with no_own_code():
        results(fused, CALLS["pair"])


def test_a_caption_word_by_word() -> None:
    """Keys and values of the image, then of each word, in torchscale's state."""
    eager, fused = pair(torch.float64)
    found = []
    for of in (eager, fused):
        state: dict[int, dict[str, Tensor]] = {i: {} for i in range(2)}
        with torch.no_grad():
            words = [of(visual_tokens=IMAGE.double(), incremental_state=state)["encoder_out"]]
            for n in range(3):
                step = of(textual_tokens=IDS[:, n : n + 1], incremental_state=state, positions=torch.tensor([[2 + n]]))
                words.append(step["encoder_out"])
        found.append(torch.cat(words, 1))
    torch.testing.assert_close(found[1], found[0])


def test_hidden_states_are_those_of_fused_layers() -> None:
    eager, fused = pair(torch.float64)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    call = {"token_embeddings": x, "multiway_split_position": 3, "return_all_hiddens": True}
    with no_own_code():
        got = fused.encoder(None, **call)
    want = eager.encoder(None, **call)
    assert len(got["encoder_states"]) == 3
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_weights_stay_the_same_objects() -> None:
    """An optimizer from before the swap trains them, checkpoints go both ways, and no value is kept."""
    eager, fused = (model().double() for _ in range(2))
    adam = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (eager, fused)]
    names = list(fused.state_dict())
    mmfuse.accelerate(fused)
    assert list(fused.state_dict()) == names

    def step() -> None:
        for m, optimizer in zip((eager, fused), adam, strict=True):
            results(m, CALLS["padded pair"], torch.float64)
            optimizer.step()

    def same() -> None:
        assert_same(*(results(m, CALLS["pair"], torch.float64) for m in (fused, eager)), 1e-5)

    def average() -> None:
        for m in (eager, fused):
            mean = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
            mean.update_parameters(m)
            mean.update_parameters(model(encoder_layers=2).double())
            m.load_state_dict(mean.module.state_dict())

    def copy_data() -> None:
        for m in (eager, fused):
            for i, p in enumerate(m.parameters()):
                p.data.copy_(torch.linspace(-1, 1, p.numel()).mul(i + 1).sin().view_as(p) / 3)

    def exchange() -> None:
        other = model(encoder_layers=2).double()
        mmfuse.accelerate(other)
        nn.init.normal_(other.encoder.layers[0].ffn.A.fc1.weight)
        eager.load_state_dict(other.state_dict())
        fused.load_state_dict(eager.state_dict())

    before = results(fused, CALLS["pair"], torch.float64)["encoder_out"]
    for change in (step, step, average, copy_data, exchange):
        change()
        same()
        after = results(fused, CALLS["pair"], torch.float64)["encoder_out"]
        assert not torch.allclose(after, before), change.__name__
        before = after


def test_gradients_add_up_and_under_checkpointing_another_split_comes_between() -> None:
    eager, fused = pair(torch.float64)
    found = []
    for of in (eager, fused):
        x = torch.linspace(-1, 1, 160, dtype=torch.float64).sin().view(2, 5, 16).requires_grad_()
        of.zero_grad()
        run: Callable[..., Tensor] = lambda x, split, m=of: m.encoder(  # noqa: E731
            None, token_embeddings=x, multiway_split_position=split
        )["encoder_out"]
        ys = [checkpoint(run, x, split, use_reentrant=False) for split in (3, 4, -1)]
        sum(y.square().sum() * (i + 1) for i, y in enumerate(ys)).backward()
        grads = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
        found.append({"x": x.grad, **grads})
    assert_same(found[1], found[0], 1e-5)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        judge(draws("padded pair"))


def test_in_a_graph() -> None:
    """One graph, for every number of samples and every split."""
    eager, fused = pair(torch.float64, encoder_layers=1)
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(fused.encoder, backend=graphs, fullgraph=True, dynamic=True)
    for samples, split in ((2, 3), (3, 3), (5, 4), (2, 2), (3, 5)):
        x = torch.randn(samples, 7, 16, dtype=torch.float64)
        got, want = (m(None, token_embeddings=x, multiway_split_position=split) for m in (compiled, eager.encoder))
        torch.testing.assert_close(got["encoder_out"], want["encoder_out"], rtol=2e-6, atol=2e-6)
    assert graphs.frame_count == 1


def moves(layers: int, fused: bool) -> int:
    of = pair(encoder_layers=layers)[fused].encoder
    x = torch.randn(2, 7, 16)
    with torch.no_grad(), mmfuse.use_backend("slices"), profile(activities=[ProfilerActivity.CPU]) as seen:
        of(None, token_embeddings=x, multiway_split_position=4)
    return sum(e.count for e in seen.key_averages() if e.key in ("aten::cat", "aten::clone", "aten::index_select"))


def test_a_layer_moves_no_rows() -> None:
    """Samples are a view of the stream, and what they attend to is one."""
    ours, theirs = (moves(3, fused) - moves(2, fused) for fused in (True, False))
    assert ours == 0 and theirs >= 20, (ours, theirs)


def saved_bytes(of: nn.Module, run: Callable[[nn.Module], Tensor]) -> int:
    """Of what is kept for the backward, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in of.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(of).sum()
    return sum(kept.values())


def test_what_a_layer_keeps() -> None:
    x = torch.randn(2, 261, 64)
    wide = {
        "img_size": 224,
        "patch_size": 16,
        "encoder_embed_dim": 64,
        "encoder_attention_heads": 1,
        "encoder_ffn_embed_dim": 256,
        "encoder_layers": 1,
    }
    run = lambda m: m.encoder(None, token_embeddings=x, multiway_split_position=197)["encoder_out"]  # noqa: E731
    with mmfuse.use_backend("slices"):
        theirs, ours = (saved_bytes(m, run) for m in pair(**wide))
    assert ours <= 0.45 * theirs, (ours, theirs)


@pytest.mark.usefixtures("stepping_aside")
@pytest.mark.parametrize(("rows", "split", "aside"), [(600, 3, False), (600, -1, True), (600, 0, True), (300, 3, True)])
def test_few_rows_and_one_modality_step_aside(rows: int, split: int, aside: bool) -> None:
    _, fused = pair(encoder_layers=1)
    x = torch.randn(rows // 5, 5, 16)
    run = lambda: fused.encoder(None, token_embeddings=x, multiway_split_position=split)  # noqa: E731
    if aside:
        with pytest.raises(AssertionError, match="torchscale's own"), no_own_code():
            run()
    else:
        with no_own_code():
            run()
    with no_own_code(), mmfuse.use_backend("torch"):
        run()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"multiway": False}, "expected MultiwayNetwork"),
        ({"rel_pos_buckets": 32, "max_rel_pos": 128}, "it has relative positions"),
        ({"xpos_rel_pos": True, "xpos_scale_base": 512}, "its attention rotates positions"),
        ({"activation_fn": "relu"}, "its activation is relu, expected gelu or silu"),
        ({"checkpoint_activations": True}, "has a forward of its own"),
    ],
)
def test_what_is_left(options: dict[str, Any], why: str) -> None:
    config = EncoderConfig(**SMALL | {"layernorm_embedding": False} | options)
    report = mmfuse.accelerate(Encoder(config))
    assert not any(e.cls == "Encoder" for e in report.replaced)
    assert any(why in e.why for e in report.left), report


def test_calls_that_are_not_of_beit3() -> None:
    """A Boolean mask, whose 1 torchscale adds, and a position that no one has named."""
    eager, fused = pair()
    x, mask = torch.randn(2, 7, 16), torch.ones(7, 7).triu(1).bool()
    for call in ({"attn_mask": mask, "multiway_split_position": 3}, {"multiway_split_position": None}):
        got, want = (m.encoder(None, token_embeddings=x, **call)["encoder_out"] for m in (fused, eager))
        torch.testing.assert_close(got, want)


def test_every_rule_is_tested_here() -> None:
    assert {r.target.split(":")[1] for r in RULES if r.target.startswith("torchscale")} == {
        cls.__name__ for cls in (Encoder, EncoderLayer, MultiwayNetwork, MutliwayEmbedding)
    }
