"""ERNIE 4.5 VL's mixture of experts, a bank for words and one for images, without Boolean masks over all numbers.

transformers looks in every layer for a token of an image, and takes rows by masks [B, S, D], whose numbers it counts,
four times. Here the rows are sorted by bank, in an order that all layers share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmfuse.kernels import Routing

# of the token types of a batch, with their version and on a CPU their values
_ROUTINGS: Any = WeakTensorKeyDictionary()


def forward(block: Any, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The banks are called as they are, on the same rows; its own forward runs in a graph and for words alone."""
    types = moe_mm_token_type_ids
    if types is None or torch.compiler.is_compiling():
        return type(block).forward(block, hidden_states, types)
    routing, words = _routing(types)
    if words == types.numel():
        return type(block).forward(block, hidden_states)
    shared = None if block.shared_experts is None else block.shared_experts(hidden_states)
    rows = routing.pack(hidden_states.flatten(0, 1))
    found = [bank(part.flatten()) for bank, part in ((block.text_moe, rows[:words]), (block.vision_moe, rows[words:]))]
    y, logits = (
        routing.unpack(torch.cat([t.view(-1, n) for t in of]))
        for of, n in zip(zip(*found, strict=True), (hidden_states.shape[2], block.num_experts), strict=True)
    )
    y = y.view_as(hidden_states)
    return (y if shared is None else y + shared), logits


def _routing(types: Tensor) -> tuple[Routing, int]:
    """Words first, then images and videos, and how many words there are, which the host reads once for a batch."""
    version = None if types.is_inference() else types._version
    known, values, routing, words = _ROUTINGS.get(types, (None, None, None, 0))
    # a version does not count what is written by numpy, or through `.data`; on a GPU a look would wait for it
    same = known is not None and known == version and (values is None or torch.equal(values, types))
    if routing is None or not same:
        routing = Routing.from_ids(types.flatten().bool().long(), 2)
        words = int(routing.offsets[1])
        _ROUTINGS[types] = version, types.detach().clone() if types.is_cpu else None, routing, words
    return routing, words
