"""`mmfuse bench aside`: small and awkward sizes, where an operator has to step aside for what one would otherwise run.

Every case of every suite at sizes below those that it is measured at, and every module that `accelerate()` replaces
beside itself as it was: pairwise in one run, forward and backward and forward alone, with 1 and 2 threads. A row holds
if ours takes at most 1.05 times eager's time, or 60 us of dispatch more than it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfuse.bench.cases import Shape, everything, label
from mmfuse.bench.row import Row, first_line
from mmfuse.fused import accelerate

OPTIONS = ("dtype", "cases", "json")
_RATIO, _DISPATCH = 1.05, 60e-6
_SECONDS = 0.3  # of timing per row
_LONG = 0.3  # seconds of one call, beyond which a size is not small

# sizes that no model has, beside the case's smallest and the one it is tested at
AWKWARD: dict[str, list[str]] = {
    "clip": ["8x16", "128x512", "333x77", "1024x64", "2048x512"],
    "siglip": ["8x16", "333x77", "2048x512"],
    "linear_cross_entropy": ["1x64x100", "256x256x32000"],
    "topk": ["512x512x256"],
    "nearest_code": ["1x64x8", "333x77x5", "1024x1024x64"],
    "patch_embed": ["1x224x16x768", "2x224x4x96", "8x32x4x192", "1x28x14x33"],
    "patch_embed_train": ["1x224x16x768", "2x224x4x96", "8x32x4x192"],
}

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # eager, ours


def run(args: argparse.Namespace) -> int:
    """Print the rows; 0 if every one holds."""
    dtypes = [getattr(torch, args.dtype)] if args.dtype else [torch.float32, torch.bfloat16]
    wanted = set(args.cases.split(",")) if args.cases else None
    late, before = 0, torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for dtype in dtypes:
                for name, pair in (*_operators(dtype, wanted), *_modules(dtype, wanted)):
                    eager, ours = _paired(*pair)
                    holds = ours <= max(_RATIO * eager, eager + _DISPATCH)
                    late += not holds
                    found: dict[str, Any] = {"row": name, "dtype": str(dtype)[6:], "threads": threads}
                    found |= {"eager_us": eager * 1e6, "ours_us": ours * 1e6, "holds": holds}
                    print(json.dumps(found) if args.json else _line(found), flush=True)
    finally:
        torch.set_num_threads(before)
    if not args.json:
        print(f"{late} rows above {_RATIO} of eager and {_DISPATCH * 1e6:.0f} us over it")
    return int(late > 0)


def _line(found: dict[str, Any]) -> str:
    eager, ours = found["eager_us"], found["ours_us"]
    row = f"{found['row']:52} {found['dtype']:9} {found['threads']} thread{'s' * (found['threads'] > 1):1}"
    return f"{row} {eager:10.0f} us {ours:10.0f} us {ours / eager:6.2f}x{'' if found['holds'] else '  above'}"


def _paired(eager: Callable[[], Any], ours: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call of each, the fifth least of many that were taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for fn in (eager, ours):
        fn()
    start = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - start < _SECONDS and len(times[0]) < 500):
        for fn, seconds in zip((eager, ours), times, strict=True):
            began = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - began)
    first, second = (float(np.percentile(t, 20)) for t in times)
    return first, second


# --- operators ------------------------------------------------------------------------------------------------------


def _operators(dtype: torch.dtype, wanted: set[str] | None) -> Iterator[tuple[str, Pair]]:
    device = torch.device("cpu")
    for case in everything():
        if wanted and case.name not in wanted:
            continue
        shapes: list[Shape] = [case.small, *map(case.shape, AWKWARD.get(case.name, [])), case.cpu[0]]
        for shape in shapes:
            for mode in case.modes:
                try:
                    row = Row(case, shape, device, dtype, mode)
                    baseline = case.definitions[0]
                    seconds = row.sample(baseline, 1)[0] / 1e3
                    row.call("mmfuse")
                except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:  # often it is the dtype
                    print(f"{case.name} {label(shape)} {mode} left out: {first_line(error)}", file=sys.stderr)
                    continue
                if seconds < _LONG:
                    yield f"{case.name} {label(shape)} {mode}", (row_call(row, baseline), row_call(row, "mmfuse"))


def row_call(row: Row, name: str) -> Callable[[], Any]:
    return lambda: row.call(name)


# --- modules that accelerate() replaces -----------------------------------------------------------------------------


def _modules(dtype: torch.dtype, wanted: set[str] | None) -> Iterator[tuple[str, Pair]]:
    for name, make in MODULES.items():
        if wanted and not any(name.startswith(w) for w in wanted):
            continue
        try:
            torch.manual_seed(0)
            module, inputs = make()
        except ImportError:
            continue
        module = module.to(dtype)
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        fused = copy.deepcopy(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not accelerate(fused).replaced:
                continue
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout is torch.channels_last:
                if inputs[0].dim() != 4:
                    continue
                module, fused = module.to(memory_format=layout), fused.to(memory_format=layout)
                inputs = [inputs[0].to(memory_format=layout), *inputs[1:]]
            note = ", channels last" * (layout is torch.channels_last)
            for mode in ("fwd", "fwd+bwd"):
                yield f"{name}{note} {mode}", (_step(module, inputs, mode), _step(fused, inputs, mode))


def _step(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return module(*inputs)

    @cache
    def upstream(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # of a plain sum, gradients behind a norm are 0 or denormal numbers, with which a CPU takes its time
        return torch.linspace(-1, 1, shape.numel(), dtype=dtype).view(shape)

    def training() -> None:
        out = module(*inputs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        out.backward(upstream(out.shape, out.dtype))

    return forward if mode == "fwd" else training


def _images(batch: int, size: int) -> list[Tensor]:
    return [torch.randn(batch, 3, size, size)]


def _timm(batch: int, size: int, patch: int, width: int, **options: Any) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, list[Tensor]]:
        from mmfuse._compat import allow_torchvision

        allow_torchvision()
        from timm.layers.patch_embed import PatchEmbed

        return PatchEmbed(size, patch, 3, width, **options), _images(batch, size)

    return make


def _transformers(kind: str, batch: int, size: int, patch: int, width: int) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, list[Tensor]]:
        import transformers

        options = {"hidden_size": width, "image_size": size, "patch_size": patch, "num_attention_heads": 2}
        config = getattr(transformers, f"{kind}Config")(**options, num_hidden_layers=1, intermediate_size=8)
        return getattr(transformers, f"{kind}Model")(config).embeddings, _images(batch, size)

    return make


def _quantizer(rows: int, **options: Any) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, list[Tensor]]:
        from vector_quantize_pytorch import VectorQuantize

        return VectorQuantize(**options), [torch.randn(1, rows, options["dim"], requires_grad=True)]

    return make


MODULES: dict[str, Callable[[], Any]] = {
    "timm 1 x 224 / 16": _timm(1, 224, 16, 768),
    "timm 2 x 224 / 4 with a norm": _timm(2, 224, 4, 96, norm_layer=nn.LayerNorm, flatten=False, output_fmt="NHWC"),
    "timm 8 x 32 / 4": _timm(8, 32, 4, 192),
    "timm 16 x 224 / 16": _timm(16, 224, 16, 768),
    "transformers CLIP 1 x 224 / 32": _transformers("CLIPVision", 1, 224, 32, 768),
    "transformers CLIP 8 x 32 / 4": _transformers("CLIPVision", 8, 32, 4, 192),
    "transformers SigLIP 1 x 224 / 16": _transformers("SiglipVision", 1, 224, 16, 768),
    "transformers ViT 1 x 224 / 16": _transformers("ViT", 1, 224, 16, 768),
    "VectorQuantize 64 x 16": _quantizer(64, dim=16, codebook_size=64),
    "VectorQuantize 1024 x 64": _quantizer(1024, dim=64, codebook_size=512),
    "VectorQuantize of 4 heads": _quantizer(
        256, dim=32, codebook_size=64, heads=4, codebook_dim=8, separate_codebook_per_head=True
    ),
}
