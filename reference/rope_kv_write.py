"""Rotary position embedding (Su et al., arXiv 2104.09864) of a window's queries and keys, and the write of its K and V
into the caches, in place.

Keys are stored rotated: position is a function of the slot, so a key need not be rotated again when it is read.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..types import RopeRounding
from ._common import write


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


def rope_kv_write(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    kv_start: Tensor,
    theta: float,
    *,
    bias: Tensor | None = None,
    rounding: RopeRounding = "llada",
    out: Tensor | None = None,
) -> Tensor:
    """Rotates q and k of a window and writes its k and v into the caches.

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

    slot = window_start[:, None].long() + torch.arange(qkv.shape[1], device=qkv.device)  # [B, W]
    position = slot - kv_start[:, None]
    q, k = rotate(q, position, theta, rounding), rotate(k, position, theta, rounding)

    b, i = ((position >= 0) & (slot >= 0) & (slot < slots)).nonzero(as_tuple=True)
    k_cache[b, :, slot[b, i]] = k[b, i]
    v_cache[b, :, slot[b, i]] = v[b, i]
    return write(out, q)
