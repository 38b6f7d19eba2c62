"""wgmma: matrices in shared memory by the manual's canonical layouts, and what is in flight."""

import numpy as np
import pytest
from ptx._elements import BITS, some, to_bits
from ptx._layouts import SWIZZLES, descriptor, offset, swizzled
from ptx._warps import Bench

from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.semantics import UnknownInstructionError
from fastdllm_triton.ptx.shared import SharedMemory

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


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("columns", [8, 72])
def test_layouts(swizzle, transposed, columns):
    """K-major and MN-major operands of all swizzling modes; A has another mode than B."""
    body = BEFORE + text_of(columns, BF16, more=", 1, 1, {}, {}".format(*transposed)) + AFTER
    bench, c, terms = prepared(body, columns, BF16, ((swizzle + 1) % 4, swizzle), transposed)
    bench.run()
    assert (result(bench, columns, "f32") == bits_of("f32", terms + c)).all()
    assert not len(bench.findings)


TYPES = [
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "tf32", "tf32"),
    ("s32", "s8", "s8"),
    ("s32", "u8", "s8"),
    ("f32", "e4m3", "e5m2"),
    ("f16", "e5m2", "e5m2"),
]


@pytest.mark.parametrize("types", [BF16, *TYPES])
@pytest.mark.parametrize("registers", [False, True])
def test_types(types, registers):
    body = BEFORE + text_of(24, types, PARTS if registers else "%rd0") + AFTER
    bench, c, terms = prepared(body, 24, types, (2, 1), registers=registers)
    bench.run()
    assert (result(bench, 24, types[0]) == bits_of(types[0], terms + c)).all()
    assert not len(bench.findings)


def test_transposed_b_with_a_in_registers():
    body = BEFORE + text_of(64, BF16, PARTS, more=", 1, 1, 1") + AFTER
    bench, c, terms = prepared(body, 64, BF16, (0, 1), (0, 1), registers=True)
    assert (result(bench.run(), 64, "f32") == bits_of("f32", terms + c)).all()


