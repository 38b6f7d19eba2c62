"""Which writes to shared memory a ``fence.proxy.async`` has made visible to the async proxy (PTX ISA, 9.7.13.4, fence.proxy)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lanes import WARP, Array, Lanes, Which
from .races import Chosen, Marks, SharedRaces

_COPIED = np.uint32(1)


class ProxyFences:
    """When each granule was last written, and when each warp last fenced.

    Time is a count of the writes and fences of a batch.
    """

    def __init__(self, races: SharedRaces) -> None:
        self._races = races
        self._written = Marks(races.size, races.granule, np.uint32)  # time * 2, and 1 where a cp.async wrote it
        self._time = 0
        self._last_store = 0
        self._fenced: NDArray[np.int64] = np.zeros(0, np.int64)
        self._interval: NDArray[np.int64] = np.zeros(0, np.int64)
        self._warps = 0

    def start(self, lanes: Lanes) -> None:
        """Forgets all, for a new batch."""
        if self._time > 2**29:
            self._written = Marks(self._races.size, self._races.granule, np.uint32)
            self._time = 0
        self._warps = lanes.kernel.threads // WARP
        self._last_store = 0
        self._fenced = np.zeros(len(lanes.programs) * self._warps, np.int64)
        self._interval = np.zeros(len(lanes.programs) * self._warps, np.int64)

    def write(self, place: Array, size: int, *, copied: bool = False) -> None:
        """Notes a write at places."""
        self._time += 1
        if not copied:
            self._last_store = self._time
        width = size // self._races.granule
        self._written.put(place, size, np.full(len(place) * width, 2 * self._time + copied, np.uint32))

    def fence(self, lanes: Lanes, which: Which) -> None:
        """Notes a fence."""
        self._time += 1
        warps = lanes.place[which] * self._warps + lanes.warp[which]
        self._fenced[warps] = self._time
        self._interval[warps] = lanes.intervals[lanes.place[which]]

    def missing(self, lanes: Lanes, which: Which, place: Array, size: int, *, copies: bool) -> Chosen:
        """``[n]``: which accesses are to a byte whose write was not fenced."""
        if not copies and self._last_store <= int(self._fenced.min()):  # all warps have fenced since: so mostly
            return np.zeros(len(which), np.bool_)
        width = size // self._races.granule
        stamps = self._written.last(place, size).reshape(-1, width)
        if not copies and bool((stamps & _COPIED).all()):
            return np.zeros(len(which), np.bool_)
        entries = self._races.writes.last(place, size).reshape(-1, width)
        time, warp = (stamps >> np.uint32(1)).astype(np.int64), (entries & np.uint32(0xFF)).astype(np.int64)
        program = lanes.place[which][:, None]
        reader = program * self._warps + lanes.warp[which][:, None]
        interval = entries >> np.uint32(8)
        by_writer = self._fenced[program * self._warps + np.minimum(warp, self._warps - 1)] > time
        # Where several warps wrote it, each fenced its own write, and the last of them may be later than the others' fences.
        by_all = self._interval.reshape(-1, self._warps).min(1)[program] + self._races.base >= interval
        behind = (self._interval[reader] + self._races.base > interval) | (warp == lanes.warp[which][:, None])
        fenced = np.where(warp < self._warps, by_writer, by_all) | ((self._fenced[reader] > time) & behind)
        if not copies:
            fenced |= stamps & _COPIED != 0
        written = entries >= (self._races.base + 1) << 8
        missing: Chosen = (written & ~fenced).any(1)
        return missing
