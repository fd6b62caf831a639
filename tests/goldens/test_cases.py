"""The golden machinery itself: a wrong number, a missing one and an unknown system must not pass unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from goldens import cases

VIT = cases.HERE / "data" / "clip" / "vit"


def _stored_and_got() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stored = {"features": torch.tensor([4.0, -2.0, 0.0]), "ids": torch.tensor([3, 1])}
    return stored, {name: t.clone() for name, t in stored.items()}


def test_equal_results_pass() -> None:
    stored, got = _stored_and_got()
    assert cases.differences(got | {"more": torch.ones(1)}, stored, 0.0, 0.0) == []


@pytest.mark.parametrize(
    ("dtype", "notes", "allowed"),
    [
        (torch.float64, [], 1e-6 * 4 + 1e-12),
        (torch.float64, ["so the float32 branch was used there"], 1e-5 * 4 + 1e-12),
        (torch.float64, ["its mask is cast to float32"], 1e-5 * 4 + 1e-12),
        (torch.float64, ["casts its input to float32 and back: that cast was removed"], 1e-6 * 4 + 1e-12),
        (torch.float64, ["casts to torch.float32 / .float() were read as float64 casts"], 1e-6 * 4 + 1e-12),
        (torch.float64, ["weights float32, computed in float64, stored float32"], 1e-6 * 4 + 1e-12),
        (torch.float32, ["its mask is cast to float32"], 2e-4 * 4 + 3e-6),
    ],
)
def test_tolerance_is_a_fraction_of_the_largest_magnitude(dtype: torch.dtype, notes: list[str], allowed: float) -> None:
    stored, got = _stored_and_got()
    stored, got = {"features": stored["features"]}, {"features": got["features"].double()}
    got["features"][2] = 0.99 * allowed
    assert cases.differences(got, stored, *cases.tolerance(dtype, notes)) == []
    got["features"][2] = 1.01 * allowed
    assert len(cases.differences(got, stored, *cases.tolerance(dtype, notes))) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", None, "not computed"),
        ("features", torch.tensor([4.0, -2.0, float("nan")]), "differs by nan"),
        ("features", torch.tensor([[4.0, -2.0, 0.0]]), "shape (1, 3), expected (3,)"),
        ("ids", torch.tensor([3, 2]), "[3, 2], expected [3, 1]"),
        ("ids", torch.tensor([3.0, 1.0]), "dtype torch.float32, expected torch.int64"),
    ],
)
def test_a_difference_is_named(name: str, value: Tensor | None, message: str) -> None:
    stored, got = _stored_and_got()
    if value is None:
        del got[name]
    else:
        got[name] = value
    (line,) = cases.differences(got, stored, 1.0, 1.0)
    assert line == f"{name}: {message}" or line.startswith(f"{name}: {message}, allowed")


def test_equal_infinities_are_equal() -> None:
    stored = {"mask": torch.tensor([0.0, -torch.inf])}
    assert cases.differences({"mask": torch.tensor([0.0, -torch.inf])}, stored, 1e-6, 1e-12) == []
    assert cases.differences({"mask": torch.tensor([0.0, torch.inf])}, stored, 1e-6, 1e-12) != []


def test_the_adapter_is_given_no_output() -> None:
    given, stored, _ = cases.load(VIT, torch.float64, "cpu")
    held = [*given.params.values(), *given.inputs.values()]
    assert all(t.dtype == torch.float64 for t in held if t.is_floating_point())
    assert given.inputs.keys() == {"image", "text"} and given.inputs["text"].dtype == torch.int64
    assert not any("output" in name for name in (*vars(given), *given.params, *given.inputs, *given.config))
    assert {f"grad.{name}" for name in given.grads} | {"loss", "visual_tokens"} <= stored.keys()


def _write(folder: Path, tensors: dict[str, list[float]], **case: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps({"config": {}, "notes": []} | case))
    header, data = {}, b""
    for name, values in tensors.items():
        raw = torch.tensor(values, dtype=torch.float32).numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "tensors.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


@pytest.mark.parametrize("grads", [{"w": {"shape": [2]}}, {"of": "total_loss", "keys": ["w"]}])
def test_both_shapes_of_grads(tmp_path: Path, grads: dict) -> None:
    folder = _write(tmp_path / "system" / "case", {"param.w": [1, 2], "grad.w": [3, 4], "output.loss": []}, grads=grads)
    given, stored, _ = cases.load(folder, torch.float64, "cpu")
    assert given.grads == ("w",) and given.params["w"].tolist() == [1, 2]
    assert stored["grad.w"].tolist() == [3, 4] and stored["loss"].shape == (0,)


def test_gradients_of_shared_and_of_unused_parameters() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("first", "second", "unused")})
    model.second.weight = model.first.weight
    found = cases.gradients(model.first.weight.sum(), model, ("second.weight", "unused.weight"))
    assert found["grad.second.weight"].eq(1).all() and found["grad.unused.weight"].eq(0).all()


def test_model_config_lacks_what_only_the_run_needs(tmp_path: Path) -> None:
    config = {"model": {}, "greedy": 3, "forward": {}, "generate": {}, "grad_names": [], "start_ptr": 4}
    folder = _write(tmp_path / "system" / "case", {}, config=config)
    given, _, _ = cases.load(folder, torch.float32, "cpu")
    assert given.model_config == {"model": {}} and given.config == config


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected <system>/<case>/case\.json"):
        cases.find(tmp_path)


def test_another_tree_of_cases(tmp_path: Path) -> None:
    _write(tmp_path / "perceptron" / "tiny", {"output.loss": [0]})
    _write(tmp_path / "openclip_losses" / "other", {}, config={"loss": "other", "class": "OtherLoss", "sets": []})
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", str(cases.HERE / "test_goldens.py")],
        env=os.environ | {"MMFUSE_GOLDENS": str(tmp_path)},
        cwd=cases.HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    for dtype in ("float64", "float32"):
        assert f"[perceptron/tiny-{dtype}] SKIPPED" in result.stdout
        assert f"[openclip_losses/other-{dtype}] SKIPPED" in result.stdout
    assert "no adapter for perceptron" in result.stdout and "OtherLoss" in result.stdout
