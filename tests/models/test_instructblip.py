from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.models.blip2 import convert
from mmfuse.models.blip2.language import in_order, sample_losses
from mmfuse.models.instructblip import Vicuna
from tiny import ARGS, BERT, HF_QFORMER, HF_VISION, LLAMA, T5_SIZES, VIT

allow_torchvision()

TOKENS = {"bert": {"size": 40}, "llm": {"pad": 50, "eos": 2}}
VICUNA = {
    "class": "Blip2VicunaInstruct",
    "args": ARGS,
    "vit": VIT,
    "bert": BERT,
    "tokens": TOKENS,
    "llama": LLAMA,
}
T5 = {"class": "Blip2T5Instruct", "args": ARGS, "vit": VIT, "bert": BERT, "tokens": TOKENS, "t5": T5_SIZES}


def make(config: dict[str, Any], **args: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config["args"] |= args
    model = models.create("instructblip", config).double().eval()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


def text(lengths: list[int], pad: int) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 39, mask.shape).where(mask == 1, pad), mask


def image(size: int = 2) -> Tensor:
    return torch.randn(size, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("flan-t5-xl", 187.3), ("flan-t5-xxl", 188.8), ("vicuna-7b", 188.8), ("vicuna-13b", 189.6)],
)
def test_parameter_counts_of_the_models_page(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.create("instructblip", preset)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == millions


def test_padding_between_instruction_and_answer_is_moved_behind() -> None:
    model: Vicuna = make(VICUNA)
    ids, mask = torch.tensor([[2, 7, 8], [2, 9, 50]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    output_ids, output_mask = torch.tensor([[2, 5, 2], [2, 6, 50]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    tokens, seen, labels = model.words(ids, mask, output_ids, output_mask)
    assert tokens.tolist() == [[2, 7, 8, 5, 2], [2, 9, 6, 50, 50]]
    assert seen.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 5, 2], [-100, -100, 6, -100, -100]]


def test_padding_changes_no_answer() -> None:
    model: Vicuna = make(VICUNA)
    pixels, instruction, prompt, output = image(), text([5, 3], 0), text([4, 2], 50), text([4, 3], 50)
    both = model(pixels, *instruction, *prompt, *output)
    parts = [t[1:, :n] for (t, n) in zip((*instruction, *prompt, *output), (3, 3, 2, 2, 3, 3), strict=True)]
    alone = model(pixels[1:], *parts)
    queries = model.query_tokens.shape[1]
    torch.testing.assert_close(both.logits[1:, : queries + 4], alone.logits)
    labels = model.prompt(model.image_prompt(pixels, *instruction), *prompt, *output).labels
    means, counts = sample_losses(both.logits, labels), (labels[:, 1:] != -100).sum(1)
    mean = (means * (labels.shape[1] - 1)).sum() / counts.sum()
    torch.testing.assert_close(mean.to(both.loss.dtype), both.loss)


@pytest.mark.parametrize("config", [VICUNA, T5])
def test_frames_of_a_video_are_seen_one_by_one(config: dict[str, Any]) -> None:
    model, instruction = make(config), text([5, 3], 0)
    video = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    frames = [model.image_prompt(frame, *instruction) for frame in video.unbind(2)]
    torch.testing.assert_close(model.image_prompt(video, *instruction), torch.cat(frames, dim=1))


@pytest.mark.parametrize("config", [VICUNA, T5])
def test_answers_are_generated(config: dict[str, Any]) -> None:
    model, instruction, prompt = make(config), text([5, 3], 0), text([4, 2], 0)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    new = model.generate(image(), *instruction, *prompt, **how)
    assert new.shape == (2, 4 + (config is T5))
    alone = model.generate(image_of := image(1), *(t[:1] for t in (*instruction, *prompt)), **how)
    repeated = model.generate(image_of.expand(2, -1, -1, -1), *instruction, *prompt, **how)
    assert torch.equal(alone[0], repeated[0])


def test_without_the_instruction_the_queries_see_the_image_alone() -> None:
    model, (ids, mask) = make(VICUNA, qformer_text_input=False), text([5, 3], 0)
    pixels = image()
    torch.testing.assert_close(model.image_prompt(pixels, ids, mask), model.llm_proj(model.query(pixels)))


def test_rows_in_order() -> None:
    t = torch.arange(6).view(1, 3, 2)
    assert in_order(t, torch.tensor([[2, 0, 2]])).tolist() == [[[2, 3], [0, 1], [4, 5]]]


def test_vicuna_as_transformers_instructblip() -> None:
    instructblip = pytest.importorskip("transformers.models.instructblip")
    model: Vicuna = make(VICUNA | {"ln_vision_eps": 1e-6})
    config = instructblip.InstructBlipConfig(
        vision_config=HF_VISION,
        qformer_config=HF_QFORMER,
        text_config={"model_type": "llama", **LLAMA, "vocab_size": 51},
        num_query_tokens=3,
        image_token_index=49,
    )
    theirs = instructblip.InstructBlipForConditionalGeneration(config).double().eval()
    theirs.load_state_dict(convert.to_transformers(model.state_dict(), instruct=True))
    pixels, instruction, (ids, mask) = image(), text([5, 3], 0), text([4, 4], 50)
    found = theirs(
        pixels,
        qformer_input_ids=instruction[0],
        qformer_attention_mask=instruction[1],
        input_ids=torch.cat([torch.full((2, 3), 49), ids], dim=1),
        attention_mask=torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], dim=1),
    )
    nothing = ids[:, :1], mask[:, :1]
    # its RMSNorm rounds to float32
    ulp = torch.finfo(torch.float32).eps * found.logits.abs().max().item()
    torch.testing.assert_close(
        model(pixels, *instruction, ids, mask, *nothing).logits, found.logits, rtol=0, atol=4 * ulp
    )


def test_create_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"class is 'Vicuna', expected one of Blip2T5Instruct, Blip2VicunaInstruct"):
        models.create("instructblip", VICUNA | {"class": "Vicuna"})
    with pytest.raises(ValueError, match=r"config has no t5, expected the language model's config"):
        models.create("instructblip", VICUNA | {"class": "Blip2T5Instruct"})
