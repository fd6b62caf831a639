"""What the contrastive operators compute with: `stats`, `grad` and `sigmoid` of each implementation."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from mmfuse.kernels._runtime import Deferred
from mmfuse.kernels.contrastive import blocked


def tile(name: str, tiles: Any = blocked) -> Any:
    """The passes over a block of logits, of an implementation other than triton."""
    return tiles.TorchTile if name == "chunked" else tiles.compiled_tile(getattr(torch.ops, f"mmfuse_{name}"))


def over_tiles(module: Any, *functions: str, tiles: Any = blocked) -> dict[str, Any]:
    """Functions of a module that take a tile first, for the implementations that have one; `tiles` has these."""

    def passes(name: str) -> Any:
        return SimpleNamespace(**{f: partial(getattr(module, f), tile(name, tiles)) for f in functions})

    return {name: Deferred(partial(passes, name)) for name in ("cuda", "cpu", "chunked")}


TEMPLATE = over_tiles(blocked, "stats", "grad", "sigmoid") | {"triton": Deferred("mmfuse.kernels.contrastive.kernel")}
