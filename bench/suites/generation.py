"""`mmfuse bench generation`: words a second from ONNX files, beside the model's own `generate`.

BLIP-2 with OPT at a tiny size, where a call costs more than its arithmetic, on onnxruntime's CPU provider. The words
are compared before they are timed; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmfuse._compat import allow_torchvision

OPTIONS = ("json",)
_PROMPTS, _WORDS, _TURNS = 4, 20, 8


def run(args: argparse.Namespace) -> int:
    """Print the words a second of both; 0 if they say the same."""
    import onnxruntime

    from mmfuse.export import export_for_generation, load

    allow_torchvision()
    model, given = _model(), _prompts()
    how: dict[str, Any] = {"max_new_tokens": _WORDS, "min_new_tokens": _WORDS}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        generator = load(export_for_generation(model, given, Path(folder, "blip2")), options=options)
        same = torch.equal(generator.generate(**given, **how), model.generate(**given, **how))
        seconds: dict[str, list[float]] = {"eager": [], "onnxruntime": []}
        for _ in range(_TURNS):
            for name, which in (("eager", model), ("onnxruntime", generator)):
                start = time.perf_counter()
                which.generate(**given, **how)
                seconds[name].append(time.perf_counter() - start)
    rate = {name: _PROMPTS * _WORDS / statistics.median(taken) for name, taken in seconds.items()}
    if args.json:
        print(json.dumps({"words_per_second": rate, "same_words": same}))
    else:
        for name, words in rate.items():
            print(f"{name:12} {words:8.0f} words/s {words / rate['eager']:6.2f}x")
        print("the same words" if same else "other words: these times mean nothing")
    return int(not same)


def _model() -> Any:
    """Blip2ForConditionalGeneration with weights of its own for every prompt."""
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=size | {"image_size": 16, "patch_size": 8},
        qformer_config=size | {"vocab_size": 50, "encoder_hidden_size": 16},
        text_config=transformers.OPTConfig(
            vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64,
        ),
        num_query_tokens=3,
        image_token_index=49,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


def _prompts() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.cat([torch.full((_PROMPTS, 3), 49), torch.randint(3, 39, (_PROMPTS, 5))], 1)
    pixels = torch.randn(_PROMPTS, 3, 16, 16)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
