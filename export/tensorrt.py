"""ONNX files to engines of TensorRT 10 and 11 and of TensorRT-RTX, and to bundles for machines that have them.

Three things are told apart everywhere: an engine built from the plain graph (every function of ours by its standard
body), plugins built and loaded in a registry, and an engine that ran. TensorRT-RTX builds on a CPU and takes no
plugins; nothing here runs an engine without a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.export import engine_build, engine_check, engine_plugins
from mmfuse.export.engine_build import MODULES
from mmfuse.export.require import require
from mmfuse.export.run import draw, open_session
from mmfuse.kernels._runtime import UnsupportedError

Runtime = Literal["tensorrt", "tensorrt-rtx"]
# least, usual and largest size of each named dimension
Profile = Mapping[str, tuple[int, int, int]]

CONTAINER = "nvcr.io/nvidia/tensorrt:25.10-py3"  # TensorRT 10.13; its Python plugins are compiled ahead of time
_INSTALL = {"tensorrt": "pip install 'mmfuse[tensorrt]'", "tensorrt-rtx": "pip install 'mmfuse[rtx]'"}
_PRECISION = {"float32": [], "float16": ["FP16"], "bfloat16": ["BF16"]}
_TORCH = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32,
    "INT64": torch.int64, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """What was built. That it was built says nothing about what it computes: `ran` is False until an engine ran.

    Args:
        runtime: what built it, e.g. `"TensorRT-RTX 1.7.1.116"`.
        plugins: nodes of these names became plugins; empty for an engine from the plain graph.
        registered: plugins that were loaded into the registry of the build, used or not.
        inputs, outputs: name: (dtype, shape), -1 for a free dimension.
    """

    engine: Path
    runtime: str
    plugins: tuple[str, ...]
    registered: tuple[str, ...]
    layers: int
    seconds: float
    bytes: int
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    ran: bool = False

    @property
    def graph(self) -> str:
        return f"with plugins: {', '.join(self.plugins)}" if self.plugins else "built from the plain graph"


def installed(runtime: Runtime) -> bool:
    """Whether there is such a TensorRT here; it is not imported, and may be of another version than is needed."""
    module, bindings, _ = MODULES[runtime]
    # the bindings of classic TensorRT are of no use alone: its metapackage brings the libraries, too
    return find_spec(bindings if runtime == "tensorrt-rtx" else module) is not None


def build_tensorrt(
    onnx: str | Path,
    engine: str | Path,
    profiles: Profile | Sequence[Profile] | None = None,
    *,
    dtype: str | None = None,
    runtime: Runtime | None = None,
    strongly_typed: bool = True,
    timing_cache: str | Path | None = None,
    plugins: str | Path | None = None,
    plugin_libraries: Sequence[str | Path] = (),
    tf32: bool = False,
    optimization_level: int | None = None,
    workspace: int | None = None,
    timeout: float = 3600,
) -> Build:
    """Build an engine from an ONNX file, in a process of its own: a fault of the builder ends that one.

    Args:
        onnx: a file of `export_onnx`, or any other; weights beside it are found.
        engine: the file to write. It appears complete or not at all, with `engine` + ".json" that says what it is.
        profiles: (least, usual, largest) of each free dimension of the inputs, by its name: `{"batch": (1, 8, 32)}`;
            several mappings for several profiles.
        dtype: "float32", "float16" or "bfloat16". Strongly typed, the file's own: another is an error. Otherwise what
            the builder may round to, in TensorRT 10.
        runtime: "tensorrt" or "tensorrt-rtx"; by default the first of these that is installed.
        strongly_typed: every tensor keeps the dtype that the file gives it. TensorRT 11 and TensorRT-RTX know no
            other networks.
        timing_cache: a file of measured kernels to read and to bring up to date; classic TensorRT only.
        plugins: the manifest of `compile_plugins`: our kernels in place of the functions that they implement.
        plugin_libraries: shared libraries of plugins to load first.
        tf32: products of float32 may be rounded to TF32.
        optimization_level, workspace: the builder's effort, 0 to 5, and its memory in bytes; its own by default.
        timeout: seconds.

    Raises:
        ValueError: a file cannot be read or written, or dtype, a profile or a dimension does not fit.
        UnsupportedError: no TensorRT, one of another version, a node that it does not take, or a builder that died.
    """
    onnx, engine = Path(onnx).resolve(), Path(engine).resolve()
    runtime = _runtime(runtime)
    if not strongly_typed and runtime == "tensorrt-rtx":
        raise ValueError("strongly_typed is False, expected True: TensorRT-RTX knows no other networks")
    job = _job(onnx, engine.name, profiles, dtype, runtime, strongly_typed, tf32, optimization_level, workspace)
    job |= {
        "onnx": str(onnx),
        "timing_cache": None if timing_cache is None else str(Path(timing_cache).resolve()),
        "plugins": None if plugins is None else str(Path(plugins).resolve()),
        "plugin_libraries": [str(Path(p).resolve()) for p in plugin_libraries],
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as folder:
            result = _build_apart(job, Path(folder), timeout)
            Path(folder, engine.name + ".json").write_text(
                json.dumps({"mmfuse": mmfuse.__version__, "onnx": onnx.name, "profiles": job["profiles"], **result})
            )
            for name in (engine.name, engine.name + ".json"):
                os.replace(Path(folder, name), engine.with_name(name))
    except OSError as error:
        raise ValueError(f"engine is {str(engine)!r}, which cannot be written: {error}") from error
    for side in ("inputs", "outputs"):
        result[side] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in result[side].items()}
    for names in ("plugins", "registered"):
        result[names] = tuple(result[names])
    return Build(engine, **{name: value for name, value in result.items() if name != "ok"})


def _runtime(runtime: Runtime | None) -> Runtime:
    if runtime is not None and runtime not in MODULES:
        raise ValueError(f"runtime is {runtime!r}, expected one of {', '.join(MODULES)}")
    for candidate in MODULES if runtime is None else (runtime,):
        if installed(candidate):  # type: ignore[arg-type]
            return candidate  # type: ignore[return-value]
    missing = [runtime] if runtime else list(MODULES)
    raise UnsupportedError(
        f"{' and '.join(MODULES[name][2] for name in missing)} cannot be imported: "
        f"{' or '.join(_INSTALL[name] for name in missing)}; or write_bundle, for a machine that has it"
    )


def _job(
    onnx: Path, engine: str, profiles: Profile | Sequence[Profile] | None, dtype: str | None, runtime: Runtime,
    strongly_typed: bool, tf32: bool, optimization_level: int | None, workspace: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What `engine_build.py` reads."""
    if not onnx.is_file():
        raise ValueError(f"onnx is {str(onnx)!r}, which is no file")
    if dtype is not None and dtype not in _PRECISION:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(_PRECISION)}")
    if dtype is not None and strongly_typed and (own := dtype_of(onnx)) != dtype:
        raise ValueError(f"dtype is {dtype!r}, but the file computes in {own}, which a strongly typed engine keeps")
    listed = [profiles] if isinstance(profiles, Mapping) else list(profiles or [])
    for profile in listed:
        for name, three in profile.items():
            if len(three) != 3 or not 0 <= three[0] <= three[1] <= three[2]:
                raise ValueError(f"profiles[{name!r}] is {three}, expected the least, usual and largest size, in order")
    return {
        "onnx": onnx.name,
        "engine": engine,
        "runtime": runtime,
        "profiles": [{name: list(three) for name, three in profile.items()} for profile in listed],
        "precision": [] if strongly_typed or dtype is None else _PRECISION[dtype],
        "strongly_typed": strongly_typed,
        "tf32": tf32,
        "timing_cache": None,
        "optimization_level": optimization_level,
        "workspace": workspace,
        "plugins": None,
        "plugin_libraries": [],
    }


