"""The gated unit of the MLP (Shazeer, arXiv 2002.05202), over a fused gate/up projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._common import write


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``.

    ``silu(gate)`` is rounded to the input's dtype before the product, as the LLaDA and Dream modules do.

    Args:
        gate_up: ``[..., 2F]``: the gate in the first half of the last dimension, up in the second.
        out: receives the result, ``[..., F]``.

    Returns:
        ``[..., F]``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return write(out, F.silu(gate) * up)
