"""Kernels with faults, as somebody else's Triton code: nothing here knows this package's ops."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, END: tl.constexpr, BLOCK: tl.constexpr):
    """``out = x + y`` up to element ``n + END``."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < n + END
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    tl.store(out_ptr + o, x + tl.load(y_ptr + o, mask=o < n, other=0.0), mask=inside)


@triton.jit
def turned_kernel(x_ptr, out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Writes numbers in reverse order to memory, and reads them back by other threads."""
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + BLOCK - 1 - o, tl.load(x_ptr + o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + o, tl.load(out_ptr + o) + 1)


@triton.jit
def sum_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Every program adds its block's sum to one number."""
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, total)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)


@triton.jit
def chained_kernel(x_ptr, out_ptr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """``out = x + 1`` behind a wait for the launch before; if it is early, x is read before the wait."""
    o = tl.arange(0, BLOCK)
    if EARLY:
        x = tl.load(x_ptr + o)
        gdc_wait()
    else:
        gdc_wait()
        x = tl.load(x_ptr + o)
    gdc_launch_dependents()
    tl.store(out_ptr + o, x + 1)
