"""Attention of a window's queries over the valid slots of the cache, bidirectional or block-causal, in one pass over K and V.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), in powers of two. For the keys seen so
far a row keeps the largest score m, the sum l and the weighted sum of values acc; a tile of scores s updates them:

    m' = max(m, max s)    p = 2^(s - m')    l' = 2^(m - m') l + sum p    acc' = 2^(m - m') acc + p V

Rows: the ``G = Hq / Hkv`` query heads of a KV head read the same keys, so a tile packs them: row r is token r // G, head
r % G. Keys: tiles are laid over the slots before the skip and over those behind it, so a skip is never read; only the
partial tile at the end of each is masked. Few rows leave most of a GPU idle, so the keys may be split into chunks; each
program then writes its normalised sum and its log-sum-exp, and a second kernel merges them in a fixed order.

Block-causal: rows end at different slots, and the keys of a program where those of its last row do. Of many rows, tiles in front
of the first row's end are not masked.

Operand order: ``q k^T`` has at least 64 rows only in large windows, and Hopper's wgmma needs 64. SWAP_AB computes
``k q^T`` and ``v^T p^T`` instead, which puts keys and head dimension there. Which one is faster is to be measured; the
config decides.

Nothing attended: output 0, log-sum-exp -inf. Log-sum-exps are base 2, of ``scale * q k^T * log2(e)``.

| pointer                   | shape                          | strides                    | written          |
|---------------------------|--------------------------------|----------------------------|------------------|
| q_ptr                     | [B, W, Hq, D]                  | (stride_qb, _qw, _qh, 1)   |                  |
| k_ptr, v_ptr              | [B, Hkv, L, D]                 | (stride_kb, _kh, _kl, 1)   |                  |
| start_ptr, end_ptr        | [B] int32                      | (1,)                       |                  |
| skip_start_ptr, _end_ptr  | [B] int32                      | (1,)                       |                  |
| window_start_ptr          | [B] int32                      | (1,)                       |                  |
| out_ptr                   | [B, W, Hq, D]                  | (stride_ob, _ow, _oh, 1)   | one chunk, merge |
| lse_ptr                   | [B, Hq, W] float32             | contiguous                 | one chunk, merge |
| partial_ptr               | [splits, B, Hkv, W G, D] float32 | contiguous               | several chunks   |
| partial_lse_ptr           | [splits, B, Hkv, W G] float32  | contiguous                 | several chunks   |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import DEFAULT_LAUNCH, LaunchOptions
from ._arch import Arch, arch_of
from ._attention import attend, launch_merge
from ._check import check_floats, check_shape, check_slots, once, require, scratch
from ._library import by_cudnn, cudnn_wins
from ._pdl import dependent_launch, wait_for_predecessor
from ._tuned import gpu_name, nearest

#: Pointers into the tensors of a batch: a launch for some of its rows hands in slices, aligned or not, for one kernel.
_SLICED = ["start_ptr", "end_ptr", "skip_start_ptr", "skip_end_ptr", "window_start_ptr"]
#: Keys of a chunk at least.
MIN_CHUNK = 128
#: What the number of chunks is chosen by, estimates in microseconds: a tile of keys that a program waits for, the launch of a
#: merge, and a megabyte of partial sums on its way to the L2 cache and back.
TILE_US, MERGE_US, PARTIAL_US = 0.8, 2.5, 0.4


@triton.jit
def _limit(position, block_length, origin, start, end):
    """Where the keys of queries end: behind their block, at ``end`` at most; nothing in front of position 0 has any."""
    ends = origin + (position // block_length + 1) * block_length
    return tl.where(position < 0, start, tl.maximum(tl.minimum(ends, end), start))


@triton.jit(do_not_specialize=["block_length", "W", "L", "chunk"], do_not_specialize_on_alignment=_SLICED)
def _window_attention_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, skip_start_ptr, skip_end_ptr, window_start_ptr, block_length,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    stride_qb, stride_qw, stride_qh, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_ow, stride_oh, W, L, chunk, scale,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    RETURN_LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SWAP_AB: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    split = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)  # of sequence and KV head
    b, kv_head = pair // HKV, pair % HKV
    scale = tl.cast(scale, tl.float32) * 1.4426950408889634  # log2(e)

    origin = tl.load(start_ptr + b)
    start = tl.maximum(origin, 0)
    end = tl.maximum(tl.minimum(tl.load(end_ptr + b), L), start)
    M = W * G
    tile_m = tl.program_id(0)
    if BLOCK_CAUSAL:
        tile_m = tl.num_programs(0) - 1 - tile_m  # those with the most keys first
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    token, head = (row // G).to(tl.int64), kv_head * G + row % G
    ONE_LOOP: tl.constexpr = BLOCK_M < 128 or (BLOCK_CAUSAL and BLOCK_N < 64)
    limit, least = end, end  # where the slots of each row end, and of the tile's first row
    if BLOCK_CAUSAL:
        window = tl.load(window_start_ptr + b) - origin  # its position
        last = tl.minimum(tile_m * BLOCK_M + BLOCK_M, M) - 1
        least = _limit(window + tile_m * BLOCK_M // G, block_length, origin, start, end)
        end = _limit(window + last // G, block_length, origin, start, end)
        if ONE_LOOP:
            limit = _limit(window + row // G, block_length, origin, start, end)  # [BLOCK_M]

    # The attended slots are [start, end_a) and [start_b, end). Counted through, this program has those from lo to hi.
    end_a = tl.minimum(tl.maximum(tl.load(skip_start_ptr + b), start), end)
    start_b = tl.minimum(tl.maximum(tl.load(skip_end_ptr + b), end_a), end)
    n = end_a - start + end - start_b
    lo = tl.minimum(split * chunk, n)
    hi = tl.minimum(lo + chunk, n)

    d = tl.arange(0, BLOCK_D)
    row_mask = (row < M)[:, None] & (d < D)[None, :]  # [BLOCK_M, BLOCK_D]
    q_ptr += b * stride_qb + token[:, None] * stride_qw + head[:, None] * stride_qh + d[None, :]
    q = tl.load(q_ptr, mask=row_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_ptr += b * stride_kb + kv_head * stride_kh
    v_ptr += b * stride_vb + kv_head * stride_vh

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_N, BLOCK_M] if SWAP_AB else [BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_M] if SWAP_AB else [BLOCK_M, BLOCK_D], tl.float32)
    # Of this program's slots, those before the skip and those behind it: first slot, and how many.
    first_a, count_a = start + lo, tl.minimum(tl.maximum(end_a - start - lo, 0), hi - lo)
    first_b, count_b = end - n + lo + count_a, hi - lo - count_a
    # Few rows are bound by memory: there every tile is masked, so that the partial ones are in the pipeline as well. Many rows
    # are bound by arithmetic: there what fills no tile, or is not all rows', comes last. Its loop has no branch inside: with one,
    # ptxas lets every wgmma of the main loop wait for the one before (C7515). Block-causal over short tiles, two loops spill.
    tiles_a, tiles_b = count_a // BLOCK_N, count_b // BLOCK_N
    if ONE_LOOP:
        tiles_a, tiles_b = tl.cdiv(count_a, BLOCK_N), tl.cdiv(count_b, BLOCK_N)
    elif BLOCK_CAUSAL:
        tiles_a = tl.maximum(tl.minimum(least - first_a, count_a), 0) // BLOCK_N
    for tile in tl.range(0, tiles_a + tiles_b, num_stages=STAGES):
        slot = tl.where(tile < tiles_a, first_a + tile * BLOCK_N, first_b + (tile - tiles_a) * BLOCK_N)
        left = tl.where(tile < tiles_a, count_a - tile * BLOCK_N, count_b - (tile - tiles_a) * BLOCK_N)
        m_i, l_i, acc = attend(
            q, m_i, l_i, acc, k_ptr, v_ptr, stride_kl, stride_vl, slot, left, limit, scale,
            D, BLOCK_N, BLOCK_D, ONE_LOOP, ONE_LOOP and BLOCK_CAUSAL, SWAP_AB, PRECISION,
        )  # fmt: skip
    if BLOCK_CAUSAL and not ONE_LOOP:
        limit = _limit(window + row // G, block_length, origin, start, end)  # [BLOCK_M]
        for tile in tl.range(tiles_a, tl.cdiv(count_a, BLOCK_N), num_stages=1):
            m_i, l_i, acc = attend(
                q, m_i, l_i, acc, k_ptr, v_ptr, stride_kl, stride_vl, first_a + tile * BLOCK_N, count_a - tile * BLOCK_N, limit,
                scale, D, BLOCK_N, BLOCK_D, True, True, SWAP_AB, PRECISION,
            )  # fmt: skip
    elif not ONE_LOOP:
        rest_a, rest_b = count_a % BLOCK_N, count_b % BLOCK_N
        for part in tl.range(tl.where(rest_a > 0, 0, 1), tl.where(rest_b > 0, 2, 1), num_stages=1):
            slot = tl.where(part == 0, first_a + tiles_a * BLOCK_N, first_b + tiles_b * BLOCK_N)
            left = tl.where(part == 0, rest_a, rest_b)
            m_i, l_i, acc = attend(
                q, m_i, l_i, acc, k_ptr, v_ptr, stride_kl, stride_vl, slot, left, limit, scale,
                D, BLOCK_N, BLOCK_D, True, False, SWAP_AB, PRECISION,
            )  # fmt: skip

    if SWAP_AB:
        l_i = tl.sum(l_i, axis=0)
    # Without keys m_i is -inf, and the sums are 0.
    l_i = tl.where(l_i == 0, 1.0, l_i)
    lse = m_i + tl.log2(l_i)
    y = acc / l_i[None, :] if SWAP_AB else acc / l_i[:, None]
    y = tl.trans(y) if SWAP_AB else y  # [BLOCK_M, BLOCK_D]
    if SPLIT:
        # The merge does not read the sums of an empty chunk.
        at = (split.to(tl.int64) * tl.num_programs(2) + pair) * M + row
        mask = (row < tl.where(lo < hi, M, 0))[:, None] & (d < D)[None, :]
        tl.store(partial_ptr + at[:, None] * D + d[None, :], y, mask=mask)
        tl.store(partial_lse_ptr + at, lse, mask=row < M)
    else:
        out_ptr += b * stride_ob + token[:, None] * stride_ow + head[:, None] * stride_oh + d[None, :]
        tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=row_mask)
        if RETURN_LSE:
            tl.store(lse_ptr + (b * HKV * G + head) * W + token, lse, mask=row < M)


@dataclass(frozen=True)
class Config:
    """Launch parameters.

    Attributes:
        block_m: rows (query tokens times the heads that share a KV head) a program.
        block_n: keys a tile.
        num_warps, num_stages: launch options.
        swap_ab: compute ``k q^T`` instead of ``q k^T``.
        splits, chunk: the keys are cut into ``splits`` chunks of ``chunk`` slots.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap_ab: bool
    splits: int
    chunk: int

    def split(self, slots: int, splits: int) -> Config:
        """The same with the keys cut into that many chunks of whole tiles, or fewer where chunks would be too short."""
        chunk = max(triton.cdiv(triton.cdiv(slots, splits), self.block_n) * self.block_n, MIN_CHUNK)
        return replace(self, splits=max(triton.cdiv(slots, chunk), 1), chunk=chunk)

    def workspace_elements(self, batch: int, window: int, q_heads: int, dim: int) -> int:
        """float32 elements of scratch: nothing for one chunk."""
        return 0 if self.splits == 1 else self.splits * batch * window * q_heads * (dim + 1)


