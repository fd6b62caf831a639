"""accelerate() on Cosmos 3's linear layers of many embodiments, by themselves and in the real transformer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration.rules import RULES

allow_torchvision()
modeling = pytest.importorskip("diffusers.models.transformers.transformer_cosmos3")
DomainAwareLinear = modeling.DomainAwareLinear


def layer(k: int = 6, n: int = 5, domains: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = DomainAwareLinear(k, n, domains).to(dtype)
    assert len(mmfuse.accelerate(made).replaced) == 1
    return made


@contextmanager
def no_own_code() -> Iterator[None]:
    """Within it the class's own forward fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("diffusers' own layer runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainAwareLinear, "forward", fail)
        yield


def run(call: Any, of: nn.Module, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of x and both tables."""
    x = x.clone().requires_grad_()
    y = call(x, ids)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), (x, of.fc.weight, of.bias.weight))


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        ((9, 6), [3, 0, 3, 3, 1, 0, 0, 3, 1]),
        ((4, 6), [2, 2, 2, 2]),
        ((3, 5, 6), [3, 0, 3]),
        ((1, 5, 6), 1),
        ((1, 6), 2),
        ((0, 6), []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, ...], ids: Any) -> None:
    """Each row through its domain's layer; the gradient of a domain without rows is 0."""
    of, exact = layer(dtype=dtype), layer(dtype=dtype).double()
    x, ids = torch.randn(shape).to(dtype), torch.tensor(ids, dtype=torch.int64)
    parameters = list(of.parameters())
    with no_own_code():
        got = run(of, of, x, ids)
    assert all(a is b for a, b in zip(of.parameters(), parameters, strict=True))
    eager, truth = (run(lambda *a, m=m: type(m).forward(m, *a), m, t, ids) for m, t in ((of, x), (exact, x.double())))
    for name, *results in zip(("y", "dx", "dfc", "dbias"), got, eager, truth, strict=True):
        assert_no_worse(*results, name)
    absent = [e for e in range(4) if e not in ids.flatten()]
    assert not got[2][absent].any() and not got[3][absent].any()


def test_more_domains_than_a_kernel_knows() -> None:
    of, x, ids = layer(domains=33, dtype=torch.float32), torch.randn(50, 6), torch.arange(50) % 33
    with no_own_code():
        got = of(x, ids.int())
    torch.testing.assert_close(got, DomainAwareLinear.forward(of, x, ids))


def test_autocast() -> None:
    """To the product in bfloat16 diffusers adds a bias in float32, however large, and so is the output."""
    of, ids = layer(dtype=torch.float32), torch.arange(90) % 4
    nn.init.constant_(of.bias.weight, 1000.3)
    for x in (torch.randn(90, 6), torch.randn(90, 2, 6)):
        with torch.autocast("cpu", torch.bfloat16):
            with no_own_code():
                got = run(of, of, x, ids)
            want = run(lambda *given: DomainAwareLinear.forward(of, *given), of, x, ids)
        exact = copy.deepcopy(of).double()
        truth = run(lambda *given, of=exact: DomainAwareLinear.forward(of, *given), exact, x.double(), ids)
        assert got[0].dtype == want[0].dtype == torch.float32
        for name, *results in zip(("y", "dx", "dfc", "dbias"), got, want, truth, strict=True):
            assert_no_worse(*results, name)


@pytest.mark.parametrize(
    ("x", "ids", "match"),
    [
        (torch.zeros(2, 6), torch.tensor([0, 4]), r"must be in \[0, 4\), got \[0, 4\]"),
        (torch.zeros(2, 6), torch.tensor([-1, 0]), r"must be in \[0, 4\)"),
        (torch.zeros(2, 6), torch.tensor([0]), "must match action tokens"),
        (torch.zeros(2, 1, 1, 6), torch.tensor([0, 1]), "expected rank-2 or rank-3 input"),
        (torch.zeros(2, 7), torch.tensor([0, 1]), None),
        (torch.zeros(2, 6).half(), torch.tensor([0, 1]), None),
    ],
)
def test_what_it_refuses_is_diffusers_error(x: Tensor, ids: Tensor, match: str | None) -> None:
    with pytest.raises((ValueError, RuntimeError), match=match):
        layer(dtype=torch.float32)(x, ids)


@pytest.mark.parametrize(
    ("option", "value"), [("padding_idx", 0), ("max_norm", 1.0), ("sparse", True), ("scale_grad_by_freq", True)]
)
def test_tables_with_options_are_left(option: str, value: Any) -> None:
    of = DomainAwareLinear(6, 5, 4)
    setattr(of.bias, option, value)
    (left,) = mmfuse.accelerate(of).left
    assert "its tables have a padding_idx" in left.why


@pytest.mark.usefixtures("stepping_aside")
@pytest.mark.parametrize(("n", "domains", "aside"), [(2048, 4, False), (2048, 1024, True), (64, 4, True)])
def test_few_gathered_weights_step_aside(n: int, domains: int, aside: bool) -> None:
    of, x, ids = layer(64, 64, domains, torch.float32), torch.randn(n, 64), torch.arange(n) % domains
    with torch.no_grad(), no_own_code():
        if aside:
            with pytest.raises(AssertionError, match="diffusers' own"):
                of(x, ids)
        else:
            of(x, ids)
        with mmfuse.use_backend("slices"):
            of(x, ids)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "num_hidden_layers": 1, "latent_channel": 4, "patch_latent_dim": 16}
    made = modeling.Cosmos3OmniTransformer(
        **sizes,
        vocab_size=20,
        rope_scaling={"mrope_section": [2, 1, 1]},
        action_gen=True,
        action_dim=5,
        num_embodiment_domains=4,
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    made.double().time_embedder.float()  # what 0.39.0 gives it is in float32
    return made.eval()


def step(of: nn.Module) -> list[Tensor]:
    """What is predicted after 3 words of a frame of 2 x 2 patches, and of the actions of two embodiments."""
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    at = torch.arange
    out = of(
        input_ids=torch.tensor([3, 1, 4]), text_indexes=at(3), position_ids=at(12), und_len=3, sequence_length=12,
        vision_tokens=[draw(1, 4, 1, 4, 4)], vision_token_shapes=[(1, 2, 2)], vision_sequence_indexes=at(3, 7),
        vision_mse_loss_indexes=at(3, 7), vision_timesteps=draw(4), vision_noisy_frame_indexes=[at(1)],
        action_tokens=[draw(3, 5), draw(2, 5)], action_token_shapes=[(3,), (2,)], action_sequence_indexes=at(7, 12),
        action_mse_loss_indexes=torch.tensor([8, 9, 10]), action_timesteps=draw(3),
        action_noisy_frame_indexes=[at(1, 3), at(1)], action_domain_ids=[torch.tensor(2), torch.tensor(0)],
    )  # fmt: skip
    # a tuple in 0.39.0
    frames, _, actions = out if isinstance(out, tuple) else (out.sample, out.sound, out.action)
    return [*frames, *actions]


def test_in_the_transformer() -> None:
    """Predictions, and the gradients of all parameters."""
    found = []
    for accelerated in (False, True):
        of = transformer()
        if accelerated:
            assert [e.path for e in mmfuse.accelerate(of).replaced] == ["action_proj_in", "action_proj_out"]
        said = step(of)
        sum(t.square().sum() for t in said).backward()
        grads = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
        found.append({str(i): t.detach() for i, t in enumerate(said)} | grads)
    assert list(found[0]) == list(found[1]) and "action_proj_in.fc.weight" in found[0]
    torch.testing.assert_close(found[1], found[0])
    with no_own_code():
        step(of)


def test_every_rule_is_tested_here() -> None:
    assert [r.target for r in RULES if r.target.startswith("diffusers")] == [f"{modeling.__name__}:DomainAwareLinear"]
