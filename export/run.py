"""Run an ONNX file where it will be served: inputs and outputs stay on the device, and what falls back is named."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmfuse.export.require import require
from mmfuse.kernels._runtime import UnsupportedError

Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]

# onnxruntime's names, first choice first; what none of them takes runs on the CPU
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
# all of them install the folder `onnxruntime`
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm")
# as onnxruntime calls them
TYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(bfloat16)": torch.bfloat16, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8, "tensor(uint8)": torch.uint8, "tensor(bool)": torch.bool,
}  # fmt: skip
# ONNX's element types
ELEMENTS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float16: 10,
    torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One file, run.

    Args:
        outputs: by name, on the CPU.
        milliseconds: of each timed run.
        fell_back: for a device's provider, how many nodes of each kind ran on the CPU instead; None where this
            onnxruntime does not tell.
        nodes: with a library of custom operators, of each kind of fused node why it ran as its function; None: the
            library computed it.
        remarks: what the user should know about the installation.
    """

    provider: str
    runtime: str
    outputs: dict[str, Tensor]
    milliseconds: list[float]
    fell_back: dict[str, int] | None = None
    nodes: dict[str, str | None] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def run_onnx(
    path: str | Path,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    provider: Provider = "cpu",
    sizes: Mapping[str, int] | None = None,
    repeat: int = 10,
    library: str | Path | None = None,
) -> Run:
    """Run a file in onnxruntime with bound inputs and outputs, or in OpenVINO.

    Args:
        inputs: by name; by default random ones, see `draw`.
        provider: "cpu", "cuda" or "tensorrt" of onnxruntime, or "openvino", by OpenVINO itself.
        sizes: of the free dimensions of random inputs, by name.
        repeat: timed runs, after two that are not.
        library: of custom operators for onnxruntime on the CPU; mmfuse's own is `ort_library()`.

    Raises:
        ValueError: an argument does not fit, or the file or the library cannot be read.
        UnsupportedError: the provider is not there, or fails to load; the message says what is installed. Or a fused
            node has neither a function in the file nor a kernel in the library.
    """
    path = Path(path)
    if provider not in (*PROVIDERS, "openvino"):
        raise ValueError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}, openvino")
    if not path.is_file():
        raise ValueError(f"path is {str(path)!r}, which is no file")
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}, expected at least 1")
    if library is not None and provider != "cpu":
        raise ValueError(f"library is given for provider {provider!r}, expected cpu")
    if provider == "openvino":
        from mmfuse.export.openvino import Compiled

        compiled = Compiled(path)
        given = draw(compiled.inputs, sizes or {}) if inputs is None else _checked(inputs, compiled.inputs)
        milliseconds = _timed(lambda: compiled(given), repeat)
        return Run(provider, f"OpenVINO {compiled.version}", compiled(given), milliseconds)
    require("onnxruntime")
    import onnxruntime

    nodes: dict[str, str | None] = {}
    session = open_session(path, provider, None if library is None else Path(library), nodes)
    signature = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    given = draw(signature, sizes or {}) if inputs is None else _checked(inputs, signature)
    binding, held = _bound(session, given, "cpu" if provider == "cpu" else "cuda")

    def once() -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has no class for it
            what = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
            raise ValueError(f"onnxruntime does not run {str(path)!r} with {what}: {error}") from error
        binding.synchronize_outputs()

    milliseconds = _timed(once, repeat)
    names = [output.name for output in session.get_outputs()]
    outputs = {n: torch.from_numpy(a) for n, a in zip(names, binding.copy_outputs_to_cpu(), strict=True)}
    del held  # the bound memory had to stay until here
    fell_back = {} if provider == "cpu" else _fell_back(session)
    remarks = [why] if (why := installed_twice()) else []
    return Run(provider, f"onnxruntime {onnxruntime.__version__}", outputs, milliseconds, fell_back, nodes, remarks)


