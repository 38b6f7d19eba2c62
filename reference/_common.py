"""Helpers of the reference ops."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def write(out: Tensor | None, value: Tensor) -> Tensor:
    """``value``, or ``out`` holding it."""
    return value if out is None else out.copy_(value)
