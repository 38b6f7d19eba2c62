"""Who touches which byte of shared memory between two barriers, written down access by access: what a barrier is needed for,
decided without the map of the last accesses that the checks use.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np

from fastdllm_triton.ptx.driver import Launch
from fastdllm_triton.ptx.emulator import machine_of
from fastdllm_triton.ptx.findings import Findings
from fastdllm_triton.ptx.shared import SharedMemory


class _Log:
    """Accesses of the first program of each batch: interval and byte as one number, warp, and whether it writes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes: list[Any] = []
        self.warps: list[Any] = []
        self.writes: list[Any] = []

    def add(self, lanes: Any, which: Any, address: Any, size: int, write: bool) -> None:
        first = lanes.place[which] == 0
        address = np.broadcast_to(address, which.shape)[first].astype(np.int64)
        spread = (address[:, None] + np.arange(size)).reshape(-1) + int(lanes.intervals[0]) * self.size
        self.bytes.append(spread)
        self.warps.append(np.repeat(lanes.warp[which][first], size))
        self.writes.append(np.full(len(spread), write))

    def conflicts(self) -> bool:
        """Whether a byte is written, and read by a warp that does not write it, between two barriers.

        Several warps may write one byte, as they do where a layout has copies.
        """
        if not self.bytes:
            return False
        at, warp, write = (np.concatenate(part) for part in (self.bytes, self.warps, self.writes))
        order = np.argsort(at, kind="stable")
        at, bit, write = at[order], np.uint64(1) << warp[order].astype(np.uint64), write[order]
        starts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
        read = np.bitwise_or.reduceat(np.where(write, np.uint64(0), bit), starts)
        written = np.bitwise_or.reduceat(np.where(write, bit, np.uint64(0)), starts)
        return bool(((written != 0) & (read & ~written != 0)).any())


def warps_meet(launch: Launch) -> bool:
    """Whether some byte of shared memory is written by one warp and read by another with no barrier between."""
    log = _Log(max(launch.shared_bytes, 1))

    def logged(name: str, write: bool) -> Any:
        method = getattr(SharedMemory, name)

        def call(self: Any, lanes: Any, which: Any, address: Any, *arguments: Any, **options: Any) -> Any:
            size = arguments[0].shape[1] if name in ("store", "begin_copy") else arguments[0]
            # A copy's end is told where in the memory of all programs.
            own = address * size - lanes.place[which] * self._stride if name == "end_copy" else address
            log.add(lanes, which, own, size, write)
            return method(self, lanes, which, address, *arguments, **options)

        return patch.object(SharedMemory, name, call)

    with (
        logged("load", write=False), logged("store", write=True), logged("update", write=True),
        logged("begin_copy", write=True), logged("end_copy", write=True),
    ):  # fmt: skip
        machine_of(launch, Findings()).run()
    return log.conflicts()
