"""Captions from BEiT-3, one word at a time: no key or value is computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.kernels.multiway.routing import Part, Routing
from mmfuse.models.beit3.encoder import LANGUAGE, VISION

if TYPE_CHECKING:
    from mmfuse.models.beit3.model import BEiT3ForTasks

# a beam search looks at so many continuations of each beam
_CANDIDATES = 3


class Captions(NamedTuple):
    ids: Tensor  # [B, T]: the class token, words, the empty slot after them, the end, padding
    scores: Tensor  # [B]: log-probability over length^penalty


class Captioner:
    """The logits of the word that comes next in the caption of an image.

        captioner = Captioner(model, image)
        logits = captioner(cls)                       # [B, 2, V], after ids [B, 1]: of that word, and of the next one
        logits = captioner(logits[:, 1:].argmax(-1))

    A word is predicted where the mask token stands, which is not kept. The image does not see the caption, so that its
    keys and values are computed once.

    Args:
        image: [B, C, H, W].
        beams: captions per image; ids then are [B * beams, n].
    """

    def __init__(self, model: BEiT3ForTasks, image: Tensor, beams: int = 1):
        self.model, encoder = model, model.beit3
        (tokens,) = encoder.embed(image=image)
        routing = Routing.of([Part(VISION, *tokens.shape[:2])], 2, device=image.device)
        x, self.past = tokens.flatten(0, 1), list[tuple[Tensor, Tensor]]()
        for layer in encoder.layers:
            _, *pair = layer.project(x, routing)
            k, v = (t.unflatten(0, tokens.shape[:2]).transpose(1, 2).repeat_interleave(beams, 0) for t in pair)
            self.past.append((k, v))
            x = layer(x, routing)
        self.rows, self.words = len(image) * beams, 0

    def reorder(self, rows: Tensor) -> None:
        """Continue caption `rows[i]` as caption i, as a beam search does."""
        self.past = [(k[rows], v[rows]) for k, v in self.past]

    def __call__(self, ids: Tensor) -> Tensor:
        """Append words [rows, n]: logits [rows, n + 1, V] of what stands there and of what follows."""
        n = ids.shape[1]
        encoder, mask = self.model.beit3, ids.new_full((self.rows, 1), self.model.token_ids["mask"])
        (x,) = encoder.embed(text_ids=torch.cat([ids, mask], dim=1), start=self.words)
        routing = Routing.of([Part(LANGUAGE, self.rows, n + 1)], 2, device=ids.device)
        x, seen = x.flatten(0, 1), self.past[0][0].shape[2]
        causal = torch.ones(n + 1, seen + n + 1, dtype=torch.bool, device=ids.device).tril(seen)
        for i, layer in enumerate(encoder.layers):
            q, k, v = (t.unflatten(0, (self.rows, n + 1)).transpose(1, 2) for t in layer.project(x, routing))
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past[i], (k, v), strict=True))
            self.past[i] = k[:, :, :-1], v[:, :, :-1]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2).flatten(0, 1), routing)
        self.words += n
        x = x if encoder.norm is None else encoder.norm(x, routing)
        return self.model.word_head(x).unflatten(0, (self.rows, n + 1))


@torch.no_grad()
def generate(model: BEiT3ForTasks, image: Tensor) -> Captions:
    """The best captions of images by beam search, as unilm's: model.num_beams of at most model.max_words ids each.

    A hypothesis ends with the empty slot of the word to come, which its length counts.
    """
    beams, most, of = model.num_beams, model.max_words, model.token_ids
    batch, captioner = len(image), Captioner(model, image, beams)
    ids = torch.full((batch * beams, most), of["mask"], device=image.device)
    ids[:, 0] = of["cls"]
    scores = torch.zeros(batch, beams, device=image.device)
    scores[:, 1:] = -1e9  # the beams of an image begin as one
    best: list[tuple[float, Tensor] | None] = [None] * batch
    done = [False] * batch
    for length in range(2, most + 1):
        logits = captioner(ids[:, length - 2 : length - 1])[:, -1]
        vocabulary = logits.shape[1]
        every = (scores.view(-1, 1) + logits.log_softmax(-1)).view(batch, -1)
        found, at = every.topk(_CANDIDATES * beams)
        follow = []
        for b in range(batch):
            top = best[b]
            done[b] = done[b] or (top is not None and top[0] >= found[b, 0].item() / (most - 1) ** model.length_penalty)
            ahead: list[tuple[float, int, int]] = []
            for score, i in zip(found[b].tolist(), at[b].tolist(), strict=True) if not done[b] else ():
                beam, word = divmod(i, vocabulary)
                if word == of["sep"] or length + 1 == most:
                    score /= length**model.length_penalty
                    if best[b] is None or score > best[b][0]:  # type: ignore[index]
                        best[b] = score, ids[b * beams + beam, :length].clone()
                else:
                    ahead.append((score, word, b * beams + beam))
                if len(ahead) == beams:
                    break
            follow += ahead or [(0.0, of["pad"], 0)] * beams
        if all(done):
            break
        new, words, rows = zip(*follow, strict=True)
        scores = torch.tensor(new, device=image.device).view(batch, beams)
        order = torch.tensor(rows, device=image.device)
        captioner.reorder(order)
        ids = ids[order]
        ids[:, length - 1] = torch.tensor(words, device=image.device)
    captions = ids.new_full((batch, most), of["pad"])
    for b, hypothesis in enumerate(best):
        caption = hypothesis[1]  # type: ignore[index]
        captions[b, : len(caption)] = caption
        captions[b, len(caption)] = of["sep"]
    return Captions(captions, torch.tensor([hypothesis[0] for hypothesis in best], device=image.device))  # type: ignore[index]
