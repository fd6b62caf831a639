"""Time series and IMU: forecasting, imputation, anomaly detection, classification.

Tokens are values by a circular convolution, with positions by sines and calendar marks by tables: the layers of
Informer (Zhou et al. 2021, arXiv:2012.07436) and PatchTST (Nie et al. 2023, arXiv:2211.14730).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.metatransformer.encoder import Encoder

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
        self.tokenConv = nn.Conv1d(c_in, d_model, 3, bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        # not padding_mode="circular", which ONNX has from opset 19 on and OpenVINO not at all
        return self.tokenConv(torch.cat([x[:, -1:], x, x[:, :1]], 1).mT).mT


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


FORECASTS = ("long_term_forecast", "short_term_forecast")
TASKS = (*FORECASTS, "imputation", "anomaly_detection", "classification")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = dim // heads * heads
        self.query_projection = nn.Linear(dim, inner)
        self.key_projection = nn.Linear(dim, inner)
        self.value_projection = nn.Linear(dim, inner)
        self.out_projection = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor, causal: bool) -> Tensor:
        q, k, v = self.query_projection(x), self.key_projection(context), self.value_projection(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
        return self.out_projection(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Post-norm: causal self-attention, attention to the series before, a two-layer MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, activation: str):
        super().__init__()
        self.self_attention = Attention(dim, heads, dropout)
        self.cross_attention = Attention(dim, heads, dropout)
        self.conv1 = nn.Conv1d(dim, hidden, 1)
        self.conv2 = nn.Conv1d(hidden, dim, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.activation = F.relu if activation == "relu" else F.gelu

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attention(x, x, causal=True)))
        x = self.norm2(x + self.dropout(self.cross_attention(x, context, causal=False)))
        y = self.dropout(self.activation(self.conv1(x.mT)))
        return self.norm3(x + self.dropout(self.conv2(y)).mT)


class Decoder(nn.Module):
    def __init__(self, layers: list[DecoderLayer], dim: int, c_out: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, c_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, context)
        return self.projection(self.norm(x))


class TimeSeries(nn.Module):
    """x_enc [B, seq_len, enc_in], marks [B, seq_len, M] or None -> by `task_name`:

    - long_term_forecast, short_term_forecast: the last pred_len steps [B, pred_len, c_out] of x_dec [B, L, dec_in],
      which holds known steps and then zeros, with its marks;
    - imputation: [B, seq_len, c_out]; anomaly_detection: the same, without the marks;
    - classification: [B, num_class], where x_mark_enc [B, seq_len] is 1 for real steps and 0 for padding.

    The last three fail in the published code, which passes a mask that its encoder does not take; they are here as
    written there, without the mask. The decoder's attention never has `output_attention`, as published.
    """

    encoder_prefix = "encoder."

    def __init__(
        self,
        task_name: str,
        enc_in: int,
        pred_len: int = 96,
        output_attention: bool = False,
        d_model: int = 768,
        dec_in: int = 7,
        c_out: int = 7,
        embed: str = "timeF",
        freq: str = "h",
        dropout: float = 0.1,
        factor: int = 1,
        n_heads: int = 8,
        d_ff: int | None = 2048,
        d_layers: int = 1,
        activation: str = "gelu",
        seq_len: int = 96,
        num_class: int = 2,
        max_len: int = 5000,
        encoder_num_heads: int | None = None,
    ):
        super().__init__()
        if task_name not in TASKS:
            raise ValueError(f"task_name is {task_name!r}, expected one of {', '.join(TASKS)}")
        self.task_name, self.pred_len, self.heads = task_name, pred_len, encoder_num_heads
        self.enc_embedding = DataEmbedding(enc_in, d_model, embed, freq, dropout, max_len)
        if task_name in FORECASTS:
            self.dec_embedding = DataEmbedding(dec_in, d_model, embed, freq, dropout, max_len)
            hidden = d_ff or 4 * d_model
            layers = [DecoderLayer(d_model, n_heads, hidden, dropout, activation) for _ in range(d_layers)]
            self.decoder = Decoder(layers, d_model, c_out)
        elif task_name == "classification":
            self.dropout = nn.Dropout(dropout)
            self.projection = nn.Linear(d_model * seq_len, num_class)
        else:
            self.projection = nn.Linear(d_model, c_out)

    def tokens(self, x_enc: Tensor, x_mark_enc: Tensor | None = None, *decoder: Tensor | None) -> Tensor:
        unmarked = self.task_name in ("anomaly_detection", "classification")
        return self.enc_embedding(x_enc, None if unmarked else x_mark_enc)

    def forward(
        self,
        encoder: Encoder,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,
        x_dec: Tensor | None = None,
        x_mark_dec: Tensor | None = None,
    ) -> Tensor:
        x = encoder(self.tokens(x_enc, x_mark_enc), heads=self.heads)
        if self.task_name in FORECASTS:
            if x_dec is None:
                raise ValueError("x_dec is None, expected the decoder's input [B, L, dec_in] to forecast")
            return self.decoder(self.dec_embedding(x_dec, x_mark_dec), x)[:, -self.pred_len :]
        if self.task_name == "classification":
            x = self.dropout(F.gelu(x))
            if x_mark_enc is not None:
                x = x * x_mark_enc[..., None]
            x = x.flatten(1)
        return self.projection(x)
