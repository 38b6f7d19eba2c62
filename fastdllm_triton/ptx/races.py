"""Who last used which memory, and whether a barrier lies between: the search for races.

What happened before what is told by barriers alone, not by the order in which the interpreter happened to run: two accesses to
the same place, of which one writes, conflict if they are of two programs, or of two warps of one program that passed the same
barriers (PTX ISA, 8, "Memory Consistency Model", with barriers as the only synchronisation: not what atomics put in order).

Memory is divided into *granules*, as large as the smallest access that the kernel makes to it. Of each granule the last use of
each kind is kept as an integer, ``program | interval | warp``: an *entry*. The warp is 0xFF where several of one program were it
in the same interval, the program is all ones where there were several. 0 is no use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .accesses import Use
from .cells import Cells, Places, zeros
from .findings import Kind
from .lanes import Array, Lanes, Which

Chosen = NDArray[np.bool_]

_WARP_BITS = 8
_SEVERAL_WARPS = 0xFF
_PROGRAM_SHIFT = 32
_PROGRAM = np.uint64(1 << _PROGRAM_SHIFT)
_SEVERAL_PROGRAMS = np.uint64(2**64 - 1)
#: Intervals that fit.
INTERVALS = 1 << 24

#: By use: the kinds that it conflicts with, the most frequent first.
_AGAINST = {
    Use.READ: (Use.WRITE, Use.ATOMIC),
    Use.STRONG_READ: (Use.WRITE,),
    Use.WRITE: (Use.WRITE, Use.READ, Use.ATOMIC),
    Use.ATOMIC: (Use.WRITE, Use.READ),
}
_DONE = {Use.READ: "read", Use.WRITE: "written", Use.ATOMIC: "changed atomically"}


class Entries:
    """The entries of the lanes of a batch, made anew when a barrier is passed."""

    def __init__(self) -> None:
        self.intervals: Array | None = None
        self._made: dict[tuple[type[Any], int, int], Array] = {}

    def of(self, lanes: Lanes, which: Which, dtype: type[Any], width: int, base: int = 0) -> Array:
        """``[n * width]``: of lanes ``which [n]``, each ``width`` times; ``base`` is added to the intervals."""
        if self.intervals is not lanes.intervals:
            self.intervals = lanes.intervals
            self._made.clear()
        if which is not lanes.every:  # in any order, and lanes may come several times
            some = self.of(lanes, lanes.every, dtype, 1, base)[which]
            return some if width == 1 else np.repeat(some, width)
        found = self._made.get((dtype, width, base))
        if found is None:
            entry = (lanes.intervals + base) << _WARP_BITS
            if dtype is np.uint64:
                entry = entry | (lanes.programs + 1) << _PROGRAM_SHIFT
            found = (entry[lanes.place] | lanes.warp).astype(dtype)
            found = self._made[dtype, width, base] = found if width == 1 else np.repeat(found, width)
        return found


def same_interval(entries: Array, mine: Array) -> Chosen | None:
    """Where an entry is another warp's of the same program and interval; None if nowhere."""
    apart = (entries ^ mine) - entries.dtype.type(1)
    if len(apart) == 0 or int(apart.min()) >= _SEVERAL_WARPS:
        return None
    found: Chosen = apart < _SEVERAL_WARPS
    return found


def _other_program(entries: Array, mine: Array) -> Chosen | None:
    """Where an entry is another program's; None if nowhere."""
    if entries.itemsize < 8:
        return None
    apart = entries ^ mine
    if int(apart.max()) >> _PROGRAM_SHIFT == 0:
        return None
    found: Chosen = (entries != 0) & (apart >= _PROGRAM)
    return found if found.any() else None


def conflicts(entries: Array, mine: Array) -> Chosen | None:
    """Where an entry is of somebody from whom no barrier divides; None if nowhere."""
    if entries.itemsize == 8 and not int(entries.max()):
        return None
    warps, programs = same_interval(entries, mine), _other_program(entries, mine)
    return programs if warps is None else warps if programs is None else warps | programs


def merged(entries: Array, mine: Array) -> Array:
    """The entries after a use by ``mine``."""
    new = np.maximum(entries, mine)  # of one program the later interval counts
    if (warps := same_interval(entries, mine)) is not None:
        new = np.where(warps, mine | mine.dtype.type(_SEVERAL_WARPS), new)
    if (programs := _other_program(entries, mine)) is not None:
        new = np.where(programs, _SEVERAL_PROGRAMS, new)
    return new


