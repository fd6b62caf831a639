"""Small sizes of the models that stand on BLIP-2's encoders, and of transformers' classes of the same."""

from __future__ import annotations

ARGS = {"img_size": 16, "num_query_token": 3}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
}
T5_SIZES = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
HF_VISION = {
    "hidden_size": 16,
    "intermediate_size": int(16 * 4.3637),
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
HF_QFORMER = {**BERT, "vocab_size": 40, "encoder_hidden_size": 16, "layer_norm_eps": 1e-12}
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
