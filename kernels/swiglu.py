"""The gated unit of the MLP (Shazeer, arXiv 2002.05202), over a fused gate/up projection.

    y = silu(gate) * up        silu(g) = g / (1 + exp(-g))

One program for ``BLOCK_F`` columns of a row; every element is read and written once. As in the LLaDA and Dream modules
silu(gate) is rounded to the tensors' dtype before the product.

| pointer     | shape      | strides       | written          |
|-------------|------------|---------------|------------------|
| gate_up_ptr | [rows, 2F] | (stride_g, 1) | gate, then up    |
| out_ptr     | [rows, F]  | (stride_o, 1) | y                |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import DEFAULT_LAUNCH, LaunchOptions
from ._arch import Arch, arch_of
from ._check import check_floats, check_shape, collapsed, once, require, row_stride_of
from ._pdl import dependent_launch, wait_for_predecessor
from ._tuned import gpu_name, tuned


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride_g, stride_o, F, BLOCK_F: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask = column < F
    wait_for_predecessor(PDL)

    gate_ptr = gate_up_ptr + row * stride_g
    gate = tl.load(gate_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_F]
    up = tl.load(gate_ptr + F + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_F]
    # exp may be inf, and g / inf is the limit.
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_o + column, (silu * up).to(dtype), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch parameters: columns a program."""

    block_f: int
    num_warps: int


@cache
def select_config(arch: Arch, width: int, gpu: str | None = None) -> Config:
    """Eight elements of each operand a thread, one 16-byte load in 16-bit dtypes; small programs, so that few rows fill a GPU."""
    block_f = min(triton.next_power_of_2(width), 1024)
    config = Config(block_f, max(block_f // (8 * arch.warp_size), 1))
    return replace(config, **tuned(gpu, "swiglu", width=width) or {})


def swiglu(
    gate_up: Tensor, *, out: Tensor | None = None, config: Config | None = None, options: LaunchOptions = DEFAULT_LAUNCH
) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: ``[..., 2F]``: the gate in the first half of the last dimension, up in the second.
        out: receives the result, ``[..., F]``.
        config: launch parameters; :func:`select_config` chooses if not given.
        options: how to launch.

    Returns:
        ``[..., F]``.
    """
    shape, stride_o = _layout(gate_up, out)
    out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    if out.numel():
        gate_up, stride_g = collapsed(gate_up)
        arch = arch_of(gate_up.device)
        config = config or select_config(arch, shape[-1], gpu_name(gate_up.device))
        with torch.cuda.device_of(gate_up):
            _swiglu_kernel[(math.prod(shape[:-1]), triton.cdiv(shape[-1], config.block_f))](
                gate_up,
                out,
                stride_g,
                stride_o,
                shape[-1],
                BLOCK_F=config.block_f,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
                **dependent_launch(arch, options),
            )
    return out


@once
def _layout(gate_up: Tensor, out: Tensor | None) -> tuple[tuple[int, ...], int]:
    """Checks the arguments; the result's shape, and how far its rows are apart."""
    check_floats(gate_up=gate_up, out=out)
    require("gate_up", f"one of {gate_up.shape[-1]}", "of an even last dimension", gate_up.shape[-1] % 2 == 0)
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    check_shape("out", out, *shape)
    if not math.prod(shape):
        return shape, 0
    return shape, shape[-1] if out is None else row_stride_of("out", out)
