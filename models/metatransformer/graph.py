"""Graphs: a token per node and per edge (TokenGT, Kim et al. 2022, arXiv:2207.02505)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.metatransformer.encoder import Encoder


def laplacian_eigenvectors(edge_index: Tensor, nodes: int) -> Tensor:
    """Eigenvectors [nodes, nodes] of I - D^-1/2 A D^-1/2 in columns, the smoothest first. edge_index: int64 [2, E]."""
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64, device=edge_index.device)
    adjacency[edge_index[0], edge_index[1]] = 1
    scale = adjacency.sum(1).clamp(min=1).rsqrt()
    laplacian = torch.eye(nodes, dtype=torch.float64, device=edge_index.device) - scale[:, None] * adjacency * scale
    return torch.linalg.eigh(laplacian).eigenvectors.float()


def orthogonal_node_ids(gaussian: Tensor) -> Tensor:
    """[B, n, n] normal numbers -> one orthonormal row per node: the transposed Q of their QR decomposition."""
    return F.normalize(torch.linalg.qr(gaussian).Q.mT, dim=2)


class GraphFeatureTokenizer(nn.Module):
    """Graphs -> (tokens [B, 2 + T, D], padding [B, 2 + T] bool, end points [B, T, 2] int64).

    A graph is a mapping with "node_num" and "edge_num" (lists of B ints; from a tensor they are read, which waits for
    the device), "node_data" int64 [sum of nodes, F], "edge_data" int64 [sum of edges, F'], "edge_index" int64
    [2, sum of edges] (node numbers within their graph) and, for Laplacian ids, "lap_eigvec" [sum of nodes, k].
    Tokens of a graph: the graph token, a null token, its nodes, its edges, zeros. T is the most nodes and edges.

    With node ids P and an encoder W = [A | B], the token of (u, v) gets W [P_u; P_v] = A P_u + B P_v: the two products
    are made once per node and gathered.

    Raises:
        ValueError: counts that do not fit the data.

    Args:
        rand_node_id, orf_node_id, lap_node_id: which ids tell nodes apart: random, orthonormal, Laplacian eigenvectors.
        lap_node_id_sign_flip: while training, every eigenvector of every graph has a random sign.
        lap_node_id_eig_dropout: dropout of the eigenvectors. The published default of 1 drops all of them.
        type_id: whether a token tells a node (u = v) from an edge.
    """

    def __init__(
        self,
        num_atoms: int,
        num_edges: int,
        hidden_dim: int,
        n_layers: int = 1,
        rand_node_id: bool = False,
        rand_node_id_dim: int = 64,
        orf_node_id: bool = False,
        orf_node_id_dim: int = 64,
        lap_node_id: bool = False,
        lap_node_id_k: int = 8,
        lap_node_id_sign_flip: bool = False,
        lap_node_id_eig_dropout: float = 0.0,
        type_id: bool = False,
    ):
        super().__init__()
        self.rand_node_id_dim, self.orf_node_id_dim, self.lap_node_id_k = (
            rand_node_id_dim,
            orf_node_id_dim,
            lap_node_id_k,
        )
        self.lap_node_id_sign_flip, self.eig_dropout = lap_node_id_sign_flip, lap_node_id_eig_dropout
        self.atom_encoder = nn.Embedding(num_atoms, hidden_dim, padding_idx=0)
        self.edge_encoder = nn.Embedding(num_edges, hidden_dim, padding_idx=0)
        self.graph_token = nn.Embedding(1, hidden_dim)
        self.null_token = nn.Embedding(1, hidden_dim)
        self.rand_encoder = nn.Linear(2 * rand_node_id_dim, hidden_dim, bias=False) if rand_node_id else None
        self.lap_encoder = nn.Linear(2 * lap_node_id_k, hidden_dim, bias=False) if lap_node_id else None
        self.orf_encoder = nn.Linear(2 * orf_node_id_dim, hidden_dim, bias=False) if orf_node_id else None
        self.order_encoder = nn.Embedding(2, hidden_dim) if type_id else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(n_layers))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        graph: Mapping[str, Any],
        perturb: Tensor | None = None,
        *,
        rand_node_id: Tensor | None = None,
        orf_gaussian: Tensor | None = None,
        signs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`perturb` [B, most nodes, D] is added to the nodes. Drawn where not given: `rand_node_id` uniform
        [sum of nodes, rand_node_id_dim], `orf_gaussian` normal [B, most nodes, most nodes], `signs` +-1 [B, k]."""
        nodes, edges = _counts(graph["node_num"]), _counts(graph["edge_num"])
        edge_index = graph["edge_index"]
        device, dtype = edge_index.device, self.atom_encoder.weight.dtype
        given = len(graph["node_data"]), len(graph["edge_data"]), edge_index.shape[1]
        if given != (sum(nodes), sum(edges), sum(edges)) or len(nodes) != len(edges):
            raise ValueError(
                f"node_num {nodes} and edge_num {edges} do not fit: node_data has {given[0]} rows, "
                f"edge_data {given[1]}, edge_index {given[2]} columns"
            )
        graphs, most = torch.arange(len(nodes), device=device), max(nodes, default=0)
        node_num, edge_num = (torch.tensor(counts, dtype=torch.int64, device=device) for counts in (nodes, edges))
        graph_of_node = graphs.repeat_interleave(node_num, output_size=sum(nodes))
        graph_of_edge = graphs.repeat_interleave(edge_num, output_size=sum(edges))
        first_node = node_num.cumsum(0) - node_num
        first_edge = edge_num.cumsum(0) - edge_num
        node = torch.arange(sum(nodes), device=device) - first_node[graph_of_node]  # its number within its graph
        edge = torch.arange(sum(edges), device=device) - first_edge[graph_of_edge]

        # every token is of a graph, at a place, between two nodes
        of = torch.cat([graph_of_node, graph_of_edge])
        place = torch.cat([node, node_num[graph_of_edge] + edge])
        ends = torch.cat([node.expand(2, -1), edge_index], dim=1)  # [2, tokens]
        node_features = self.atom_encoder(graph["node_data"]).sum(-2)
        if perturb is not None:
            node_features = node_features + perturb[graph_of_node, node].to(dtype)
        tokens = torch.cat([node_features, self.edge_encoder(graph["edge_data"]).sum(-2)])  # [tokens, D]
        u, v = ends + first_node[of]

        def add(tokens: Tensor, encoder: nn.Linear, ids: Tensor) -> Tensor:
            a, b = encoder.weight.chunk(2, dim=1)  # each [D, k]
            return tokens + (ids @ a.T)[u] + (ids @ b.T)[v]

        if self.rand_encoder is not None:
            if rand_node_id is None:
                rand_node_id = torch.rand(sum(nodes), self.rand_node_id_dim, device=device, dtype=dtype)
            tokens = add(tokens, self.rand_encoder, F.normalize(rand_node_id, dim=1))
        if self.orf_encoder is not None:
            if orf_gaussian is None:
                orf_gaussian = torch.randn(len(nodes), most, most, device=device, dtype=dtype)
            ids = _resized(orthogonal_node_ids(orf_gaussian)[graph_of_node, node], self.orf_node_id_dim)
            tokens = add(tokens, self.orf_encoder, F.normalize(ids, dim=1))
        if self.lap_encoder is not None:
            ids = _resized(graph["lap_eigvec"].to(dtype), self.lap_node_id_k)
            ids = F.dropout(ids, self.eig_dropout, self.training)
            if self.lap_node_id_sign_flip and self.training:
                if signs is None:
                    signs = torch.randint(2, (len(nodes), ids.shape[1]), device=device) * 2 - 1
                ids = ids * signs[graph_of_node]
            tokens = add(tokens, self.lap_encoder, ids)
        if self.order_encoder is not None:
            tokens = tokens + self.order_encoder((u == v).long())

        length = max((n + e for n, e in zip(nodes, edges, strict=True)), default=0)
        padded = tokens.new_zeros(len(nodes), length, tokens.shape[1]).index_put((of, place), tokens)
        index = ends.new_zeros(len(nodes), length, 2).index_put((of, place), ends.T)
        special = torch.cat([self.graph_token.weight, self.null_token.weight]).expand(len(nodes), -1, -1)
        padding = torch.arange(length + 2, device=device) >= (node_num + edge_num + 2)[:, None]
        return torch.cat([special, padded], dim=1), padding, index


def _counts(numbers: Tensor | Sequence[int]) -> list[int]:
    return numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)


def _resized(ids: Tensor, width: int) -> Tensor:
    """Cut, or padded with zeros."""
    return F.pad(ids, (0, width - ids.shape[1]))


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
