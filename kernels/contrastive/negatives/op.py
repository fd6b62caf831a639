"""The public function of hard negatives: argument checks and declaration."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels._runtime import Deferred, Implementation, Operator, Size
from mmfuse.kernels._runtime.arguments import check, integers, require_integer
from mmfuse.kernels.contrastive.arguments import features
from mmfuse.kernels.contrastive.backends import over_tiles
from mmfuse.kernels.contrastive.negatives import draw, reference
from mmfuse.kernels.contrastive.negatives.draw import Candidates

# draws per row that a tile of the GPU's kernel keeps
_MOST = 16
# a seed's other half, for the draws of the other direction: far from any seed that a caller may count up to
OTHER_DIRECTION = 0x1E3779B97F4A7C15


class Drawn(NamedTuple):
    rows: Tensor  # [B, k], indices into the keys
    columns: Tensor  # [N, k], indices into the queries, if both


def _forward(passes: Any, given: Candidates) -> Drawn:
    return Drawn(*passes.hard_negatives(given))


def _fake(given: Candidates) -> Drawn:
    new, n = partial(given.query.new_empty, dtype=torch.int64), given.keys.shape[0]
    return Drawn(new((given.query.shape[0], given.k)), new((n if given.both else 0, given.k)))


def _many(given: Candidates) -> str | None:
    return f"k is {given.k}: a tile keeps at most {_MOST}" if given.k > _MOST else None


_TILED = over_tiles(draw, "hard_negatives", tiles=draw)

NEGATIVES = Operator(
    "hard_negatives",
    forward=_forward,
    fake=_fake,
    on=lambda given: given.query,
    implementations=[
        Implementation("triton", passes=Deferred("mmfuse.kernels.contrastive.negatives.kernel"), against=[_many]),
        Implementation("cpu", passes=_TILED["cpu"]),
        Implementation("chunked", passes=_TILED["chunked"]),
        # not traced: a compiler may round the noise otherwise, and then draw others
        Implementation("torch", passes=reference),
    ],
    size=Size("pairs", lambda given: given.query.shape[0] * given.keys.shape[0]),
    example=lambda x, **how: hard_negatives(x, x, 1.0, **how),  # type: ignore[has-type]
)


@torch.no_grad()
def hard_negatives(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    k: int = 1,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    row_offset: int = 0,
    mixture: float = 0.0,
    seed: Tensor | int | None = None,
    both: bool = False,
    backend: str | None = None,
) -> Any:
    """Hard negatives for image-text matching: for each row a key other than its own, the more often the more similar.

    Row i draws j in proportion to softmax(S)_ij + mixture, S = logit_scale * query @ keys.T, the softmax over all keys,
    and never a masked j: the row's own, j = i + row_offset, or with ids every key of the same id. This is the draw of
    ALBEF, BLIP (mixture = 1e-4 in pre-training), VLMo and BLIP-2 (Li et al. 2021, section 3.2), without the matrix of
    probabilities and without a synchronisation per row. No sum of probabilities is formed that could be 0: where the
    mask takes all of a row's mass, the draw is still from what is left.

    Args:
        query: [B, D], float16, bfloat16, float32 or float64; any strides.
        keys: [N, D], same dtype and device; all ranks' keys with this rank's at `row_offset`, or its own.
        logit_scale: the multiplier (1 / temperature): a float, or a tensor of one element.
        k: draws per row, without replacement.
        ids, key_ids: [B] and [N] integers: equal ids are masked, instead of the pairs. `key_ids` is `ids` by default.
        row_offset: where the row's own keys begin; N >= B + row_offset unless ids are given.
        mixture: added to the probabilities after the softmax.
        seed: an int or an int64 tensor of one element on the device; None draws it from torch's generator. The noise of
            the pair (i + row_offset, j) depends on it and on nothing else.
        both: also draw a row for each key, from the same pass over the logits, with noise of its own.
        backend: "triton", "cpu", "chunked" or "torch"; by default the first that accepts the arguments.

    Returns:
        [B, k] int64, indices into `keys`, first draw first; -1 where fewer than k keys are left. With `both` a pair,
        the second [N, k], indices into `query`.

    Deterministic in the seed: equal for all implementations, up to rounding where two keys all but tie. Logits that are
    not numbers are drawn last. Not differentiable. Under autocast, float32 features are rounded to the autocast dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        UnsupportedError: `backend` was named and does not accept the arguments.
    """
    require_integer("row_offset", row_offset)
    query, keys, scale = features(query, keys, logit_scale, row_offset if ids is None else None, ("query", "keys"))
    require_integer("k", k)
    both = bool(both)
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if not 0.0 <= mixture < float("inf"):
        raise ValueError(f"mixture is {mixture}, expected a finite number >= 0")
    if ids is not None:
        key_ids = ids if key_ids is None else key_ids
        ids, key_ids = integers("ids", ids, query, "query"), integers("key_ids", key_ids, keys, "keys")
    elif key_ids is not None:
        raise ValueError("key_ids is given without ids, expected both")
    else:  # a pair has its key's index
        ids, key_ids = (torch.arange(i, i + t.shape[0], device=t.device) for i, t in ((row_offset, query), (0, keys)))
    given = Candidates(query, keys, scale, ids, key_ids, seed_of(seed, query), k, row_offset, float(mixture), both)
    rows, columns = NEGATIVES(given, backend=backend)
    return (rows, columns) if both else rows


def seed_of(seed: Tensor | int | None, query: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), device=query.device)
    if not isinstance(seed, Tensor):
        require_integer("seed", seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}, expected an integer of 64 bits")
        return torch.full((), seed, dtype=torch.int64, device=query.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}, expected one int64")
    check("seed", seed, dtype=torch.int64, like=("query", query))
    return seed.reshape(())
