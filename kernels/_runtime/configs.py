"""Tuned launch settings: one table per operator family and GPU, `kernels/<family>/configs/<gpu>.json`.

    {"arch": 90, "configs": {"stats/bfloat16/1024": {"BLOCK_M": 128, ..., "num_warps": 8, "num_stages": 3}}}

A key names a kernel and what it was tuned for; sizes are rounded up to a power of two, so that a new length never
needs a new entry. Without an entry a kernel uses its defaults.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmfuse.kernels._runtime.device import gpu_name

_ROOT = Path(__file__).resolve().parents[1]


def key(*parts: str | int) -> str:
    """The key of a table, sizes at the next power of two: `key("stats", "bfloat16", 768)` is stats/bfloat16/1024."""
    return "/".join(p if isinstance(p, str) else str(1 << max(0, p - 1).bit_length()) for p in parts)


@cache
def tables(family: str) -> dict[str, dict[str, Any]]:
    """Every table shipped for a family, by GPU name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(_ROOT.glob(f"{family}/configs/*.json"))}


def tuned(family: str, device: torch.device, *parts: str | int) -> dict[str, int] | None:
    """The settings measured for this GPU, or None."""
    found = tables(family)
    if not found or device.type != "cuda":
        return None
    return found.get(gpu_name(device.index or 0), {}).get("configs", {}).get(key(*parts))
