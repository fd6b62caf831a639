"""`mmfuse export systems`: every reference system at a small size, exported and compared with PyTorch."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from mmfuse.export.check import check_onnx
from mmfuse.export.engine_check import ALLOWED, relative
from mmfuse.export.runtimes import RUNTIMES
from mmfuse.export.served import SERVED, Served, build, export_served, served

_PACKAGES = "torch", "onnx", "onnxruntime", "openvino", "tensorrt-rtx-cu13-bindings", "transformers"
_PAGE = """# Exported systems

<!-- written by `mmfuse export systems` -->

What `mmfuse export systems` did with each part of a reference system at a small size, with free sizes ({packages}).

| column | |
|---|---|
| ONNX | the file passes `mmfuse export check`; where it does not, the reason |
| onnxruntime | the largest difference from PyTorch, relative to the largest number of an output |
| OpenVINO | its outputs are onnxruntime's |
| TensorRT-RTX | it builds an engine, which did not run |
| TensorRT | not run: it needs a GPU |
| AOTInductor | the compiled library's outputs are PyTorch's |
| generation | [the directory](generation.md) says the words of `generate` |

An empty cell was not run; "-" is a part that writes no words.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="MODEL", help="by default all")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the table as Markdown, and beside it as JSON, to which later runs of other models add",
    )
    parser.add_argument(
        "--also", action="append", default=[], choices=[*RUNTIMES, *OF_MODELS], help="what else; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    names = [served(name).name for name in args.names] or list(SERVED)
    packages, known = _packages(), _read(args.out)
    known = known if known.get("packages") == packages else {"packages": packages, "rows": {}}
    rows = {}
    for name, row in zip(names, rows_of(track(names, transient=True), args.also), strict=True):
        before = known["rows"].get(name, {})
        # what was run of a graph of other nodes says nothing of this one
        rows[name] = known["rows"][name] = (before if before.get("ours") == row.get("ours") else {}) | row
        if args.out is not None:
            args.out.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")
            args.out.write_text(page(known))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0 if all(row["ok"] for row in rows.values()) else 1


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read(out: Path | None) -> dict[str, Any]:
    return json.loads(out.with_suffix(".json").read_text()) if out and out.with_suffix(".json").exists() else {}


def rows_of(names: Iterable[str], also: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """For each part: whether it left and holds, and the largest relative difference of onnxruntime from PyTorch.

    `also`: other runtimes, as of `check_onnx`, "aoti" and "generation"; the row has "yes" or "no" and the reason.
    """
    for name in names:
        start = time.perf_counter()
        row: dict[str, Any] = {"ok": False, "why": ""}
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = export_served(name, Path(folder, "model.onnx"), "tiny")
                report = check_onnx(path, also=[name for name in also if name in RUNTIMES])
            except (NotImplementedError, ValueError, TypeError) as error:
                row["why"] = str(error)
            else:
                failed = [f"{c['name']}: {c['detail']}" for c in report["checks"] if not c["ok"]]
                failed += [f"{o['name']} differs" for o in report["outputs"] if not o["ok"]]
                differences = (o["difference"] / max(o["scale"], 1e-12) for o in report["outputs"])
                row |= {"ok": report["ok"], "why": "; ".join(failed), "difference": max(differences, default=0.0)}
                row |= {"ours": report["ours"]}
                row |= {
                    c["name"]: "yes" if c["ok"] else f"no: {c['detail']}" for c in report["checks"] if c["name"] in also
                }
            for what in also:
                if what in OF_MODELS:
                    row[what] = _attempt(OF_MODELS[what], served(name), Path(folder))
                    row["ok"] &= not row[what].startswith("no")
        yield row | {"seconds": time.perf_counter() - start}


def _attempt(what: Callable[[Served, Path], str], part: Served, folder: Path) -> str:
    try:
        return what(part, folder)
    except (NotImplementedError, ValueError, TypeError) as error:
        return f"no: {error}"


# what takes least time to compile
_QUICK = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


def _aoti(part: Served, folder: Path) -> str:
    """The library that AOTInductor compiles computes what PyTorch does, at each size that is not empty."""
    from mmfuse.export.aoti import export_aoti

    model = build(part.name, part.tiny).eval()
    module = part.module(model)
    file = export_aoti(module, part.inputs(model), folder / "model.pt2", dynamic=part.dynamic, options=_QUICK)
    compiled = torch._inductor.aoti_load_package(str(file))
    for sizes in part.sizes:
        if 0 in sizes.values():
            continue
        given = part.inputs(model, sizes)
        with torch.no_grad():
            expected = module(**given)
        for name, got, of in zip(part.outputs, _all(compiled(*given.values())), _all(expected), strict=True):
            if not (difference := relative(got.numpy(), of.numpy())) <= ALLOWED["float32"]:
                raise ValueError(f"{name} differs by {difference:.1e}")
    return "yes"


def _all(found: Any) -> Sequence[torch.Tensor]:
    return (found,) if isinstance(found, torch.Tensor) else found


def _generation(part: Served, folder: Path) -> str:
    """The directory says the words of the model's own `generate`."""
    if part.writes is None:
        return "-"
    from mmfuse.export.generation import export_for_generation, load

    model: Any = build(part.name, part.writes.tiny).eval()
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():  # each prompt then has words of its own
        p.data.add_(torch.randn(p.shape, generator=draw), alpha=0.2)
    given = part.writes.samples(model, {"batch": 16, "length": 5}, draw)
    words = load(export_for_generation(model, given, folder / "words")).generate(**given, **part.writes.options)
    expected = model.generate(**given, **part.writes.options)
    if not torch.equal(words, expected):
        raise ValueError("other words")
    return f"{len(words)} prompts, {len(set(map(tuple, words.tolist())))} answers"


OF_MODELS: dict[str, Callable[[Served, Path], str]] = {"aoti": _aoti, "generation": _generation}


def page(known: Mapping[str, Any]) -> str:
    """The table with what it means, in the order of the parts."""
    packages = ", ".join(f"{name} {v}" for name, v in known["packages"].items())
    rows = {name: known["rows"][name] for name in SERVED if name in known["rows"]}
    return _PAGE.format(packages=packages) + table(rows)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each part."""
    head = ["model", "ONNX", "onnxruntime", "OpenVINO", "TensorRT-RTX", "TensorRT", "AOTInductor", "generation"]
    lines = [f"| {' | '.join([*head, 'nodes of ours'])} |", "|---" * (len(head) + 1) + "|"]
    for name, row in rows.items():
        ours = ", ".join(f"{node} x {n}" if n > 1 else node for node, n in sorted(row.get("ours", {}).items()))
        cells = [f"`{name}`", f"no: {row['why']}" if row["why"] else "yes"]
        cells += [f"{row['difference']:.0e}" if "difference" in row else ""]
        cells += [row.get(column, "") for column in ("openvino", "tensorrt-rtx")] + ["not run"]
        cells += [row.get(column, "") for column in OF_MODELS] + [ours or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
