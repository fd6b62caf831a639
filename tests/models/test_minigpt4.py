from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse import models
from mmfuse.models.minigpt4 import IMAGE, PADDING, MiniGPT4
from tiny import BERT, LLAMA, VIT

ARGS = {"img_size": 16, "end_sym": "7 8", "max_txt_len": 8}
V1 = {
    "class": "MiniGPT4",
    "args": ARGS | {"num_query_token": 3},
    "vit": VIT,
    "bert": BERT,
    "llama": LLAMA,
    "tokens": {"pad": 9, "bos": 1},
    "prompt_template": "10 11 {} 12",
}
V2 = {key: value for key, value in V1.items() if key not in ("bert", "prompt_template")} | {
    "class": "MiniGPTv2",
    "args": ARGS | {"lora_r": 2, "chat_template": True, "prompt_template": "10 11 {} 12"},
}


def make(config: dict[str, Any], **args: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config["args"] |= args
    model = models.create("minigpt4", config).double().eval()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("preset", "millions"), [("vicuna-7b", 3.1), ("vicuna-13b", 3.9), ("llama-2-7b", 23.1), ("v2", 56.6)]
)
def test_trainable_parameters_of_the_models_page(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.create("minigpt4", preset)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == millions


def test_texts_with_several_images_or_none() -> None:
    """Against a loop over samples."""
    model: MiniGPT4 = make(V1)
    ids = torch.tensor(
        [[20, IMAGE, 21, 22, IMAGE, 23], [IMAGE, 24, PADDING, PADDING, PADDING, PADDING], [25, 26, 27, 28, 29, 30]]
    )
    prompt = model.image_prompt(images(3, 2))
    embeds, mask = model.wrap(ids, prompt)
    words, pad = model.llama_model.get_input_embeddings(), model.embed(torch.tensor([PADDING]))
    assert embeds.shape[1] == 4 + 2 * 3
    for row, pictures, got, seen in zip(ids, prompt, embeds, mask, strict=True):
        parts, picture = [], iter(pictures)
        for token in row[row != PADDING]:
            parts.append(next(picture) if token == IMAGE else words(token[None]))
        want = torch.cat(parts)
        assert torch.equal(got[: len(want)], want) and torch.equal(got[len(want) :], pad.expand(10 - len(want), -1))
        assert seen.tolist() == [1] * len(want) + [0] * (10 - len(want))


def test_a_conversation_learns_the_answers() -> None:
    model: MiniGPT4 = make(V1, max_txt_len=11)
    no = [PADDING] * 2
    questions = torch.tensor([[[20, IMAGE], [21, 22]], [[IMAGE, PADDING], no]])
    answers = torch.tensor([[[30, PADDING], [31, 32]], [[33, 34], no]])
    turns = model.conversation(questions, answers)
    assert turns.prompt_ids.tolist() == [[10, 11, 20, IMAGE, 12], [10, 11, IMAGE, 12, PADDING]]
    # an answer, its end; bos and the question in the template; an answer, of which the end is too much
    assert turns.ids.tolist() == [
        [30, 7, 8, 1, 10, 11, 21, 22, 12, 31, 32],
        [33, 34, 7, 8] + [PADDING] * 7,
    ]
    assert turns.labels.tolist() == [
        [30, 7, 8] + [-100] * 6 + [31, 32],
        [33, 34, 7, 8] + [-100] * 7,
    ]
    assert model(images(2), *turns).loss.isfinite()


def test_padding_changes_no_loss() -> None:
    model: MiniGPT4 = make(V1)
    pixels = images(2)
    prompts = torch.tensor([[20, IMAGE, 21, 22], [IMAGE, 23, PADDING, PADDING]])
    answers = torch.tensor([[30, 31, 32], [33, PADDING, PADDING]])
    both = model(pixels, prompts, answers)
    one, other = model(pixels[:1], prompts[:1], answers[:1]), model(pixels[1:], prompts[1:, :2], answers[1:, :1])
    torch.testing.assert_close(both.loss, (5 * one.loss + 3 * other.loss) / 8)  # with the end of two tokens


@pytest.mark.parametrize(("config", "learned"), [(V1, ("llama_proj",)), (V2, ("llama_proj", "lora_"))])
def test_what_learns(config: dict[str, Any], learned: tuple[str, ...]) -> None:
    model = make(config).train()
    ids = torch.tensor([[20, IMAGE, 21]])
    model(images(1), ids, torch.tensor([[30, 31]])).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == any(part in name for part in learned), name


def test_prompts_of_different_lengths_are_generated_as_alone() -> None:
    model = make(V2)
    pixels, how = images(2), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompts = torch.tensor([[20, IMAGE, 21, 22], [IMAGE, 23, PADDING, PADDING]])
    both = model.generate(pixels, prompts, **how)
    assert both.shape == (2, 4)
    assert torch.equal(both[1:], model.generate(pixels[1:], prompts[1:, :2], **how))


def test_a_long_prompt_is_cut_off_where_it_is_learned_from() -> None:
    """Behind three rows: the first word and two of an image's; chats are generated from all of it."""
    model, pixels = make(V1, max_context_len=3), images(2)
    prompts, answers = torch.tensor([[20, IMAGE, 21], [22, PADDING, PADDING]]), torch.tensor([[30, 31], [32, 33]])
    loss = model(pixels, prompts, answers).loss
    bos, end = (model.embed(torch.tensor(ids)) for ids in ([1], [7, 8]))
    prompt = model.image_prompt(pixels)
    want = []
    for words, row, answer in (([20], prompt[0, 0, :2], [30, 31]), ([22], prompt[1, 0, :0], [32, 33])):
        first, learned = model.embed(torch.tensor(words)), model.embed(torch.tensor(answer))
        embeds = torch.cat([bos, first, row, learned, end])[None]
        labels = torch.tensor([-100] * (1 + len(words) + len(row)) + answer + [7, 8])[None]
        want.append(model.llama_model(inputs_embeds=embeds, labels=labels).loss)
    torch.testing.assert_close(loss, sum(want) / 2)
    assert model.context(pixels, prompts)[0].shape[1] == 1 + 2 + 3


def test_chats_of_several_turns_and_images_are_generated_as_alone() -> None:
    """As the official chat has them: bos before the first segment, an image between two."""
    model = make(V2)
    pixels, how = images(2, 2), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    prompts = torch.tensor([[10, IMAGE, 11, 12, 30, 31, 7, 10, IMAGE, 13], [10, IMAGE, 14, *[PADDING] * 7]])
    both = model.generate(pixels, prompts, **how)
    for row, ids, own in zip(pixels, prompts, both, strict=True):
        parts, of = [model.embed(torch.tensor([1]))], iter(model.image_prompt(row[None])[0])
        for token in ids[ids != PADDING]:
            parts.append(next(of) if token == IMAGE else model.embed(token[None]))
        alone = model.llama_model.generate(inputs_embeds=torch.cat(parts)[None], **how)
        assert torch.equal(alone[0], own)


def test_create_names_what_does_not_fit() -> None:
    for change, message in (
        ({"class": "MiniGPT"}, r"class is 'MiniGPT', expected one of MiniGPT4, MiniGPTv2"),
        ({"args": {"end_sym": "###"}}, r"end_sym is '###', expected token ids"),
        ({"prompt_template": "10 11"}, r"prompt_template is '10 11', expected token ids with \{\} among them"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("minigpt4", V1 | change)
