"""wgmma between its issue and the wait: what cannot be seen, what may not be touched, and who goes first."""

import numpy as np
import pytest
from ptx._elements import to_bits
from ptx._layouts import descriptor
from ptx._warps import Bench
from ptx._wgmmas import (
    AFTER,
    BEFORE,
    BF16,
    HEAD,
    LANES,
    PARTS,
    START_A,
    START_B,
    THREADS,
    bits_of,
    d_names,
    prepared,
    result,
    text_of,
)

from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.shared import SharedMemory


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
    "another depth": (ONE + BEFORE + text_of(8, ("f32", "tf32", "tf32")) + COMMIT + WAIT, True),
    "another type of the same shape": (ONE + text_of(8, ("f32", "f16", "f16"), PARTS) + COMMIT + WAIT, False),
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


def test_a_fence_of_some_warps():
    bench, _, _ = prepared(BEFORE + text_of(8, BF16, PARTS) + AFTER, 8, BF16, registers=True)
    bench.run(np.arange(LANES) >= THREADS, steps=slice(0, 1))
    bench.run(steps=slice(1, 4))
    assert [(f.kind, f.program, n) for f, n in bench.findings.counts.items()] == [(Kind.WGMMA, 0, THREADS)]


def test_uses_of_some_warps():
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
            assert bench.lanes.here.opcode.startswith("wgmma.wait_group")


def test_without_checks_operands_are_read_once():
    bench, _, _ = prepared(BEFORE + text_of(8, BF16) + COMMIT + WAIT, 8, BF16)
    bench.shared.checks = False
    bench.run(steps=slice(0, 3))
    bench.shared.bytes[:] = 0
    bench.run(steps=slice(3, 4))
    assert not len(bench.findings)


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
    second = np.arange(LANES) >= THREADS
    bench.run(second, steps=slice(0, 2))
    assert (np.isnan(bench["%r3"].view(np.float32)) == second).all()
    bench.run(second, steps=slice(2, 4))
    found = result(bench, 8, "f32")
    assert (found[2:] == bits_of("f32", terms + c)[2:]).all()
    assert (found[:2] == bits_of("f32", c)[:2]).all()
    bench.run(np.arange(LANES) < THREADS)
    assert (result(bench, 8, "f32") == bits_of("f32", terms + c)).all()


def test_programs_that_are_not_as_far():
    """One program issues a product, then both do: of one the accumulators are in flight, of the other in registers."""
    bench, c, terms = prepared(BEFORE + 2 * text_of(8, BF16) + AFTER, 8, BF16)
    bench.run(steps=slice(0, 1))
    bench.run(np.arange(LANES) >= THREADS, steps=slice(1, 2))
    bench.run(steps=slice(2, 5))
    assert (result(bench, 8, "f32") == bits_of("f32", np.reshape([1, 1, 2, 2], (4, 1, 1)) * terms + c)).all()
    assert not len(bench.findings)


def test_groups_are_counted_by_warp():
    """What another program commits is none of this one's groups."""
    bench, _, _ = prepared(BEFORE + text_of(8, BF16) + COMMIT + "wgmma.wait_group.sync.aligned 1;\n" + WAIT, 8, BF16)
    first = np.arange(LANES) < THREADS
    bench.run(steps=slice(0, 2))
    bench.run(first, steps=slice(2, 3))
    bench.run(~first, steps=slice(2, 3))
    bench.run(steps=slice(3, 4))
    assert np.isnan(bench["%r0"].view(np.float32)).all()
    bench.run(steps=slice(4, 5))
    assert not np.isnan(bench["%r0"].view(np.float32)).any()


@pytest.mark.parametrize("together", [[2, 3, 4, 5], [0, 1, 4, 5]])
def test_warps_of_two_groups_at_once(together):
    """Four warps, but of two groups, each of which has its own matrices."""
    bench, c, terms = prepared(BEFORE + text_of(8, BF16) + AFTER, 8, BF16)
    some = np.isin(np.arange(LANES) // 32, together)
    bench.run(some)
    bench.run(~some)
    assert (result(bench, 8, "f32") == bits_of("f32", terms + c)).all()
    assert not len(bench.findings)


def test_float16_is_rounded_between_products():
    """2048 + 1 is 2048, again and again; 2048 + 2 is not."""
    types = ("f16", "f16", "f16")
    for count, one, wanted in ((2, 0x3C00, 2048), (1, 0x4000, 2050)):
        bench, _, _ = prepared(BEFORE + count * text_of(8, types) + AFTER, 8, types)
        bench.shared.bytes[:] = 0
        bench.shared.bytes[:, [START_A, START_A + 1, START_B, START_B + 1]] = [
            0,
            0x3C,
            one & 0xFF,
            one >> 8,
        ]  # the first elements
        for name in d_names(8, "f16"):
            bench[name] = np.full(LANES, 0x68006800, np.uint32)
        assert (result(bench.run(), 8, "f16")[[0, 2], 0, 0] == to_bits("f16", wanted)).all()


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


@pytest.mark.parametrize("writer", [0, 3])
def test_operands_are_read_by_several_warps(writer):
    """Whichever warp writes them, without a barrier it is a race."""
    shared = SharedMemory(1, 8192, granule=16, checks=True, has_wgmma=True)
    bench = Bench(HEAD + BEFORE + text_of(8, BF16) + AFTER, 128, 1, memory=shared)
    lanes = bench.lanes
    shared.start(lanes)
    lanes.here = bench.kernel.instructions[0]
    for start in range(0, 8192, 512):
        which = lanes.every[32 * writer : 32 * writer + 32]
        shared.store(lanes, which, (start + np.arange(32) * 16).astype(np.uint32), np.zeros((32, 16), np.uint8))
    shared.fence(lanes, lanes.every)
    bench["%rd0"] = bench["%rd1"] = np.array([descriptor(0, 1, 16, 1024)], np.uint64)
    bench["%p0"] = True
    assert bench.run().kinds == {Kind.SHARED_RACE}
