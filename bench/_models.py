"""Networks with random weights, at the true sizes of the published models or tiny, made where they run; no download."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from fastdllm_triton.model import MaskedDiffusionLM
from fastdllm_triton.models.config import ModelConfig
from fastdllm_triton.models.published import DREAM_7B, FAST_DLLM_V2_7B, LLADA_8B, PUBLISHED, SDAR_4B
from fastdllm_triton.models.transformer import Transformer, Weights
from fastdllm_triton.ops import resolve

_TINY: dict[str, Any] = {
    "layers": 2, "head_dim": 16, "mlp": 96, "vocab_size": 320, "embedding_size": 320, "mask_id": 319, "eos_ids": (318,),
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "layers": 12, "width": 768, "heads": 12, "head_dim": 64, "vocab_size": 32_000, "embedding_size": 32_000, "mask_id": 31_999,
    "eos_ids": (31_998,),
}  # fmt: skip
#: The large ones, their formats in a size that a CPU runs, and their head ratios and formats in sizes that the interpreter runs.
MODELS = {
    **PUBLISHED,
    "llada-134m": replace(LLADA_8B, **_SMALL, kv_heads=12, mlp=2048),
    "dream-139m": replace(DREAM_7B, **_SMALL, kv_heads=4, mlp=2560),
    "tiny llada": replace(LLADA_8B, **_TINY, width=64, heads=4, kv_heads=4),
    "tiny dream": replace(DREAM_7B, **_TINY, width=112, heads=7, kv_heads=1),
    "tiny sdar": replace(SDAR_4B, **_TINY, width=40, heads=4, kv_heads=1),
    "tiny v2": replace(FAST_DLLM_V2_7B, **_TINY, width=112, heads=7, kv_heads=1),
}


def config_of(model: str) -> ModelConfig:
    """The config of a model of :data:`MODELS`, with room for any context."""
    return replace(MODELS[model], max_length=2**20)


@lru_cache(maxsize=1)
def network_of(
    model: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", layers: int | None = None
) -> Transformer:
    """A network with random weights drawn from one seed, with all layers or the first few; the last one made is kept."""
    config = config_of(model) if layers is None else replace(config_of(model), layers=layers)
    weights = Weights.allocate(config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    norms = [weights.final_norm]
    for layer in weights.layers:
        norms += [layer.attn_norm, layer.mlp_norm]
        norms += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    biases = [layer.qkv_bias for layer in weights.layers if layer.qkv_bias is not None]
    matrices = [weights.embedding, weights.head]
    matrices += [m.weight for layer in weights.layers for m in (layer.qkv, layer.attn_out, layer.gate_up, layer.down)]
    for tensor in matrices + biases:
        tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    for norm in norms:
        norm.fill_(1)
    weights.head[config.mask_id].zero_()  # the official loops, which let [MASK] win, are not to commit it
    return Transformer(config, weights, resolve(backend, device))


def release(model: MaskedDiffusionLM) -> None:
    """Gives back the memory of buffers and captured steps that generations left behind, before something else is measured."""
    model.release()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def prompt_of(model: str, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """``[rows, length]`` random ids that are neither [MASK] nor the end."""
    high = min(MODELS[model].vocab_size - 2, 100_000)
    return torch.randint(high, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
