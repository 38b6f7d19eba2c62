"""Where elements of a matrix in shared memory are, by the manual's table of canonical layouts (PTX ISA, 9.7.15.5.1.2.1.3)."""

from __future__ import annotations

#: By swizzling mode of a descriptor: bytes of the swizzle; B of ``Swizzle<B, 4, 3>``.
SWIZZLES = {0: (0, 0), 1: (128, 3), 2: (64, 2), 3: (32, 1)}


def mode(shape, stride, n):
    """The index of coordinate ``n`` in one mode of a CuTe layout; the last extent is open."""
    index = 0
    for extent, step in zip(shape, stride, strict=True):
        index += (n % extent if extent else n) * step
        n = n // extent if extent else 0
    return index


def swizzled(address, b):
    """``Swizzle<b, 4, 3>`` of a byte's address."""
    return address ^ ((address >> 7 & (2**b - 1)) << 4)


def offset(swizzle, transposed, bits, row, column, leading, stride):
    """Bytes from a matrix's start to an element, before swizzling; ``row`` is along M or N, ``column`` along K."""
    size = bits // 8
    t = 128 // bits
    lbo, sbo = leading // size, stride // size
    wide = {0: 1, 128: 8, 64: 4, 32: 2}[SWIZZLES[swizzle][0]]
    if transposed and swizzle == 0:  # ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
        index = mode((t, 1, None), (1, t, sbo), row) + mode((8, None), (t, lbo), column)
    elif transposed:  # ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), and 4, 2 instead of 8 and 8T
        index = mode((t, wide, None), (1, t, lbo), row) + mode((8, None), (wide * t, sbo), column)
    elif swizzle == 0:  # ((8,m),(T,2k)):((1T,SBO),(1,LBO))
        index = mode((8, None), (t, sbo), row) + mode((t, None), (1, lbo), column)
    else:  # ((8,m),(T,2k)):((8T,SBO),(1,T))
        index = mode((8, None), (wide * t, sbo), row) + mode((t, None), (1, t), column)
    return index * size


def descriptor(start, swizzle, leading, stride, base=0):
    """PTX ISA, 9.7.15.5.1.2.2, "Matrix Descriptor Format"."""

    def encode(x):
        return (x & 0x3FFFF) >> 4

    return encode(start) | encode(leading) << 16 | encode(stride) << 32 | base << 49 | swizzle << 62
