"""transformers' exporter with our nodes, as format "mmfuse-onnx": `AutoHfExporter.from_config({"export_format": ...})`.

Importing it registers it. What transformers' own format "onnx" does, its fixes for many models among it, stays; only
the fused operators of an accelerated model leave as nodes with functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.exporters import OnnxConfig, OnnxExporter, register_backend
from transformers.exporters.runners.runner_onnx import OnnxModelRunner

from mmfuse.export.nodes import Nodes, attach, formula
from mmfuse.kernels._runtime.dispatch import exporting

FORMAT = "mmfuse-onnx"


@dataclass
class MMFuseOnnxConfig(OnnxConfig):
    """As transformers' `OnnxConfig`.

    Args:
        opset_version: 18, which every runtime builds.
        mode: as of `mmfuse.export.export_onnx`.
    """

    export_format: str = FORMAT
    opset_version: int | None = 18
    mode: str = "functions"


class MMFuseOnnxExporter(OnnxExporter):
    """transformers' `OnnxExporter`, whose files hold fused operators as nodes `mmfuse::Mmfuse...` with functions."""

    export_format = FORMAT
    config_class = MMFuseOnnxConfig

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> Any:
        nodes = Nodes()
        with exporting(formula if config.mode == "decomposed" else nodes):
            program, metadata = super().export_program(model, sample_inputs, config=config)
        if config.mode == "functions":
            attach(program, nodes, program.opset_imports[""])
        return program, metadata


register_backend(MMFuseOnnxExporter, OnnxModelRunner)
