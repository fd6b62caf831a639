"""Quantizers: BEiT-v2's against its published lines in float64, the other inside vector-quantize-pytorch itself."""

from __future__ import annotations

import copy
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfuse
import worlds
from distributed import quantizers
from mmfuse.fused import NormEMAVectorQuantizer, VectorQuantizer, accelerate
from mmfuse.fused.quantizer import kmeans

GPU = torch.cuda.is_available()


def runs_fused_code(run: Any) -> bool:
    """Whether an operator runs: it refuses a backend that none of these has."""
    with mmfuse.use_backend("cuda"):
        try:
            run()
        except mmfuse.UnsupportedError:
            return True
    return False


# --- BEiT-v2 --------------------------------------------------------------------------------------------------------


class Published(nn.Module):
    """norm_ema_quantizer.py's computation: distances, argmin, one-hot; its names, no process group."""

    def __init__(self, n_embed: int, embedding_dim: int, beta: float, decay: float = 0.99, kmeans_init: bool = False):
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta, self.decay = n_embed, embedding_dim, beta, decay
        self.embedding = nn.Module()
        self.embedding.register_buffer("initted", torch.tensor([float(not kmeans_init)]))
        weight = torch.zeros(n_embed, embedding_dim)
        weight = weight if kmeans_init else F.normalize(torch.randn(n_embed, embedding_dim), dim=-1)
        for name, value in (("weight", weight), ("cluster_size", torch.zeros(n_embed)), ("embed_avg", weight.clone())):
            self.embedding.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.embedding.update, self.statistic_code_usage = True, True
        self.register_buffer("cluster_size", torch.zeros(n_embed))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        rows, weight = z.reshape(-1, self.codebook_dim), self.embedding.weight
        if not self.embedding.initted:
            self.first_codes(rows.detach())
        d = rows.pow(2).sum(1, keepdim=True) + weight.pow(2).sum(1) - 2 * rows @ weight.t()
        codes = d.argmin(1)
        z_q = weight[codes].view(z.shape)
        one_hot = F.one_hot(codes, self.num_tokens).type(z.dtype)
        counts = one_hot.sum(0)
        loss = self.beta * F.mse_loss(z_q.detach(), z)
        if not self.training or self.embedding.update:
            self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.training and self.embedding.update:
            empty = counts == 0
            mean = (rows.detach().t() @ one_hot / counts.masked_fill(empty, 1)).t()
            mean = torch.where(empty[:, None], weight, F.normalize(mean, dim=-1))
            moved = weight.data.clone().mul_(self.decay).add_(mean, alpha=1 - self.decay)
            weight.data.copy_(F.normalize(moved, dim=-1))
        return (z + (z_q - z).detach()).permute(0, 3, 1, 2), loss, codes

    def first_codes(self, rows: Tensor) -> None:
        k = self.num_tokens
        several = len(rows) >= k
        means = rows[torch.randperm(len(rows))[:k] if several else torch.randint(0, len(rows), (k,))]
        for _ in range(10):
            near = (rows @ means.t()).argmax(1)
            counts = torch.bincount(near, minlength=k)
            sums = torch.zeros_like(means).index_add_(0, near, rows) / counts.clamp(min=1)[:, None]
            means = torch.where((counts > 0)[:, None], F.normalize(sums, dim=-1), means)
        self.embedding.weight.data.copy_(means)
        self.embedding.cluster_size.data.copy_(counts)
        self.embedding.initted.fill_(1)


Published.__name__ = "NormEMAVectorQuantizer"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> type[Published]:
    """Where unilm's file is imported from."""
    module = ModuleType("norm_ema_quantizer")
    module.NormEMAVectorQuantizer = Published
    monkeypatch.setitem(sys.modules, "norm_ema_quantizer", module)
    return Published


def norm_ema_steps(quantizer: nn.Module, dtype: torch.dtype, steps: int = 3) -> list[Tensor]:
    """Outputs and gradients of training steps, then of an evaluation, then the state."""
    torch.manual_seed(3)
    found = []
    for step in range(steps + 1):
        quantizer.train(step < steps)
        z = torch.randn(4, 6, 3, 5, dtype=torch.float64).to(dtype).requires_grad_()
        z_q, loss, codes = quantizer(z)
        weight = torch.linspace(-1, 1, z.numel(), dtype=dtype).view_as(z_q)
        (dz,) = torch.autograd.grad((z_q * weight).sum() + loss, z)
        found += [z_q.detach(), loss.detach(), codes, dz]
    return [*found, *(t.clone() for t in quantizer.state_dict().values())]


