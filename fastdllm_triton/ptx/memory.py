"""Global memory: the tensors of a launch as they lie in this process, with a check of every address."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .accesses import Use
from .cells import Cells, Distinct, compact, mapped
from .findings import Kind
from .lanes import POISON, Array, Lanes, Which
from .pointers import Origin
from .races import Chosen, GlobalRaces

#: The largest access of a thread; pieces of memory begin at multiples of it.
_WIDEST = 32


class Tensor(Protocol):
    """What is needed of a tensor; torch's have it."""

    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...
    def size(self) -> Sequence[int]: ...
    def stride(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Lanes of an access that are all in one piece of memory.

    Attributes:
        extent: that piece.
        chosen: positions among the access's lanes; None if it is all of them.
        place: in the piece, in units of the access's size.
    """

    extent: Extent
    chosen: NDArray[np.int64] | None
    place: Array


@dataclass(slots=True, eq=False)
class Region:
    """The elements of a tensor.

    Attributes:
        name: of the tensor.
        pointer: address of its first element.
        item: bytes of an element.
        run: bytes that lie next to each other.
        steps: how often the run is repeated and by how many bytes apart, ``(count, stride)``, outermost first.
        length: bytes from the first to the last.
        extent: the piece of memory that it is in.
        first: its place there, in bytes.
    """

    name: str
    pointer: int
    item: int
    run: int
    steps: tuple[tuple[int, int], ...]
    length: int
    extent: Extent = field(init=False, repr=False)
    first: int = field(init=False)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Region:
        """The region of a tensor.

        Elements that are interleaved in a way which no nesting of rows describes count as one run from the first to the last.
        """
        item, sizes = tensor.element_size(), tensor.size()
        if 0 in sizes:
            return cls(name, tensor.data_ptr(), item, 0, (), 0)
        found = sorted((stride * item, size) for size, stride in zip(sizes, tensor.stride(), strict=True) if size > 1 and stride)
        run = length = item
        steps: list[tuple[int, int]] = []
        for stride, count in found:
            grown = length + (count - 1) * stride
            if steps and stride == steps[-1][0] * steps[-1][1]:
                steps[-1] = (steps[-1][0], steps[-1][1] * count)
            elif (not steps and stride <= run) or stride < length:
                run, steps = grown, []
            else:
                steps.append((stride, count))
            length = grown
        return cls(name, tensor.data_ptr(), item, run, tuple((count, stride) for stride, count in reversed(steps)), length)

    def holds(self, offset: Array, size: int) -> Chosen | None:
        """Which accesses of ``size`` bytes at ``offset [n]`` uint64 of the piece are to elements only; None if all are."""
        first, last = self.first, self.first + self.length - size
        if last < first:
            return np.zeros(len(offset), np.bool_)
        within = int(offset.max()) <= last and (first == 0 or int(offset.min()) >= first)
        if not self.steps:
            return None if within else (offset >= first) & (offset <= last)
        rest = offset - np.uint64(first) if first else offset
        found = self._in_rows(rest, size)
        if found.all():
            return None
        if size > self.item:  # it may be in rows that meet, or in several runs: each element is looked at
            bad = np.flatnonzero(~found)
            every = [self._in_rows(rest[bad] + np.uint64(at), self.item) for at in range(0, size, self.item)]
            found[bad] = np.logical_and.reduce(every)
        return None if found.all() else found

    def _in_rows(self, rest: Array, size: int) -> Chosen:
        """Which accesses are within one run."""
        found: Chosen = rest <= self.length - size
        for n, (count, stride) in enumerate(self.steps):
            row = rest // np.uint64(stride)
            rest = rest - row * np.uint64(stride)
            if n:  # of the outermost the length tells
                found &= row < count
        if self.run < size:
            return np.zeros(len(rest), np.bool_)
        return found & (rest <= self.run - size)

    def describe(self, address: int, size: int) -> str:
        """Where an address is that is not within."""
        behind = address + size - (self.pointer + self.length)
        if not self.length:
            return f"{self.name} has no elements"
        if address < self.pointer:
            return f"{self.pointer - address} bytes before {self.name}"
        return f"{behind} bytes behind the end of {self.name}" if behind > 0 else f"in a gap of {self.name}"


@dataclass(slots=True, eq=False)
class Extent:
    """A piece of memory: from the first to the last element of tensors that overlap.

    Attributes:
        low: its address, rounded down.
        cells: its bytes.
        races: who used what, if that is to be watched.
    """

    low: int
    cells: Cells
    races: GlobalRaces | None = None


class GlobalMemory:
    """The tensors that a launch is given.

    They may be views of one storage, overlap, have gaps, or have no elements, and nothing of them is copied or touched but what
    the kernel accesses. An access through a pointer has to stay within the elements of the tensors at that pointer (where several
    parameters flow into an address, of any of them; where none does, of any tensor at all).

    Attributes:
        early: whether programs have still to wait for the launch before, so that they may not access anything.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self.early = False
        self._alive = dict(tensors)  # what is accessed is their memory
        self.regions = [Region.of(name, tensor) for name, tensor in tensors.items() if tensor is not None]
        self.extents: list[Extent] = []
        self._candidates: dict[int, list[Region]] = {}
        self._distinct = Distinct()
        self._map()

    def _map(self) -> None:
        together: list[Region] = []
        end = 0
        for region in sorted(self.regions, key=lambda region: (region.pointer, region.length)):
            if together and region.pointer >= end:
                self._add(together, end)
                together = []
            together.append(region)
            end = max(end, region.pointer + region.length)
        if together:
            self._add(together, end)

    def _add(self, regions: Sequence[Region], end: int) -> None:
        low = regions[0].pointer // _WIDEST * _WIDEST
        extent = Extent(low, Cells(mapped(low, end - low) if end > regions[0].pointer else np.zeros(0, np.uint8)))
        for region in regions:
            region.extent, region.first = extent, region.pointer - low
        self.extents.append(extent)

    def watch(self, origins: Iterable[Origin], parameters: Mapping[str, Array], *, races: bool) -> None:
        """Prepares for a launch: finds where each instruction may lead, and with ``races`` what has to be watched for races.

        Args:
            origins: the kernel's accesses.
            parameters: values of its parameters.
            races: whether to look for races.
        """
        self._candidates.clear()
        uses: dict[int, list[Origin]] = {}
        for origin in origins:
            regions = self._reached(origin, parameters)
            self._candidates[id(origin.instruction)] = regions
            for key in {id(region.extent) for region in regions}:
                uses.setdefault(key, []).append(origin)
        for extent in self.extents:
            found = uses.get(id(extent), [])
            changed = any(origin.access.use in (Use.WRITE, Use.ATOMIC) for origin in found)
            granule = min((origin.access.size for origin in found), default=1)
            extent.races = GlobalRaces(len(extent.cells.bytes), granule) if races and changed else None

    def _reached(self, origin: Origin, parameters: Mapping[str, Array]) -> list[Region]:
        found: list[Region] = []
        for name in origin.parameters:
            value = int(parameters[name][0]) if name in parameters else 0
            at = [region for region in self.regions if region.pointer == value]
            found += at or [region for region in self.regions if region.pointer < value < region.pointer + region.length]
        return found or list(self.regions)

    def _find(self, lanes: Lanes, which: Which, address: Array, size: int) -> list[Part]:
        """Where an access goes; what is wrong with it is noted."""
        if self.early:
            lanes.note(Kind.EARLY_ACCESS, which)
        if not len(which):
            return []
        address = address.view(np.uint64) if address.itemsize == 8 else address.astype(np.uint64)
        candidates = self._candidates.get(id(lanes.here), self.regions)
        if candidates:
            region = candidates[0]
            offset = address - np.uint64(region.extent.low)
            if not int(np.bitwise_or.reduce(offset)) & (size - 1) and region.holds(offset, size) is None:
                return [Part(region.extent, None, _place(offset, size))]
        return self._search(lanes, which, address, size, candidates)

    def _search(self, lanes: Lanes, which: Which, address: Array, size: int, candidates: list[Region]) -> list[Part]:
        uniform = len(address) < len(which)
        aligned = address & np.uint64(size - 1) == 0
        if not aligned.all():
            lanes.note(Kind.MISALIGNED, which if uniform else which[~aligned], f"of {size} bytes")
        left = np.flatnonzero(aligned)
        parts: list[Part] = []
        for region in list(candidates):
            offset = address[left] - np.uint64(region.extent.low)
            held = region.holds(offset, size) if len(left) else np.zeros(0, np.bool_)
            taken = left if held is None else left[held]
            if not len(taken):
                continue
            whole = len(taken) == len(address)
            parts.append(Part(region.extent, None if whole else taken, _place(offset if held is None else offset[held], size)))
            if 2 * len(taken) > len(address):  # so that it is tried first next time
                candidates.remove(region)
                candidates.insert(0, region)
            left = left[:0] if held is None else left[~held]
        if len(left):
            lanes.note(Kind.OUTSIDE, which if uniform else which[left], self._describe(int(address[left[0]]), size, candidates))
        return parts

    def _describe(self, address: int, size: int, candidates: Iterable[Region]) -> str:
        near = sorted(candidates, key=lambda r: min(abs(address - r.pointer), abs(address - r.pointer - r.length)))
        other = [r for r in self.regions if r.pointer <= address < r.pointer + r.length and r not in near]
        more = f", inside of {other[0].name}" if other else ""
        return (near[0].describe(address, size) if near else "no tensor is there") + more

    def load(self, lanes: Lanes, which: Which, address: Array, size: int, use: Use = Use.READ) -> Array:
        """Bytes, as :meth:`Memory.load <fastdllm_triton.ptx.lanes.Memory.load>` has it.

        Of an address ``[1]`` that all lanes read they are ``[1, size]``.
        """
        parts = self._find(lanes, which, address, size)
        for part in parts:
            if part.extent.races is not None:
                some, every = _broadcast(which, part, len(address))
                place, unique = compact(every)
                part.extent.races.use(lanes, some, use, place, size, unique)
        if len(parts) == 1 and parts[0].chosen is None:
            return parts[0].extent.cells.read(parts[0].place, size)
        data = np.full((len(address), size), POISON, np.uint8)
        for part in parts:
            data[slice(None) if part.chosen is None else part.chosen] = part.extent.cells.read(part.place, size)
        return data

    def load_part(self, lanes: Lanes, which: Which, address: Array, counts: Array, size: int) -> Array:
        """``[n, size]``: the first ``counts [n]`` bytes at addresses that are aligned to ``size``; the others are 0."""
        data = np.zeros((len(which), size), np.uint8)
        address = address.astype(np.uint64)
        crooked = address & np.uint64(size - 1) != 0
        lanes.note(Kind.MISALIGNED, which[crooked], f"of {size} bytes")
        data[crooked] = POISON
        for at in range(size):
            some = np.flatnonzero((counts > at) & ~crooked)
            for part in self._find(lanes, which[some], address[some] + np.uint64(at), 1):
                chosen = some if part.chosen is None else some[part.chosen]
                data[chosen, at] = part.extent.cells.bytes[part.place]
                races = part.extent.races
                if races is not None and at % races.granule == 0:
                    races.use(lanes, which[chosen], Use.READ, part.place // races.granule, races.granule, False)
        return data

    def store(self, lanes: Lanes, which: Which, address: Array, data: Array, use: Use = Use.WRITE) -> None:
        """Writes bytes, as :meth:`Memory.store <fastdllm_triton.ptx.lanes.Memory.store>` has it."""
        size = data.shape[1]
        for part in self._find(lanes, which, address, size):
            some, values = (which, data) if part.chosen is None else (which[part.chosen], data[part.chosen])
            cells, races = part.extent.cells, part.extent.races
            if races is None:
                cells.write(part.place, values)
                continue
            place, unique = compact(part.place)
            unique = unique or self._distinct(lanes.here, part.place)
            excused = races.use(lanes, some, use, place, size, unique)
            if excused is not None:
                differ = excused & (cells.read(place, size) != values).any(1)
                lanes.note(Kind.GLOBAL_RACE, some[differ], "written by another warp")
            cells.write(place, values)
            if not unique:
                lost = (cells.read(place, size) != values).any(1)
                lanes.note(Kind.GLOBAL_RACE, some[lost], "several values to one address at once")

    def update(self, lanes: Lanes, which: Which, address: Array, size: int, change: Callable[..., Array]) -> Array:
        """Changes bytes atomically.

        Args:
            change: given all the pieces of ``size`` bytes, places among them, and the positions of their lanes in ``which``, it
                changes the pieces and returns what each lane found.

        Returns:
            ``[n, size]`` uint8: what was there.
        """
        old: NDArray[Any] = np.full((len(which), size), POISON, np.uint8)
        for part in self._find(lanes, which, address, size):
            chosen = np.arange(len(which)) if part.chosen is None else part.chosen
            if part.extent.races is not None:
                part.extent.races.use(lanes, which[chosen], Use.ATOMIC, part.place, size, False)
            old[chosen] = change(part.extent.cells.view(size), part.place, chosen).view(np.uint8).reshape(-1, size)
        return old


def _place(offset: Array, size: int) -> Array:
    place: Array = (offset >> np.uint64(size.bit_length() - 1)).view(np.int64)
    return place


def _broadcast(which: Which, part: Part, count: int) -> tuple[Which, Array]:
    """The lanes of a part and their places, where all of them may have one address."""
    if count < len(which):
        return which, np.broadcast_to(part.place, (len(which),))
    return (which if part.chosen is None else which[part.chosen]), part.place
