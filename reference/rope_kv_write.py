"""Rotary position embedding (Su et al., arXiv 2104.09864) of a window's queries and keys, with an optional norm of each head in
front, and the write of its K and V into the caches, in place.

Keys are stored rotated: position is a function of the slot, so a key need not be rotated again when it is read.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..types import NormRounding, RopeRounding
from ._common import accumulate, write


def angles(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """``[..., D/2]`` radians, ``position * theta ** (-2i / D)``: float64 for float64, float32 for any other ``dtype``.

    Args:
        position: ``[...]``, integers.
        dim: ``D``, of a head.
        theta: base of the frequencies.
        dtype: of what is rotated.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    half = torch.arange(0, dim, 2, dtype=exact, device=position.device) / dim
    return position.to(exact)[..., None] * (1.0 / theta**half)


def rotate(x: Tensor, position: Tensor, theta: float, rounding: RopeRounding = "llada") -> Tensor:
    """Rotates the halves of each head: ``x * cos + rotate_half(x) * sin`` with ``rotate_half((a, b)) = (-b, a)``.

    Args:
        x: ``[B, W, H, D]``.
        position: ``[B, W]``, integers.
        theta: base of the frequencies ``theta ** (-2i / D)``.
        rounding: ``"llada"``: everything in float32, rounded once. ``"dream"``: cos, sin, both products and their sum are
            each rounded to the dtype of ``x``. The same in float32 and float64.

    Returns:
        ``[B, W, H, D]``, dtype of ``x``.
    """
    angle = angles(position, x.shape[-1], theta, x.dtype)  # [B, W, D/2]
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # [B, W, 1, D]
    cos, sin = angle.cos(), angle.sin()
    if rounding == "dream":
        cos, sin, h = cos.to(x.dtype), sin.to(x.dtype), x
    else:
        h = x.to(angle.dtype)
    first, second = h.chunk(2, dim=-1)
    return (h * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def head_norm(x: Tensor, weight: Tensor, eps: float, rounding: NormRounding = "qwen3") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` of each head (Zhang & Sennrich, arXiv 1910.07467), computed in float32.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, dtype of ``x``.
        eps: added to the mean square.
        rounding: ``"qwen3"``: rounded to the dtype of ``x`` before the product with the weight, and again after it, as by the
            modules of Qwen3, LLaDA and Dream. ``"flash_attn"``: rounded once at the end, as by flash-attn's ``rms_norm_fn``,
            which SDAR calls. The same in float32 and float64.

    Returns:
        ``[..., D]``, dtype of ``x``.
    """
    h = accumulate(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "qwen3":
        h = h.to(x.dtype)
    return (h * weight).to(x.dtype)


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
) -> Tensor:
    """Rotates q and k of a window, each head normed first if asked for, and writes its k and v into the caches.

    Row ``i`` of sequence ``b`` is slot ``window_start[b] + i`` at position ``slot - kv_start[b]``. Rows whose slot lies
    outside ``[0, L)`` or before ``kv_start[b]`` (left padding) write nothing; their q is defined but meaningless.

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
        norm_rounding: whose rounding points the norms keep, see :func:`head_norm`.
        rounding: whose rounding points the rotation keeps, see :func:`rotate`.
        out: receives q, ``[B, W, Hq, D]``.

    Returns:
        Rotated ``q [B, W, Hq, D]``.
    """
    kv_heads, slots, dim = k_cache.shape[1:]
    if bias is not None:
        qkv = qkv + bias
    heads = rearrange(qkv, "b w (h d) -> b w h d", d=dim)
    q, k, v = torch.split(heads, [heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)

    if q_norm is not None and k_norm is not None and eps is not None:
        q, k = head_norm(q, q_norm, eps, norm_rounding), head_norm(k, k_norm, eps, norm_rounding)

    slot = window_start[:, None].long() + torch.arange(qkv.shape[1], device=qkv.device)  # [B, W]
    position = slot - kv_start[:, None]
    q, k = rotate(q, position, theta, rounding), rotate(k, position, theta, rounding)

    b, i = ((position >= 0) & (slot >= 0) & (slot < slots)).nonzero(as_tuple=True)
    k_cache[b, :, slot[b, i]] = k[b, i]
    v_cache[b, :, slot[b, i]] = v[b, i]
    return write(out, q)
