from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.fused import ImageBindLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def info_nce(query: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    logits = scale * F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).t()
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def written_out(image: Tensor, other: Tensor, scale: Tensor | float) -> Tensor:
    return info_nce(image, other, scale) + info_nce(other, image, scale)


def embeddings(n: int = 6, d: int = 16) -> Tensor:
    return torch.randn(n, d, device=DEVICE, requires_grad=True)


def test_pairs_of_one_batch_and_of_others() -> None:
    loss = ImageBindLoss().to(DEVICE)
    vision, text, audio, frames, depth = embeddings(), embeddings(), embeddings(), embeddings(4), embeddings(4)
    given = {"vision": vision, "text": text, "audio": audio, "depth": (frames, depth)}
    total = loss(given)
    parts = [written_out(vision, text, 1 / 0.07), written_out(vision, audio, 20.0), written_out(frames, depth, 5.0)]
    torch.testing.assert_close(total, sum(parts))
    inputs = (vision, text, audio, frames, depth)
    got, want = (torch.autograd.grad(t, inputs) for t in (total, sum(parts)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    each = loss(given, output_dict=True)
    assert list(each) == ["text_loss", "audio_loss", "depth_loss"]
    torch.testing.assert_close(list(each.values()), parts)


def test_scales_of_the_released_model() -> None:
    loss = ImageBindLoss()
    assert [name for name, _ in loss.named_parameters()] == ["logit_scales.text.log_logit_scale"]
    scales = {name: module().item() for name, module in loss.logit_scales.items()}
    assert scales == pytest.approx({"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0})
    assert set(loss.state_dict()) == {f"logit_scales.{name}.log_logit_scale" for name in scales}


@pytest.mark.parametrize("start", [30.0, 150.0])
def test_no_gradient_of_the_scale_at_the_cap(start: float) -> None:
    loss = ImageBindLoss({"text": start, "imu": 5.0}).to(DEVICE)
    vision, text = embeddings(), embeddings()
    total = loss({"vision": vision, "text": text})
    log_scale = loss.logit_scales["text"].log_logit_scale
    (got,) = torch.autograd.grad(total, log_scale)
    plain = torch.tensor(math.log(start), device=DEVICE, requires_grad=True)
    want = written_out(vision, text, torch.clip(plain.exp(), max=100.0))
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, plain)[0], rtol=1e-4, atol=1e-6)
    assert (got == 0) == (start > 100)


def test_embeddings_as_they_are() -> None:
    vision, imu = embeddings(), embeddings()
    loss = ImageBindLoss(learnable=(), normalize=False).to(DEVICE)
    unit = {"vision": F.normalize(vision, dim=-1), "imu": F.normalize(imu, dim=-1)}
    torch.testing.assert_close(loss(unit), written_out(vision, imu, 5.0))
    assert not list(loss.parameters())


def test_compiles_whole() -> None:
    loss = ImageBindLoss().to(DEVICE)
    given = {"vision": embeddings(), "text": embeddings(), "audio": embeddings()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), loss(given))


def test_errors() -> None:
    loss = ImageBindLoss()
    x = torch.randn(3, 8)
    for message, given in (
        ("embeddings has .'smell', 'vision'., expected 'vision' and some of", {"vision": x, "smell": x}),
        ("embeddings has .'vision'., expected", {"vision": x}),
        ("embeddings has no tensor 'vision' to pair 'text' with", {"text": x}),
        (r"texts\[0\] has shape \(2, 8\), expected \[3, 8\]", {"vision": x, "text": x[:2]}),
    ):
        with pytest.raises(ValueError, match=message):
            loss(given)
    with pytest.raises(ValueError, match="learnable has .'video'., expected modalities of scales"):
        ImageBindLoss(learnable=("video",))
