"""Plots of records: time and memory relative to the baseline, and their growth over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfuse.bench import report
from mmfuse.bench.cases import Record, is_ours

_OURS = ("#0b5fa5", "#2f9e8f", "#6a4fb3", "#3f8fd2", "#7fb069", "#1b3a57")
_OTHERS = ("#8c8c8c", "#d1873a", "#b5504c", "#a38560", "#c9a227", "#5e5e5e")
_ANCHOR = "#c9ccd1"
_MARKERS = "osD^vPX*"
_TITLE = {"fontsize": 10, "loc": "left"}


def draw(records: Sequence[Record], path: Path) -> None:
    """Write one PNG: a row of plots for each case, dtype and mode that has times.

    Raises:
        ValueError: no record has a time, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib ({error}): pip install 'mmfuse[bench]'") from None
    grouped = {k: [r for r in g if "p50" in r and r["status"] == "ok"] for k, g in report.groups(records).items()}
    grouped = {k: g for k, g in grouped.items() if g}
    if not grouped:
        raise ValueError("--plot has nothing to draw: no record has a time")
    fits = {k: {f: report.growth(g, f) for f in ("p50", "memory")} for k, g in grouped.items()}
    rows = [(k, part) for k in grouped for part in ("bars", "growth") if part == "bars" or fits[k]["p50"]]
    figure = Figure(figsize=(13, 4.2 * len(rows) + 0.5), layout="constrained")
    for (key, part), axes in zip(rows, figure.subplots(len(rows), 2, squeeze=False), strict=True):
        group, colors = grouped[key], _colors(grouped[key])
        for ax, field in zip(axes, ("p50", "memory"), strict=True):
            if part == "bars":
                _bars(ax, group, field, colors)
            else:
                _growth(ax, report.varying(group)[0], fits[key][field], field, colors)
        axes[0].set_title(f"{report.title(key)}: {axes[0].get_title('left')}", **_TITLE)
    figure.suptitle(report.machine(records[0]), fontsize=9, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _colors(group: list[Record]) -> dict[str, str]:
    names = list(dict.fromkeys(r["provider"] for r in group))
    anchors = {r["provider"] for r in group if r["role"] == "anchor"}
    ours = [n for n in names if is_ours(n)]
    others = [n for n in names if n not in ours and n not in anchors]
    return {
        **{n: _OURS[i % len(_OURS)] for i, n in enumerate(ours)},
        **{n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(others)},
        **dict.fromkeys(anchors, _ANCHOR),
    }


def _bars(ax: Any, group: list[Record], field: str, colors: dict[str, str]) -> None:
    """The largest size: horizontal bars relative to the baseline, labelled with the value itself."""
    *_, (at, records) = report.sizes(group)
    ax.set_title(f"{'time' if field == 'p50' else 'peak memory above the inputs'} at {at}", **_TITLE)
    shown = [r for r in records if r.get(field)]
    if not shown:
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    base = shown[0]  # as in the table: baselines come first
    for y, record in enumerate(shown):
        share = end = record[field] / base[field]
        ax.barh(y, share, color=colors[record["provider"]], height=0.7)
        value = report.memory(record[field])
        if field == "p50":
            value = f"{report.number(record[field])} ms"
            low, end = (record[p] / base["p50"] for p in ("p20", "p80"))
            ax.plot((low, end), (y, y), color="#222222", linewidth=1.2, marker="|", markersize=5)
        ax.annotate(f"{share:.2f}x  {value}", (end, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(shown)), [r["provider"] for r in shown], fontsize=9)
    ax.set_ylim(max(len(shown), 4) - 0.4, -0.6)
    ax.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    ax.set_xlim(0, 1.45 * max(r["p80" if field == "p50" else field] for r in shown) / base[field])
    ax.set_xlabel(f"relative to {base['provider']} (less is better)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _growth(ax: Any, dim: str, fits: dict[str, report.Fit], field: str, colors: dict[str, str]) -> None:
    """Log-log over sizes: points as measured, lines as fitted, exponents in the legend."""
    ax.set_title(f"growth of {'time, ms' if field == 'p50' else 'memory, MiB'}", **_TITLE)
    if not fits:
        ax.set_axis_off()
        return
    unit = 1 if field == "p50" else 2**20
    for i, (provider, (x, y, p, c)) in enumerate(fits.items()):
        marker = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5, "linestyle": "none"}
        ax.plot(x, [v / unit for v in y], color=colors[provider], label=f"{provider} ~ {dim}^{p:.2f}", **marker)
        ax.plot(x, [c * n**p / unit for n in x], color=colors[provider], linewidth=1.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sizes = max((x for x, *_ in fits.values()), key=len)
    ax.set_xticks(sizes, [f"{n:g}" for n in sizes], fontsize=8)
    ax.set_xlabel(dim)
    ax.grid(which="major", color="#e6e6e6", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left")
