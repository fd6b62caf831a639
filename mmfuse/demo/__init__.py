"""`mmfuse demo`: everything once, on this machine, in one page."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmfuse._compat import allow_torchvision
from mmfuse.kernels._runtime import UnsupportedError, operators, use_backend

if TYPE_CHECKING:
    from mmfuse.demo.page import Page

_NEEDED = (
    "PIL",
    "matplotlib",
    "sklearn",
    "skimage",
    "transformers",
    "open_clip",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
)


@dataclass(frozen=True)
class Settings:
    """How much of it: `--quick` shows that every part runs, and trains too little for the claims about accuracy."""

    device: torch.device
    quick: bool

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("mmfuse-demo"), metavar="DIR", help="default: %(default)s")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; accuracy is not judged")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    _require(*_NEEDED)
    from mmfuse.demo import captions, export, numerics, speed, stems, swap, training
    from mmfuse.demo.page import Page

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {str(args.out)!r}, where no folder can be made: {error}") from error
    settings = Settings(torch.device(args.device), args.quick)
    page = Page(args.out)
    _environment(page)
    with use_backend(_fused(settings.device, "clip_loss", "patch_embed")):
        swap.show(page, settings)
    with use_backend(_fused(settings.device, "clip_loss", "patch_embed", "embed_text", "select_head")):
        trained = training.show(page, settings)
    captions.show(page, settings)
    stems.show(page, settings)
    numerics.show(page, settings)
    speed.show(page, settings)
    export.show(page, trained)
    print(page.write(time.perf_counter() - start))
    return 0 if page.holds else 1


def _require(*packages: str) -> None:
    allow_torchvision()
    for package in packages:
        try:
            import_module(package)
        except Exception as error:  # a package built for another torch can raise anything
            beside = package == "open_clip"  # it would bring torchvision, which pins torch
            how = "--no-deps torchvision timm open_clip_torch" if beside else "'mmfuse[demo]'"
            raise UnsupportedError(f"{package} cannot be imported ({error}): pip install {how}") from error


def _fused(device: torch.device, *names: str) -> str:
    """The implementation to name for small batches, which step aside for eager: the first that all operators have."""
    x = torch.empty(1, 1, device=device)
    found = [op.available(op.of_example(name, x)) for name, op in operators().items() if name in names]
    return next(backend for backend in found[0] if all(backend in others for others in found))


def _environment(page: Page) -> None:
    from mmfuse.info import gather

    page.section("Environment")
    facts = gather()
    machine, gpus = facts["machine"], facts["machine"]["gpus"]
    page.table(
        ("what", "here"),
        [
            ("platform", machine["platform"]),
            ("cores, threads", f"{machine['cores']}, {machine['threads']}"),
            ("GPU", ", ".join(f"{g['name']} ({g['memory_gib']} GiB)" for g in gpus) or "none"),
            ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)),
            *((f"compiled part, {part}", c["reason"] or "loaded") for part, c in facts["compiled"].items()),
            *(
                (f"{op} runs as", next(i for i, why in impls.items() if not why))
                for op, impls in facts["operators"].items()
            ),
        ],
        left=2,
    )
