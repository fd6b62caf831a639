"""A plugin of pytest: the `cuda` implementation of every operator takes tensors of the CPU, in the emulator."""

from __future__ import annotations

import ctypes
import os
import random
from functools import partial

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest
import torch

from cuda_emulation.build import build
from mmfuse.kernels._runtime import library, reasons

LIBRARY = build()
EMULATOR = ctypes.CDLL(str(LIBRARY))
SEED = int(os.environ.get("MMFUSE_EMULATION_SEED", random.randrange(1 << 31)))

_load, _compiled = library.load, reasons._compiled


def load(part: str) -> str | None:
    return None if part == "cuda" else _load(part)


torch.ops.load_library(str(LIBRARY))
library.load = reasons.load = load  # type: ignore[assignment]
reasons._AGAINST["cuda"] = partial(_compiled, "cpu")


def pytest_report_header() -> str:
    return f"emulated GPU: MMFUSE_EMULATION_SEED={SEED}"


@pytest.fixture(autouse=True)
def _emulation(request: pytest.FixtureRequest) -> None:
    # a test's own, so that one alone does what it does among others
    EMULATOR.emulation_seed(SEED)
    EMULATOR.emulation_card(ctypes.c_size_t(232448), True)
    EMULATOR.emulation_fault(0)
