"""Captions from CoCa (Yu et al. 2022, arXiv:2205.01917) one token at a time: no key or value is computed twice.

The modules are taken by open_clip's attribute names, so that `mmfuse.models`' CoCa and open_clip's own both fit.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- a transformer block, by its parts -------------------------------------------------------------------------------


def project(attn: Any, x: Tensor, first: int, last: int) -> list[Tensor]:
    """Queries (0), keys (1) and values (2), `first` to `last` - 1, of x [B, L, W]: each [B, heads, L, W / heads]."""
    width = attn.out_proj.in_features
    rows = slice(first * width, last * width)
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias[rows]
    x = F.linear(x, attn.in_proj_weight[rows], bias).unflatten(-1, (last - first, attn.num_heads, -1))
    return list(x.permute(2, 0, 3, 1, 4).unbind())


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q [B, heads, L, d] to k and v [B, heads, K, d], projected: [B, L, W]."""
    if isinstance(attn, nn.MultiheadAttention):
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return attn.out_proj(x.transpose(1, 2).flatten(2))
    x = F.scaled_dot_product_attention(attn.ln_q(q), attn.ln_k(k), v, attn_mask=mask, is_causal=causal)
    if attn.head_scale is not None:
        x = x * attn.head_scale
    return attn.out_proj(attn.ln_inner(x.transpose(1, 2).flatten(2)))


