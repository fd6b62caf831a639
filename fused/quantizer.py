"""Vector quantizers whose codebook follows a moving average, or learns: BEiT-v2's and vector-quantize-pytorch's.

Neither holds the [N, K] distances or a one-hot matrix: codes come from `nearest_code`, moving averages from
`code_statistics`, loss and gradient from `assign_code`. Nothing waits for the device, but for one look at `initted`
whenever it was written. Over several processes a step makes one all-reduce of [K, D + 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.kernels import nearest_code
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels.codebook import assign_code, code_statistics, linear_argmax

# --- what both are made of ------------------------------------------------------------------------------------------


def is_set(owner: nn.Module, flag: Tensor) -> bool:
    """The value of a flag on any device, read once for every time that it was written."""
    if torch.compiler.is_compiling():
        # a graph cannot look; where the codes are still to be made, it breaks
        return _when_traced(flag) or bool(flag)
    version = (id(flag), None if flag.is_inference() else flag._version)
    if owner.__dict__.get("_set_at") == version:
        return True
    found = bool(flag)
    owner.__dict__["_set_at"] = version if found else None
    return found


@torch.compiler.assume_constant_result
def _when_traced(flag: Tensor) -> bool:
    return bool(flag)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """`F.normalize` of rows, without its layers of Python."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def statistics(x: Tensor, codes: Tensor, K: int, reduce: bool) -> tuple[Tensor, Tensor]:
    """(counts [K], sums [K, D]) over all processes if `reduce`."""
    counts, sums = code_statistics(x, codes, K)
    if not reduce:
        return counts, sums
    packed = torch.cat([sums, counts[:, None]], 1)
    dist.all_reduce(packed)
    return packed[:, -1], packed[:, :-1]


def sample_rows(x: Tensor, num: int) -> Tensor:
    """`num` rows at random, different ones while there are enough."""
    if len(x) >= num:
        return x[torch.randperm(len(x), device=x.device)[:num]]
    return x[torch.randint(0, len(x), (num,), device=x.device)]


def shard_rows(rows: Tensor) -> Tensor:
    """Row k of the process k mod their number, in every process."""
    k = torch.arange(len(rows), device=rows.device)
    rows = torch.where((k % dist.get_world_size() == dist.get_rank())[:, None], rows, 0)
    dist.all_reduce(rows)
    return rows


