"""Dream (Ye et al., arXiv 2508.15487) and the models of its family, such as DiffuCoder: a config and a name map, nothing else.

A Qwen2 transformer without the causal mask: grouped queries, biases on q, k and v. Predictions are shifted: the hidden state
of position ``i - 1`` predicts the token at position ``i``.
"""

from __future__ import annotations

from typing import Any

from .config import CheckpointError, ModelConfig, NameMap, require_supported, rope_theta, token_ids

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


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads Dream's ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for a variant that is not supported.
    """
    require_supported(raw, _SUPPORTED)
    try:
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        if width % heads:
            raise CheckpointError(f"config.json: num_attention_heads = {heads} does not divide hidden_size = {width}")
        require_supported(raw, {"head_dim": width // heads})
        return ModelConfig(
            architecture="dream",
            vocab_size=raw["vocab_size"],
            embedding_size=raw["vocab_size"],
            width=width,
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=width // heads,
            mlp=raw["intermediate_size"],
            rope_theta=rope_theta(raw, 10000.0),
            eps=raw.get("rms_norm_eps", 1e-6),
            max_length=raw["max_position_embeddings"],
            tied=raw.get("tie_word_embeddings", False),
            mask_id=raw["mask_token_id"],
            eos_ids=token_ids(raw.get("eos_token_id")),
            qkv_bias=True,
            shift=True,
            rope_rounding="dream",
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: the field {error.args[0]!r} is missing") from None
