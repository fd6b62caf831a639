"""The distributed losses in groups of gloo processes, against open_clip's own and against one process."""

from __future__ import annotations

import pytest
import torch

import worlds
from distributed import programs
from judge import assert_no_worse
from mmfuse.kernels._runtime import Operator
from mmfuse.kernels.contrastive.distributed.op import DISTRIBUTED_CLIP, DISTRIBUTED_SIGLIP
from mmfuse.kernels.contrastive.distributed.peers import Peers

pytest.importorskip("open_clip")


def available() -> list[str]:
    return DISTRIBUTED_CLIP.available((torch.ones(2, 16), *[None] * 4))


@pytest.mark.parametrize("size, b, d", [(2, 6, 10), (4, 3, 5)])
def test_every_mode_as_open_clip(size: int, b: int, d: int) -> None:
    worlds.run(size, programs.as_open_clip, b, d)


def test_precision() -> None:
    backend = "cpu" if "cpu" in available() else "chunked"
    by_rank = worlds.run(2, programs.in_low_precision, 40, 24, 8, backend)
    draws, per_dtype = 8, len(by_rank[0]) // 2
    kinds = per_dtype // draws
    for found in by_rank:
        for dtype in range(2):
            for kind in range(kinds):
                chosen = found[dtype * per_dtype + kind : (dtype + 1) * per_dtype : kinds]
                for i in range(len(chosen[0][0])):
                    got, eager, exact = (torch.stack([three[j][i] for three in chosen]) for j in range(3))
                    if i == 0:  # the loss is in float32
                        assert got.dtype == torch.float32
                        eager = eager.float()
                    assert_no_worse(got, eager, exact, f"dtype {dtype}, kind {kind}, result {i}")


@pytest.mark.parametrize("size, sizes", [(2, [4, 1]), (4, [3, 0, 1, 5]), (3, [2, 2, 2]), (4, [5, 2])], ids=str)
def test_as_one_process(size: int, sizes: list[int]) -> None:
    """The last one: two ranks of the four, as a group."""
    worlds.run(size, programs.of_the_global_batch, sizes)


def test_every_backend() -> None:
    """Logits computed again, and kept."""
    assert "chunked" in available()
    worlds.run(2, programs.every_backend, [b for b in available() if b != "torch"])


@pytest.mark.parametrize("op", [DISTRIBUTED_CLIP, DISTRIBUTED_SIGLIP], ids=lambda op: op.name)
def test_small_batches_are_eager(op: Operator) -> None:
    given = dict.fromkeys(op.signature.names) | {"image": torch.ones(2, 16)}
    few, many = (tuple((given | {"peers": Peers(None, 0, 2, sizes)}).values()) for sizes in ((20, 30), (20000, 20000)))
    assert op.choose(few) == "torch"
    assert op.choose(many) != "torch"
    assert op.choose(few, "chunked") == "chunked"


def test_explain() -> None:
    for said in worlds.run(2, programs.explained):
        assert "->" in said


def test_only_what_is_asked() -> None:
    worlds.run(2, programs.only_what_is_asked)


def test_known_sizes_spare_the_host_every_wait() -> None:
    worlds.run(3, programs.waits_for_nothing, [4, 1, 3])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a rank needs a GPU of its own")
@pytest.mark.parametrize("sizes", [[64, 64], [70, 33]], ids=str)
def test_over_nccl_in_a_cuda_graph(sizes: list[int]) -> None:
    worlds.run(2, programs.captured, sizes)


def test_a_ring_keeps_no_other_texts() -> None:
    assert worlds.run(3, programs.kept_by_a_ring, [2, 4, 3], 16) == [2 * 16, 4 * 16, 3 * 16]


def test_ranks_that_disagree() -> None:
    first, *_, odd = worlds.run(3, programs.disagree)
    same = {
        "features": "ValueError: features per row: 5 at rank 0 but 4 at rank 2, expected the same at every rank",
        "dtype": "ValueError: dtype: float64 at rank 0 but float32 at rank 2",
        "mode": "ValueError: local_loss: False at rank 0 but True at rank 2",
        "impl": "ValueError: dist_impl: shift at rank 0 but gather at rank 2",
        "clip impl": "ValueError: dist_impl: gather at rank 0 but ring at rank 2",
        "loss": "ValueError: loss: clip_loss at rank 0 but siglip_loss at rank 2",
        "gradient": "ValueError: gradient of text: False at rank 0 but True at rank 2",
        "sizes": "ValueError: sizes is [2, 2, 2], expected 3 numbers with 3 at rank",
        "world": "ValueError: ClipLoss has rank ",
    }
    for said in (first, odd):
        for name, expected in same.items():
            assert said[name].startswith(expected), said[name]
    for name, own in (
        ("rows", "ValueError: text has shape (2, 5), expected [3, 5]"),
        ("scale", "ValueError: logit_scale has shape"),
    ):
        assert first[name].startswith("RuntimeError: rank 2's arguments do not fit"), first[name]
        assert odd[name].startswith(own), odd[name]


def test_the_own_block_is_computed_while_others_travel() -> None:
    sizes = [4, 1, 3]
    chunks = [[2, 1, 2], [2, 0, 1]]
    for rank, happened in enumerate(worlds.run(3, programs.overlapped, sizes)):
        own, *others = sizes[rank], *(sum(c) - c[rank] for c in chunks)
        clip = ["gather", "gather", f"stats of {own}"]
        clip += [e for n in others for e in ("gather waited for", f"stats of {n}")]
        clip += [e for n in reversed(others) for e in (f"grad of {n}", "scatter")]
        clip += [f"grad of {own}", "scatter waited for", "scatter waited for"]
        siglip = ["gather", "gather", f"sigmoid of {own}"]
        siglip += [e for n in others for e in ("gather waited for", f"sigmoid of {n}")]
        siglip += ["scatter", "scatter", "scatter waited for", "scatter waited for"]
        assert happened == [clip] * 2 + [siglip] * 2


@pytest.mark.parametrize(
    "when, what",
    [("before", "comparing the arguments"), ("gather", "gathering the features"), ("between", "gathering a number")],
)
def test_a_rank_that_dies(when: str, what: str) -> None:
    (said, seconds), gone = worlds.run(2, programs.die, when, timeout=5.0, may_end=True)
    assert gone is None
    assert said.startswith(what)
    assert "rank 0 of 2 waited in vain; another process has died" in said
    assert seconds < 10


def test_grad_cache() -> None:
    worlds.run(2, programs.grad_cache_under_ddp)
