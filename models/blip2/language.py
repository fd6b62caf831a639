"""The language models, which are transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


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
    return model


def _transformers() -> Any:
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    import transformers

    return transformers