def residual(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a pre-norm block, from the output of its attention to `ln_1(x)`."""
    if hasattr(block, "ln_attn"):
        attended = block.ln_attn(attended)
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def visible_keys(text: Any, ids: Tensor) -> Tensor:
    """Which of ids [B, L] and the class token after them may be attended to: [B, L + 1].

    Published weights were trained with this mask shifted by one: key 0 is always seen, key j if id j - 1 is no padding.
    """
    valid, always = ids != text.pad_id, ids.new_ones(ids.shape[0], 1, dtype=torch.bool)
    return torch.cat([valid, always] if text.correct_cls_mask else [always, valid], dim=1)


# --- decoding --------------------------------------------------------------------------------------------------------


class CaptionDecoder:
    """The logits of a CoCa's next token, step by step.

        decoder = CaptionDecoder(model, model(image)["image_embs"])
        logits = decoder(ids)                   # [B, V], after ids [B, n]
        logits = decoder(logits.argmax(-1, keepdim=True))

    The image tokens are projected to keys and values once, and those of the caption are kept. The class token of the
    text tower is left out: no caption token sees it. A text tower without causal mask cannot keep anything of the
    caption, and is run again on all of it.

    Args:
        model: with open_clip's `text` and `text_decoder`.
        image_tokens: [B, S, W].
        beams: captions per image; ids then are [B * beams, n], and the keys of an image are not repeated.
    """

    def __init__(self, model: Any, image_tokens: Tensor, beams: int = 1) -> None:
        self.text, self.decoder, self.beams = model.text, model.text_decoder, beams
        self.causal = model.text.attn_mask is not None
        self.rows = image_tokens.shape[0] * beams
        self.length = min(self.text.context_length, self.decoder.context_length)
        self.image = [project(block.attn, block.ln_1_kv(image_tokens), 1, 3) for block in self.decoder.cross_attn]
        self.clear()

    def clear(self) -> None:
        """Forget the caption."""
        self.ids = self.image[0][0].new_zeros(self.rows, 0, dtype=torch.long)
        self.past: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def reorder(self, rows: Tensor) -> None:
        """Continue row `rows[i]` as row i, as a beam search does."""
        self.ids = self.ids[rows]
        self.past = {block: (k[rows], v[rows]) for block, (k, v) in self.past.items()}

    def __call__(self, ids: Tensor) -> Tensor:
        """Append ids [rows, n] to the captions: the logits [rows, V] of what follows."""
        if not self.causal:
            self.past = {}
        start = self.ids.shape[1] if self.causal else 0
        self.ids = torch.cat([self.ids, ids], dim=1)
        if self.ids.shape[1] > self.length:
            raise ValueError(f"the captions have {self.ids.shape[1]} tokens, expected at most {self.length}")
        x = self._text(start)
        rows, new, width = x.shape
        causal = _causal(start, new, x.device)
        for block, cross, (k, v) in zip(self.decoder.resblocks, self.decoder.cross_attn, self.image, strict=True):
            x = self._step(block, x, causal)
            # the beams of an image are so many more queries
            x = x.reshape(rows // self.beams, self.beams * new, width)
            (q,) = project(cross.attn, cross.ln_1(x), 0, 1)
            x = residual(cross, x, attend(cross.attn, q, k, v)).view(rows, new, width)
        return self.decoder.ln_final(x[:, -1]) @ self.decoder.text_projection

    def _text(self, start: int) -> Tensor:
        """The text tower's tokens from position `start` on."""
        text, ids = self.text, self.ids
        if not self.causal:
            return text(ids)[1]
        new = ids[:, start:]
        dtype = text.transformer.resblocks[0].mlp.c_fc.weight.dtype
        x = text.token_embedding(new).to(dtype) + text.positional_embedding[start : ids.shape[1]].to(dtype)
        mask = _causal(start, new.shape[1], x.device)
        if text.cls_emb is not None:
            visible = visible_keys(text, ids)[:, None, None, : ids.shape[1]]
            mask = visible if mask is None else mask & visible
        for block in text.transformer.resblocks:
            x = self._step(block, x, mask)
        return x if text.cls_emb is not None else text.ln_final(x)

    def _step(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = project(block.attn, block.ln_1(x), 0, 3)
        if block in self.past:
            past_k, past_v = self.past[block]
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        self.past[block] = k, v
        return residual(block, x, attend(block.attn, q, k, v, mask))


def _causal(start: int, new: int, device: torch.device) -> Tensor | None:
    """The keys [new, start + new] that tokens start, start + 1, ... see; None for all, as the last one does."""
    if new == 1:
        return None
    return torch.ones(new, start + new, dtype=torch.bool, device=device).tril(start)


# --- search ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Any,
    image: Tensor,
    text: Tensor | None = None,
    seq_len: int = 30,
    max_seq_len: int = 77,
    temperature: float = 1.0,
    generation_type: str = "beam_search",
    top_p: float = 0.1,
    top_k: int = 1,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    sot_token_id: int | None = None,
    num_beams: int = 6,
    num_beam_groups: int = 3,
    min_seq_len: int = 5,
    repetition_penalty: float = 1.0,
    fixed_output_length: bool = False,
    draws: Tensor | None = None,
) -> Tensor:
    """Captions of images, as open_clip's `CoCa.generate` gives them. transformers is not needed.

    Args:
        model: a CoCa of `mmfuse.models` or of open_clip.
        image: [B, 3, H, W].
        text: captions [B, L] (or [L]) to continue, when sampling; by default the start token alone.
        seq_len: tokens of the longest caption, start and end included.
        max_seq_len: tokens that the model is shown when sampling, the last ones.
        temperature: divides the logits that "top_p" or "top_k" left.
        generation_type: "top_k" (with the default `top_k=1`: greedy), "top_p" or "beam_search".
        pad_token_id, eos_token_id, sot_token_id: by default the model's `pad_id`, 49407 and 49406.
        num_beams, num_beam_groups: open_clip's groups do not see each other, so each finds the same captions; one
            group of num_beams / num_beam_groups beams is run. A beam's score is the sum of its logits.
        min_seq_len: the end token is not taken before.
        repetition_penalty: divides positive logits of the tokens that are there already, and multiplies negative ones.
        fixed_output_length: pad to [B, seq_len].
        draws: uniform numbers [B, steps] in [0, 1) to sample with; by default torch's generator is used as open_clip
            does, so that a seed gives the same caption.

    Returns:
        Token ids [B, T], T <= seq_len.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if seq_len <= min_seq_len:
        raise ValueError(f"seq_len is {seq_len}, expected more than min_seq_len = {min_seq_len}")
    sot, eos = (49406 if sot_token_id is None else sot_token_id), (49407 if eos_token_id is None else eos_token_id)
    pad = model.pad_id if pad_token_id is None else pad_token_id

    process = partial(constrain, eos=eos, min_length=min_seq_len, repetition_penalty=repetition_penalty)
    if generation_type == "beam_search":
        if num_beams <= 1 or num_beam_groups < 1 or num_beams % num_beam_groups:
            raise ValueError(
                f"num_beams is {num_beams} in {num_beam_groups} groups, expected 2 or more, and a multiple"
            )
        beams = num_beams // num_beam_groups
        start = torch.full((image.shape[0] * beams, 1), sot, device=image.device)
        decoder = CaptionDecoder(model, model(image)["image_embs"], beams)
        out = beam_search(decoder, start, process, seq_len, eos, pad)
        return F.pad(out, (0, seq_len - out.shape[1]), value=pad) if fixed_output_length else out
    if generation_type not in ("top_k", "top_p"):
        raise ValueError(f"generation_type is {generation_type!r}, expected 'top_k', 'top_p' or 'beam_search'")
    if top_k < 1 or not 0 <= top_p <= 1:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}, expected at least 1 and a number in [0, 1]")
    decoder = CaptionDecoder(model, model(image)["image_embs"])
    out = torch.full((image.shape[0], 1), sot, device=image.device) if text is None else torch.atleast_2d(text)
    if out.shape[0] != image.shape[0]:
        raise ValueError(f"text has {out.shape[0]} captions, expected {image.shape[0]} as image")
    for step in range(max(1, seq_len - out.shape[1])):
        going = (out[:, -1] != eos) & (out[:, -1] != pad)
        if not going.any():
            break
        logits = _next_logits(decoder, out, max_seq_len)[going]
        sample = torch.full_like(out[:, :1], pad)
        if min(out.shape[1], max_seq_len) + 1 == seq_len:
            sample[going] = eos
        else:
            logits = process(out[going, -max_seq_len:], logits)
            logits = keep_top_k(logits, top_k) if generation_type == "top_k" else keep_top_p(logits, top_p)
            probs = F.softmax(logits / temperature, dim=-1)
            sample[going] = torch.multinomial(probs, 1) if draws is None else draw(probs, draws[going, step])
        out = torch.cat([out, sample], dim=1)
    if fixed_output_length:
        out = F.pad(out, (0, max(0, seq_len - out.shape[1])), value=pad)
    return out.squeeze(0) if text is not None and text.dim() == 1 else out


def constrain(ids: Tensor, logits: Tensor, eos: int, min_length: int, repetition_penalty: float) -> Tensor:
    """Logits [rows, V] of what follows ids [rows, T], as `min_seq_len` and `repetition_penalty` of `generate` say."""
    if ids.shape[1] < min_length:
        logits = logits.clone()
        logits[:, eos] = -math.inf
    if repetition_penalty != 1.0:
        seen = logits.gather(1, ids)
        seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
        logits = logits.scatter(1, ids, seen)
    return logits


def _next_logits(decoder: CaptionDecoder, ids: Tensor, window: int) -> Tensor:
    """The logits after ids [rows, T], of which the decoder has seen all but the last, and is shown `window`."""
    if ids.shape[1] > window:  # every position has changed
        decoder.clear()
    return decoder(ids[:, -window:][:, decoder.ids.shape[1] :])


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest; the others become -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable tokens that have `p` together; the others become -inf."""
    ascending, order = logits.sort(descending=False)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -1] = False
    return logits.masked_fill(remove.scatter(1, order, remove), -math.inf)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token [rows, 1] whose share of [0, 1] holds `uniform` [rows]."""
    ends = probs.float().cumsum(-1)
    token = torch.searchsorted(ends, (uniform[:, None] * ends[:, -1:]).float(), right=True)
    return token.clamp(max=probs.shape[-1] - 1)


def beam_search(decoder, ids, process, length, eos, pad, count_end=True):  # type: ignore[no-untyped-def]
    """The best caption [B, T <= length] of each image, as transformers' `BeamSearchScorer` keeps the finished ones.

    decoder: has `beams` = n, `reorder` and the call of a `CaptionDecoder`.
    ids: the start tokens [B * n, P].
    process: process(ids, logits) -> the scores [B * n, V], whose sum over its length is a caption's.
    count_end: whether a caption's length counts its end token, as transformers does today, or not, as 4.15 did.
    """
    n, device = decoder.beams, ids.device
    b = ids.shape[0] // n
    # all beams start alike, so only the first may be continued
    scores = torch.full((b, n), -1e9, device=device)
    scores[:, 0] = 0
    # the n best finished captions of an image: score per token, tokens and their number
    best = torch.full((b, n), -math.inf, dtype=torch.float64, device=device)
    kept, kept_len = ids.new_full((b, n, length), pad), ids.new_zeros(b, n)
    done = torch.zeros(b, dtype=torch.bool, device=device)
    first = torch.arange(b, device=device)[:, None] * n
    new = ids

    def keep(candidates: Tensor) -> None:
        """Add captions `ids` with the scores [b, n] (-inf: none) where the image is not done."""
        nonlocal best, kept, kept_len
        t = ids.shape[1]
        tokens = F.pad(ids.view(b, n, t), (0, length - t), value=pad)
        every = torch.cat([best, candidates.masked_fill(done[:, None], -math.inf)], dim=1)
        best, order = (x[:, :n] for x in every.sort(dim=1, descending=True, stable=True))
        kept = torch.cat([kept, tokens], dim=1).gather(1, order[..., None].expand(-1, -1, length))
        kept_len = torch.cat([kept_len, torch.full_like(kept_len, t)], dim=1).gather(1, order)

    while ids.shape[1] < length and not done.all():
        logits = process(ids, decoder(new))
        vocab = logits.shape[-1]
        total = (logits.view(b, n, vocab) + scores[..., None]).flatten(1)
        score, token = total.topk(2 * n)  # [b, 2n]: enough where every beam ends
        beam, token = token // vocab, token % vocab
        ends = token == eos
        new_len = ids.shape[1] + count_end
        # an end among the n best finishes its beam
        finished = torch.full_like(best, -math.inf).scatter_reduce(
            1, beam[:, :n], torch.where(ends[:, :n], score[:, :n] / new_len, -math.inf).to(best), "amax"
        )
        keep(finished)
        done = done | (~best.isinf().any(1) & (best[:, -1] >= score[:, 0] / new_len))
        # the n best others go on
        order = ends.sort(dim=1, stable=True).indices[:, :n]
        scores, beam, token = score.gather(1, order).float(), beam.gather(1, order), token.gather(1, order)
        rows = (first + beam).flatten()
        decoder.reorder(rows)
        new = token.flatten()[:, None]
        ids = torch.cat([ids[rows], new], dim=1)
    keep(scores / ids.shape[1])
    winner, size = kept[:, 0], kept_len[:, :1]
    longest = min(int(size.max()) + 1, length)
    # the end token, where it fits in
    winner = torch.cat([winner, winner[:, :1]], dim=1).scatter(1, size, eos)
    return winner[:, :longest]
