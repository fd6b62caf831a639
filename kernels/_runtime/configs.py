"""What was measured on a device: one table for each operator family and device.

    {
      "arch": 90,                                       a GPU's, or a CPU's "threads" and "vectors"
      "configs": {"stats/bfloat16/1024": {"BLOCK_M": 128, ..., "num_warps": 8, "num_stages": 3}},
      "least": {"clip_loss/cpu/float32": 147456, "select_head/chunked": null, "clip_loss/cpu/bfloat16/256": 67108864}
    }

`configs` are launch settings: a key names a kernel and what it was tuned for; sizes are rounded up to a power of two,
so that a new length never needs a new entry. Without an entry a kernel uses its defaults.

`least` says from which size on an implementation is taken (null: at none), by operator, implementation, kind (without
it: of every kind) and the fewest columns that it holds for. What these are, an operator declares as its `Size`; a kind
is a dtype as a rule. Without an entry an implementation is taken at any size.

Tables ship as `kernels/<family>/configs/<device>.json`. The user's own, of `mmfuse tune`, lie below another folder in
the same places; their entries come first. A CPU without a table takes that of another, with the same instructions if
there is one, and sizes in proportion to threads x bits: what a call costs beside its arithmetic is the same on both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmfuse.kernels._runtime.device import device_name, slug, vectors

SHIPPED = Path(__file__).resolve().parents[1]
_DTYPES = ("float16", "bfloat16", "float32", "float64")

_BITS = {
    "amx_bf16": 512,
    "avx512_bf16": 512,
    "avx512": 512,
    "avx512_bf16_2x256": 256,
    "avx512_2x256": 256,
    "avx2": 256,
    "default": 128,
}

Table = dict[str, Any]
Steps = tuple[tuple[int, int | None], ...]  # (columns, size from which on it is taken), from the most columns down

# the implementations of each operator that has a size
_declared: dict[str, list[str]] = {}

_F = TypeVar("_F", bound=Callable[..., Any])
_known: list[Any] = []


def until_forgotten(fn: _F) -> _F:
    """`functools.cache` of what depends on tables."""
    _known.append(cache(fn))
    return _known[-1]


def forget() -> None:
    """Tables are read anew."""
    for fn in _known:
        fn.cache_clear()


def declare(operator: str, implementations: list[str]) -> None:
    _declared[operator] = implementations


def tuned_folder() -> Path | None:
    """Where the user's own tables are; None with `MMFUSE_TUNED=""`: they are ignored."""
    given = os.environ.get("MMFUSE_TUNED")
    if given is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfuse" / "tuned"
    return Path(given) if given else None


def path_of(root: Path, family: str, device: torch.device) -> Path:
    return root / family / "configs" / f"{slug(device_name(device))}.json"


def key(*parts: str | int) -> str:
    """The key of a table, sizes at the next power of two: `key("stats", "bfloat16", 768)` is stats/bfloat16/1024."""
    return "/".join(p if isinstance(p, str) else str(1 << max(0, p - 1).bit_length()) for p in parts)


@until_forgotten
def tables(family: str) -> dict[str, Table]:
    """Every table shipped for a family, by device."""
    return {p.stem: read(p) for p in sorted(SHIPPED.glob(f"{family}/configs/*.json"))}


def tuned(family: str, device: torch.device, *parts: str | int) -> dict[str, int] | None:
    """The settings measured for this GPU, or None."""
    return in_force(family, "configs", device).get(key(*parts)) if device.type == "cuda" else None


def shipped(family: str) -> Iterator[tuple[list[str], dict[str, int], int]]:
    """The settings in the tables that ship: (parts of the key, settings, compute capability)."""
    for table in tables(family).values():
        for name, settings in table.get("configs", {}).items():
            yield name.split("/"), settings, table["arch"]


def unreached(steps: Steps, size: Any, columns: int) -> tuple[int, int | None] | None:
    """The step that a call does not reach; one of a dynamic size, which is not worth a graph for each side, does."""
    if isinstance(size, int):
        for step in steps:
            if columns >= step[0]:
                return step if step[1] is None or size < step[1] else None
    return None


@contextmanager
def trying(family: str, device: torch.device, key_: str, settings: dict[str, int] | None) -> Iterator[None]:
    """Launch settings in place of a table's; None: those there are."""
    entries = in_force(family, "configs", device)
    before = entries.get(key_)
    entries.update({} if settings is None else {key_: settings})
    try:
        yield
    finally:
        entries.pop(key_, None)
        entries.update({} if before is None else {key_: before})


@torch.compiler.assume_constant_result
def least(
    family: str, operator: str, implementation: str, device: torch.device, kind: str, alike: bool = False
) -> Steps:
    """From which size on an implementation is taken; empty: at any. If `alike`, the same on every machine."""
    return _least(family, operator, implementation, device, kind, alike)


