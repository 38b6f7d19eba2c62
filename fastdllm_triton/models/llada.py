"""LLaDA (Nie et al., arXiv 2502.09992) and the models of its family: a config and a name map, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import CheckpointError, ModelConfig, NameMap
from .fields import Fields

_PREFIX = "model.transformer"
_BLOCK = f"{_PREFIX}.blocks.{{i}}"

NAMES = NameMap(
    embedding=f"{_PREFIX}.wte.weight",
    final_norm=f"{_PREFIX}.ln_f.weight",
    head=f"{_PREFIX}.ff_out.weight",
    layer={
        "attn_norm": (f"{_BLOCK}.attn_norm.weight",),
        "qkv": (f"{_BLOCK}.q_proj.weight", f"{_BLOCK}.k_proj.weight", f"{_BLOCK}.v_proj.weight"),
        "attn_out": (f"{_BLOCK}.attn_out.weight",),
        "mlp_norm": (f"{_BLOCK}.ff_norm.weight",),
        "gate_up": (f"{_BLOCK}.ff_proj.weight", f"{_BLOCK}.up_proj.weight"),
        "down": (f"{_BLOCK}.ff_out.weight",),
    },
)

#: Variants that the modelling code knows and no released checkpoint uses: field, the value that is supported.
_SUPPORTED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


def config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads LLaDA's ``config.json``.

    Args:
        raw: its fields.
        source: how errors name it.

    Raises:
        CheckpointError: a field is missing, of another type or out of its range, or asks for a variant that is not supported.
    """
    fields = Fields(raw, source)
    fields.supported(_SUPPORTED)
    width, heads, vocab_size = fields.integer("d_model"), fields.integer("n_heads"), fields.integer("vocab_size")
    if width % heads:
        raise CheckpointError(f"{source}: n_heads = {heads} does not divide d_model = {width}")
    shared = "multi_query_attention" in fields and fields.flag("multi_query_attention")
    return ModelConfig(
        architecture="llada",
        vocab_size=vocab_size,
        embedding_size=fields.integer("embedding_size") if "embedding_size" in fields else vocab_size,
        width=width,
        layers=fields.integer("n_layers"),
        heads=heads,
        kv_heads=fields.integer("n_kv_heads") if "n_kv_heads" in fields else 1 if shared else heads,
        head_dim=width // heads,
        mlp=fields.integer("mlp_hidden_size") if "mlp_hidden_size" in fields else fields.integer("mlp_ratio") * width,
        rope_theta=fields.rope_theta(10000.0),
        eps=fields.number("rms_norm_eps", 1e-5, high=1.0),
        max_length=fields.integer("max_sequence_length"),
        tied=fields.flag("weight_tying", True),
        mask_id=fields.integer("mask_token_id", low=0, high=vocab_size - 1),
        eos_ids=fields.tokens("eos_token_id", vocab_size),
    )
