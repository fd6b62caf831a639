"""Files run in onnxruntime and OpenVINO, and fused for onnxruntime only where that holds and pays."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfuse.cli import main
from mmfuse.export import ort, run
from mmfuse.export.openvino import Compiled
from mmfuse.export.run import draw, installed_twice, run_onnx
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels.head import select_head

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmfuse.export import check_onnx, export_onnx  # noqa: E402

# one worker: the files are shared
pytestmark = pytest.mark.xdist_group("run")

openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO (extra openvino) is not installed")
transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers (extra hf) is not installed")


class Head(nn.Module):
    """A fused operator, and operators of ONNX around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm, self.weight = nn.LayerNorm(16), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers(x)
        return select_head(x, 0, (self.norm.weight, self.norm.bias, self.norm.eps), self.weight)


@pytest.fixture(scope="module")
def model() -> Head:
    return Head().eval()


@pytest.fixture(scope="module")
def file(model: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "head.onnx"
    return export_onnx(model, {"x": torch.randn(3, 5, 16)}, path, dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=openvino)])
def test_it_computes_what_pytorch_does(provider: Any, model: Head, file: Path) -> None:
    assert onnx.load(file).functions  # of the fused operator: OpenVINO has no conversion for such
    for batch in (1, 4):
        x = torch.randn(batch, 5, 16)
        found = run_onnx(file, {"x": x}, provider=provider, repeat=2)
        with torch.no_grad():
            torch.testing.assert_close(found.outputs["output"], model(x), rtol=1e-5, atol=1e-5)
        assert len(found.milliseconds) == 2 and found.median > 0


@openvino
def test_two_runtimes_agree_on_random_inputs(file: Path) -> None:
    first, second = (run_onnx(file, provider=p, sizes={"batch": 6}, repeat=1) for p in ("cpu", "openvino"))
    assert first.outputs["output"].shape == (6, 8)
    torch.testing.assert_close(first.outputs, second.outputs, rtol=1e-5, atol=1e-5)
    assert first.fell_back == {} and second.fell_back is None


