"""Matrix products as a CPU runs them fast, with what stands around them in a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._common import accumulate, write
from ..reference.swiglu import swiglu
from ..types import Activation

#: Rows of a product that is computed as ``weight @ x.T``. oneDNN brings what stands on the right into a layout of its own in
#: every call: of few rows x is the smaller one by far. In 16 bits alone: in float32 another order of sums would show. Fewer
#: where the result is turned back at once.
_MOST_TURNED, _MOST_TURNED_BACK = 768, 128


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fastdllm_triton.reference.linear.linear`; ``weight`` may also be several, whose rows follow one another.

    A result of few rows is laid out by columns, as are then those of element-wise ops on it: the product behind them reads it so.
    """
    if norm_weight is not None:
        assert eps is not None
        x = norm(x, norm_weight, eps)
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    rows = x.reshape(-1, x.shape[-1])
    shape = x.shape[:-1]
    goes_on = activation is not None or residual is not None
    if not _is_turned(len(rows), x.dtype, goes_on):
        y = F.linear(x, parts[0]) if len(parts) == 1 else torch.cat([F.linear(x, part) for part in parts], dim=-1)
        y = y if activation is None else swiglu(y)
        return write(out, y if residual is None else y.add_(residual))
    turned = _turned_product(rows, parts)  # [N, T]
    if activation is not None:
        gate, up = turned.chunk(2)
        turned = F.silu(gate, inplace=True).mul_(up)
    if residual is not None:
        turned = turned.add_(residual.reshape(len(rows), len(turned)).t())
    return write(out, turned.t().view(*shape, len(turned)))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` by its root mean square, rounded, times the weight: the rounding points of the reference.

    PyTorch's own norm is not given the weight: it would round once where the modules round twice. In 16 bits it is slower.
    """
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    h = accumulate(x)
    scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return h.mul_(scale).to(x.dtype).mul_(weight)


def _is_turned(rows: int, dtype: torch.dtype, goes_on: bool) -> bool:
    """Whether a product of so many rows is computed as its transpose."""
    return dtype in (torch.bfloat16, torch.float16) and rows <= (_MOST_TURNED if goes_on else _MOST_TURNED_BACK)


def _turned_product(rows: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """``[N, T]``: the products of rows ``[T, K]`` with weights ``[N_i, K]``, transposed."""
    if len(parts) == 1:
        return torch.mm(parts[0], rows.t())
    turned = rows.new_empty((sum(map(len, parts)), len(rows)))
    for part, product in zip(parts, torch.split(turned, [len(part) for part in parts]), strict=True):
        torch.mm(part, rows.t(), out=product)
    return turned