def installed() -> dict[str, str]:
    """Which packages of onnxruntime there are, with their versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def installed_twice() -> str | None:
    """What is wrong if packages of onnxruntime are installed over each other: files of the last one win."""
    found = installed()
    if len(found) < 2:
        return None
    what = " and ".join(f"{name} {number}" for name, number in found.items())
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else next(n for n in found if n != "onnxruntime")
    return (
        f"{what} are installed over each other, in one folder: which providers there are depends on the order. "
        f"pip uninstall -y {' '.join(found)}; pip install {keep}"
    )


def open_session(
    path: Path, provider: str, library: Path | None = None, nodes: dict[str, str | None] | None = None
) -> Any:
    """A session of onnxruntime whose first provider is the one asked for, and not the CPU in its place.

    Args:
        library: of custom operators, for the nodes that it has a kernel for.
        nodes: is told of each kind of fused node why the library leaves it to its function, or None.
    """
    import onnxruntime

    wanted = PROVIDERS[provider][0]
    known = onnxruntime.get_available_providers()
    if wanted not in known:
        why = installed_twice() or f"installed is {', '.join(installed()) or 'a build of your own'}"
        remedy = "" if installed_twice() else ": pip uninstall onnxruntime; pip install 'mmfuse[onnx-gpu]'"
        raise UnsupportedError(f"provider {provider!r} is not in this onnxruntime ({', '.join(known)}); {why}{remedy}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # from 1.24 on; earlier ones ignore it
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if library is not None:
        from mmfuse.export.ort_kernels import register

        found = register(options, path, library)
        if nodes is not None:
            nodes.update(found)
    chosen = [name for name in PROVIDERS[provider] if name in known]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=chosen)
    except Exception as error:  # onnxruntime has no class for it
        raise ValueError(f"onnxruntime does not take {str(path)!r}: {error}") from error
    if session.get_providers()[0] != wanted:
        raise UnsupportedError(
            f"provider {provider!r} did not load, its CUDA or cuDNN is missing or of another version: onnxruntime took "
            f"{', '.join(session.get_providers())}"
        )
    return session


def draw(signature: Mapping[str, tuple[str, Any]], sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs: normal numbers, bytes, and other integers 0 and 1.

    Args:
        signature: of each input: its type as onnxruntime calls it, e.g. "tensor(float)", and its shape.
        sizes: of the free dimensions, by name; 2 for others.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {n for _, shape in signature.values() for n in shape if isinstance(n, str)}
    if unknown := sorted(set(sizes) - names):
        raise ValueError(f"sizes has {', '.join(unknown)}, expected free dimensions of the file: {sorted(names)}")
    inputs = {}
    for name, (kind, dims) in signature.items():
        shape = [n if isinstance(n, int) else sizes.get(n, 2) for n in dims]
        if kind not in TYPES:
            raise ValueError(f"input {name!r} is a {kind}, for which inputs must be given")
        dtype = TYPES[kind]
        try:
            if dtype.is_floating_point:
                inputs[name] = torch.randn(shape, generator=generator).to(dtype)
            else:
                inputs[name] = torch.randint(256 if dtype == torch.uint8 else 2, shape, generator=generator).to(dtype)
        except RuntimeError as error:  # of memory
            raise ValueError(f"input {name!r} cannot be drawn, {shape}: {error}") from error
    return inputs


def _checked(inputs: Mapping[str, Tensor], signature: Mapping[str, tuple[str, Any]]) -> dict[str, Tensor]:
    if set(inputs) != set(signature):
        raise ValueError(f"inputs are {sorted(inputs)}, expected {sorted(signature)}")
    for name, t in inputs.items():
        kind, shape = signature[name]
        fits = len(shape) == t.dim() and all(n == m for n, m in zip(shape, t.shape, strict=True) if isinstance(n, int))
        if not fits or TYPES.get(kind) != t.dtype:
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, expected {kind} {list(shape)}")
    return dict(inputs)


def _bound(session: Any, inputs: Mapping[str, Tensor], device: str) -> tuple[Any, list[Tensor]]:
    """A binding of inputs and outputs on the device, and the tensors that must live as long."""
    held = [t.to(device).contiguous() for t in inputs.values()]
    binding = session.io_binding()
    for name, t in zip(inputs, held, strict=True):
        binding.bind_input(name, device, t.device.index or 0, ELEMENTS[t.dtype], tuple(t.shape), t.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    if device == "cuda":
        torch.cuda.synchronize()  # onnxruntime has a stream of its own
    return binding, held


def _timed(once: Any, repeat: int) -> list[float]:
    milliseconds = []
    for _ in range(2 + repeat):
        start = time.perf_counter()
        once()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds[2:]


def _fell_back(session: Any) -> dict[str, int] | None:
    """Kinds of nodes that run on the CPU in a session of a device."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"]
    return dict(Counter(node.op_type for part in parts for node in part.get_nodes()).most_common())
