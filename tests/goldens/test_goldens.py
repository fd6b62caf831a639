from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from goldens import cases

ROOT = Path(os.environ.get("MMFUSE_GOLDENS") or cases.HERE / "data")


def _parameters() -> list:
    return [
        pytest.param(folder, dtype, id=f"{folder.parent.name}/{folder.name}-{str(dtype).removeprefix('torch.')}")
        for folder in cases.find(ROOT)
        for dtype in (torch.float64, torch.float32)
    ]


@pytest.mark.parametrize(("folder", "dtype"), _parameters())
def test_golden(folder: Path, dtype: torch.dtype, device: str) -> None:
    run = cases.adapter(folder.parent.name)
    if run is None:
        pytest.skip(f"no adapter for {folder.parent.name} yet")
    given, stored, notes = cases.load(folder, dtype, device)
    # a convolution in TF32 is no float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = run(given)
    different = cases.differences(got, stored, *cases.tolerance(dtype, notes))
    assert not different, "\n".join([f"{len(different)} of {len(stored)} results differ", *different])
