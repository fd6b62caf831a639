"""The loss of masked autoencoders: ViTMAE's and VideoMAE's own, every implementation, and random masking."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfuse
from judge import Results, cast, compared, judge
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.patch.reconstruction import masked_patch_loss, random_masking
from registered import backends, opcheck

allow_torchvision()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(1, 1, 1, 1, device=DEVICE)
ALL = backends(lambda: masked_patch_loss(PROBE[0], PROBE, PROBE[0, 0] > 0, patch=1))
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


Given = tuple[Tensor, Tensor, Tensor]


def make(name: str, pixels: str = "float") -> tuple[Given, dict[str, Any]]:
    """(prediction, pixels, mask), options"""
    shape, layout, patch, norm_pix, count = CASES[name]
    x = torch.randint(0, 256, shape, dtype=torch.uint8) if pixels == "uint8" else torch.rand(shape)
    channels = {"nchw": 1, "ntchw": 2, "nhwc": -1}[layout]
    n = x.numel() // shape[0] // shape[channels]
    size = (patch, patch) if isinstance(patch, int) else patch
    n //= torch.tensor(size).prod().item()
    k = shape[channels] * int(torch.tensor(size).prod())
    mask = torch.rand(shape[0], n).argsort(1) < (count or n - 1)
    prediction = torch.randn(shape[0], count or n, k)
    options = {"patch": patch, "norm_pix": norm_pix, "layout": layout}
    return (prediction.to(DEVICE), x.to(DEVICE), mask.to(DEVICE)), options


def run(given: Given, backend: str, loss: Any = masked_patch_loss, **options: Any) -> Results:
    prediction, pixels, mask = given
    prediction = prediction.detach().requires_grad_()
    value = loss(prediction, pixels, mask, **options, backend=backend)
    return {"loss": value.detach(), "prediction": torch.autograd.grad(3 * value, prediction)[0]}


def written_out(prediction, pixels, mask, patch, norm_pix, layout, mean=None, std=None, backend=None):  # type: ignore[no-untyped-def]
    """Patch by patch: the mean over the masked ones of the mean of the squared distances to what was there."""
    x = pixels.movedim({"nchw": 1, "ntchw": 2, "nhwc": -1}[layout], -1).to(prediction.dtype)
    x = x if mean is None else (x / (255 if pixels.dtype == torch.uint8 else 1) - mean) / std
    x = x[:, None] if x.dim() == 4 else x
    size = (patch, patch) if isinstance(patch, int) else patch
    size = (1,) * (3 - len(size)) + size
    norm = {True: "channel" if size[0] > 1 else "patch"}.get(norm_pix, norm_pix)
    terms = []
    for image, own, masked in zip(x, prediction, mask, strict=True):
        corners = product(*(range(0, n, step) for n, step in zip(image.shape, size, strict=False)))
        targets = [image[t : t + size[0], i : i + size[1], j : j + size[2]] for t, i, j in corners]
        seen = [target for target, on in zip(targets, masked, strict=True) if on]
        own = own[masked] if len(own) == len(masked) else own
        for y, target in zip(own, seen, strict=True):
            rows = target.flatten(0, -2) if norm == "channel" else target.flatten()
            if norm:
                rows = rows - rows.mean(0)
                var = rows.square().sum(0) / (len(rows) - 1)
                rows = rows / (var.sqrt() + 1e-6 if norm == "channel" else (var + 1e-6).sqrt())
            terms.append((y - rows.flatten()).square().mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_formula(name: str) -> None:
    for pixels, values in (("float", {}), ("uint8", {}), ("uint8", {"mean": 0.45, "std": 0.225})):
        given, options = make(name, pixels)
        given = cast(given, torch.float64)
        got, want = (run(given, "torch", loss, **options, **values) for loss in (masked_patch_loss, written_out))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", OURS)
def test_loss_and_gradient(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend == "triton" and not GPU and dtype != torch.float32:
        pytest.skip("16 bits in the interpreter are no GPU's")
    losses = []
    for pixels, values in (("float", {}), ("uint8", {"mean": 0.45, "std": 0.225}), ("uint8", {})):
        given, options = make(name, pixels)
        found = next(compared(partial(run, **options, **values), lambda: given, backend, dtype))  # noqa: B023
        assert found[0]["loss"].dtype == torch.float32 and found[0]["prediction"].dtype == dtype
        judge([tuple({"prediction": side["prediction"]} for side in found)])
        losses.append(tuple({"loss": side["loss"] / found[2]["loss"].item()} for side in found))
    judge(losses)


@pytest.mark.parametrize("backend", OURS)
def test_gradcheck(backend: str) -> None:
    given, options = make("VideoMAE")
    prediction, pixels, mask = cast(given, torch.float64)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: masked_patch_loss(p, pixels, mask, **options, backend=backend), prediction, fast_mode=True
    )


@pytest.mark.parametrize("backend", ALL)
def test_strides_and_runs_do_not_matter(backend: str) -> None:
    (prediction, pixels, mask), options = make("MAE")
    one, two = (run((prediction, pixels, mask), backend, **options) for _ in range(2))
    wide = torch.nn.functional.pad(pixels, (2, 3, 1, 0))[:, :, 1:, 2:-3]  # a crop
    strided = prediction.transpose(0, 2).contiguous().transpose(0, 2)
    other = run((strided, wide, mask.t().contiguous().t()), backend, **options)
    assert all(torch.equal(one[k], two[k]) for k in one)
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_masked_is_not_seen(backend: str) -> None:
    (prediction, pixels, mask), options = make("MAE")
    expected = run((prediction, pixels, mask), backend, **options)
    prediction = torch.where(mask[:, :, None], prediction, torch.inf)
    found = run((prediction, pixels, mask), backend, **options)
    assert torch.equal(found["loss"], expected["loss"])
    assert torch.equal(found["prediction"], expected["prediction"])


@pytest.mark.parametrize("backend", ALL)
def test_nothing_masked_and_no_image(backend: str) -> None:
    (prediction, pixels, mask), options = make("MAE")
    loss = masked_patch_loss(prediction.requires_grad_(), pixels, mask & False, **options, backend=backend)
    assert loss.isnan() and not torch.autograd.grad(loss, prediction)[0].any()
    assert masked_patch_loss(prediction[:0], pixels[:0], mask[:0], **options, backend=backend).isnan()


def test_compiled_and_checked() -> None:
    (prediction, pixels, mask), options = make("MAE")
    prediction.requires_grad_()
    fn = torch.compile(lambda p: masked_patch_loss(p, pixels, mask, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(fn(prediction), masked_patch_loss(prediction, pixels, mask, **options))
    opcheck(lambda: masked_patch_loss(prediction, pixels, mask, **options, backend="chunked"))


def test_errors_name_the_argument() -> None:
    (prediction, pixels, mask), options = make("MAE")
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
