"""Hard negatives: one sample from every implementation, and the distribution of the papers."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfuse
from mmfuse.kernels.contrastive.negatives import Draw, hard_negatives
from mmfuse.kernels.contrastive.negatives.draw import TorchTile, compiled_tile
from mmfuse.kernels.contrastive.negatives.noise import gumbel, philox
from registered import backends, opcheck

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROBE = torch.ones(8, 16, device=DEVICE)
ALL = backends(lambda: hard_negatives(PROBE, PROBE, 1.0))
OURS = [n for n in ALL if n != "torch"]


def features(b: int, n: int, d: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [F.normalize(torch.randn(k, d, device=DEVICE), dim=-1).to(dtype) for k in (b, n)]


# --- noise ----------------------------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10, those whose last counter word is 0
    zero = torch.zeros((), dtype=torch.int64)
    assert [int(v) for v in philox(zero, zero, zero, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_belongs_to_the_pair() -> None:
    seed = torch.tensor(-(2**40) + 3)
    whole = gumbel(seed, 1, 0, 0, (9, 400), torch.float32)
    assert torch.equal(gumbel(seed, 1, 4, 130, (3, 141), torch.float32), whole[4:7, 130:271])
    for other in (
        gumbel(seed, 0, 0, 0, (9, 400), torch.float32),
        gumbel(seed + 2**32, 1, 0, 0, (9, 400), torch.float32),
    ):
        assert (other == whole).float().mean() < 0.01


def test_noise_is_gumbel() -> None:
    g = gumbel(torch.tensor(7), 0, 0, 0, (512, 2048), torch.float32).double()
    x, _ = g.flatten().sort()
    n = len(x)
    distance = (torch.exp(-torch.exp(-x)) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1 %
    # neighbours in a row, in a column and in one counter are not correlated
    z = (g - g.mean()) / g.std()
    for a, b in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1]), (z[:, 32:], z[:, :-32])):
        assert abs((a * b).mean()) < 4 / n**0.5


# --- one sample -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"mixture": 1e-2}, {"k": 3, "mixture": 1e-2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", OURS)
def test_every_implementation_draws_the_same(backend: str, dtype: torch.dtype, options: dict) -> None:
    query, keys = features(70, 150, dtype=dtype)
    if backend not in backends(lambda: hard_negatives(query, keys, 1.0)):
        pytest.skip(f"{backend} does not take {dtype}")
    options = {"row_offset": 40, "both": True, "seed": 11, **options}
    got = hard_negatives(query, keys, 14.0, backend=backend, **options)
    expected = hard_negatives(query, keys, 14.0, backend="torch", **options)
    for g, e, shape in zip(got, expected, ((70, options.get("k", 1)), (150, options.get("k", 1))), strict=True):
        assert g.dtype == torch.int64 and g.shape == shape
        # keys that tie up to rounding may change places
        assert (g != e).sum() <= 1
    assert torch.equal(hard_negatives(query, keys, 14.0, backend=backend, **{**options, "both": False}), got[0])


@pytest.mark.parametrize("backend", OURS)
def test_bfloat16_and_strides(backend: str) -> None:
    if backend == "triton" and not GPU:
        pytest.skip("the interpreter's bfloat16 is not a GPU's")
    query, keys = features(33, 33, dtype=torch.bfloat16)
    expected = hard_negatives(query, keys, 14.0, seed=1, backend="torch")
    wide = torch.stack([query, query], 2)[:, :, 0]
    assert (hard_negatives(wide, keys.t().contiguous().t(), 14.0, seed=1, backend=backend) != expected).sum() <= 1


@pytest.mark.parametrize("backend", ALL)
def test_ids_are_masked_and_what_is_missing_is_minus_one(backend: str) -> None:
    query, keys = features(20, 30)
    ids, key_ids = (torch.arange(m, device=DEVICE) % 3 for m in (20, 30))
    texts, images = hard_negatives(query, keys, 5.0, ids=ids, key_ids=key_ids, k=21, both=True, seed=2,
                                   backend="chunked" if backend == "triton" else backend)  # fmt: skip
    for drawn, own, other in ((texts, ids, key_ids), (images, key_ids, ids)):
        for i, row in enumerate(drawn.tolist()):
            found = [j for j in row if j >= 0]
            assert sorted(found) == (other != own[i]).nonzero().flatten().tolist()
            assert row[len(found) :] == [-1] * (21 - len(found))
    same = torch.zeros(20, dtype=torch.int32, device=DEVICE)
    assert (hard_negatives(query, query, 5.0, ids=same, seed=2, mixture=1e-4, backend=backend) == -1).all()


@pytest.mark.parametrize("mixture", [0.0, 1e-4])
@pytest.mark.parametrize("backend", ALL)
def test_a_row_whose_mass_is_masked(backend: str, mixture: float) -> None:
    # softmax of the others underflows to 0: torch.multinomial would raise
    x = torch.eye(40, device=DEVICE)
    drawn = hard_negatives(x, x, 1000.0, seed=3, mixture=mixture, backend=backend)[:, 0]
    assert ((drawn >= 0) & (drawn != torch.arange(40, device=DEVICE))).all()
    assert len(drawn.unique()) > 10


@pytest.mark.parametrize("mixture", [0.0, 1e-4])
@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_a_number_is_drawn_last(backend: str, mixture: float) -> None:
    query, keys = features(12, 12)
    query[3], query[5], keys[7] = torch.nan, torch.inf, torch.nan
    texts, images = hard_negatives(query, keys, 14.0, seed=4, mixture=mixture, both=True, backend=backend)
    for drawn in (texts[:, 0], images[:, 0]):
        assert ((drawn >= 0) & (drawn < 12) & (drawn != torch.arange(12, device=DEVICE))).all()
    expected = hard_negatives(query, keys, 14.0, seed=4, mixture=mixture, both=True, backend="torch")
    assert torch.equal(texts, expected[0]) and torch.equal(images, expected[1])
    if not mixture:
        healthy = [i for i in range(12) if i not in (3, 5)]
        assert (texts[healthy] != 7).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 1)])
@pytest.mark.parametrize("backend", ALL)
def test_empty_and_single(backend: str, shape: tuple[int, int]) -> None:
    query, keys = features(*shape)
    texts, images = hard_negatives(query, keys, 1.0, k=2, both=True, mixture=1e-3, backend=backend)
    assert texts.shape == (shape[0], 2) and images.shape == (shape[1], 2)
    assert (texts == -1).all() and (images == -1).all()


@pytest.mark.parametrize("backend", OURS)
def test_blocks_of_rows_and_ranks_do_not_change_the_sample(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = features(100, 100)
    whole = hard_negatives(query, keys, 14.0, seed=5, k=2, mixture=1e-3, both=True, backend=backend)
    small = dict.fromkeys(("cpu", "chunked", "cuda"), 1)
    monkeypatch.setattr("mmfuse.kernels.contrastive.negatives.draw._BLOCK_BYTES", small)
    if backend == "triton":
        monkeypatch.setattr("mmfuse.kernels.contrastive.negatives.kernel._ROWS", 64)
    blocks = hard_negatives(query, keys, 14.0, seed=5, k=2, mixture=1e-3, both=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))
    ranks = [
        hard_negatives(query[i : i + 50], keys, 14.0, seed=5, k=2, mixture=1e-3, row_offset=i, backend=backend)
        for i in (0, 50)
    ]
    assert torch.equal(torch.cat(ranks), whole[0])


@pytest.mark.parametrize("name", [n for n in OURS if n != "triton"])
def test_draw_from_blocks_of_logits(name: str) -> None:
    query, keys = features(30, 300)
    logits, one = 14 * query @ keys.t(), torch.ones((), device=DEVICE)
    ids, key_ids = torch.arange(30, device=DEVICE), torch.arange(300, device=DEVICE)
    tile = compiled_tile(torch.ops.mmfuse_cpu) if name == "cpu" else TorchTile
    seed = torch.tensor(6, device=DEVICE)
    texts = Draw(30, 2, seed, logits.dtype, mixture=1e-3, tile=tile)
    images = Draw(300, 2, seed, logits.dtype, dim=0, mixture=1e-3, tile=tile)
    for i, j in ((0, 0), (17, 0), (0, 77), (17, 77)):
        rows, cols = slice(i, 17 if i == 0 else 30), slice(j, 77 if j == 0 else 300)
        for draw in (texts, images):
            draw.add(logits[rows, cols].contiguous(), one, ids[rows], key_ids[cols], row=i, col=j)
    expected = hard_negatives(query, keys, 14.0, seed=6, k=2, mixture=1e-3, both=True, backend="torch")
    assert torch.equal(texts.result(), expected[0]) and torch.equal(images.result(), expected[1])


# --- the distribution -----------------------------------------------------------------------------------------------


def assert_distributed(drawn: Tensor, probability: Tensor) -> None:
    """Pearson's chi-square of draws [draws] from `probability`, within 4 standard deviations of its mean."""
    assert (drawn >= 0).all()
    cells = int((probability > 0).sum())
    count = torch.bincount(drawn, minlength=len(probability)).double()
    expected = probability.double() * len(drawn)
    assert (count[expected == 0] == 0).all()
    assert expected[expected > 0].min() > 5
    inside = expected > 0
    chi = ((count - expected)[inside] ** 2 / expected[inside]).sum()
    assert abs(chi - (cells - 1)) < 4 * (2 * (cells - 1)) ** 0.5, f"chi-square {chi:.1f} of {cells - 1} degrees"


