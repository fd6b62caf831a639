"""Every implementation that runs here, against eager and against float64."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from mmfuse.bench.verify import verify
from mmfuse.demo.page import Page

if TYPE_CHECKING:
    from mmfuse.demo import Settings


def show(page: Page, settings: Settings) -> None:
    page.section("Parity")
    page.text(
        "The largest error of each result against float64, over four draws: of the implementation, of eager in the "
        "same dtype, and the one allowed (twice eager's and one unit in the last place). Of each implementation's "
        "loss and gradients, the one that comes nearest to what is allowed is shown; `mmfuse verify` prints all."
    )
    found = list(verify("clip_loss" if settings.quick else None, settings.device.type))
    rows = []
    for key, group in groupby(found, key=lambda row: (row.op, row.case, row.dtype, row.backend)):
        worst = max(group, key=lambda row: row.error / row.allowed)
        rows.append((*key, worst.quantity, *(f"{v:.1e}" for v in (worst.error, worst.eager, worst.allowed))))
    page.table(("operator", "case", "dtype", "backend", "result", "error", "eager's", "allowed"), rows, left=5)
    page.claim(
        all(row.holds for row in found),
        f"all implementations: {len(found)} losses and gradients are as exact as eager's",
    )
