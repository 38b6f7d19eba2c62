import numpy as np
import pytest
import torch
from _programs import COPY, HEAD, kinds, run

from fastdllm_triton.ptx.accesses import Use
from fastdllm_triton.ptx.cells import rising
from fastdllm_triton.ptx.findings import Findings, Kind
from fastdllm_triton.ptx.lanes import Lanes
from fastdllm_triton.ptx.parser import parse
from fastdllm_triton.ptx.races import GlobalRaces, SharedRaces


class Told(Lanes):
    """Lanes that keep what is noted."""

    def note(self, kind, which, detail=""):
        self.__dict__.setdefault("notes", []).extend((kind, int(lane)) for lane in which)

    def take(self):
        return self.__dict__.pop("notes", [])


def lanes(programs=3, threads=96):
    kernel = parse(HEAD.format(parameters="", threads=threads, loads="", body="ret;"))
    found = Told(kernel, np.arange(programs) + 5, {}, {}, None, None, Findings())
    found.here = kernel.instructions[-1]
    return found


class Reference:
    """All accesses so far, compared one by one."""

    def __init__(self, lanes):
        self.lanes = lanes
        self.done = []

    def conflicts(self, lane, use, granules):
        """Kinds of earlier accesses that an access conflicts with."""
        program, warp = int(self.lanes.place[lane]), int(self.lanes.warp[lane])
        interval = int(self.lanes.intervals[program])
        found = set()
        for other, p, w, i, g in self.done:
            apart = p != program or (i == interval and w != warp)
            changes = Use.WRITE in (use, other) or (Use.ATOMIC in (use, other) and use is not other)
            if apart and changes and granules & g:
                found.add(other)
        return found

    def add(self, lane, use, granules):
        place = int(self.lanes.place[lane])
        self.done.append((use, place, int(self.lanes.warp[lane]), int(self.lanes.intervals[place]), granules))