@pytest.mark.gpu
def test_cuda_tells_what_ran_on_the_cpu(model: Head, file: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    x = torch.randn(4, 5, 16)
    found = run_onnx(file, {"x": x.cuda()}, provider="cuda")
    assert found.fell_back is None or "MatMul" not in found.fell_back
    with torch.no_grad():
        torch.testing.assert_close(found.outputs["output"], model(x), rtol=1e-3, atol=1e-3)


def test_random_inputs() -> None:
    signature = {
        "ids": ("tensor(int64)", ["batch", 7]),
        "pixels": ("tensor(uint8)", ["batch", "any"]),
        "x": ("tensor(float16)", [3]),
    }
    found = draw(signature, {"batch": 50})
    assert found["ids"].shape == (50, 7) and set(found["ids"].unique().tolist()) == {0, 1}
    assert found["pixels"].shape == (50, 2) and found["pixels"].max() > 128
    assert found["x"].dtype == torch.float16
    assert torch.equal(draw(signature, {"batch": 50})["x"], found["x"])
    with pytest.raises(ValueError, match=r"sizes has rows, expected free dimensions of the file: \['any', 'batch'\]"):
        draw(signature, {"rows": 1})
    with pytest.raises(ValueError, match="for which inputs must be given"):
        draw({"text": ("tensor(string)", [1])}, {})


def test_arguments_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    for message, arguments in (
        ("provider is 'tpu'", {"provider": "tpu"}),
        ("repeat is 0", {"repeat": 0}),
        (r"inputs are \['y'\], expected \['x'\]", {"inputs": {"y": torch.zeros(1)}}),
        (r"x is torch.float32 \[2, 4, 16\]", {"inputs": {"x": torch.zeros(2, 4, 16)}}),
        ("x is torch.float64", {"inputs": {"x": torch.zeros(2, 5, 16, dtype=torch.float64)}}),
    ):
        with pytest.raises(ValueError, match=message):
            run_onnx(file, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no file"):
        run_onnx(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="onnxruntime does not take"):
        run_onnx(broken)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there(provider: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match=rf"{provider}.*installed is .*mmfuse\[onnx-gpu\]"):
        run_onnx(file, provider=provider)


def test_a_provider_that_does_not_load(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu beside another CUDA: it is known, and the CPU takes its place."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(UnsupportedError, match="'cuda' did not load"):
        run_onnx(file, provider="cuda")


def test_packages_that_are_installed_over_each_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("onnxruntime", "onnxruntime-gpu"):
            return "1.31.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(run, "version", version)
    said = installed_twice()
    assert said is not None and "onnxruntime 1.31.0 and onnxruntime-gpu 1.31.0 are installed over each other" in said
    assert said.endswith("pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu")
    assert run_onnx(file, sizes={"batch": 2}, repeat=1).remarks == [said]


def test_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.31.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(run, "version", version)
    assert installed_twice() is None


def test_which_nodes_fell_back() -> None:
    kinds = [("CUDAExecutionProvider", ["MatMul"]), ("CPUExecutionProvider", ["Shape", "Gather", "Shape"])]
    parts = [
        SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
        for name, ops in kinds
    ]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert run._fell_back(session) == {"Shape": 2, "Gather": 1}
    assert run._fell_back(SimpleNamespace()) is None


def test_onnxruntime_tells_where_nodes_are(file: Path) -> None:
    session = run.open_session(file, "cpu")
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell")
    assert run._fell_back(session)  # on the CPU: all of them


# --- fused for onnxruntime ------------------------------------------------------------------------------------------


@transformers
def test_a_fused_file_is_kept_if_it_is_right_and_not_slower(
    model: Head, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "_least", lambda sessions, *_: [2.0, 1.0][: len(sessions)])
    made = ort.fuse_for_ort(file, out=tmp_path / "fused.onnx")
    assert made.kept and made.why is None and made.difference <= 1e-5 and made.operators
    x = torch.randn(4, 5, 16)
    with torch.no_grad():
        found = run_onnx(tmp_path / "fused.onnx", {"x": x}, repeat=1).outputs["output"]
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(ort, "_least", lambda *_: [1.0, 2.0])
    slow = ort.fuse_for_ort(file, out=tmp_path / "slow.onnx")
    assert not slow.kept and slow.why == "it takes 2.00 ms, the plain file 1.00"
    assert [f.name for f in tmp_path.iterdir()] == ["fused.onnx"]


@transformers
@pytest.mark.parametrize("fault", ["wrong", "broken", "raises"])
def test_a_fused_file_that_does_not_hold(
    fault: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir as ir
    from transformers.exporters import onnxruntime_fusions

    def fuse(model: ir.Model, _: str) -> None:
        if fault == "raises":
            raise KeyError("some pattern")
        for node in model.graph:
            if node.op_type == "Add" and fault == "wrong":
                node.op_type = "Sub"
            if node.op_type == "MatMul" and fault == "broken":
                node.op_type = "NoSuchOperator"

    monkeypatch.setattr(onnxruntime_fusions, "fuse_for_onnxruntime", fuse)
    made = ort.fuse_for_ort(file, out=tmp_path / "fused.onnx", repeat=1)
    why = {"wrong": "it differs by", "broken": "does not run", "raises": "cannot be fused: 'some pattern'"}[fault]
    assert not made.kept and made.why is not None and why in made.why
    assert not list(tmp_path.iterdir())


@transformers
def test_the_gate_measures_both_files(file: Path, tmp_path: Path) -> None:
    made = ort.fuse_for_ort(file, out=tmp_path / "fused.onnx", repeat=5)
    assert made.plain > 0 and made.fused > 0 and made.difference <= 1e-5
    assert made.kept == (made.fused <= made.plain) == (tmp_path / "fused.onnx").exists()


@transformers
def test_the_gate_asks_every_sample(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "_least", lambda _, feed, __: [2.0, 3.0 if len(feed["x"]) == 1 else 1.0])
    inputs = [{"x": torch.randn(batch, 5, 16)} for batch in (1, 4)]
    assert ort.fuse_for_ort(file, inputs[1:], out=tmp_path / "fused.onnx").kept
    made = ort.fuse_for_ort(file, inputs, out=tmp_path / "slow.onnx")
    assert not made.kept and (made.plain, made.fused) == (2.0, 3.0)


def test_long_runs_are_timed_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def session(seconds: list[float]) -> SimpleNamespace:
        def run(*_: Any) -> None:
            nonlocal now
            now += seconds[len(runs) // 2 % len(seconds)]
            runs.append(now)

        return SimpleNamespace(run=run)

    monkeypatch.setattr(ort.time, "perf_counter", lambda: now)
    for seconds, turns in (([3.0, 2.0], 4), ([0.001], 30)):
        runs: list[float] = []
        assert ort._least([session(seconds)] * 2, {}, 30) == pytest.approx([1e3 * min(seconds)] * 2)
        assert len(runs) == 2 * turns


@transformers
def test_the_target_passes_both_gates(
    model: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = [{"x": torch.randn(batch, 5, 16)} for batch in (3, 1)]

    def exported(**options: Any) -> list[str]:
        path = export_onnx(
            model, inputs[0], tmp_path / "head.onnx", target="ort", dynamic={"x": {0: "batch"}}, **options
        )
        assert check_onnx(path, model, inputs)["ok"]
        return [n.op_type for n in onnx.load(path).graph.node if n.domain]

    monkeypatch.setattr(ort, "_least", lambda sessions, *_: [2.0, 1.0][: len(sessions)])
    assert (names := exported()) and not any(name.startswith("Mmfuse") for name in names)
    assert not [r for r in caplog.records if r.name == "mmfuse"]
    monkeypatch.setattr(ort, "_least", lambda *_: [1.0, 2.0])
    assert all(name.startswith("Mmfuse") for name in exported())
    assert "the plain file, as the fused one: it takes 2.00 ms" in caplog.text
    monkeypatch.setattr(ort, "fuse_for_ort", lambda _: (_ for _ in ()).throw(UnsupportedError("no transformers")))
    assert exported() and "the plain file: no transformers" in caplog.text


@transformers
def test_the_bench_compares_outputs_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mmfuse.bench.suites import export as suite

    def tiny() -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)
        return CLIPVisionModelWithProjection(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}

    monkeypatch.setattr(suite, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(suite, "_TURNS", 1)
    assert suite.run(argparse.Namespace(json=True)) == 0
    found = json.loads(capsys.readouterr().out)["tiny"]
    assert set(found["milliseconds"]) == {"eager", "torch.onnx", "mmfuse"} and found["difference"] < 1e-5
    monkeypatch.setattr(suite, "_measured", lambda *_: found | {"difference": 0.1})
    assert suite.run(argparse.Namespace(json=False)) == 1 and "largest difference 1e-01" in capsys.readouterr().out


# --- the command line, and the check --------------------------------------------------------------------------------


def test_the_command_runs_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs.safetensors"
    command = ["export", "run", str(file), "--size", "batch=4", "--repeat", "2", "--outputs", str(outputs)]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["provider"] == "cpu" and record["outputs"] == {"output": {"shape": [4, 8], "dtype": "float32"}}
    assert load_file(outputs)["output"].shape == (4, 8)
    save_file({"x": torch.randn(1, 5, 16)}, tmp_path / "inputs.safetensors")
    assert main(["export", "run", str(file), "--inputs", str(tmp_path / "inputs.safetensors")]) == 0
    assert "[1, 8]" in capsys.readouterr().out
    for said, *wrong in (
        ("expected NAME=N", "--size", "batch"),
        ("expected free dimensions", "--size", "rows=3"),
        ("cannot be drawn", "--size", f"batch={10**15}"),
        ("cannot be read", "--inputs", str(file)),
        ("cannot be written", "--outputs", str(tmp_path)),
    ):
        assert main(["export", "run", str(file), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_fails(tmp_path: Path) -> None:
    path = export_onnx(nn.Embedding(1, 4), {"input": torch.zeros(9, dtype=torch.int64)}, tmp_path / "ids.onnx")
    with pytest.raises(ValueError, match=r"onnxruntime does not run .* with input \[9\]: .*out of data bounds"):
        run_onnx(path)  # with ids of 0 and 1


@openvino
def test_the_check_asks_openvino(model: Head, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [{"x": torch.randn(batch, 5, 16)} for batch in (1, 4)]

    def asked() -> dict[str, Any]:
        return next(c for c in check_onnx(file, model, inputs, also=["openvino"])["checks"] if c["name"] == "openvino")

    found = asked()
    assert found["ok"] and "2 samples" in found["detail"]
    call = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, given: {n: t + 1e-2 for n, t in call(self, given).items()})
    found = asked()
    assert not found["ok"] and "relative difference" in found["detail"]
    with pytest.raises(ValueError, match="also has 'tpu'"):
        check_onnx(file, model, inputs, also=["tpu"])