def weights(s: Tensor, masked: Tensor, mixture: float) -> Tensor:
    """The official code: softmax over all, + mixture, fill with 0, and torch.multinomial normalises."""
    w = (s.softmax(-1) + mixture).masked_fill(masked, 0)
    return w / w.sum(-1, keepdim=True)


DRAWS = 20000


@pytest.mark.parametrize("mixture", [0.0, 0.05])
@pytest.mark.parametrize("masked_by", ["pair", "ids"])
@pytest.mark.parametrize("both", [False, True], ids=["rows", "columns"])
def test_distribution(both: bool, masked_by: str, mixture: float) -> None:
    """DRAWS equal rows are so many draws from one distribution; the pair or the ids take column 2 or 1, 4 and 7."""
    s = torch.linspace(-1, 1.6, 10)[torch.randperm(10)].double()
    query = torch.ones(DRAWS, 1)
    row = torch.full((DRAWS,), 1)
    ids = torch.tensor([0, 1, 0, 0, 1, 2, 0, 1, 3, 0]) if masked_by == "ids" else (torch.arange(10) == 2).long()
    x, y, scale, own, other = query, s.float()[:, None], 1.0, row, ids
    if both:
        x, y, own, other = y, x, other, own
    drawn = hard_negatives(x, y, scale, ids=own, key_ids=other, mixture=mixture, seed=8, both=both, backend="torch")
    drawn = drawn[1] if both else drawn
    assert_distributed(drawn[:, 0], weights(s, ids == 1, mixture))


