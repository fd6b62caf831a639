"""`mmfuse export`: a model as an ONNX file, and what is done with such a file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mmfuse._compat import allow_torchvision
from mmfuse.export.aoti import export_aoti
from mmfuse.export.build_cli import add_engine_arguments, engine, said, sizes_of
from mmfuse.export.onnx import MODES, OPSETS, export_onnx
from mmfuse.export.served import DTYPES, SERVED, build, export_served, served, writes

# action: (module with add_arguments(parser) and run(args) -> exit code, one line of help); the module is imported when
# the action is chosen
ACTIONS = {
    "check": ("mmfuse.export.check_cli", "compare an exported file with PyTorch"),
    "systems": ("mmfuse.export.systems_cli", "export and check every reference system at a small size"),
    "run": ("mmfuse.export.run_cli", "run a file in onnxruntime or OpenVINO: time, and what ran on the CPU"),
    "build": ("mmfuse.export.build_cli", "build a TensorRT engine, or a bundle for a machine that has TensorRT"),
    "kernels": ("mmfuse.export.kernels_cli", "compile the kernels of a file as TensorRT plugins"),
    "ops": ("mmfuse.export.ops_cli", "the operators that leave as nodes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = "\n".join(f"  {name:10}{line}" for name, (_, line) in ACTIONS.items())
    parser.description = f"A model as an ONNX file, and what is done with such a file.\n\nactions:\n{lines}\n"
    parser.description += (
        f"\nmodels: {', '.join(SERVED)}, or file.py:factory, a function that returns (module, inputs)\n"
    )
    parser.description += "or (module, inputs, dynamic). Each has its own --help."
    parser.add_argument("what", metavar="ACTION|MODEL", help="an action or a model")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")


def run(args: argparse.Namespace) -> int:
    parser = argparse.ArgumentParser(prog=f"mmfuse export {args.what}")
    if args.what in ACTIONS:
        module, line = ACTIONS[args.what]
        parser.description = line[0].upper() + line[1:] + "."
        action: Any = import_module(module)
        action.add_arguments(parser)
        return action.run(parser.parse_args(args.rest))
    _export_arguments(parser, args.what)
    return _export(args.what, parser.parse_args(args.rest))


def _export_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.description = f"Write {what} to one ONNX file."
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--onnx", metavar="FILE", type=Path, help="the file to write")
    target.add_argument(
        "--generation", metavar="DIR", type=Path, help="in its place, a folder that says what the model's generate says"
    )
    parser.add_argument("--target", default="portable", help=f"{', '.join(OPSETS)} (default: %(default)s)")
    parser.add_argument("--mode", default="functions", help=f"{', '.join(MODES)} (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--engine", metavar="FILE", type=Path, help="also build an engine, as `mmfuse export build`")
    add_engine_arguments(parser)
    if ":" in what:
        parser.add_argument("--aoti", metavar="FILE", type=Path, help="also compile it for this processor, to .pt2")
        parser.add_argument(
            "--dynamic",
            action="append",
            default=[],
            metavar="INPUT:AXIS=NAME",
            help="a free dimension; may be repeated",
        )
        return
    parser.add_argument("--preset", help="a published size, e.g. vit-b-16 (`mmfuse models` lists them)")
    parser.add_argument("--config", metavar="JSON", help="in place of a preset, the constructor's arguments")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="official state dict: safetensors, .pt, or OpenAI's archive")
    source.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    source.add_argument("--no-weights", action="store_true", help="the graph alone: its weights are inputs")


def _export(what: str, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    if args.generation is not None:
        return _export_generation(what, args)
    options: dict[str, Any] = {"target": args.target, "mode": args.mode}
    remark = None
    with Console(stderr=True).status(f"exporting {what} to {args.onnx}"):
        if ":" in what:
            model, inputs, dynamic = made(what)
            model = model.to(DTYPES[args.dtype])
            dynamic = _axes(args.dynamic) or dynamic
            export_onnx(model, inputs, args.onnx, dynamic=dynamic, **options)
            if args.aoti is not None:
                export_aoti(model, inputs, args.aoti, dynamic=dynamic)
        else:
            config = _config(args)
            seed = None if args.weights else args.seed
            source = {"seed": seed, "weights": args.weights, "no_weights": args.no_weights}
            export_served(what, args.onnx, config, **source, dtype=args.dtype, **options)
        if args.engine is not None:
            remark = said(engine(args.onnx, args.engine, args.runtime, sizes_of(args.size), {}, {}))
    took, again = time.perf_counter() - start, f" --model {what}" if ":" in what else ""
    print(f"wrote {args.onnx} in {took:.0f} s; next: mmfuse export check {args.onnx}{again}")
    if remark is not None:
        print(remark)
    return 0


def _export_generation(what: str, args: argparse.Namespace) -> int:
    """Write the folder of `export_for_generation`."""
    from mmfuse.export.generation import export_for_generation

    start = time.perf_counter()
    for name, value, expected in (
        ("target", args.target, "portable"),
        ("mode", args.mode, "functions"),
        ("engine", args.engine, None),
    ):
        if value != expected:
            raise ValueError(f"{name} is {value!r}, expected {expected!r} with --generation")
    facts: dict[str, Any] = {}
    with Console(stderr=True).status(f"exporting {what} to {args.generation}"):
        if ":" in what:
            model, inputs, _ = made(what)
        else:
            config = _config(args)
            config = writes(what).tiny if config == "tiny" else served(what).configuration(config)
            model = build(what, config, seed=args.seed, weights=args.weights)
            size: Any = model.image_resolution
            inputs = {"image": torch.zeros(1, 3, size, size)}
            source = {"weights": args.weights} if args.weights else {"seed": args.seed}
            facts = {"model": what, "config": json.dumps(config), **source}
        export_for_generation(model.to(DTYPES[args.dtype]), inputs, args.generation, facts=facts)
    took, again = time.perf_counter() - start, f" --model {what}" if ":" in what else ""
    print(f"wrote {args.generation} in {took:.0f} s; next: mmfuse export check {args.generation}{again}, and then")
    print(f"mmfuse.export.load({str(args.generation)!r}).generate(...)")
    return 0


def _config(args: argparse.Namespace) -> Any:
    if not args.config and args.preset is None:
        raise ValueError("neither --preset nor --config is given, expected one of them")
    try:
        return json.loads(args.config) if args.config else args.preset
    except json.JSONDecodeError as error:
        raise ValueError(f"config is {args.config!r}, expected JSON: {error}") from error


def made(what: str) -> tuple[nn.Module, Any, Mapping[str, Mapping[int, str]]]:
    """What the factory of "file.py:factory" returns."""
    file, _, name = what.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ValueError(f"model is {what!r}, expected file.py:factory with a file that exists")
    allow_torchvision()  # which transformers, open_clip and timm import
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"model is {what!r}, but {file} has no function {name}")
    found = factory()
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise TypeError(
            f"{what} returned {type(found).__name__}, expected (module, inputs) or (module, inputs, dynamic)"
        )
    return found[0], found[1], found[2] if len(found) == 3 else {}


def _axes(given: list[str]) -> dict[str, dict[int, str]]:
    """{"image": {0: "batch"}} of ["image:0=batch"]."""
    found: dict[str, dict[int, str]] = {}
    for word in given:
        place, _, name = word.partition("=")
        tensor, _, axis = place.rpartition(":")
        if not tensor or not axis.isdigit() or not name:
            raise ValueError(f"dynamic is {word!r}, expected INPUT:AXIS=NAME, as in image:0=batch")
        found.setdefault(tensor, {})[int(axis)] = name
    return found
