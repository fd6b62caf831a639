"""Records of measurements: JSON lines, one folder per device, with everything that a number depends on."""

from __future__ import annotations

import functools
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mmfuse
from mmfuse.bench.cases import Record
from mmfuse.kernels._runtime.device import device_name, slug


@functools.cache
def environment(device: torch.device) -> Record:
    """What the numbers of this run depend on besides the code measured."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "mmfuse": mmfuse.__version__,
        "commit": commit(),
    }


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None


def commit() -> str | None:
    """The commit that this package runs from, marked `-dirty` when files differ from it; None when installed."""
    here = Path(__file__)
    if not _output("git", "-C", str(here.parent), "ls-files", here.name):
        return None
    return (
        _output("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12") or None
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stamped(records: Iterable[Record], device: torch.device) -> list[Record]:
    """The records with the time and the environment in which they were measured."""
    common = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(device)}
    return [{**common, **{k: _json(v) for k, v in record.items()}} for record in records]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(folder: Path, suite: str, records: Sequence[Record]) -> Path:
    """Add records to `<folder>/<device>/<suite>.jsonl`; returns that path."""
    path = folder / slug(records[0]["device"]) / f"{suite}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def read(path: Path) -> list[Record]:
    """The records of a file, or of every file below a folder; of each measurement the latest."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
    return latest(records)


def latest(records: Iterable[Record]) -> list[Record]:
    """One record per device, case, size, dtype, mode and provider: the last."""
    last: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (*(record.get(k) for k in ("device", "case", "dtype", "mode", "provider")), *record["shape"].values())
        last.pop(key, None)  # a repeated measurement moves to the end
        last[key] = record
    return list(last.values())