@pytest.mark.parametrize("mixture", [0.0, 0.05])
def test_distribution_of_two_without_replacement(mixture: float) -> None:
    s = torch.tensor([0.3, -0.5, 1.0, 0.2, 0.0, 0.8]).double()
    other = (torch.arange(6) == 5).long()
    own = torch.ones(DRAWS, dtype=torch.int64)
    drawn = hard_negatives(torch.ones(DRAWS, 1), s.float()[:, None], 1.0, ids=own, key_ids=other, k=2, seed=9,
                           mixture=mixture, backend="torch")  # fmt: skip
    p = weights(s, other == 1, mixture)
    pairs = torch.zeros(36, dtype=torch.float64)
    for i, j in permutations(range(5), 2):
        pairs[6 * i + j] = p[i] * p[j] / (1 - p[i])
    assert_distributed(drawn[:, 0] * 6 + drawn[:, 1], pairs)


def test_the_directions_are_independent() -> None:
    x = torch.ones(20000, 1)
    y = torch.zeros(2, 1)
    none = torch.zeros(2, dtype=torch.int64)
    first, second = hard_negatives(x, y, 1.0, ids=torch.ones(20000, dtype=torch.int64), key_ids=none, seed=1, both=True)
    # that a row drew column 0 says nothing of how early column 0 would draw that row
    for j in (0, 1):
        key = gumbel(torch.tensor(1), 0, 0, 0, (20000, 2), torch.float32)[:, j].double()
        took = (first[:, 0] == j).double()
        correlation = ((key - key.mean()) * (took - took.mean())).mean() / (key.std() * took.std())
        assert abs(correlation) < 4 / 20000**0.5
        assert second[j, 0] == key.argmax()


