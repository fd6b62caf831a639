"""Tables from records, and from nothing else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mmfuse.bench.cases import Record

Fit = tuple[list[float], list[float], float, float]  # sizes, values, exponent, factor

_HEAD = """# Benchmarks

<!-- written by `mmfuse bench --from bench/results --report docs/benchmarks.md` -->

Every number on this page is generated from the records in `bench/results`, which hold the machine, the versions and the
commit of each. `mmfuse bench` measures on your machine in a minute.

- The result of each provider is checked before any is timed, and a wrong one gets no time. All providers of a size are
  then timed in turn: the median (p50), with p20 to p80.
- The first provider of a size is the baseline, to which the others are relative. `compile` is `torch.compile` of eager
  PyTorch. `mmfuse` is what a call runs, and the note says which implementation that was.
- "of GEMMs" is relative to the matrix products alone, or the other work that is named, timed in the same run.
- "of ceiling" is a share of the fastest matrix product (matmul) or copy that was measured on the machine.
- Memory is the peak above the inputs.
"""


def groups(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Records by (device, case, dtype, mode)."""
    found: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        found[tuple(record[k] for k in ("device", "case", "dtype", "mode"))].append(record)
    return dict(found)


def sizes(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Records by size, in the order measured."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[size(record)].append(record)
    yield from found.items()


def size(record: Record) -> str:
    return "x".join(map(str, record["shape"].values()))


def baseline(records: Iterable[Record]) -> Record:
    """The first provider that is there: the registry lists baselines first."""
    return next((r for r in records if r["status"] not in ("absent", "skipped")), {"provider": "baseline"})


def columns(records: Sequence[Record]) -> tuple[str, ...]:
    """The header of a group's table."""
    relative = f"of {baseline(records)['provider']}"
    speed = ("ms (p20 to p80)", relative, "of GEMMs", f"{_unit(records)[0]}FLOP/s", "GB/s", "of ceiling")
    return ("size", "provider", *speed, "memory", "note")


def _unit(records: Iterable[Record]) -> tuple[str, float]:
    """Prefix and factor in which this machine's FLOP/s read well."""
    fastest = max((r.get("ceiling_tflops", 0.0) for r in records), default=0.0)
    return ("G", 1e3) if fastest < 10 else ("T", 1.0)


def rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The table of one group, as text."""
    _, factor = _unit(records)
    for at, row in sizes(records):
        base = baseline(row)
        for record in row:
            if record["status"] not in ("absent", "skipped"):
                yield (at, *_cells(record, base, factor))


def _cells(record: Record, base: Record, factor: float) -> tuple[str, ...]:
    notes = list(record.get("flags", []))
    backend = record.get("options", {}).get("backend")
    if backend and f"-{backend}" not in record["provider"]:
        notes.insert(0, f"runs {backend}")
    if record["status"] != "ok":
        notes.insert(0, f"{record['status'].upper()}: {record['reason']}")
    if record["status"] != "ok":
        return (record["provider"], *[""] * 6, memory(record.get("memory")), "; ".join(notes))
    shares = {"matmul": record["tflops"] / record["ceiling_tflops"], "copy": record["gbps"] / record["ceiling_gbps"]}
    bound = max(shares, key=lambda k: shares[k])
    p50 = record["p50"]
    return (
        record["provider"],
        f"{number(p50)} ({number(record['p20'])} to {number(record['p80'])})",
        f"{p50 / base['p50']:.2f}x" if "p50" in base and record["role"] == "provider" else "",
        f"{p50 / record['anchor_ms']:.2f}x {record['anchor']}" if record.get("anchor") else "",
        number(factor * record["tflops"]),
        number(record["gbps"]),
        f"{shares[bound]:.0%} {bound}",
        memory(record.get("memory")),
        "; ".join(notes),
    )


def number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def memory(count: int | None) -> str:
    if count is None:
        return ""
    return f"{number(count / 2**30)} GiB" if count >= 2**30 else f"{number(count / 2**20)} MiB"


def left_out(records: Iterable[Record]) -> list[str]:
    """One line per reason for which something is not in the table."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in records:
        if r["status"] in ("absent", "skipped"):
            what = r["provider"] if r["status"] == "absent" else f"{r['case']} {size(r)}"
            reasons[r["status"], r["reason"]].append(what)
    return [f"{status}: {', '.join(dict.fromkeys(what))} ({why})" for (status, why), what in reasons.items()]


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(p, c) of the least-squares line log y = p log x + log c: y grows as c x^p."""
    p, log_c = np.polyfit(np.log(x), np.log(y), 1)
    return float(p), float(np.exp(log_c))


def varying(records: Sequence[Record]) -> list[str]:
    """The dimensions in which the records differ."""
    return [k for k in records[0]["shape"] if len({r["shape"][k] for r in records}) > 1]


def growth(records: Sequence[Record], field: str) -> dict[str, Fit]:
    """By provider, how `field` grows with the one dimension that varies; three sizes at least."""
    dims = varying(records)
    if len(dims) != 1:
        return {}
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in records:
        if r.get(field) and r["status"] == "ok":
            points[r["provider"]].append((r["shape"][dims[0]], r[field]))
    found: dict[str, Fit] = {}
    for provider, pairs in points.items():
        if len(pairs) >= 3:
            x, y = (list(v) for v in zip(*sorted(pairs), strict=True))
            found[provider] = (x, y, *exponent(x, y))
    return found


def growth_rows(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
    """(provider, exponent of time, exponent of memory)."""
    time, space = growth(records, "p50"), growth(records, "memory")
    for provider in time:
        yield provider, f"{time[provider][2]:.2f}", f"{space[provider][2]:.2f}" if provider in space else ""


def machine(record: Record) -> str:
    """One line: where and with what the numbers were measured."""
    versions = [f"{k} {record[k]}" for k in ("driver", "torch", "triton", "mmfuse") if record.get(k)]
    commit = f" ({record['commit']})" if record.get("commit") else ""
    return f"{record['device']}; {', '.join(versions)}{commit}; {record['time'][:10]}"


def ceiling(records: Iterable[Record]) -> str:
    r = next((r for r in records if "ceiling_tflops" in r), None)
    if r is None:
        return ""
    prefix, factor = _unit([r])
    flops, moved = number(factor * r["ceiling_tflops"]), number(r["ceiling_gbps"])
    return f"measured ceilings: {flops} {prefix}FLOP/s (matrix product), {moved} GB/s (copy)"


def title(key: tuple[str, ...]) -> str:
    _, case, dtype, mode = key
    return f"{case}, {dtype}, {mode}"


def markdown(records: Sequence[Record]) -> str:
    """Every table of the records, as Markdown."""
    lines: list[str] = []
    device = None
    for key, group in groups(records).items():
        if key[0] != device:
            device = key[0]
            lines += [f"### {machine(group[0])}", ""]
        lines += ["; ".join(filter(None, (f"**{title(key)}**", ceiling(group)))), "", *_tables(group)]
    return "\n".join(lines).strip() + "\n"


def page(records: Sequence[Record]) -> str:
    """The page of the documentation: a section for each device, case, dtype and mode."""
    lines = [_HEAD]
    for key, group in groups(records).items():
        runs = dict.fromkeys(machine(r) for r in group)
        facts = (*runs, f"sizes: {'x'.join(group[0]['shape'])}", ceiling(group))
        lines += [f"## {title(key)}", "", *(f"- {fact}" for fact in facts if fact), "", *_tables(group)]
    return "\n".join(lines).strip() + "\n"


def _tables(group: Sequence[Record]) -> Iterator[str]:
    if cells := list(rows(group)):
        yield from (*_table(columns(group), cells), "")
    if fits := list(growth_rows(group)):
        dim = varying(group)[0]
        yield from (*_table(("provider", f"time ~ {dim}^", f"memory ~ {dim}^"), fits), "")
    if left := left_out(group):
        yield from (*(f"- {line}" for line in left), "")


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(" --- " if h in ("size", "provider", "note") else " ---: " for h in header) + "|"
    for cells in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
