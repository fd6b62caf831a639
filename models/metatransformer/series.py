"""Time series: forecasting, imputation, anomaly detection, classification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.data2seq import DataEmbedding
from mmfuse.models.metatransformer.encoder import Encoder

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