@until_forgotten
def _least(family: str, operator: str, implementation: str, device: torch.device, kind: str, alike: bool) -> Steps:
    entries = {}
    if device.type in ("cpu", "cuda") and not alike:
        entries = in_force(family, "least", device)
    elif device.type == "cpu":
        cpus = [t for t in tables(family).values() if "threads" in t]
        entries = max(cpus, key=lambda t: _BITS[t["vectors"]], default=Table()).get("least", {})
    for name in (f"{operator}/{implementation}/{kind}", f"{operator}/{implementation}"):
        columns = {k: k[len(name) + 1 :] or "0" for k in entries if k == name or k.startswith(f"{name}/")}
        steps = [(int(n), entries[k]) for k, n in columns.items() if n.isdecimal()]
        if steps:
            return tuple(sorted(steps, reverse=True, key=lambda step: step[0]))
    return ()


@until_forgotten
def in_force(family: str, kind: str, device: torch.device) -> dict[str, Any]:
    """The entries of a kind for a device: the user's own before what ships, or in its place a model."""
    shipped = tables(family)
    table = shipped.get(slug(device_name(device)))
    if table is None and device.type == "cpu":
        table = _model(shipped)
    folder = tuned_folder()
    own = path_of(folder, family, device) if folder else None
    return (table or {}).get(kind, {}) | (read(own).get(kind, {}) if own and own.exists() else {})


def _model(shipped: Mapping[str, Table]) -> Table | None:
    """The table of the CPU with these vectors, or any, whose speed is nearest to this one's, in proportion."""
    here, kind = torch.get_num_threads(), vectors()
    cpus = {name: t for name, t in shipped.items() if "threads" in t}
    alike = {name: t for name, t in cpus.items() if t["vectors"] == kind}
    # what has products of bfloat16 takes after what has them
    alike = alike or {name: t for name, t in cpus.items() if ("bf16" in t["vectors"]) == ("bf16" in kind)} or cpus
    factors = {name: here * _BITS[kind] / (t["threads"] * _BITS[t["vectors"]]) for name, t in alike.items()}
    if not factors:
        return None
    name = min(factors, key=lambda n: abs(math.log(factors[n])))
    sizes = shipped[name].get("least", {})
    return {"least": {k: n and max(1, round(n * factors[name])) for k, n in sizes.items()}}


# --- the file -------------------------------------------------------------------------------------------------------


def read(path: Path) -> Table:
    """A table, checked.

    Raises:
        ValueError: it is none; the message names the file and the key.
    """
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds {type(table).__name__}, expected a table with {', '.join(_CHECKS)}")
    for name, value in table.items():
        if name not in _CHECKS:
            raise ValueError(f"{path}: {name!r} is not known, expected some of {', '.join(_CHECKS)}")
        if name not in ("configs", "least"):
            _CHECKS[name](path, name, value)
        elif not isinstance(value, dict):
            raise ValueError(f"{path}: {name!r} is {value!r}, expected entries by key")
        else:
            for key_, entry in value.items():
                _CHECKS[name](path, key_, entry)
    return table


def write(path: Path, table: Table) -> None:
    """A table as a file, one entry a line; there is never half of one."""
    parts = []
    for name, value in table.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f'  "{name}": {{\n{lines}\n  }}')
        else:
            parts.append(f'  "{name}": {json.dumps(value)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    half.replace(path)


def _number(path: Path, name: str, value: Any, none: str = "") -> None:
    if value is None and none:
        return
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: {name!r} is {value!r}, expected an integer >= 0{none}")


def _settings(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, dict) or not value or not all(type(v) is int and v > 0 for v in value.values()):
        raise ValueError(f"{path}: {name!r} is {value!r}, expected launch settings such as {{'num_warps': 8}}")


def _from_size(path: Path, name: str, value: Any) -> None:
    operator, *more = name.split("/")
    implementation, *more = more or [""]
    if more and more[0].partition("-")[0] in _DTYPES:
        del more[0]
    if operator not in _declared:
        what = f"{operator!r} is no operator that has a size"
    elif implementation not in _declared[operator]:
        what = f"{implementation!r} is none of its implementations {', '.join(_declared[operator])}"
    elif implementation == _declared[operator][-1]:
        what = f"{implementation!r} is the last of its implementations, which steps aside for none"
    elif len(more) > 1 or (more and not more[0].isdecimal()):
        what = f"{'/'.join(more)!r} is neither a kind ({', '.join(_DTYPES)}) nor a number of columns"
    else:
        return _number(path, name, value, " or null")
    raise ValueError(f"{path}: {name!r}: {what}, expected operator/implementation[/kind][/columns]")


def _vectors(path: Path, name: str, value: Any) -> None:
    if value not in _BITS:
        raise ValueError(f"{path}: {name!r} is {value!r}, expected one of {', '.join(_BITS)}")


_CHECKS = {"arch": _number, "threads": _number, "vectors": _vectors, "configs": _settings, "least": _from_size}
