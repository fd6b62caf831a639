"""`mmfuse explain`: which implementation an operator runs for given shapes, and why not the others."""

from __future__ import annotations

import argparse
import json

import torch

import mmfuse.fused.language  # noqa: F401  (registers its operator)
from mmfuse.kernels._runtime import operators
from mmfuse.kernels._runtime.operator import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="an operator; without it, all of them")
    parser.add_argument("--shape", default="1024x512", help="rows x features of the operands (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float16, bfloat16, float32 or float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype is {args.dtype!r}, expected float16, bfloat16, float32 or float64")
    try:
        shape = [int(n) for n in args.shape.split("x")]
    except ValueError:
        raise ValueError(f"--shape is {args.shape!r}, expected rows x features such as 1024x512") from None
    known = operators()
    if args.op is not None and args.op not in known:
        raise ValueError(f"op is {args.op!r}, expected one of {', '.join(sorted(known))}")
    features = torch.empty(shape, dtype=dtype, device=args.device)
    names = [args.op] if args.op else list(known)
    reasons = {name: known[name].explain(known[name].of_example(name, features)) for name in names}
    print(json.dumps(reasons, indent=1) if args.json else "\n".join(table(*each) for each in reasons.items()))
    return 0
