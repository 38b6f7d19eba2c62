"""mma.sync against its definition: fragments by the manual's formulas for rows and columns, sums in Python's own numbers."""

import struct

import numpy as np
import pytest
from ptx._elements import BITS, from_float8, some, to_bits
from ptx._warps import Bench

from fastdllm_triton.ptx import mma
from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.semantics import UnknownInstructionError

LANES, WARPS = 128, 4


def place_a(kind, depth, i, g, t):
    """Row and column of a_i in matrix A, of thread t of group g (PTX ISA, 9.7.14.5.2 and 9.7.14.5.6 to 9.7.14.5.10)."""
    match BITS[kind], depth:
        case 16, 16:
            return (g if i < 2 or 4 <= i < 6 else g + 8), t * 2 + (i & 1) + (8 if i >= 4 else 0)
        case 16, 8:
            return (g if i < 2 else g + 8), t * 2 + (i & 1)
        case 32, 8:
            return (g if i in (0, 2) else g + 8), (t if i < 2 else t + 4)
        case ((32 | 64), 4):
            return (g if i == 0 else g + 8), t
        case 64, 8:
            return (g if i in (0, 2) else g + 8), (t if i < 2 else t + 4)
        case 64, 16:
            return (g, i * 2 + t) if i % 2 == 0 else (g + 8, i * 2 - 2 + t)
        case 8, 16:
            return (g if i < 4 else g + 8), t * 4 + (i & 3)
        case 8, 32:
            return (g if i < 4 or 8 <= i < 12 else g + 8), t * 4 + (i & 3) + (16 if i >= 8 else 0)
    raise AssertionError


def place_b(kind, depth, i, g, t):
    """Row and column of b_i in matrix B."""
    match BITS[kind], depth:
        case 16, (8 | 16):
            return t * 2 + (i & 1) + (8 if i >= 2 else 0), g
        case 32, (4 | 8):
            return t + 4 * i, g
        case 64, _:
            return t + 4 * i, g
        case 8, (16 | 32):
            return t * 4 + (i & 3) + (16 if i >= 4 else 0), g
    raise AssertionError


