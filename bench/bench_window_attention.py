"""window_attention against every backend of PyTorch's attention that takes the shape, FlexAttention and flash-attn.

    python bench/bench_window_attention.py [--quick] [--out DIR] [--html FILE] [--only NAME]

``triton plain`` and ``triton swapped`` force an operand order where the chosen config has the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fastdllm_triton.bench._session import Bench, main
from fastdllm_triton.bench._timing import Inputs, Run
from fastdllm_triton.kernels import window_attention as module
from fastdllm_triton.kernels._arch import arch_of
from fastdllm_triton.reference.window_attention import window_attention as reference

SHAPES = [
    {"model": model, "batch": batch, "window": window, "slots": slots}
    for model in module.MODELS
    for slots in (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
    for batch in (1, 4, 16)
    for window in (32, 16, 64, 128)  # the paper's first
    if batch * slots <= 131_072
] + [
    {"model": model, "batch": 1, "window": slots, "slots": slots}
    for model in module.MODELS
    for slots in (1024, 2048, 4096, 8192)
]  # fmt: skip


def inputs(shape: Mapping[str, Any], device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Normal numbers; every slot is attended."""
    q_heads, kv_heads, dim = module.MODELS[shape["model"]]
    batch, window, slots = shape["batch"], shape["window"], shape["slots"]
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    return {
        "q": randn(batch, window, q_heads, dim),
        "k_cache": randn(batch, kv_heads, slots, dim),
        "v_cache": randn(batch, kv_heads, slots, dim),
        "kv_start": torch.zeros(batch, dtype=torch.int32, device=device),
        "kv_end": torch.full((batch,), slots, dtype=torch.int32, device=device),
    }


def bytes_moved(shape: Mapping[str, Any]) -> int:
    """K and V once, q in, the output out."""
    q_heads, kv_heads, dim = module.MODELS[shape["model"]]
    return 2 * 2 * shape["batch"] * dim * (kv_heads * shape["slots"] + q_heads * shape["window"])


def flops(shape: Mapping[str, Any]) -> int:
    """Two products of W x L x D a query head, a multiplication and an addition each."""
    q_heads, _, dim = module.MODELS[shape["model"]]
    return 2 * 2 * shape["batch"] * q_heads * shape["window"] * shape["slots"] * dim


def sdpa(backend: SDPBackend) -> Run:
    """One backend of PyTorch's attention, on the same layouts."""

    def run(i: Inputs) -> Tensor:
        grouped = i["q"].shape[2] != i["k_cache"].shape[1]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(i["q"].transpose(1, 2), i["k_cache"], i["v_cache"], enable_gqa=grouped)

    return run


def flex(i: Inputs) -> Any:
    """FlexAttention without a mask, for one row and the paper's window or a refresh: compiling takes seconds a shape."""
    (batch, window, q_heads, _), (kv_heads, slots) = i["q"].shape, i["k_cache"].shape[1:3]
    if batch > 1 or window not in (32, slots):
        raise ValueError("compiled for one row and windows of 32 or all alone")
    run = compiled_flex(i["q"].shape, i["k_cache"].shape)
    return run(i["q"].transpose(1, 2), i["k_cache"], i["v_cache"], enable_gqa=q_heads != kv_heads)


@lru_cache(maxsize=1)
def compiled_flex(*shapes: torch.Size) -> Callable[..., Any]:
    """Compiled for these shapes. Earlier versions are dropped, since of more than a few the rest would run uncompiled."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def flash_attn(i: Inputs) -> Any:
    """The flash-attn package, if it is installed; it takes [B, L, H, D]."""
    from flash_attn import flash_attn_func

    return flash_attn_func(i["q"], i["k_cache"].transpose(1, 2), i["v_cache"].transpose(1, 2))


def in_order(swap: bool) -> Run:
    """The kernel with an operand order of its own."""

    def run(i: Inputs) -> Any:
        (batch, window, q_heads, dim), (kv_heads, slots) = i["q"].shape, i["k_cache"].shape[1:3]
        device = i["q"].device
        sizes = (batch, window, q_heads, kv_heads, dim, slots, i["q"].element_size())
        config = module.select_config(arch_of(device), *sizes)
        if config.swap == swap:
            raise ValueError("the chosen config has this order")
        return module.window_attention(**i, config=replace(config, swap=swap))

    return run


BENCH = Bench(
    op="window_attention",
    shapes=SHAPES,
    key=[{"model": model, "batch": 1, "window": window, "slots": 1024} for window in (32, 1024) for model in module.MODELS],
    quick=[{"model": "dream", "batch": 1, "window": 2, "slots": 40}],
    axis="slots",
    inputs=inputs,
    ours=lambda i: module.window_attention(**i),
    oracle=lambda i: reference(**i),
    baselines={
        "triton plain": in_order(False),
        "triton swapped": in_order(True),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa math": sdpa(SDPBackend.MATH),
        "flex": flex,
        "flash-attn": flash_attn,
    },
    bytes=bytes_moved,
    flops=flops,
    gpu_only=["flex"],
)

if __name__ == "__main__":
    main(BENCH.op)