@pytest.mark.parametrize("seed", range(4))
def test_global_races_are_those_that_pairs_of_accesses_have(seed):
    random, here = np.random.default_rng(seed), lanes()
    races, reference = GlobalRaces(64 * 4, 4), Reference(here)
    seen = 0
    for _ in range(600):
        if random.random() < 0.3:
            here.intervals = here.intervals + (random.random(3) < 0.5)
        if random.random() < 0.02:
            races, reference = GlobalRaces(64 * 4, 4), Reference(here)
        use = Use(random.choice([Use.READ, Use.READ, Use.WRITE, Use.ATOMIC, Use.STRONG_READ]))
        size = int(random.choice([4, 8, 16]))
        lane, place = int(random.integers(here.count)), int(random.integers(64 * 4 // size))
        granules = set(range(place * size // 4, (place + 1) * size // 4))
        excused = races.use(here, np.array([lane]), use, np.array([place]), size, True)
        noted = here.take()
        expected = reference.conflicts(lane, Use.READ if use is Use.STRONG_READ else use, granules)
        if use is Use.STRONG_READ:
            expected -= {Use.ATOMIC}
        else:
            reference.add(lane, use, granules)
        assert (bool(noted) or excused is not None) == bool(expected), (use, noted, expected)
        seen += bool(expected)
    assert 50 < seen < 580


@pytest.mark.parametrize("seed", range(4))
def test_global_races_of_lanes_that_run_at_once(seed):
    random, here = np.random.default_rng(seed), lanes()
    for _ in range(40):
        races, reference = GlobalRaces(64 * 4, 4), Reference(here)
        which = np.sort(random.permutation(here.count)[: int(random.integers(1, 40))])
        for use in (Use.READ, Use.WRITE):
            place = random.integers(0, 64, len(which))
            for lane, at in zip(which, place, strict=True):
                reference.add(lane, use, {int(at)})
            races.use(here, which, use, place, 4, rising(place))
        here.take()
        for at in range(64):  # what is remembered is true for all of them
            for lane in (0, 40, 80, 100):
                expected = reference.conflicts(lane, Use.ATOMIC, {at})
                races.use(here, np.array([lane]), Use.ATOMIC, np.array([at]), 4, True)
                assert bool(here.take()) == bool(expected)


@pytest.mark.parametrize("seed", range(6))
def test_shared_races_are_those_that_pairs_of_accesses_have(seed):
    random, here = np.random.default_rng(seed), lanes(programs=2)
    size_of = 64
    races = SharedRaces(2 * size_of * 4, 4)
    races.start()
    seen = 0
    for batch in range(3):
        if batch:
            races.start()
            here = lanes(programs=2)
        reference = Reference(here)
        every = np.arange(2 * size_of)
        races.write(here, np.repeat([0, 96], size_of), every, 4, 0, 256, True)  # warp 0 of each program writes all
        here.intervals = here.intervals + 1
        here.take()
        for _ in range(300):
            if random.random() < 0.2:
                here.intervals = here.intervals + (random.random(2) < 0.5)
            use = Use(random.choice([Use.READ, Use.READ, Use.WRITE]))
            size = int(random.choice([4, 8, 16]))
            count = int(random.integers(1, 5))
            program = int(random.integers(2))
            which = program * 96 + np.sort(random.permutation(96)[:count])
            at = random.integers(0, size_of * 4 // size, count)
            place = program * size_of * 4 // size + at
            low, high = int(at.min()) * size, int(at.max() + 1) * size
            granules = [{program * 1000 + g for g in range(a * size // 4, (a + 1) * size // 4)} for a in at]
            if use is Use.READ:
                assert races.read(here, which, place, size, low, high) is None
                excused = None
            else:
                excused = races.write(here, which, place, size, low, high, rising(place))
            noted = {lane for kind, lane in here.take() if kind is Kind.SHARED_RACE}
            noted |= set() if excused is None else set(which[excused].tolist())
            expected = {int(lane) for lane, g in zip(which, granules, strict=True) if reference.conflicts(lane, use, g)}
            assert noted == expected, use
            for lane, g in zip(which, granules, strict=True):
                reference.add(lane, use, g)
            seen += bool(expected)
    assert seen > 50


# In kernels ---------------------------------------------------------------------------------------------------------------------

#: Each thread writes its number to shared memory, and reads that of the thread 32 on; {} stands between.
EXCHANGE = """
    shl.b32 %r10, %r0, 2;
    st.shared.b32 [%r10], %r0;
    {}
    xor.b32 %r11, %r10, 128;
    ld.shared.b32 %r12, [%r11];
    mul.wide.u32 %rd10, %r3, 4;
    add.s64 %rd11, %rd0, %rd10;
    st.global.b32 [%rd11], %r12;
    ret;
"""


@pytest.mark.parametrize("seed", [None, 3])
def test_a_missing_barrier_is_found(seed):
    y = torch.zeros(192, dtype=torch.int32)
    options = {"threads": 64, "programs": 3, "shared": 256, "seed": seed}
    assert not run(EXCHANGE.format("bar.sync 0;"), y, **options)
    assert y.tolist() == [n ^ 32 for n in range(64)] * 3
    findings = run(EXCHANGE.format(""), y, **options)
    assert Kind.SHARED_RACE in kinds(findings)
    if seed is None:
        (finding,) = findings
        assert finding.text.startswith("ld.shared") and findings.counts[finding] == 192
        assert finding.detail == "written by warp 1"
    assert not run(EXCHANGE.format(""), y, checks=False, **options)


def test_threads_of_one_warp_need_no_barrier():
    y = torch.zeros(32, dtype=torch.int32)
    assert not run(EXCHANGE.format("").replace("128", "64"), y, shared=128)
    assert y.tolist() == [n ^ 16 for n in range(32)]


def test_memory_that_is_used_again_needs_a_barrier():
    body = """
        shl.b32 %r10, %r0, 2;
        xor.b32 %r11, %r10, 128;
        st.shared.b32 [%r10], %r0;
        bar.sync 0;
        ld.shared.b32 %r12, [%r11];
        {}
        st.shared.b32 [%r10{}], %r0;
        ret;
    """
    options = {"threads": 64, "programs": 2, "shared": 512}
    assert not run(body.format("bar.sync 0;", ""), **options)
    assert not run(body.format("", "+256"), **options)
    (finding,) = run(body.format("", ""), **options)
    assert (finding.kind, finding.detail) == (Kind.SHARED_RACE, "read by warp 1")
    assert finding.text.startswith("st.shared")


def test_a_reader_before_many_others_is_not_forgotten():
    body = """
        shl.b32 %r10, %r0, 2;
        st.shared.b32 [%r10], %r0;
        bar.sync 0;
        ld.shared.b32 %r12, [global_smem];
        setp.eq.u32 %p1, %r0, {};
        @%p1 st.shared.b32 [global_smem], %r0;
        ret;
    """
    (finding,) = run(body.format(0), threads=128, shared=512)
    assert (finding.kind, finding.detail) == (Kind.SHARED_RACE, "read by several warps")
    assert not run(body.format(0), threads=32, shared=512)


@pytest.mark.parametrize(("value", "found"), [("%r1", []), ("%r0", [Kind.SHARED_RACE])])
def test_warps_may_store_the_same_value_to_one_place(value, found):
    body = f"and.b32 %r10, %r0, 31;\nshl.b32 %r10, %r10, 2;\nst.shared.b32 [%r10], {value};\nret;"
    assert kinds(run(body, threads=64, programs=2, shared=128)) == found
    body = f"and.b32 %r10, %r0, 31;\nshl.b32 %r10, %r10, 2;\nsetp.lt.u32 %p1, %r0, 32;\n@%p1 st.shared.b32 [%r10], {value};\n"
    body += f"@!%p1 st.shared.b32 [%r10], {value};\nret;"
    assert kinds(run(body, threads=64, programs=2, shared=128)) == found


def test_threads_of_a_warp_that_store_different_values_to_one_place():
    body = "st.shared.b32 [global_smem], {};\nret;"
    assert not run(body.format("%r1"), shared=16)
    (finding,) = run(body.format("%r0"), shared=16)
    assert (finding.kind, finding.detail) == (Kind.SHARED_RACE, "several values to one address at once")


def test_wide_accesses_meet_narrow_ones():
    body = """
        mov.u16 %rs1, 1;
        st.shared.b8 [%r0], %rs1;
        {}
        setp.lt.u32 %p1, %r0, 4;
        shl.b32 %r10, %r0, 4;
        @%p1 ld.shared.v4.b32 {{%r11, %r12, %r13, %r14}}, [%r10];
        ret;
    """
    assert not run(body.format("bar.sync 0;"), threads=64, shared=64)
    findings = run(body.format(""), threads=64, shared=64)
    assert list(findings.counts.values()) == [2]  # of the threads 0 to 3, those that read what warp 1 wrote


def test_shared_memory_that_nobody_wrote():
    y = torch.zeros(64, dtype=torch.int32)
    body = """
        shl.b32 %r10, %r0, 2;
        setp.lt.u32 %p1, %r0, 31;
        @%p1 st.shared.b32 [%r10], %r0;
        ld.shared.b32 %r12, [%r10];
        mul.wide.u32 %rd10, %r3, 4;
        add.s64 %rd11, %rd0, %rd10;
        st.global.b32 [%rd11], %r12;
        ret;
    """
    findings = run(body, y, shared=128)
    ((finding, count),) = findings.counts.items()
    assert (finding.kind, finding.thread, count) == (Kind.UNWRITTEN, 31, 1)
    assert y[:32].tolist() == [*range(31), -1]
    for lanes in (32, 64):  # what one batch wrote, or one program, the next did not
        findings = run(body.replace("%r0, 31;", "%r1, 1;"), y, shared=128, programs=2, lanes=lanes)
        assert [(f.kind, f.program, findings.counts[f]) for f in findings] == [(Kind.UNWRITTEN, 1, 32)]
        assert y.tolist() == [*range(32), *[-1] * 32]


def test_shared_memory_ends_where_the_kernel_says():
    body = "shl.b32 %r10, %r0, 2;\nst.shared.b32 [%r10], %r0;\nld.shared.b32 %r11, [%r10+-4];\nret;"
    findings = run(body, shared=124, programs=2)
    assert [(f.kind, f.detail, findings.counts[f]) for f in findings] == [
        (Kind.OUTSIDE_SHARED, "bytes 124 to 127 of 124", 2),
        (Kind.OUTSIDE_SHARED, f"bytes {2**32 - 4} to {2**32 - 1} of 124", 2),
    ]
    assert kinds(run("ld.shared.v2.b32 {%r10, %r11}, [global_smem+4];\nret;", shared=16)) == [Kind.MISALIGNED]
    assert kinds(run("ld.shared.b32 %r10, [global_smem];\nret;")) == [Kind.OUTSIDE_SHARED]


#: Each thread stores its number of the grid where the expression in {} says.
STORE = "{}\nmul.wide.u32 %rd10, %r10, 4;\nadd.s64 %rd11, %rd0, %rd10;\nst.global.b32 [%rd11], %r11;\nret;"


@pytest.mark.parametrize(
    ("where", "detail"),
    [
        ("mov.b32 %r10, %r3; mov.b32 %r11, %r3;", None),
        ("xor.b32 %r10, %r3, 77; mov.b32 %r11, %r3;", None),
        ("mov.b32 %r10, %r0; mov.b32 %r11, %r0;", "program"),
        ("shr.u32 %r10, %r3, 1; mov.b32 %r11, %r1;", None),
        ("shr.u32 %r10, %r3, 1; mov.b32 %r11, %r3;", "several values to one address at once"),
        ("and.b32 %r10, %r3, 448; mov.b32 %r11, %r1;", None),  # one place and value of each program
        ("and.b32 %r10, %r3, 448; mov.b32 %r11, %r0;", "several values to one address at once"),
    ],
)
@pytest.mark.parametrize("lanes", [64, 16384])
def test_stores_to_global_memory(where, detail, lanes):
    y = torch.zeros(512, dtype=torch.int32)
    findings = run(STORE.format(where), y, threads=64, programs=8, lanes=lanes)
    assert kinds(findings) == ([] if detail is None else [Kind.GLOBAL_RACE])
    assert all(detail in f.detail for f in findings)


@pytest.mark.parametrize("lanes", [64, 16384])
@pytest.mark.parametrize("seed", [None, 1])
def test_programs_that_read_what_others_write(lanes, seed):
    body = """
        add.s32 %r10, %r3, {};
        mul.wide.u32 %rd10, %r10, 4;
        add.s64 %rd11, %rd0, %rd10;
        mul.wide.u32 %rd12, %r3, 4;
        add.s64 %rd13, %rd0, %rd12;
        {}ld.global.b32 %r11, [%rd11];
        {}
        st.global.b32 [%rd13], %r3;
        ret;
    """
    y = torch.zeros(1024, dtype=torch.int32)
    options = {"threads": 64, "programs": 8, "lanes": lanes, "seed": seed}
    assert not run(body.format(0, "", ""), y, **options)
    assert not run(body.format(512, "", ""), y, **options)
    assert kinds(run(body.format(64, "", ""), y, **options)) == [Kind.GLOBAL_RACE]
    assert kinds(run(body.format(32, "setp.lt.u32 %p1, %r0, 32;\n@%p1 ", ""), y, **options)) == [Kind.GLOBAL_RACE]
    assert not run(body.format(32, "setp.lt.u32 %p1, %r0, 32;\n@%p1 ", "bar.sync 0;"), y, **options)


@pytest.mark.parametrize("lanes", [32, 16384])
@pytest.mark.parametrize("seed", [None, 1])
def test_atomics_of_programs_are_no_race_but_with_other_accesses(lanes, seed):
    options = {"programs": 16, "lanes": lanes, "seed": seed}
    y = torch.zeros(4, dtype=torch.int32)
    assert not run("mov.b32 %r10, 1;\nred.global.add.u32 [%rd0], %r10;\nret;", y, **options)
    assert y.tolist() == [512, 0, 0, 0]
    assert not run(
        "mov.b32 %r10, 1;\nred.global.add.u32 [%rd0], %r10;\nld.relaxed.gpu.global.b32 %r11, [%rd0];\nret;", y, **options
    )
    plain = "mov.b32 %r10, 1;\nred.global.add.u32 [%rd0], %r10;\nld.global.b32 %r11, [%rd0];\nret;"
    assert kinds(run(plain, y, **options)) == [Kind.GLOBAL_RACE]
    assert kinds(run("atom.global.add.u32 %r11, [%rd0], 1;\nst.global.b32 [%rd0], %r1;\nret;", y, **options)) == [
        Kind.GLOBAL_RACE
    ]


def test_atomics_in_shared_memory():
    y = torch.zeros(1, dtype=torch.int32)
    body = """
        setp.eq.u32 %p1, %r0, 0;
        mov.b32 %r10, 5;
        @%p1 st.shared.b32 [global_smem], %r10;
        {}
        atom.shared.add.u32 %r11, [global_smem], %r0;
        {}
        ld.shared.b32 %r12, [global_smem];
        @%p1 st.global.b32 [%rd0], %r12;
        ret;
    """
    assert not run(body.format("bar.sync 0;", "bar.sync 0;"), y, threads=64, shared=4)
    assert y.item() == 5 + 64 * 63 // 2
    assert kinds(run(body.format("", "bar.sync 0;"), y, threads=64, shared=4)) == [Kind.SHARED_RACE]
    assert kinds(run(body.format("bar.sync 0;", ""), y, threads=64, shared=4)) == [Kind.SHARED_RACE]


def test_overlapping_arguments_are_one_memory():
    storage = torch.zeros(128, dtype=torch.int32)
    assert not run(COPY, storage[:64], storage[64:], programs=2)
    assert not run(COPY, storage, storage, programs=2)
    assert kinds(run(COPY, storage, storage[32:], programs=2)) == [Kind.GLOBAL_RACE]
