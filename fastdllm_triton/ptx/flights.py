"""What ``wgmma`` has in flight: products between their issue and the wait for their group (PTX ISA, 9.7.15.7).

Until a warp waits for a group, the accumulators of its products cannot be seen, and read as NaN. No other instruction may use
them, nor write a register that A was read from; nor may the operands in shared memory change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .descriptors import CHUNK
from .findings import Kind
from .lanes import WARP, Array, Lanes, Mask, Which
from .mma import to_registers
from .parser import Instruction, Operand
from .shared import SharedMemory
from .warp import NANS, Warps, lanes_of, put_warps

#: Numbers of a warp's groups, from 0, ``[W]``; or times.
Numbers = NDArray[np.int64]
_NONE = -1


@dataclass(frozen=True)
class Shape:
    """What two wgmmas have to have in common to add to the same registers one after the other.

    Attributes:
        columns: N.
        depth: K.
        d: type of the accumulators.
    """

    columns: int
    depth: int
    d: str


@dataclass
class Flight:
    """The accumulators of one or more wgmmas.

    Attributes:
        shape: of them.
        registers, slots: the accumulators'.
        group: to which group of its warp the last of them belongs; -1 where none is in flight.
        value: ``[W, 16, columns]``, of all warps.
    """

    shape: Shape
    registers: Sequence[Operand]
    slots: tuple[int, ...]
    group: Numbers
    value: Array = field(default_factory=lambda: np.zeros(0))


@dataclass
class _Reading:
    """Shared memory that a wgmma reads.

    Attributes:
        here: the wgmma.
        group: as a flight's.
        which, address, data: of the chunks.
    """

    here: Instruction
    group: Numbers
    which: Which
    address: Array
    data: Array


def at(warps: Warps) -> Which | slice:
    """What picks warps out of ``[W]``."""
    return slice(None) if warps is None else warps


def _no_numbers() -> Numbers:
    return np.zeros(0, np.int64)


@dataclass
class Flights:
    """All that is in flight in a batch of programs.

    Attributes:
        committed: how many groups each warp has committed.
        landed: for how many of them it has waited.
        fenced: the time of its last ``wgmma.fence``.
        used: by slot, the time of the last use by another instruction, of all warps or ``[W]``.
        writers: by slot, the flight of which it is an accumulator.
        readers: by slot of a part of A, the last group that reads it.
        readings: of shared memory.
        clock: the time.
    """

    committed: Numbers = field(default_factory=_no_numbers)
    landed: Numbers = field(default_factory=_no_numbers)
    fenced: Numbers = field(default_factory=_no_numbers)
    used: dict[int, int | Numbers] = field(default_factory=dict)
    writers: dict[int, Flight] = field(default_factory=dict)
    readers: dict[int, Numbers] = field(default_factory=dict)
    readings: list[_Reading] = field(default_factory=list)
    clock: int = 0

    @staticmethod
    def of(lanes: Lanes) -> Flights:
        """Those of a batch."""
        self = lanes.state(Flights)
        if not len(self.committed):
            warps = lanes.count // WARP
            self.committed, self.landed = np.zeros(warps, np.int64), np.zeros(warps, np.int64)
            self.fenced = np.full(warps, -1, np.int64)
        return self

    def fence(self, warps: Warps) -> None:
        """Warps executed a ``wgmma.fence``."""
        self.clock += 1
        self.fenced[at(warps)] = self.clock

    def commit(self, warps: Warps) -> None:
        """Warps end a group."""
        self.committed[at(warps)] += 1

    def touch(self, lanes: Lanes, mask: Mask, named: tuple[int, ...], written: tuple[int, ...]) -> None:
        """An instruction other than a wgmma uses registers of these slots, and writes some of them."""
        self.clock += 1
        for slot in named:
            if mask is None:
                self.used[slot] = self.clock
            else:
                active = np.logical_or.reduce(lanes.spread(mask).reshape(-1, WARP), 1)
                self.used[slot] = np.where(active, self.clock, self.used.get(slot, 0))
        self.check_use(lanes, mask, named, written)

    def check_use(
        self, lanes: Lanes, mask: Mask, named: Iterable[int], written: Iterable[int], own: Flight | None = None
    ) -> None:
        """Notes who names accumulators in flight, other than those of one's own flight, or writes parts of A that are read."""
        flights = {id(flight): flight for flight in map(self.writers.get, named) if flight is not None and flight is not own}
        written_to = [flight.group >= 0 for flight in flights.values()]
        read_from = [self.readers[slot] >= self.landed for slot in written if slot in self.readers]
        for busy, what in ((written_to, "an accumulator"), (read_from, "a part of A")):
            if busy and (warps := np.logical_or.reduce(busy)).any():
                which = lanes.active(mask)
                lanes.note(Kind.EARLY_ACCUMULATOR, which[warps[which // WARP]], what)

    def check_fence(self, lanes: Lanes, warps: Warps, slots: Iterable[int]) -> None:
        """Notes warps that used registers of these slots since their last ``wgmma.fence``."""
        latest: int | Numbers = 0
        for slot in slots:
            used = self.used.get(slot, 0)
            latest = max(latest, used) if isinstance(latest, int) and isinstance(used, int) else np.maximum(latest, used)
        late = np.broadcast_to(latest, self.fenced.shape)[at(warps)] > self.fenced[at(warps)]
        if late.any():
            which = lanes_of(lanes, warps).reshape(-1, WARP)[late].reshape(-1)
            lanes.note(Kind.WGMMA, which, "no wgmma.fence since its registers were used")

    def numbers(self, warps: Warps) -> Numbers:
        """The groups that warps are at; -1 of other warps."""
        if warps is None:
            return self.committed.copy()
        groups = np.full(len(self.committed), _NONE, np.int64)
        groups[warps] = self.committed[warps]
        return groups

    def find(self, shape: Shape, registers: Sequence[Operand], slots: tuple[int, ...]) -> Flight:
        """The flight of accumulators, a new one if there is none of that shape."""
        flight = self.writers.get(slots[0])
        if flight is None or flight.shape != shape or flight.slots != slots:
            flight = Flight(shape, registers, slots, np.full(len(self.committed), _NONE, np.int64))
        return flight

    def depart(self, lanes: Lanes, flight: Flight, warps: Warps, value: Array, parts_of_a: Iterable[int]) -> None:
        """Warps issue a product that makes the accumulators ``value [w, 16, columns]``."""
        if warps is None:
            flight.value = value
        else:
            if not len(flight.value):
                flight.value = np.zeros((len(self.committed), *value.shape[1:]), value.dtype)
            flight.value[warps] = value
        fresh = flight.group[at(warps)] < 0
        if fresh.any():
            some = warps if fresh.all() else np.flatnonzero(fresh) if warps is None else warps[fresh]
            for register in flight.registers:
                if some is None:
                    lanes.put(register, NANS, None)
                else:
                    put_warps(lanes, register, some, np.broadcast_to(NANS, (len(some) * WARP,)))
        flight.group[at(warps)] = self.committed[at(warps)]
        self.writers.update(dict.fromkeys(flight.slots, flight))
        for slot in parts_of_a:
            self.readers[slot] = np.maximum(self.readers.get(slot, _NONE), self.numbers(warps))

    def read(self, lanes: Lanes, warps: Warps, which: Which, address: Array) -> Array:
        """``[n, 16]``: chunks of shared memory, which are not to change before these warps wait.

        What ``cp.async`` wrote needs no ``fence.proxy.async``: the manual does not say so, but Triton and CUTLASS
        (``MainloopSm90CpAsyncGmma``) put none there.
        """
        shared = cast(SharedMemory, lanes.shared)
        data = shared.load(lanes, which, address, CHUNK)
        if not shared.checks:
            return data
        lanes.note(Kind.UNFENCED, which[shared.unfenced(lanes, which, address, CHUNK)])
        self.readings.append(_Reading(lanes.here, self.numbers(warps), which, address, data))
        return data

    def land(self, lanes: Lanes, warps: Warps, pending: int) -> None:
        """Warps wait for all groups but the last ``pending``."""
        here = at(warps)
        self.landed[here] = np.maximum(self.landed[here], self.committed[here] - pending)
        self._check_readings(lanes)
        for flight in {id(flight): flight for flight in self.writers.values()}.values():
            done = (flight.group >= 0) & (flight.group < self.landed)
            if not done.any():
                continue
            some = None if done.all() else np.flatnonzero(done)
            for register, bits in zip(flight.registers, to_registers(flight.value[at(some)], flight.shape.d), strict=True):
                put_warps(lanes, register, some, bits)
            flight.group[done] = _NONE
        self.writers = {slot: flight for slot, flight in self.writers.items() if (flight.group >= 0).any()}
        self.readers = {slot: group for slot, group in self.readers.items() if (group >= self.landed).any()}

    def _check_readings(self, lanes: Lanes) -> None:
        """Compares operands in shared memory with what they were, and looks who wrote them just now; the wgmma is to blame."""
        here, kept = lanes.here, []
        for reading in self.readings:
            done = (reading.group >= 0) & (reading.group < self.landed)
            if done.any():
                lanes.here = reading.here
                some = slice(None) if done.all() else np.flatnonzero(done[reading.which // WARP])
                which = reading.which[some]
                now = lanes.shared.load(lanes, which, reading.address[some], CHUNK)
                changed = (now.view(np.uint64) != reading.data[some].view(np.uint64)).any(1)
                lanes.note(Kind.SHARED_RACE, which[changed], "written while wgmma reads it")
                reading.group[done] = _NONE
            if (reading.group >= 0).any():
                kept.append(reading)
        self.readings = kept
        lanes.here = here
