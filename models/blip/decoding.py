"""Texts from the decoder, one word at a time: no key or value is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmfuse.fused.captioning import beam_search
from mmfuse.models.blip.med import BertLMHeadModel, Context

# of the ids so far [rows, T] and the logits [rows, V] of what follows
Process = Callable[[Tensor, Tensor], Tensor]


class CaptionDecoder:
    """The logits of the next word, step by step: the context is projected once, the text's keys and values are kept.

        decoder = CaptionDecoder(model.text_decoder, context)
        logits = decoder(ids)                                   # [B, V], after ids [B, n]
        logits = decoder(logits.argmax(-1, keepdim=True))

    Args:
        beams: texts per context; ids then are [B * beams, n].
    """

    def __init__(self, decoder: BertLMHeadModel, context: Context, beams: int = 1):
        self.decoder, self.context, self.beams = decoder, context, beams
        self.past = [
            tuple(t.new_zeros(len(t) * beams, t.shape[1], 0, t.shape[3]) for t in pair) for pair in context.keys_values
        ]

    def begin(self, prompt: Sequence[int]) -> Tensor:
        """The ids [B * beams, P] of texts that begin with `prompt`."""
        keys, _ = self.past[0]
        return torch.tensor(prompt, device=keys.device).expand(len(keys), -1)

    def reorder(self, rows: Tensor) -> None:
        """Continue text `rows[i]` as text i, as a beam search does."""
        self.past = [(k[rows], v[rows]) for k, v in self.past]

    def __call__(self, ids: Tensor) -> Tensor:
        """Append ids [rows, n]: the logits [rows, V] of what follows."""
        mask = ids.new_ones(len(ids), self.past[0][0].shape[2] + ids.shape[1])
        hidden = self.decoder.hidden(ids, mask, self.context, self.past)
        return self.decoder.cls.predictions.decoder(hidden[:, -1])


def extend(
    decoder: CaptionDecoder, prompt: Sequence[int], choose: Process, max_length: int, tokens: Mapping[str, int]
) -> Tensor:
    """Texts [B, T] of the prompt, what `choose` adds to it, [rows, 1] at a time, up to [SEP], and padding."""
    new = ids = decoder.begin(prompt)
    done = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    while ids.shape[1] < max_length and not done.all():
        new = choose(ids, decoder(new)).masked_fill(done, tokens["pad_token_id"])
        ids = torch.cat([ids, new], dim=1)
        done = done | (new == tokens["sep_token_id"])
    return ids


def search(
    decoder: CaptionDecoder, prompt: Sequence[int], process: Process, max_length: int, tokens: Mapping[str, int]
) -> Tensor:
    """The best text [B, T] that begins with `prompt`, by the decoder's beams, or greedily with one.

    Best is the sum of log-probabilities over the number of tokens, those of the prompt among them, [SEP] not.
    """
    if decoder.beams == 1:
        return extend(
            decoder, prompt, lambda ids, logits: process(ids, logits).argmax(-1, keepdim=True), max_length, tokens
        )

    def score(ids: Tensor, logits: Tensor) -> Tensor:
        return process(ids, logits.log_softmax(-1))

    ends = tokens["sep_token_id"], tokens["pad_token_id"]
    return beam_search(decoder, decoder.begin(prompt), score, max_length, *ends, count_end=False)
