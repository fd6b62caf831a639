"""A directory of ONNX files: one file of weights for all of them, a manifest of everything, and no way out of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST, WEIGHTS, FORMAT = "manifest.json", "weights.bin", 1
_ALIGNED = 4096  # a weight begins a page, so that it can be mapped
_APART = 1024  # bytes; smaller ones stay in the graph


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` when all is well and else leaves no trace.

    An earlier export is replaced.
    """
    if directory.exists() and not (directory.is_dir() and ((directory / MANIFEST).is_file() or _is_empty(directory))):
        raise ValueError(f"directory is {str(directory)!r}, which exists and is no export")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as folder:
            new, old = Path(folder, "new"), Path(folder, "old")
            new.mkdir()
            yield new
            if directory.exists():
                os.replace(directory, old)
            os.replace(new, directory)
    except OSError as error:
        raise ValueError(f"directory is {str(directory)!r}, which cannot be written: {error}") from error


def _is_empty(directory: Path) -> bool:
    return next(directory.iterdir(), None) is None


def join_weights(graphs: Sequence[Path], weights: Path) -> None:
    """Move what `graphs` hold of weights to one file, where equal ones lie once."""
    import onnx_ir

    places: dict[bytes, int] = {}
    with weights.open("wb") as file:
        for path in graphs:
            model = onnx_ir.load(path)
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or (tensor.nbytes < _APART and not isinstance(tensor, onnx_ir.ExternalTensor)):
                    continue
                data = tensor.tobytes()
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    file.write(bytes(-file.tell() % _ALIGNED))
                    places[digest] = file.tell()
                    file.write(data)
                value.const_value = onnx_ir.ExternalTensor(
                    weights.name,
                    places[digest],
                    len(data),
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    name=tensor.name or "",
                    base_dir=weights.parent,
                )
            file.flush()
            onnx_ir.save(model, path)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # weights that were apart before


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())}
    text = json.dumps({"format": FORMAT, **entries, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory whose files are all there, whole and inside.

    Raises:
        ValueError: what is missing, damaged, of another format or elsewhere.
    """
    path = directory / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"directory is {str(directory)!r}, which has no readable {MANIFEST}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected an object")
    if entries.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {entries.get('format')!r}, expected {FORMAT}: export again, or read it with mmfuse "
            f"{entries.get('mmfuse')}, which wrote it"
        )
    for key in ("parts", "files", "settings"):
        if not isinstance(entries.get(key), dict):
            raise ValueError(f"{path} has {key} {entries.get(key)!r}, expected an object")
    for name, facts in entries["files"].items():
        _check(directory, name, facts)
    for part, name in entries["parts"].items():
        if name not in entries["files"]:
            raise ValueError(f"{path} has {name!r} as the file of {part}, which is none of its files")
    return entries


def _check(directory: Path, name: str, facts: Any) -> None:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{directory / MANIFEST} names the file {name!r}, expected one inside of the directory")
    path = directory / name
    if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
        raise ValueError(f"{directory / MANIFEST} has {facts!r} of {name}, expected its bytes and its sha256")
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != facts["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {facts['bytes']}")
    if _digest(path) != facts["sha256"]:
        raise ValueError(f"{path} is not what was exported: another sha256")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
