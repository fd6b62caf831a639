"""`mmfuse info`: what is here, and why what is not here is not. Paste its output into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import mmfuse
from mmfuse.kernels._runtime import configs, operators
from mmfuse.kernels._runtime.device import device_name, slug
from mmfuse.kernels._runtime.library import build_info, error_on, load

_PACKAGES = (
    "triton",
    "transformers",
    "open_clip_torch",
    "timm",
    "torchscale",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "xformers",
    "flash-attn",
)

# a plain `pip install .` builds without torch, and so makes the pure wheel
_HOW = "from a checkout, beside this torch: pip install --no-build-isolation .  (a C++ compiler; for CUDA nvcc as well)"
_HOW_ORT = f"MMFUSE_ORT_INCLUDE=FOLDER, of onnxruntime's C headers, and {_HOW}"


def gather() -> dict[str, Any]:
    """Versions, devices, compiled parts, operators and environment, as plain data."""
    gpus = [
        {
            "name": (p := torch.cuda.get_device_properties(i)).name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "versions": {
            "mmfuse": mmfuse.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "tables": _tables(),
        "compiled": {part: _compiled(part) for part in ("cpu", "cuda", "ort")},
        "operators": _operators(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("MMFUSE_", "TRITON_"))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tables() -> dict[str, Any]:
    """Of what was measured: where the user's own are, and which of them are for this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = configs.tuned_folder()
    own = sorted(map(str, folder.glob(f"*/configs/{slug(device_name(device))}.json"))) if folder else []
    return {"device": device_name(device), "folder": folder and str(folder), "tuned": own}


def _compiled(part: str) -> dict[str, Any]:
    reason = _ort_error() if part == "ort" else load(part)
    if part == "cuda" and reason is None:
        devices = map(torch.device, range(torch.cuda.device_count()))
        reason = next(filter(None, map(error_on, devices)), None)
    built = build_info().get("parts", {}).get(part, {})
    found = {"loaded": reason is None, "reason": reason, "built": built}
    return found if built.get("built") else found | {"how": _HOW_ORT if part == "ort" else _HOW}


def _ort_error() -> str | None:
    from mmfuse.export import ort_kernels

    return ort_kernels.error()


def _operators() -> dict[str, dict[str, list[str]]]:
    """Each implementation's reasons against ordinary arguments on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    features = torch.ones(1024, 512, dtype=dtype, device=device)
    return {name: op.explain(op.of_example(name, features)) for name, op in operators().items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    facts = gather()
    # a part that was built here but does not load is a broken installation
    broken = [p for p, c in facts["compiled"].items() if c["built"].get("built") and not c["loaded"]]
    wanted = {"cuda": facts["machine"]["gpus"], "ort": facts["versions"]["onnxruntime"]}
    broken = [p for p in broken if wanted.get(p, True)]
    if args.json:
        print(json.dumps(facts, indent=1))
        return 1 if broken else 0
    for title in ("versions", "machine", "environment", "tables"):
        print(title)
        for key, value in facts[title].items():
            print(f"  {key:16} {'absent' if value is None else value if value != [] else 'none'}")
    print("compiled parts")
    for part, c in facts["compiled"].items():
        print(f"  _C_{part:13} {'loaded' if c['loaded'] else c['reason']}")
        for key, value in c["built"].items():
            print(f"    {key:14} {value}")
        if "how" in c:
            print(f"    to build it    {c['how']}")
    print("operators (the first implementation without a reason against it runs)")
    for name, implementations in facts["operators"].items():
        print(f"  {name}")
        for impl, why in implementations.items():
            print(f"    {impl:14} {'; '.join(why) or 'available'}")
    for part in broken:
        print(f"broken: the compiled part _C_{part} was built and does not load; reinstall mmfuse")
    return 1 if broken else 0
