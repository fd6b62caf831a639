"""open_clip's CoCa with captions from cached keys and values.

Its training is left: `forward` returns the captions' logits [B, L, V], so they have to be there. `mmfuse.models`' CoCa
has a `loss` that does without.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmfuse.fused import captioning

_BLOCK = ("open_clip.transformer:ResidualAttentionBlock", "open_clip.transformer:CustomResidualAttentionBlock")
_ATTENTION = ("torch.nn.modules.activation:MultiheadAttention", "open_clip.transformer:Attention")
_PROJECTION = ("torch.nn.modules.linear:NonDynamicallyQuantizableLinear", "torch.nn.modules.linear:Linear")
CHILDREN = {
    "text": ("open_clip.transformer:TextTransformer",),
    "text.transformer": ("open_clip.transformer:Transformer",),
    "text_decoder": ("open_clip.transformer:MultimodalTransformer",),
    **{
        f"{blocks}.*{path}": classes
        for blocks in ("text.transformer.resblocks", "text_decoder.resblocks", "text_decoder.cross_attn")
        for path, classes in (("", _BLOCK), (".attn", _ATTENTION), (".attn.out_proj", _PROJECTION))
    },
    # they are called, a token at a time
    "text.**": (),
    "text_decoder.**": (),
}


def generate(
    model: Any,
    image: Tensor,
    text: Tensor | None = None,
    seq_len: int = 30,
    max_seq_len: int = 77,
    temperature: float = 1.0,
    generation_type: str = "beam_search",
    top_p: float = 0.1,
    top_k: int = 1,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    sot_token_id: int | None = None,
    num_beams: int = 6,
    num_beam_groups: int = 3,
    min_seq_len: int = 5,
    stopping_criteria: Any = None,
    repetition_penalty: float = 1.0,
    fixed_output_length: bool = False,
) -> Tensor:
    """The model's generate, the tokens and the draws of a seed included; it does not need transformers.

    open_clip runs both text towers on the whole caption at every token, projects the image tokens again each time, and
    a beam search encodes an image once per beam. Its own code still runs where there are `stopping_criteria`, or tokens
    that are no integers, and in training mode, where the image tower may be random.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "image", "stopping_criteria")}
    no_integer = any(t is not None and not isinstance(t, int) for t in (pad_token_id, eos_token_id, sot_token_id))
    if model.training or no_integer or stopping_criteria is not None:
        return type(model).generate(model, image, stopping_criteria=stopping_criteria, **options)
    return captioning.generate(model, image, **options)


def reason_against(model: Any) -> str | None:
    """Why a CoCa of open_clip cannot keep keys and values of its captions, or None."""
    if model.text.attn_mask is None:
        return "its text tower has no causal mask, so every token changes with the next one"
    if model.text.cls_emb is None:
        return "its text tower has no class token, and open_clip's own generate fails without"
    towers = (*model.text.transformer.modules(), *model.text_decoder.modules())
    if any(isinstance(m, nn.MultiheadAttention) and (m.bias_k is not None or m.add_zero_attn) for m in towers):
        return "its attention adds a key"
    return None
