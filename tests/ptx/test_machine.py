import pytest
import torch
from _programs import Run, kernel, kinds, run

from fastdllm_triton.ptx import batch
from fastdllm_triton.ptx.batch import DeadlockError
from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.program import Program

SEEDS = pytest.mark.parametrize("seed", [None, 0, 1])

#: Stores %r20 for the thread of the grid.
STORE = """
    mul.wide.u32 %rd20, %r3, 4;
    add.s64 %rd21, %rd0, %rd20;
    st.global.b32 [%rd21], %r20;
    ret;
"""


def values(body, threads=32, programs=1, **options):
    """What each thread has in ``%r20`` at the end, and what was found."""
    y = torch.full((threads * programs,), -1, dtype=torch.int32)
    findings = run(body + STORE, y, threads=threads, programs=programs, **options)
    return y.tolist(), findings


def test_a_kernel_is_made_ready_once():
    one, other = kernel("ret;"), kernel("ret;")
    assert Program.of(one) is Program.of(one)
    assert Program.of(one) is not Program.of(other)


@SEEDS
def test_special_registers(seed):
    names = [
        "tid.x",
        "tid.y",
        "ntid.x",
        "ntid.z",
        "ctaid.x",
        "ctaid.y",
        "ctaid.z",
        "nctaid.x",
        "nctaid.y",
        "nctaid.z",
        "laneid",
        "warpid",
    ]
    names += ["nwarpid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"]
    grid, threads = (3, 2, 2), 64
    y = torch.zeros(12 * threads, len(names), dtype=torch.int32)
    stores = "\n".join(f"mov.u32 %r10, %{name};\nst.global.b32 [%rd10+{4 * n}], %r10;" for n, name in enumerate(names))
    body = f"""
        mov.u32 %r10, %ctaid.y;
        mov.u32 %r11, %ctaid.z;
        mad.lo.s32 %r10, %r11, 2, %r10;
        mad.lo.s32 %r10, %r10, 3, %r1;
        mad.lo.s32 %r10, %r10, {threads}, %r0;
        mul.wide.u32 %rd10, %r10, {4 * len(names)};
        add.s64 %rd10, %rd0, %rd10;
        {stores}
        ret;
    """
    assert not run(body, y, threads=threads, grid=grid, seed=seed, lanes=256)
    for row in range(12 * threads):
        program, thread = divmod(row, threads)
        lane = thread % 32
        expected = [thread, 0, 64, 1, program % 3, program // 3 % 2, program // 6, *grid, lane, thread // 32, 2]
        expected += [1 << lane, (1 << lane) - 1, (2 << lane) - 1, (-2 << lane) & 0xFFFFFFFF, (-1 << lane) & 0xFFFFFFFF]
        assert [n & 0xFFFFFFFF for n in y[row].tolist()] == expected


@SEEDS
def test_threads_part_and_meet(seed):
    body = """
        setp.lt.u32 %p1, %r0, 10;
        mov.b32 %r20, 5;
        @%p1 bra $LOW;
        add.s32 %r20, %r20, 100;
        bra.uni $JOIN;
    $LOW:
        add.s32 %r20, %r20, %r0;
    $JOIN:
        redux.sync.add.s32 %r21, %r20, -1;
        add.s32 %r20, %r20, %r21;
    """
    found, findings = values(body, threads=64, programs=3, seed=seed)
    own = [5 + n if n < 10 else 105 for n in range(64)]
    assert found == [n + sum(own[w * 32 : w * 32 + 32]) for w in (0, 1) for n in own[w * 32 : w * 32 + 32]] * 3
    assert not findings


@SEEDS
def test_loops_with_a_count_of_each_thread(seed):
    body = """
        mov.b32 %r20, 0;
        mov.b32 %r10, 0;
    $LOOP:
        setp.ge.u32 %p1, %r10, %r3;
        @%p1 bra $DONE;
        add.s32 %r20, %r20, %r10;
        add.s32 %r10, %r10, 1;
        bra.uni $LOOP;
    $DONE:
    """
    found, findings = values(body, programs=2, seed=seed)
    assert found == [n * (n - 1) // 2 for n in range(64)]
    assert not findings


@SEEDS
def test_barriers_in_loops_with_a_count_of_each_program(seed):
    body = """
        add.s32 %r9, %r1, 1;
        mov.b32 %r10, 0;
        shl.b32 %r11, %r0, 2;
        xor.b32 %r12, %r11, 128;
        mov.b32 %r20, %r0;
    $LOOP:
        st.shared.b32 [%r11], %r20;
        bar.sync 0;
        ld.shared.b32 %r20, [%r12];
        add.s32 %r20, %r20, 1;
        {}
        add.s32 %r10, %r10, 1;
        setp.lt.u32 %p1, %r10, %r9;
        @%p1 bra $LOOP;
    """
    options = {"threads": 64, "programs": 5, "shared": 256, "seed": seed}
    found, findings = values(body.format("bar.sync 0;"), **options)
    expected = []
    for program in range(5):
        state = list(range(64))
        for _ in range(program + 1):
            state = [state[n ^ 32] + 1 for n in range(64)]
        expected += state
    assert found == expected
    assert not findings
    assert Kind.SHARED_RACE in kinds(values(body.format(""), **options)[1])


@SEEDS
def test_guards_and_their_negation(seed):
    body = """
        and.b32 %r10, %r0, 1;
        setp.eq.u32 %p1, %r10, 0;
        mov.b32 %r20, 7;
        @%p1 add.s32 %r20, %r20, %r0;
        @!%p1 sub.s32 %r20, %r20, %r0;
        mov.pred %p2, -1;
        @!%p2 mov.b32 %r20, 0;
        @%p2 add.s32 %r20, %r20, 1000;
    """
    assert values(body, seed=seed)[0] == [1007 + n if n % 2 == 0 else 1007 - n for n in range(32)]


@SEEDS
def test_programs_and_threads_that_leave(seed):
    body = """
        mov.b32 %r20, 3;
        setp.eq.u32 %p1, %r1, 1;
        @%p1 ret;
        setp.gt.u32 %p2, %r0, {};
        @%p2 exit;
        redux.sync.add.s32 %r20, %r0, -1;
    """
    found, findings = values(body.format(31), threads=64, programs=4, seed=seed)
    assert not findings
    assert found == [496 if p != 1 and n < 32 else -1 for p in range(4) for n in range(64)]
    found, findings = values(body.format(40), threads=64, programs=4, seed=seed)
    assert kinds(findings) == [Kind.PART_OF_WARP]
    assert found[:32] == [496] * 32


@SEEDS
def test_barriers_after_whole_programs_left(seed):
    body = """
        shl.b32 %r11, %r0, 2;
        setp.eq.u32 %p1, %r1, 1;
        @%p1 ret;
        st.shared.b32 [%r11], %r0;
        bar.sync 0;
        xor.b32 %r11, %r11, 128;
        ld.shared.b32 %r20, [%r11];
        bar.sync 0, 64;
        st.shared.b32 [%r11], %r1;
        barrier.sync.aligned 0;
        xor.b32 %r11, %r11, 128;
        ld.shared.b32 %r12, [%r11];
    """
    found, findings = values(body, threads=64, programs=3, shared=256, seed=seed)
    assert not findings
    assert found == [n ^ 32 if p != 1 else -1 for p in range(3) for n in range(64)]


@SEEDS
def test_a_barrier_that_part_of_a_program_has_left(seed):
    body = "mov.b32 %r20, %r0;\nsetp.ge.u32 %p1, %r0, 32;\n@%p1 ret;\nbar.sync 0;"
    found, findings = values(body, threads=64, programs=2, seed=seed)
    ((finding, count),) = findings.counts.items()
    assert (finding.kind, finding.detail, finding.text, count) == (Kind.UNEVEN_BARRIER, "others have ended", "bar.sync 0", 64)
    assert found == [*range(32), *[-1] * 32] * 2


@SEEDS
def test_threads_at_different_barriers(seed):
    body = """
        mov.b32 %r20, %r0;
        setp.ge.u32 %p1, %r0, 32;
        @%p1 bra $HIGH;
        bar.sync 0;
        bra.uni $JOIN;
    $HIGH:
        bar.sync 0;
    $JOIN:
    """
    found, findings = values(body, threads=64, seed=seed)
    assert [(f.kind, f.detail, f.thread) for f in findings] == [
        (Kind.UNEVEN_BARRIER, "others are at another one", thread) for thread in (0, 32)
    ]
    assert found == list(range(64))


def test_a_barrier_under_a_guard():
    body = "mov.b32 %r20, %r0;\nsetp.{} %p1, %r0, 40;\n@%p1 bar.sync 0;"
    assert not values(body.format("lt.u32"), threads=32)[1]
    assert not values(body.format("gt.u32"), threads=32)[1]
    assert kinds(values("mov.b32 %r20, %r0;\nsetp.lt.u32 %p1, %r0, 40;\n@%p1 bar.sync 0;\n", threads=64)[1]) == [
        Kind.UNEVEN_BARRIER
    ]


@SEEDS
def test_part_of_a_warp_at_a_shuffle(seed):
    body = """
        mov.b32 %r20, 1;
        setp.lt.u32 %p1, %r0, 5;
        @%p1 bra $OVER;
        shfl.sync.bfly.b32 %r20, %r0, 1, 31, {};
    $OVER:
        bar.sync 0;
    """
    _, findings = values(body.format(-1), seed=seed)
    ((finding, count),) = findings.counts.items()
    assert (finding.kind, finding.thread, count) == (Kind.PART_OF_WARP, 5, 27)
    found, findings = values(body.format(hex(0xFFFFFF00)).replace(", 5;", ", 8;"), seed=seed)
    assert not findings
    assert found == [1] * 8 + [n ^ 1 for n in range(8, 32)]


@SEEDS
def test_programs_that_come_one_after_the_other(seed):
    """Their order is that of the grid, and random with a seed."""
    y = torch.zeros(64, dtype=torch.int32)
    body = """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 atom.global.add.u32 %r10, [%rd0], 1;
        mul.wide.u32 %rd10, %r10, 4;
        add.s64 %rd11, %rd0, %rd10;
        @%p1 st.global.b32 [%rd11+4], %r1;
        ret;
    """
    findings = run(body, y, programs=20, lanes=128, seed=seed)
    order = y[1:21].tolist()
    assert sorted(order) == list(range(20)) and y[0] == 20
    assert (order == sorted(order)) == (seed is None)
    assert not findings


def test_results_that_depend_on_the_order_differ():
    body = "st.global.b32 [%rd0], %r3;\nret;"
    seen = set()
    for seed in range(6):
        y = torch.zeros(1, dtype=torch.int32)
        assert kinds(run(body, y, threads=64, programs=4, seed=seed)) == [Kind.GLOBAL_RACE]
        seen.add(int(y))
    assert len(seen) > 2


def test_warps_are_interleaved():
    body = """
        shl.b32 %r10, %r0, 2;
        st.shared.b32 [%r10], %r0;
        bra.uni $NEXT;
    $NEXT:
        xor.b32 %r11, %r10, 128;
        ld.shared.b32 %r20, [%r11];
    """
    seen = {tuple(values(body, threads=64, shared=256, seed=seed)[0]) for seed in range(16)}
    assert len(seen) > 1  # one warp reads before the other wrote


LOCK = """
$TAKE:
    atom.global.cas.b32 %r10, [%rd0], 0, 1;
    setp.ne.u32 %p1, %r10, 0;
    @%p1 bra $TAKE;
    ld.relaxed.gpu.global.b32 %r11, [%rd0+4];
    add.s32 %r11, %r11, 1;
    st.relaxed.gpu.global.b32 [%rd0+4], %r11;
    {}
    ret;
"""


@SEEDS
def test_threads_that_wait_for_others_do_not_wait_for_ever(seed):
    y = torch.zeros(2, dtype=torch.int32)
    one = "setp.ne.u32 %p2, %r0, 0;\n@%p2 ret;\n"
    assert not run(one + LOCK.format("mov.b32 %r12, 0;\nst.release.gpu.global.b32 [%rd0], %r12;"), y, programs=3, seed=seed)
    assert y.tolist() == [0, 3]


def test_a_wait_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(batch, "_MOST", 2500)
    y = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(
        DeadlockError, match=r"kernel, kernel.py:1, PTX line \d+ \[program 0, thread 1\]: still running after 2500"
    ):
        run(LOCK.format(""), y)


# Programmatic dependent launch --------------------------------------------------------------------------------------------------

DEPENDENT = """
    mul.wide.u32 %rd10, %r3, 4;
    add.s64 %rd11, %rd0, %rd10;
    add.s64 %rd12, %rd1, %rd10;
    {early}
    setp.eq.u32 %p1, %r1, 2;
    @%p1 ret;
    griddepcontrol.wait;
    ld.global.b32 %r10, [%rd11];
    bar.sync 0;
    st.global.b32 [%rd12], %r10;
    ret;
"""


@pytest.mark.parametrize("lanes", [64, 128, 16384])
@SEEDS
def test_a_dependent_launch_stops_at_its_wait(lanes, seed):
    x, y = torch.zeros(256), torch.zeros(256)
    options = {"threads": 64, "programs": 4, "lanes": lanes, "seed": seed, "dependent": True}
    ready = Run(DEPENDENT.format(early="prefetch.global.L2 [%rd11];"), x, y, **options)
    assert not ready.machine.advance()
    assert (y == 0).all()
    x += torch.arange(256)
    assert ready.machine.advance()
    assert y.tolist() == [float(n) if n // 64 != 2 else 0.0 for n in range(256)]
    assert not ready.findings


@pytest.mark.parametrize(
    "early", ["ld.global.b32 %r11, [%rd11];", "st.global.b32 [%rd12], %r0;", "red.global.add.u32 [%rd12], %r0;"]
)
def test_accesses_before_the_wait_are_noted(early):
    x, y = torch.zeros(256), torch.zeros(256)
    ready = Run(DEPENDENT.format(early=early), x, y, threads=64, programs=4, dependent=True)
    ready.go()
    assert [(f.kind, f.text) for f in ready.findings] == [(Kind.EARLY_ACCESS, early[:-1])]
    assert not run(DEPENDENT.format(early=early), x, y, threads=64, programs=4)


def test_a_dependent_launch_that_does_not_wait_is_early_throughout():
    y = torch.zeros(32, dtype=torch.int32)
    ready = Run(f"mov.b32 %r20, 5;{STORE}", y, dependent=True)
    assert ready.machine.advance()
    assert kinds(ready.findings) == [Kind.EARLY_ACCESS]
    assert y.tolist() == [5] * 32


def test_one_warp_may_wait_for_all():
    x, y = torch.zeros(64), torch.zeros(64)
    body = """
        mul.wide.u32 %rd10, %r3, 4;
        add.s64 %rd11, %rd0, %rd10;
        add.s64 %rd12, %rd1, %rd10;
        setp.gt.u32 %p1, %r0, 31;
        @%p1 bra $OVER;
        griddepcontrol.wait;
    $OVER:
        bar.sync 0;
        ld.global.b32 %r10, [%rd11];
        st.global.b32 [%rd12], %r10;
        ret;
    """
    ready = Run(body, x, y, threads=64, dependent=True)
    assert not ready.machine.advance()
    x += 1
    assert ready.machine.advance()
    assert (y == 1).all() and not ready.findings


def test_registers_that_nobody_reads_are_dropped():
    lines = "\n".join(f"add.s32 %r{10 + n % 8}, %r{10 + (n + 7) % 8}, %r3;" for n in range(64))
    ready = Run(lines + "\nmov.b32 %r20, %r11;" + STORE, torch.zeros(1024, dtype=torch.int32), threads=64, programs=16)
    program = ready.machine._program
    assert program.widest < 4 * 12
    assert sum(len(action.last) for action in program.sequences[0].actions) > 8
    assert not ready.go().findings


def test_threads_in_whole_warps_only():
    with pytest.raises(ValueError, match="programs of 48 threads"):
        run("ret;", threads=48)


def test_nothing_runs_in_an_empty_grid():
    assert not run("trap;\nret;", grid=(0, 1, 1))
