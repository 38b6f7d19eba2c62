"""Parts of window_attention: a tile of keys, and the merge of chunks of the keys, which takes each chunk's normalised sum and its
base-2 log-sum-exp, in a fixed order.

| pointer         | shape                            | strides                  | written |
|-----------------|----------------------------------|--------------------------|---------|
| partial_ptr     | [splits, B, Hkv, W G, D] float32 | contiguous               |         |
| partial_lse_ptr | [splits, B, Hkv, W G] float32    | contiguous               |         |
| out_ptr         | [B, W, Hq, D]                    | (stride_ob, _ow, _oh, 1) | y       |
| lse_ptr         | [B, Hq, W] float32               | contiguous               | lse     |
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._arch import Arch
from ._pdl import wait_for_predecessor

#: Rows of a program of the merge kernel.
MERGE_ROWS = 4


@triton.jit
def attend(
    q, m_i, l_i, acc, k_ptr, v_ptr, stride_kl, stride_vl, slot, count, limit, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr,
    SWAP_AB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from ``slot`` on; if MASKED only the first ``count`` of them, at least one; if BY_ROW of those only what
    lies before the slot ``limit [BLOCK_M]`` of each row, possibly nothing.
    """
    key, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # The base is a 64-bit scalar, so that the offsets within a tile fit 32 bits and stay the same from tile to tile.
    k_ptr = k_ptr + slot.to(tl.int64) * stride_kl + (key[:, None] * stride_kl + d[None, :])  # [BLOCK_N, BLOCK_D]
    v_ptr = v_ptr + slot.to(tl.int64) * stride_vl + (key[:, None] * stride_vl + d[None, :])  # [BLOCK_N, BLOCK_D]
    valid = key < count
    if MASKED:
        k = tl.load(k_ptr, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        k = tl.load(k_ptr, mask=(d < D)[None, :], other=0.0)
    else:
        k = tl.load(k_ptr)

    # The scale is applied to the float32 product: q times it would have to be rounded.
    keys: tl.constexpr = 0 if SWAP_AB else 1  # the axis of the scores that they are on
    if SWAP_AB:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [BLOCK_N, BLOCK_M]
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
    if BY_ROW:
        s = tl.where(tl.expand_dims(key, 1 - keys) < tl.expand_dims(tl.minimum(limit - slot, count), keys), s, float("-inf"))
    elif MASKED:
        s = tl.where(tl.expand_dims(valid, 1 - keys), s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, axis=keys))
    # A tile has at least one key, so that the maximum is finite, but for a row that ends before all tiles so far.
    m_safe = m_new
    if BY_ROW:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - tl.expand_dims(m_safe, keys))
    alpha = tl.exp2(m_i - m_safe)

    if MASKED:
        v = tl.load(v_ptr, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        v = tl.load(v_ptr, mask=(d < D)[None, :], other=0.0)
    else:
        v = tl.load(v_ptr)
    if SWAP_AB:
        l_i = l_i * alpha[None, :] + p  # [BLOCK_N, BLOCK_M], summed up behind the loop
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * alpha[None, :], input_precision=PRECISION)  # [BLOCK_D, BLOCK_M]
    else:
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    return m_new, l_i, acc


@triton.jit(do_not_specialize=["W", "splits"])
def _merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_ow, stride_oh, W, splits,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RETURN_LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    pair = tl.program_id(1).to(tl.int64)
    b, kv_head = pair // HKV, pair % HKV
    M = W * G
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    d = tl.arange(0, BLOCK_D)
    at = pair * M + row  # of the first split
    step = tl.num_programs(1).to(tl.int64) * M

    # All chunks at once, up to BLOCK_S of them, so that nothing waits for more than two loads.
    o = tl.arange(0, BLOCK_S).to(tl.int64)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        lies = (first + o) * step  # [BLOCK_S]
        present = (first + o < splits)[:, None] & (row < M)[None, :]
        lse = tl.load(partial_lse_ptr + lies[:, None] + at[None, :], mask=present, other=float("-inf"))  # [BLOCK_S, BLOCK_M]
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - m_safe[None, :])  # 0 for an empty chunk
        alpha = tl.exp2(m_i - m_safe)
        mask = (lse > float("-inf"))[:, :, None] & (d < D)[None, None, :]
        y_ptr = partial_ptr + (lies[:, None] + at[None, :])[:, :, None] * D + d[None, None, :]
        y = tl.load(y_ptr, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_M, BLOCK_D]
        l_i = l_i * alpha + tl.sum(weight, axis=0)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * y, axis=0)
        m_i = m_new

    l_i = tl.where(l_i == 0, 1.0, l_i)
    token, head = (row // G).to(tl.int64), kv_head * G + row % G
    out_ptr += b * stride_ob + token[:, None] * stride_ow + head[:, None] * stride_oh + d[None, :]
    tl.store(out_ptr, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (d < D)[None, :])
    if RETURN_LSE:
        tl.store(lse_ptr + (b * HKV * G + head) * W + token, m_i + tl.log2(l_i), mask=row < M)


def merge_splits(arch: Arch) -> int:
    """Chunks that a program of the merge kernel holds at a time: on sm_120, 16 of four heads a KV head spill."""
    return 8 if arch.name == "sm_120" else 16


def launch_merge(
    arch: Arch, partial: Tensor | None, partial_lse: Tensor | None, out: Tensor, lse: Tensor | None, strides: tuple[int, ...],
    window: int, splits: int, pairs: int, shared: dict[str, Any],
) -> None:  # fmt: skip
    """Merges ``splits`` chunks of so many pairs of sequence and KV head; ``shared`` are the constexprs of both kernels."""
    _merge_kernel[(triton.cdiv(window * shared["G"], MERGE_ROWS), pairs)](
        partial, partial_lse, out, lse, *strides, window, splits,
        BLOCK_M=MERGE_ROWS, BLOCK_S=merge_splits(arch), num_warps=4, **shared,
    )  # fmt: skip
