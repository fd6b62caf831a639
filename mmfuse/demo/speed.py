"""The losses against eager and torch.compile, at sizes that this machine does in a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmfuse.bench import plots, report, runner, store
from mmfuse.bench.cases import find
from mmfuse.demo.page import Page

if TYPE_CHECKING:
    from mmfuse.demo import Settings

_LESS = ("GB/s", "of ceiling")  # `mmfuse bench` prints them


def show(page: Page, settings: Settings) -> None:
    page.section("Benchmark")
    device, clip = settings.device, find("clip")
    if device.type == "cuda":
        dtype, sizes, providers = torch.bfloat16, clip.shapes["cuda"], clip.default(device, torch.bfloat16)
    else:
        dtype, sizes = torch.float32, [{"N": n, "D": 512} for n in (1024, 2048, 4096)]
        providers = ["open_clip", "compile", "mmfuse[store]", "mmfuse[recompute]"]
    if settings.quick:  # compiling takes longest
        sizes, providers = [{"N": 256, "D": 64}], ["open_clip", "mmfuse"]
    records = []
    with page.progress(len(sizes)) as tick:
        jobs = [(clip, size, providers) for size in sizes]
        for found in runner.run(jobs, device, dtype, "fwd+bwd", tick, budget=settings.of(90, 10)):
            records += store.stamped(found, device)
    page.text(
        f"CLIP's loss with its gradients. {report.machine(records[0])}; {report.ceiling(records)}. Each provider is "
        "checked before it is timed; gemm3 and gemm4 are the matrix products that nothing can do without."
    )
    cells = [report.columns(records), *report.rows(records)]
    shown = (column for column in zip(*cells, strict=True) if column[0] not in _LESS and any(column[1:]))
    header, *rows = zip(*shown, strict=True)
    page.table(header, rows, left=2)
    for line in report.left_out(records):
        page.pre(line)
    plots.draw(records, page.folder / "benchmark.png")
    page.figure("benchmark", "Time and peak memory relative to open_clip's loss, and their growth with the batch.")
    page.claim(runner.holds(records), "every loss that was timed is right, ours within what float64 allows")
