"""What the contrastive operators compute with: `stats`, `grad` and `sigmoid` of each implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from mmfuse.kernels._runtime import Deferred, Implementation
from mmfuse.kernels.contrastive import blocked


def tile(name: str, tiles: Any = blocked) -> Any:
    """The passes over a block of logits, of an implementation other than triton."""
    return tiles.TorchTile if name == "chunked" else tiles.compiled_tile(getattr(torch.ops, f"mmfuse_{name}"))


def over_tiles(module: Any, *functions: str, tiles: Any = blocked) -> dict[str, Any]:
    """Functions of a module that take a tile first, for the implementations that have one; `tiles` has these."""

    def passes(name: str) -> Any:
        return SimpleNamespace(**{f: partial(getattr(module, f), tile(name, tiles)) for f in functions})

    return {name: Deferred(partial(passes, name)) for name in ("cuda", "cpu", "chunked")}


_TILED = over_tiles(blocked, "stats", "grad", "sigmoid")
# in order of preference, by estimate and not measured: "cuda" writes its logits in float32 and reads them again, which
# takes as long as two to three products at D = 768
TEMPLATE = {
    "triton": Deferred("mmfuse.kernels.contrastive.kernel"),
    "cuda": _TILED["cuda"],
    "cpu": _TILED["cpu"],
    "chunked": _TILED["chunked"],
}


def of_template(
    function: Callable[..., Any], against: Mapping[str, Sequence[Any]] | None = None
) -> list[Implementation]:
    """Those over the template, with their reasons by name, and torch's: `function`."""
    fused = [
        Implementation(name, passes=passes, against=(against or {}).get(name, ())) for name, passes in TEMPLATE.items()
    ]
    return [*fused, Implementation("torch", function=function)]
