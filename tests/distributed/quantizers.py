"""What each rank runs in the tests of the quantizers: it raises where something differs."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist

from mmfuse.fused import NormEMAVectorQuantizer, VectorQuantizer
from mmfuse.fused.quantizer import kmeans


def as_one_process(rank: int, size: int) -> None:
    """Every rank's codebook moves as one process's would on all rows, by one all-reduce of [K, D + 1]."""
    torch.manual_seed(0)
    maps = torch.randn(size, 2, 6, 3, 4)
    published = NormEMAVectorQuantizer(9, 6, beta=1.0)
    lucid = VectorQuantizer(6, 9, kmeans_init=False, sync_codebook=True)
    for quantizer, batch in ((published, maps), (lucid, maps.permute(0, 1, 3, 4, 2).flatten(2, 3))):
        alone = copy.deepcopy(quantizer)
        if isinstance(alone, VectorQuantizer):
            alone._codebook.use_ddp = False
        with patch("torch.distributed.is_initialized", return_value=False):
            alone(batch.flatten(0, 1))
        with patch("torch.distributed.all_reduce", side_effect=dist.all_reduce) as reduce:
            quantizer(batch[rank])
        assert [tuple(call.args[0].shape) for call in reduce.call_args_list] == [(9, 7)]
        for (name, got), want in zip(quantizer.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def the_same_everywhere(rank: int, size: int) -> None:
    """k-means and replaced codes: the draws differ between ranks, the codebooks do not."""
    torch.manual_seed(rank)
    x = torch.randn(40, 5)
    states = [torch.cat([m.flatten() for m in kmeans(x, 7, reduce=True)])]
    published = NormEMAVectorQuantizer(7, 5, beta=1.0, kmeans_init=True)
    published(x[:12].reshape(3, 2, 2, 5).permute(0, 3, 1, 2))
    lucid = VectorQuantizer(5, 11, kmeans_init=True, threshold_ema_dead_code=3, sync_codebook=True)
    for _ in range(2):
        lucid(x[None])
    starved = VectorQuantizer(5, 60, threshold_ema_dead_code=3, sync_codebook=True)
    masked = VectorQuantizer(5, 60, threshold_ema_dead_code=3, sync_codebook=True)
    torch.manual_seed(9)  # as one model is
    for quantizer in (starved, masked):
        quantizer._codebook.embed.copy_(torch.randn(1, 60, 5))
        quantizer._codebook.embed_avg.copy_(quantizer._codebook.embed)
    torch.manual_seed(rank)
    starved(x[None, : 6 + rank])
    masked(x[None, :20], mask=torch.arange(20)[None] < 9 - rank)
    assert (starved._codebook.cluster_size == 3).sum() == 6 and (masked._codebook.cluster_size == 3).sum() == 10 - size
    for quantizer in (published, lucid, starved, masked):
        states += [t.flatten().float() for t in quantizer.state_dict().values()]
    state = torch.cat(states)
    others = [torch.empty_like(state) for _ in range(size)]
    dist.all_gather(others, state)
    assert all(torch.equal(state, other) for other in others) and state.isfinite().all()