def dtype_of(onnx: Path) -> str:
    """The floating dtype that most of the numbers of a file's weights have."""
    require("onnx")
    from onnx import TensorProto, load

    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    counts = dict.fromkeys(names.values(), 0)
    for tensor in load(onnx, load_external_data=False).graph.initializer:
        if tensor.data_type in names:
            counts[names[tensor.data_type]] += torch.Size(tensor.dims).numel()
    return max(counts, key=lambda name: counts[name])


def _build_apart(job: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Run the build in a process of its own."""
    # copied as into a bundle: beside the sources here, files have the names of the packages that they import
    script = _copy_scripts(folder)[0]
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, str(script), str(file)]
    title = MODULES[job["runtime"]][2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{title} built no engine from {job['onnx']} in {timeout:g} s") from error
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if last.startswith("{"):
        result: dict[str, Any] = json.loads(last)
        if result["ok"]:
            return result
        if result["misfit"]:
            raise ValueError(result["error"])
        raise UnsupportedError(f"{title} cannot build {job['onnx']}: {result['error']}")
    said = " ".join(done.stderr.strip().splitlines()[-3:])
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    raise UnsupportedError(f"{title} died building {job['onnx']} ({ended}): {said}")


def _copy_scripts(folder: Path) -> list[Path]:
    sources = [Path(str(module.__file__)) for module in (engine_build, engine_check, engine_plugins)]
    return [Path(shutil.copyfile(source, folder / source.name)) for source in sources]


# --- bundles --------------------------------------------------------------------------------------------------------


def write_bundle(
    onnx: str | Path,
    folder: str | Path,
    profiles: Profile | Sequence[Profile] | None = None,
    *,
    dtype: str | None = None,
    strongly_typed: bool = True,
    samples: Sequence[Mapping[str, Tensor]] | None = None,
    plugins: bool = True,
    tf32: bool = False,
    optimization_level: int | None = None,
    workspace: int | None = None,
) -> Path:
    """Write what a machine with classic TensorRT needs to build an engine and to judge it.

    The folder holds the ONNX file, `engine_build.py` and its job, our kernels as plugins or the reason that there are
    none, `samples.npz` with the outputs of onnxruntime, `engine_check.py`, which prints parity and latency there, and
    a README.md with the command for NVIDIA's container. Nothing in it is pickled, and none of it needs mmfuse.

    Args:
        folder: is made; must not exist or be empty. It appears complete or not at all.
        profiles, dtype, strongly_typed, tf32, optimization_level, workspace: as of `build_tensorrt`.
        samples: inputs by name, one mapping each; by default random ones at the usual sizes, integers 0 and 1.
        plugins: whether to compile our kernels.

    Raises:
        ValueError: as `build_tensorrt`, or the folder is not empty.
        UnsupportedError: onnx or onnxruntime is missing.
    """
    from mmfuse.export.plugins import compile_plugins

    require("onnx", "onnxruntime")
    onnx, folder = Path(onnx).resolve(), Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, which exists and is not an empty folder")
    job = _job(onnx, "model.engine", profiles, dtype, "tensorrt", strongly_typed, tf32, optimization_level, workspace)
    job |= {"onnx": "model.onnx", "timing_cache": "timing.cache"}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            new = Path(made, folder.name)
            new.mkdir()
            _copy_model(onnx, new / job["onnx"])
            why = _try_plugins(compile_plugins, new) if plugins else "they were not asked for"
            job["plugins"] = "plugins/manifest.json" if why is None else None
            (new / "job.json").write_text(json.dumps(job, indent=1))
            _copy_scripts(new)
            unsampled = _write_samples(new, job, samples)
            (new / "README.md").write_text(_readme(why, unsampled))
            if folder.exists():
                folder.rmdir()
            os.replace(new, folder)
    except OSError as error:
        raise ValueError(f"folder is {str(folder)!r}, which cannot be written: {error}") from error
    return folder


def _copy_model(source: Path, target: Path) -> None:
    """The file, and its weights under the new name."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    graph = onnx.load(source, load_external_data=False)
    apart = [t for t in _get_all_tensors(graph) if uses_external_data(t)]
    for name in {e.value for t in apart for e in t.external_data if e.key == "location"}:
        shutil.copyfile(source.parent / name, target.parent / name)
    shutil.copyfile(source, target)


def _try_plugins(compile_plugins: Any, folder: Path) -> str | None:
    """Why there are no plugins, or None."""
    try:
        found = compile_plugins(folder / "model.onnx", folder / "plugins")
    except (UnsupportedError, ValueError) as error:
        return str(error)
    return None if found else "no node of the file has a kernel that can be one: it is built from the plain graph"


def _write_samples(folder: Path, job: dict[str, Any], samples: Sequence[Mapping[str, Tensor]] | None) -> str | None:
    """`samples.npz`: "NUMBER/in/NAME" and, by onnxruntime, "NUMBER/out/NAME". Why there are none, or None."""
    import numpy as np

    file = folder / "samples.npz"
    if dtype_of(folder / job["onnx"]) == "bfloat16":
        np.savez(file)
        return "onnxruntime has few operators in bfloat16 on a CPU, and numpy has no such numbers"
    session = open_session(folder / job["onnx"], "cpu")
    if samples is None:
        usual = [{name: three[1] for name, three in p.items()} for p in job["profiles"]] or [{}]
        signature = {i.name: (i.type, i.shape) for i in session.get_inputs()}
        samples = [draw(signature, sizes, seed) for seed, sizes in enumerate(usual)]
    names = [output.name for output in session.get_outputs()]
    arrays: dict[str, Any] = {}
    for number, given in enumerate(samples):
        feed = {name: t.numpy() for name, t in given.items()}
        arrays |= {f"{number}/in/{name}": a for name, a in feed.items()}
        arrays |= {f"{number}/out/{n}": a for n, a in zip(names, session.run(names, feed), strict=True)}
    np.savez(file, **arrays)
    return None


def _readme(why: str | None, unsampled: str | None) -> str:
    plugins = (
        "Plugins: `plugins/` holds our kernels, compiled ahead of time; afterwards the engine holds them, and runs "
        "without Python."
        if why is None
        else f"Plugins: none: {why}"
    )
    return f"""# An engine to build

Written by mmfuse {mmfuse.__version__}. Nothing of this was built or run where it was written.

```bash
docker run --rm --gpus all -v "$PWD":/bundle -w /bundle {CONTAINER} \\
  bash -c "pip install --quiet numpy && python3 engine_build.py job.json && python3 engine_check.py job.json"
```

TensorRT 10.x or 11.x, and numpy. `engine_build.py` writes `model.engine`, which only that TensorRT on that kind of GPU
loads. `engine_check.py` prints, for each sample, the difference from onnxruntime, and the latency; its exit code is 0
if the difference is within the rounding of the dtype.

{plugins}
{f"Samples: none: {unsampled}; engine_check.py ends with 2." if unsampled else ""}
"""


# --- running --------------------------------------------------------------------------------------------------------


class TensorRTModule(nn.Module):
    """An engine as a module: tensors of one GPU in, by name, tensors out, in the order of the current stream.

    Shapes may change from call to call within the engine's profiles; the first profile that holds them is taken.

    Args:
        engine: a file of `build_tensorrt`, built by this TensorRT on this kind of GPU.
        cuda_graph: record a CUDA graph for each combination of shapes and replay it. What a call returns is then
            overwritten by the next call with these shapes.

    Raises:
        ValueError: the file cannot be read.
        UnsupportedError: no GPU, no TensorRT, or an engine that it does not load.
    """

    def __init__(self, engine: str | Path, *, cuda_graph: bool = False):
        super().__init__()
        path = Path(engine)
        try:
            plan = path.read_bytes()
            record = json.loads(path.with_name(path.name + ".json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"engine is {str(path)!r}, which cannot be read: {error}") from error
        if not torch.cuda.is_available():
            raise UnsupportedError(f"engine {str(path)!r} needs a GPU, and torch finds none")
        title = record["runtime"].split()[0]
        runtime = next(name for name, (_, _, known) in MODULES.items() if known == title)
        try:
            trt = engine_build.load(runtime)
        except engine_build.Refused as error:
            raise UnsupportedError(str(error)) from error
        said: list[str] = []
        self._logger = engine_build.logger_of(trt, said)
        self._runtime = trt.Runtime(self._logger)
        loaded = self._runtime.deserialize_cuda_engine(plan)
        if loaded is None:
            raise UnsupportedError(
                f"engine {str(path)!r} was built by {record['runtime']}, and {title} {trt.__version__} does not load "
                f"it: {' '.join(said)}"
            )
        self._engine, self._context = loaded, loaded.create_execution_context()
        names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
        is_input = {name: loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._dtypes = {name: _TORCH[loaded.get_tensor_dtype(name).name] for name in names}
        self._stream = torch.cuda.Stream()  # on the default stream TensorRT would wait for everything
        self._graphs: dict[tuple[torch.Size, ...], _Recorded] | None = {} if cuda_graph else None

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """One tensor for each of `self.inputs`, in its dtype -> one for each of `self.outputs`."""
        if set(inputs) != set(self.inputs):
            raise ValueError(f"inputs are {sorted(inputs)}, expected {sorted(self.inputs)}")
        for name, t in inputs.items():
            if t.dtype != self._dtypes[name] or not t.is_cuda:
                raise TypeError(f"{name} is {t.dtype} on {t.device}, expected {self._dtypes[name]} on a GPU")
        if self._graphs is not None:
            return self._replayed(inputs)
        held = {name: t.contiguous() for name, t in inputs.items()}
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._bound(held)
            self._execute()
        current.wait_stream(self._stream)
        for t in held.values():
            t.record_stream(self._stream)
        for t in outputs.values():
            t.record_stream(current)
        return outputs

    def _bound(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs' buffers, after the shapes and addresses of all tensors are set."""
        profile = self._profile(inputs)
        if profile != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        for name, t in inputs.items():
            self._context.set_input_shape(name, tuple(t.shape))
            self._context.set_tensor_address(name, t.data_ptr())
        outputs = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._dtypes[name], device="cuda")
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _profile(self, inputs: Mapping[str, Tensor]) -> int:
        """The first profile that holds all shapes."""
        for number in range(self._engine.num_optimization_profiles):
            bounds = {name: self._engine.get_tensor_profile_shape(name, number) for name in inputs}
            if all(
                len(least) == t.dim() and all(a <= n <= b for a, n, b in zip(least, t.shape, largest, strict=True))
                for (least, _, largest), t in zip(bounds.values(), inputs.values(), strict=True)
            ):
                return number
        shapes = {name: tuple(t.shape) for name, t in inputs.items()}
        raise ValueError(f"inputs have shapes {shapes}, which no profile of the engine holds: {bounds}")

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")

    def _replayed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._graphs is not None
        key = tuple(inputs[name].shape for name in self.inputs)
        if key not in self._graphs:
            self._graphs[key] = self._recorded(inputs)
        recorded = self._graphs[key]
        for name, t in inputs.items():
            recorded.inputs[name].copy_(t)
        recorded.graph.replay()
        return recorded.outputs

    def _recorded(self, inputs: Mapping[str, Tensor]) -> _Recorded:
        own = {name: t.contiguous().clone() for name, t in inputs.items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._bound(own)
            self._execute()  # the first run with new shapes allocates
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Recorded(graph, own, outputs)


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
