"""Runs a kernel: which threads execute what, and when.

All threads of a batch of programs run side by side. Where they part, those at the lowest block of the text run first, so that
they meet again where the text goes on; a block with instructions that a warp executes as one waits for all its threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from .batch import Batch
from .findings import Findings
from .lanes import WARP, Array, Lanes
from .memory import GlobalMemory
from .parser import Kernel
from .program import Program
from .shared import SharedMemory

#: Threads that run side by side, unless told otherwise.
LANES = 16_384
#: Bytes that a launch may need beside its tensors.
LIMIT = 4 << 30
#: Blocks that a batch runs between two looks at the memory that the process has.
_LOOK = 1 << 10
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE


class Machine:
    """One launch of a kernel.

    Args:
        kernel: what runs.
        memory: the tensors that it may access; of this launch alone.
        parameters: values of its parameters by name, ``[1]`` unsigned of the parameter's width.
        grid: programs along x, y and z.
        shared_bytes: shared memory of a program.
        findings: where to write what is wrong.
        checks: whether to look for races, for reads of what nobody wrote, and for copies that nobody awaited. Addresses are
            checked in any case.
        seed: of a random order of programs and a random interleaving of warps; None runs them in order.
        lanes: threads that run side by side, in whole programs.
        dependent: whether programs may begin before the launch before has ended: until they wait for it they may not access
            memory.
        limit: bytes that the launch may need beside its tensors.

    Raises:
        UnknownInstructionError: the kernel has something that nobody wrote down.
        MemoryError: one program needs more than the limit.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: Mapping[str, Array],
        grid: tuple[int, int, int],
        shared_bytes: int,
        findings: Findings,
        *,
        checks: bool = True,
        seed: int | None = None,
        lanes: int = LANES,
        dependent: bool = False,
        limit: int = LIMIT,
    ) -> None:
        self._program = Program.of(kernel)
        self._memory, self._parameters, self._grid = memory, dict(parameters), grid
        self._shared_bytes, self._findings, self._checks = shared_bytes, findings, checks
        self._dependent, self._limit = dependent, limit
        self._random = None if seed is None else np.random.default_rng(seed)
        self._free: list[SharedMemory] = []
        self._before = _resident()
        programs = np.arange(grid[0] * grid[1] * grid[2])
        if self._random is not None:
            self._random.shuffle(programs)
        size = self._size(max(lanes // kernel.threads, 1))
        self._waiting = [programs[start : start + size] for start in range(0, len(programs), size)]
        self._begun: list[Batch] = []
        memory.watch(self._program.origins, self._parameters, races=checks)

    def _size(self, programs: int) -> int:
        """How many programs run side by side, at most as many as given."""
        entries = 12 / self._program.granule if self._checks else 0  # of a byte's writes, reads and fences
        needed = self._program.widest * self._program.kernel.threads + int(self._shared_bytes * (1 + entries))
        if needed > self._limit:
            raise MemoryError(
                f"{self._program.kernel.name}: a program needs {needed} bytes for registers, shared memory and checks; "
                f"{self._limit} are allowed"
            )
        return min(programs, self._limit // max(needed, 1))

    def run(self) -> None:
        """Runs to the end."""
        while not self.advance():
            pass

    def advance(self) -> bool:
        """Runs as far as the launch before is not waited for; called again, to the end.

        Returns:
            whether the launch has ended. Only one that is dependent may not have, after the first call.
        """
        with np.errstate(all="ignore"):
            if self._dependent:
                self._dependent = False
                self._memory.early = True
                for programs in self._waiting:
                    batch = self._begin(programs)
                    if not self._go(batch, early=True):
                        self._begun.append(batch)
                self._waiting = []
                self._memory.early = False
                return not self._begun
            while self._begun:
                self._go(self._begun.pop(0), early=False)
            while self._waiting:
                self._go(self._begin(self._waiting.pop(0)), early=False)
        return True

    def _begin(self, programs: Array) -> Batch:
        kernel = self._program.kernel
        shared = next((free for free in self._free if free.programs >= len(programs)), None)
        if shared is None:
            shared = SharedMemory(
                len(programs),
                self._shared_bytes,
                granule=self._program.granule,
                checks=self._checks,
                has_wgmma=self._program.has_wgmma,
            )
        else:
            self._free.remove(shared)
        special = special_registers(programs, self._grid, kernel.threads)
        lanes = Lanes(kernel, programs, self._parameters, special, self._memory, shared, self._findings, self._random)
        shared.start(lanes)
        return Batch(self._program, lanes)

    def _go(self, batch: Batch, *, early: bool) -> bool:
        """Runs a batch on; returns whether it has ended."""
        for count, _ in enumerate(batch.run(early=early), 1):
            if count % _LOOK == 0:
                self._look()
        self._look()
        if batch.ended:
            assert isinstance(batch.lanes.shared, SharedMemory)
            self._free.append(batch.lanes.shared)
        return batch.ended

    def _look(self) -> None:
        grown = _resident() - self._before
        if grown > self._limit:
            raise MemoryError(f"{self._program.kernel.name}: needs {grown} bytes beside its tensors; {self._limit} are allowed")


def special_registers(programs: Array, grid: tuple[int, int, int], threads: int) -> dict[str, Array]:
    """Values of the special registers of a batch, ``[N]`` or ``[1]`` uint32 (PTX ISA, chapter 10)."""
    count = len(programs)
    thread = np.arange(threads, dtype=np.uint32)
    lane = np.tile(thread % WARP, count)
    zero, one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
    found = {
        "tid.x": np.tile(thread, count),
        "ntid.x": np.array([threads], np.uint32),
        "laneid": lane,
        "warpid": np.tile(thread // WARP, count),
        "nwarpid": np.array([threads // WARP], np.uint32),
    }
    for axis in "yz":
        found[f"tid.{axis}"], found[f"ntid.{axis}"] = zero, one
    rest = programs
    for axis, size in zip("xyz", grid, strict=True):
        place = (rest % size).astype(np.uint32)
        found[f"ctaid.{axis}"] = place[:1] if (place == place[0]).all() else np.repeat(place, threads)
        found[f"nctaid.{axis}"] = np.array([size], np.uint32)
        rest = rest // size
    bit = np.uint32(1) << lane
    masks = {"eq": bit, "lt": bit - 1, "le": bit | (bit - 1), "gt": ~(bit | (bit - 1)), "ge": ~(bit - 1)}
    return found | {f"lanemask_{order}": mask.astype(np.uint32) for order, mask in masks.items()}
