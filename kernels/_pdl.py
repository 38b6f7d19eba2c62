"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits where it needs its results.

Between two launches a GPU idles for some microseconds, the tail of the first and the start of the second, and a layer is a
chain of seven launches. From sm_90 on a kernel may be launched before its predecessor has ended: its programs come up on free
SMs, do what depends on nothing, such as fetching weights, and then wait. The rule that makes a chain of them safe:

**every program of a kernel that is launched so waits, whatever path it takes, before it reads or writes memory.** Then a kernel
has ended only after its predecessor has, and with it all before; and its buffers are free for the kernel after the next. What
may come before the wait are index arithmetic and :func:`prefetch`, which fills the L2 cache, where all programs see one truth,
and no register.

CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..types import LaunchOptions
from ..utils.environment import PDL as SWITCH
from ._arch import Arch
from ._check import INTERPRETED

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton without NVIDIA's backend, where they are never called
    gdc_launch_dependents = gdc_wait = None


class _Switch:
    """Whether launches may overlap: not where FASTDLLM_PDL=0 says so, nor once a capture failed with them."""

    on: bool | None = None


def turn_off() -> None:
    """Launches every kernel after its predecessor has ended, from here on."""
    _Switch.on = False


def in_use(arch: Arch) -> bool:
    """Whether kernels are launched so."""
    if _Switch.on is None:
        _Switch.on = SWITCH.value == "1"
    return _Switch.on and has_dependent_launch(arch)


def dependent_launch(arch: Arch, options: LaunchOptions) -> dict[str, Any]:
    """Keyword arguments of a launch: the constexpr ``PDL``, and the launch option where the architecture has it."""
    return {"PDL": True, "launch_pdl": True} if options.pdl and in_use(arch) else {"PDL": False}


def has_dependent_launch(arch: Arch) -> bool:
    """Whether kernels are compiled and launched so: NVIDIA from sm_90 on, and never in the interpreter."""
    return not INTERPRETED and arch.backend == "cuda" and int(arch.capability) >= 90


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Waits until all launches before this one have ended and their results are visible, then lets the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptr, mask):
    """Asks for lines of the L2 cache, a tile of pointers, without waiting for them. NVIDIA alone."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [ptr.to(tl.uint64), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
