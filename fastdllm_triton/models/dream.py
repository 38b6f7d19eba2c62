"""Dream (Ye et al., arXiv 2508.15487) and the models of its family, such as DiffuCoder: a config and a name map, nothing else.

A Qwen2 transformer without the causal mask: grouped queries, biases on q, k and v. Predictions are shifted: the hidden state
of position ``i - 1`` predicts the token at position ``i``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import CheckpointError, ModelConfig, NameMap
from .fields import Fields

_LAYER = "model.layers.{i}"
_ATTENTION = f"{_LAYER}.self_attn"

NAMES = NameMap(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    layer={
        "attn_norm": (f"{_LAYER}.input_layernorm.weight",),
        "qkv": (f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
        "qkv_bias": (f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias"),
        "attn_out": (f"{_ATTENTION}.o_proj.weight",),
        "mlp_norm": (f"{_LAYER}.post_attention_layernorm.weight",),
        "gate_up": (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        "down": (f"{_LAYER}.mlp.down_proj.weight",),
    },
)

#: Variants that the format can express and no released checkpoint uses: field, the value that is supported.
_SUPPORTED = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False, "attention_bias": True, "mlp_bias": False}


def config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads Dream's ``config.json``.

    Args:
        raw: its fields.
        source: how errors name it.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    fields = Fields(raw, source)
    fields.supported(_SUPPORTED)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        raise CheckpointError(f"{source}: num_attention_heads = {heads} does not divide hidden_size = {width}")
    fields.supported({"head_dim": width // heads})
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture="dream",
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads") if "num_key_value_heads" in fields else heads,
        head_dim=width // heads,
        mlp=fields.integer("intermediate_size"),
        rope_theta=fields.rope_theta(10000.0),
        eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        max_length=fields.integer("max_position_embeddings"),
        tied=fields.flag("tie_word_embeddings", False),
        mask_id=fields.integer("mask_token_id", low=0, high=vocab_size - 1),
        eos_ids=fields.tokens("eos_token_id", vocab_size) if "eos_token_id" in fields else (),
        qkv_bias=True,
        shift=True,
        rope_rounding="dream",
    )
