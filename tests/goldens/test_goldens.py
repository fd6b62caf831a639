from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from goldens import cases
from mmfuse import models

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


# what the official state has and nothing reads
UNUSED = {"text_embeddings.token_type_embeddings.weight", "text_embeddings.position_embeddings.weight"}


@pytest.mark.parametrize("folder", [f for f in cases.find(ROOT) if f.parent.name in ("vlmo", "beit3")], ids=str)
def test_weights_go_back(folder: Path) -> None:
    given, _, _ = cases.load(folder, torch.float32, "cpu")
    model = models.create(folder.parent.name, given.model_config)
    models.load_official(model, given.params)
    back = models.to_official(model)
    assert back.keys() == given.params.keys()
    assert {key for key, t in back.items() if not torch.equal(t, given.params[key])} <= UNUSED
