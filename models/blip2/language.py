"""The language models, which are transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.fused.captioning import keep_top_p


def _opt_sizes(hidden: int, ffn: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": ffn}
    return {**sizes, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272}


def _t5_sizes(width: int, heads: int, ffn: int) -> dict[str, Any]:
    sizes = {"d_model": width, "num_heads": heads, "d_ff": ffn, "d_kv": 64, "num_layers": 24, "vocab_size": 32128}
    return {**sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _llama_sizes(width: int, layers: int, ffn: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": layers}
    return {**sizes, "intermediate_size": ffn, "vocab_size": 32000, "rms_norm_eps": 1e-6}


OPT_2_7B, OPT_6_7B = _opt_sizes(2560, 10240), _opt_sizes(4096, 16384)
FLAN_T5_XL, FLAN_T5_XXL = _t5_sizes(2048, 32, 5120), _t5_sizes(4096, 64, 10240)
LLAMA_7B, LLAMA_13B = _llama_sizes(4096, 32, 11008), _llama_sizes(5120, 40, 13824)


def opt(config: Mapping[str, Any]) -> nn.Module:
    """OPT (Zhang et al. 2022, arXiv:2205.01068) of transformers' config."""
    transformers = _transformers()
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config))


def t5(config: Mapping[str, Any], activation: str = "gelu") -> nn.Module:
    """Flan-T5 (Chung et al. 2022, arXiv:2210.11416); `activation` as LAVIS has it, in the place of the config's."""
    transformers = _transformers()
    given = transformers.T5Config(**config)
    given.dense_act_fn = activation
    model = transformers.T5ForConditionalGeneration(given)
    if not config.get("tie_word_embeddings", True):
        # transformers 5 ties it whatever the config says
        model.lm_head = nn.Linear(given.d_model, given.vocab_size, bias=False)
        nn.init.normal_(model.lm_head.weight, std=given.initializer_factor)
    return _with_exact_norms(model)


def llama(config: Mapping[str, Any]) -> nn.Module:
    """Llama (Touvron et al. 2023, arXiv:2302.13971), Vicuna among them, of transformers' config."""
    transformers = _transformers()
    return _with_exact_norms(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)))


def clip_text(config: Mapping[str, Any]) -> nn.Module:
    """CLIP's text encoder, as Stable Diffusion has it, of transformers' config."""
    transformers = _transformers()
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))


def _with_exact_norms(model: nn.Module) -> nn.Module:
    """With torch's RMSNorm: transformers' rounds float64 to float32."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return model


def without_frequencies(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the rotary frequencies that older releases of transformers stored with each layer."""
    return {key: t for key, t in state_dict.items() if not key.endswith("rotary_emb.inv_freq")}


def in_order(t: Tensor, rank: Tensor) -> Tensor:
    """Each row of [B, L, ...] with the lowest ranks [B, L] first, equal ones as they were."""
    order = rank.argsort(dim=1, stable=True)
    return t.gather(1, order.view(*order.shape, *[1] * (t.dim() - 2)).expand_as(t))


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """A word [...] for logits [..., V], drawn from the fewest that have the probability `top_p` together."""
    kept = keep_top_p(logits.reshape(-1, logits.shape[-1]), top_p)
    return kept.softmax(-1).multinomial(1).view(logits.shape[:-1])


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy [B], by which candidates are ranked: ignored tokens (-100) count as 0 in the mean."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)


def _transformers() -> Any:
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    import transformers

    return transformers
