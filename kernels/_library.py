"""What is left to NVIDIA's libraries where they were measured to be faster, or nothing was measured."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..types import LaunchOptions
from ._tuned import nearest
from .rms_norm import rms_norm
from .swiglu import swiglu


def by_cublas(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None, residual: Tensor | None, gated: bool,
    out: Tensor | None, options: LaunchOptions,
) -> Tensor:  # fmt: skip
    """The product by cuBLAS, what stands around it by kernels of their own."""
    if norm_weight is not None:
        assert eps is not None
        x = rms_norm(x, norm_weight, eps, options=options)  # type: ignore[assignment]
    last = residual is None
    if last and not gated and out is not None:
        return torch.matmul(x, weight.T, out=out)
    y = F.linear(x, weight)
    if gated:
        y = swiglu(y, out=out if last else None, options=options)
    return y if residual is None else torch.add(residual, y, out=out)


@cache
def cudnn_wins(
    gpu: str | None, batch: int, window: int, q_heads: int, kv_heads: int, dim: int, slots: int, itemsize: int
) -> bool:
    """Whether cuDNN's attention was measured to beat the kernel on this GPU, for sizes within a factor of two."""
    sizes, heads = {"batch": batch, "window": window, "slots": slots}, {"q_heads": q_heads, "kv_heads": kv_heads, "dim": dim}
    return nearest(gpu, "cudnn_attention", sizes, **heads, itemsize=itemsize) is not None


def by_cudnn(q: Tensor, k_cache: Tensor, v_cache: Tensor, span: tuple[int, int], scale: float | None = None) -> Tensor:
    """``[B, W, Hq, D]``: attention over the slots ``span[0] <= j < span[1]`` of every sequence, by cuDNN.

    PyTorch would rather take FlashAttention 2, which is slower on sm_90 and newer. On a CPU, its own.
    """
    k, v = (cache_[:, :, span[0] : span[1]] for cache_ in (k_cache, v_cache))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else nullcontext():
        grouped = q.shape[2] != k.shape[1]
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)
