"""Networks with random weights, at the true sizes of LLaDA-8B and Dream-7B or tiny, made where they run; no download."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import lru_cache

import torch

from fastdllm_triton.model import MaskedDiffusionLM
from fastdllm_triton.models.config import ModelConfig
from fastdllm_triton.models.transformer import Transformer, Weights
from fastdllm_triton.ops import resolve
from fastdllm_triton.tools.roofline import SHAPES, Shape

#: Head ratio and format of the large ones, sizes that the interpreter runs.
TINY = {
    "tiny llada": Shape("tiny LLaDA", 2, 64, 4, 4, 16, 96, 320),
    "tiny dream": Shape("tiny Dream", 2, 112, 7, 1, 16, 96, 320),
}
MODELS = {"llada-8b": SHAPES["llada-8b"], "dream-7b": SHAPES["dream-7b"], **TINY}
#: Base of the rotary frequencies, eps, and the ids of [MASK] and of the end, from the models' config.json.
_LLADA, _DREAM = (500_000.0, 1e-5, 126_336, 126_081), (1_000_000.0, 1e-6, 151_666, 151_643)


def config_of(model: str) -> ModelConfig:
    """The config of a model of :data:`MODELS`, with room for any context."""
    s, dream = MODELS[model], "dream" in model
    theta, eps, mask_id, eos_id = _DREAM if dream else _LLADA
    found = ModelConfig(
        architecture="dream" if dream else "llada",
        vocab_size=s.vocab_size,
        embedding_size=s.vocab_size,
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        mlp=s.mlp,
        rope_theta=theta,
        eps=eps,
        max_length=2**20,
        tied=False,
        mask_id=min(mask_id, s.vocab_size - 1),
        eos_ids=(min(eos_id, s.vocab_size - 2),),
    )
    return replace(found, qkv_bias=True, shift=True, rope_rounding="dream") if dream else found


@lru_cache(maxsize=1)
def network_of(
    model: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", layers: int | None = None
) -> Transformer:
    """A network with random weights, drawn from one seed, with all layers or so many; the last one is kept."""
    config = config_of(model) if layers is None else replace(config_of(model), layers=layers)
    weights = Weights.allocate(config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    norms = [weights.final_norm, *(norm for layer in weights.layers for norm in (layer.attn_norm, layer.mlp_norm))]
    biases = [layer.qkv_bias for layer in weights.layers if layer.qkv_bias is not None]
    matrices = [weights.embedding, weights.head]
    matrices += [m.weight for layer in weights.layers for m in (layer.qkv, layer.attn_out, layer.gate_up, layer.down)]
    for tensor in matrices + biases:
        tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    for norm in norms:
        norm.fill_(1)
    return Transformer(config, weights, resolve(backend, device))


def release(model: MaskedDiffusionLM) -> None:
    """Gives the memory of buffers and captured steps that generations left behind back, before something else is measured."""
    model.release()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def prompt_of(model: str, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """``[rows, length]`` random ids that are neither [MASK] nor the end."""
    high = min(MODELS[model].vocab_size - 2, 100_000)
    return torch.randint(high, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
