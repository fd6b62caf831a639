"""Generation from ONNX files: the words of the model's own `generate`, in a process that cannot make the model."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.export import export_for_generation, load
from mmfuse.models.minigpt4 import IMAGE, PADDING
from tiny import ARGS, BERT, HF_QFORMER, HF_VISION, LLAMA, T5_SIZES, VIT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
allow_torchvision()
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

# one worker: the exported directories are shared
pytestmark = pytest.mark.xdist_group("generation")

VIT_1, BERT_1, HF_VISION_1, HF_QFORMER_1 = (
    VIT | {"depth": 1}, BERT | {"num_hidden_layers": 1}, HF_VISION | {"num_hidden_layers": 1},
    HF_QFORMER | {"num_hidden_layers": 1},
)  # fmt: skip
OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
T5 = T5_SIZES | {"num_decoder_layers": 1}
BASE = {"args": ARGS, "vit": VIT_1, "bert": BERT_1}
MED = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "encoder_width": 24,
    "max_position_embeddings": 40,
}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 50, "enc_token_id": 51, "len": 52}
BLIP = {
    "med_config": MED,
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "tokenizer": TOKENS,
    "prompt_ids": [1, 7, 9, 2],
}
QUERIES, PLACEHOLDER = 3, 49
FEW = {"max_new_tokens": 6}

Inputs = dict[str, Tensor]


def texts(n: int, left: bool, length: int = 6, pad: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, length] of lengths from 1 to `length`, padded on one side."""
    mask = (torch.arange(length) < (torch.arange(n)[:, None] % length) + 1).long()
    mask = mask.flip(1) if left else mask
    return torch.randint(3, 39, (n, length)).where(mask == 1, pad), mask


