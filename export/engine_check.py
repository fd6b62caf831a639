"""Judge an engine where it runs: `python engine_check.py JOB.json`, with TensorRT, a GPU and numpy.

Compares its outputs with those in `samples.npz`, prints the difference of each and the latency of each sample, and ends
with 0 only if every output is within the rounding of its dtype. CUDA is called through its own library.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# root mean square of the difference over that of the expected output
ALLOWED = {"float32": 1e-4, "float16": 1e-2}
TF32_ALLOWED = 1e-2
RUNS = 100


class Cuda:
    """The few calls of the CUDA runtime that are needed."""

    def __init__(self) -> None:
        for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12"):
            try:
                self._library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        sys.exit("libcudart.so is not found: run this where CUDA is installed")

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            sys.exit(f"{name} failed with CUDA error {code}")

    def buffer(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        assert pointer.value is not None
        return pointer.value

    def copy(self, to: int, source: int, size: int) -> None:
        if size:
            kind = ctypes.c_int(4)  # cudaMemcpyDefault
            self.call("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)

    def stream(self) -> int:
        pointer = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(pointer))
        assert pointer.value is not None
        return pointer.value

    def wait(self, stream: int) -> None:
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))


def run(trt: Any, cuda: Cuda, engine: Any, sample: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[float]]:
    """The outputs, and seconds of each of RUNS runs."""
    context = engine.create_execution_context()
    stream = cuda.stream()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs: dict[str, tuple[int, np.ndarray]] = {}
    for name in (n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT):
        given = np.ascontiguousarray(sample[name])
        if not context.set_input_shape(name, given.shape):
            sys.exit(f"{name} has shape {given.shape}, which the engine's profile does not hold")
        pointer = cuda.buffer(given.nbytes)
        cuda.copy(pointer, given.ctypes.data, given.nbytes)
        context.set_tensor_address(name, pointer)
    for name in (n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT):
        host = np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
        outputs[name] = cuda.buffer(host.nbytes), host
        context.set_tensor_address(name, outputs[name][0])
    seconds = []
    for _ in range(10 + RUNS):
        start = time.perf_counter()
        if not context.execute_async_v3(stream):
            sys.exit("the engine did not run")
        cuda.wait(stream)
        seconds.append(time.perf_counter() - start)
    for pointer, host in outputs.values():
        cuda.copy(host.ctypes.data, pointer, host.nbytes)
    return {name: host for name, (_, host) in outputs.items()}, seconds[10:]


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, over that of what was expected; infinite for what is not a number."""
    difference = got.astype(np.float64) - expected.astype(np.float64)
    error = float(np.sqrt(np.mean(np.square(difference)))) if difference.size else 0.0
    scale = float(np.sqrt(np.mean(np.square(expected.astype(np.float64))))) if expected.size else 1.0
    return error / (scale or 1.0) if np.isfinite(error) else float("inf")


def judge(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tf32: bool) -> list[tuple[str, float, bool]]:
    """(output, relative difference, whether it is within the rounding of its dtype)"""
    verdicts = []
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            verdicts.append((name, float("inf"), False))
        elif value.dtype.kind != "f":
            share = float(np.mean(got[name] != value)) if value.size else 0.0
            verdicts.append((name, share, share == 0))
        else:
            error, dtype = relative(got[name], value), str(value.dtype)
            allowed = TF32_ALLOWED if tf32 and dtype == "float32" else ALLOWED.get(dtype, ALLOWED["float32"])
            verdicts.append((name, error, error <= allowed))
    return verdicts


def samples_of(file: Path) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(inputs, expected outputs) of each sample."""
    arrays = np.load(file)
    found: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    for key in arrays.files:
        number, side, name = key.split("/", 2)
        found.setdefault(int(number), ({}, {}))[side == "out"][name] = arrays[key]
    return [found[number] for number in sorted(found)]


def main() -> int:
    path = Path(sys.argv[1]).resolve()
    engine_build = importlib.import_module("engine_build")  # beside this script

    job = json.loads(path.read_text())
    try:
        trt = engine_build.load(job["runtime"])
    except engine_build.Refused as error:
        sys.exit(str(error))
    said: list[str] = []
    logger = engine_build.logger_of(trt, said)
    engine = trt.Runtime(logger).deserialize_cuda_engine((path.parent / job["engine"]).read_bytes())
    if engine is None:
        sys.exit(f"TensorRT {trt.__version__} does not load {job['engine']}: {' '.join(said)}")
    samples = samples_of(path.with_name("samples.npz"))
    if not samples:
        print("there is no sample to compare")
        return 2
    cuda, holds = Cuda(), True
    for number, (inputs, expected) in enumerate(samples):
        got, seconds = run(trt, cuda, engine, inputs)
        for name, difference, within in judge(got, expected, job["tf32"]):
            holds &= within
            print(f"sample {number}  {name}  relative difference {difference:.2e}  {'holds' if within else 'DIFFERS'}")
        low, middle, high = (1e3 * float(np.percentile(seconds, p)) for p in (20, 50, 80))
        print(f"sample {number}  latency {middle:.3f} ms, 20 % below {low:.3f}, 80 % below {high:.3f}, {RUNS} runs")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
