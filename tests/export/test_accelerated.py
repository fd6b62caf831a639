"""Models of other libraries: fused operators survive `accelerate()` and leave as nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmfuse
from mmfuse.export import check_onnx, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.xdist_group("export")

FREE = {"pixel_values": {0: "batch"}}


def pixels(batch: int, size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))}


def operators_of(path: Path) -> set[str]:
    nodes = onnx.load(path).graph.node
    return {next(a.s.decode() for a in n.attribute if a.name == "operator") for n in nodes if n.domain == "mmfuse"}


class Named(nn.Module):
    """timm's models with transformers' name of the input."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vit = model

    def forward(self, pixel_values: Any) -> Any:
        return self.vit(pixel_values)


def siglip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.SiglipVisionModel(config).eval()


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)
    return Named(vit.eval())


@pytest.mark.parametrize("make", [siglip, timm_vit])
def test_an_accelerated_model_keeps_its_operators(make: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    report = mmfuse.accelerate(model)
    assert report.replaced
    path = export_onnx(model, pixels(2), tmp_path / "model.onnx", dynamic=FREE)
    assert "patch_embed" in operators_of(path)
    checked = check_onnx(path, model, [pixels(1), pixels(3), pixels(5)])
    assert checked["ok"], checked["checks"] + checked["outputs"]
    assert "apart" not in checked


def test_the_class_runs_where_fused_code_has_no_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = siglip()
    mmfuse.accelerate(model)
    import mmfuse.export.onnx as onnx_module

    program = onnx_module._program

    def refusing(which: nn.Module, *args: Any) -> Any:
        if onnx_module.is_accelerated(which):
            raise mmfuse.UnsupportedError("no form")
        return program(which, *args)

    monkeypatch.setattr(onnx_module, "_program", refusing)
    with pytest.warns(UserWarning, match="its class's own code is exported: no form"):
        path = export_onnx(model, pixels(2), tmp_path / "model.onnx", dynamic=FREE)
    assert not operators_of(path) and onnx_module.is_accelerated(model)
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert facts["mmfuse.apart"] == "no form"


def test_transformers_exporter_writes_our_nodes(tmp_path: Path) -> None:
    exporters = pytest.importorskip("transformers.exporters")
    from mmfuse.export.huggingface import FORMAT, MMFuseOnnxConfig, MMFuseOnnxExporter

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = siglip()
    mmfuse.accelerate(model)
    config = MMFuseOnnxConfig(dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}})
    assert isinstance(exporters.AutoHfExporter.from_config({"export_format": FORMAT}), MMFuseOnnxExporter)
    exported = MMFuseOnnxExporter().export(model, pixels(2), config)
    exported.save_pretrained(tmp_path)
    assert "patch_embed" in operators_of(tmp_path / "model.onnx")
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    for batch in (1, 4):
        with torch.no_grad():
            expected = model(**pixels(batch)).pooler_output
        torch.testing.assert_close(loaded(**pixels(batch)).pooler_output, expected, rtol=1e-4, atol=1e-5)
