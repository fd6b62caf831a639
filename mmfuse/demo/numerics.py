"""Every implementation that runs here, against eager and against float64."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING

from mmfuse.bench.verify import Row, verify
from mmfuse.demo.page import Page

if TYPE_CHECKING:
    from mmfuse.demo import Settings


def show(page: Page, settings: Settings) -> None:
    page.section("Parity")
    page.text(
        "The largest error of each result against float64, over four draws: of the implementation, of eager in the "
        "same dtype, and the one allowed (twice eager's and one unit in the last place). Of each operator, the result "
        "or gradient that comes nearest to what is allowed; folded below, all of them, as `mmfuse verify` prints them."
    )
    found = list(verify("clip_loss" if settings.quick else None, settings.device.type))
    nearest: dict[str, Row] = {}
    for row in sorted(found, key=lambda row: row.error / row.allowed):
        nearest[row.op] = row
    columns = ("operator", "case", "dtype", "backend", "result", "error", "eager's", "allowed")
    page.table(columns, [_cells(nearest[op]) for op in dict.fromkeys(row.op for row in found)], left=5)
    page.table(columns, map(_cells, found), left=5, folded=f"all {len(found)} results")
    page.claim(
        all(row.holds for row in found),
        f"all implementations: {len(found)} losses and gradients are as exact as eager's",
    )


def _cells(row: Row) -> list[str]:
    return [value if isinstance(value, str) else f"{value:.1e}" for value in astuple(row)]
