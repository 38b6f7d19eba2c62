"""The sizes of the published models, from their ``config.json``: the one place where they stand as numbers."""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig

LLADA_8B = ModelConfig(
    architecture="llada",
    vocab_size=126_464,
    embedding_size=126_464,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp=12_288,
    rope_theta=500_000.0,
    eps=1e-5,
    max_length=4096,
    tied=False,
    mask_id=126_336,
    eos_ids=(126_081,),
)
DREAM_7B = replace(
    LLADA_8B,
    architecture="dream",
    vocab_size=152_064,
    embedding_size=152_064,
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18_944,
    rope_theta=1_000_000.0,
    eps=1e-6,
    max_length=131_072,
    mask_id=151_666,
    eos_ids=(151_643,),
    qkv_bias=True,
    shift=True,
    rope_rounding="dream",
)

FAST_DLLM_V2_7B = replace(
    DREAM_7B, architecture="fast_dllm_qwen", max_length=32_768, mask_id=151_665, eos_ids=(151_645,), block_length=32
)
FAST_DLLM_V2_1_5B = replace(
    FAST_DLLM_V2_7B,
    vocab_size=151_936,
    embedding_size=151_936,
    width=1536,
    heads=12,
    kv_heads=2,
    mlp=8960,
    tied=True,
)
SDAR_8B = replace(
    FAST_DLLM_V2_7B,
    architecture="sdar",
    vocab_size=151_936,
    embedding_size=151_936,
    width=4096,
    layers=36,
    heads=32,
    kv_heads=8,
    mlp=12_288,
    mask_id=151_669,
    eos_ids=(151_645, 151_643),
    qkv_bias=False,
    shift=False,
    qk_norm=True,
    norm_rounding="flash_attn",
    block_length=4,
)
SDAR_4B = replace(SDAR_8B, width=2560, mlp=9728)
#: Qwen3-1.7B's shape; whether the published weights are tied as Qwen's are is for their config to say.
SDAR_1_7B = replace(SDAR_8B, layers=28, width=2048, heads=16, mlp=6144)

#: GSAI-ML/LLaDA-8B-Instruct, GSAI-ML/LLaDA-1.5, Dream-org/Dream-v0-Instruct-7B, Efficient-Large-Model/Fast_dLLM_v2_1.5B and
#: Fast_dLLM_v2_7B, JetLM/SDAR-1.7B-Chat, SDAR-4B-Chat and SDAR-8B-Chat, by the names that commands take.
PUBLISHED = {
    "llada-8b": LLADA_8B,
    "llada-1.5": LLADA_8B,
    "dream-7b": DREAM_7B,
    "fast-dllm-v2-1.5b": FAST_DLLM_V2_1_5B,
    "fast-dllm-v2-7b": FAST_DLLM_V2_7B,
    "sdar-1.7b": SDAR_1_7B,
    "sdar-4b": SDAR_4B,
    "sdar-8b": SDAR_8B,
}
