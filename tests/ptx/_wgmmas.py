"""wgmma on small matrices: the instructions' text, and threads whose shared memory and registers hold the matrices."""

from __future__ import annotations

import numpy as np
from ptx._elements import BITS, some, to_bits
from ptx._layouts import SWIZZLES, descriptor, offset, swizzled
from ptx._warps import Bench

THREADS, PROGRAMS = 256, 2
LANES = THREADS * PROGRAMS
GROUPS = LANES // 128
DEPTH = {16: 16, 32: 8, 8: 32}
START_A, START_B, END = 0, 32768, 65536


def d_names(columns, kind):
    return [f"%r{n}" for n in range(columns * BITS[kind] // 64)]


def text_of(columns, types, a="%rd0", scale="%p0", more=None, n=0):
    """One wgmma; its accumulators are from %r0, parts of A are %r200 to %r203, descriptors are %rd0 and %rd1."""
    depth = DEPTH[BITS[types[1]]]
    if more is None:
        more = {"s32": ""}.get(types[0], ", 1, 1" + ("" if depth != 16 else ", 0, 0" if a == "%rd0" else ", 0"))
    d = ", ".join(f"%r{n + i}" for i in range(len(d_names(columns, types[0]))))
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.{'.'.join(types)} {{{d}}}, {a}, %rd1, {scale}{more};\n"


HEAD = ".reg .b32 %r<400>;\n.reg .b64 %rd<9>;\n.reg .pred %p<9>;\n"
BEFORE = "wgmma.fence.sync.aligned;\n"
AFTER = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
PARTS = "{%r200, %r201, %r202, %r203}"


def strides(swizzle, transposed, rows, bits):
    """A leading and a stride byte offset that keep the parts of a matrix apart, with gaps in the first of them."""
    width = SWIZZLES[swizzle][0] or 16
    if transposed and swizzle:  # LBO between columns of patterns along M or N, SBO between 8 rows of K
        return 2 * 8 * width + 1024, 8 * width
    if transposed:  # SBO between chunks along M or N, LBO between 8 rows of K
        return (rows // 8) * 256, 256
    return (rows // 8 * 512, 256) if swizzle == 0 else (16, 8 * width + 1024)


def put_matrix(bench, program, start, matrix, kind, swizzle, transposed):
    """Writes ``[rows, K]`` to a program's shared memory; returns its descriptor."""
    bits = BITS[kind]
    leading, stride = strides(swizzle, transposed, len(matrix), bits)
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            address = start + offset(swizzle, transposed, bits, row, column, leading, stride)
            address = swizzled(address, SWIZZLES[swizzle][1])
            data = int(to_bits(kind, matrix[row, column])).to_bytes(bits // 8, "little")
            bench.shared.bytes[program, address : address + bits // 8] = list(data)
    return descriptor(start, swizzle, leading, stride)


def result(bench, columns, kind):
    """``[group][64, columns]`` bits of D (PTX ISA, figures 149, 151 and 153)."""
    found, bits = np.zeros((GROUPS, 64, columns), np.uint64), BITS[kind]
    values = {name: bench[name] for name in d_names(columns, kind)}
    per = 32 // bits
    lane = np.arange(LANES)
    for i in range(columns // 2):
        row = lane // 32 % 4 * 16 + lane % 32 // 4 + 8 * (i // 2 % 2)
        column = i // 4 * 8 + lane % 4 * 2 + i % 2
        found[lane // 128, row, column] = values[f"%r{i // per}"] >> bits * (i % per) & (2**bits - 1)
    return found


def set_parts_of_a(bench, matrices, kind):
    """Sets %r200 to %r203 to A of each group: each warp's 16 rows as ``mma`` has them (PTX ISA, figures 148, 150 and 152)."""
    bits = BITS[kind]
    per = 32 // bits
    parts = np.zeros((4, LANES), np.uint32)
    for lane in range(LANES):
        g, t = lane % 32 // 4, lane % 4
        for n in range(4):
            for e in range(per):
                row, column = 16 * (lane // 32 % 4) + g + 8 * (n % 2), (4 * (n // 2) + t) * per + e
                parts[n, lane] |= to_bits(kind, matrices[lane // 128][row, column]) << bits * e
    for n in range(4):
        bench[f"%r{200 + n}"] = parts[n]


def bits_of(kind, matrix):
    return np.vectorize(lambda x: to_bits(kind, float(x)), otypes=[np.uint64])(matrix)


def prepared(body, columns, types, swizzles=(1, 1), transposed=(0, 0), *, registers=False, seed=0):
    """A bench with A, B and what D is before; matrices of every warpgroup are its own, and the exact product comes with it."""
    bench = Bench(HEAD + body, threads=THREADS, programs=PROGRAMS, shared=2 * END)
    d_kind, a_kind, b_kind = types
    depth = DEPTH[BITS[a_kind]]
    a, b = some(a_kind, (GROUPS, 64, depth), seed), some(b_kind, (GROUPS, columns, depth), seed + 1)
    descriptors = np.zeros((2, GROUPS), np.uint64)
    for group in range(GROUPS):
        base = group % 2 * END
        if not registers:
            descriptors[0, group] = put_matrix(bench, group // 2, base + START_A, a[group], a_kind, swizzles[0], transposed[0])
        descriptors[1, group] = put_matrix(bench, group // 2, base + START_B, b[group], b_kind, swizzles[1], transposed[1])
    if registers:
        set_parts_of_a(bench, a, a_kind)
    else:
        bench["%rd0"] = np.repeat(descriptors[0], 128)
    bench["%rd1"] = np.repeat(descriptors[1], 128)
    if "%p0" in bench.names:
        bench["%p0"] = True
    c = np.zeros((GROUPS, 64, columns))
    for n, name in enumerate(d_names(columns, d_kind)):  # D is 1, 2, ... in turn of registers
        one = to_bits(d_kind, n % 5 + 1)
        bench[name] = np.full(LANES, one if BITS[d_kind] == 32 else one * 0x10001, np.uint32)
    for i in range(columns // 2):
        lane = np.arange(LANES)
        row = lane // 32 % 4 * 16 + lane % 32 // 4 + 8 * (i // 2 % 2)
        c[lane // 128, row, i // 4 * 8 + lane % 4 * 2 + i % 2] = (i * BITS[d_kind] // 32) % 5 + 1
    return bench, c, np.matmul(a, b.swapaxes(1, 2))


BF16 = ("f32", "bf16", "bf16")
