"""open_clip's CoCa at random weights, and its `generate` also where transformers has no `BeamSearchScorer` any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

START, END, VOCAB = 38, 39, 40
SAY = {"sot_token_id": START, "eos_token_id": END, "seq_len": 14, "min_seq_len": 3}


def config(vision: dict | None = None, text: dict | None = None, multimodal: dict | None = None, **more: Any) -> dict:
    """A small model of odd sizes; the arguments change it."""
    return {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 20,
            "layers": 2,
            "width": 30,
            "head_width": 10,
            "patch_size": 5,
            "attentional_pool": True,
            "attn_pooler_queries": 7,
            "attn_pooler_heads": 3,
            "output_tokens": True,
        }
        | (vision or {}),
        "text_cfg": {
            "context_length": 15,
            "vocab_size": VOCAB,
            "width": 24,
            "heads": 3,
            "layers": 2,
            "embed_cls": True,
            "output_tokens": True,
        }
        | (text or {}),
        "multimodal_cfg": {"context_length": 14, "width": 24, "heads": 2, "layers": 2} | (multimodal or {}),
    } | more


def official(config: dict) -> nn.Module:
    """open_clip's model, in evaluation; its own initialisation leaves zeros and ones, and images that hardly matter."""
    model = pytest.importorskip("open_clip.coca_model").CoCa(**config)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith("logit_"):
            nn.init.normal_(p, mean=float(p.dim() == 1 and "ln" in name and name.endswith("weight")), std=0.35)
    decoder = model.text_decoder
    with torch.no_grad():
        for block in decoder.cross_attn:
            block.attn.out_proj.weight.mul_(4)
        # negative logits, less so of the end, so that captions of many lengths come first
        decoder.ln_final.bias.fill_(1)
        decoder.text_projection.sub_(0.4)
        decoder.text_projection[:, END].add_(0.1)
    return model.eval()


def batch(config: dict, n: int = 4, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Images, and captions of different lengths with start, end and padding."""
    size = config["vision_cfg"]["image_size"]
    size = (size, size) if isinstance(size, int) else size
    length = length or min(config["text_cfg"]["context_length"], config["multimodal_cfg"]["context_length"])
    text = torch.randint(1, START, (n, length))
    text[:, 0] = START
    for row, end in enumerate(torch.randint(3, length, (n,)).tolist()):
        text[row, end], text[row, end + 1 :] = END, 0
    return torch.randn(n, 3, *size), text


class BeamScorer:
    """`BeamSearchScorer` of transformers 4 with its defaults, in the plainest form."""

    def __init__(self, batch_size: int, num_beams: int, device: object, num_beam_groups: int) -> None:
        self.num_beams, self.num_beam_groups, self.size = num_beams, num_beam_groups, num_beams // num_beam_groups
        self._beam_hyps: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch_size * num_beam_groups)]
        self.done = [False] * len(self._beam_hyps)

    @property
    def is_done(self) -> bool:
        return all(self.done)

    def add(self, which: int, score: float, ids: Tensor) -> None:
        kept = self._beam_hyps[which]
        kept.append((score, ids.tolist()))
        kept.sort(key=lambda caption: -caption[0])
        del kept[self.size :]

    def process(self, ids, scores, tokens, beams, *, eos_token_id, group_index, **ignored):  # type: ignore[no-untyped-def]
        length, chosen = ids.shape[1] + 1, []
        for b, candidates in enumerate(zip(scores.tolist(), tokens.tolist(), beams.tolist(), strict=True)):
            which, others = b * self.num_beam_groups + group_index, []
            for rank, (score, token, beam) in enumerate(zip(*candidates, strict=True)):
                row = b * self.size + beam
                if token != int(eos_token_id):
                    others.append((score, token, row))
                elif rank < self.size and not self.done[which]:
                    self.add(which, score / length, ids[row])
            kept = self._beam_hyps[which]
            self.done[which] |= len(kept) == self.size and kept[-1][0] >= candidates[0][0] / length
            chosen += others[: self.size]
        score, token, row = (torch.tensor(x) for x in zip(*chosen, strict=True))
        return {"next_beam_scores": score, "next_beam_tokens": token, "next_beam_indices": row}

    def finalize(self, ids, scores, *ignored, pad_token_id, eos_token_id, max_length, **more):  # type: ignore[no-untyped-def]
        for row, score in enumerate(scores.tolist()):
            if not self.done[row // self.size]:
                self.add(row // self.size, score / ids.shape[1], ids[row])
        groups = [self._beam_hyps[i : i + self.num_beam_groups] for i in range(0, len(self.done), self.num_beam_groups)]
        best = [max(caption for kept in group for caption in kept)[1] for group in groups]
        longest = min(max(map(len, best)) + 1, max_length)
        best = [[*ids, int(eos_token_id)][:longest] for ids in best]
        return {"sequences": torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids in best])}


def let_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's own generate refuses to run without the names that transformers 5 has given up or moved."""
    coca, transformers = pytest.importorskip("open_clip.coca_model"), pytest.importorskip("transformers")
    if coca._has_transformers:
        return
    generation = transformers.generation
    for name in ("LogitsProcessorList", "RepetitionPenaltyLogitsProcessor", "MinLengthLogitsProcessor"):
        monkeypatch.setattr(coca, name, getattr(generation.logits_process, name), raising=False)
    for name in ("MaxLengthCriteria", "StoppingCriteriaList"):
        monkeypatch.setattr(coca, name, getattr(generation.stopping_criteria, name), raising=False)
    for name in ("top_p", "top_k"):
        warper = f"Top{name[-1].upper()}LogitsWarper"
        monkeypatch.setitem(coca.GENERATION_TYPES, name, getattr(generation.logits_process, warper))
    monkeypatch.setattr(coca, "BeamSearchScorer", BeamScorer, raising=False)
    monkeypatch.setattr(coca, "_has_transformers", True)


GENERATE = {
    "greedy": {"generation_type": "top_k"},
    "top k": {"generation_type": "top_k", "top_k": 5, "temperature": 1.3},
    "top p": {"generation_type": "top_p", "top_p": 0.6},
    "beams": {},
    "one group": {"num_beams": 4, "num_beam_groups": 1},
    "two groups, penalty": {"num_beams": 4, "num_beam_groups": 2, "repetition_penalty": 1.4},
    "many beams": {"num_beams": 10, "num_beam_groups": 1, "min_seq_len": 0},
    "beams, fixed length": {"fixed_output_length": True},
    "greedy, fixed length, penalty": {
        "generation_type": "top_k",
        "fixed_output_length": True,
        "repetition_penalty": 2.0,
    },
    "sliding window": {"generation_type": "top_k", "max_seq_len": 7, "top_k": 3},
    "prompt": {"generation_type": "top_k", "text": torch.tensor([[START, 3, 5], [START, 0, 7], [START, 2, 2]])},
    "one prompt": {"generation_type": "top_k", "text": torch.tensor([START, 4, 9])},
}
