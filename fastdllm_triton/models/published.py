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

#: GSAI-ML/LLaDA-8B-Instruct, GSAI-ML/LLaDA-1.5 and Dream-org/Dream-v0-Instruct-7B, by the names that commands take.
PUBLISHED = {"llada-8b": LLADA_8B, "llada-1.5": LLADA_8B, "dream-7b": DREAM_7B}
