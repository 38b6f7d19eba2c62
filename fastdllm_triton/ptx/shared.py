"""Shared memory of the programs of a batch, with a check of every access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cells import Cells, Distinct, rising, zeros
from .findings import Kind
from .lanes import POISON, Array, Lanes, Which
from .proxies import ProxyFences
from .races import Chosen, SharedRaces

#: The memory of each program begins at a multiple of it.
_ALIGNMENT = 128

#: Of an access: the lanes' positions in ``which`` (None: all), their places in the batch's memory, and the bytes of a program's
#: memory between which they are.
Found = tuple[NDArray[np.int64] | None, Array, int, int]


class SharedMemory:
    """The shared memory of a batch: all programs' in one array, each as large as the kernel declares.

    Addresses are offsets in a program's own memory. What nobody wrote reads as 0xFF; with checks, so does what a cp.async is
    still to write (:meth:`begin_copy`, :meth:`end_copy`).

    ``wgmma`` reads through the *async proxy*, for which ordinary writes have to be fenced (PTX ISA, 8.6, "Proxies"): ask
    :meth:`unfenced`, which knows the ``fence.proxy.async`` that were executed, before you :meth:`load`. Only kernels that have a
    ``wgmma`` pay for it.

    Attributes:
        programs: how many there is room for.
        size: bytes of a program.
        checks: whether it looks for races and the like.
    """

    def __init__(self, programs: int, size: int, *, granule: int, checks: bool, has_wgmma: bool) -> None:
        self.programs = programs
        self.size = size
        self.checks = checks
        self._stride = -(-size // _ALIGNMENT) * _ALIGNMENT
        total = max(programs * self._stride, _ALIGNMENT)
        self.cells = Cells(zeros(total))
        self._distinct = Distinct()
        self._starts: dict[int, Array] = {}
        self._races: SharedRaces | None = None
        self._fences: ProxyFences | None = None
        if checks and size:
            self._races = SharedRaces(total, granule)
            if has_wgmma:
                self._fences = ProxyFences(self._races)

    def start(self, lanes: Lanes) -> None:
        """Makes it that of a new batch."""
        self.cells.bytes[: len(lanes.programs) * self._stride].fill(POISON)
        self._starts = {1: lanes.place * self._stride}
        if self._races is not None:
            self._races.start()
        if self._fences is not None:
            self._fences.start(lanes)

    def _find(self, lanes: Lanes, which: Which, address: Array, size: int) -> Found | None:
        """Where an access goes, None if nowhere; what is wrong with it is noted."""
        if not len(which):
            return None
        if address.dtype.kind == "i":
            address = address.view(f"u{address.itemsize}")
        low, last = int(address.min()), int(address.max())
        chosen: NDArray[np.int64] | None = None
        if last > self.size - size or int(np.bitwise_or.reduce(address)) & (size - 1):
            aligned, within = address & address.dtype.type(size - 1) == 0, address <= max(self.size - size, -1)
            lanes.note(Kind.MISALIGNED, which[~aligned], f"of {size} bytes")
            if not within.all():
                worst = int(address[~within][0])
                lanes.note(Kind.OUTSIDE_SHARED, which[~within], f"bytes {worst} to {worst + size - 1} of {self.size}")
            chosen = np.flatnonzero(aligned & within)
            if not len(chosen):
                return None
            address, which = address[chosen], which[chosen]
            low, last = int(address.min()), int(address.max())
        shift = size.bit_length() - 1
        starts = self._starts.get(size)
        if starts is None:
            starts = self._starts[size] = self._starts[1] >> shift
        place = (address >> address.dtype.type(shift)).astype(np.int64)
        place += starts if which is lanes.every else starts[which]
        return chosen, place, low, last + size

    def load(self, lanes: Lanes, which: Which, address: Array, size: int) -> Array:
        """Bytes, as :meth:`Memory.load <fastdllm_triton.ptx.lanes.Memory.load>` has it."""
        found = self._find(lanes, which, address, size)
        if found is None:
            return np.full((len(which), size), POISON, np.uint8)
        chosen, place, low, high = found
        data = self.cells.read(place, size)
        if self._races is not None:
            some = which if chosen is None else which[chosen]
            known = self._races.read(lanes, some, place, size, low, high)
            if known is not None:
                data.reshape(len(known), -1)[~known] = POISON
        if chosen is None:
            return data
        every = np.full((len(which), size), POISON, np.uint8)
        every[chosen] = data
        return every

    def store(self, lanes: Lanes, which: Which, address: Array, data: Array) -> None:
        """Writes bytes, as :meth:`Memory.store <fastdllm_triton.ptx.lanes.Memory.store>` has it."""
        size = data.shape[1]
        found = self._find(lanes, which, address, size)
        if found is None:
            return
        chosen, place, low, high = found
        some, values = (which, data) if chosen is None else (which[chosen], data[chosen])
        if self._races is None:
            self.cells.write(place, values)
            return
        unique = rising(place) or self._distinct(lanes.here, place)
        excused = self._races.write(lanes, some, place, size, low, high, unique)
        if excused is not None:
            differ = excused & (self.cells.read(place, size) != values).any(1)
            lanes.note(Kind.SHARED_RACE, some[differ], "written by another warp")
        self.cells.write(place, values)
        if not unique:
            lost = (self.cells.read(place, size) != values).any(1)
            lanes.note(Kind.SHARED_RACE, some[lost], "several values to one address at once")
        if self._fences is not None:
            self._fences.write(place, size)

    def update(self, lanes: Lanes, which: Which, address: Array, size: int, change: Callable[..., Array]) -> Array:
        """Changes bytes atomically, as :meth:`GlobalMemory.update <fastdllm_triton.ptx.memory.GlobalMemory.update>` does."""
        old: NDArray[Any] = np.full((len(which), size), POISON, np.uint8)
        found = self._find(lanes, which, address, size)
        if found is None:
            return old
        chosen, place, low, high = found
        positions = np.arange(len(which)) if chosen is None else chosen
        if self._races is not None:
            self._races.atomic(lanes, which[positions], place, size, low, high)
        old[positions] = change(self.cells.view(size), place, positions).view(np.uint8).reshape(-1, size)
        if self._fences is not None:
            self._fences.write(place, size)
        return old

    def begin_copy(self, lanes: Lanes, which: Which, address: Array, data: Array) -> tuple[Which, Array] | None:
        """Starts a cp.async of ``data [n, size]``, and returns its lanes and places for :meth:`end_copy`."""
        size = data.shape[1]
        found = self._find(lanes, which, address, size)
        if found is None:
            return None
        chosen, place, low, high = found
        some, values = (which, data) if chosen is None else (which[chosen], data[chosen])
        if self._races is not None:
            self._races.begin(lanes, some, place, size, low, high)
        self.cells.write(place, values)
        return some, place

    def end_copy(self, lanes: Lanes, which: Which, place: Array, size: int) -> None:
        """The threads that started a copy waited for it."""
        if self._races is not None:
            self._races.arrive(lanes, which, place, size)
        if self._fences is not None:
            self._fences.write(place, size, copied=True)

    def fence(self, lanes: Lanes, which: Which) -> None:
        """Notes a ``fence.proxy.async`` of threads."""
        if self._fences is not None:
            self._fences.fence(lanes, which)

    def unfenced(self, lanes: Lanes, which: Which, address: Array, size: int, *, copies: bool = False) -> Chosen:
        """Of which lanes' accesses through the async proxy a byte was written with no fence since.

        A write is fenced if its warp executed a fence after it, or the warp that reads did after a barrier that divides them.

        Args:
            lanes: the batch.
            which: ``[n]``, the lanes that read.
            address: ``[n]``.
            size: bytes.
            copies: whether what cp.async wrote needs a fence as well.

        Returns:
            ``[n]``; False where the access is not to shared memory, or checks are off.
        """
        if self._fences is None or not len(which):
            return np.zeros(len(which), np.bool_)
        address = address.astype(np.int64)
        within = (address >= 0) & (address + size <= self.size) & (address % size == 0)
        place = (np.where(within, address, 0) + self._starts[1][which]) // size
        missing: Chosen = within & self._fences.missing(lanes, which, place, size, copies=copies)
        return missing