def place_c(i, g, t):
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def registers_of(kind, matrices, place, count, rows):
    """``[registers][lane]``: bits of a fragment of ``count`` elements a thread, of a matrix of each warp."""
    bits, width = BITS[kind], max(BITS[kind], 32)
    per = width // bits
    registers = [[0] * LANES for _ in range(count // per)]
    for lane in range(LANES):
        g, t = lane % 32 >> 2, lane % 4
        for i in range(count):
            row, column = place(i, g, t)
            if row < rows or place is place_c:
                registers[i // per][lane] |= to_bits(kind, matrices[lane // 32][row, column]) << bits * (i % per)
    return [np.array(values, f"u{width // 8}") for values in registers]


def bench_of(shape, types, a, b, c, modifier=""):
    """A bench with A, B and C in registers, and the names of D's."""
    rows, depth = (int(n) for n in (shape[1 : shape.index("n")], shape.split("k")[1]))
    d_kind, a_kind, b_kind, c_kind = types
    operands = [
        registers_of(a_kind, a, lambda i, g, t: place_a(a_kind, depth, i, g, t), rows * depth // 32, rows),
        registers_of(b_kind, b, lambda i, g, t: place_b(b_kind, depth, i, g, t), depth * 8 // 32, 99),
        registers_of(c_kind, c, place_c, rows * 8 // 32, rows),
    ]
    prefix = "%d" if a_kind == "f64" else "%r"
    number = rows * 8 // 32 * BITS[d_kind] // max(32, BITS[d_kind])
    names, at = [], number
    for values in operands:
        names.append([f"{prefix}{n}" for n in range(at, at + len(values))])
        at += len(values)
    lists = ["{" + ", ".join(group) + "}" for group in ([f"{prefix}{n}" for n in range(number)], *names)]
    body = (
        f".reg .b32 %r<60>;\n.reg .b64 %d<60>;\nmma.sync.aligned.{shape}.row.col{modifier}.{'.'.join(types)} {', '.join(lists)};"
    )
    bench = Bench(body)
    for group, values in zip(names, operands, strict=True):
        for name, bits in zip(group, values, strict=True):
            bench[name] = bits
    return bench, [f"{prefix}{n}" for n in range(number)]


def result(bench, names, kind, rows):
    """``[warp][row, column]`` bits of D."""
    bits, found = BITS[kind], np.zeros((WARPS, rows, 8), np.uint64)
    per = max(32 // bits, 1)
    values = {name: bench[name] for name in names}
    for lane in range(LANES):
        for i in range(rows * 8 // 32):
            row, column = place_c(i, lane % 32 >> 2, lane % 4)
            found[lane // 32, row, column] = int(values[names[i // per]][lane]) >> bits * (i % per) & (2**bits - 1)
    return found


CASES = [
    ("m16n8k16", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k8", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k16", ("f32", "f16", "f16", "f32")),
    ("m16n8k16", ("f16", "f16", "f16", "f16")),
    ("m16n8k16", ("f32", "f16", "f16", "f16")),
    ("m16n8k16", ("f16", "f16", "f16", "f32")),
    ("m16n8k8", ("f32", "f16", "f16", "f32")),
    ("m16n8k8", ("f16", "f16", "f16", "f16")),
    ("m16n8k8", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k4", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k32", ("s32", "s8", "s8", "s32")),
    ("m16n8k32", ("s32", "u8", "s8", "s32")),
    ("m16n8k16", ("s32", "s8", "u8", "s32")),
    ("m16n8k32", ("f32", "e4m3", "e5m2", "f32")),
    ("m16n8k16", ("f16", "e5m2", "e4m3", "f16")),
    ("m16n8k4", ("f64", "f64", "f64", "f64")),
    ("m16n8k8", ("f64", "f64", "f64", "f64")),
    ("m16n8k16", ("f64", "f64", "f64", "f64")),
    ("m8n8k4", ("f64", "f64", "f64", "f64")),
    ("m8n8k16", ("s32", "s8", "s8", "s32")),
]


@pytest.mark.parametrize(("shape", "types"), CASES)
def test_products_and_sums(shape, types):
    rows, depth = (int(n) for n in (shape[1 : shape.index("n")], shape.split("k")[1]))
    a, b, c = (
        some(kind, (WARPS, *size), seed)
        for seed, (kind, size) in enumerate(((types[1], (rows, depth)), (types[2], (depth, 8)), (types[3], (rows, 8))))
    )
    bench, names = bench_of(shape, types, a, b, c)
    found = result(bench.run(), names, types[0], rows)
    for w in range(WARPS):
        for i in range(rows):
            for j in range(8):
                total = c[w, i, j] + sum(a[w, i, k] * b[w, k, j] for k in range(depth))
                assert found[w, i, j] == to_bits(types[0], total)


def filled(shape, types, a, b, c):
    """Matrices that are zero but for row 3 of A, column 5 of B and that place of C, in every warp."""
    rows, depth = 16, int(shape.split("k")[1])
    left, right, added = np.zeros((rows, depth)), np.zeros((depth, 8)), np.zeros((rows, 8))
    left[3, : len(a)], right[: len(b), 5], added[3, 5] = a, b, c
    bench, names = bench_of(shape, types, [left] * WARPS, [right] * WARPS, [added] * WARPS)
    return bench, names


def float_of(bits, code="<f"):
    return struct.unpack(code, struct.pack("<I" if code == "<f" else "<H", int(bits)))[0]


def test_float16_accumulators_are_rounded_once():
    """2048 + 1 + 1 is 2050, as nothing is rounded on the way; 2048 + 1 rounds to 2048 (ties to even); 65504 + 32 is infinite."""
    types = ("f16", "f16", "f16", "f16")
    for a, c, wanted in (([1, 1], 2048, 2050), ([1], 2048, 2048), ([32], 65504, float("inf")), ([8], 65504, 65504)):
        bench, names = filled("m16n8k16", types, a, [1] * len(a), c)
        assert float_of(result(bench.run(), names, "f16", 16)[2, 3, 5], "<e") == wanted


def test_tf32_is_cut_off():
    """The 13 low bits of the operands do not count, and nothing is rounded."""
    bench, names = filled("m16n8k8", ("f32", "tf32", "tf32", "f32"), [1 + 2**-10 + 2**-11 + 2**-12], [1 + 2**-11], 0)
    assert float_of(result(bench.run(), names, "f32", 16)[0, 3, 5]) == 1 + 2**-10


def test_not_a_number():
    """Infinity times zero, and infinity minus infinity, are the tensor cores' own NaN, in float32 and in float16."""
    infinity = float("inf")
    for a, b, c in (([infinity], [0], 1), ([infinity, infinity], [1, -1], 0), ([infinity], [1], -infinity)):
        for kind, nan in (("f32", 0x7FFFFFFF), ("f16", 0x7FFF)):
            bench, names = filled("m16n8k16", (kind, "f16", "f16", kind), a, b, c)
            found = result(bench.run(), names, kind, 16)
            assert found[1, 3, 5] == nan
            assert found[1, 4, 4] == 0
    bench, names = filled("m16n8k16", ("f32", "bf16", "bf16", "f32"), [infinity], [2], 1)
    assert float_of(result(bench.run(), names, "f32", 16)[1, 3, 5]) == infinity


@pytest.mark.parametrize("modifier", ["", ".satfinite"])
@pytest.mark.parametrize(("c", "sign"), [(2**31 - 5, 1), (-(2**31) + 5, -1)])
def test_overflow_of_integers(modifier, c, sign):
    types = ("s32", "s8", "s8", "s32")
    zero = [np.zeros((16, 32))] * WARPS
    bench, names = bench_of("m16n8k32", types, zero, [np.zeros((32, 8))] * WARPS, [np.zeros((16, 8))] * WARPS, modifier)
    for n in range(4):
        bench[f"%r{n + 4}"] = np.full(LANES, 0x01010101, np.uint32)  # A is 1
        bench[f"%r{n + 10}"] = np.full(LANES, c % 2**32, np.uint32)
    for n in range(2):
        bench[f"%r{n + 8}"] = np.full(LANES, 0x01010101 if sign > 0 else 0xFFFFFFFF, np.uint32)  # B is 1 or -1
    limit = 2**31 - 1 if sign > 0 else -(2**31)
    wanted = (limit if modifier else c + 32 * sign) % 2**32
    assert (result(bench.run(), names, "s32", 16) == wanted).all()


def test_extremes_of_integers_are_exact():
    for kind, word, value in (("u8", 0xFFFFFFFF, 255), ("s8", 0x80808080, -128)):
        bench = Bench(
            ".reg .b32 %r<60>;\nmma.sync.aligned.m16n8k32.row.col.s32.K.K.s32 {%r0,%r1,%r2,%r3}, {%r9,%r9,%r9,%r9}, {%r9,%r9}, "
            "{%r8,%r8,%r8,%r8};".replace("K", kind)
        )
        bench["%r9"] = np.full(LANES, word, np.uint32)
        bench["%r8"] = np.uint32(1)
        assert (bench.run()["%r3"] == value * value * 32 + 1).all()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_float8(kind):
    found = mma.FORMATS[kind].decode(np.arange(256).astype(np.uint8))
    for bits in range(256):
        number = from_float8(kind, bits)
        if number is not None:
            assert found[bits] == number and np.signbit(found[bits]) == bits >> 7
        elif kind == "e5m2" and bits & 3 == 0:
            assert found[bits] == (-np.inf if bits >> 7 else np.inf)
        else:
            assert np.isnan(found[bits])


def test_some_warps():
    """A warp whose threads do not all come is left out, and noted; others are not touched."""
    a, b, c = (some("f16", (WARPS, *size), n) for n, size in enumerate(((16, 16), (16, 8), (16, 8))))
    bench, names = bench_of("m16n8k16", ("f32", "f16", "f16", "f32"), a, b, c)
    mask = np.zeros(LANES, bool)
    mask[32:64] = mask[100] = True
    for name in names:
        bench[name] = np.full(LANES, 7, np.uint32)
    found = result(bench.run(mask), names, "f32", 16)
    assert (found[[0, 2, 3]] == 7).all()
    assert [float_of(x) for x in found[1].reshape(-1)] == (a[1] @ b[1] + c[1]).reshape(-1).tolist()
    assert bench.kinds == {Kind.PART_OF_WARP}


@pytest.mark.parametrize(
    "opcode",
    [
        "m16n8k16.row.row.f32.bf16.bf16.f32",
        "m16n8k16.row.col.f32.bf16.f16.f32",
        "m16n8k16.row.col.bf16.bf16.bf16.bf16",
        "m16n8k8.row.col.f32.f16.f16.f16",
        "m16n8k32.row.col.f32.bf16.bf16.f32",
        "m16n8k16.row.col.satfinite.f32.f16.f16.f32",
        "m16n8k32.row.col.s32.s4.s4.s32",
        "m16n8k16.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32",
    ],
)
def test_what_is_not_known_is_refused(opcode):
    body = ".reg .b32 %r<9>;\nmma.sync.aligned.{} {{%r0,%r1,%r2,%r3}}, {{%r4,%r5,%r6,%r7}}, {{%r4,%r5}}, {{%r0,%r1,%r2,%r3}};"
    with pytest.raises(UnknownInstructionError):
        Bench(body.format(opcode)).run()


def test_a_fragment_of_another_size_is_refused():
    body = ".reg .b32 %r<9>;\nmma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r4}, "
    with pytest.raises(UnknownInstructionError):
        Bench(body + "{%r0,%r1,%r2,%r3};").run()