@pytest.mark.parametrize(("a", "b"), [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_scales_of_operands(a, b):
    bench, c, terms = prepared(BEFORE + text_of(16, BF16, more=f", {a}, {b}, 0, 0") + AFTER, 16, BF16)
    assert (result(bench.run(), 16, "f32") == bits_of("f32", c + a * b * terms)).all()


@pytest.mark.parametrize("types", [BF16, ("f16", "f16", "f16"), ("s32", "s8", "s8")])
def test_scale_of_the_accumulator(types):
    """Where it is false, what D was does not count, whatever it is; it may differ between warpgroups."""
    for scale, keeps in (("0", [0] * 4), ("1", [1] * 4), ("%p0", [0, 1, 1, 0])):
        bench, c, terms = prepared(BEFORE + text_of(8, types, scale=scale) + AFTER, 8, types)
        if scale == "%p0":
            bench["%p0"] = np.repeat(keeps, 128)
        else:
            bench["%r1"] = np.full(LANES, 0x7FFF7FFF if scale == "0" else bench["%r1"][0], np.uint32)
        assert (result(bench.run(), 8, types[0]) == bits_of(types[0], terms + c * np.reshape(keeps, (4, 1, 1)))).all()


def test_integers_that_overflow():
    for saturate, wanted in ((".satfinite", 2**31 - 1), ("", 2**31 - 1 + 32 - 2**32)):
        body = BEFORE + text_of(8, ("s32", "s8", "s8")).replace(".s32.", f"{saturate}.s32.") + AFTER
        bench, _, _ = prepared(body, 8, ("s32", "s8", "s8"))
        bench.shared.bytes[:] = 1
        for name in d_names(8, "s32"):
            bench[name] = np.full(LANES, 2**31 - 1, np.uint32)
        assert (result(bench.run(), 8, "s32") == wanted % 2**32).all()


def rows_of_128_bytes(bench, start, matrix, program):
    """A matrix of 64 bfloat16 a row, in a 128-byte swizzle from a multiple of 1024: chunk c of row r is at c ^ (r % 8)."""
    for row in range(len(matrix)):
        for column in range(64):
            at = start + row * 128 + ((column // 8) ^ (row % 8)) * 16 + column % 8 * 2
            bench.shared.bytes[program, at : at + 2] = list(int(to_bits("bf16", matrix[row, column])).to_bytes(2, "little"))


def test_steps_along_k():
    """As Triton has it: four products along 64 columns, the descriptors' start 32 bytes further each time."""
    lines = "".join("add.s64 %rd0, %rd0, 2;\nadd.s64 %rd1, %rd1, 2;\n" * (n > 0) + text_of(32, BF16) for n in range(4))
    bench, c, _ = prepared(BEFORE + lines + AFTER, 32, BF16)
    a, b = some("bf16", (GROUPS, 64, 64), 7), some("bf16", (GROUPS, 32, 64), 8)
    for group in range(GROUPS):
        rows_of_128_bytes(bench, group % 2 * END, a[group], group // 2)
        rows_of_128_bytes(bench, group % 2 * END + START_B, b[group], group // 2)
    for name, start in (("%rd0", 0), ("%rd1", START_B)):
        word = [descriptor(group % 2 * END + start, 1, 16, 1024) for group in range(GROUPS)]
        bench[name] = np.repeat(np.array(word, np.uint64), 128)
    bench.run()
    assert (result(bench, 32, "f32") == bits_of("f32", np.matmul(a, b.swapaxes(1, 2)) + c)).all()
    assert not len(bench.findings)


@pytest.mark.parametrize("base", [0, 3, 7])
def test_base_offset(base):
    """Patterns of 128-byte swizzling that begin ``base`` rows behind a multiple of 1024: the row counts from there."""
    bench, c, _ = prepared(BEFORE + text_of(8, BF16) + AFTER, 8, BF16)
    a, b = some("bf16", (64, 64), 3), some("bf16", (8, 64), 4)
    start = 1024 + 128 * base
    for program in range(PROGRAMS):
        rows_of_128_bytes(bench, start, a, program)
        rows_of_128_bytes(bench, START_B, b, program)
    bench["%rd0"] = np.array([descriptor(start, 1, 16, 1024, base)], np.uint64)
    bench["%rd1"] = np.array([descriptor(START_B, 1, 16, 1024)], np.uint64)
    assert (result(bench.run(), 8, "f32") == bits_of("f32", a[:, :16] @ b[:, :16].T + c)).all()


# What is in flight


def test_accumulators_are_unknown_until_the_wait():
    first = BEFORE + text_of(8, BF16) + "wgmma.commit_group.sync.aligned;\n"
    second = text_of(8, BF16, n=8) + "wgmma.commit_group.sync.aligned;\n"
    bench, c, terms = prepared(first + second + "wgmma.wait_group.sync.aligned 1;\nwgmma.wait_group.sync.aligned 0;", 8, BF16)
    for n in range(8, 12):
        bench[f"%r{n}"] = np.zeros(1, np.uint32)
    for steps, known in ((slice(0, 3), [8]), (slice(3, 5), []), (slice(5, 6), [0]), (slice(6, 7), [0, 8])):
        bench.run(steps=steps)
        for base in (0, 8):
            for n in range(base, base + 4):
                assert np.isnan(bench[f"%r{n}"].view(np.float32)).all() == (base not in known)
    assert (result(bench, 8, "f32") == bits_of("f32", terms + c)).all()
    assert not len(bench.findings)


def test_a_group_waits_for_later_products_of_its_accumulators():
    """Committed twice, waited for once: the second product is still in flight, and so are the accumulators."""
    commit = "wgmma.commit_group.sync.aligned;\n"
    one = text_of(8, BF16) + commit
    bench, c, terms = prepared(BEFORE + one + one + "wgmma.wait_group.sync.aligned 1;\nwgmma.wait_group.sync.aligned 0;", 8, BF16)
    bench.run(steps=slice(0, 6))
    assert np.isnan(bench["%r3"].view(np.float32)).all()
    bench.run(steps=slice(6, 7))
    assert (result(bench, 8, "f32") == bits_of("f32", 2 * terms + c)).all()
    assert not len(bench.findings)


def test_what_is_not_committed_is_not_waited_for():
    bench, _, _ = prepared(BEFORE + text_of(8, BF16) + "wgmma.wait_group.sync.aligned 0;", 8, BF16)
    assert np.isnan(bench.run()["%r0"].view(np.float32)).all()


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
ONE = BEFORE + text_of(8, BF16, PARTS)
EARLY = {
    "read before the commit": (ONE + "add.u32 %r300, %r2, 1;\n" + COMMIT + WAIT, True),
    "read before the wait": (ONE + COMMIT + "add.u32 %r300, %r301, %r2;\n" + WAIT, True),
    "written before the wait": (ONE + COMMIT + "add.u32 %r3, %r300, 1;\n" + WAIT, True),
    "an address": (ONE + COMMIT + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r300}, [%r1+16];\n" + WAIT, True),
    "stored": (ONE + COMMIT + "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r300], {%r1};\n" + WAIT, True),
    "copied before the wait": (ONE + COMMIT + "mov.b32 %r300, %r2;\n" + WAIT, True),
    "a part of A written": (ONE + COMMIT + "add.u32 %r201, %r300, 1;\n" + WAIT, True),
    "a part of A as a result of another product": (ONE + COMMIT + BEFORE + text_of(8, BF16, n=198) + COMMIT + WAIT, True),
    "as a part of another product's A": (
        ONE + COMMIT + BEFORE + text_of(8, BF16, "{%r200, %r201, %r202, %r1}", n=8) + COMMIT + WAIT,
        True,
    ),
    "another shape": (ONE + BEFORE + text_of(16, BF16) + COMMIT + WAIT, True),
    "other registers in part": (ONE + BEFORE + text_of(8, BF16, n=2) + COMMIT + WAIT, True),
    "a wait for less": (ONE + COMMIT + "wgmma.wait_group.sync.aligned 1;\nadd.u32 %r300, %r2, 1;\n" + WAIT, True),
    "a part of A read": (ONE + COMMIT + "add.u32 %r300, %r201, 1;\n" + WAIT, False),
    "after the wait": (ONE + COMMIT + WAIT + "add.u32 %r2, %r2, %r201;\nadd.u32 %r201, %r2, 1;\n", False),
    "a later product of the same shape": (ONE + COMMIT + ONE + COMMIT + WAIT, False),
    "others": (ONE + COMMIT + "add.u32 %r300, %r8, 1;\n" + WAIT, False),
}


@pytest.mark.parametrize("case", EARLY)
def test_use_before_the_wait(case):
    body, found = EARLY[case]
    bench, _, _ = prepared(body, 8, BF16, registers=True)
    for n in (300, 301):
        if f"%r{n}" in bench.names:
            bench[f"%r{n}"] = np.zeros(1, np.uint32)
    if "%rd0" in bench.names:
        bench["%rd0"] = bench["%rd1"]
    bench.run()
    assert (Kind.EARLY_ACCUMULATOR in bench.kinds) == found


FENCES = {
    "none": (text_of(8, BF16, PARTS) + AFTER, True),
    "before": (BEFORE + text_of(8, BF16, PARTS) + AFTER, False),
    "between products of one shape": (BEFORE + 2 * text_of(8, BF16, PARTS) + AFTER, False),
    "an accumulator written": (BEFORE + "add.u32 %r2, %r300, 1;\n" + text_of(8, BF16, PARTS) + AFTER, True),
    "a part of A written": (BEFORE + "add.u32 %r202, %r300, 1;\n" + text_of(8, BF16, PARTS) + AFTER, True),
    "read after a wait": (
        BEFORE + text_of(8, BF16, PARTS) + AFTER + "add.u32 %r300, %r1, 1;\n" + text_of(8, BF16, PARTS) + AFTER,
        True,
    ),
    "an accumulator moved to": (BEFORE + "mov.b32 %r2, %r300;\n" + text_of(8, BF16, PARTS) + AFTER, False),
    "another register": (BEFORE + "add.u32 %r4, %r300, 1;\n" + text_of(8, BF16, PARTS) + AFTER, False),
    "after the use": ("add.u32 %r2, %r300, 1;\n" + BEFORE + text_of(8, BF16, PARTS) + AFTER, False),
}


@pytest.mark.parametrize("case", FENCES)
def test_fences_of_registers(case):
    body, found = FENCES[case]
    bench, _, _ = prepared(body, 8, BF16, registers=True)
    bench.run()
    assert bench.kinds == ({Kind.WGMMA} if found else set())


def test_fences_and_uses_of_some_warps():
    """A use in one program alone wants a fence in that one alone."""
    one = text_of(8, BF16, PARTS)
    bench, _, _ = prepared(BEFORE + "add.u32 %r2, %r300, 1;\n" + one + AFTER, 8, BF16, registers=True)
    first = np.arange(LANES) < THREADS
    bench.run(steps=slice(0, 1))
    bench.run(~first, steps=slice(1, 2))
    bench.run(first, steps=slice(2, 5))
    assert not len(bench.findings)
    bench.run(~first, steps=slice(2, 3))
    assert [(f.kind, f.program, f.thread, n) for f, n in bench.findings.counts.items()] == [(Kind.WGMMA, 1, 0, THREADS)]


@pytest.mark.parametrize("start", [START_A, START_B])
def test_operands_that_change_before_the_wait(start):
    body = BEFORE + text_of(8, BF16) + COMMIT + WAIT
    for at, found in ((slice(0, 3), True), (slice(0, 4), False)):
        bench, _, _ = prepared(body, 8, BF16)
        bench.run(steps=at)
        bench.shared.bytes[1, start + 5] ^= 1
        bench.run(steps=slice(at.stop, 4))
        assert bench.kinds == ({Kind.SHARED_RACE} if found else set())
        if found:
            (finding,) = bench.findings
            assert finding.text.startswith("wgmma.mma_async") and finding.program == 1


def test_descriptors_have_to_be_those_of_the_warpgroup():
    bench, _, _ = prepared(BEFORE + text_of(8, BF16) + AFTER, 8, BF16)
    words = bench["%rd1"].copy()
    words[40] += 2
    bench["%rd1"] = words
    bench.run()
    assert {(f.kind, f.thread, n) for f, n in bench.findings.counts.items()} == {(Kind.WGMMA, 40, 1)}


@pytest.mark.parametrize("registers", [False, True])
def test_warps_one_after_the_other(registers):
    """In any order, with a wait between or none: each warp has its own groups."""
    body = BEFORE + 2 * text_of(24, BF16, PARTS if registers else "%rd0") + AFTER
    bench, c, terms = prepared(body, 24, BF16, (2, 3), registers=registers)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(LANES // 32), 5))
    done = np.zeros(LANES // 32, int)
    for warp in order:
        bench.run(np.arange(LANES) // 32 == warp, steps=slice(done[warp], done[warp] + 1))
        done[warp] += 1
    assert (result(bench, 24, "f32") == bits_of("f32", 2 * terms + c)).all()
    assert not len(bench.findings)


def test_one_program_alone():
    bench, c, terms = prepared(BEFORE + text_of(8, BF16) + AFTER, 8, BF16)
    bench.run(np.arange(LANES) >= THREADS)
    found = result(bench, 8, "f32")
    assert (found[2:] == bits_of("f32", terms + c)[2:]).all()
    assert (found[:2] == bits_of("f32", c)[:2]).all()
    bench.run(np.arange(LANES) < THREADS)
    assert (result(bench, 8, "f32") == bits_of("f32", terms + c)).all()


def test_shared_memory_that_is_not_fenced():
    """With the memory of the machine: what a store wrote needs a fence.proxy.async, and bytes nobody wrote are told."""
    body = BEFORE + text_of(8, BF16, PARTS) + AFTER
    for fenced, kinds in ((True, set()), (False, {Kind.UNFENCED})):
        shared = SharedMemory(1, 8192, granule=16, checks=True, has_wgmma=True)
        bench = Bench(HEAD + body, THREADS, 1, memory=shared)
        lanes = bench.lanes
        bench.shared.start(lanes)
        lanes.here = bench.kernel.instructions[0]
        bench.shared.store(lanes, lanes.every, (np.arange(THREADS) * 16).astype(np.uint32), np.zeros((THREADS, 16), np.uint8))
        if fenced:
            bench.shared.fence(lanes, lanes.every)
        lanes.intervals = lanes.intervals + 1  # a barrier
        bench["%rd1"], bench["%p0"] = np.array([descriptor(0, 1, 16, 1024)], np.uint64), True
        assert bench.run().kinds == kinds
    bench["%rd1"] = np.array([descriptor(4096, 1, 16, 1024)], np.uint64)
    assert Kind.UNWRITTEN in bench.run().kinds


@pytest.mark.parametrize(
    "text",
    [
        text_of(12, BF16),
        text_of(264, BF16),
        text_of(40, ("s32", "s8", "s8")),
        text_of(8, ("f16", "bf16", "bf16")),
        text_of(8, ("f32", "bf16", "f16")),
        text_of(8, BF16, more=", 1, 1, 0"),
        text_of(8, BF16, more=", 1, 2, 0, 0"),
        text_of(8, BF16, more=", 1, 1, 0, 2"),
        text_of(8, BF16, PARTS, more=", 1, 1, 0, 0"),
        text_of(8, ("f32", "tf32", "tf32"), more=", 1, 1, 0, 0"),
        text_of(8, BF16).replace("%r3", "%r2, %r3"),
        text_of(8, BF16).replace("m64", "m128"),
        text_of(8, BF16).replace(".mma_async.", ".mma_async.sp."),
        text_of(8, BF16).replace("f32.bf16", "satfinite.f32.bf16"),
        text_of(8, BF16, "{%r200, %r201}", more=", 1, 1, 0"),
        "wgmma.wait_group.sync.aligned %r1;",
        "wgmma.fence.aligned;",
    ],
)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnknownInstructionError):
        Bench(HEAD + text, 128).run()
