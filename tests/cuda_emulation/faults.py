"""What one gets wrong in CUDA, planted into the sources one at a time: the emulator finds each, and nothing without."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cuda_emulation.build import build
from cuda_emulation.plugin import SEED

ORDER, BOUNDS = "(with no barrier between|no thread has written)", "outside of every (tensor|array)"
EITHER = f"({ORDER}|{BOUNDS})"  # behind a tensor may lie another, which other threads write
ALIGNED, ALL_THREADS = "no multiple of it", "not all (threads|lanes)"


class Fault(NamedTuple):
    """`new` in place of `old`, in which FAULT is true while the fault is there, and how a call of `operator` fails."""

    source: str
    operator: str
    old: str
    new: str
    found: str


FAULTS = {
    "stats: no barrier": Fault(
        "contrastive.cu", "logit_stats", "__syncthreads();", "if (!FAULT) __syncthreads();", ORDER
    ),
    "stats: one buffer": Fault("contrastive.cu", "logit_stats", "buffer ^= 1)", "buffer ^= !FAULT)", ORDER),
    "stats: vectors off their alignment": Fault(
        "contrastive.cu", "logit_stats", "aligned(logits, n * 4) &&", "(FAULT || aligned(logits, n * 4)) &&", ALIGNED
    ),
    "grad: no end of a row": Fault(
        "contrastive.cu", "logit_grad", "if (col < left) *", "if (FAULT || col < left) *", EITHER
    ),
    "grad: no last row": Fault(
        "contrastive.cu", "sigmoid_grad", "min(top + ROWS_PER_WARP, c)",
        "(FAULT ? top + ROWS_PER_WARP : min(top + ROWS_PER_WARP, c))", EITHER,
    ),
    "sums: no last thread": Fault(
        "contrastive.cu", "sigmoid_grad", "if (i >= c) return;", "if (!FAULT && i >= c) return;", EITHER
    ),
    "few queries: no barrier before scores": Fault(
        "few_query_attention.cu", "few_query_attention", "__syncthreads();  // keys",
        "if (!FAULT) __syncthreads();  // keys", ORDER,
    ),
    "few queries: no barrier before probabilities": Fault(
        "few_query_attention.cu", "few_query_attention", "__syncthreads();  // values",
        "if (!FAULT) __syncthreads();  // values", ORDER,
    ),
    "few queries: no barrier before the end": Fault(
        "few_query_attention.cu", "few_query_attention", "__syncthreads();  // the sums",
        "if (!FAULT) __syncthreads();  // the sums", ORDER,
    ),
    "few queries: keys are not waited for": Fault(
        "few_query_attention.cu", "few_query_attention", "__pipeline_wait_prior(1)", "__pipeline_wait_prior(1 + FAULT)",
        ORDER,
    ),
    "few queries: values are not waited for": Fault(
        "few_query_attention.cu", "few_query_attention", "__pipeline_wait_prior(0)", "__pipeline_wait_prior(FAULT)",
        ORDER,
    ),
    "few queries: too little shared memory": Fault(
        "few_query_attention.cu", "few_query_attention", "c.splits, bytes,", "c.splits, bytes - 16 * FAULT,", BOUNDS
    ),
    "few queries: no last key": Fault(
        "few_query_attention.cu", "few_query_attention", "real = row < n &&", "real = (FAULT || row < n) &&", EITHER
    ),
    "few queries: no last query": Fault(
        "few_query_attention.cu", "few_query_attention", "if (query >= all) continue;",
        "if (!FAULT && query >= all) continue;", EITHER,
    ),
    "few queries: no last feature": Fault(
        "few_query_attention.cu", "few_query_attention", "if (feature < d) queries",
        "if (FAULT || feature < d) queries", EITHER,
    ),
    "block_sum: no barrier before": Fault(
        "head.cu", "head_normalized", "__syncthreads();  // the parts", "if (!FAULT) __syncthreads();  // the parts",
        ORDER,
    ),
    "block_sum: no barrier after": Fault(
        "head.cu", "head_unit_grad", "__syncthreads();\n    float2 sum", "if (!FAULT) __syncthreads();\n    float2 sum",
        ORDER,
    ),
    "unit: no barrier": Fault(
        "head.cu", "head_unit", "__syncthreads();\n    const float factor",
        "if (!FAULT) __syncthreads();\n    const float factor", ORDER,
    ),
    "unit: too little shared memory": Fault(
        "head.cu", "head_unit", "clips * sizeof(float), ", "(clips - FAULT) * sizeof(float), ", BOUNDS
    ),
    "norm_grad: some threads leave": Fault(
        "head.cu", "head_norm_grad", "if (token < 0) return;", "if (token < 0 || (FAULT && threadIdx.x > 96)) return;",
        ALL_THREADS,
    ),
    "patches: vectors off their alignment": Fault(
        "patch.cu", "patch_rows", "k == kp && vectors(s, pixels) ?", "FAULT || (k == kp && vectors(s, pixels)) ?",
        ALIGNED,
    ),
    "patches: no last row": Fault("patch.cu", "patch_rows", "if (row >= m ||", "if ((!FAULT && row >= m) ||", EITHER),
    "patches: no edge of the image": Fault(
        "patch.cu", "patch_rows", "if (inside) value", "if (FAULT || inside) value", EITHER
    ),
    "farthest: no barrier": Fault(
        "points.cu", "farthest_points", "__syncthreads();\n        const int2 each",
        "if (!FAULT) __syncthreads();\n        const int2 each", ORDER,
    ),
    "farthest: one buffer": Fault("points.cu", "farthest_points", "buffer ^= 1)", "buffer ^= !FAULT)", ORDER),
    "farthest: too little shared memory": Fault(
        "points.cu", "farthest_points of many", "constexpr int bytes = SHARED ? 2",
        "const int bytes = SHARED ? (2 - FAULT)", BOUNDS,
    ),
    "farthest: every thread writes": Fault(
        "points.cu", "farthest_points", "if (threadIdx.x == 0) out", "if (FAULT || threadIdx.x == 0) out", ORDER
    ),
    "neighbours: no barrier before": Fault(
        "points.cu", "nearest_neighbors", "n - begin);\n        __syncthreads();",
        "n - begin);\n        if (!FAULT) __syncthreads();", ORDER,
    ),
    "neighbours: no barrier after": Fault(
        "points.cu", "nearest_neighbors", "__syncthreads();\n        for (int first",
        "if (!FAULT) __syncthreads();\n        for (int first", ORDER,
    ),
    "neighbours: no last point": Fault(
        "points.cu", "nearest_neighbors of few", "bool inside = j < count", "bool inside = FAULT || j < count", ORDER
    ),
    "ball: some warps leave": Fault(
        "points.cu", "ball_query", "const bool real = row < g;",
        "const bool real = row < g;\n    if (FAULT && !real) return;", ALL_THREADS,
    ),
    "route: no barrier before totals": Fault(
        "routing.cu", "route", "__syncthreads();  // counts", "if (!FAULT) __syncthreads();  // counts", ORDER
    ),
    "route: no barrier behind totals": Fault(
        "routing.cu", "route", "__syncthreads();  // totals", "if (!FAULT) __syncthreads();  // totals", ORDER
    ),
    "route: no last row": Fault(
        "routing.cu", "route", "end = begin + share < rows ?", "end = FAULT || begin + share < rows ?", EITHER
    ),
    "route: too many experts": Fault(
        "routing.cu", "route", "id < experts ?", "id < experts + 100 * FAULT ?", EITHER
    ),
    "route: some lanes leave": Fault(
        "routing.cu", "route", "if (warp < experts) {", "if (warp < experts && !(FAULT && lane > 7)) {", ALL_THREADS
    ),
    "groups: no last point": Fault(
        "points.cu", "group_grad", "if (i >= points) return;", "if (!FAULT && i >= points) return;", EITHER
    ),
}  # fmt: skip


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def pixels(*kernel_and_step: int, columns: int, size: int = 23) -> list[Any]:
    """3 images of 3 channels, with 2 x 2 patches."""
    images, none, index = ints(3, 3, 1, size, size, dtype=torch.uint8), torch.empty(0), ints(0)
    return [images, index, index, index, none, False, 1, *kernel_and_step, 1, 2, 2, 4, torch.empty(12, columns)]


F = torch.rand
# sizes that neither tiles nor vectors divide
CALLS: dict[str, Callable[[], list[Any]]] = {
    "logit_stats": lambda: [
        F(70, 517), F(()), 0, F(70), F(70), F(70), F(517), F(517), ints(70, 517, dtype=torch.int16),
    ],
    "logit_grad": lambda: [
        F(70, 301), F(()), F(70), F(70), F(301), F(301), F(70), 0.1, 0, F(0), F(70, 301), F(70),
    ],
    "sigmoid_grad": lambda: [F(70, 301), F(()), F(()), 0, False, F(70, 301), F(3, 70).double()],
    "few_query_attention": lambda: [
        *(F(2, n, 2, 40).half() for n in (19, 35, 35)), None, None, None, 35, F(2, 19, 2, 40).half(), F(2, 2, 19),
        F(2, 2, 19),
    ],
    "head_normalized": lambda: [F(3, 200), F(3, 200), F(3), F(3), F(3, 5, 200), ints(3), F(200), None, 1e-5],
    "head_unit": lambda: [F(2, 200), F(6), F(6, 200), F(()), True, 3],
    "head_unit_grad": lambda: [F(6, 200), F(6), F(2, 200), F(6, 200), F(6), None, True, 3],
    "head_norm_grad": lambda: [F(3, 5, 200), F(3, 200), F(3, 200), ints(3), F(200), F(3), F(3)],
    "patch_rows": lambda: pixels(13, 13, 1, 12, 12, columns=512),
    "farthest_points": lambda: [F(2, 3, 300), ints(2), ints(2, 9)],
    "farthest_points of many": lambda: [F(1, 3, 9000), ints(1), ints(1, 3)],
    "nearest_neighbors": lambda: [F(2, 3, 70), F(2, 3, 1100), ints(2, 70, 40)],
    "nearest_neighbors of few": lambda: [F(1, 3, 1), F(1, 3, 70), ints(1, 1, 5)],
    "ball_query": lambda: [F(2, 3, 70), F(2, 3, 1100), 0.3, ints(2, 70, 5)],
    "route": lambda: [ints(6), ints(700), ints(700), torch.arange(700) % 7, 5],  # two of them are out of range
    "group_grad": lambda: [F(60, 37), ints(60), ints(11), F(10, 37)],
}  # fmt: skip


def with_faults(sources: dict[str, str]) -> dict[str, str]:
    for number, fault in enumerate(FAULTS.values(), 1):
        text, name = sources[fault.source], f"(emulation::fault == {number})"
        assert text.count(fault.old) == 1, f"{fault.old!r} is {text.count(fault.old)} times in {fault.source}"
        sources[fault.source] = text.replace(fault.old, fault.new.replace("FAULT", name))
    return sources


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    library = build("mmfuse_faults", with_faults)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def call(emulator: ctypes.CDLL, operator: str, fault: int = 0) -> None:
    emulator.emulation_seed(SEED)
    emulator.emulation_fault(fault)
    getattr(torch.ops.mmfuse_faults, operator.split()[0])(*CALLS[operator]())


def test_every_operator_is_called(emulator: ctypes.CDLL) -> None:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    assert {name for space, _, name in names if space == "mmfuse_faults"} == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("operator", CALLS)
def test_without_a_fault(emulator: ctypes.CDLL, operator: str) -> None:
    call(emulator, operator)


def failure_of(emulator: ctypes.CDLL, operator: str, fault: int) -> str:
    """The error of a call in a process of its own: what it writes outside of its tensors may be anybody's."""
    to_read, to_write = os.pipe()
    if not (child := os.fork()):
        try:
            call(emulator, operator, fault)
        except RuntimeError as error:
            os.write(to_write, str(error).encode())
        finally:
            os._exit(0)
    os.close(to_write)
    with os.fdopen(to_read) as message:
        found = message.read()
    os.waitpid(child, 0)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_found(emulator: ctypes.CDLL, fault: str) -> None:
    found = failure_of(emulator, FAULTS[fault].operator, 1 + list(FAULTS).index(fault))
    assert re.search(f"emulated GPU.*{FAULTS[fault].found}", found), found
