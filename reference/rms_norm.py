"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), with an optional residual add in front, and an optional
gather before both.
"""

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
    rows: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s^2) + eps) * weight`` over the last dimension, with ``s = (x + residual)[rows]``.

    Rounding points are those of the LLaDA and Dream modules: the sum with the residual is rounded to ``x.dtype``; the
    normalised row is computed in float32 and rounded to ``x.dtype``; the product with the weight is rounded again.

    Args:
        x: ``[..., E]``.
        weight: ``[E]``, dtype of ``x``.
        eps: added to the mean square.
        residual: ``[..., E]``, added to ``x`` first.
        rows: int64 of any shape ``[...']``, indices into the rows of ``x``, as if it were ``[N, E]``; a negative one gives a row
            of zeros. All rows in order if not given.
        out: receives the result, ``[..., E]`` (``[...', E]``).
        residual_out: receives s, of the same shape; without ``rows`` it may be ``residual`` itself.

    Returns:
        ``y``; with ``residual`` or ``rows`` the pair ``(y, s)``.
    """
    if rows is not None:
        x = _gather(x, rows)
        residual = None if residual is None else _gather(residual, rows)
    s = x if residual is None else x + residual
    h = accumulate(s)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    y = write(out, weight * h.to(s.dtype))
    return y if residual is None and rows is None else (y, write(residual_out, s))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``[...', E]``: rows of ``x [..., E]``, zeros for negative ones."""
    gathered = x.reshape(-1, x.shape[-1])[rows.clamp(min=0)]
    return gathered.masked_fill((rows < 0)[..., None], 0)
