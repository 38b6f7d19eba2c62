"""A matrix product of few rows with what stands around it in a transformer layer: a norm in front, a gated unit or a residual
behind.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..types import Activation
from ._common import write
from .rms_norm import rms_norm
from .swiglu import swiglu


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``residual + activation(rms_norm(x) @ weight.T)``, each part optional.

    Rounding points are those of the separate modules: the normalised row as in :func:`rms_norm`, the product, the gated unit
    as in :func:`swiglu`, and the sum are each rounded to ``x.dtype``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``; with ``activation="swiglu"`` the fused gate and up projections, ``[2F, K]``.
        norm_weight: ``[K]``: normalise ``x`` by its root mean square first.
        eps: added to the mean square; needed with ``norm_weight`` and only then.
        residual: ``[..., N]`` (``[..., F]``), added last.
        activation: ``"swiglu"`` or nothing.
        out: receives the result; may be ``residual`` itself.

    Returns:
        ``[..., N]``, with ``activation="swiglu"`` ``[..., F]``.
    """
    if norm_weight is not None:
        assert eps is not None
        x = rms_norm(x, norm_weight, eps)  # type: ignore[assignment]
    y = F.linear(x, weight)
    if activation == "swiglu":
        y = swiglu(y)
    return write(out, y if residual is None else residual + y)
