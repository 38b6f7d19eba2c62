"""Bytes that are read and written in pieces of one size, at many places at once."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lanes import Array

#: Below this size memory is as it comes; above, it is asked for in huge pages, which take a fraction of the time to be touched;
#: and of the largest the operating system gives small pages, of which a touch here and there takes no more than it has to.
_SMALL = 1 << 17
_LARGE = 1 << 26
_HUGE_PAGE = 1 << 21
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux: what is never touched need not fit into memory


#: Some places: numbers, or a slice where they are one after the other.
Places = Array | slice


class Cells:
    """Bytes, in pieces of a power of two.

    Places count in pieces: place 3 of size 8 is bytes 24 to 31.

    Attributes:
        bytes: all of them, ``[n]`` uint8; ``n`` may be any number.
    """

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.bytes = data
        self._views: dict[int, Array] = {}

    def view(self, size: int) -> Array:
        """The whole pieces of a size: unsigned up to 8 bytes, opaque above."""
        found = self._views.get(size)
        if found is None:
            dtype: Any = f"u{size}" if size <= 8 else f"V{size}"
            found = self._views[size] = self.bytes[: len(self.bytes) // size * size].view(dtype)
        return found

    def read(self, place: Places, size: int) -> Array:
        """``[n, size]`` uint8, a copy."""
        return self.look(place, size, copy=True).view(np.uint8).reshape(-1, size)

    def look(self, place: Places, size: int, *, copy: bool = False) -> Array:
        """The pieces, ``[n]``, which are no copy where the places are a slice."""
        view = self.view(size)
        if isinstance(place, slice):
            return view[place].copy() if copy else view[place]
        return view.take(place, mode="clip")  # the places are within: "clip" only saves a copy

    def write(self, place: Places, data: Array) -> None:
        """Writes ``data [n, size]``, of any type of which a row is as long as a piece."""
        size = data.shape[1] * data.itemsize
        view = self.view(size)
        view[place] = data.view(view.dtype).reshape(-1)


def zeros(count: int) -> NDArray[np.uint8]:
    """``[count]`` zeros that cost nothing until they are touched, however many they are."""
    if count < _SMALL:
        return np.zeros(count, np.uint8)
    size = -(-count // _HUGE_PAGE) * _HUGE_PAGE
    if size > _LARGE:
        pages = mmap.mmap(-1, size, flags=_PRIVATE | _NORESERVE)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(pages, np.uint8, count)
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=_PRIVATE)
    pages.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(pages, np.uint8)
    start = -every.ctypes.data % _HUGE_PAGE
    return every[start : start + count]


class _Window:
    """Memory at an address, as numpy's array interface tells it."""

    def __init__(self, address: int, count: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (count,), "typestr": "|u1", "version": 3}


def mapped(address: int, count: int) -> NDArray[np.uint8]:
    """The bytes at an address, which somebody else keeps alive."""
    return np.asarray(_Window(address, count))


def rising(place: Array) -> bool:
    """Whether each place is above the one before: the usual way to be all different."""
    return len(place) < 2 or bool((place[1:] > place[:-1]).all())


def compact(place: Array) -> tuple[Places, bool]:
    """The same places, as a slice if they can be one, and whether they are rising."""
    if not rising(place):
        return place, False
    first, last = int(place[0]), int(place[-1])
    return (slice(first, last + 1) if last - first == len(place) - 1 else place), True


class Distinct:
    """Tells whether places that are not :func:`rising` are all different, remembering by instruction those that were.

    In a loop, and from one batch of programs to the next, they often differ by a constant.
    """

    def __init__(self) -> None:
        self._known: dict[int, Array] = {}

    def __call__(self, instruction: object, place: Array) -> bool:
        steps = place - place[0]
        known = self._known.get(id(instruction))
        if known is not None and len(known) == len(steps) and bool((known == steps).all()):
            return True
        order = np.sort(place)
        if not (order[1:] != order[:-1]).all():
            return False
        self._known[id(instruction)] = steps
        return True
