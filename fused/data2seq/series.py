"""Time series and IMU: values by a circular convolution, positions by sines, calendar marks by tables.

The layers of Informer (Zhou et al. 2021, arXiv:2012.07436) and PatchTST (Nie et al. 2023, arXiv:2211.14730) under the
key names of Meta-Transformer's time-series folder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# features per step that a frequency has: hours, minutes, seconds, months, years, weeks, days, business days
TIME_FEATURES = {"h": 4, "t": 5, "s": 6, "m": 1, "a": 1, "w": 2, "d": 3, "b": 3}
_TABLES = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}  # in the order of the marks' columns


def sinusoids(rows: int, width: int) -> Tensor:
    """The table [rows, width] of Vaswani et al. (2017): sine in the even columns, cosine in the odd ones."""
    if width % 2:
        raise ValueError(f"d_model is {width}, expected an even number: sines and cosines come in pairs")
    position = torch.arange(rows, dtype=torch.float32)[:, None]
    frequency = (torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width)).exp()
    return torch.stack([(position * frequency).sin(), (position * frequency).cos()], dim=-1).flatten(1)


class PositionalEmbedding(nn.Module):
    """x [B, L, ...] -> [1, L, d_model], the first L rows of a fixed table."""

    pe: Tensor

    def __init__(self, d_model: int, max_len: int = 5000):
        super().__init__()
        self.register_buffer("pe", sinusoids(max_len, d_model)[None])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.pe.shape[1]:
            raise ValueError(f"x has {x.shape[1]} steps, expected at most max_len {self.pe.shape[1]}")
        return self.pe[:, : x.shape[1]]


class TokenEmbedding(nn.Module):
    """[B, L, c_in] -> [B, L, d_model]: token t sees the steps t - 1, t and t + 1, modulo L."""

    def __init__(self, c_in: int, d_model: int):
        super().__init__()
        self.tokenConv = nn.Conv1d(c_in, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenConv(x.mT).mT


class FixedEmbedding(nn.Module):
    def __init__(self, c_in: int, d_model: int):
        super().__init__()
        self.emb = nn.Embedding(c_in, d_model)
        self.emb.weight = nn.Parameter(sinusoids(c_in, d_model), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.emb(x).detach()


class TemporalEmbedding(nn.Module):
    """marks [B, L, >= 4]: month, day, weekday, hour (and quarter of an hour for freq "t") -> the sum of their rows.

    Any other freq means the first four, as published.
    """

    def __init__(self, d_model: int, embed_type: str = "fixed", freq: str = "h"):
        super().__init__()
        table = FixedEmbedding if embed_type == "fixed" else nn.Embedding
        self.columns = list(_TABLES)[: 5 if freq == "t" else 4]
        for name in reversed(self.columns):
            self.add_module(f"{name}_embed", table(_TABLES[name], d_model))

    def forward(self, marks: Tensor) -> Tensor:
        if marks.shape[-1] < len(self.columns):
            raise ValueError(f"marks has shape {tuple(marks.shape)}, expected [B, L, {', '.join(self.columns)}]")
        tables = (self.get_submodule(f"{name}_embed") for name in self.columns)
        return sum(table(column) for table, column in zip(tables, marks.long().unbind(-1), strict=False))


class TimeFeatureEmbedding(nn.Module):
    """marks [B, L, TIME_FEATURES[freq]], real numbers -> [B, L, d_model]."""

    def __init__(self, d_model: int, freq: str = "h"):
        super().__init__()
        if freq not in TIME_FEATURES:
            raise ValueError(f"freq is {freq!r}, expected one of {', '.join(TIME_FEATURES)}")
        self.embed = nn.Linear(TIME_FEATURES[freq], d_model, bias=False)

    def forward(self, marks: Tensor) -> Tensor:
        if marks.shape[-1] != self.embed.in_features:
            raise ValueError(f"marks has shape {tuple(marks.shape)}, expected [B, L, {self.embed.in_features}]")
        return self.embed(marks)


class DataEmbedding(nn.Module):
    """Time series or IMU x [B, L, c_in], optionally with calendar marks [B, L, M] -> tokens [B, L, d_model].

    Args:
        embed_type: what embeds the marks: "fixed" sine tables, "learned" tables, or "timeF", a linear layer.
        freq: the unit of a step; it gives the number of marks.

    Raises:
        ValueError: an unknown embed_type, or freq for "timeF", an odd d_model, more steps than max_len, x without c_in
            channels, or too few marks.
    """

    def __init__(
        self,
        c_in: int,
        d_model: int,
        embed_type: str = "fixed",
        freq: str = "h",
        dropout: float = 0.1,
        max_len: int = 5000,
    ):
        super().__init__()
        if embed_type not in ("fixed", "learned", "timeF"):
            raise ValueError(f"embed_type is {embed_type!r}, expected 'fixed', 'learned' or 'timeF'")
        self.c_in = c_in
        self.value_embedding = TokenEmbedding(c_in, d_model)
        self.position_embedding = PositionalEmbedding(d_model, max_len)
        if embed_type == "timeF":
            self.temporal_embedding: nn.Module = TimeFeatureEmbedding(d_model, freq)
        else:
            self.temporal_embedding = TemporalEmbedding(d_model, embed_type, freq)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.c_in:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, L, {self.c_in}]")
        tokens = self.value_embedding(x) + self.position_embedding(x)
        if marks is not None:
            if marks.dim() != 3 or marks.shape[:2] != x.shape[:2]:
                raise ValueError(f"marks has shape {tuple(marks.shape)}, expected [B, L, M] with {list(x.shape[:2])}")
            tokens = tokens + self.temporal_embedding(marks)
        return self.dropout(tokens)


class PatchEmbedding(nn.Module):
    """PatchTST: x [B, variables, L] -> (tokens [B * variables, patches, d_model], variables).

    The last value is repeated `padding` times; then windows of patch_len steps, `stride` apart, are projected.
    """

    def __init__(self, d_model: int, patch_len: int, stride: int, padding: int, dropout: float):
        super().__init__()
        self.patch_len, self.stride, self.padding = patch_len, stride, padding
        self.value_embedding = nn.Linear(patch_len, d_model, bias=False)
        self.position_embedding = PositionalEmbedding(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        windows = F.pad(x, (0, self.padding), mode="replicate").unfold(-1, self.patch_len, self.stride)
        windows = windows.flatten(0, 1)
        return self.dropout(self.value_embedding(windows) + self.position_embedding(windows)), x.shape[1]
