"""The directory of an exported model: what is written, what is refused, and that nothing half-written appears."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mmfuse
from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.cli import main
from mmfuse.export import check_generation, export_for_generation, generation, load
from mmfuse.export.generation import graphs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
allow_torchvision()
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("generation")

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MED = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "encoder_width": 16,
    "max_position_embeddings": 40,
}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 50, "enc_token_id": 51, "len": 52}
CONFIG = {
    "variant": "caption",
    "config": {"image_size": 16},
    "med_config": MED,
    "vit": VIT,
    "tokenizer": TOKENS,
    "prompt_ids": [1, 7, 9, 2],
}


def captioner() -> nn.Module:
    torch.manual_seed(0)
    return models.create("blip", CONFIG)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, image: torch.Tensor) -> Path:
    """The export, which leaves the model as it was."""
    model = captioner()
    model.text_decoder.eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.MonkeyPatch.context() as patch:  # as weights above 2 GB are written
        patch.setattr("mmfuse.export.onnx.SINGLE_FILE_BYTES", 0)
        facts = {"model": "blip", "config": json.dumps(CONFIG), "seed": 0}
        directory = export_for_generation(
            model, {"image": image}, tmp_path_factory.mktemp("blip") / "blip", facts=facts
        )
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert [p.name for p in directory.parent.iterdir()] == ["blip"]
    return directory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are not written, for what is about the files around them."""
    monkeypatch.setattr(graphs.Part, "write", lambda self, path: path.write_text("graph"))
    monkeypatch.setattr(generation.folder, "join_weights", lambda paths, weights: weights.write_text("weights"))


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def change(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "manifest.json"
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(json.dumps(entries))


def test_what_is_written(written: Path, image: torch.Tensor) -> None:
    entries = json.loads((written / "manifest.json").read_text())
    assert entries["format"] == 1 and entries["mmfuse"] == mmfuse.__version__
    assert entries["parts"] == {"vision": "vision.onnx", "prefill": "prefill.onnx", "decode": "decode.onnx"}
    assert {p.name for p in written.iterdir()} == {*entries["files"], "manifest.json"}
    for part in entries["parts"].values():
        onnx.checker.check_model(str(written / part), full_check=True)
        graph = onnx.load(written / part, load_external_data=False).graph
        axes = {d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
        assert axes >= {"batch"}
    generator = load(written)
    assert "decode" in repr(generator)
    before = captioner().eval().generate(image, num_beams=2)
    assert torch.equal(generator.generate(image.double(), num_beams=2), before)


def test_an_earlier_export_is_replaced(tmp_path: Path, image: torch.Tensor, quick: None) -> None:
    for system in ("caption", "vqa", "caption"):
        torch.manual_seed(0)
        model = models.create("blip", CONFIG | {"variant": system})
        export_for_generation(model, {"image": image}, tmp_path / "out")
        parts = json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]
        assert ("question" in parts) == (system == "vqa") == (tmp_path / "out" / "question.onnx").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_command(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "blip", "--config", json.dumps(CONFIG), "--generation", str(tmp_path / "out")]
    assert main(command) == 0 and f"load('{tmp_path / 'out'}')" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["prompt_ids"] == [1, 7, 9, 2]
    assert main(["export", "blip", "--preset", "tiny", "--generation", str(tmp_path / "tiny")]) == 0
    facts = json.loads((tmp_path / "tiny" / "manifest.json").read_text())["facts"]
    assert facts["model"] == "blip" and json.loads(facts["config"])["variant"] == "caption"
    assert main(["export", "clip", "--preset", "tiny", "--generation", str(tmp_path / "none")]) == 2
    assert "model is 'clip', which writes no words" in capsys.readouterr().err
    assert main([*command, "--target", "trt"]) == 2
    assert "target is 'trt', expected 'portable' with --generation" in capsys.readouterr().err
    (tmp_path / "made.py").write_text(
        "import json, torch\nfrom mmfuse import models\n"
        f"def factory():\n    return models.create('blip', json.loads({json.dumps(CONFIG)!r})), "
        "{'image': torch.zeros(1, 3, 16, 16)}\n"
    )
    assert main(["export", f"{tmp_path / 'made.py'}:factory", "--generation", str(tmp_path / "other")]) == 0


def test_check_holds(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the directory's own record."""
    assert main(["export", "check", str(written), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = ["files", "decode.onnx", "prefill.onnx", "vision.onnx", "words"]
    assert [check["name"] for check in report["checks"]] == names and report["ok"] and report["model"] == "blip"
    assert report["checks"][-1]["detail"].startswith("4 answers of ")
    assert sum(report["ours"].values()) and report["operators"]["MatMul"]


def test_check_of_the_users_model(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = tmp_path / "made.py"
    factory.write_text(
        "import json, torch\nfrom mmfuse import models\n"
        f"def factory(seed=0):\n    torch.manual_seed(seed)\n"
        f"    made = models.create('blip', json.loads({json.dumps(CONFIG)!r}))\n"
        "    return made, {'image': torch.zeros(2, 3, 16, 16), 'sample': True}\n"
        "def other():\n    return factory(1)\n"
    )
    command = ["export", "check", str(written), "--markdown", str(tmp_path / "report.md"), "--model"]
    assert main([*command, f"{factory}:factory"]) == 0
    assert "random, seed 0" in capsys.readouterr().out and "| words | yes | 2 " in (tmp_path / "report.md").read_text()
    assert main([*command, f"{factory}:other"]) == 2 and "other weights" in capsys.readouterr().err
    assert main(["export", "check", str(written), "--also", "openvino"]) == 2
    assert "expected none: a directory" in capsys.readouterr().err


def test_check_notices_other_words(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = captioner().eval().generate

    def said(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        fake = SimpleNamespace(generate=lambda **given: change(own(**given).clone()))
        monkeypatch.setattr("mmfuse.export.generation.check.load", lambda _: fake)
        report = check_generation(written)
        assert not report["ok"]
        return report["checks"][-1]["detail"]

    assert said(lambda words: torch.cat([words[:1] + 1, words[1:]])) == "1 of 4 answers differ from PyTorch's"
    assert "PyTorch's are" in said(lambda words: words[:, :-1])


def test_check_refuses(copy: Path) -> None:
    path = copy / "manifest.json"
    entries = json.loads(path.read_text())
    del entries["facts"]["model"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="does not record how its model was made"):
        check_generation(copy)
    with pytest.raises(ValueError, match="does not record what goes in"):
        check_generation(copy, captioner())
    del entries["facts"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="no facts of an export"):
        check_generation(copy)


def test_weights_lie_once(written: Path) -> None:
    """The decoder's table of words is also the weight of its head."""
    model = captioner()
    table = model.text_decoder.bert.embeddings.word_embeddings.weight.detach().numpy().tobytes()
    weights = (written / "weights.bin").read_bytes()
    assert weights.count(table) == 1
    assert not any(table in (written / name).read_bytes() for name in ("vision.onnx", "prefill.onnx", "decode.onnx"))


def test_pixels_of_another_kind_are_refused(written: Path, image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"image is torch.uint8, expected torch.float32, as the sample"):
        load(written).generate(image.byte())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(format=2), "has format 2, expected 1"),
        (lambda e: e.pop("format"), "has format None, expected 1"),
        (lambda e: e.update(system="os:system"), "has system 'os:system', expected one of"),
        (lambda e: e.update(parts=[]), r"has parts \[\], expected an object"),
        (lambda e: e["parts"].pop("decode"), "has no part decode"),
        (lambda e: e["parts"].update(decode="../other.onnx"), "which is none of its files"),
        (lambda e: e["files"].update({"../../etc/passwd": e["files"]["vision.onnx"]}), "expected one inside"),
        (lambda e: e["files"].update({"/etc/passwd": e["files"]["vision.onnx"]}), "expected one inside"),
        (lambda e: e["files"].update({"..": e["files"]["vision.onnx"]}), "expected one inside"),
        (lambda e: e["files"].update({"vision.onnx": None}), "expected its bytes and its sha256"),
        (lambda e: e["files"].update({"more.onnx": e["files"]["vision.onnx"]}), "more.onnx is missing"),
        (lambda e: e["settings"].pop("tokens"), "settings has no 'tokens'"),
    ],
)
def test_a_hostile_manifest(edit: Callable[[dict[str, Any]], Any], message: str, copy: Path) -> None:
    change(copy, edit)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_damaged_files(copy: Path, tmp_path: Path) -> None:
    weights = copy / "weights.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"weights.bin has \d+ bytes, expected \d+"):
        load(copy)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights.bin is not what was exported"):
        load(copy)
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights.bin is missing"):
        load(copy)
    for text in ("", "{", "[]", "\xff"):
        (copy / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"manifest.json"):
            load(copy)
    for nowhere in (tmp_path, tmp_path / "absent", weights):
        with pytest.raises(ValueError, match=r"has no readable manifest.json"):
            load(nowhere)


def test_a_graph_with_weights_elsewhere(copy: Path, tmp_path: Path) -> None:
    """A file whose digest fits, and whose graph names a file outside."""
    (tmp_path / "outside.bin").write_bytes((copy / "weights.bin").read_bytes())
    path = copy / "vision.onnx"
    file = onnx.load(path, load_external_data=False)
    for tensor in file.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    path.write_bytes(file.SerializeToString())
    facts = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    change(copy, lambda entries: entries["files"].update({"vision.onnx": facts}))
    with pytest.raises(ValueError, match=r"vision.onnx cannot be loaded"):
        load(copy)


def test_a_failed_export_leaves_nothing(
    tmp_path: Path, image: torch.Tensor, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generation.folder, "join_weights", full)
    for directory in (old, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"cannot be written: .*No space left"):
            export_for_generation(captioner(), {"image": image}, directory)
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (old / "manifest.json").read_text() == "old"


def test_export_refuses(tmp_path: Path, image: torch.Tensor) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no export"):
        export_for_generation(captioner(), {"image": image}, other)
    with pytest.raises(ValueError, match="cannot be written"):
        export_for_generation(captioner(), {"image": image}, tmp_path / "absent" / "out")
    with pytest.raises(ValueError, match=r"inputs has image NoneType, expected pixels \[B, 3, R, R\]"):
        export_for_generation(captioner(), {"pixel_values": image}, tmp_path / "out")
    with pytest.raises(TypeError, match="model is Linear, expected one of transformers:BlipForConditionalGeneration"):
        export_for_generation(nn.Linear(2, 2), {"image": image}, tmp_path / "out")
    with pytest.raises(TypeError, match="dtype is torch.bfloat16, expected torch.float32 or torch.float16"):
        export_for_generation(captioner().bfloat16(), {"image": image}, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