def kmeans(
    x: Tensor, num_clusters: int, num_iters: int = 10, use_cosine_sim: bool = False, eps: float = 1e-12,
    reduce: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lloyd's algorithm from rows at random, the same draws as the originals': (means [K, D], their sizes [K]).

    Args:
        x: [N, D]; with `use_cosine_sim` unit rows.
        eps: of the means' norms.
        reduce: over the rows of all processes.
    """
    means = sample_rows(x, num_clusters)
    if reduce:
        means = shard_rows(means)
    sizes = x.new_zeros(num_clusters)
    for _ in range(num_iters):
        codes = linear_argmax(x, means) if use_cosine_sim else nearest_code(x, means)
        sizes, sums = statistics(x, codes, num_clusters, reduce)
        found = sums / sizes.clamp_min(1)[:, None]
        if use_cosine_sim:
            found = unit(found, eps)
        means = torch.where(sizes[:, None] > 0, found.to(means.dtype), means)
    return means, sizes


# --- BEiT-v2 --------------------------------------------------------------------------------------------------------


class EmbeddingEMA(nn.Module):
    """The codes of `NormEMAVectorQuantizer`, under the original's names."""

    initted: Tensor

    def __init__(
        self,
        num_tokens: int,
        codebook_dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_init: bool = True,
        codebook_init_path: str = "",
    ) -> None:
        super().__init__()
        self.num_tokens, self.codebook_dim, self.decay, self.eps = num_tokens, codebook_dim, decay, eps
        if codebook_init_path:
            weight = torch.load(codebook_init_path, map_location="cpu").clone()
        elif kmeans_init:
            weight = torch.zeros(num_tokens, codebook_dim)
        else:
            weight = unit(torch.randn(num_tokens, codebook_dim))
        self.register_buffer("initted", torch.tensor([float(bool(codebook_init_path) or not kmeans_init)]))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.update = True

    def forward(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.weight)


class NormEMAVectorQuantizer(nn.Module):
    """BEiT-v2's quantizer: unit rows, Euclidean nearest code, codes that follow the mean direction of their rows.

    The constructor, outputs, `state_dict` keys and updates of unilm's `norm_ema_quantizer.NormEMAVectorQuantizer`
    (Peng et al. 2022, https://arxiv.org/abs/2208.06366). For each code with n_k > 0 rows in training:

        w_k <- norm(decay w_k + (1 - decay) norm(sum of its rows / n_k))

    and `cluster_size` <- decay cluster_size + (1 - decay) n in training and in evaluation (`statistic_code_usage`).
    Codes are exact where the original's are those of rounded distances, under autocast rounded to 16 bits.

    forward(z [B, D, H, W]) returns (z_q [B, D, H, W], loss = beta mean (z - sg[z_q])^2, codes [B H W] int64), the
    gradient of z_q going straight to z.

    Args:
        n_embed: K.
        embedding_dim: D.
        beta: weight of the loss.
        decay: of the moving averages.
        eps: kept for the original's signature; no computation uses it.
        statistic_code_usage: keep `cluster_size`.
        kmeans_init: take the codes from the first batch by k-means, over all processes (the original: each its own).
        codebook_init_path: a file that torch.load reads the codes [K, D] from.

    Deterministic but for the k-means draws.
    """

    cluster_size: Tensor

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        statistic_code_usage: bool = True,
        kmeans_init: bool = False,
        codebook_init_path: str = "",
    ) -> None:
        super().__init__()
        self.codebook_dim, self.num_tokens, self.beta, self.decay = embedding_dim, n_embed, beta, decay
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps, kmeans_init, codebook_init_path)
        self.statistic_code_usage = statistic_code_usage
        if statistic_code_usage:
            self.register_buffer("cluster_size", torch.zeros(n_embed))

    def reset_cluster_size(self, device: torch.device | str) -> None:
        if self.statistic_code_usage:
            self.register_buffer("cluster_size", torch.zeros(self.num_tokens, device=device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # b c h w -> b h w c
        z = unit(z.permute(0, 2, 3, 1))
        rows, codes_of = z.flatten(0, 2), self.embedding
        together = rows.detach().contiguous()  # codes and averages would each have a copy
        if not is_set(codes_of, codes_of.initted):
            means, sizes = kmeans(together, self.num_tokens, use_cosine_sim=True, reduce=_distributed())
            codes_of.weight.data.copy_(means)
            codes_of.cluster_size.data.copy_(sizes)
            codes_of.initted.fill_(1)
        # a copy: the update must not reach the backward
        weight = codes_of.weight.detach().clone()
        codes = nearest_code(together, weight)
        z_q, loss = assign_code(rows, weight, codes, beta=self.beta, codebook_weight=0.0, masked=False)
        if self.training and codes_of.update:
            _follow_directions(self, together, codes)
        elif not self.training and self.statistic_code_usage:
            counts = _counts(codes, self.num_tokens).to(self.cluster_size)
            if _distributed():
                dist.all_reduce(counts)
            self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        return z_q.view(z.shape).permute(0, 3, 1, 2), loss, codes


@torch.no_grad()
def _follow_directions(quantizer: Any, rows: Tensor, codes: Tensor) -> None:
    counts, sums = statistics(rows, codes, quantizer.num_tokens, _distributed())
    if quantizer.statistic_code_usage:
        quantizer.cluster_size.lerp_(counts.to(quantizer.cluster_size), 1 - quantizer.decay)
    weight = quantizer.embedding.weight.data
    # the direction of a mean is that of its sum, up to rounding; the original divides first
    means = unit(sums / counts.clamp_min(1)[:, None])
    means = torch.where(counts[:, None] > 0, means, weight)
    weight.copy_(unit((weight * quantizer.decay).add_(means, alpha=1 - quantizer.decay)))


def _counts(codes: Tensor, K: int) -> Tensor:
    ordered = codes.sort().values
    return torch.searchsorted(ordered, torch.arange(K + 1, device=codes.device)).diff()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


# --- vector-quantize-pytorch ----------------------------------------------------------------------------------------

_EPS = 1e-6  # of its norms


class LossBreakdown(NamedTuple):
    """The terms of the loss, those that are not computed 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Codebook(nn.Module):
    """The codes of `VectorQuantizer`, under the original's names."""

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        sync_kmeans: bool,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_ddp: bool,
        learnable_codebook: bool,
        ema_update: bool,
        manual_ema_update: bool,
        use_cosine_sim: bool,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks, self.kmeans_iters = codebook_size, num_codebooks, kmeans_iters
        self.decay, self.eps, self.use_ddp = decay, eps, use_ddp
        self.kmeans_all_reduce_fn = dist.all_reduce if use_ddp and sync_kmeans else None
        self.threshold_ema_dead_code = self.reset_cluster_size = threshold_ema_dead_code
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            if use_cosine_sim:
                embed = unit(embed, _EPS)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def update_ema(self) -> None:
        """Take the codes from the moving averages; with `manual_ema_update` for the user to call."""
        take_averages(self)


class VectorQuantizer(nn.Module):
    """vector-quantize-pytorch's `VectorQuantize` (1.32): constructor, forward, outputs, `state_dict` keys and updates.

    forward(x, mask=...) returns (quantized, codes, loss). x is [B, N, dim], [B, dim], or as `channel_last`,
    `accept_image_fmap` and `accept_3d_fmap` say; codes int64 [B, N], with heads [B, N, heads], -1 where masked out.
    Codes are exact. In training the codes move by

        cluster_size <- lerp(cluster_size, n, 1 - decay),   embed_avg <- lerp(embed_avg, sums, 1 - decay)
        embed = embed_avg / (Laplace-smoothed cluster_size),  L2-normalised for the cosine

    and codes below `threshold_ema_dead_code` are replaced by rows of the batch, as many as there are rows, chosen at
    random: on a CPU with the original's draws, but for a mask or several processes (each deals its share of the rows,
    the first chooses); on a GPU without asking how many are dead. The gradient is that of the rotation trick, or
    straight through with `rotation_trick=False`.

    Args: as the original's. What it has beside these is missing here: sampled and Gumbel codes, cross-entropy
        commitment, diversity and orthogonality losses, affine parameters, vq_bridge, in-place optimizers,
        directional_reparam and sync_update_v, and in forward indices, topk, codebook_transform_fn, ema_update_weight,
        accum_ema_update, and mask or lens in training with heads or projections. `accelerate()` leaves modules and
        calls with those to the original.

    Raises:
        UnsupportedError: an option of the original that is missing here.
        ValueError: options that exclude one another.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool = False,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        **missing: Any,
    ) -> None:
        super().__init__()
        for name, value in missing.items():
            if name not in _MISSING:
                raise TypeError(f"VectorQuantizer got an unexpected argument {name!r}")
            if value is not None and value != _MISSING[name]:
                raise UnsupportedError(f"{name} is {value!r}, VectorQuantizer computes only {_MISSING[name]!r}")
        learnable_codebook = bool(learnable_codebook)
        ema_update = not learnable_codebook if ema_update is None else ema_update
        if learnable_codebook and (use_cosine_sim or ema_update):
            raise ValueError("learnable_codebook is True, expected neither use_cosine_sim nor ema_update with it")
        if sync_codebook is None:
            sync_codebook = _distributed() and dist.get_world_size() > 1
        inner = (codebook_dim or dim) * heads
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if inner != dim:
            self.project_in, self.project_out = nn.Linear(dim, inner), nn.Linear(inner, dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self.dim, self.codebook_size, self.heads, self.eps = dim, codebook_size, heads, eps
        self.separate_codebook_per_head = separate_codebook_per_head
        self.has_projections, self.has_commitment_loss = inner != dim, commitment_weight > 0
        self.commitment_weight, self.learnable_codebook = commitment_weight, learnable_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.route_gradients_to_input, self.use_cosine_sim = route_gradients_to_input, use_cosine_sim
        self.accept_image_fmap, self.accept_3d_fmap, self.channel_last = accept_image_fmap, accept_3d_fmap, channel_last
        self.return_zeros_for_masked_padding, self.freeze_codebook = return_zeros_for_masked_padding, freeze_codebook
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self._codebook = Codebook(
            codebook_dim or dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init,
            kmeans_iters,
            sync_kmeans,
            decay,
            eps,
            threshold_ema_dead_code,
            sync_codebook,
            learnable_codebook,
            ema_update,
            manual_ema_update,
            use_cosine_sim,
        )

    @property
    def codebook(self) -> Tensor:
        """[K, D], or [heads, K, D] with a codebook for each head."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [B, N] or [B, N, heads], as [B, N, D] (channels second where the input's are)."""
        embed = self._codebook.embed
        if self.separate_codebook_per_head:
            codes = embed[torch.arange(self.heads, device=indices.device), indices].flatten(-2)
        else:
            codes = embed[0][indices]
        first = not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap
        return codes.movedim(-1, 1) if first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return self.project_out(self.get_codes_from_indices(indices))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        call = locals()
        if name := missing_in_call(self, call):
            where = " in training with heads or projections" if name in ("mask", "lens") else ""
            raise UnsupportedError(f"{name} was given, which VectorQuantizer does not compute{where}")
        return quantize(self, x, mask, lens, freeze_codebook, return_loss_breakdown, ema_update)


# options of the original that are missing here, and their defaults
_MISSING: dict[str, Any] = {
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
}


def missing_in_call(vq: Any, call: dict[str, Any]) -> str | None:
    """The argument of a forward that `quantize` does not compute, or None."""
    for name in ("indices", "topk", "codebook_transform_fn", "ema_update_weight"):
        if call[name] is not None:
            return name
    if call["accum_ema_update"]:
        return "accum_ema_update"
    # for its loss the original compares the quantized rows with the input as it came: their shapes differ
    given = "mask" if call["mask"] is not None else "lens" if call["lens"] is not None else None
    return given if vq.training and vq.has_commitment_loss and (vq.heads > 1 or vq.has_projections) else None


def quantize(
    vq: Any,
    x: Tensor,
    mask: Tensor | None,
    lens: Tensor | None,
    freeze_codebook: bool | None,
    return_loss_breakdown: bool,
    ema_update: bool | None,
) -> tuple[Any, ...]:
    """The forward of a `VectorQuantizer`, or of vector-quantize-pytorch's own module."""
    book = vq._codebook
    freeze = vq.freeze_codebook if freeze_codebook is None else freeze_codebook
    needs_grad, dtype, fmap = x.requires_grad, x.dtype, vq.accept_image_fmap or vq.accept_3d_fmap
    one, first = x.dim() == 2, fmap or not (vq.channel_last or x.dim() == 2)
    if one:
        x = x[:, None]
    if first:
        x = x.movedim(1, -1)
    places, original = x.shape[:-1], x.flatten(1, -2)
    if lens is not None:
        if mask is not None:
            raise ValueError("mask and lens were given, expected one of them")
        mask = torch.arange(original.shape[1], device=x.device) < lens[:, None]
    if mask is not None and mask.shape != original.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {list(original.shape[:2])} as x has tokens")
    x = vq.project_in(original)
    # [codebooks, rows, D], as the original flattens them
    x = x.unflatten(-1, (vq.heads, -1))
    heads = 1 if vq.separate_codebook_per_head else vq.heads  # that share a codebook
    x = x.movedim(2, 0).flatten(1, 2) if vq.separate_codebook_per_head else x.transpose(1, 2).flatten(0, 2)[None]
    if vq.use_cosine_sim:
        x = unit(x, _EPS)
    wanted = None if mask is None else mask.repeat_interleave(heads, 0).flatten()
    rows = x.float()
    with torch.autocast(rows.device.type, enabled=False):
        if not is_set(book, book.initted):
            _take_kmeans(book, rows.detach(), wanted)
        embed = book.embed.float()
        codes = torch.stack([_nearest(book, z, e, wanted) for z, e in zip(rows, embed.detach(), strict=True)])
        route = "none"
        if vq.training and needs_grad and vq.route_gradients_to_input:
            route = "rotation" if vq.rotation_trick else "straight_through"
        learns = vq.learnable_codebook and not freeze
        if not book.learnable_codebook:
            embed = embed.clone()  # what the averages do to the buffer must not reach the backward
        elif not learns and route != "none":
            embed = embed.detach()  # a frozen codebook has no gradient, which is not one of zeros to an optimizer
        pairs = list(zip(rows if vq.training else rows.detach(), embed, codes, strict=True))
        options = {"beta": 1.0, "codebook_weight": float(learns), "masked": mask is not None}
        found = [assign_code(z, e, c, gradient=route, **options) for z, e, c in pairs]
        commitment = torch.stack([loss for _, loss in found]).mean()
        if mask is not None and vq.use_cosine_sim and vq.training and vq.has_commitment_loss:
            # of masked rows the original takes the loss before their normalisation
            commitment = assign_code(original.flatten(0, 1).float(), embed[0], codes[0], **options)[1]
        if learns:
            # its value counts once, with both gradients whole
            commitment = commitment - 0.5 * commitment.detach()
        quantized = torch.stack([q for q, _ in found]).to(dtype)
        if vq.training and not freeze:
            _update(book, rows.detach(), codes, wanted, book.ema_update if ema_update is None else ema_update)
    b, n = original.shape[:2]
    if vq.separate_codebook_per_head:
        quantized, codes = quantized.unflatten(1, (b, n)).movedim(0, 2), codes.unflatten(1, (b, n)).movedim(0, 2)
    else:
        quantized = quantized[0].unflatten(0, (b, vq.heads, n)).transpose(1, 2)
        codes = codes[0].unflatten(0, (b, vq.heads, n)).transpose(1, 2)
    quantized = vq.project_out(quantized.flatten(2))
    if mask is not None:
        left = torch.zeros_like(original) if vq.return_zeros_for_masked_padding else original
        quantized = torch.where(mask[..., None], quantized, left)
    codes = codes.squeeze(2) if vq.heads == 1 else codes
    codes, quantized = (t.unflatten(1, places[1:]) for t in (codes, quantized))
    if one:
        codes, quantized = codes[:, 0], quantized[:, 0]
    if first:
        quantized = quantized.movedim(-1, 1)
    loss = vq.zero.clone()
    if not (vq.training and vq.has_commitment_loss):
        commitment = vq.zero
    if vq.training:
        if not commitment.requires_grad:
            # as the original's does; a graph may return it only where something else needs its gradient
            loss.requires_grad_()
        loss = loss + commitment * vq.commitment_weight
    if return_loss_breakdown:
        return quantized, codes, loss, LossBreakdown(commitment, vq.zero, vq.zero, vq.zero)
    return quantized, codes, loss


def _nearest(book: Any, z: Tensor, embed: Tensor, wanted: Tensor | None) -> Tensor:
    # the cosine is of codes as they are: a unit length is theirs to keep
    codes = linear_argmax(z, embed) if book.use_cosine_sim else nearest_code(z, embed, mask=wanted)
    return codes if wanted is None else torch.where(wanted, codes, -1)


@torch.no_grad()
def _take_kmeans(book: Any, rows: Tensor, wanted: Tensor | None) -> None:
    reduce = book.kmeans_all_reduce_fn is dist.all_reduce
    found = []
    for x in rows:
        x = x if wanted is None else x[wanted]
        found.append(kmeans(x, book.codebook_size, book.kmeans_iters, book.use_cosine_sim, _EPS, reduce))
    means, sizes = (torch.stack(t) for t in zip(*found, strict=True))
    book.embed_avg.copy_(means * sizes[..., None])
    book.cluster_size.copy_(sizes)
    take_averages(book)
    book.initted.fill_(True)


@torch.no_grad()
def _update(book: Any, rows: Tensor, codes: Tensor, wanted: Tensor | None, ema_update: bool) -> None:
    if not ema_update and not book.threshold_ema_dead_code > 0:
        return
    # a code of every head has its own number: one pass, one all-reduce
    heads = torch.arange(len(rows), device=rows.device)[:, None] * book.codebook_size
    numbers = torch.where(codes < 0, -1, codes + heads)
    counts, sums = statistics(rows.flatten(0, 1), numbers.flatten(), book.embed_avg[..., 0].numel(), book.use_ddp)
    counts, sums = counts.view(book.cluster_size.shape), sums.view(book.embed_avg.shape)
    book.cluster_size.lerp_(counts.to(book.cluster_size), 1 - book.decay)
    book.embed_avg.lerp_(sums.to(book.embed_avg), 1 - book.decay)
    if ema_update and not book.manual_ema_update:
        take_averages(book)
    if book.threshold_ema_dead_code > 0:
        _replace_dead(book, rows, wanted)


@torch.no_grad()
def take_averages(book: Any) -> None:
    """embed = embed_avg / cluster_size, the sizes Laplace-smoothed."""
    total = book.cluster_size.sum(-1, keepdim=True)
    smoothed = (book.cluster_size + book.eps) / (total + book.codebook_size * book.eps) * total
    embed = book.embed_avg / smoothed[..., None]
    book.embed.copy_(unit(embed, _EPS) if book.use_cosine_sim else embed)


def _replace_dead(book: Any, rows: Tensor, wanted: Tensor | None) -> None:
    """Rows of the batch in place of codes that are hardly used; on a GPU no one asks how many they are."""
    dead = book.cluster_size < book.threshold_ema_dead_code
    n = rows.shape[1]
    count = torch.full((), n, device=rows.device) if wanted is None else wanted.sum()
    if book.use_ddp:  # every process has a row for every code that it deals
        dist.all_reduce(count, op=dist.ReduceOp.MIN)
    # on a CPU a look is free, and the generator stays where the original leaves it
    if n == 0 or (dead.device.type == "cpu" and not (count and dead.any())):
        return
    for h, x in enumerate(rows):
        chosen = _some_of(dead[h], count, book.use_ddp)
        if wanted is None:
            order = torch.randperm(n, device=x.device)
        else:  # those that count come first
            order = torch.where(wanted, torch.rand(n, device=x.device), 2).argsort()
        fresh = x[order[(chosen.cumsum(0) - 1).clamp(0, n - 1)]].to(book.embed)
        if book.use_cosine_sim:
            fresh = unit(fresh, _EPS)
        if book.use_ddp:
            fresh = shard_rows(fresh)
        taken = chosen[:, None]
        book.embed.data[h] = torch.where(taken, fresh, book.embed.data[h])
        book.embed_avg[h] = torch.where(taken, fresh * book.reset_cluster_size, book.embed_avg[h])
        book.cluster_size[h] = torch.where(chosen, book.reset_cluster_size, book.cluster_size[h])


def _some_of(dead: Tensor, count: Tensor, reduce: bool) -> Tensor:
    """At most `count` of the dead codes, at random: one that was just replaced may be dead again in the next step."""
    if dead.device.type == "cpu":
        at = dead.nonzero()[:, 0]
        at = at[torch.randperm(len(at))[: int(count)]] if len(at) > count else at
        chosen = torch.zeros_like(dead).index_fill_(0, at, True)
    else:
        # the place of each code in a random order of the dead
        place = torch.where(dead, torch.rand(dead.shape, device=dead.device), 2).argsort().argsort()
        chosen = dead & (place < count)
    if reduce:
        dist.broadcast(chosen, src=0)
    return chosen
