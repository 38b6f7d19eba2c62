"""What the families built on Qwen's network have in common: the names of its tensors and the fields of its config."""

from __future__ import annotations

from typing import Any

from .config import CheckpointError, ModelConfig, NameMap
from .fields import Fields

_LAYER = "model.layers.{i}"
_ATTENTION = f"{_LAYER}.self_attn"


def name_map(*, qkv_bias: bool = False, qk_norm: bool = False) -> NameMap:
    """The tensors of a checkpoint: Qwen2's with biases, Qwen3's with norms of queries and keys."""
    layer: dict[str, tuple[str, ...]] = {
        "attn_norm": (f"{_LAYER}.input_layernorm.weight",),
        "qkv": (f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
        "attn_out": (f"{_ATTENTION}.o_proj.weight",),
        "mlp_norm": (f"{_LAYER}.post_attention_layernorm.weight",),
        "gate_up": (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        "down": (f"{_LAYER}.mlp.down_proj.weight",),
    }
    if qkv_bias:
        layer["qkv_bias"] = (f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias")
    if qk_norm:
        layer |= {"q_norm": (f"{_ATTENTION}.q_norm.weight",), "k_norm": (f"{_ATTENTION}.k_norm.weight",)}
    return NameMap(embedding="model.embed_tokens.weight", final_norm="model.norm.weight", head="lm_head.weight", layer=layer)


def qwen_config(fields: Fields, *, qkv_bias: bool, own_head_dim: bool = False, **family: Any) -> ModelConfig:
    """Reads a config in Qwen's format.

    Args:
        fields: of the ``config.json``.
        qkv_bias: whether the q, k and v projections have biases.
        own_head_dim: whether the head dim is a field of its own, 128 where it is absent, as in Qwen3; otherwise it is what the
            width leaves for each head.
        family: what else the family has of a :class:`ModelConfig`.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    fields.supported(
        {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False, "attention_bias": qkv_bias, "mlp_bias": False}
    )
    if "layer_types" in fields and set(kinds := fields.texts("layer_types")) != {"full_attention"}:
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        raise CheckpointError(f"{fields.source}: layer_types must be 'full_attention' for every layer, got {other!r:.80}")
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if own_head_dim:
        head_dim = fields.integer("head_dim", 128)
    else:
        if width % heads:
            raise CheckpointError(f"{fields.source}: num_attention_heads = {heads} does not divide hidden_size = {width}")
        head_dim = width // heads
        fields.supported({"head_dim": head_dim})
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads") if "num_key_value_heads" in fields else heads,
        head_dim=head_dim,
        mlp=fields.integer("intermediate_size"),
        rope_theta=fields.rope_theta(10000.0),
        eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        max_length=fields.integer("max_position_embeddings"),
        tied=fields.flag("tie_word_embeddings", False),
        mask_id=fields.integer("mask_token_id", low=0, high=vocab_size - 1),
        eos_ids=fields.tokens("eos_token_id", vocab_size) if "eos_token_id" in fields else (),
        qkv_bias=qkv_bias,
        rope_rounding="dream",
        **family,
    )
