"""Attention of a window's queries over the valid slots of the cache, bidirectional or block-causal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ._common import accumulate, write


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
    """``softmax(scale * q k^T) v`` over the slots ``kv_start[b] <= j < kv_end[b]``, less ``skip_start[b] <= j < skip_end[b]``.

    Every query of a sequence attends the same slots, unless ``block_causal``: then the query at slot ``s`` attends of them what
    lies before the end of its block, ``kv_start + ((s - kv_start) // block_length + 1) * block_length``, and a query before
    ``kv_start`` nothing. Query head ``h`` uses KV head ``h // (Hq / Hkv)``. Scores, softmax and sums are in float32 (float64 for
    float64). A query with no slot to attend gives output 0 and log-sum-exp -inf. What slots hold that no query attends does not
    matter, NaN included.

    Args:
        q: ``[B, W, Hq, D]``.
        k_cache: ``[B, Hkv, L, D]``.
        v_cache: ``[B, Hkv, L, D]``.
        kv_start: ``[B]`` int32.
        kv_end: ``[B]`` int32, at most ``L``.
        block_causal: the slot ``[B]`` int32 of each window's first query, and the length of the blocks, which are counted from
            ``kv_start`` on (Fast-dLLM v2, arXiv 2509.26328; SDAR, arXiv 2510.06303). Not with a skip.
        skip_start: ``[B]`` int32, first slot left out (a dropped masked suffix).
        skip_end: ``[B]`` int32, end of the slots left out.
        scale: ``1 / sqrt(D)`` if not given.
        return_lse: also return the log-sum-exp of the scaled scores.
        span: the slots that every sequence attends, where the host knows them to be the same; it changes nothing here.
        out: receives the output, ``[B, W, Hq, D]``.

    Returns:
        ``[B, W, Hq, D]`` in the dtype of ``q``; with ``return_lse`` the pair of it and the base-2 log-sum-exp
        ``[B, Hq, W]`` in float32 (float64 for float64).
    """
    q_heads, dim = q.shape[2:]
    kv_heads, slots = k_cache.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale

    slot = torch.arange(slots, device=q.device)
    attended = (slot >= kv_start[:, None]) & (slot < kv_end[:, None])  # [B, L]
    if skip_start is not None and skip_end is not None:
        attended &= (slot < skip_start[:, None]) | (slot >= skip_end[:, None])
    attended = attended[:, None]  # [B, 1, L]
    if block_causal is not None:
        window_start, length = block_causal
        position = (window_start - kv_start)[:, None] + torch.arange(q.shape[1], device=q.device)  # [B, W]
        end = kv_start[:, None] + (position // length + 1) * length
        attended = attended & (slot < end[:, :, None]) & (position >= 0)[:, :, None]  # [B, W, L]

    # Slots that are never attended are cleared, since a NaN there would survive a mask.
    never = ~attended.any(1)[:, None, :, None]  # [B, 1, L, 1]
    k, v = (
        accumulate(cache).masked_fill(never, 0).repeat_interleave(q_heads // kv_heads, dim=1)  # [B, Hq, L, D]
        for cache in (k_cache, v_cache)
    )
    attended = attended[:, None]  # [B, 1, W or 1, L]
    query = rearrange(accumulate(q), "b w h d -> b h w d")
    y = F.scaled_dot_product_attention(query, k, v, attn_mask=attended, scale=scale)
    y = y.masked_fill(~attended.any(-1, keepdim=True), 0)
    result = write(out, rearrange(y, "b h w d -> b w h d").to(q.dtype))
    if not return_lse:
        return result
    scores = (scale * (query @ k.mT)).masked_fill(~attended, -torch.inf)  # [B, Hq, W, L]
    return result, scores.logsumexp(-1) / math.log(2)
