"""A small CLIP trained on scikit-learn's digits and their captions: the fused loss follows the eager one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused import ClipLoss, SigLipLoss

datasets = pytest.importorskip("sklearn.datasets")

STEPS, BATCH = 30, 128


class EagerClipLoss(nn.Module):
    def forward(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits, label = scale * image @ text.t(), torch.arange(len(image))
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.t(), label)) / 2


class EagerSigLipLoss(nn.Module):
    def forward(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.t() + bias
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)


class TwoTowers(nn.Module):
    """Images [N, 64] through an MLP, captions [N, 6] of tokens through a mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.EmbeddingBag(15, 64), nn.GELU(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(14.3).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return image, text, self.logit_scale.exp(), self.logit_bias


def digits() -> tuple[Tensor, Tensor]:
    """Images, and captions such as "a photo of the digit seven" as tokens."""
    images, classes = datasets.load_digits(return_X_y=True)
    classes = torch.from_numpy(classes)
    prefix = torch.arange(5).expand(len(classes), 5)
    return torch.from_numpy(images).float() / 16, torch.cat([prefix, 5 + classes[:, None]], dim=1)


def train(loss: nn.Module) -> Tensor:
    torch.manual_seed(0)
    model, (images, captions) = TwoTowers(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        value = loss(*model(images[rows], captions[rows]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.detach())
    return torch.stack(curve)


@pytest.mark.parametrize("fused, eager", [(ClipLoss, EagerClipLoss), (SigLipLoss, EagerSigLipLoss)])
def test_the_curves_agree(fused: type[nn.Module], eager: type[nn.Module]) -> None:
    got, want = train(fused()), train(eager())
    assert want[-1] < 0.8 * want[0], "it does not learn, so the curves say little"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
