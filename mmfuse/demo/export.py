"""The trained model as one ONNX file, run by onnxruntime."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from mmfuse.demo import digits
from mmfuse.demo.page import Page
from mmfuse.export import check_onnx
from mmfuse.export.served import served
from mmfuse.models.clip import CLIP


def show(page: Page, model: CLIP) -> None:
    page.section("Export")
    model = model.cpu()
    path = served("clip").export(model, page.folder / "clip.onnx")
    checked = check_onnx(path, model)
    page.text(
        f"The model that was trained above, as one ONNX file ({path.stat().st_size / 1e6:.1f} MB, "
        "opset 18), run by onnxruntime. Errors are against float64 (root mean square), difference is the largest from "
        "PyTorch."
    )
    columns = ("error", "pytorch_error", "allowed", "difference")
    page.table(
        ("output", "error", "PyTorch's", "allowed", "difference"),
        [(output["name"], *(f"{output[key]:.1e}" for key in columns)) for output in checked["outputs"]],
    )
    for check in checked["checks"]:
        if not check["ok"]:
            page.pre(f"{check['name']}: {check['detail']}")
    page.claim(checked["ok"], "the file is valid ONNX, and onnxruntime computes what PyTorch does")

    _, held_out = digits.load(torch.device("cpu"))
    ink = torch.arange(len(held_out.grey)) % len(digits.INKS)
    texts = digits.tokenize(digits.caption(*which) for which in product(range(len(digits.INKS)), range(10)))
    nearest = _run(path, digits.paint(held_out.grey, ink), texts).argmax(1)
    ours = digits.similarities(model, held_out).flatten(1).argmax(1)
    share = (nearest % 10 == held_out.digit).float().mean().item()
    same = (nearest == ours).float().mean().item()
    agree = f"{same:.2%} of its captions are PyTorch's"
    page.claim(same > 0.99, f"onnxruntime's zero-shot accuracy is {share:.2%}, {agree}")


def _run(path: Path, image: Tensor, text: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits_per_image"], {"image": image.numpy(), "text": text.numpy()})
    return torch.from_numpy(logits)
