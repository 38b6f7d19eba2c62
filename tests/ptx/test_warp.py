"""Instructions of a warp, against loops over the lanes that follow the manual line by line."""

import math
import struct

import numpy as np
import pytest
from ptx._warps import Bench

from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.semantics import UnknownInstructionError

N, WARP = 128, 32
REGISTERS = ".reg .b32 %r<20>; .reg .b64 %rd<9>; .reg .pred %p<9>;\n"


def words(seed=0, bits=32, n=N):
    return np.random.default_rng(seed).integers(0, 2**bits, n, dtype=np.uint64).astype(f"u{bits // 8}")


def shuffled(a, mode, b, c, lane):
    """One lane's result and predicate (PTX ISA, 9.7.9.6, "Semantics")."""
    bval, cval, segmask = b & 31, c & 31, (c >> 8) & 31
    most = (lane & segmask) | (cval & ~segmask & 31)
    least = lane & segmask
    if mode == "up":
        j = lane - bval
        inside = j >= most
    elif mode == "down":
        j = lane + bval
        inside = j <= most
    elif mode == "bfly":
        j = lane ^ bval
        inside = j <= most
    else:
        j = least | (bval & ~segmask & 31)
        inside = j <= most
    return a[j if inside else lane], inside


SEGMENTS = [0x1F, 0, 0x181F, 0x1018, 0x1C03, 0x0F07, 0x1E1F, 0x101F, 0x0010]


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", SEGMENTS)
@pytest.mark.parametrize("b", [0, 1, 3, 16, 31, 33])
def test_shfl_by_constants(mode, b, c):
    bench = Bench(REGISTERS + f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {b}, {c}, -1;\nshfl.sync.{mode}.b32 %r2, %r0, {b}, {c}, -1;")
    bench["%r0"] = a = words()
    bench.run()
    wanted = [shuffled(a[lane - lane % WARP :], mode, b, c, lane % WARP) for lane in range(N)]
    assert bench["%r1"].tolist() == [value for value, _ in wanted] == bench["%r2"].tolist()
    assert bench["%p1"].tolist() == [inside for _, inside in wanted]
    assert not len(bench.findings)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl_by_registers(mode):
    bench = Bench(REGISTERS + f"shfl.sync.{mode}.b32 %r1|%p1, %r0, %r2, %r3, %r4;")
    bench["%r0"], bench["%r2"] = a, b = words(1), words(2)
    bench["%r3"] = c = np.random.default_rng(3).choice(SEGMENTS, N).astype(np.uint32)
    bench["%r4"] = np.uint32(0xFFFFFFFF)
    bench.run()
    wanted = [shuffled(a[lane - lane % WARP :], mode, int(b[lane]), int(c[lane]), lane % WARP) for lane in range(N)]
    assert bench["%r1"].tolist() == [value for value, _ in wanted]
    assert bench["%p1"].tolist() == [inside for _, inside in wanted]


def test_shfl_of_a_value_that_all_lanes_share():
    bench = Bench(REGISTERS + "shfl.sync.bfly.b32 %r1|%p1, %r0, 1, 31, -1;")
    bench["%r0"] = np.uint32(7)
    bench.run()
    assert bench["%r1"].tolist() == [7] * N and bench["%p1"].all()


def test_shfl_where_a_part_of_a_warp_executes():
    """Half of warp 1 alone, with a mask that says so, is right; with a mask that wants all, it is a finding."""
    body = REGISTERS + "shfl.sync.bfly.b32 %r1, %r0, 1, 31, {};"
    half = (np.arange(N) >= 32) & (np.arange(N) < 48)
    for member, kinds in (
        (0xFFFF, set()),
        (0xFFFFFFFF, {Kind.PART_OF_WARP}),
        (0x1FFFF, {Kind.PART_OF_WARP}),
        (0x7FFF, {Kind.PART_OF_WARP}),
    ):
        bench = Bench(body.format(member))
        bench["%r0"], bench["%r1"] = words(), np.zeros(N, np.uint32)
        bench.run(half)
        assert bench.kinds == kinds
        assert (bench["%r1"][~half] == 0).all()
    bench = Bench(body.format(0xFFFF))
    bench["%r0"] = a = words()
    bench.run(half)
    assert (bench["%r1"][half] == a[half].reshape(-1, 2)[:, ::-1].reshape(-1)).all()
    # what comes from a lane that takes no part is unknown
    bench = Bench(REGISTERS + "shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xFFFF;")
    bench["%r0"] = words()
    bench.run(half)
    assert (bench["%r1"][half] == 0xFFFFFFFF).all()


def test_a_finding_counts_the_lanes_that_wait_in_vain():
    bench = Bench(REGISTERS + "bar.warp.sync -1;\nredux.sync.add.s32 %r1, %r0, -1;")
    mask = np.ones(N, bool)
    mask[70] = False
    bench["%r0"] = words()
    bench.run(mask)
    assert {(f.kind, f.program, f.thread, n) for f, n in bench.findings.counts.items()} == {(Kind.PART_OF_WARP, 1, 0, 31)}


def signed(x):
    return int(x) - 2**32 if x >= 2**31 else int(x)


REDUCTIONS = {
    "add.u32": lambda x: sum(map(int, x)) % 2**32,
    "add.s32": lambda x: sum(map(int, x)) % 2**32,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda x: min(x, key=signed),
    "max.s32": lambda x: max(x, key=signed),
    "and.b32": lambda x: np.bitwise_and.reduce(x),
    "or.b32": lambda x: np.bitwise_or.reduce(x),
    "xor.b32": lambda x: np.bitwise_xor.reduce(x),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_redux_of_integers(kind):
    bench = Bench(REGISTERS + f"redux.sync.{kind} %r1, %r0, -1;")
    a = words(5)
    a[:32] |= 0x80000000
    a[32:64] &= 0x7FFFFFFF
    bench["%r0"] = a
    bench.run()
    assert bench["%r1"].tolist() == [int(REDUCTIONS[kind](a[lane - lane % WARP :][:WARP])) for lane in range(N)]
    # two halves of each warp, each with its own mask
    bench = Bench(REGISTERS + f"redux.sync.{kind} %r1, %r0, %r2;")
    bench["%r0"], bench["%r2"] = a, np.where(np.arange(N) % 32 < 5, 0x1F, 0xFFFFFFE0).astype(np.uint32)
    bench.run()
    parts = [a[w : w + 5] if lane < 5 else a[w + 5 : w + 32] for w in range(0, N, 32) for lane in range(32)]
    assert bench["%r1"].tolist() == [int(REDUCTIONS[kind](part)) for part in parts]
    assert not len(bench.findings)


def value(bits):
    return struct.unpack("<f", struct.pack("<I", int(bits)))[0]


def extreme(bits, op, absolute, nan):
    """redux.sync.{min,max}{.abs}{.NaN}.f32 (PTX ISA, 9.7.13.12)."""
    bits = [int(b) & 0x7FFFFFFF if absolute else int(b) for b in bits]
    numbers = [b for b in bits if not math.isnan(value(b))]
    if not numbers or (nan and len(numbers) < len(bits)):
        return 0x7FFFFFFF
    # +0.0 is above -0.0
    key = lambda b: (value(b), -(b >> 31))  # noqa: E731
    return min(numbers, key=key) if op == "min" else max(numbers, key=key)


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("modifiers", ["", ".abs", ".NaN", ".abs.NaN"])
def test_redux_of_floats(op, modifiers):
    bench = Bench(REGISTERS + f"redux.sync.{op}{modifiers}.f32 %r1, %r0, -1;", programs=4)
    a = np.random.default_rng(0).normal(size=256).astype(np.float32).view(np.uint32)
    a[:32] = np.resize([0x80000000, 0x00000000, 0x80000001, 0x00000001], 32)  # zeros and subnormals
    a[32:64] = 0xFFC00001
    a[64:96] = np.resize([0x7FC00000, 0x7F800000, 0xFF800000, 0x3F800000], 32)
    a[96:128] = np.resize([0x80000000, 0x00000000], 32)
    a[128:160] |= 0x80000000
    bench["%r0"] = a
    bench.run()
    wanted = [extreme(a[w : w + 32], op, "abs" in modifiers, "NaN" in modifiers) for w in range(0, 256, 32)]
    assert bench["%r1"][::32].tolist() == wanted
    assert (bench["%r1"].reshape(-1, 32) == bench["%r1"][::32, None]).all()


def test_redux_of_floats_of_some():
    """A NaN counts where it is among the members alone."""
    bench = Bench(REGISTERS + "redux.sync.min.NaN.f32 %r1, %r0, %r2;")
    a = np.arange(1, N + 1).astype(np.float32)
    a[3] = np.nan
    bench["%r0"], bench["%r2"] = a, np.where(np.arange(N) % 32 < 5, 0x1F, 0xFFFFFFE0).astype(np.uint32)
    found = bench.run()["%r1"]
    assert (found[:5] == 0x7FFFFFFF).all()
    assert found[5:].view(np.float32).tolist() == [w + (1 if lane < 5 else 6) for w in range(0, N, 32) for lane in range(32)][5:]


@pytest.mark.parametrize("member", [0xFFFFFFFF, 0x0000FFFF])
def test_votes(member):
    bench = Bench(
        REGISTERS
        + "".join(f"vote.sync.{mode}.pred %p{n}, %p0, {member};\n" for n, mode in enumerate(("all", "any", "uni"), 1))
        + f"vote.sync.ballot.b32 %r1, %p0, {member};"
    )
    p = words(bits=8) < 128
    p[:32], p[32:64] = True, False
    bench["%p0"] = p
    active = (member >> (np.arange(N) % 32) & 1).astype(bool)
    bench.run(None if member == 0xFFFFFFFF else active)
    for w in range(0, N, 32):
        told = [bool(x) for x, some in zip(p[w : w + 32], active[w : w + 32], strict=True) if some]
        here = np.arange(w, w + 32)[active[w : w + 32]]
        assert (bench["%p1"][here] == all(told)).all()
        assert (bench["%p2"][here] == any(told)).all()
        assert (bench["%p3"][here] == (len(set(told)) == 1)).all()
        assert (bench["%r1"][here] == sum(x << n for n, x in enumerate(told))).all()
    assert not len(bench.findings)


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits):
    register = "%r0" if bits == 32 else "%rd0"
    bench = Bench(REGISTERS + f"match.any.sync.b{bits} %r1, {register}, -1;\nmatch.all.sync.b{bits} %r2|%p1, {register}, -1;")
    a = words(bits=bits) >> (bits - 3) << (bits - 3)  # in the high bits
    a[:32] = a[0]
    bench[register] = a
    bench.run()
    for lane in range(N):
        warp = a[lane - lane % 32 :][:32]
        assert bench["%r1"][lane] == sum(int(x == a[lane]) << n for n, x in enumerate(warp))
        same = len(set(warp.tolist())) == 1
        assert bench["%r2"][lane] == (0xFFFFFFFF if same else 0) and bench["%p1"][lane] == same


def test_match_and_elect_of_some():
    bench = Bench(REGISTERS + "match.all.sync.b32 %r1|%p1, %r0, 0xF0;\nelect.sync %r2|%p2, 0xF0;\nactivemask.b32 %r3;")
    bench["%r0"] = (np.arange(N) % 32 // 4).astype(np.uint32)
    some = np.isin(np.arange(N) % 32, [4, 5, 6, 7])
    bench.run(some)
    assert (bench["%r1"][some] == 0xF0).all() and bench["%p1"][some].all()
    assert (bench["%r2"][some] == 4).all() and (bench["%p2"][some] == np.tile([True, False, False, False], 4)).all()
    assert (bench["%r3"][some] == 0xF0).all()
    assert not len(bench.findings)


def test_elect_and_activemask_of_all():
    bench = Bench(REGISTERS + "elect.sync _|%p2, -1;\nactivemask.b32 %r3;").run()
    assert bench["%p2"].tolist() == [lane % 32 == 0 for lane in range(N)]
    assert (bench["%r3"] == 0xFFFFFFFF).all()


# Matrices


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(number, trans):
    """Row r of matrix m is at the address of lane 8m + r; lane 4r + t has elements 2t and 2t + 1 of row r, or of column r."""
    results = "{" + ", ".join(f"%r{n}" for n in range(1, number + 1)) + "}"
    bench = Bench(
        REGISTERS
        + f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {results}, [%r0+32];\n"
        + f"stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%rd0+2048], {results};"
    )
    random = np.random.default_rng(0)
    bench.shared.bytes[:] = random.integers(0, 256, bench.shared.bytes.shape)
    before = bench.shared.bytes.copy()
    where = random.permutation(64)[:N].astype(np.uint32) * 16  # two warps of each program at once
    where = np.concatenate([where, random.permutation(64).astype(np.uint32) * 16])
    bench["%r0"], bench["%rd0"] = where, where.astype(np.uint64)
    bench.run()
    halves = before.view(np.uint16)
    for lane in range(N):
        row, t = divmod(lane % 32, 4)
        for m in range(number):
            base = lane - lane % 32 + 8 * m
            program = lane // 64
            element = [
                halves[program, (where[base + (2 * t + e if trans else row)] + 32) // 2 + (row if trans else 2 * t + e)]
                for e in (0, 1)
            ]
            assert bench[f"%r{m + 1}"][lane] == int(element[0]) | int(element[1]) << 16
    for lane in range(N):
        if lane % 32 < 8 * number:
            at, program = int(where[lane]), lane // 64
            assert (bench.shared.bytes[program, at + 2048 : at + 2064] == before[program, at + 32 : at + 48]).all()


def test_matrices_of_some_warps():
    bench = Bench(
        REGISTERS
        + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];\nstmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};"
    )
    bench.shared.bytes[:] = np.arange(4096) % 251
    bench["%r0"], bench["%r1"], bench["%r2"] = (
        (np.arange(N) % 64 * 16).astype(np.uint32),
        np.zeros(N, np.uint32),
        np.uint32(3000 * np.ones(N)),
    )
    mask = np.zeros(N, bool)
    mask[32:64] = mask[70] = True
    bench["%r2"] = (3072 + np.arange(N) % 64 * 16).astype(np.uint32)
    bench.run(mask)
    assert (bench["%r1"][:32] == 0).all() and (bench["%r1"][64:] == 0).all()
    assert (bench["%r1"][32:64] == bench.shared.bytes[0, 512:640].view(np.uint32)).all()
    assert (bench.shared.bytes[0, 3584:3712] == bench.shared.bytes[0, 512:640]).all()
    assert (bench.shared.bytes[1] == np.arange(4096) % 251).all()
    assert bench.kinds == {Kind.PART_OF_WARP}


def test_movmatrix():
    bench = Bench(REGISTERS + "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;")
    bench["%r0"] = a = words()
    bench.run()
    before, after = a.view(np.uint16).reshape(-1, 8, 8), bench["%r1"].view(np.uint16).reshape(-1, 8, 8)
    assert all(after[w, i, j] == before[w, j, i] for w in range(4) for i in range(8) for j in range(8))


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b64 %rd1, %rd0, 1, 31, -1",
        "shfl.bfly.b32 %r1, %r0, 1, 31",
        "redux.sync.add.f32 %r1, %r0, -1",
        "redux.sync.min.abs.s32 %r1, %r0, -1",
        "redux.sync.min.NaN.abs.f32 %r1, %r0, -1",
        "vote.sync.all.b32 %r1, %p0, -1",
        "vote.sync.ballot.pred %p1, %p0, -1",
        "match.any.sync.b32 %r1|%p1, %r0, -1",
        "match.some.sync.b32 %r1, %r0, -1",
        "ldmatrix.sync.aligned.m8n8.x4.b16 {%r1,%r2,%r3,%r4}, [%r0]",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1,%r2}, [%r0]",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1,%r2}, [%r0]",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1,%r2,%r3}, [%r0]",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r0], {%r1}",
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r0], {%r1}",
    ],
)
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(UnknownInstructionError):
        Bench(REGISTERS + instruction + ";").run()
