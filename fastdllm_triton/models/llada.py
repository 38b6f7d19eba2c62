"""LLaDA (Nie et al., arXiv 2502.09992) and the models of its family: a config and a name map, nothing else."""

from __future__ import annotations

from typing import Any

from .config import CheckpointError, ModelConfig, NameMap, require_supported, rope_theta, token_ids

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


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads LLaDA's ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for a variant that is not supported.
    """
    require_supported(raw, _SUPPORTED)
    try:
        heads = raw["n_heads"]
        kv_heads = raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads)
        if raw["d_model"] % heads:
            raise CheckpointError(f"config.json: n_heads = {heads} does not divide d_model = {raw['d_model']}")
        return ModelConfig(
            architecture="llada",
            vocab_size=raw["vocab_size"],
            embedding_size=raw.get("embedding_size") or raw["vocab_size"],
            width=raw["d_model"],
            layers=raw["n_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=raw["d_model"] // heads,
            mlp=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
            rope_theta=rope_theta(raw, 10000.0),
            eps=raw.get("rms_norm_eps", 1e-5),
            max_length=raw["max_sequence_length"],
            tied=raw.get("weight_tying", True),
            mask_id=raw["mask_token_id"],
            eos_ids=token_ids(raw["eos_token_id"]),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: the field {error.args[0]!r} is missing") from None
