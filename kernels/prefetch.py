"""Asks for a weight's first bytes in the L2 cache while kernels run that leave memory idle.

Attention, norms and rotations of a step wait for latencies; meanwhile memory could bring what the next product reads. In a
captured step the request is a branch of the graph beside them: it begins where the stream stands, and the graph waits for it
at the end of the forward. Nothing is read into registers and nothing written, so that it cannot change a result. How many
bytes, if any, is measured (``kernels/tuned``); where nothing is, there is no branch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._check import INTERPRETED
from ._pdl import prefetch as prefetch_lines
from ._tuned import gpu_name, tuned

#: A line of the L2 cache, and how many a program asks for.
LINE_BYTES, LINES = 128, 1024


@triton.jit
def _prefetch_kernel(weight_ptr, count, LINE: tl.constexpr, LINES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    prefetch_lines(weight_ptr + line * LINE, line < count)


def prefetched_bytes(gpu: str | None, n: int, k: int, itemsize: int) -> int:
    """What was measured to pay: bytes of a weight ``[n, k]`` to ask for, or 0."""
    measured = tuned(gpu, "prefetch", n=n, k=k, itemsize=itemsize)
    return 0 if measured is None else int(measured["bytes"])


class Prefetch:
    """The requests of one forward.

    Args:
        device: of the weights.
        size: bytes to ask for, of every weight; what was measured if not given.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self._size, self._asked = size, False
        self._side: torch.cuda.Stream | None = None
        # Launched one by one, a request would only be two more launches.
        if device.type == "cuda" and not torch.version.hip and not INTERPRETED and torch.cuda.is_current_stream_capturing():
            self._side = _side_stream(device)

    def __call__(self, weight: Tensor) -> None:
        """Asks for the first bytes of a weight that a later kernel reads."""
        if self._side is None:
            return
        n, k = weight.shape
        size = prefetched_bytes(gpu_name(weight.device), n, k, weight.element_size()) if self._size is None else self._size
        size = min(size, weight.numel() * weight.element_size())
        if size < LINE_BYTES or not weight.is_contiguous():
            return
        self._side.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.cuda.stream(self._side):
            launch(weight, size)
        self._asked = True

    def join(self) -> None:
        """What follows on the stream comes behind all requests; a capture must not end before."""
        if self._side is not None and self._asked:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def launch(weight: Tensor, size: int) -> None:
    """Asks for the first ``size`` bytes, on the current stream."""
    lines = size // LINE_BYTES
    _prefetch_kernel[(triton.cdiv(lines, LINES),)](
        weight, lines, LINE=LINE_BYTES // weight.element_size(), LINES=LINES, num_warps=4
    )