def pixels(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def of_mmfuse(name: str, config: dict[str, Any]) -> nn.Module:
    return models.create(name, config)


def of_transformers(name: str, config: Any) -> nn.Module:
    return getattr(transformers, name)(config)


def hf_blip2(text: Any) -> Any:
    return transformers.Blip2Config(
        vision_config=HF_VISION_1, qformer_config=HF_QFORMER_1, text_config=text, num_query_tokens=QUERIES,
        image_token_index=PLACEHOLDER,
    )  # fmt: skip


def hf_prompt(n: int) -> Inputs:
    """Placeholders of the image before a text, padding on the left of both."""
    ids, mask = texts(n, left=True)
    images = torch.full((n, QUERIES), PLACEHOLDER)
    mask, order = torch.cat([mask, torch.ones_like(images)], dim=1).sort(dim=1, stable=True)
    return {
        "pixel_values": pixels(n),
        "input_ids": torch.cat([ids, images], dim=1).gather(1, order),
        "attention_mask": mask,
    }


def instruction(n: int, names: tuple[str, str]) -> Inputs:
    return dict(zip(names, texts(n, left=False, length=5, pad=0), strict=True))


def of_words(n: int, left: bool = True) -> Inputs:
    return {"image": pixels(n), **dict(zip(("ids", "mask"), texts(n, left), strict=True))}


def chats(n: int) -> Inputs:
    """Up to two images in a prompt, padded on the right."""
    ids, mask = texts(n, left=False)
    ids = ids.where(mask == 1, PADDING)
    ids[:, 0] = IMAGE
    ids[::3, 2] = torch.where(mask[::3, 2] == 1, IMAGE, PADDING)
    return {"image": torch.randn(n, 2, 3, 16, 16), "prompt_ids": ids}


# how a model is made, n prompts for it, and how to generate
Case = tuple[Callable[[], nn.Module], Callable[[int], Inputs], dict[str, Any]]

CASES: dict[str, Case] = {
    "blip": (lambda: of_mmfuse("blip", BLIP | {"variant": "caption", "config": {"image_size": 16}}),
             lambda n: {"image": pixels(n)}, {"num_beams": 1, "max_length": 12}),
    "blip-vqa": (lambda: of_mmfuse("blip", BLIP | {"variant": "vqa", "config": {"image_size": 16}}),
                 lambda n: {"image": pixels(n), **instruction(n, ("question_ids", "question_mask"))}, {"num_beams": 1}),
    "blip2-opt": (lambda: of_mmfuse("blip2", BASE | {"class": "Blip2OPT", "opt": OPT}), of_words, FEW),
    "blip2-t5": (lambda: of_mmfuse("blip2", BASE | {"class": "Blip2T5", "t5": T5}), of_words, FEW),
    "instructblip-vicuna": (
        lambda: of_mmfuse("instructblip", BASE | {"class": "Blip2VicunaInstruct", "llama": LLAMA,
                          "tokens": {"bert": {"size": 40}, "llm": {"pad": 50, "eos": 2}}}),
        lambda n: of_words(n, left=False) | instruction(n, ("qformer_ids", "qformer_mask")), FEW),
    "minigpt4": (
        lambda: of_mmfuse("minigpt4", BASE | {"class": "MiniGPT4", "llama": LLAMA, "tokens": {"pad": 9, "bos": 1}}),
        chats, FEW),
    "hf-blip": (
        lambda: of_transformers("BlipForConditionalGeneration", transformers.BlipConfig(
            text_config=MED | {"encoder_hidden_size": 16, "bos_token_id": 48, "sep_token_id": 2, "pad_token_id": 0},
            vision_config=HF_VISION_1)),
        lambda n: {"pixel_values": pixels(n), "input_ids": texts(n, left=False, length=4)[0],
                   "attention_mask": torch.ones(n, 4, dtype=torch.long)}, FEW),
    "hf-blip2-opt": (
        lambda: of_transformers("Blip2ForConditionalGeneration", hf_blip2(transformers.OPTConfig(**OPT))),
        hf_prompt, FEW),
    "hf-blip2-t5": (
        lambda: of_transformers("Blip2ForConditionalGeneration", hf_blip2(transformers.T5Config(**T5))),
        hf_prompt, FEW),
    "hf-instructblip": (
        lambda: of_transformers("InstructBlipForConditionalGeneration", transformers.InstructBlipConfig(
            vision_config=HF_VISION_1, qformer_config=HF_QFORMER_1 | {"model_type": "instructblip_qformer"},
            text_config=transformers.LlamaConfig(**LLAMA), num_query_tokens=QUERIES, image_token_index=PLACEHOLDER)),
        lambda n: hf_prompt(n) | instruction(n, ("qformer_input_ids", "qformer_attention_mask")), FEW),
}  # fmt: skip


# one of each kind of decoder; MMFUSE_EXPORT=all takes all of them
NAMES = list(CASES) if os.environ.get("MMFUSE_EXPORT") == "all" else ["blip", "blip2-opt", "hf-blip", "hf-blip2-t5"]


@cache
def model(name: str) -> Any:
    """With weights that give words of their own to every prompt."""
    torch.manual_seed(0)
    made = CASES[name][0]().eval()
    for p in made.parameters():
        if p.dim():
            p.data.add_(0.2 * torch.randn_like(p))
    return made


@cache
def prompts(name: str, n: int = 100) -> Inputs:
    torch.manual_seed(1)
    return CASES[name][1](n)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    root = tmp_path_factory.mktemp("generation")

    @cache
    def export(name: str) -> Path:
        return export_for_generation(model(name), prompts(name, 1), root / name)

    yield export


FRESH = """
import json, sys
import torch
from torch import nn
from safetensors.torch import load_file
import onnxruntime
from mmfuse.export import load

def refused(self, *args, **kwargs):
    raise RuntimeError("a model is being made")

directory, prompts, out, how = sys.argv[1:]
generator = load(directory)
nn.Module.__init__ = refused
counts, run = {}, onnxruntime.InferenceSession.run
sessions = generator.sessions.sessions
names, one = {id(s): part for part, s in sessions.items()}, sessions["prefill"] is sessions["decode"]

def counted(self, outputs, feed):
    part = names[id(self)]
    if part == "decode" and one and not feed["past.0"].shape[2]:
        part = "prefill"
    counts[part] = counts.get(part, 0) + 1
    return run(self, outputs, feed)

onnxruntime.InferenceSession.run = counted
words = generator.generate(**load_file(prompts), **json.loads(how))
json.dump({"words": words.tolist(), "runs": counts}, open(out, "w"))
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_says_what_the_model_says(name: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    """Greedy, 100 prompts, by files alone: each part runs once, the decoder once for a word."""
    directory, given, how = exported(name), prompts(name), CASES[name][2]
    assert {path.suffix for path in directory.iterdir()} == {".onnx", ".bin", ".json"}
    assert not any(path.read_bytes().startswith((b"PK", b"\x80\x02")) for path in directory.iterdir())
    safetensors.save_file({key: t.contiguous() for key, t in given.items()}, tmp_path / "prompts")
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", FRESH, str(directory), str(tmp_path / "prompts"), str(out), json.dumps(how)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, words = json.loads(out.read_text()), model(name).generate(**given, **how)
    assert found["words"] == words.tolist()
    assert len({tuple(row) for row in found["words"]}) > 10, "the prompts have no words of their own"
    prompt = {"blip": 3, "blip-vqa": 1, "hf-blip": 3, "hf-instructblip": 9, "hf-blip2-opt": 9}
    steps = words.shape[1] - prompt.get(name, int("t5" in name))
    # of a decoder-only model, the run of the prompt gives the first word
    one = name.endswith(("opt", "vicuna", "minigpt4", "hf-instructblip"))
    once = {"blip": ["vision"], "hf-blip": ["vision"], "blip-vqa": ["vision", "question"]}
    parts = [*once.get(name, ["vision", "qformer", "projection"]), "prefill"]
    assert found["runs"] == dict.fromkeys(parts, 1) | {"decode": steps - one}


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "blip": [{}, {"sample": True}, {"repetition_penalty": 1.3, "num_beams": 4, "min_length": 1}],
    "hf": [
        {**FEW, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {**FEW, "do_sample": True, "top_p": 0.9, "temperature": 0.7, "num_return_sequences": 2},
        {**FEW, "num_beams": 2, "do_sample": True},
        {**FEW, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[5]]},
        {"max_length": 24, "min_length": 2},
        {},
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_take_words(name: str, exported: Callable[[str], Path]) -> None:
    generator, given = load(exported(name)), {key: t[:4] for key, t in prompts(name).items()}
    ways = [{"num_beams": 1}, {"max_length": 5}] if name == "blip-vqa" else OPTIONS["blip" if name == "blip" else "hf"]
    for how in ways:
        torch.manual_seed(3)
        want = model(name).generate(**given, **how)
        torch.manual_seed(3)
        assert torch.equal(generator.generate(**given, **how), want), how
    alone = {key: t[1:2] for key, t in given.items()}
    assert torch.equal(generator.generate(**alone), model(name).generate(**alone))


def test_bytes_of_images(tmp_path: Path) -> None:
    """Of an accelerated model, which takes them; other pixels then are refused."""
    made = copy.deepcopy(model("hf-blip"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    with mmfuse.accelerate(made, uint8=((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))):
        export_for_generation(made, {"pixel_values": images}, tmp_path / "out")
        want = made.generate(pixel_values=images, **FEW)
    generator = load(tmp_path / "out")
    assert generator.sessions.sessions["vision"].get_inputs()[0].type == "tensor(uint8)"
    assert torch.equal(generator.generate(pixel_values=images, **FEW), want)
    with pytest.raises(ValueError, match=r"pixel_values is torch.float32, expected torch.uint8"):
        generator.generate(pixel_values=images.float(), **FEW)


def test_what_the_graphs_do_not_have_is_refused(exported: Callable[[str], Path]) -> None:
    generator, given = load(exported("blip2-opt")), prompts("blip2-opt", 2)
    for name, value in (("output_attentions", True), ("prompt_lookup_num_tokens", 3), ("prefill_chunk_size", 2)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected none"):
            generator.generate(**given, **{name: value})
    with pytest.raises(ValueError, match="num_beens"):
        generator.generate(**given, num_beens=3)


def test_the_bench_compares_words_first(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmfuse.bench.suites import generation

    monkeypatch.setattr(generation, "_TURNS", 1)
    monkeypatch.setattr(generation, "_WORDS", 4)
    monkeypatch.setattr(generation, "_prompts", lambda: prompts("blip2-opt", 4))
    monkeypatch.setattr("mmfuse.export.export_for_generation", lambda *_: exported("blip2-opt"))
    for made, same in ((model("blip2-opt"), True), (copy.deepcopy(model("blip2-opt")), False)):
        if not same:
            for p in made.parameters():
                p.data.neg_()
        monkeypatch.setattr(generation, "_model", lambda made=made: made)
        assert generation.run(argparse.Namespace(json=True)) == int(not same)
        found = json.loads(capsys.readouterr().out)
        assert found["same_words"] == same and set(found["words_per_second"]) == {"eager", "onnxruntime"}