def shared_bytes(arch: Arch, config: Config, dim: int, itemsize: int) -> int:
    """An upper bound on the shared memory of a program: in the loop the queries, the tiles in flight and the weights; after it
    the float32 sums on their way to memory.
    """
    block_d = max(triton.next_power_of_2(dim), 16)
    queries, weights = config.block_m * block_d, config.block_m * config.block_n
    if arch.backend == "hip":  # the tile at work and the queries have moved to registers
        tiles = 2 * (config.num_stages - 1) * config.block_n * block_d
        loop = max(queries, tiles + weights)
    else:
        loop = queries + 2 * config.num_stages * config.block_n * block_d + weights
    return max(itemsize * loop + 8 * config.block_m * config.num_warps, 4 * queries)


@cache
def select_config(
    arch: Arch,
    batch: int,
    window: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    slots: int,
    itemsize: int,
    gpu: str | None = None,
) -> Config:
    """Tiles by the number of rows, chunks by what they save and cost.

    The tiles are those that compile without spills: mma.sync has less room for 64 and 128 rows than wgmma and tcgen05. Two
    resident programs an SM hide each other's latency in small tiles. Chunks shorten the chain of tiles until the SMs are full;
    each is another partial result to write and to merge. So the chunks depend on the batch, and with them the last bits.
    """
    rows = window * (q_heads // kv_heads)
    if itemsize == 4:
        block_m, block_n, num_warps, num_stages = 16, 32, 4, 2  # three tf32 products a product need many registers
    elif rows <= 32:
        block_m, block_n, num_warps = 16 if rows <= 16 else 32, 64, 4
        num_stages = 2 if arch.name == "sm_100" else 3
    elif arch.name in ("sm_90", "sm_100"):
        block_m, block_n, num_warps, num_stages = (64, 64, 4, 3) if rows <= 256 else (128, 64, 8, 3)
    elif arch.backend == "hip":
        block_m, block_n, num_warps, num_stages = (64, 64, 4, 2) if rows <= 64 else (128, 64, 8, 2)
    else:
        block_m, block_n, num_warps, num_stages = (64, 64, 8, 3) if rows <= 64 else (128, 32, 8, 3)
    if arch.shared_bytes < 128 * 1024:
        num_stages = min(num_stages, 2)  # two programs an SM rather than three tiles in flight
    swap_ab = arch.name == "sm_90" and itemsize == 2 and block_m <= 32 and dim > 32

    sizes, heads = {"batch": batch, "window": window, "slots": slots}, {"q_heads": q_heads, "kv_heads": kv_heads, "dim": dim}
    if measured := nearest(gpu, "window_attention", sizes, **heads, itemsize=itemsize):
        block_m, block_n, swap_ab = measured["block_m"], measured["block_n"], measured["swap_ab"]
        num_warps, num_stages = measured["num_warps"], measured["num_stages"]
    programs = batch * kv_heads * triton.cdiv(rows, block_m)
    config = Config(block_m, block_n, num_warps, num_stages, swap_ab, 1, slots)
    if measured:
        return config.split(slots, measured["splits"])
    resident = (1 if block_m == 128 else 2) * arch.sms

    def microseconds(config: Config) -> float:
        tiles = triton.cdiv(config.chunk, block_n) * max(programs * config.splits / resident, 1)
        partial = 4e-6 * config.workspace_elements(batch, window, q_heads, dim)
        return TILE_US * tiles + (MERGE_US + PARTIAL_US * partial if config.splits > 1 else 0)

    most = max(min(resident // max(programs, 1), triton.cdiv(slots, MIN_CHUNK)), 1)
    return min((config.split(slots, splits) for splits in range(1, most + 1)), key=microseconds)


#: Batch-invariant: keys of a chunk, counted from where a row's own keys begin, and the rows that the tile is chosen for.
#: Results are merged in the order of the chunks, and an empty chunk changes nothing.
INVARIANT_CHUNK, INVARIANT_ROWS = 1024, 64


@cache
def invariant_config(arch: Arch, q_heads: int, kv_heads: int, dim: int, slots: int, itemsize: int) -> Config:
    """One tiling for any batch, window and number of slots: with it a row's result depends on that row alone."""
    window = max(INVARIANT_ROWS * kv_heads // q_heads, 1)
    tile = select_config(arch, 1, window, q_heads, kv_heads, dim, INVARIANT_CHUNK, itemsize)
    return replace(tile, splits=max(triton.cdiv(slots, INVARIANT_CHUNK), 1), chunk=INVARIANT_CHUNK)


def _precision(arch: Arch) -> str:
    """How float32 operands are multiplied so that the product is one of float32; 16-bit operands are not affected."""
    return "tf32x3" if arch.backend == "cuda" else "ieee"


class _Layout(NamedTuple):
    """What a launch needs of its tensors' layouts: sizes, and the strides of q, both caches and the output in kernel order."""

    batch: int
    window: int
    q_heads: int
    kv_heads: int
    dim: int
    slots: int
    strides: tuple[int, ...]


@once
def _layout(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_start: Tensor, kv_end: Tensor, skip_start: Tensor | None,
    skip_end: Tensor | None, window_start: Tensor | None, block_length: int | None, out: Tensor | None,
) -> _Layout:  # fmt: skip
    """Checks the arguments of :func:`window_attention`."""
    check_floats(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    require("q", f"shape {list(q.shape)}", "of four dimensions, [B, W, Hq, D]", q.ndim == 4)
    require("k_cache", f"shape {list(k_cache.shape)}", "of four dimensions, [B, Hkv, L, D]", k_cache.ndim == 4)
    batch, window, q_heads, dim = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    require("k_cache", f"{batch} x {kv_heads}", "of less than 65536 pairs of sequence and head", batch * kv_heads < 2**16)
    require("q", f"one of {dim}", "of a head dimension of 1 to 128", 0 < dim <= 128)
    divides = kv_heads > 0 and q_heads % kv_heads == 0
    require("q", f"{q_heads} heads", f"of a multiple of the {kv_heads} heads of k_cache", divides)
    for name, cache_ in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache_, batch, kv_heads, slots, dim)
        require(name, cache_.stride(2), "of slots less than 2^24 elements apart", cache_.stride(2) < 2**24)
    check_shape("out", out, *q.shape)
    slots_of = {"skip_start": skip_start, "skip_end": skip_end, "block_causal[0]": window_start}
    check_slots(batch, q.device, kv_start=kv_start, kv_end=kv_end, **slots_of)
    for name, end, other in (("skip_start", skip_start, skip_end), ("skip_end", skip_end, skip_start)):
        require(name, "nothing", "a tensor, as the other end of the skip is given", end is not None or other is None)
    if window_start is not None:
        ok = isinstance(block_length, int) and 1 <= block_length <= 2**30
        require("block_causal[1]", block_length, "an integer in [1, 2^30]", ok)
        require("skip_start", "a tensor", "None with block_causal", skip_start is None)

    strides_o = (window * q_heads * dim, q_heads * dim, dim) if out is None else out.stride()[:3]
    strides = (*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *strides_o)
    return _Layout(batch, window, q_heads, kv_heads, dim, slots, strides)


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
    workspace: Tensor | None = None,
    config: Config | None = None,
    options: LaunchOptions = DEFAULT_LAUNCH,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` over the slots ``kv_start[b] <= j < kv_end[b]``, less ``skip_start[b] <= j < skip_end[b]``.

    Every query of a sequence attends the same slots, unless ``block_causal``: then the query at slot ``s`` attends of them what
    lies before the end of its block, ``kv_start + ((s - kv_start) // block_length + 1) * block_length``, and a query before
    ``kv_start`` nothing. Query head ``h`` uses KV head ``h // (Hq / Hkv)``. A query with no slot to attend gives output 0 and
    log-sum-exp -inf. Slots that no query attends are not read.

    Args:
        q: ``[B, W, Hq, D]``.
        k_cache: ``[B, Hkv, L, D]``.
        v_cache: ``[B, Hkv, L, D]``.
        kv_start: ``[B]`` int32.
        kv_end: ``[B]`` int32, at most ``L``. On a GPU what lies beyond ``L`` is cut off, since checking would wait for it.
        block_causal: the slot ``[B]`` int32 of each window's first query, and the length of the blocks, which are counted from
            ``kv_start`` on (Fast-dLLM v2, arXiv 2509.26328; SDAR, arXiv 2510.06303). Not with a skip.
        skip_start: ``[B]`` int32, first slot left out (a dropped masked suffix).
        skip_end: ``[B]`` int32, end of the slots left out.
        scale: ``1 / sqrt(D)`` if not given.
        return_lse: also return the log-sum-exp of the scaled scores.
        span: the slots that every sequence attends, where the host knows them to be the same, without a skip. Then cuDNN's
            attention can do it, and does where it was measured to be faster (:func:`cudnn_wins`).
        out: receives the output, ``[B, W, Hq, D]``.
        workspace: float32 scratch of at least :meth:`Config.workspace_elements`; allocated if not given.
        config: launch parameters; :func:`select_config` chooses if not given.
        options: how to launch.

    Returns:
        ``[B, W, Hq, D]`` in the dtype of ``q``; with ``return_lse`` the pair of it and the base-2 log-sum-exp
        ``[B, Hq, W]`` in float32.
    """
    window_start, block_length = (None, None) if block_causal is None else block_causal
    layout = _layout(q, k_cache, v_cache, kv_start, kv_end, skip_start, skip_end, window_start, block_length, out)
    batch, window, q_heads, kv_heads, dim, slots, _ = layout
    if q.device.type == "cpu" and batch and (last := int(kv_end.max())) > slots:
        raise ValueError(f"kv_end must be at most the {slots} slots of k_cache, got {last}")

    if config is None and options.batch_invariant:
        config = invariant_config(arch_of(q.device), q_heads, kv_heads, dim, slots, q.element_size())
    sizes = (batch, window, q_heads, kv_heads, dim, slots, q.element_size())
    plain = config is None and block_causal is None and skip_start is None and not return_lse
    if plain and span is not None and span[0] < span[1] and cudnn_wins(gpu_name(q.device), *sizes):
        y = by_cudnn(q, k_cache, v_cache, span, scale)
        return y if out is None else out.copy_(y)

    out = torch.empty((batch, window, q_heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((batch, q_heads, window), dtype=torch.float32, device=q.device) if return_lse else None
    if batch and window:
        arch = arch_of(q.device)
        config = config or select_config(arch, *sizes, gpu_name(q.device))
        workspace = scratch(workspace, config.workspace_elements(batch, window, q_heads, dim), q.device)
        with torch.cuda.device_of(q):
            _launch(
                arch, config, layout, q, k_cache, v_cache, kv_start, kv_end, skip_start, skip_end, window_start, block_length,
                1 / math.sqrt(dim) if scale is None else scale, out, lse, workspace, options,
            )  # fmt: skip
    return out if lse is None else (out, lse)


def _launch(
    arch: Arch, config: Config, layout: _Layout, q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_start: Tensor, kv_end: Tensor,
    skip_start: Tensor | None, skip_end: Tensor | None, window_start: Tensor | None, block_length: int | None, scale: float,
    out: Tensor, lse: Tensor | None, workspace: Tensor | None, options: LaunchOptions,
) -> None:  # fmt: skip
    """One launch, and the merge if there are several chunks."""
    batch, window, q_heads, kv_heads, dim, slots, strides = layout
    group, pairs = q_heads // kv_heads, batch * kv_heads
    rows, split = window * group, config.splits > 1
    # What a kernel does not touch is None. Partial sums stand in front of the workspace, their log-sum-exps behind them. No
    # skip is one that begins and ends where the keys do.
    sums_lse = workspace[config.splits * pairs * rows * dim :] if split and workspace is not None else None
    shared = {
        "HKV": kv_heads,
        "G": group,
        "D": dim,
        "RETURN_LSE": lse is not None,
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "enable_fp_fusion": True,
        **dependent_launch(arch, options),
    }
    _window_attention_kernel[(triton.cdiv(rows, config.block_m), config.splits, pairs)](
        q, k_cache, v_cache, kv_start, kv_end,
        kv_end if skip_start is None else skip_start, kv_end if skip_end is None else skip_end, window_start, block_length,
        None if split else out, None if split else lse, workspace if split else None, sums_lse, *strides,
        window, slots, config.chunk, scale,
        BLOCK_CAUSAL=window_start is not None, SPLIT=split, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        SWAP_AB=config.swap_ab, STAGES=config.num_stages, PRECISION=_precision(arch),
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    if split:
        launch_merge(arch, workspace, sums_lse, out, lse, strides[9:], window, config.splits, pairs, shared)
