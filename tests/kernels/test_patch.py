"""patch_embed and its gradients: the reference against the convolution, every implementation against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import mmfuse
from judge import Results, cast, compared, judge
from mmfuse.kernels import patch_embed
from mmfuse.kernels._runtime import chosen
from mmfuse.kernels.patch.op import PATCH_EMBED, stem_of
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(1, 1, 1, 1, dtype=torch.uint8, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
FUSED = [n for n in backends(lambda: patch_embed(*PROBE)) if n != "torch"]
# the interpreter runs a Triton program, such as the product of `cuda`, in Python: it takes the small cases
FAST = [n for n in FUSED if GPU or n not in ("cuda", "triton")]
RGB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
D = 24


def u8(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def ids(b: int, n: int, kept: int) -> Tensor:
    return torch.stack([torch.randperm(n, device=DEVICE)[:kept] for _ in range(b)])


def masked(b: int, n: int) -> Tensor:
    return torch.rand(b, n, device=DEVICE) < 0.4


def norm() -> tuple[Tensor, Tensor, float]:
    return 1 + 0.1 * real(D), 0.1 * real(D), 1e-6


ROWS = {"bias": (D,), "mask_token": (D,), "type_embed": (D,), "prefix": (2, D), "prefix_position": (2, D)}


def rows(*names: str, n: int = 0) -> dict[str, Tensor]:
    return {name: real(*ROWS.get(name, (n, D))) for name in names}


# name: pixels, weight shape, options
CASES: dict[str, Any] = {
    "vit": lambda: (u8(3, 3, 32, 48), (D, 3, 16, 16), RGB | rows("bias", "prefix", "prefix_position", "position", n=6)),
    "everything": lambda: (
        u8(3, 3, 32, 48),
        (D, 3, 16, 16),
        RGB
        | rows("bias", "prefix", "prefix_position", "position", "mask_token", "type_embed", n=6)
        | {"stem_norm": norm(), "pre_norm": norm(), "mask": masked(3, 6)},
    ),
    "imagebind audio": lambda: (
        real(2, 1, 37, 57) * 9 - 4,
        (D, 1, 16, 16),
        rows("prefix", "position", n=15)
        | {"stride": 10, "mean": -4.268, "std": 9.138, "stem_norm": (*norm()[:2], 1e-5)},
    ),
    "mae": lambda: (
        u8(3, 3, 28, 42),
        (D, 3, 14, 14),
        RGB | rows("bias", "prefix", "prefix_position", "position", n=6) | {"ids_keep": ids(3, 6, 2)},
    ),
    "beit": lambda: (
        real(3, 3, 32, 48),
        (D, 3, 16, 16),
        rows("bias", "prefix", "mask_token") | {"mask": masked(3, 6)},
    ),
    "kept and masked": lambda: (
        real(3, 3, 32, 48),
        (D, 3, 16, 16),
        rows("position", "mask_token", n=6) | {"mask": masked(3, 6), "ids_keep": ids(3, 6, 4), "pre_norm": norm()},
    ),
    "kept twice": lambda: (
        real(2, 3, 32, 48),
        (D, 3, 16, 16),
        RGB | rows("position", n=6) | {"ids_keep": torch.tensor([[5, 1, 5], [0, 0, 0]], device=DEVICE)},
    ),
    "clip": lambda: (
        u8(2, 3, 28, 28),
        (D, 3, 14, 14),
        RGB | rows("prefix", "prefix_position", "position", n=4) | {"pre_norm": (norm()[0], None, 1e-5)},
    ),
    "nhwc": lambda: (u8(2, 32, 48, 3), (D, 3, 16, 16), RGB | rows("bias") | {"layout": "nhwc"}),
    "nhwc float": lambda: (real(2, 32, 48, 3), (D, 3, 16, 16), RGB | rows("bias") | {"layout": "nhwc"}),
    "channels last": lambda: (
        u8(2, 3, 32, 48).contiguous(memory_format=torch.channels_last),
        (D, 3, 16, 16),
        RGB | rows("bias"),
    ),
    "padded": lambda: (u8(2, 3, 30, 45), (D, 3, 16, 16), RGB | rows("bias", "position", n=6) | {"padding": "zero"}),
    "padded float": lambda: (real(2, 30, 45, 3), (D, 3, 16, 16), RGB | {"padding": "zero", "layout": "nhwc"}),
    "padded, kept": lambda: (
        u8(2, 3, 30, 45),
        (D, 3, 16, 16),
        RGB | {"padding": "zero", "ids_keep": ids(2, 6, 4)},
    ),
    "smaller than a patch": lambda: (u8(2, 3, 9, 5), (D, 3, 16, 16), RGB | {"padding": "zero"}),
    "video": lambda: (u8(2, 4, 3, 16, 24), (D, 3, 2, 8, 8), RGB | rows("bias") | {"layout": "ntchw"}),
    "video float": lambda: (real(2, 3, 4, 16, 24), (D, 3, 2, 8, 8), RGB | rows("position", n=12)),
    "still": lambda: (u8(2, 3, 28, 28), (D, 3, 2, 14, 14), RGB | rows("prefix", "prefix_position", "position", n=4)),
    "still nhwc": lambda: (real(2, 28, 28, 3), (D, 3, 2, 14, 14), {"layout": "nhwc"}),
    "imu": lambda: (real(2, 6, 40), (D, 6, 8), {"stem_norm": norm()} | rows("prefix")),
    "imu overlapping": lambda: (real(2, 40, 6), (D, 6, 8), {"stride": 4, "layout": "nhwc"}),
    "patches": lambda: (real(2, 5, 48), (D, 48), {"layout": "patches", "mean": (0.1, 0.2, 0.3), "std": 0.5}),
    "patches of a conv": lambda: (u8(2, 5, 48), (D, 3, 4, 4), RGB | {"layout": "patches"} | rows("bias")),
    "gray": lambda: (u8(2, 1, 32, 32), (D, 1, 16, 16), {"mean": (0.5,), "std": (0.5,)}),
    "four channels": lambda: (u8(2, 4, 16, 16), (D, 4, 8, 8), {"mean": 0.5, "std": 0.25}),
    "twelve channels": lambda: (u8(2, 12, 16, 16), (D, 12, 8, 8), {"std": 0.25}),
    "200 bands": lambda: (real(2, 200, 4, 6), (D, 200, 2, 2), rows("bias")),
    "one pixel": lambda: (real(2, 200, 1), (D, 200, 1), rows("bias", "prefix")),
    "bytes as numbers": lambda: (u8(2, 3, 32, 32), (D, 3, 16, 16), rows("bias")),
    "crop": lambda: (u8(2, 3, 64, 64)[:, :, 5:37, 7:55], (D, 3, 16, 16), RGB | rows("bias")),
    "crop of every second": lambda: (real(2, 3, 64, 96)[:, :, ::2, 1::2], (D, 3, 16, 16), RGB),
    "flipped": lambda: (u8(2, 3, 48, 32).mT.flip(-1), (D, 3, 16, 16), RGB | rows("bias", "position", n=6)),
    "one picture, many times": lambda: (u8(1, 3, 32, 48).expand(3, -1, -1, -1), (D, 3, 16, 16), RGB),
    "odd stride": lambda: (u8(2, 3, 23, 31), (D, 3, 5, 7), RGB | {"stride": (3, 11)}),
    "1 x N": lambda: (u8(2, 3, 16, 80), (D, 3, 16, 16), RGB | rows("bias", "position", n=5)),
    "one table": lambda: (u8(3, 3, 32, 48), (D, 3, 16, 16), RGB | rows("bias", "prefix", "pos_embed", n=8)),
    "one table kept": lambda: (
        u8(3, 3, 32, 48),
        (D, 3, 16, 16),
        RGB | rows("prefix", "pos_embed", n=8) | {"ids_keep": ids(3, 6, 2)},
    ),
    "one table alone": lambda: (u8(2, 3, 16, 80), (D, 3, 16, 16), RGB | rows("bias", "pos_embed", n=5)),
    "one patch": lambda: (u8(2, 3, 14, 14), (D, 3, 14, 14), RGB | rows("bias", "prefix", "position", n=1)),
    "no images": lambda: (u8(0, 3, 32, 32), (D, 3, 16, 16), RGB | rows("bias", "prefix", "position", n=4)),
    "none kept": lambda: (u8(2, 3, 32, 32), (D, 3, 16, 16), RGB | rows("prefix") | {"ids_keep": ids(2, 4, 0)}),
    "all masked": lambda: (
        u8(2, 3, 32, 32),
        (D, 3, 16, 16),
        RGB | rows("bias", "mask_token", "position", n=4) | {"mask": torch.ones(2, 4, dtype=torch.bool, device=DEVICE)},
    ),
}
SMALL = ["everything", "mae", "imagebind audio", "still", "padded", "nhwc", "patches"]


Given = tuple[Tensor, Tensor, dict[str, Any]]


def drawn(case: str) -> Given:
    """(pixels, weight, options)"""
    pixels, shape, options = CASES[case]()
    return pixels, real(*shape) / prod(shape[1:]) ** 0.5, options


def results(embed: Callable[..., Tensor], given: Given) -> Results:
    """The tokens, and the gradient of everything that has one."""
    pixels, weight, options = given
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        leaves[name] = t.detach().requires_grad_()
        return leaves[name]

    named = {
        k: (leaf(k, v[0]), leaf(k + " bias", v[1]), v[2]) if k.endswith("_norm") else leaf(k, v)
        for k, v in options.items()
    }
    y = embed(leaf("pixels", pixels), leaf("weight", weight), **named)
    g = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).sin().reshape(y.shape)
    grads = torch.autograd.grad(y, list(leaves.values()), g.to(y.dtype))
    return {"tokens": y.detach(), **dict(zip(leaves, grads, strict=True))}


def tokens(given: Given, backend: str) -> Results:
    return results(partial(patch_embed, backend=backend), given)


def check(case: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    pixels, weight, options = drawn(case)
    if backend not in backends(lambda: patch_embed(pixels, weight, **options)):  # bytes alone, on a GPU
        pytest.skip(f"{backend} does not take {pixels.dtype}")
    judge(compared(tokens, lambda: drawn(case), backend, dtype, draws=3 if backend in FAST else 2))


def written_out(
    x: Tensor, weight: Tensor, bias=None, *, stride=None, layout="nchw", mean=None, std=None, padding="error",
    stem_norm=None, prefix=None, position=None, prefix_position=None, pos_embed=None, mask=None, mask_token=None,
    ids_keep=None, type_embed=None, pre_norm=None,
) -> Tensor:  # type: ignore[no-untyped-def]  # fmt: skip
    """The convolution of the normalised pixels, and then what the docstring of `patch_embed` says, step by step."""
    channels = {"nchw": 1, "nhwc": x.dim() - 1, "ntchw": 2, "patches": 2}[layout]
    if x.dtype == torch.uint8:
        x = x.to(weight.dtype) / (1 if mean is None and std is None else 255)
    x = x.movedim(channels, -1)
    for value, change in ((mean, torch.sub), (std, torch.div)):
        if value is not None:
            each = torch.tensor(value, dtype=x.dtype, device=x.device).reshape(-1)
            x = change(x, each.repeat_interleave(x.shape[-1] // len(each)))
    if layout == "patches":
        y = x @ weight.flatten(1).t() + (0 if bias is None else bias)
    else:
        x = x.movedim(-1, 1)
        if x.dim() < weight.dim():  # a still under a temporal kernel
            x = x[:, :, None].expand(-1, -1, weight.shape[2], -1, -1)
        if padding == "zero":
            x = F.pad(
                x, [n for size, k in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True) for n in (0, -size % k)]
            )
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        y = conv(x, weight, bias, stride=stride or tuple(weight.shape[2:])).flatten(2).mT
    if stem_norm is not None:
        y = F.layer_norm(y, (len(weight),), *stem_norm)
    if pos_embed is not None:
        prefix_position, position = pos_embed[: -y.shape[1]], pos_embed[-y.shape[1] :]
    if mask is not None:
        y = torch.where(mask[:, :, None], mask_token, y)
    y = y if position is None else y + position
    if ids_keep is not None:
        y = torch.stack([rows[at] for rows, at in zip(y, ids_keep, strict=True)])
    if prefix is not None:
        front = prefix if prefix_position is None else prefix + prefix_position
        y = torch.cat([front.expand(len(y), -1, -1), y], 1)
    y = y if type_embed is None else y + type_embed
    return y if pre_norm is None else F.layer_norm(y, (len(weight),), *pre_norm)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case: str) -> None:
    given = cast(drawn(case), torch.float64)
    torch.testing.assert_close(tokens(given, "torch"), results(written_out, given), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", [n for n in FUSED if n not in FAST])
@pytest.mark.parametrize("case", SMALL)
def test_in_the_interpreter(case: str, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["vit", "everything", "beit"])
def test_16_bits(case: str, dtype: torch.dtype, backend: str) -> None:
    if backend not in FAST and (dtype == torch.bfloat16 or case == "vit"):
        pytest.skip("the interpreter's bfloat16 is not a GPU's, and it is slow")
    check(case, backend, dtype)


# name: (pixels, weight shape, options), and whether the product takes the bytes where they lie
BYTES: dict[str, Any] = {
    "no mean": (lambda: (u8(2, 3, 32, 48), (D, 3, 16, 16), {}), True),
    "more columns than a tile": (lambda: (u8(1, 1, 16, 32), (150, 1, 16, 16), {"mean": 0.5, "std": 0.25}), True),
    "more rows than a tile": (lambda: (u8(17, 1, 32, 64), (D, 1, 16, 16), {"mean": 0.5, "std": 0.25}), True),
    "mask and kept": (
        lambda: (
            u8(2, 3, 32, 48),
            (D, 3, 16, 16),
            RGB | rows("prefix", "mask_token", "position", n=6) | {"mask": masked(2, 6), "ids_keep": ids(2, 6, 4)},
        ),
        True,
    ),
    "video": (lambda: (u8(1, 4, 3, 16, 32), (D, 3, 2, 16, 16), RGB | {"layout": "ntchw"}), True),
    "overlapping": (lambda: (u8(1, 3, 32, 48), (D, 3, 32, 32), RGB | {"stride": 16}), True),
    "aligned crop": (lambda: (u8(2, 3, 64, 64)[:, :, 5:37, 16:64], (D, 3, 16, 16), RGB | rows("bias")), True),
    "one picture, many times": (lambda: (u8(1, 3, 32, 48).expand(2, -1, -1, -1), (D, 3, 16, 16), RGB), True),
    "none kept": (lambda: (u8(2, 3, 32, 32), (D, 3, 16, 16), RGB | {"ids_keep": ids(2, 4, 0)}), False),
    "crop": (lambda: (u8(2, 3, 64, 64)[:, :, 5:37, 7:55], (D, 3, 16, 16), RGB), False),
    "rows of 8": (lambda: (u8(2, 3, 16, 16), (D, 3, 8, 8), RGB), False),
    "padded": (lambda: (u8(2, 3, 30, 48), (D, 3, 16, 16), RGB | {"padding": "zero"}), False),
}


@pytest.mark.skipif("triton" not in FUSED, reason="no triton")
@pytest.mark.parametrize("case", BYTES)
def test_bytes_in_the_product(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfuse.kernels.patch import kernel

    launched, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda k, *a, **b: launched.append((k, b.get("a_ptr"))) or launch(k, *a, **b))
    draw, inside = BYTES[case]

    def given() -> Given:
        pixels, shape, options = draw()
        return pixels, real(*shape) / prod(shape[1:]) ** 0.5, options

    def run(given: Given, backend: str) -> Results:
        pixels, weight, options = given
        return {"tokens": patch_embed(pixels, weight, **options, backend=backend)}

    judge(compared(run, given, "triton", torch.float16, draws=2))
    assert any(k is kernel._tokens_kernel and a is None for k, a in launched) == inside


# pixels, weight and whether lines of bytes become rows of patches
LINES: dict[str, tuple[Callable[[], Given], bool]] = {
    "14": (lambda: (u8(2, 3, 28, 42), (D, 3, 14, 14), RGB | rows("bias")), True),
    "6, one channel": (lambda: (u8(3, 1, 12, 30), (D, 1, 6, 6), {"mean": 0.5}), True),
    "as they are": (lambda: (u8(2, 3, 28, 28), (D, 3, 14, 14), {}), True),
    "crop": (lambda: (u8(2, 3, 64, 64)[:, :, 5:33, 7:35], (D, 3, 14, 14), RGB), True),
    "odd": (lambda: (u8(2, 3, 14, 21), (D, 3, 7, 7), RGB), False),
    "kept": (lambda: (u8(2, 3, 28, 28), (D, 3, 14, 14), RGB | {"ids_keep": ids(2, 4, 3)}), False),
    "columns first": (lambda: (u8(2, 3, 28, 28).transpose(2, 3), (D, 3, 14, 14), RGB), False),
    "overlapping": (lambda: (u8(1, 3, 28, 28), (D, 3, 14, 14), RGB | {"stride": 7}), False),
    "padded": (lambda: (u8(2, 3, 26, 28), (D, 3, 14, 14), RGB | {"padding": "zero"}), False),
}


@pytest.mark.skipif("triton" not in FUSED, reason="no triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LINES)
def test_lines_of_bytes(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfuse.kernels.patch import kernel

    launched, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda k, *a, **b: launched.append(k) or launch(k, *a, **b))
    draw, by_lines = LINES[case]
    pixels, shape, options = draw()
    weight = real(*shape).to(dtype)
    options = {k: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in options.items()}
    found = patch_embed(pixels, weight, **options, backend="triton")
    assert (kernel._lines_kernel in launched) == by_lines
    monkeypatch.setattr(kernel, "_by_lines", lambda *given: False)
    assert torch.equal(found, patch_embed(pixels, weight, **options, backend="triton"))
    assert kernel._rows_kernel in launched


@pytest.mark.parametrize("backend", [n for n in FUSED if n != "triton"])
def test_blocks_of_one_image(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.kernels.patch.blocked._BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    for case in ("vit", "everything", "mae", "beit"):
        check(case, backend)


def test_is_the_convolution() -> None:
    x, w, b = u8(2, 3, 224, 224), real(D, 3, 16, 16), real(D)
    mean, std = (torch.tensor(RGB[k], device=DEVICE)[:, None, None] for k in ("mean", "std"))
    y = F.conv2d((x / 255 - mean) / std, w, b, stride=16).flatten(2).mT
    torch.testing.assert_close(patch_embed(x, w, b, **RGB), y, rtol=1e-4, atol=2e-4)
    clip = real(2, 4, 3, 32, 32)
    w = real(D, 3, 2, 16, 16)
    y = F.conv3d(clip.transpose(1, 2), w, stride=(2, 16, 16)).flatten(2).mT
    torch.testing.assert_close(patch_embed(clip, w, layout="ntchw"), y, rtol=1e-4, atol=2e-4)
    repeated = F.conv3d(clip[:, :1].transpose(1, 2).expand(-1, -1, 2, -1, -1), w, stride=(2, 16, 16)).flatten(2).mT
    torch.testing.assert_close(patch_embed(clip[:, 0], w), repeated, rtol=1e-4, atol=2e-4)
    spectrogram, w = real(2, 1, 128, 204), real(D, 1, 16, 16)
    y = F.conv2d(spectrogram, w, stride=10).flatten(2).mT
    assert y.shape[1] == 12 * 19
    torch.testing.assert_close(patch_embed(spectrogram, w, stride=10), y, rtol=1e-4, atol=2e-4)
    signal, w = real(2, 6, 40), real(D, 6, 8)
    torch.testing.assert_close(patch_embed(signal, w), F.conv1d(signal, w, stride=8).mT, rtol=1e-4, atol=2e-4)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_masked_is_not_seen(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("bytes have no NaN")
    pixels = real(2, 3, 16, 24)
    pixels[0, :, :8, 8:16] = torch.nan  # patch 1 of 6
    mask = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    weight = real(D, 3, 8, 8).requires_grad_()
    y = patch_embed(pixels, weight, mask=mask, mask_token=real(D), backend=backend)
    assert y[0, 1].isnan().all() and y.isnan().sum() == D  # a NaN stays in its patch
    mask[0, 1] = True
    y = patch_embed(pixels, weight, mask=mask, mask_token=real(D), backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert y.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_range_of_a_checkpoint(backend: str, dtype: torch.dtype) -> None:
    # rows of one weight as small and as large as 16 bits hold: a common factor would not fit float16
    if backend == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    pixels = u8(2, 3, 16, 16)
    exponents = torch.linspace(-12, 6, D) if dtype == torch.float16 else torch.linspace(-60, 60, D)
    weight = (real(D, 3, 8, 8) * 2.0 ** exponents[:, None, None, None].to(DEVICE)).to(dtype)
    out = torch.float32
    got, exact = (
        patch_embed(pixels, w, dtype=kind, backend=name, **RGB)
        for w, kind, name in ((weight, out, backend), (weight.double(), torch.float64, "torch"))
    )
    scale = exact.abs().amax((0, 1))
    assert ((got - exact).abs().amax((0, 1)) / scale).max() < 2**-11


@pytest.mark.parametrize("backend", FUSED)
def test_equal_bitwise(backend: str) -> None:
    for case in ("everything", "mae") if backend in FAST else ("mae",):
        given = drawn(case)
        first, second = (tokens(given, backend) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("backend", [n for n in FUSED if n in ("chunked", "torch")])
@pytest.mark.parametrize("case", ["beit", "kept twice", "imagebind audio", "padded float", "still nhwc", "video float"])
def test_gradcheck(case: str, backend: str) -> None:
    pixels, shape, options = CASES[case]()
    pixels, shape = pixels[:1, ..., :24, :], (3, *shape[1:])
    if case in ("beit", "kept twice"):
        pixels, shape = real(1, 2, 4, 6).double(), (3, 2, 2, 2)
    if case == "imagebind audio":
        pixels, shape, options["stride"] = real(1, 1, 5, 7).double(), (3, 1, 3, 3), 2
    if case in ("padded float", "still nhwc"):
        pixels, shape = real(1, 3, 5, 2).double(), (3, 2, *([2] * (len(shape) - 2)))
    if case == "video float":
        pixels, shape = real(1, 2, 2, 4, 4).double(), (3, 2, 2, 2, 2)
    if case == "still nhwc":
        pixels = real(1, 4, 4, 2).double()
    weight = real(*shape).double()
    options = {k: v for k, v in options.items() if k in ("stride", "padding", "layout")}
    position = real(patch_embed(pixels, weight, backend="torch", **options).shape[1], 3).double()

    def run(pixels: Tensor, weight: Tensor, scale: Tensor, prefix: Tensor, position: Tensor) -> Tensor:
        more = {"ids_keep": torch.tensor([[5, 1, 5]], device=DEVICE)} if case == "kept twice" else {}
        return patch_embed(
            pixels,
            weight,
            position=position,
            prefix=prefix,
            stem_norm=(scale, None, 1e-5),
            pre_norm=(scale, scale, 1e-5),
            backend=backend,
            **options,
            **more,
        )

    inputs = (pixels.double(), weight, 1 + real(3).double(), real(1, 3).double(), position)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize("backend", FUSED)
def test_the_gradient_of_a_masked_patch_stays_with_the_mask_token(backend: str) -> None:
    pixels, mask = u8(2, 3, 16, 24), masked(2, 6)
    inputs = {"weight": real(D, 3, 8, 8), **rows("bias", "mask_token")}
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = patch_embed(pixels, **inputs, mask=mask, backend=backend, **RGB)
    g = torch.randn_like(y)
    clean = torch.autograd.grad(y, leaves, g, retain_graph=True)
    weight, bias, token = torch.autograd.grad(y, leaves, torch.where(mask[:, :, None], torch.nan, g))
    assert torch.equal(weight, clean[0]) and torch.equal(bias, clean[1]) and token.isnan().all()


@pytest.mark.parametrize("backend", FUSED)
def test_only_what_is_asked_for(backend: str) -> None:
    pixels, shape, options = CASES["vit"]()
    position = options["position"].requires_grad_()
    y = patch_embed(pixels, real(*shape), backend=backend, **options)
    (g,) = torch.autograd.grad(y.sum(), position)
    torch.testing.assert_close(g, torch.full_like(position, 3.0))
    with torch.no_grad():
        assert not patch_embed(pixels, real(*shape), backend=backend, **options).requires_grad


@pytest.mark.parametrize("backend", FUSED)
def test_nothing_is_written_into_the_inputs(backend: str) -> None:
    # a position alone is what the products are added to, where it is in the accumulation dtype already
    pixels, weight, bias, position = u8(2, 3, 16, 24), real(D, 3, 8, 8), real(D), real(6, D)
    inputs = [pixels, weight.requires_grad_(), bias.requires_grad_(), position.requires_grad_()]
    before = [t.detach().clone() for t in inputs]
    y = patch_embed(pixels, weight, bias, position=position, backend=backend, **RGB)
    g = real(*y.shape)
    kept = g.clone()
    torch.autograd.grad(y, inputs[1:], g)
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True)) and torch.equal(g, kept)


class Copies(TorchDispatchMode):
    """The operations that give bytes which are not those of `pixels`."""

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.storage, self.found = pixels.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.uint8 and out.untyped_storage().data_ptr() != self.storage:
            self.found.append(func)
        return out


@pytest.mark.parametrize("backend", [n for n in FUSED if n in ("cpu", "chunked")])
def test_views_are_not_copied(backend: str) -> None:
    pixels = u8(2, 3, 64, 64)
    crop, channels_last = pixels[:, :, 5:37, 7:55], pixels.movedim(1, -1)[:, 3:35, :32]
    for view in (crop, crop.mT, pixels[:, :, ::2, 1::2], pixels[:1].expand(3, -1, -1, -1), channels_last):
        stem = stem_of(view, real(D, 3, 16, 16), layout="nhwc" if view is channels_last else "nchw", **RGB)
        out, passes = real(len(view), stem.shape[2], D), PATCH_EMBED.implementations[backend].passes
        with Copies(pixels) as copies:
            passes.forward_into(out, 0, stem)
            passes.backward_from(out, stem, ("weight",))
        assert not copies.found


@pytest.mark.parametrize("backend", FUSED)
def test_training_after_inference_mode(backend: str) -> None:
    # mean and std are copied to the device once, whatever the mode at that time
    pixels, weight = u8(1, 3, 8, 8), real(D, 3, 8, 8).requires_grad_()
    given = {"mean": tuple(torch.rand(3).tolist()), "std": 0.25, "backend": backend}
    with torch.inference_mode():
        patch_embed(pixels, weight, **given)
    assert torch.autograd.grad(patch_embed(pixels, weight, **given).sum(), weight)[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_in_a_cuda_graph(backend: str) -> None:
    pixels, shape, options = CASES["everything"]()
    weight = real(*shape)
    want = patch_embed(pixels, weight, backend=backend, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = patch_embed(pixels, weight, backend=backend, **options)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


# --- what else calls it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_into_a_larger_buffer(backend: str) -> None:
    pixels, shape, options = CASES["everything"]()
    stem = stem_of(pixels, real(*shape), **options)
    want = patch_embed(stem.pixels, stem.weight, backend="torch", **options)
    passes = PATCH_EMBED.implementations[backend].passes
    out = torch.full((3, 13, D), 7.0, device=DEVICE)
    passes.forward_into(out, 2, stem)
    torch.testing.assert_close(out[:, 2:10], want, rtol=1e-4, atol=1e-4)
    assert (out[:, :2] == 7).all() and (out[:, 10:] == 7).all()
    grad = real(3, 13, D)
    found = passes.backward_from(grad[:, 2:10], stem, ("weight", "prefix"))
    weight, prefix = stem.weight.requires_grad_(), stem.prefix.requires_grad_()
    want = torch.autograd.grad(
        patch_embed(pixels, weight, backend="torch", **options | {"prefix": prefix}), (weight, prefix), grad[:, 2:10]
    )
    torch.testing.assert_close((found["weight"], found["prefix"]), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    for case in ("everything", "mae"):
        pixels, shape, options = CASES[case]()
        leaves = tree_map(
            lambda t: t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t, options
        )
        weight = real(*shape).requires_grad_()
        opcheck(partial(patch_embed, pixels, weight, backend=backend, **leaves))


@pytest.mark.parametrize("backend", FAST[-1:])
def test_compile(backend: str) -> None:
    pixels, shape, options = CASES["everything"]()
    weight = real(*shape)

    def run(pixels: Tensor, weight: Tensor) -> Tensor:
        return patch_embed(pixels, weight, backend=backend, **options).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (run, compiled):
        leaf = weight.clone().requires_grad_()
        results.append(torch.autograd.grad(fn(pixels, leaf), leaf)[0])
    torch.testing.assert_close(*results)


def test_export() -> None:
    pixels, shape, options = CASES["vit"]()

    class Stem(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(real(*shape))

        def forward(self, pixels: Tensor) -> Tensor:
            return patch_embed(pixels, self.weight, backend=FAST[-1], **options)

    module = Stem()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (pixels,), dynamic_shapes=({0: batch},))
    more = torch.cat([pixels, pixels])
    torch.testing.assert_close(program.module()(more), module(more))


def test_autocast() -> None:
    pixels, weight, options = drawn("vit")
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = patch_embed(pixels, weight, **options)
    (grad,) = torch.autograd.grad(y.float().sum(), weight)
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32
    # as with a weight in 16 bits
    low = weight.detach().to(torch.bfloat16).requires_grad_()
    want = patch_embed(pixels, low, **options)
    assert torch.equal(y, want)
    assert torch.equal(grad.to(torch.bfloat16), torch.autograd.grad(want.float().sum(), low)[0])
    assert patch_embed(pixels, low, **options, dtype=torch.float32).dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [n for n in FUSED if not GPU])
def test_ids_out_of_range(backend: str) -> None:
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=f"ids_keep .* {bad}.*, expected 0 to 3"):
            patch_embed(u8(1, 3, 32, 32), real(D, 3, 16, 16), ids_keep=torch.tensor([[bad]]), backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixels": torch.zeros(1, 3, 33, 32)}, ValueError, "33 rows, expected a multiple of 16"),
        ({"pixels": torch.zeros(1, 3, 32, 8)}, ValueError, "8 columns, expected at least 16"),
        ({"pixels": torch.zeros(1, 4, 32, 32)}, ValueError, "4 channels, expected 3"),
        ({"pixels": torch.zeros(1, 3, 32, 32, dtype=torch.int32)}, TypeError, "pixels has dtype torch.int32"),
        ({"pixels": torch.zeros(3, 32, 32)}, ValueError, "pixels has shape .*, expected .B, C, H, W."),
        ({"layout": "hwc"}, ValueError, "layout is 'hwc'"),
        ({"padding": "same"}, ValueError, "padding is 'same'"),
        ({"stride": 0}, ValueError, "stride is 0, expected a positive integer"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean has shape .2,., expected .3."),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape .3,., expected .24."),
        ({"position": torch.zeros(5, D)}, ValueError, "position has shape .5, 24., expected .4, 24."),
        ({"prefix": torch.zeros(1, 1, D)}, ValueError, "prefix has shape"),
        ({"prefix_position": torch.zeros(1, D)}, ValueError, "prefix_position is given without prefix"),
        ({"pos_embed": torch.zeros(5, D)}, ValueError, "pos_embed has shape .5, 24., expected .4, 24."),
        ({"pos_embed": torch.zeros(4, D), "prefix": torch.zeros(1, D)}, ValueError, "pos_embed .* expected .5, 24."),
        ({"pos_embed": torch.zeros(4, D), "position": torch.zeros(4, D)}, ValueError, "pos_embed is given with"),
        ({"mask": torch.zeros(1, 4, dtype=torch.bool)}, ValueError, "mask and mask_token go together"),
        ({"mask": torch.zeros(1, 4), "mask_token": torch.zeros(D)}, TypeError, "mask has dtype"),
        ({"ids_keep": torch.zeros(1, 2)}, TypeError, "ids_keep has dtype torch.float32, expected torch.int64"),
        ({"ids_keep": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "ids_keep has shape .2, 2., expected .1, M."),
        ({"ids_keep": [[0]]}, TypeError, "ids_keep is list, expected a tensor"),
        ({"mask": [[True]], "mask_token": torch.zeros(D)}, TypeError, "mask is list, expected a tensor"),
        ({"prefix": [0.0]}, TypeError, "prefix is list, expected a tensor"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32, expected a floating-point dtype"),
        ({"stem_norm": torch.ones(D)}, TypeError, "stem_norm is Tensor, expected"),
        ({"backend": "nothing"}, ValueError, "backend is 'nothing'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    arguments = {"pixels": u8(1, 3, 32, 32), "weight": real(D, 3, 16, 16)} | change
    with pytest.raises(error, match=message):
        patch_embed(**arguments)


def test_explain() -> None:
    pixels, weight = u8(1, 3, 32, 32), real(D, 3, 16, 16)
    running = chosen(lambda: patch_embed(pixels, weight))
    assert f"-> {running}" in mmfuse.explain("patch_embed", pixels, weight)
    with pytest.raises(mmfuse.UnsupportedError, match="dtype is torch.float64"):
        patch_embed(pixels, weight.double(), backend="cpu")
