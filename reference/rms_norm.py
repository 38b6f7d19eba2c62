"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), with an optional residual add in front."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate, write


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Rounding points are those of the LLaDA and Dream modules: the sum with the residual is rounded to ``x.dtype``; the
    normalised row is computed in float32 and rounded to ``x.dtype``; the product with the weight is rounded again.

    Args:
        x: ``[..., E]``.
        weight: ``[E]``, dtype of ``x``.
        eps: added to the mean square.
        residual: ``[..., E]``, added to ``x`` first.
        out: receives the result, ``[..., E]``.
        residual_out: receives ``x + residual``, ``[..., E]``; may be ``residual`` itself.

    Returns:
        ``y [..., E]``; with ``residual`` the pair ``(y, x + residual)``.
    """
    if residual is not None:
        x = write(residual_out, x + residual)
    h = accumulate(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    y = write(out, weight * h.to(x.dtype))
    return y if residual is None else (y, x)