class Marks:
    """The entries of one kind of use: of the granules of one piece of memory.

    Attributes:
        granule: its bytes.
        dtype: of entries: uint64, or uint32 where they have no program.
    """

    def __init__(self, size: int, granule: int, dtype: type[Any]) -> None:
        self.granule = granule
        self.dtype = dtype
        self.itemsize = np.dtype(dtype).itemsize
        self.cells = Cells(zeros(-(-size // granule) * self.itemsize + 64))

    def last(self, place: Places, size: int) -> Array:
        """``[n * width]``: entries of the granules of accesses of ``size`` bytes; no copy where the places are a slice."""
        return self.cells.look(place, size // self.granule * self.itemsize).view(self.dtype)

    def put(self, place: Places, size: int, entries: Array) -> None:
        """Writes ``entries [n * width]``."""
        self.cells.write(place, entries.reshape(-1, size // self.granule))

    def enter(self, place: Places, size: int, entries: Array, *, unique: bool) -> Array | None:
        """Writes entries ``[n * width]``; where lanes wrote to one place, what is true for all of them.

        Returns:
            what the lanes find there before that; None if places are unique.
        """
        self.put(place, size, entries)
        if unique or isinstance(place, slice):
            return None
        found = first = self.last(place, size)
        width = size // self.granule
        while True:
            lost: Chosen = found != entries
            if not lost.any():
                break
            chosen = _rows(lost, width)
            both = merged(found, entries)
            if (both == found).all():
                break
            place, entries = place[chosen], both.reshape(-1, width)[chosen].reshape(-1)
            self.put(place, size, entries)
            found = self.last(place, size)
        return first


def describe(entry: int, use: Use) -> str:
    """Who did it."""
    program, warp = entry >> _PROGRAM_SHIFT, entry & _SEVERAL_WARPS
    if program == 2**32 - 1:
        return f"{_DONE[use]} by several programs"
    who = "several warps" if warp == _SEVERAL_WARPS else f"warp {warp}"
    return f"{_DONE[use]} by {who}" + (f" of program {program - 1}" if program else "")


class GlobalRaces:
    """The uses of one piece of global memory during a launch.

    Attributes:
        size: its bytes.
        granule: bytes of the smallest access that the kernel can make to it.
    """

    def __init__(self, size: int, granule: int) -> None:
        self.size = size
        self.granule = granule
        self._marks: dict[Use, Marks] = {}

    def use(self, lanes: Lanes, which: Which, use: Use, place: Places, size: int, unique: bool) -> Chosen | None:
        """Checks and notes an access of lanes ``which [n]`` at ``place [n]``.

        Returns:
            lanes that store where another warp of their program did: a race only if the values differ. None if there are none.
        """
        width = max(size // self.granule, 1)
        mine = lanes.state(Entries).of(lanes, which, np.uint64, width)
        excused: Chosen | None = None
        before: Array | None = None
        for other in _AGAINST[use]:
            marks = self._marks.get(other)
            if marks is None:
                continue
            entries = marks.last(place, size)
            if other is use:
                before = entries
            bad = conflicts(entries, mine)
            if bad is None:
                continue
            if use is other is Use.WRITE:
                foreign = _other_program(entries, mine)
                if foreign is not None:
                    bad = bad & ~foreign
                excused = _rows(bad, width) if bad.any() else None
                bad = foreign
            if bad is not None:
                _note(lanes, which, Kind.GLOBAL_RACE, entries, bad, width, other)
        if use is Use.STRONG_READ:
            return excused
        marks = self._marks.get(use)
        if marks is None:
            marks = self._marks[use] = Marks(self.size, self.granule, np.uint64)
        if before is None:
            before = marks.last(place, size)
        found = marks.enter(place, size, merged(before, mine) if int(before.max()) else mine, unique=unique)
        if found is not None and use is Use.WRITE:
            bad = _other_program(found, mine)
            if bad is not None:
                _note(lanes, which, Kind.GLOBAL_RACE, found, bad, width, use)
        return excused


def _rows(bad: Chosen, width: int) -> Chosen:
    """Of which lanes' granules one at least is bad."""
    rows: Chosen = bad if width == 1 else np.logical_or.reduce(bad.reshape(-1, width), 1)
    return rows


def _note(lanes: Lanes, which: Which, kind: Kind, entries: Array, bad: Chosen, width: int, use: Use) -> None:
    first = int(entries[int(bad.argmax())])
    lanes.note(kind, which[_rows(bad, width)], describe(first, use))


@dataclass(frozen=True, slots=True)
class _Reads:
    """Reads that are not in the map yet: of an interval, all or some lanes' of one instruction.

    Attributes:
        place, size, mine: as they are entered.
        low, high: the bytes, counted in each program's memory, between which they are.
        latest: the last interval of one of the lanes.
    """

    place: Array
    size: int
    mine: Array
    low: int
    high: int
    latest: int


class SharedRaces:
    """The uses of the shared memory of a batch's programs.

    A program's intervals are counted on from batch to batch, so that nothing need be wiped. Reads are kept in a list, and entered
    only if something near is written before the next barrier. Accesses that are volatile, relaxed and so on count as others do.

    Attributes:
        granule: bytes of the smallest access that the kernel makes.
        base: what is added to intervals.
    """

    #: Of bytes that a cp.async is to write: above all others.
    PENDING = 0xFFFFFFFF
    #: Reads that may wait, in lanes.
    _PATIENCE = 1 << 22

    def __init__(self, size: int, granule: int) -> None:
        self.size = size
        self.granule = granule
        self.writes = Marks(size, granule, np.uint32)
        self._reads: Marks | None = None
        self._atomics: Marks | None = None
        self.base = 0
        self._last = 0
        self._seen: Array | None = None
        self._oldest = 0
        self._waiting: list[_Reads] = []
        self._waiting_lanes = 0
        self._entered: tuple[int, int, int] | None = None
        self._on_their_way = 0

    def start(self) -> None:
        """Forgets all, for a new batch."""
        self.base = self._last
        if self.base > INTERVALS // 2 or self._on_their_way:
            self.base = 0
            self.writes = Marks(self.size, self.granule, np.uint32)
            self._reads = self._atomics = None
        self._waiting, self._waiting_lanes, self._entered, self._seen, self._on_their_way = [], 0, None, None, 0

    def _follow(self, lanes: Lanes) -> None:
        """Forgets reads that are behind a barrier now."""
        if self._seen is lanes.intervals:
            return
        self._seen = lanes.intervals
        self._oldest = int(lanes.intervals.min()) + self.base
        self._last = int(lanes.intervals.max()) + self.base
        if self._last >= INTERVALS - 1:
            raise OverflowError(f"{lanes.kernel.name}: more than {INTERVALS // 2} barriers in one batch of programs")
        self._wait([reads for reads in self._waiting if reads.latest >= self._oldest])
        if self._entered is not None and self._entered[2] < self._oldest:
            self._entered = None

    def _mine(self, lanes: Lanes, which: Which, width: int) -> Array:
        self._follow(lanes)
        return lanes.state(Entries).of(lanes, which, np.uint32, width, self.base)

    def _known(self, lanes: Lanes, which: Which, entries: Array, width: int, *, read: bool) -> Chosen | None:
        """Where bytes have a value, ``[n * width]``, None if everywhere: neither a copy on its way, nor never written."""
        pending: Chosen | None = None
        unwritten: Chosen | None = None
        if int(entries.max()) == self.PENDING:
            pending = entries == self.PENDING
            lanes.note(Kind.NOT_AWAITED, which[_rows(pending, width)])
        first = (self.base + 1) << _WARP_BITS
        if read and int(entries.min()) < first:
            unwritten = entries < first
            lanes.note(Kind.UNWRITTEN, which[_rows(unwritten, width)])
        if pending is None:
            return None if unwritten is None else ~unwritten
        return ~pending if unwritten is None else ~(pending | unwritten)

    def read(self, lanes: Lanes, which: Which, place: Array, size: int, low: int, high: int) -> Chosen | None:
        """Checks a read at ``place [n]``, between the bytes ``low`` and ``high``; returns what bytes have a value, by granule."""
        width = size // self.granule
        mine = self._mine(lanes, which, width)
        entries = self.writes.last(place, size)
        known = self._known(lanes, which, entries, width, read=True)
        self._check(lanes, which, entries, mine, width, Use.WRITE)
        if self._atomics is not None:
            self._check(lanes, which, self._atomics.last(place, size), mine, width, Use.ATOMIC)
        self._waiting.append(_Reads(place, size, mine, low, high, self._last))
        self._waiting_lanes += len(place)
        if self._waiting_lanes > self._PATIENCE:
            self._enter_reads(0, self.size)
        return known

    def _check(self, lanes: Lanes, which: Which, entries: Array, mine: Array, width: int, use: Use) -> None:
        bad = same_interval(entries, mine)
        if bad is not None:
            _note(lanes, which, Kind.SHARED_RACE, entries, bad, width, use)

    def write(self, lanes: Lanes, which: Which, place: Array, size: int, low: int, high: int, unique: bool) -> Chosen | None:
        """Checks and notes a store.

        Returns:
            lanes that store where another warp did: a race only if the values differ. None if there are none.
        """
        width, mine, entries = self._meet(lanes, which, place, size, low, high)
        if self._atomics is not None:
            self._check(lanes, which, self._atomics.last(place, size), mine, width, Use.ATOMIC)
        excused = same_interval(entries, mine)
        now = mine if excused is None else merged(entries, mine)
        self.writes.enter(place, size, now, unique=unique)
        return None if excused is None else _rows(excused, width)

    def begin(self, lanes: Lanes, which: Which, place: Array, size: int, low: int, high: int) -> None:
        """Checks and notes the start of a cp.async, from which on nobody may use the bytes."""
        width, mine, entries = self._meet(lanes, which, place, size, low, high)
        self._check(lanes, which, entries, mine, width, Use.WRITE)
        self.writes.put(place, size, np.full(len(mine), self.PENDING, np.uint32))
        self._on_their_way += len(place)

    def arrive(self, lanes: Lanes, which: Which, place: Array, size: int) -> None:
        """A cp.async's bytes are there, for the thread that waited."""
        self._on_their_way -= len(place)
        self.writes.put(place, size, self._mine(lanes, which, size // self.granule))

    def atomic(self, lanes: Lanes, which: Which, place: Array, size: int, low: int, high: int) -> None:
        """Checks and notes an atomic access."""
        width, mine, entries = self._meet(lanes, which, place, size, low, high, read=True)
        self._check(lanes, which, entries, mine, width, Use.WRITE)
        if self._atomics is None:
            self._atomics = Marks(self.size, self.granule, np.uint32)
        self._atomics.enter(place, size, merged(self._atomics.last(place, size), mine), unique=False)

    def _meet(
        self, lanes: Lanes, which: Which, place: Array, size: int, low: int, high: int, *, read: bool = False
    ) -> tuple[int, Array, Array]:
        """Checks a change against the reads of the interval, and that the bytes are there to be written, or ``read`` too.

        Returns:
            the granules of an access, what is entered for each, and the last writes of each.
        """
        width = size // self.granule
        mine = self._mine(lanes, which, width)
        self._enter_reads(low, high)
        if self._reads is not None and self._entered is not None and self._entered[0] < high and low < self._entered[1]:
            self._check(lanes, which, self._reads.last(place, size), mine, width, Use.READ)
        entries = self.writes.last(place, size)
        self._known(lanes, which, entries, width, read=read)
        return width, mine, entries

    def _enter_reads(self, low: int, high: int) -> None:
        """Enters the reads between two bytes into the map."""
        near = [reads for reads in self._waiting if reads.low < high and low < reads.high]
        if not near:
            return
        if self._reads is None:
            self._reads = Marks(self.size, self.granule, np.uint32)
        for reads in near:
            now = merged(self._reads.last(reads.place, reads.size), reads.mine)
            self._reads.enter(reads.place, reads.size, now, unique=False)
            before = self._entered or (reads.low, reads.high, reads.latest)
            self._entered = (min(before[0], reads.low), max(before[1], reads.high), max(before[2], reads.latest))
        self._wait([reads for reads in self._waiting if not (reads.low < high and low < reads.high)])

    def _wait(self, reads: list[_Reads]) -> None:
        self._waiting = reads
        self._waiting_lanes = sum(len(some.place) for some in reads)
