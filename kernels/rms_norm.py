"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), with an optional residual add in front, and an optional
gather before both.

    s = (x + residual)[rows]        y = s / sqrt(mean(s^2) + eps) * weight

The gather makes one launch of an embedding and the norm behind it, and of the rows that predict and the norm before the head.

One program a row: the row is read once, kept in registers, and written once. The sum of squares is float32. The rounding
points are those of the LLaDA and Dream modules: s, the normalised row and the product with the weight are each rounded to
the tensors' dtype.

| pointer          | shape       | strides        | written |
|------------------|-------------|----------------|---------|
| x_ptr            | [N, E]      | (stride_x, 1)  |         |
| residual_ptr     | [N, E]      | (stride_r, 1)  |         |
| rows_ptr         | [R] int64   | contiguous     |         |
| weight_ptr       | [E]         | (1,)           |         |
| out_ptr          | [R, E]      | (stride_o, 1)  | y       |
| residual_out_ptr | [R, E]      | (stride_ro, 1) | s       |

Without ``rows_ptr`` (None) R is N.
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
from ._check import check_floats, check_shape, collapsed, once, require, row_stride_of
from ._pdl import dependent_launch, wait_for_predecessor
from ._tuned import gpu_name, tuned

MAX_WIDTH = 32_768


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    rows_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    stride_x,
    stride_r,
    stride_o,
    stride_ro,
    eps,
    E: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    mask = column < E
    wait_for_predecessor(PDL)

    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_E]
    source, loaded = row, mask
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row)
        loaded = mask & (source >= 0)
    x = tl.load(x_ptr + source * stride_x + column, mask=loaded, other=0.0).to(tl.float32)  # [BLOCK_E]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + source * stride_r + column, mask=loaded, other=0.0).to(tl.float32)
        x = (x + residual).to(dtype).to(tl.float32)
    if HAS_RESIDUAL or rows_ptr is not None:
        tl.store(residual_out_ptr + row * stride_ro + column, x.to(dtype), mask=mask)

    # Compilers that pass Python floats as float64 would drag everything after into float64.
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / E + tl.cast(eps, tl.float32))
    unit = (x * inverse_rms).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_o + column, (unit * weight).to(dtype), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch parameters: a whole row in ``block_e`` columns."""

    block_e: int
    num_warps: int


@cache
def select_config(arch: Arch, width: int, gpu: str | None = None) -> Config:
    """16 elements a thread: enough loads in flight, and no register pressure at any width."""
    block_e = triton.next_power_of_2(width)
    config = Config(block_e, min(max(block_e // (16 * arch.warp_size), 1), 16))
    return replace(config, **tuned(gpu, "rms_norm", width=width) or {})


class _Layout(NamedTuple):
    """What a launch needs of its tensors' layouts."""

    shape: tuple[int, ...]
    rows: int
    stride_o: int
    stride_ro: int


@once
def _layout(
    x: Tensor, weight: Tensor, residual: Tensor | None, rows: Tensor | None, out: Tensor | None, residual_out: Tensor | None
) -> _Layout:
    """Checks the arguments of :func:`rms_norm`."""
    check_floats(x=x, weight=weight, residual=residual, out=out, residual_out=residual_out)
    width, shape = x.shape[-1], tuple(x.shape)
    require("x", f"one of {width}", f"of a last dimension of 1 to {MAX_WIDTH}", 0 < width <= MAX_WIDTH)
    check_shape("weight", weight, width)
    check_shape("residual", residual, *shape)
    if rows is not None:
        is_list = rows.dtype == torch.int64 and rows.device == x.device
        require("rows", f"{rows.dtype} on {rows.device}", f"torch.int64 on {x.device}", is_list)
        shape = (*rows.shape, width)
    check_shape("out", out, *shape)
    check_shape("residual_out", residual_out, *shape)
    added = residual is not None or rows is not None
    require("residual_out", "a tensor", "None without a residual to add or rows to gather", residual_out is None or added)
    if not (x.numel() and math.prod(shape)):
        require("x", f"shape {list(x.shape)}", "of at least one row to gather", x.numel() > 0 or math.prod(shape) == 0)
        return _Layout(shape, 0, 0, 0)
    return _Layout(
        shape,
        math.prod(shape[:-1]),
        width if out is None else row_stride_of("out", out),
        width if residual_out is None else row_stride_of("residual_out", residual_out),
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    config: Config | None = None,
    options: LaunchOptions = DEFAULT_LAUNCH,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s^2) + eps) * weight`` over the last dimension, with ``s = (x + residual)[rows]``.

    Args:
        x: ``[..., E]``.
        weight: ``[E]``, dtype of ``x``.
        eps: added to the mean square.
        residual: ``[..., E]``, added to ``x`` first.
        rows: int64 of any shape ``[...']``, indices into the rows of ``x``, as if it were ``[N, E]``; a negative one gives a row
            of zeros. They are not checked against N, which a GPU would have to be waited for. All rows in order if not given.
        out: receives the result, ``[..., E]`` (``[...', E]``).
        residual_out: receives s, of the same shape; without ``rows`` it may be ``residual`` itself.
        config: launch parameters; :func:`select_config` chooses if not given.
        options: how to launch.

    Returns:
        ``y``; with ``residual`` or ``rows`` the pair ``(y, s)``.

    Raises:
        ValueError: an argument's dtype, shape, strides or device.
    """
    rows = None if rows is None else rows.contiguous()
    layout = _layout(x, weight, residual, rows, out, residual_out)
    out = torch.empty(layout.shape, dtype=x.dtype, device=x.device) if out is None else out
    if residual_out is None and (residual is not None or rows is not None):
        residual_out = torch.empty(layout.shape, dtype=x.dtype, device=x.device)
    if layout.rows:
        x, stride_x = collapsed(x)
        residual, stride_r = (None, 0) if residual is None else collapsed(residual)
        arch = arch_of(x.device)
        config = config or select_config(arch, layout.shape[-1], gpu_name(x.device))
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(layout.rows,)](
                x,
                x if residual is None else residual,  # not touched
                rows,
                weight,
                out,
                out if residual_out is None else residual_out,  # not touched
                stride_x,
                stride_r,
                layout.stride_o,
                layout.stride_ro,
                eps,
                E=layout.shape[-1],
                HAS_RESIDUAL=residual is not None,
                BLOCK_E=config.block_e,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
                **dependent_launch(arch, options),
            )
    return out if residual_out is None else (out, residual_out)
