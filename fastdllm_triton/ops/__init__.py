"""The ops as functions, for callers with tensors of their own: arguments are checked, and each runs where its tensors are.

What is written here of an op is the shape of its results; :mod:`fastdllm_triton.reference` says what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import wraps

import torch
from torch import Tensor

from ..reference.token_statistics import statistics_merge as reference_merge
from ..types import Activation, NormRounding, PolicyState, RopeRounding, TokenStatistics, WindowInputs
from . import arguments
from .backends import NAMES, PARTS, Ops, resolve, without_kernels
from .registry import op

__all__ = [
    "NAMES",
    "PARTS",
    "Ops",
    "commit_tokens",
    "head_statistics",
    "linear",
    "resolve",
    "rms_norm",
    "rope_kv_write",
    "statistics_merge",
    "swiglu",
    "token_statistics",
    "window_attention",
    "window_inputs",
    "without_kernels",
]


@op(check=arguments.rms_norm)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape if rows is None else (*rows.shape, x.shape[-1]))
    return y if residual is None and rows is None else (y, torch.empty_like(y))


@op(check=arguments.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@op(check=arguments.linear)
def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2)))


@op(check=arguments.rope_kv_write, mutates=("k_cache", "v_cache"))
def rope_kv_write(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    kv_start: Tensor,
    theta: float,
    *,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    norm_rounding: NormRounding = "qwen3",
    rounding: RopeRounding = "llada",
) -> Tensor:
    _, kv_heads, _, dim = k_cache.shape
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // dim - 2 * kv_heads, dim))


@op(check=arguments.window_attention)
def window_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    *,
    block_causal: tuple[Tensor, int] | None = None,
    skip_start: Tensor | None = None,
    skip_end: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    batch, window, heads = q.shape[:3]
    y = q.new_empty(q.shape)
    return (y, q.new_empty((batch, heads, window), dtype=_accumulated(q))) if return_lse else y


@op(check=arguments.token_statistics)
def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
) -> TokenStatistics:
    return _statistics(logits, logits.shape[0])


@op(check=arguments.head_statistics)
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TokenStatistics:
    return _statistics(hidden, (hidden if rows is None else rows).shape[0])


@op(
    check=arguments.commit_tokens,
    mutates=("x", *(f"state_{name}" for name in (
        "step", "masked", "remaining", "invalid", "ended", "forward", "step_map", "confidence",
    ))),
)  # fmt: skip
def commit_tokens(
    x: Tensor, statistics: TokenStatistics, window_start: Tensor, state: PolicyState, *, place: Tensor | None = None
) -> None:
    pass


@op(check=arguments.window_inputs)
def window_inputs(
    x: Tensor,
    base: Tensor,
    block_start: Tensor,
    remaining: Tensor,
    kv_start: Tensor,
    *,
    back: int = 0,
    window: int,
    block: int,
    predicted: int,
    shift: bool = False,
    mask_id: int,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> WindowInputs:
    return WindowInputs(
        ids=x.new_empty((len(x), window)),
        start=x.new_empty(len(x), dtype=torch.int32),
        rows=x.new_empty(predicted),
        place=x.new_empty((len(x), block), dtype=torch.int32),
        keys=x.new_empty((3, 0 if seed is None else predicted)),
        batch_row=x.new_empty(predicted),
    )


@wraps(reference_merge)
def statistics_merge(a: TokenStatistics, b: TokenStatistics) -> TokenStatistics:
    arguments.statistics_merge(a, b)
    return reference_merge(a, b)


def _accumulated(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over elements of a tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _statistics(like: Tensor, rows: int | torch.SymInt) -> TokenStatistics:
    dtypes = [torch.int64 if field.name == "token" else _accumulated(like) for field in fields(TokenStatistics)]
    return TokenStatistics(*(like.new_empty((rows,), dtype=dtype) for dtype in dtypes))
