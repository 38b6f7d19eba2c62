"""window_attention against every backend of PyTorch's attention that takes the shape, FlexAttention and flash-attn.

``triton plain`` and ``triton swapped`` force an operand order where the chosen config has the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fastdllm_triton.bench._session import Bench
from fastdllm_triton.bench._timing import Inputs, Run
from fastdllm_triton.kernels import window_attention as module
from fastdllm_triton.kernels._arch import arch_of
from fastdllm_triton.verify.cases.window_attention import WINDOW_ATTENTION


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
    WINDOW_ATTENTION,
    {
        "triton plain": in_order(False),
        "triton swapped": in_order(True),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa math": sdpa(SDPBackend.MATH),
        "flex": flex,
        "flash-attn": flash_attn,
    },
)
