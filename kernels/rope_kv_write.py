"""Rotary position embedding (Su et al., arXiv 2104.09864) of a window's queries and keys, with an optional norm of each head in
front, and the write of its K and V into the caches, in place, from the fused QKV projection.

    (a_i, b_i) -> (a_i cos t_i - b_i sin t_i, b_i cos t_i + a_i sin t_i)    t_i = position * theta^(-2i/D),  i < D/2

with (a, b) the halves of a head. With norms (Qwen3, SDAR) heads of q and k are x / sqrt(mean(x^2) + eps) * weight before. One
program for one token and ``BLOCK_H`` heads of one kind (q, k or v); every element is read and written once. Keys are stored
rotated, since position is a function of the slot: slot - kv_start.

Rounding: the bias is added in the tensors' dtype. A norm is computed in float32 and rounded to the dtype before the product with
the weight and after it, or after it alone (ROUND_ONCE). LLaDA rotates in float32 and rounds once. Dream (DREAM) rounds cos, sin,
both products and their sum to the tensors' dtype; it is compiled without fused multiply-adds, which would round one product
and the sum at once.

| pointer          | shape                    | strides                    | written                          |
|------------------|--------------------------|----------------------------|----------------------------------|
| qkv_ptr          | [B, W, (Hq + 2 Hkv) D]   | (stride_xb, stride_xw, 1)  |                                  |
| bias_ptr         | [(Hq + 2 Hkv) D]         | (1,)                       |                                  |
| q_norm_ptr, k_norm_ptr | [D]                | (1,)                       |                                  |
| frequency_ptr    | [D/2] float32            | (1,)                       |                                  |
| window_start_ptr | [B] int32                | (1,)                       |                                  |
| kv_start_ptr     | [B] int32                | (1,)                       |                                  |
| q_ptr            | [B, W, Hq, D]            | (stride_qb, _qw, _qh, 1)   | all of it                        |
| k_ptr, v_ptr     | [B, Hkv, L, D]           | (stride_kb, _kh, _kl, 1)   | slots of the window in [kv_start, L) |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import DEFAULT_LAUNCH, LaunchOptions, NormRounding, RopeRounding
from ._arch import Arch, arch_of
from ._check import check_floats, check_shape, check_slots, once, require
from ._pdl import dependent_launch, wait_for_predecessor
from ._tuned import gpu_name, tuned


@triton.jit
def _cos_sin(angle):
    """Cosine and sine to float32 accuracy for angles up to 2 * 10^5, in registers alone.

    The library's versions keep a slow path for larger angles, with a table in local memory. Here pi/2 is subtracted n times
    in four parts; the first three have at most 7 bits, so that their products with n < 2^17 are exact. What is left lies
    within pi/4 of 0, where a few terms of the Taylor series reach float32.
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - n * 1.5625
    r = r - n * 0.0081787109375
    r = r - n * 0.00011730194091796875
    r = r - n * 3.139164786504813e-07
    x = r * r
    sin = r + r * x * (-1 / 6 + x * (1 / 120 + x * (-1 / 5040 + x * (1 / 362880))))
    cos = 1 + x * (-1 / 2 + x * (1 / 24 + x * (-1 / 720 + x * (1 / 40320 - x * (1 / 3628800)))))
    quadrant = n.to(tl.int32) & 3
    swapped = (quadrant & 1) != 0
    c, s = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def _rotate(first, second, cos, sin, dtype: tl.constexpr, DREAM: tl.constexpr):
    """Both halves of each head, ``[BLOCK_H, BLOCK_HALF]`` in ``dtype``."""
    a, b = first.to(tl.float32), second.to(tl.float32)
    if DREAM:
        cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
        ac, bs = (a * cos).to(dtype).to(tl.float32), (b * sin).to(dtype).to(tl.float32)
        bc, a_s = (b * cos).to(dtype).to(tl.float32), (a * sin).to(dtype).to(tl.float32)
        return (ac - bs).to(dtype), (bc + a_s).to(dtype)
    else:
        return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _norm(first, second, norm_ptr, half, eps, D: tl.constexpr, dtype: tl.constexpr, ROUND_ONCE: tl.constexpr):
    """Both halves of each head, ``[BLOCK_H, BLOCK_HALF]`` in ``dtype``, 0 beyond the head."""
    HALF: tl.constexpr = D // 2
    first_weight = tl.load(norm_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)  # [BLOCK_HALF]
    second_weight = tl.load(norm_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    a, b = first.to(tl.float32), second.to(tl.float32)
    # Compilers that pass Python floats as float64 would drag everything after into float64.
    inverse_rms = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + tl.cast(eps, tl.float32))[:, None]  # [BLOCK_H, 1]
    a, b = a * inverse_rms, b * inverse_rms
    if not ROUND_ONCE:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    return (a * first_weight[None, :]).to(dtype), (b * second_weight[None, :]).to(dtype)


