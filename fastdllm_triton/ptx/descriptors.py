"""Matrices in shared memory as ``wgmma`` reads them: matrix descriptors, and where they say that elements are.

PTX ISA, 9.7.15.5.1.2, "Shared Memory Matrix Layout", with the canonical layouts of 9.7.15.5.1.2.1.3; CUTLASS has the same in
cute/atom/mma_traits_sm90_gmma.hpp. The unit of all layouts is a *chunk*: 16 bytes, which are elements that follow each other
along K (*K-major*) or along M or N (*MN-major*, of 16-bit elements only).

Swizzling exchanges chunks as the address says: bits 4 to 6 become their exclusive or with bits 7 to 9 (128-byte swizzling), 4
to 5 with 7 to 8 (64-byte), 4 with 7 (32-byte). It goes by the address in shared memory, whatever the descriptor's start is; so
one that starts inside of a pattern, as for the second 16 columns of K, is right. A *base offset* is for patterns that are not
aligned to their own size. The manual says how to compute it, but not what becomes of it, and Triton has none: it is taken here
as the number of 128-byte rows by which the patterns are moved.
"""

from __future__ import annotations

import numpy as np

from .lanes import Array
from .mma import Format, elements

CHUNK = 16
#: By swizzling mode, bits 62 and 63 of a descriptor: none, of 128, of 64 and of 32 bytes: the bytes of a row of its pattern.
_WIDTH = np.array([16, 128, 64, 32])


def _field(descriptors: Array, first: int, last: int) -> Array:
    return (descriptors >> np.uint64(first) & np.uint64(2 ** (last - first + 1) - 1)).astype(np.int64)


def addresses(descriptors: Array, size: int, depth: int, transposed: bool) -> Array:
    """``[d, chunks]`` int64: where the chunks of matrices are, in the order that :func:`values` wants.

    Args:
        descriptors: ``[d]`` uint64 (PTX ISA, 9.7.15.5.1.2.2, "Matrix Descriptor Format").
        size: rows of A, or columns of B.
        depth: chunks of each of them along K, or elements if ``transposed``.
        transposed: MN-major.
    """
    start, leading, stride = (_field(descriptors, first, first + 13)[:, None, None] * CHUNK for first in (0, 16, 32))
    base, mode = _field(descriptors, 49, 51)[:, None, None], _field(descriptors, 62, 63)[:, None, None]
    width = _WIDTH[mode]
    if transposed:  # chunks along M or N come first within a row of the pattern; its 8 rows are along K
        chunk, row = np.arange(size // 8)[:, None], np.arange(depth)
        atom = width // CHUNK
        across, down = np.where(mode == 0, stride, leading), np.where(mode == 0, leading, stride)
        offset = chunk % atom * CHUNK + chunk // atom * across + row % 8 * width + row // 8 * down
    else:
        row, chunk = np.arange(size)[:, None], np.arange(depth)
        offset = chunk * np.where(mode == 0, leading, CHUNK) + row % 8 * width + row // 8 * stride
    plain = start + offset
    exchanged = (plain >> 7) - base & (width // CHUNK - 1)
    result: Array = (plain ^ exchanged << 4).reshape(len(descriptors), -1)
    return result


def values(chunks: Array, form: Format, size: int, transposed: bool) -> Array:
    """``[d, size, K]``: matrices of ``[d, chunks, 16]`` bytes."""
    found = elements(chunks, form)
    if not transposed:
        return found.reshape(len(found), size, -1)
    return found.reshape(len(found), size // 8, -1, 8).swapaxes(2, 3).reshape(len(found), size, -1)
