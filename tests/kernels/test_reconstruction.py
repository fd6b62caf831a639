"""The loss of masked autoencoders: ViTMAE's and VideoMAE's own, every implementation, and random masking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.patch.reconstruction import masked_patch_loss, random_masking
from mmfuse.kernels.patch.reconstruction.op import LOSS, loss_fwd

allow_torchvision()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALL = LOSS.available(torch.ones(1, 1, 1, device=DEVICE))
OURS = [n for n in ALL if n != "torch"]
SMALL: dict[str, Any] = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    **{f"decoder_{k}": v for k, v in {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}.items()},
    "decoder_num_hidden_layers": 1,
}


# --- the real models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_the_loss_of_vit_mae(backend: str, norm_pix: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(**SMALL, image_size=12, patch_size=4, mask_ratio=0.6, norm_pix_loss=norm_pix)
    model, pixels, noise = ViTMAEForPreTraining(config), torch.randn(3, 3, 12, 12), torch.rand(3, 9)
    out = model(pixels, noise=noise)
    ids_keep, ids_restore, mask = random_masking(noise, int(9 * (1 - 0.6)))
    assert torch.equal(ids_restore, out.ids_restore) and torch.equal(mask.float(), out.mask)
    assert torch.equal(ids_keep, noise.argsort(1)[:, :3])
    prediction = out.logits.detach().to(DEVICE).requires_grad_()
    for given in (out.mask, mask):
        loss = masked_patch_loss(
            prediction, pixels.to(DEVICE), given.to(DEVICE), patch=4, norm_pix=norm_pix, backend=backend
        )  # fmt: skip
        torch.testing.assert_close(loss.cpu(), out.loss)
        (expected,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, prediction)[0].cpu(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_the_loss_of_videomae(backend: str, norm_pix: bool) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(**SMALL, image_size=8, patch_size=4, num_frames=4, tubelet_size=2, norm_pix_loss=norm_pix)
    clip = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    m, s = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (clip / 255 - m[:, None, None]) / s[:, None, None]
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [1, 2, 5, 7]], mask[1, [0, 3, 4, 6]] = True, True
    out = VideoMAEForPreTraining(config)(pixels, bool_masked_pos=mask)
    (expected,) = torch.autograd.grad(out.loss, out.logits)
    prediction = out.logits.detach().to(DEVICE).requires_grad_()
    options: dict[str, Any] = {"patch": (2, 4, 4), "norm_pix": norm_pix, "layout": "ntchw", "backend": backend}
    for given, mean, std in ((pixels, -m / s, 1 / s), (clip, 0.0, None)):
        values = {"mean": mean if not isinstance(mean, Tensor) else mean.to(DEVICE)}
        values["std"] = std if std is None else std.to(DEVICE)
        loss = masked_patch_loss(prediction, given.to(DEVICE), mask.to(DEVICE), **values, **options)
        torch.testing.assert_close(loss.cpu(), out.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, prediction)[0].cpu(), expected, rtol=1e-4, atol=1e-6)


# --- every implementation -------------------------------------------------------------------------------------------

# name: (shape of the pixels, layout, patch, norm_pix, predicted patches or None for all)
CASES: dict[str, tuple[tuple[int, ...], str, Any, Any, int | None]] = {
    "MAE": ((3, 3, 8, 12), "nchw", 4, True, None),
    "one channel": ((2, 1, 8, 8), "nchw", (4, 2), True, None),
    "channels last": ((2, 8, 8, 5), "nhwc", 4, "channel", None),
    "VideoMAE": ((2, 4, 3, 8, 8), "ntchw", (2, 4, 4), True, 5),
    "clip": ((2, 3, 2, 4, 8), "nchw", (2, 4, 4), "patch", None),
    "pixels": ((2, 3, 8, 8), "nchw", 4, False, 3),
}


def make(name: str, dtype: torch.dtype, pixels: str = "float") -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    shape, layout, patch, norm_pix, count = CASES[name]
    x = torch.randint(0, 256, shape, dtype=torch.uint8) if pixels == "uint8" else torch.rand(shape).to(dtype)
    channels = {"nchw": 1, "ntchw": 2, "nhwc": -1}[layout]
    n = x.numel() // shape[0] // shape[channels]
    size = (patch, patch) if isinstance(patch, int) else patch
    n //= torch.tensor(size).prod().item()
    k = shape[channels] * int(torch.tensor(size).prod())
    mask = torch.rand(shape[0], n).argsort(1) < (count or n - 1)
    prediction = torch.randn(shape[0], count or n, k).to(dtype)
    options = {"patch": patch, "norm_pix": norm_pix, "layout": layout}
    return prediction.to(DEVICE), x.to(DEVICE), mask.to(DEVICE), options


def run(
    prediction: Tensor, pixels: Tensor, mask: Tensor, options: dict[str, Any], backend: str
) -> tuple[Tensor, Tensor]:
    prediction = prediction.detach().requires_grad_()
    loss = masked_patch_loss(prediction, pixels, mask, **options, backend=backend)
    return loss.detach(), torch.autograd.grad(3 * loss, prediction)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", OURS)
def test_loss_and_gradient(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend == "triton" and not GPU and dtype != torch.float32:
        pytest.skip("16 bits in the interpreter are no GPU's")
    losses = []
    for pixels in ("float", "uint8", "uint8 as it is"):
        prediction, x, mask, options = make(name, dtype, pixels.split()[0])
        if pixels == "uint8":
            options |= {"mean": 0.45, "std": 0.225}
        wide = (prediction.double(), x if x.dtype == torch.uint8 else x.double(), mask, options)
        got, eager, exact = (
            run(prediction, x, mask, options, backend), run(prediction, x, mask, options, "torch"), run(*wide, "torch")
        )  # fmt: skip
        assert got[0].dtype == torch.float32 and got[1].dtype == dtype
        losses.append([t[0] / exact[0].float() for t in (got, eager, exact)])
        assert_no_worse(got[1], eager[1], exact[1], pixels)
    assert_no_worse(*(torch.stack(t) for t in zip(*losses, strict=True)))


@pytest.mark.parametrize("backend", OURS)
def test_gradcheck(backend: str) -> None:
    prediction, pixels, mask, options = make("VideoMAE", torch.float64)
    prediction = prediction[:, :, :].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: masked_patch_loss(p, pixels, mask, **options, backend=backend), prediction, fast_mode=True
    )


@pytest.mark.parametrize("backend", ALL)
def test_strides_and_runs_do_not_matter(backend: str) -> None:
    prediction, pixels, mask, options = make("MAE", torch.float32)
    one, two = (run(prediction, pixels, mask, options, backend) for _ in range(2))
    wide = torch.nn.functional.pad(pixels, (2, 3, 1, 0))[:, :, 1:, 2:-3]  # a crop
    strided = prediction.transpose(0, 2).contiguous().transpose(0, 2)
    other = run(strided, wide, mask.t().contiguous().t(), options, backend)
    for a, b, c in zip(one, two, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a)


@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_masked_is_not_seen(backend: str) -> None:
    prediction, pixels, mask, options = make("MAE", torch.float32)
    expected = run(prediction, pixels, mask, options, backend)
    prediction = torch.where(mask[:, :, None], prediction, torch.inf)
    loss, grad = run(prediction, pixels, mask, options, backend)
    assert torch.equal(loss, expected[0])
    if backend != "torch":  # eager multiplies infinity by nothing
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("backend", ALL)
def test_nothing_masked_and_no_image(backend: str) -> None:
    prediction, pixels, mask, options = make("MAE", torch.float32)
    assert masked_patch_loss(prediction, pixels, mask & False, **options, backend=backend).isnan()
    assert masked_patch_loss(prediction[:0], pixels[:0], mask[:0], **options, backend=backend).isnan()


def test_compiled_and_checked() -> None:
    prediction, pixels, mask, options = make("MAE", torch.float32)
    prediction.requires_grad_()
    fn = torch.compile(lambda p: masked_patch_loss(p, pixels, mask, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(fn(prediction), masked_patch_loss(prediction, pixels, mask, **options))
    video = pixels.movedim(1, -1)[:, None]
    torch.library.opcheck(loss_fwd.op, (prediction, video, mask, None, None, 1, 4, 4, "patch", "chunked"))


def test_errors_name_the_argument() -> None:
    prediction, pixels, mask, options = make("MAE", torch.float32)
    for error, match, change in (
        (ValueError, "prediction", {"prediction": prediction[:, :, :5]}),
        (ValueError, "mask", {"mask": mask[:, :2]}),
        (ValueError, "multiple", {"patch": 5}),
        (ValueError, "patch", {"patch": (1, 1, 4, 4)}),
        (ValueError, "norm_pix", {"norm_pix": "batch"}),
        (ValueError, "layout", {"layout": "ntchw"}),
        (ValueError, "mean", {"mean": [0.5, 0.5]}),
        (TypeError, "prediction", {"prediction": prediction.long()}),
        (TypeError, "pixels", {"pixels": pixels.long()}),
    ):
        with pytest.raises(error, match=match):
            masked_patch_loss(**{"prediction": prediction, "pixels": pixels, "mask": mask, **options, **change})
    with pytest.raises(mmfuse.UnsupportedError):
        masked_patch_loss(prediction, pixels, mask, **options, backend="cpu")
    for noise, keep in ((torch.rand(4), 2), (torch.rand(2, 4), 5)):
        with pytest.raises(ValueError, match="noise|keep"):
            random_masking(noise, keep)
