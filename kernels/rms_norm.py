"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), with an optional residual add in front.

    s = x + residual        y = s / sqrt(mean(s^2) + eps) * weight

One program a row: the row is read once, kept in registers, and written once. The sum of squares is float32. The rounding
points are those of the LLaDA and Dream modules: s, the normalised row and the product with the weight are each rounded to
the tensors' dtype.

| pointer          | shape       | strides        | written |
|------------------|-------------|----------------|---------|
| x_ptr            | [rows, E]   | (stride_x, 1)  |         |
| residual_ptr     | [rows, E]   | (stride_r, 1)  |         |
| weight_ptr       | [E]         | (1,)           |         |
| out_ptr          | [rows, E]   | (stride_o, 1)  | y       |
| residual_out_ptr | [rows, E]   | (stride_ro, 1) | s       |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._arch import Arch, arch_of
from ._check import as_rows, check_floats, check_shape, require
from ._compile import CompileCase
from ._pdl import dependent_launch, has_dependent_launch, wait_for_predecessor
from ._tuned import gpu_name, tuned

MAX_WIDTH = 32_768


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
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
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_E]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_r + column, mask=mask, other=0.0).to(tl.float32)
        total = (x + residual).to(dtype)
        tl.store(residual_out_ptr + row * stride_ro + column, total, mask=mask)
        x = total.to(tl.float32)

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


def launches(arch: Arch, width: int) -> int:
    """Launches of a call, a residual included."""
    return 1


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
    check_floats(x=x, weight=weight, residual=residual, out=out, residual_out=residual_out)
    width = x.shape[-1]
    require(width <= MAX_WIDTH, "x", f"a last dimension of {width}", f"at most {MAX_WIDTH}")
    check_shape("weight", weight, width)
    for name, tensor in (("residual", residual), ("out", out), ("residual_out", residual_out)):
        check_shape(name, tensor, *x.shape)
    require(residual_out is None or residual is not None, "residual_out", "a tensor", "a residual to add")

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    y, rows = as_rows("out", out), x.reshape(-1, width)
    r = total = rows  # not touched without a residual
    if residual is not None:
        residual_out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual_out is None else residual_out
        r, total = residual.reshape(-1, width), as_rows("residual_out", residual_out)
    if x.numel():
        arch = arch_of(x.device)
        config = select_config(arch, width, gpu_name(x.device))
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(rows.shape[0],)](
                rows,
                r,
                weight,
                y,
                total,
                rows.stride(0),
                r.stride(0),
                y.stride(0),
                total.stride(0),
                eps,
                E=width,
                HAS_RESIDUAL=residual is not None,
                BLOCK_E=config.block_e,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
                **dependent_launch(arch),
            )
    return out if residual_out is None else (out, residual_out)


def compile_cases(arch: Arch) -> list[CompileCase]:
    """The widths of Dream and LLaDA, with and without a residual."""
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "residual_out_ptr")
    strides = ("stride_x", "stride_r", "stride_o", "stride_ro")
    return [
        CompileCase(
            op="rms_norm",
            kernel=_rms_norm_kernel,
            config=f"bf16 E={width}{' residual' if residual else ''}",
            signature={**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(strides, "i32"), "eps": "fp32"},
            constexprs={
                "E": width,
                "HAS_RESIDUAL": residual,
                "BLOCK_E": select_config(arch, width).block_e,
                "PDL": has_dependent_launch(arch),
            },
            divisible=pointers + strides,
            num_warps=select_config(arch, width).num_warps,
        )
        for width in (3584, 4096)
        for residual in (False, True)
    ]
