"""Models as ONNX files: what they hold, that onnxruntime computes it, and that `check` notices when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmfuse
from mmfuse.cli import main
from mmfuse.export import check_onnx, export_onnx, export_served
from mmfuse.export.lint import lint
from mmfuse.export.onnx import fingerprint
from mmfuse.export.served import build, read_weights, served
from mmfuse.models.clip import CLIP, SYSTEM

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# one worker: the exported files are shared
pytestmark = pytest.mark.xdist_group("export")

CLIP_PART = served("clip")
OUTPUTS, INPUTS = CLIP_PART.outputs, tuple(CLIP_PART.dynamic)
VIT: dict[str, Any] = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 8,
    "context_length": 77,
    "vocab_size": 3000,
    "transformer_width": 32,
    "transformer_heads": 2,
    "transformer_layers": 2,
}
RESNET = {
    **VIT,
    "image_resolution": 64,
    "vision_layers": (1, 1, 1, 1),
    "vision_width": 8,
    "vision_patch_size": None,
    "vision_heads": 4,
}


@pytest.fixture(scope="module")
def resnet_model() -> CLIP:
    """At initialisation the residual branches are multiplied by zero; here they carry signal, normalised."""
    model = build("clip", RESNET, seed=1)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator)
            module.momentum = 1.0
    with torch.no_grad():
        model.encode_image(CLIP_PART.inputs(model, {"image_batch": 32, "text_batch": 1})["image"])
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "clip.onnx"
    return export_served("clip", path, VIT, seed=3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory, resnet_model: CLIP) -> Path:
    return CLIP_PART.export(resnet_model, tmp_path_factory.mktemp("resnet") / "clip.onnx")


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SYSTEM.presets, "tiny", VIT)
    return "tiny"


def edited(path: Path, folder: Path, edit: Any) -> Path:
    """A copy of an ONNX file after `edit(model)`."""
    file = onnx.load(path)
    edit(file)
    onnx.save(file, folder / "edited.onnx")
    return folder / "edited.onnx"


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_served_outputs_are_those_of_clip(config: dict[str, Any]) -> None:
    model = build("clip", config).double().eval()
    given = CLIP_PART.inputs(model, {"image_batch": 3, "text_batch": 5})
    image, text = given["image"], given["text"]
    per_image, per_text, image_embeds, text_embeds = CLIP_PART.module(model)(**given)
    logits, _ = model(image, text)
    assert torch.allclose(per_image, logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(per_text, per_image.T)
    for embeds, raw in ((image_embeds, model.encode_image(image)), (text_embeds, model.encode_text(text))):
        assert torch.allclose(embeds * raw.norm(dim=1, keepdim=True), raw, rtol=1e-12, atol=1e-12)


def test_samples_end_with_one_end_token() -> None:
    text = CLIP_PART.inputs(build("clip", VIT), {"image_batch": 1, "text_batch": 50})["text"]
    assert ((text == VIT["vocab_size"] - 1).sum(1) == 1).all()
    assert all((row[row.argmax() + 1 :] == 0).all() and (row[: row.argmax()] > 0).all() for row in text)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_portable_file(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    file = onnx.load(path)
    assert [(o.domain, o.version) for o in file.opset_import] == [("", 18), ("mmfuse", 1)]
    assert {n.domain for n in file.graph.node} == {"", "mmfuse"}
    ours = {n.op_type for n in file.graph.node if n.domain}
    assert ours == {f.name for f in file.functions} and any("MmfuseSelectHead" in name for name in ours)
    assert any("MmfusePatchEmbed" in name for name in ours) == (name == "vit")
    standard = [n for n in file.graph.node if not n.domain] + [n for f in file.functions for n in f.node]
    assert all(onnx.defs.get_schema(n.op_type, 18, "") for n in standard)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*file.graph.input, *file.graph.output)
    }
    size = file.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    assert shapes == {
        "image": ["image_batch", 3, size, size],
        "text": ["text_batch", 77],
        "logits_per_image": ["image_batch", "text_batch"],
        "logits_per_text": ["text_batch", "image_batch"],
        "image_embeds": ["image_batch", 16],
        "text_embeds": ["text_batch", 16],
    }
    assert str(Path(mmfuse.__file__).parent).encode() not in path.read_bytes(), "a path of this machine"
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_metadata(vit: Path) -> None:
    facts = {p.key: p.value for p in onnx.load(vit).metadata_props}
    ours = json.loads(facts.pop("mmfuse.operators"))
    assert sum(ours.values()) >= 2
    assert facts == {
        "mmfuse.version": mmfuse.__version__,
        "mmfuse.torch": torch.__version__,
        "mmfuse.model": "clip",
        "mmfuse.config": json.dumps(VIT),
        "mmfuse.target": "portable",
        "mmfuse.mode": "functions",
        "mmfuse.opset": "18",
        "mmfuse.dtype": "float32",
        "mmfuse.dynamic": str({"image": {0: "image_batch"}, "text": {0: "text_batch"}}),
        "mmfuse.seed": "3",
        "mmfuse.weights_sha256": fingerprint(CLIP_PART.module(build("clip", VIT, seed=3))),
    }


def test_any_batch_in_onnxruntime(vit: Path) -> None:
    session = onnxruntime.InferenceSession(vit, providers=["CPUExecutionProvider"])
    given = CLIP_PART.inputs(build("clip", VIT, seed=3), {"image_batch": 5, "text_batch": 7})
    image, text = given["image"], given["text"]
    run = session.run(OUTPUTS, {"image": image.numpy(), "text": text.numpy()})
    for i, j in ((0, 6), (4, 2)):  # a picture and a text alone give what they gave among others
        alone = session.run(OUTPUTS, {"image": image[i : i + 1].numpy(), "text": text[j : j + 1].numpy()})
        assert alone[0].shape == (1, 1)
        assert abs(alone[0][0, 0] - run[0][i, j]) < 1e-4
    assert [r.shape for r in run] == [(5, 7), (7, 5), (5, 16), (7, 16)]


def test_check_holds(vit: Path, resnet: Path, resnet_model: CLIP) -> None:
    before = torch.random.get_rng_state()
    report = check_onnx(vit)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert report["ok"] and [o["name"] for o in report["outputs"]] == list(OUTPUTS), report
    assert report["operators"]["ArgMax"] == 1 and report["bytes"] == vit.stat().st_size
    assert check_onnx(resnet, resnet_model)["ok"]
    with pytest.raises(ValueError, match="does not record how its model was made"):
        check_onnx(resnet)
    with pytest.raises(ValueError, match="not the one exported"):
        check_onnx(resnet, build("clip", RESNET, seed=1))


class Small(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.second.weight = self.first.weight

    def forward(self, x: Any, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.first(x).relu() * scale
        return {"hidden": hidden, "pair": (self.second(hidden), hidden.sum())}


SMALL = {"x": torch.randn(3, 128, generator=torch.Generator().manual_seed(0))}
ROWS = {"x": {0: "rows"}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_and_the_model_left_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Small().to(dtype)
    model.second.eval()
    before = fingerprint(model)
    given = {"x": SMALL["x"].to(dtype)}
    path = export_onnx(model, given, tmp_path / "half.onnx", dynamic=ROWS)
    assert model.training and not model.second.training and fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())
    elem = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == elem
    if dtype == torch.float16:
        report = check_onnx(path, model, [given])
        assert report["ok"] and report["dtype"] == "float16", report


def test_containers_names_and_shared_weights(tmp_path: Path) -> None:
    model = Small()
    path = export_onnx(model, SMALL | {"scale": 2.0}, tmp_path / "small.onnx", dynamic=ROWS)
    file = onnx.load(path)
    assert [o.name for o in file.graph.output] == ["hidden", "pair.0", "pair.1"]
    stored = [t for t in file.graph.initializer if list(t.dims) == [128, 128]]
    assert len(stored) == 1
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(4, 128)
    hidden, (out, total) = model(x, 2.0).values()
    for got, expected in zip(session.run(None, {"x": x.numpy()}), (hidden, out, total), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-5, atol=1e-5)
    assert check_onnx(path, model, [{"x": x, "scale": 2.0}])["ok"]
    # an empty batch
    assert session.run(["hidden"], {"x": x[:0].numpy()})[0].shape == (0, 128)


def test_a_graph_without_weights(tmp_path: Path) -> None:
    model = Small()
    with torch.device("meta"):
        without = Small()
    path = export_onnx(without, SMALL, tmp_path / "graph.onnx", dynamic=ROWS)
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    assert names[0] == "x" and len(names) == 4  # the weight is shared
    weights = {name: t.numpy() for name, t in model.state_dict().items() if name in names}
    x = torch.randn(4, 128)
    hidden, (out, total) = model(x).values()
    for got, expected in zip(session.run(None, {"x": x.numpy(), **weights}), (hidden, out, total), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a graph without weights: there is nothing to compare"):
        check_onnx(path, model, [SMALL])


def test_a_published_size_without_weights(tmp_path: Path) -> None:
    """A part of a model of 1.2 billion parameters."""
    path = tmp_path / "imu.onnx"
    assert main(["export", "imagebind/imu", "--preset", "huge", "--no-weights", "--onnx", str(path)]) == 0
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert lint(file, {"target": "portable", "dtype": "float32"}) == [] and {f.name for f in file.functions}
    assert path.stat().st_size < 1e6
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in file.graph.input}
    assert shapes["imu"] == ["batch", 6, 2000]
    assert shapes["model.modality_trunks.imu.blocks.5.mlp.fc1.weight"] == [2048, 512]


def test_weights_above_the_limit_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.export.onnx.SINGLE_FILE_BYTES", 0)
    model = nn.Sequential(nn.Linear(128, 20), nn.Linear(20, 6))
    path = export_onnx(model, (SMALL["x"],), tmp_path / "large.onnx")
    data = tmp_path / "large.onnx.data"
    assert {f.name for f in tmp_path.iterdir()} == {path.name, data.name}
    report = check_onnx(path, model, [{"input": SMALL["x"]}])
    assert report["ok"] and report["bytes"] == path.stat().st_size + data.stat().st_size
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert not check_onnx(path, model, [{"input": SMALL["x"]}])["ok"]
    # no way out of the folder
    data.write_bytes(whole)
    (tmp_path / "in").mkdir()
    outside, file = tmp_path / "in" / path.name, onnx.load(path, load_external_data=False)
    for entry in (e for t in file.graph.initializer for e in t.external_data if e.key == "location"):
        entry.value = f"../{data.name}"
    outside.write_bytes(file.SerializeToString())
    assert not check_onnx(outside, model, [{"input": SMALL["x"]}])["ok"]
    data.unlink()
    with pytest.raises(ValueError, match=r"large\.onnx.*not a readable ONNX file"):
        check_onnx(path, model, [{"input": SMALL["x"]}])


def corrupt(name: str, row: int = 0) -> Any:
    def edit(file: Any) -> None:
        tensor = next(t for t in file.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[row] += 0.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))

    return edit


def test_check_notices_a_changed_weight(vit: Path, tmp_path: Path) -> None:
    # the exporter renames what it transposes: the weight of some matrix product
    file = onnx.load(vit)
    weights = {t.name for t in file.graph.initializer if len(t.dims) == 2}
    product = next(n.input[1] for n in file.graph.node if n.op_type == "MatMul" and n.input[1] in weights)
    report = check_onnx(edited(vit, tmp_path, corrupt(product)))
    assert not report["ok"] and not all(o["ok"] for o in report["outputs"])

    text = CLIP_PART.inputs(build("clip", VIT), {"image_batch": 4, "text_batch": 16})["text"]
    unused = next(i for i in range(1, VIT["vocab_size"]) if i not in text)
    report = check_onnx(edited(vit, tmp_path, corrupt("model.token_embedding.weight", unused)))
    assert not report["ok"]
    assert [c["name"] for c in report["checks"] if not c["ok"]] == ["weights"]


def test_check_notices_foreign_operators_and_a_broken_graph(vit: Path, tmp_path: Path) -> None:
    def foreign(file: Any) -> None:
        node = next(n for n in file.graph.node if n.op_type == "Sigmoid")
        node.domain = "somewhere"
        file.opset_import.append(onnx.helper.make_opsetid("somewhere", 1))

    failed = {c["name"] for c in check_onnx(edited(vit, tmp_path, foreign))["checks"] if not c["ok"]}
    assert {"onnxruntime"} <= failed

    failed = {
        c["name"] for c in check_onnx(edited(vit, tmp_path, lambda f: f.graph.node.pop(3)))["checks"] if not c["ok"]
    }
    assert {"onnx.checker", "onnxruntime"} <= failed


def test_command(tmp_path: Path, tiny_preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights, path = tmp_path / "w.safetensors", tmp_path / "clip.onnx"
    safetensors.save_file(build("clip", VIT, seed=9).state_dict(), weights)
    command = ["export", "clip", "--preset", tiny_preset, "--onnx", str(path), "--target", "portable"]
    assert main([*command, "--weights", str(weights)]) == 0
    assert str(path) in capsys.readouterr().out
    assert main(["export", "check", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["weights"] == str(weights) and "seed" not in report

    weights = weights.rename(tmp_path / "moved.safetensors")
    assert main(["export", "check", str(path)]) == 2
    assert "w.safetensors" in capsys.readouterr().err
    assert main(["export", "check", str(path), "--weights", str(weights)]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in (*OUTPUTS, "onnxruntime", "opset 18"))
    safetensors.save_file(build("clip", VIT, seed=8).state_dict(), weights)
    assert main(["export", "check", str(path), "--weights", str(weights)]) == 2


def test_command_exit_codes(vit: Path, tmp_path: Path) -> None:
    changed = edited(vit, tmp_path, corrupt("model.visual.conv1.weight"))
    truncated, empty, other = (tmp_path / f"{name}.onnx" for name in ("truncated", "empty", "other"))
    truncated.write_bytes(vit.read_bytes()[:-1000])
    empty.write_bytes(b"")
    file = onnx.load(vit)
    file.ClearField("metadata_props")
    onnx.save(file, other)
    for file in (truncated, empty, other, tmp_path, tmp_path / "absent.onnx"):
        assert main(["export", "check", str(file)]) == 2, file
    assert main(["export", "check", str(vit), "--markdown", str(tmp_path / "absent" / "report.md")]) == 2

    process = [sys.executable, "-m", "mmfuse.cli", "export", "check", str(changed)]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 1, done.stderr
    assert "no" in done.stdout.split("image_embeds")[1].split("text_embeds")[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--preset", "vit-z", "vit-b-16"),
        ("--target", "toaster", "target is 'toaster', expected one of portable"),
        ("--dtype", "int8", "dtype is 'int8', expected one of float32, float16"),
        ("--weights", "absent.pt", "weights is 'absent.pt', which cannot be read"),
        ("--onnx", "absent/clip.onnx", "path is 'absent/clip.onnx', which cannot be written"),
        ("--onnx", ".", "path is '.', which is a folder"),
        ("--config", "{embed_dim: 4}", "config is '{embed_dim: 4}', expected JSON"),
    ],
)
def test_command_errors(
    option: str, value: str, message: str, tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = {"--preset": tiny_preset, "--onnx": "clip.onnx"} | {option: value}
    assert main(["export", "clip", *(word for pair in options.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_path_is_looked_at_before_the_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfuse.export.served.build", lambda *_, **__: pytest.fail("it was made"))
    with pytest.raises(ValueError, match="cannot be written"):
        export_served("clip", tmp_path / "absent" / "clip.onnx", "vit-b-16")


def test_export_refuses(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    model = nn.Linear(128, 2)
    for given, kind, message, options in (
        (
            (SMALL["x"],),
            ValueError,
            "dynamic names 'y', expected one of the inputs input",
            {"dynamic": {"y": {0: "n"}}},
        ),
        ((SMALL["x"],), ValueError, "axis 2, expected one of 0 to 1", {"dynamic": {"input": {2: "n"}}}),
        ((SMALL["x"],), ValueError, "axis 1, but the model takes 128 there", {"dynamic": {"input": {1: "n"}}}),
        ((SMALL["x"],), ValueError, "mode is 'quick', expected one of functions", {"mode": "quick"}),
        ((SMALL["x"],), ValueError, "outputs has 2 names, expected 1", {"outputs": ("a", "b")}),
        ((3.0,), ValueError, "inputs has no tensor", {}),
        (SMALL["x"], TypeError, "inputs is Tensor, expected a mapping", {}),
    ):
        with pytest.raises(kind, match=message):
            export_onnx(model, given, path, **options)
    with pytest.raises(TypeError, match="model is int, expected a torch.nn.Module"):
        export_onnx(7, (SMALL["x"],), path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype is float64, expected float32, float16 or bfloat16"):
        export_onnx(model.double(), (SMALL["x"].double(),), path)
    assert not list(tmp_path.iterdir())


class Unwritable(nn.Module):
    """Has an operation that ONNX cannot hold, in a child."""

    class Child(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.eigh(x @ x.T)[0]

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = self.Child()

    def forward(self, x: Any) -> Any:
        return self.spectrum(x)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(mmfuse.UnsupportedError, match=r"Unwritable cannot be exported in spectrum: .*eigh"):
        export_onnx(Unwritable(), SMALL, tmp_path / "small.onnx")

    class Reads(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(mmfuse.UnsupportedError, match="Reads cannot be exported"):
        export_onnx(Reads(), SMALL, tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_failed_export_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    path = tmp_path / "small.onnx"
    path.write_text("old")

    def fail(model: Any, to: Path, **options: Any) -> None:
        Path(to).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", fail)
    with pytest.raises(ValueError, match="cannot be written: .*No space left"):
        export_onnx(nn.Linear(128, 2), (SMALL["x"],), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_factory_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\ndef made():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(6, 2), {'input': torch.randn(3, 6)}\n"
    )
    path = tmp_path / "mine.onnx"
    assert main(["export", f"{source}:made", "--onnx", str(path), "--dynamic", "input:0=rows"]) == 0
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"
    assert main(["export", "check", str(path)]) == 2
    assert main(["export", "check", str(path), "--model", f"{source}:made"]) == 0
    for what, message in ((f"{source}:other", "has no function other"), ("absent.py:made", "a file that exists")):
        assert main(["export", what, "--onnx", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", f"{source}:made", "--onnx", str(path), "--dynamic", "rows"]) == 2
    assert "expected INPUT:AXIS=NAME" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(mmfuse.UnsupportedError, match=rf"{package} cannot be imported.*pip install 'mmfuse\[onnx\]'"):
        export_onnx(nn.Linear(128, 2), (SMALL["x"],), tmp_path / "small.onnx")


def test_read_weights(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    layer = nn.Linear(3, 2)
    layer.load_state_dict(state)
    torch.save(state, tmp_path / "plain.pt")
    torch.jit.script(layer).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "archive.pt"):
        read = read_weights(tmp_path / name)
        assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (("nested.pt", "nothing around them"), ("text.safetensors", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)


class Named(nn.Module):
    """Two values that torch calls "linear", of which the second is an output of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"linear": self.second(self.first(x))}


def test_an_output_with_the_name_of_a_value_inside(tmp_path: Path) -> None:
    path = export_onnx(Named(), {"x": torch.randn(3, 4)}, tmp_path / "named.onnx")
    onnx.checker.check_model(path, full_check=True)