#: Pointers into the tensors of a batch: a launch for some of its rows hands in slices, aligned or not, for one kernel.
_SLICED = ["window_start_ptr", "kv_start_ptr"]


@triton.jit(do_not_specialize=["W", "L"], do_not_specialize_on_alignment=_SLICED)
def _rope_kv_write_kernel(
    qkv_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    frequency_ptr,
    window_start_ptr,
    kv_start_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stride_xb,
    stride_xw,
    stride_qb,
    stride_qw,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    eps,
    W,
    L,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_ONCE: tl.constexpr,
    DREAM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    token = tl.program_id(0)
    b, i = (token // W).to(tl.int64), (token % W).to(tl.int64)
    slot = tl.load(window_start_ptr + b).to(tl.int64) + i
    position = slot - tl.load(kv_start_ptr + b)

    # The heads of one kind share a program: first those with q heads, then k, then v.
    HALF: tl.constexpr = D // 2
    Q_BLOCKS: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (HKV + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    is_q, is_v = block < Q_BLOCKS, block >= Q_BLOCKS + KV_BLOCKS
    block = block - tl.where(is_q, 0, tl.where(is_v, Q_BLOCKS + KV_BLOCKS, Q_BLOCKS))
    before = tl.where(is_q, 0, tl.where(is_v, HQ + HKV, HQ))  # heads of other kinds in front
    heads = tl.where(is_q, HQ, HKV)
    writable = is_q | ((position >= 0) & (slot >= 0) & (slot < L))

    head = block * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    half = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    loaded = (head < heads)[:, None] & (half < HALF)[None, :]  # [BLOCK_H, BLOCK_HALF]
    mask = loaded & writable

    offset = (before + head)[:, None] * D + half[None, :]  # [BLOCK_H, BLOCK_HALF]
    row_ptr = qkv_ptr + b * stride_xb + i * stride_xw
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    first = tl.load(row_ptr + offset, mask=loaded, other=0.0)  # [BLOCK_H, BLOCK_HALF]
    second = tl.load(row_ptr + offset + HALF, mask=loaded, other=0.0)  # [BLOCK_H, BLOCK_HALF]
    if HAS_BIAS:
        first_bias = tl.load(bias_ptr + offset, mask=loaded, other=0.0)
        second_bias = tl.load(bias_ptr + offset + HALF, mask=loaded, other=0.0)
        first = (first.to(tl.float32) + first_bias.to(tl.float32)).to(dtype)
        second = (second.to(tl.float32) + second_bias.to(tl.float32)).to(dtype)

    if is_v:
        to_ptr = v_ptr + b * stride_vb + slot * stride_vl + head.to(tl.int64)[:, None] * stride_vh + half[None, :]
        tl.store(to_ptr, first, mask=mask)
        tl.store(to_ptr + HALF, second, mask=mask)
    else:
        frequency = tl.load(frequency_ptr + half, mask=half < HALF, other=0.0)  # [BLOCK_HALF]
        if q_norm_ptr is not None:
            norm_ptr = q_norm_ptr if is_q else k_norm_ptr
            first, second = _norm(first, second, norm_ptr, half, eps, D, dtype, ROUND_ONCE)
        cos, sin = _cos_sin(position.to(tl.float32) * frequency)
        first, second = _rotate(first, second, cos[None, :], sin[None, :], dtype, DREAM)
        if is_q:
            to_ptr = q_ptr + b * stride_qb + i * stride_qw + head.to(tl.int64)[:, None] * stride_qh + half[None, :]
            tl.store(to_ptr, first, mask=mask)
            tl.store(to_ptr + HALF, second, mask=mask)
        else:
            to_ptr = k_ptr + b * stride_kb + slot * stride_kl + head.to(tl.int64)[:, None] * stride_kh + half[None, :]
            tl.store(to_ptr, first, mask=mask)
            tl.store(to_ptr + HALF, second, mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch parameters: heads a program."""

    block_h: int
    num_warps: int

    def programs_per_token(self, q_heads: int, kv_heads: int) -> int:
        """Programs for the q, k and v heads of one token."""
        return triton.cdiv(q_heads, self.block_h) + 2 * triton.cdiv(kv_heads, self.block_h)


@cache
def select_config(arch: Arch, kv_heads: int, dim: int, gpu: str | None = None) -> Config:
    """No more heads than there are of k and v, so that no program is half empty, and at most 2048 elements: 16 a thread."""
    block_d = triton.next_power_of_2(dim)
    block_h = min(triton.next_power_of_2(kv_heads), max(2048 // block_d, 1))
    config = Config(block_h, max(block_h * block_d // (16 * arch.warp_size), 1))
    return replace(config, **tuned(gpu, "rope_kv_write", kv_heads=kv_heads, dim=dim) or {})


@cache
def rotary_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """``[D/2]`` float32, rounded as PyTorch rounds it on a CPU, on every device. Made at the first call and kept."""
    return (1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)).to(device)


def _fuses(rounding: str) -> bool:
    """Whether a product and a sum may be rounded together."""
    return rounding != "dream"


class _Layout(NamedTuple):
    """What a launch needs of its tensors' layouts: the shape of q, the caches' heads and slots, the strides in kernel order."""

    shape: tuple[int, int, int, int]
    kv_heads: int
    slots: int
    strides: tuple[int, ...]


@once
def _layout(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, window_start: Tensor, kv_start: Tensor, bias: Tensor | None,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float | None, norm_rounding: str, rounding: str, out: Tensor | None,
) -> _Layout:  # fmt: skip
    """Checks the arguments of :func:`rope_kv_write`."""
    check_floats(qkv=qkv, k_cache=k_cache, v_cache=v_cache, bias=bias, q_norm=q_norm, k_norm=k_norm, out=out)
    require("qkv", f"shape {list(qkv.shape)}", "of three dimensions, [B, W, (Hq + 2 Hkv) D]", qkv.ndim == 3)
    require("k_cache", f"shape {list(k_cache.shape)}", "of four dimensions, [B, Hkv, L, D]", k_cache.ndim == 4)
    batch, window, columns = qkv.shape
    kv_heads, slots, dim = k_cache.shape[1:]
    require("k_cache", f"one of {dim}", "of an even head dimension", dim % 2 == 0 and dim > 0)
    q_heads = columns // dim - 2 * kv_heads
    require("qkv", f"{columns} columns", f"of (Hq + 2 * {kv_heads}) * {dim} columns", columns % dim == 0 and q_heads > 0)
    require("qkv", f"{q_heads} q heads", f"of a multiple of the {kv_heads} heads of k_cache", q_heads % kv_heads == 0)
    check_shape("k_cache", k_cache, batch, kv_heads, slots, dim)
    check_shape("v_cache", v_cache, batch, kv_heads, slots, dim)
    check_shape("bias", bias, columns)
    for name, norm, other in (("q_norm", q_norm, k_norm), ("k_norm", k_norm, q_norm)):
        check_shape(name, norm, dim)
        require(name, "nothing", "a tensor, as the other norm is given", norm is not None or other is None)
    require("eps", eps, "a number with q_norm and k_norm, None without", (eps is None) == (q_norm is None))
    require("norm_rounding", repr(norm_rounding), "'qwen3' or 'flash_attn'", norm_rounding in ("qwen3", "flash_attn"))
    check_shape("out", out, batch, window, q_heads, dim)
    check_slots(batch, qkv.device, window_start=window_start, kv_start=kv_start)
    require("rounding", repr(rounding), "'llada' or 'dream'", rounding in ("llada", "dream"))

    strides_q = (window * q_heads * dim, q_heads * dim, dim) if out is None else out.stride()[:3]
    strides = (*qkv.stride()[:2], *strides_q, *k_cache.stride()[:3], *v_cache.stride()[:3])
    return _Layout((batch, window, q_heads, dim), kv_heads, slots, strides)


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
    out: Tensor | None = None,
    config: Config | None = None,
    options: LaunchOptions = DEFAULT_LAUNCH,
) -> Tensor:
    """Rotates q and k of a window, each head normed first if asked for, and writes its k and v into the caches.

    Row ``i`` of sequence ``b`` is slot ``window_start[b] + i`` at position ``slot - kv_start[b]``. Rows whose slot lies
    outside ``[0, L)`` or before ``kv_start[b]`` (left padding) write nothing; their q is defined but meaningless.

    The first call of a (theta, D, device) copies the frequencies to the device: call once before a graph capture.

    Args:
        qkv: ``[B, W, (Hq + 2 Hkv) D]``: the fused projection, all q heads, then all k heads, then all v heads.
        k_cache: ``[B, Hkv, L, D]``, written in place.
        v_cache: ``[B, Hkv, L, D]``, written in place.
        window_start: ``[B]`` int32.
        kv_start: ``[B]`` int32, first slot of each sequence.
        theta: base of the rotary frequencies.
        bias: ``[(Hq + 2 Hkv) D]``, added to ``qkv`` first (Dream).
        q_norm, k_norm: ``[D]``, weights of the norms of q and k heads (Qwen3, SDAR), with ``eps``; both or neither.
        eps: added to the mean square of a head.
        norm_rounding: ``"qwen3"`` or ``"flash_attn"``, whose rounding points the norms keep.
        rounding: ``"llada"`` or ``"dream"``, whose rounding points the rotation keeps.
        out: receives q, ``[B, W, Hq, D]``.
        config: launch parameters; :func:`select_config` chooses if not given.
        options: how to launch.

    Returns:
        Rotated ``q [B, W, Hq, D]``.
    """
    layout = _layout(qkv, k_cache, v_cache, window_start, kv_start, bias, q_norm, k_norm, eps, norm_rounding, rounding, out)
    out = torch.empty(layout.shape, dtype=qkv.dtype, device=qkv.device) if out is None else out
    batch, window, q_heads, dim = layout.shape
    if batch and window:
        arch = arch_of(qkv.device)
        config = config or select_config(arch, layout.kv_heads, dim, gpu_name(qkv.device))
        with torch.cuda.device_of(qkv):
            _rope_kv_write_kernel[(batch * window, config.programs_per_token(q_heads, layout.kv_heads))](
                qkv,
                qkv if bias is None else bias,
                q_norm,
                k_norm,
                rotary_frequencies(theta, dim, qkv.device),
                window_start,
                kv_start,
                out,
                k_cache,
                v_cache,
                *layout.strides,
                eps,
                window,
                layout.slots,
                HQ=q_heads,
                HKV=layout.kv_heads,
                D=dim,
                HAS_BIAS=bias is not None,
                ROUND_ONCE=norm_rounding == "flash_attn",
                DREAM=rounding == "dream",
                BLOCK_H=config.block_h,
                BLOCK_HALF=triton.next_power_of_2(dim // 2),
                num_warps=config.num_warps,
                enable_fp_fusion=_fuses(rounding),
                **dependent_launch(arch, options),
            )
    return out
