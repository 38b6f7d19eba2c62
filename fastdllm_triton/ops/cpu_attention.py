"""Attention as a CPU runs it fast: PyTorch's own over views of the caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._common import write
from ..reference.window_attention import window_attention as attention_in_full

#: Block-causal queries that are worth a call of attention.
_LEAST_STRIP = 64

Value = TypeVar("Value")


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
    span: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastdllm_triton.reference.window_attention.window_attention` over views of the caches, a run of rows with the same
    slots at a time: no copy of a key or value, and a mask where a strip of queries lies in several blocks alone. What forwards do
    without (``skip_start``, ``return_lse``) is the reference's.
    """
    if return_lse or skip_start is not None:
        in_full = partial(attention_in_full, q, k_cache, v_cache, kv_start, kv_end, scale=scale, return_lse=return_lse, out=out)
        return in_full(block_causal=block_causal, skip_start=skip_start, skip_end=skip_end)
    if span is not None and block_causal is None:
        return write(out, _attend(q, k_cache, v_cache, *span, scale))
    starts, ends = kv_start.tolist(), kv_end.tolist()
    windows = [0] * len(starts) if block_causal is None else block_causal[0].tolist()
    length = None if block_causal is None else block_causal[1]
    runs = list(runs_of(zip(starts, ends, windows, strict=True)))
    if len(runs) == 1 and length is None:
        (((start, end, _), _),) = runs
        return write(out, _attend(q, k_cache, v_cache, start, end, scale))
    out = torch.empty_like(q) if out is None else out
    for (start, end, window), rows in runs:
        strips = [(0, q.shape[1], end, None)] if length is None else _strips(q.shape[1], start, end, window, length)
        for first, last, limit, mask in strips:
            out[rows, first:last] = _attend(q[rows, first:last], k_cache[rows], v_cache[rows], start, limit, scale, mask)
    return out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, end: int, scale: float | None, mask: Tensor | None = None
) -> Tensor:
    """``[B, W, Hq, D]``: attention over the slots ``[start, end)`` of every row, where ``mask [W, end - start]`` allows."""
    (batch, window, q_heads, dim), kv_heads, start = q.shape, k_cache.shape[1], max(start, 0)
    if start >= end or not q.numel():
        return torch.zeros_like(q)
    k, v = k_cache[:, :, start:end], v_cache[:, :, start:end]
    if q_heads == kv_heads:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=scale).transpose(1, 2)
    # Heads that share keys become rows of one head, so that a key is read once for all of them.
    grouped = q.reshape(batch, window, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    mask = None if mask is None else mask.repeat(q_heads // kv_heads, 1)
    y = F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale)
    return y.view(batch, kv_heads, -1, window, dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


def _strips(queries: int, start: int, end: int, window: int, length: int) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """Block-causal queries ``[first, last)`` from the slot ``window`` on, the end of what the last of them attends, and a mask
    where the others attend less: whole blocks, several where they are short, so that there are fewer calls than blocks.
    """
    width = -(-_LEAST_STRIP // length) * length
    low = max(start, 0)
    first = min(max(start + (low - start) // length * length - window, 0), queries)
    if first:  # blocks that end where the slots begin, or earlier
        yield 0, first, low, None
    while first < queries:
        position = window + first - start
        last = min(first + width - position % width, queries)
        limits = [min(start + (p // length + 1) * length, end) for p in range(position, position + last - first)]
        mask = None
        if limits[0] < limits[-1]:
            mask = torch.arange(low, limits[-1], device="cpu") < torch.tensor(limits, device="cpu")[:, None]
        yield first, last, limits[-1], mask
        first = last


def runs_of(values: Iterable[Value]) -> Iterator[tuple[Value, slice]]:
    """Each run of equal neighbours, and the rows it is."""
    first = 0
    for value, run in groupby(values):
        last = first + len(list(run))
        yield value, slice(first, last)
        first = last
