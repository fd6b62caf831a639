"""`accelerate()` on live models of transformers and open_clip: what it replaces, that nothing changes, and undo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmfuse
from mmfuse.demo.page import Page
from mmfuse.kernels._runtime.numerics import error_and_bound

if TYPE_CHECKING:
    from mmfuse.demo import Settings

# the photographs that scikit-image installs
CAPTIONS = {
    "astronaut.png": "a portrait of an astronaut",
    "chelsea.png": "a tabby cat",
    "coffee.png": "a cup of coffee",
    "rocket.jpg": "a rocket on its launch pad",
    "hubble_deep_field.jpg": "a deep field of galaxies",
    "moon.png": "the surface of the moon",
    "coins.png": "ancient coins",
    "retina.jpg": "the retina of an eye",
}
_SIZE, _WIDTH = 224, 256

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class OpenClip(nn.Module):
    """A model of open_clip and its loss, as its training loop holds them."""

    def __init__(self, layers: int):
        from open_clip import CLIP, ClipLoss

        super().__init__()
        vision = {"image_size": _SIZE, "patch_size": 32, "width": _WIDTH, "layers": layers}
        self.model = CLIP(_WIDTH, vision, {"width": _WIDTH, "heads": 4, "layers": layers})
        self.loss = ClipLoss()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(*self.model(image, text))


def _transformers(layers: int) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    vision = {**tower, "image_size": _SIZE, "patch_size": 32}
    return CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=_WIDTH))


def _loss_of_transformers(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    return model(input_ids=text, pixel_values=image, return_loss=True).loss


def photographs() -> tuple[list[str], Tensor]:
    """Captions, and images [N, 3, 224, 224] in [0, 1]: the middle square of each."""
    import skimage
    from PIL import Image, ImageOps

    folder = Path(skimage.__file__).parent / "data"
    names = [name for name in CAPTIONS if (folder / name).exists()]
    squares = [ImageOps.fit(Image.open(folder / name).convert("RGB"), (_SIZE, _SIZE)) for name in names]
    pixels = torch.stack([torch.from_numpy(np.array(square)) for square in squares])
    return [CAPTIONS[name] for name in names], pixels.permute(0, 3, 1, 2) / 255


def show(page: Page, settings: Settings) -> None:
    """The sections of the swap and of the images."""
    from open_clip import SimpleTokenizer

    captions, images = photographs()
    text = SimpleTokenizer()(captions).to(settings.device)
    image = ((images - 0.5) / 0.25).to(settings.device)
    # mirrored and upside down as well, so that luck of one rounding does not decide
    batches = [(image.flip(dims), text) for dims in ((), (-1,), (-2,), (-1, -2))]
    layers = settings.of(4, 1)
    torch.manual_seed(0)
    hugging_face, open_clip = _transformers(layers).to(settings.device), OpenClip(layers).to(settings.device)

    page.section("What accelerate() replaced")
    page.text(
        "Live models at random weights, on the images below. Errors are against the same model in float64; allowed "
        "is twice the error of the eager model, and one unit in the last place. The gradient is that of every "
        "parameter of the model. Batches this small step aside for eager where that is faster; here and in the "
        "training below they may not, or eager would be compared with itself."
    )
    swap(page, "transformers", hugging_face, _loss_of_transformers, {"clip_loss"}, batches)
    swap(page, "open_clip", open_clip, lambda model, *batch: model(*batch), None, batches)
    _similarities(page, hugging_face, captions, images, image, text)


def swap(page: Page, name: str, model: nn.Module, loss: Loss, ops: set[str] | None, batches: list) -> None:
    """Accelerate a model, compare loss and gradient with eager's, undo, and compare again."""
    weights = copy.deepcopy(model.state_dict())
    exact = _measure(copy.deepcopy(model).double(), loss, [(image.double(), text) for image, text in batches])
    eager = _measure(model, loss, batches)
    report = mmfuse.accelerate(model, ops=ops)
    page.pre(f"{name}\n{report}")
    fused = _measure(model, loss, batches)
    report.undo()
    undone = _measure(model, loss, batches)

    rows, holds = [], True
    for what, got, own, true in zip(eager._fields, fused, eager, exact, strict=True):
        error, allowed, of_eager = error_and_bound(got, own, true)
        holds &= error <= allowed
        difference = (got - own).abs().max().item()
        rows.append((what, *(f"{v:.1e}" for v in (true.abs().max().item(), of_eager, error, allowed, difference))))
    page.table(("", "largest", "eager's error", "accelerated", "allowed", "difference"), rows)
    page.claim(holds and bool(report.replaced), f"{name}: accelerated, loss and gradient are as exact as eager's")
    back = not any("forward" in vars(module) for module in model.modules())
    back &= all(map(torch.equal, undone, eager))
    back &= all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    page.claim(back, f"{name}: after undo(), loss, gradient and weights are bitwise those from before")


class Measured(NamedTuple):
    loss: Tensor  # [batches]
    gradient: Tensor  # of their mean, all parameters in a row


def _measure(model: nn.Module, loss: Loss, batches: list) -> Measured:
    with sdpa_kernel(SDPBackend.MATH):  # the others add in no fixed order on a GPU
        losses = torch.stack([loss(model, *batch) for batch in batches])
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return Measured(losses.detach(), torch.cat([g.flatten() for g in gradients]))


def _similarities(
    page: Page, model: nn.Module, captions: list[str], pixels: Tensor, image: Tensor, text: Tensor
) -> None:
    """The images, and the logits that the accelerated model computes when they are read."""
    from mmfuse.demo import plots

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=text, pixel_values=image, return_loss=True).logits_per_image.cpu()

    eager = logits()
    with mmfuse.accelerate(model, ops={"clip_loss"}):
        fused = logits()
    page.section("Images")
    page.figure(
        "images",
        "Images of scikit-image with their captions, and the similarity matrix of the accelerated transformers "
        "model. Its weights are random and its values mean nothing yet, but are the eager model's.",
        plots.images(captions, pixels, fused),
    )
    page.claim(torch.equal(fused, eager), "read after the fused loss, the similarity matrix is bitwise the eager one")
