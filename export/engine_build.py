"""Build a TensorRT engine from an ONNX file: `python engine_build.py JOB.json`, with nothing but TensorRT installed.

A script of its own, run in its own process, which a fault of the builder may end, and copied into the bundles for
machines that have TensorRT. JOB.json holds paths relative to it:

    {"onnx": "model.onnx", "engine": "model.engine", "runtime": "tensorrt" | "tensorrt-rtx",
     "profiles": [{"batch": [1, 8, 32]}], "precision": [] | ["FP16", "BF16"], "strongly_typed": true, "tf32": false,
     "timing_cache": null | "timing.cache", "optimization_level": null | 0..5, "workspace": null | bytes,
     "plugins": null | "plugins/manifest.json", "plugin_libraries": ["libplugin.so"]}

`profiles`: least, usual and largest size of each named dimension of the inputs, a mapping for each profile.
The last line of the output is JSON: "ok", and what was built, or the "error", and if it is an argument's, a "misfit".
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

# runtime: (its module, the name of the module in wheels that lack the metapackage, its name in messages)
MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings", "TensorRT"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings", "TensorRT-RTX"),
}
SUPPORTED = {"tensorrt": (10, 11), "tensorrt-rtx": (1,)}


class Refused(Exception):
    """What the user can do something about."""


class Misfit(Refused):
    """An argument that does not fit the file."""


def load(runtime: str) -> Any:
    """TensorRT's module, of a version that this script knows."""
    name, bindings, title = MODULES[runtime]
    try:
        trt = importlib.import_module(bindings if runtime == "tensorrt-rtx" else name)
    except ImportError as error:
        raise Refused(f"{title} cannot be imported here: {error}") from error
    if int(trt.__version__.split(".")[0]) not in SUPPORTED[runtime]:
        known = " and ".join(f"{major}.x" for major in SUPPORTED[runtime])
        raise Refused(
            f"{title} is {trt.__version__}, expected {known}: engines are bound to a version, builds to an API"
        )
    return trt


def logger_of(trt: Any, said: list[str]) -> Any:
    """A logger that prints warnings and errors and keeps the errors and what it says of plugins."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR or "as a plugin" in message:
                said.append(message)
            if severity <= trt.ILogger.Severity.WARNING:
                print(message, file=sys.stderr)

    return Logger()


def shape_of(tensor: Any, sizes: dict[str, int], where: str) -> tuple[int, ...]:
    """The shape of an input with its named dimensions replaced."""
    shape = []
    for axis, size in enumerate(tensor.shape):
        name = tensor.get_dimension_name(axis)
        if size < 0 and name not in sizes:
            named = f"the dimension {name!r}" if name else "a dimension without a name"
            raise Misfit(f"input {tensor.name!r} has {named} at axis {axis}, of which {where} has no sizes")
        shape.append(size if size >= 0 else sizes[name])
    return tuple(shape)


def add_profiles(trt: Any, builder: Any, network: Any, config: Any, profiles: list[dict[str, list[int]]]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    free = {t.get_dimension_name(a) for t in inputs for a, size in enumerate(t.shape) if size < 0}
    for number, sizes in enumerate(profiles):
        unknown = sorted(set(sizes) - free)
        if unknown:
            raise Misfit(
                f"profiles[{number}] names {', '.join(unknown)}; the inputs' free dimensions are {sorted(free)}"
            )
    if free and not profiles:
        raise Misfit(f"profiles is empty, expected the sizes of {sorted(free)}")
    for number, sizes in enumerate(profiles if free else []):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = [
                shape_of(tensor, {name: three[i] for name, three in sizes.items()}, f"profiles[{number}]")
                for i in range(3)
            ]
            if -1 in tensor.shape:
                profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise Misfit(f"profiles[{number}] is {sizes}, which the builder does not take")


def title_of(trt: Any, job: dict[str, Any]) -> str:
    return f"{MODULES[job['runtime']][2]} {trt.__version__}"


def network_flags(trt: Any, job: dict[str, Any]) -> int:
    """Which flags exist depends on the version; from 11 on every network is strongly typed."""
    known, flags = trt.NetworkDefinitionCreationFlag, 0
    if job["strongly_typed"] and hasattr(known, "STRONGLY_TYPED"):
        flags |= 1 << int(known.STRONGLY_TYPED)
    if job["plugins"]:
        if not hasattr(known, "PREFER_AOT_PYTHON_PLUGINS"):
            raise Refused(f"{title_of(trt, job)} has no plugins that are compiled ahead of time, later versions do")
        flags |= 1 << int(known.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def set_flags(trt: Any, config: Any, job: dict[str, Any]) -> None:
    for name in job["precision"]:
        if not hasattr(trt.BuilderFlag, name):
            raise Refused(
                f"{title_of(trt, job)} is strongly typed only: export the model in that dtype instead of "
                f"the builder flag {name}"
            )
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not job["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job["optimization_level"] is not None:
        config.builder_optimization_level = job["optimization_level"]
    if job["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])


def build(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    trt = load(job["runtime"])
    rtx = job["runtime"] == "tensorrt-rtx"
    said: list[str] = []
    logger = logger_of(trt, said)
    registered: list[str] = []
    if rtx and (job["plugins"] or job["plugin_libraries"]):
        raise Refused("TensorRT-RTX runs no plugins: it builds the functions' bodies")
    if not rtx:
        trt.init_libnvinfer_plugins(logger, "")
        for library in job["plugin_libraries"]:
            if trt.get_plugin_registry().load_library(str(folder / library)) is None:
                raise Refused(f"plugin library {library} cannot be loaded: {' '.join(said)}")
        if job["plugins"]:
            # beside this script
            registered = importlib.import_module("engine_plugins").register(trt, folder / job["plugins"])
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, job))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / job["onnx"])):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise Refused("; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors))
    config = builder.create_builder_config()
    set_flags(trt, config, job)
    add_profiles(trt, builder, network, config, job["profiles"])
    cache_file = None if rtx or not job["timing_cache"] else folder / job["timing_cache"]
    if cache_file is not None:
        stored = cache_file.read_bytes() if cache_file.exists() else b""
        config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused(f"{title_of(trt, job)} built no engine: {' '.join(said) or 'it says nothing'}")
    (folder / job["engine"]).write_bytes(bytes(engine))
    if cache_file is not None:
        cache_file.write_bytes(bytes(config.get_timing_cache().serialize()))
    used = sorted({name for line in said for name in re.findall(r"Found registered plugin: (\w+)", line)})
    tensors = {
        kind: (getattr(network, f"get_{kind}"), getattr(network, f"num_{kind}s")) for kind in ("input", "output")
    }
    return {
        "runtime": title_of(trt, job),
        "layers": network.num_layers,
        "registered": registered,
        "plugins": used,
        "seconds": round(time.perf_counter() - start, 3),
        "bytes": (folder / job["engine"]).stat().st_size,
        **{
            f"{kind}s": {t.name: [t.dtype.name, list(t.shape)] for t in map(get, range(count))}
            for kind, (get, count) in tensors.items()
        },
    }


def main() -> int:
    path = Path(sys.argv[1]).resolve()
    try:
        result = {"ok": True, **build(json.loads(path.read_text()), path.parent)}
    except Refused as error:
        result = {"ok": False, "misfit": isinstance(error, Misfit), "error": str(error)}
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