@pytest.mark.parametrize("kmeans_init", [False, True])
@pytest.mark.parametrize("how", ["module", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_norm_ema_parity(dtype: torch.dtype, how: str, kmeans_init: bool, published: type[Published]) -> None:
    theirs = published(20, 6, beta=0.7, kmeans_init=kmeans_init).to(dtype)
    ours = copy.deepcopy(theirs)
    if how == "module":
        ours = NormEMAVectorQuantizer(20, 6, beta=0.7, kmeans_init=kmeans_init).to(dtype)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
    else:
        report = accelerate(ours, strict=True)
        assert [(e.cls, e.op) for e in report.replaced] == [("NormEMAVectorQuantizer", "vector_quantize")]
    assert runs_fused_code(lambda: copy.deepcopy(ours)(torch.randn(1, 6, 2, 2, dtype=dtype)))
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {}
    for got, want in zip(norm_ema_steps(ours, dtype), norm_ema_steps(theirs, dtype), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_norm_ema_constructor(tmp_path: Any) -> None:
    codes = F.normalize(torch.randn(5, 3), dim=-1)
    torch.save(codes, tmp_path / "codes.pt")
    quantizer = NormEMAVectorQuantizer(
        n_embed=5, embedding_dim=3, beta=1.0, decay=0.9, eps=1e-5, statistic_code_usage=False, kmeans_init=True,
        codebook_init_path=str(tmp_path / "codes.pt"),
    )  # fmt: skip
    assert torch.equal(quantizer.embedding.weight, codes) and "cluster_size" not in quantizer.state_dict()
    quantizer.embedding.update = False
    before = copy.deepcopy(quantizer.state_dict())
    for training in (True, False):
        quantizer.train(training)(torch.randn(2, 3, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), quantizer.state_dict().values(), strict=True))
    kept = NormEMAVectorQuantizer(5, 3, 1.0)
    kept(torch.randn(2, 3, 2, 2))
    kept.reset_cluster_size("cpu")
    assert not kept.cluster_size.any() and "cluster_size" in kept.state_dict()
    with pytest.raises(ValueError, match="codebook has shape .5, 3., expected .K, 6. as z has features"):
        kept(torch.randn(2, 6, 2, 2))


def test_the_flag_is_read_again_when_it_was_written() -> None:
    quantizer = NormEMAVectorQuantizer(4, 3, beta=1.0, kmeans_init=True)
    fresh = copy.deepcopy(quantizer.state_dict())
    z = torch.randn(2, 3, 4, 4)
    quantizer(z)
    assert quantizer.embedding.initted == 1 and quantizer.embedding.weight.norm() > 0
    quantizer.load_state_dict(fresh)
    assert quantizer.embedding.initted == 0
    quantizer(z)
    assert quantizer.embedding.initted == 1 and quantizer.embedding.weight.norm() > 0
    copy.deepcopy(quantizer)(z)


QUANTIZERS = {
    "NormEMA": (partial(NormEMAVectorQuantizer, 5, 3, 1.0), (2, 3, 4, 4)),
    "Vector": (partial(VectorQuantizer, 6, 9), (2, 7, 6)),
}


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_compiles(name: str, train: bool, init: bool) -> None:
    """Whole where the codes are there; where they are to be made, the graph breaks to look, in every call."""
    make, shape = QUANTIZERS[name]
    quantizer = make(kmeans_init=init).train(train)
    other = copy.deepcopy(quantizer)
    torch.compiler.reset()
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=not init)
    for step in range(3):
        x = torch.randn(shape)
        results = []
        for run in (compiled, other):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            quantized, *rest = run(leaf)
            loss = quantized.square().sum() + sum(t for t in rest if t.is_floating_point())
            results.append([quantized, *rest, *(torch.autograd.grad(loss, leaf) if loss.requires_grad else ())])
        torch.testing.assert_close(*results)
    torch.testing.assert_close(quantizer.state_dict(), other.state_dict())
    assert all(t.all() for key, t in quantizer.state_dict().items() if key.endswith("initted"))


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_finds_clusters(cosine: bool) -> None:
    centres = torch.eye(4, 6).repeat_interleave(1, 0)
    x = centres.repeat(30, 1) + 0.05 * torch.randn(120, 6)
    x = F.normalize(x, dim=-1) if cosine else x
    torch.manual_seed(6)
    best = max(((kmeans(x, 4, use_cosine_sim=cosine)) for _ in range(8)), key=lambda found: found[1].min().item())
    means, sizes = best
    assert sizes.tolist() == [30.0] * 4
    assert (means @ centres.t()).argmax(1).sort().values.tolist() == [0, 1, 2, 3]
    # fewer rows than codes: some are drawn twice
    means, sizes = kmeans(x[:3], 5, use_cosine_sim=cosine)
    assert means.isfinite().all() and sizes.sum() == 3


# --- vector-quantize-pytorch ----------------------------------------------------------------------------------------

library = pytest.importorskip("vector_quantize_pytorch")

B, N, DIM, CODES = 3, 20, 8, 16
CONFIGS: dict[str, dict[str, Any]] = {
    "euclidean": {},
    "cosine": {"use_cosine_sim": True},
    "straight through": {"rotation_trick": False, "commitment_weight": 0.25},
    "heads": {"heads": 2, "codebook_dim": 4},
    "a codebook per head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projections": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "k-means": {"kmeans_init": True},
    "cosine k-means": {"kmeans_init": True, "use_cosine_sim": True, "kmeans_iters": 4},
    "dead codes": {"threshold_ema_dead_code": 2},
    "cosine dead codes": {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
    "more dead codes than rows": {"threshold_ema_dead_code": 50, "decay": 0.99},
    "frozen": {"freeze_codebook": True},
    "manual": {"manual_ema_update": True, "decay": 0.5},
    "no commitment": {"commitment_weight": 0.0},
    "own gradient": {"route_gradients_to_input": False},
    "channels second": {"channel_last": False},
    "images": {"accept_image_fmap": True},
    "volumes": {"accept_3d_fmap": True},
}
SHAPES = {
    "more dead codes than rows": (1, 5, DIM),
    "images": (B, DIM, 4, 5),
    "volumes": (B, DIM, 2, 2, 5),
    "channels second": (B, DIM, N),
}


def steps(vq: nn.Module, shape: tuple[int, ...], masked: bool = False) -> list[Tensor]:
    """Outputs and gradients of training steps and an evaluation, then the state."""
    torch.manual_seed(3)
    found = []
    for step in range(4):
        vq.train(step < 3)
        x = (0.3 * torch.randn(shape)).requires_grad_()
        mask = {"mask": torch.rand(shape[:2]) < 0.7} if masked else {}
        quantized, codes, loss = vq(x, **mask)
        found += [quantized.detach(), codes, loss.detach()]
        if step < 3:
            weight = torch.linspace(-1, 1, quantized.numel()).view_as(quantized)
            leaves = [x, *(p for p in vq.parameters() if p.requires_grad)]
            grads = torch.autograd.grad((quantized * weight).sum() + loss, leaves, allow_unused=True)
            # a codebook that nothing reaches
            found += [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    return [*found, *(t.clone() for t in vq.state_dict().values())]


@pytest.mark.parametrize("how", ["module", "accelerated"])
@pytest.mark.parametrize("name", CONFIGS)
def test_vector_quantize_parity(name: str, how: str) -> None:
    options, shape = CONFIGS[name], SHAPES.get(name, (B, N, DIM))
    torch.manual_seed(0)
    theirs = library.VectorQuantize(DIM, CODES, **options)
    if how == "module":
        torch.manual_seed(0)
        ours: nn.Module = VectorQuantizer(DIM, CODES, **options)
        for (key, value), (expected, initial) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert key == expected and torch.equal(value, initial)
    else:
        ours = copy.deepcopy(theirs)
        report = accelerate(ours, strict=True)
        assert [(e.path, e.cls, e.op) for e in report.replaced] == [("", "VectorQuantize", "vector_quantize")]
    assert runs_fused_code(lambda: copy.deepcopy(ours)(torch.randn(shape)))
    for got, want in zip(steps(ours, shape), steps(theirs, shape), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
def test_masked_parity(cosine: bool, zeros: bool) -> None:
    options = {"use_cosine_sim": cosine, "return_zeros_for_masked_padding": zeros, "kmeans_init": True}
    theirs = library.VectorQuantize(DIM, CODES, **options)
    ours = VectorQuantizer(DIM, CODES, **options)
    ours.load_state_dict(theirs.state_dict())
    for got, want in zip(steps(ours, (B, N, DIM), True), steps(theirs, (B, N, DIM), True), strict=True):
        torch.testing.assert_close(got, want)
    x, lens = torch.randn(B, N, DIM), torch.tensor([3, N, 7])
    for got, want in zip(ours.eval()(x, lens=lens), theirs.eval()(x, lens=lens), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options", [{"heads": 2}, {"heads": 2, "separate_codebook_per_head": True}, {"codebook_dim": 4}]
)
@pytest.mark.parametrize("train", [False, True])
def test_masked_heads_and_projections(options: dict[str, Any], train: bool) -> None:
    # in training only without the loss, which the original cannot form there
    options = {**options, "commitment_weight": 0.0 if train else 1.0, "kmeans_init": train}
    theirs = library.VectorQuantize(DIM, CODES, **options).train(train)
    ours = VectorQuantizer(DIM, CODES, **options).train(train)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(B, N, DIM), torch.rand(B, N) < 0.7
    results = []
    for vq in (ours, theirs):
        torch.manual_seed(3)
        results.append([*vq(x, mask=mask), *vq.state_dict().values()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(mmfuse.UnsupportedError, match="mask was given, .* in training with heads or projections"):
        VectorQuantizer(DIM, CODES, heads=2)(x, mask=mask)


def test_mask_errors() -> None:
    vq, mask, lens = VectorQuantizer(DIM, CODES), torch.ones(B, N, dtype=torch.bool), torch.full((B,), N)
    with pytest.raises(ValueError, match="mask and lens were given, expected one of them"):
        vq(torch.randn(B, N, DIM), mask=mask, lens=lens)
    for x in (torch.randn(B, N + 1, DIM), torch.randn(B, DIM)):
        with pytest.raises(ValueError, match=rf"mask has shape \({B}, {N}\), expected"):
            vq(x, mask=mask)
    first = VectorQuantizer(DIM, CODES, channel_last=False)
    codes = first(torch.randn(B, DIM, N), lens=lens - 1)[1]
    assert (codes[:, -1] == -1).all() and (codes[:, :-1] >= 0).all()


def test_a_frozen_codebook_has_no_gradient() -> None:
    # zeros would let an optimizer's weight decay move it
    vq = VectorQuantizer(DIM, CODES, learnable_codebook=True, freeze_codebook=True)
    x = torch.randn(B, N, DIM, requires_grad=True)
    quantized, _, loss = vq(x)
    (quantized.sum() + loss).backward()
    assert x.grad is not None and vq._codebook.embed.grad is None


def test_masked_dead_codes_come_from_rows_that_count() -> None:
    vq = VectorQuantizer(4, 30, threshold_ema_dead_code=5, decay=0.5)
    x, mask = torch.randn(1, 12, 4), torch.arange(12)[None] % 2 == 0
    vq(x, mask=mask)
    replaced = (vq._codebook.cluster_size[0] == 5).nonzero()[:, 0]
    rows = x[0, ::2]
    # six rows count: six codes are replaced, each by another row; the others wait
    assert len(replaced) == 6
    found = torch.cdist(vq.codebook[replaced], rows).argmin(1)
    assert found.sort().values.tolist() == list(range(6))
    assert torch.equal(vq.codebook[replaced], rows[found])
    assert torch.equal(vq._codebook.embed_avg[0, replaced], rows[found] * 5)


def test_codes_die_again_and_all_are_replaced_in_time() -> None:
    """A replaced code has the threshold as its count, and is below it after the next step."""
    vq, ever = VectorQuantizer(4, 16, threshold_ema_dead_code=2, decay=0.99), torch.zeros(16, dtype=torch.bool)
    for _ in range(100):
        x = torch.randn(1, 1, 4)
        vq(x)
        ever |= (vq.codebook == x[0]).all(1)
    assert ever.sum() > 12


@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_is_not_a_number_shows_as_in_the_original(weight: float, rotation_trick: bool) -> None:
    options = {"commitment_weight": weight, "rotation_trick": rotation_trick}
    theirs, ours = (c(DIM, CODES, **options) for c in (library.VectorQuantize, VectorQuantizer))
    ours.load_state_dict(theirs.state_dict())
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(B, N, DIM)
        x[1, 2, 3] = value
        seen = []
        for vq in (theirs, ours):
            own = x.clone().requires_grad_()
            out, _, loss = vq(own, freeze_codebook=True)
            seen.append((out, torch.autograd.grad(out.square().sum() + loss.sum(), own)[0]))
        for got, want in zip(seen[1], seen[0], strict=True):
            assert want.isnan().any() and torch.equal(got.isnan(), want.isnan())
        assert torch.equal(theirs.eval()(x)[0], ours.eval()(x)[0])
        theirs.train(), ours.train()


def test_what_is_not_a_number_shows_in_beit() -> None:
    z = torch.randn(2, 8, 3, 3)
    z[1, 2, 0, 0] = torch.nan
    out = NormEMAVectorQuantizer(10, 8, beta=1.0)(z)[0]
    assert out.isnan().any(1).nonzero().tolist() == [[1, 0, 0]]


def test_single_tokens_breakdown_and_indices() -> None:
    theirs = library.VectorQuantize(DIM, CODES, heads=2, codebook_dim=4)
    ours = VectorQuantizer(DIM, CODES, heads=2, codebook_dim=4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, DIM)
    got, want = (vq(x, return_loss_breakdown=True, freeze_codebook=True) for vq in (ours, theirs))
    for a, b in zip((*got[:3], *got[3]), (*want[:3], *want[3]), strict=True):
        torch.testing.assert_close(a, b)
    assert got[3]._fields == want[3]._fields and torch.equal(ours.codebook, theirs.codebook)
    codes = torch.randint(0, CODES, (B, N, 2))
    for name, options in (("heads", {}), ("a codebook per head", {}), ("heads", {"channel_last": False})):
        theirs, ours = (c(DIM, CODES, **CONFIGS[name], **options) for c in (library.VectorQuantize, VectorQuantizer))
        ours.load_state_dict(theirs.state_dict())
        if name != "heads":  # with one codebook the original gives [B, N, heads, D]
            torch.testing.assert_close(ours.get_output_from_indices(codes), theirs.get_output_from_indices(codes))
    torch.testing.assert_close(ours.get_codes_from_indices(codes), theirs.get_codes_from_indices(codes))


def test_accelerate_leaves_what_needs_all_distances() -> None:
    left = {
        "samples its codes": {"stochastic_sample_codes": True},
        "has a cross-entropy commitment loss": {"commitment_use_cross_entropy_loss": True},
        "has a diversity loss": {"codebook_diversity_loss_weight": 0.1},
        "has affine parameters": {"affine_param": True},
        "reparametrizes directions": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    }
    for why, options in left.items():
        (entry,) = accelerate(library.VectorQuantize(DIM, CODES, **options)).left
        assert entry.why == f"it {why}"
        with pytest.raises(mmfuse.UnsupportedError, match=f"{next(iter(options))} is "):
            VectorQuantizer(DIM, CODES, **options)
    with pytest.raises(TypeError, match="unexpected argument 'codes'"):
        VectorQuantizer(DIM, CODES, codes=3)
    with pytest.raises(ValueError, match="learnable_codebook is True"):
        VectorQuantizer(DIM, CODES, learnable_codebook=True, ema_update=True)


def test_calls_that_need_all_distances_run_the_original() -> None:
    theirs = library.VectorQuantize(DIM, CODES).eval()
    x, codes = torch.randn(B, N, DIM), torch.randint(0, CODES, (B, N))
    want = theirs(x, indices=codes), theirs(x, topk=3)
    with accelerate(theirs):
        for got, expected in zip((theirs(x, indices=codes), theirs(x, topk=3)), want, strict=True):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
    with pytest.raises(mmfuse.UnsupportedError, match="topk was given"):
        VectorQuantizer(DIM, CODES)(x, topk=3)


def test_residual_quantizers_are_reached() -> None:
    rvq = library.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3)
    theirs = copy.deepcopy(rvq)
    assert len(accelerate(rvq, strict=True).replaced) == 3
    x = torch.randn(B, N, DIM)
    for got, want in zip((rvq(x), rvq.eval()(x)), (theirs(x), theirs.eval()(x)), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


# --- several processes, and none that waits -------------------------------------------------------------------------


@pytest.mark.parametrize("program", [quantizers.as_one_process, quantizers.the_same_everywhere])
def test_over_ranks(program: Any) -> None:
    worlds.run(2, program)


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    published = NormEMAVectorQuantizer(40, 8, beta=1.0).cuda()
    lucid = VectorQuantizer(8, 40, threshold_ema_dead_code=2).cuda()
    z = torch.randn(4, 8, 5, 5, device="cuda", requires_grad=True)
    rows = z.detach().flatten(2).transpose(1, 2).requires_grad_()

    def step() -> None:
        published(z)[1].backward()
        lucid(rows)[2].backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
