"""Golden cases: numbers that the official implementations gave at tiny random weights.

`<system>/<case>/case.json` says what `tensors.safetensors` holds: `param.*`, `input.*`, `output.*` and `grad.*`. The
adapter `adapters/<system>.py` has one function, `run(given) -> {name: tensor}`, whose names are those of the case's
outputs and, for gradients, `grad.<name>`. It calls the public API only, and is given no output.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


@dataclass(frozen=True)
class Given:
    """What an adapter may know of a case. Floating-point parameters and inputs have `dtype`."""

    config: dict[str, Any]
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    grads: tuple[str, ...]
    dtype: torch.dtype
    device: str

    @property
    def model_config(self) -> dict[str, Any]:
        """The config that `mmfuse.models.create` takes: without what only the run needed."""
        run_only = ("forward", "generate", "greedy", "grad_names", "eos_bias_shift")
        return {k: v for k, v in self.config.items() if k not in run_only and not k.startswith("start_")}


def find(root: Path) -> list[Path]:
    """The folders of the cases under `root`."""
    folders = sorted(path.parent for path in root.glob("*/*/case.json"))
    if not folders:
        raise ValueError(f"the folder of golden cases is {str(root)!r}, expected <system>/<case>/case.json in it")
    return folders


def load(folder: Path, dtype: torch.dtype, device: str) -> tuple[Given, dict[str, Tensor], list[str]]:
    """What the adapter is given, the stored results by name, and the case's notes."""
    case = json.loads((folder / "case.json").read_text())
    tensors = read_safetensors(folder / "tensors.safetensors")

    def having(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def cast(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.to(device, dtype if t.is_floating_point() else None) for k, t in values.items()}

    grads = case.get("grads") or {}
    names = tuple(grads["keys"] if set(grads) == {"of", "keys"} else grads)
    given = Given(case["config"], cast(having("param.")), cast(having("input.")), names, dtype, device)
    stored = having("output.") | {f"grad.{name}": t for name, t in having("grad.").items()}
    return given, stored, case["notes"]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the format's description, so that the tests need torch alone."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        # a copy, because a tensor in the file need not be aligned
        raw = data[start + begin : start + end]
        tensors[name] = torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.zeros(shape, dtype=dtype)
    return tensors


def adapter(system: str) -> Callable[[Given], dict[str, Tensor]] | None:
    """The `run` of a system's adapter, None if it has no adapter."""
    if not (HERE / "adapters" / f"{system}.py").exists():
        return None
    return importlib.import_module(f"goldens.adapters.{system}").run


def tolerance(dtype: torch.dtype, notes: Iterable[str]) -> tuple[float, float]:
    """The allowed difference: a fraction of the stored tensor's largest magnitude, and a constant."""
    if dtype == torch.float32:
        return 2e-4, 3e-6
    return 1e-5 if any(map(_casts_to_float32, notes)) else 1e-6, 1e-12


def _casts_to_float32(note: str) -> bool:
    """Whether a note says that the official code rounds to float32 even when it runs in float64."""
    said = re.search(r"cast\w*\b[^.;]*\bfloat32|float32[^.;]*\b(cast|branch)", note)
    undone = re.search(r"removed|read as float64|no-ops|kept in float64", note)
    return bool(said) and not undone


def differences(got: Mapping[str, Tensor], stored: Mapping[str, Tensor], relative: float, constant: float) -> list[str]:
    """One line for every stored tensor that `got` lacks or differs from by more than is allowed."""
    lines = []
    for name, expected in stored.items():
        if name not in got:
            lines.append(f"{name}: not computed")
        elif line := _difference(got[name].detach().cpu(), expected, relative, constant):
            lines.append(f"{name}: {line}")
    return lines


def _difference(got: Tensor, expected: Tensor, relative: float, constant: float) -> str | None:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.is_floating_point() != expected.is_floating_point():
        return f"dtype {got.dtype}, expected {expected.dtype}"
    if not expected.is_floating_point():
        return (
            None if torch.equal(got.to(expected.dtype), expected) else f"{got.tolist()}, expected {expected.tolist()}"
        )
    got, expected = got.double(), expected.double()
    error = torch.where(got == expected, 0.0, (got - expected).abs())  # equal infinities differ by 0
    worst = error.max().item() if error.numel() else 0.0
    largest = expected[expected.isfinite()].abs()
    allowed = relative * (largest.max().item() if largest.numel() else 0.0) + constant
    return None if worst <= allowed else f"differs by {worst:.3g}, allowed {allowed:.3g}"  # NaN differs


# --- for adapters ---------------------------------------------------------------------------------------------------


def record_outputs(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A dict that the next forward fills with the output of each module, under its name."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _args, output, name=name: seen.__setitem__(name, output))
    return seen


def gradients(loss: Tensor, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of `loss` in the parameters `names`, under the names of the stored ones: any of a shared one's."""
    names = tuple(names)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    grads = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
    return {f"grad.{name}": grad for name, grad in zip(names, grads, strict=True)}