# --- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
def test_seeds(backend: str) -> None:
    query, keys = features(40, 40)

    def draw(seed: object) -> Tensor:
        return hard_negatives(query, keys, 2.0, seed=seed, backend=backend)

    assert torch.equal(draw(-5), draw(torch.tensor([-5], device=DEVICE)))
    assert not torch.equal(draw(-5), draw(5))
    torch.manual_seed(3)
    first, second = draw(None), draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first) and not torch.equal(first, second)


def test_inputs_stay_and_no_gradient_flows() -> None:
    query, keys = features(9, 9)
    scale = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    before = query.clone()
    drawn = hard_negatives(query.requires_grad_(), keys, scale)
    assert torch.equal(query, before) and not drawn.requires_grad


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend: str) -> None:
    query, keys = features(6, 9)
    ids, key_ids = torch.arange(6, device=DEVICE), torch.arange(9, device=DEVICE)
    scale, seed = torch.tensor(2.0, device=DEVICE), torch.tensor(3, device=DEVICE)
    for both in (False, True):
        given = {"ids": ids, "key_ids": key_ids, "seed": seed, "k": 2, "mixture": 1e-3, "both": both}
        opcheck(lambda given=given: hard_negatives(query, keys, scale, backend=backend, **given))


def test_compile() -> None:
    query, keys = features(16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: hard_negatives(q, k, 2.0, seed=4, both=True), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(compiled(query, keys), hard_negatives(query, keys, 2.0, seed=4, both=True), strict=True):
        assert torch.equal(got, expected)


def test_errors() -> None:
    query, keys = features(4, 6)
    ids = torch.arange(4, device=DEVICE)
    for kind, message, kwargs in (
        (ValueError, "k is 0", {"k": 0}),
        (TypeError, "k is 1.5, expected an integer", {"k": 1.5}),
        (TypeError, "seed is 1.5, expected an integer", {"seed": 1.5}),
        (ValueError, "mixture is -1", {"mixture": -1}),
        (ValueError, "query has 4 rows at row_offset 3", {"row_offset": 3}),
        (ValueError, "key_ids is given without ids", {"key_ids": ids}),
        (ValueError, r"key_ids has shape \(4,\), expected \[6\]", {"ids": ids}),
        (TypeError, "ids is list, expected a tensor", {"ids": [1, 2, 3, 4]}),
        (TypeError, "ids has dtype torch.float32", {"ids": ids.float()}),
        (ValueError, "seed is 9223372036854775808", {"seed": 2**63}),
        (ValueError, "seed is torch.int32", {"seed": torch.zeros(1, dtype=torch.int32)}),
    ):
        with pytest.raises(kind, match=message):
            hard_negatives(query, keys, 1.0, **kwargs)
    with pytest.raises(ValueError, match=r"keys has shape .*expected \[N, 24\], as many features per row as query"):
        hard_negatives(query, keys[:, :3], 1.0)
    if "triton" in ALL:
        with pytest.raises(mmfuse.UnsupportedError, match="a tile keeps at most 16"):
            hard_negatives(query, keys, 1.0, k=17, backend="triton")


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    query, keys = features(64, 64)
    hard_negatives(query, keys, 14.0, mixture=1e-4, both=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in OURS:
            hard_negatives(query, keys, 14.0, k=2, mixture=1e-4, both=True, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
