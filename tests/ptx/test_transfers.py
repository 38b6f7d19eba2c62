"""Loads, stores, atomics and asynchronous copies: what they do to memory and registers."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from _programs import kernel, kinds, run

from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.program import Program
from fastdllm_triton.ptx.semantics import UnknownInstructionError
from fastdllm_triton.ptx.transfers import TrapError

TWO = "{%rd10, %rd11}"
FOUR = "{%r10, %r11, %r12, %r13}"
EIGHT = "{%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}"


def once(body, *tensors, **options):
    """Runs lines in thread 0 alone."""
    return run("setp.eq.u32 %p1, %r0, 0;\n@!%p1 bra $END;\n" + body + "\n$END:\nret;", *tensors, **options)


@pytest.mark.parametrize(
    ("load", "store", "count"),
    [
        ("ld.global.b8 %rs1, [%rd0]", "st.global.b8 [%rd1], %rs1", 1),
        ("ld.global.b16 %rs1, [%rd0]", "st.global.b16 [%rd1], %rs1", 2),
        ("ld.global.nc.L1::no_allocate.b32 {%r10}, [%rd0+0]", "st.global.cs.b32 [%rd1+0], {%r10}", 4),
        ("ld.global.b64 {%rd10}, [%rd0]", "st.global.b64 [%rd1], {%rd10}", 8),
        ("ld.global.v2.b8 {%rs1, %rs2}, [%rd0]", "st.global.v2.b8 [%rd1], {%rs1, %rs2}", 2),
        ("ld.global.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [%rd0]", "st.global.v4.u16 [%rd1], {%rs1, %rs2, %rs3, %rs4}", 8),
        ("ld.volatile.global.v2.b32 {%r10, %r11}, [%rd0]", "st.volatile.global.v2.b32 [%rd1], {%r10, %r11}", 8),
        (f"ld.relaxed.gpu.global.v4.f32 {FOUR}, [%rd0]", f"st.release.sys.global.v4.b32 [%rd1], {FOUR}", 16),
        (f"ld.global.ca.L1::evict_last.L2::cache_hint.v2.b64 {TWO}, [%rd0], %rd9", f"st.global.wt.v2.b64 [%rd1], {TWO}", 16),
        ("ld.global.v4.b64 {%rd10, %rd11, %rd12, %rd13}, [%rd0]", "st.global.v4.b64 [%rd1], {%rd10, %rd11, %rd12, %rd13}", 32),
        (f"ld.global.v8.b32 {EIGHT}, [%rd0]", f"st.global.v8.b32 [%rd1], {EIGHT}", 32),
        ("ld.global.v2.b32 {_, %r10}, [%rd0]; ld.global.b32 %r11, [%rd0]", "st.global.v2.b32 [%rd1], {%r11, %r10}", 8),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else None,
)  # fmt: skip
def test_loads_and_stores_move_bits(load, store, count):
    storage = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 192, np.uint8))
    x = storage[-storage.data_ptr() % 64 :][:64]
    y = torch.zeros(192, dtype=torch.uint8)
    y = y[-y.data_ptr() % 64 :][:64]
    policy = "createpolicy.fractional.L2::evict_last.b64 %rd9, 1.0;\n"
    assert not once(f"{policy}{load};\n{store};", x, y)
    assert y.tolist() == x[:count].tolist() + [0] * (64 - count)


@pytest.mark.parametrize(
    ("load", "expected"), [("s8", -2), ("u8", 254), ("b8", 254), ("s16", -514), ("u16", 65022), ("s32", -514)]
)
def test_loads_widen_as_their_type_says(load, expected):
    x, y = torch.tensor([-514]), torch.zeros(1, dtype=torch.int64)
    assert not once(f"ld.global.{load} %rd10, [%rd0];\nst.global.b64 [%rd1], %rd10;", x, y)
    assert y.item() == expected


def test_parameters_widen_as_their_type_says():
    y = torch.zeros(2, dtype=torch.int64)
    assert not once("ld.param.s32 %rd10, [kernel_param_1];\nst.global.b64 [%rd0], %rd10;", y, -7)
    assert not once("ld.param.b32 %rd10, [kernel_param_1];\nst.global.b64 [%rd0+8], %rd10;", y, -7)
    assert y.tolist() == [-7, 2**32 - 7]


def test_stores_take_the_low_bits_of_wider_registers():
    y = torch.zeros(8, dtype=torch.uint8)
    assert not once("mov.b32 %r10, 0x12345678;\nst.global.b16 [%rd0+2], %r10;\nst.global.b8 [%rd0+7], %r10;", y)
    assert y.tolist() == [0, 0, 0x78, 0x56, 0, 0, 0, 0x78]


@pytest.mark.parametrize("space", ["shared", "shared::cta", "shared::cluster", "volatile.shared", "relaxed.cta.shared"])
def test_names_of_shared_memory(space):
    y = torch.zeros(1, dtype=torch.int32)
    body = f"mov.b32 %r10, 99;\nst.{space}.b32 [global_smem+8], %r10;\nld.{space}.b32 %r11, [global_smem+8];\n"
    body += "st.global.b32 [%rd0], %r11;"
    assert not once(body, y, shared=16)
    assert y.item() == 99


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.b128 %rd1, [%rd0]",
        "ld.b32 %r10, [%rd0]",
        "ld.local.b32 %r10, [%rd0]",
        "ld.global.sometimes.b32 %r10, [%rd0]",
        "ld.global.b64 %r10, [%rd0]",
        "ld.global.v2.b32 %r10, [%rd0]",
        "ld.release.gpu.global.b32 %r10, [%rd0]",
        "st.acquire.gpu.global.b32 [%rd0], %r10",
        "st.param.b32 [kernel_param_0], %r10",
        "atom.global.mul.u32 %r10, [%rd0], %r11",
        "atom.global.add.f16 %rs1, [%rd0], %rs2",
        "atom.global.add.noftz.f32 %r10, [%rd0], %r11",
        "red.global.exch.b32 [%rd0], %r11",
        "cp.async.cg.shared.global [%r10], [%rd0], 8",
        "cp.async.bulk.commit_group",
        "fence.proxy.alias",
        "griddepcontrol.now",
        "prefetch.global.L3 [%rd0]",
        "bar.sync 1",
        "bar.sync 0, 16",
        "bar.arrive 0, 32",
        "mov.u32 %r10, %smid",
        "mbarrier.init.shared.b64 [%r10], 1",
        "trap.now",
    ],
)
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(UnknownInstructionError, match=r"^kernel, PTX line \d+: .* is not known"):
        Program.of(kernel(f"{instruction};\nret;", parameters=[torch.Tensor]))


def test_hints_and_fences_do_nothing():
    body = """
        prefetch.global.L2 [%rd0+999999];
        prefetch.L1 [%rd0];
        prefetchu.L1 [%rd0];
        nanosleep.u32 100;
        membar.gl;
        fence.acq_rel.gpu;
        fence.sc.cta;
        fence.proxy.async;
        fence.proxy.async.global;
        fence.proxy.async.shared::cta;
        griddepcontrol.launch_dependents;
        griddepcontrol.wait;
        bar.warp.sync -1;
        ret;
    """
    assert not run(body, torch.zeros(1))


def test_a_trap_says_who_and_where():
    with pytest.raises(TrapError, match=r"kernel, kernel.py:1, PTX line \d+: trap \[program 1, thread 3\]"):
        run("setp.eq.u32 %p1, %r3, 35;\n@%p1 trap;\nret;", programs=2)


# Atomics ------------------------------------------------------------------------------------------------------------------------


def bf16(value):
    """The bits of the nearest bfloat16, ties to even, from the exact value."""
    number = Fraction(value)
    exponent = 0
    while abs(number) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while number and abs(number) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 7)
    return struct.unpack("<I", struct.pack("<f", float(round(number / step) * step)))[0] >> 16


@pytest.mark.parametrize(
    ("instruction", "before", "operands", "after"),
    [
        ("add.u32", 2**32 - 1, [3], 2),
        ("add.s32", 5, [2**32 - 7], 2**32 - 2),
        ("add.u64", 2**64 - 1, [2], 1),
        ("min.u32", 7, [2**32 - 1], 7),
        ("min.s32", 7, [2**32 - 1], 2**32 - 1),
        ("max.s64", 2**64 - 1, [0], 0),
        ("max.u64", 2**64 - 1, [0], 2**64 - 1),
        ("and.b32", 0b1100, [0b1010], 0b1000),
        ("or.b64", 2**63, [1], 2**63 + 1),
        ("xor.b32", 0b1100, [0b1010], 0b0110),
        ("exch.b32", 5, [9], 9),
        ("cas.b32", 5, [5, 9], 9),
        ("cas.b64", 5, [6, 9], 5),
        ("cas.b16", 5, [5, 9], 9),
        ("inc.u32", 5, [5], 0),
        ("inc.u32", 4, [5], 5),
        ("dec.u32", 0, [5], 5),
        ("dec.u32", 6, [5], 5),
        ("dec.u32", 5, [5], 4),
        ("add.f32", 0x3F800000, [0x33800000], 0x3F800000),  # 1 + 2**-24: a tie, to even
        ("add.f32", 0x00000001, [0x00000001], 0),  # subnormal numbers are zeros in global memory
        ("add.f32", 0x80000001, [0x80000001], 0x80000000),
        ("add.f64", 0x3FF0000000000000, [0x3CB0000000000000], 0x3FF0000000000001),
        ("add.noftz.f16", 0x3C00, [0x0001], 0x3C00),
        ("add.noftz.f16", 0x0001, [0x0001], 0x0002),
        ("add.noftz.f16x2", 0x3C000001, [0x40003C00], 0x42003C00),
        ("add.noftz.bf16", 0x3F80, [0x3F80], 0x4000),
        ("add.noftz.bf16x2", 0x3F803F80, [0x3F804000], 0x40004040),
    ],
)
@pytest.mark.parametrize("name", ["atom", "red"])
def test_atomics_of_one_thread(name, instruction, before, operands, after):
    width = {"16": 16, "64": 64}.get(instruction[-2:], 32)
    if name == "red" and instruction.startswith(("cas", "exch")):
        return
    register = {16: "%rs", 32: "%r", 64: "%rd"}[width]
    moves = "".join(f"mov.b{width} {register}{12 + n}, {value};\n" for n, value in enumerate(operands))
    given = ", ".join(f"{register}{12 + n}" for n in range(len(operands)))
    order = "global.gpu.acq_rel" if "cas" not in instruction else "acq_rel.gpu.global"
    result = f"{register}11, " if name == "atom" else ""
    body = f"{moves}{name}.{order}.{instruction} {result}[%rd0], {given};\n"
    if name == "atom":
        body += f"st.global.b{width} [%rd1], {register}11;"
    dtype = f"u{width // 8}"
    x, y = np.array([before], dtype), np.zeros(1, dtype)
    assert not once(body, torch.from_numpy(x.view(f"i{width // 8}")), torch.from_numpy(y.view(f"i{width // 8}")))
    assert x[0] == after
    assert name == "red" or y[0] == before


def test_shared_memory_keeps_subnormal_numbers():
    y = torch.zeros(1, dtype=torch.int32)
    body = "mov.b32 %r10, 1;\nst.shared.b32 [global_smem], %r10;\nred.shared.add.f32 [global_smem], %r10;\n"
    assert not once(body + "ld.shared.b32 %r11, [global_smem];\nst.global.b32 [%rd0], %r11;", y, shared=4)
    assert y.item() == 2


def test_sums_of_bf16_are_rounded_once():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**16, (1000, 2)).astype(np.uint16)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    bits = bits[(np.abs(np.log2(np.abs(numbers))) < 40).all(1)][:96]
    x, v = bits[:, 0].copy(), bits[:, 1].copy()
    exact = [sum(Fraction(float(n)) for n in row) for row in (bits.astype(np.uint32) << 16).view(np.float32)]
    body = """
        mul.wide.u32 %rd10, %r3, 2;
        add.s64 %rd11, %rd0, %rd10;
        add.s64 %rd12, %rd1, %rd10;
        ld.global.b16 %rs1, [%rd12];
        red.global.add.noftz.bf16 [%rd11], %rs1;
        ret;
    """
    assert not run(body, torch.from_numpy(x.view(np.int16)), torch.from_numpy(v.view(np.int16)), programs=3)
    assert x.tolist() == [bf16(value) for value in exact]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("places", [1, 5, 64])
@pytest.mark.parametrize("operation", ["add.u32", "xor.b32", "max.u32", "exch.b32", "inc.u32"])
def test_lanes_change_one_place_after_the_other(operation, places, seed):
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = f"""
        rem.u32 %r10, %r3, %r42;
        mul.wide.u32 %rd10, %r10, 4;
        add.s64 %rd10, %rd0, %rd10;
        add.s32 %r11, %r3, 1;
        atom.global.{operation} %r12, [%rd10], %r11;
        mul.wide.u32 %rd11, %r3, 4;
        add.s64 %rd11, %rd1, %rd11;
        st.global.b32 [%rd11], %r12;
        ret;
    """
    assert not run(body, x, y, places, programs=4, seed=seed)
    change = {
        "add": lambda old, value: old + value,
        "xor": lambda old, value: old ^ value,
        "max": max,
        "exch": lambda old, value: value,
        "inc": lambda old, value: 0 if old >= value else old + 1,
    }[operation.split(".")[0]]
    for place in range(places):
        todo, state = set(range(place, 128, places)), 0
        if seed is None:
            for lane in sorted(todo):
                assert y[lane] == state
                state = change(state, lane + 1)
            assert x[place] == state
        elif operation in ("add.u32", "exch.b32"):  # what each found tells the order
            by_found = {int(y[lane]): lane for lane in todo}
            while todo:
                lane = by_found[state]
                todo.remove(lane)
                state = change(state, lane + 1)
            assert x[place] == state
    if seed is not None and places == 1 and operation == "exch.b32":
        assert x[0] != 128  # another order than that of their numbers, for these seeds


def test_vectors_are_changed_element_by_element():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0] + [0.0] * 12)
    body = "mov.b32 %r10, 0f3F800000;\nred.global.add.v4.f32 [%rd0], {%r10, %r10, %r10, %r10};\nret;"
    assert not run(body, x, programs=2)
    assert x[:5].tolist() == [65.0, 66.0, 67.0, 68.0, 0.0]


# Asynchronous copies ------------------------------------------------------------------------------------------------------------

#: Each thread copies 16 bytes, waits, and reads what the thread beside copied.
COPIED = """
    mul.wide.u32 %rd10, %r3, 16;
    add.s64 %rd11, %rd0, %rd10;
    add.s64 %rd12, %rd1, %rd10;
    shl.b32 %r10, %r0, 4;
    {copy}
    cp.async.commit_group;
    {wait}
    {barrier}
    xor.b32 %r11, %r10, {apart};
    ld.shared.v4.b32 {{%r12, %r13, %r14, %r15}}, [%r11];
    st.global.v4.b32 [%rd12], {{%r12, %r13, %r14, %r15}};
    ret;
"""
COPY = "cp.async.cg.shared.global [%r10], [%rd11], 16;"


def copied(copy=COPY, wait="cp.async.wait_group 0;", barrier="bar.sync 0;", apart=16, threads=64, programs=2, **options):
    x = torch.arange(threads * programs * 4, dtype=torch.int32)
    y = torch.zeros_like(x)
    body = COPIED.format(copy=copy, wait=wait, barrier=barrier, apart=apart)
    return run(body, x, y, threads=threads, programs=programs, shared=16 * threads, **options), x.view(-1, 4), y.view(-1, 4)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_copies_arrive(wait, checks):
    findings, x, y = copied(wait=wait, checks=checks)
    assert not findings
    assert torch.equal(y, x.view(-1, 2, 4).flip(1).reshape(-1, 4))


def test_copies_that_nobody_waited_for():
    findings, _, y = copied(wait="")
    assert kinds(findings) == [Kind.NOT_AWAITED]
    assert (y == -1).all()
    findings, _, y = copied(wait="cp.async.wait_group 1;")
    assert kinds(findings) == [Kind.NOT_AWAITED]
    findings, _, y = copied(wait="setp.lt.u32 %p1, %r0, 3;\n@%p1 cp.async.wait_group 0;")
    assert findings.counts[next(iter(findings))] == 2 * 61
    assert (y == -1).all(1).tolist() == [(n % 64) ^ 1 >= 3 for n in range(128)]


def test_a_wait_is_of_the_thread_that_copied():
    findings, _, _ = copied(barrier="", apart=0)
    assert not findings
    findings, _, _ = copied(barrier="", apart=16)  # of the same warp, but they went together
    assert not findings
    findings, _, _ = copied(barrier="", apart=512)
    assert kinds(findings) == [Kind.SHARED_RACE]


def test_a_store_onto_a_copy_on_its_way():
    findings, _, _ = copied(copy=COPY + "\nst.shared.b32 [%r10], %r0;")
    assert Kind.NOT_AWAITED in kinds(findings)


def test_a_copy_onto_what_others_read():
    body = """
        shl.b32 %r10, %r0, 4;
        xor.b32 %r11, %r10, 512;
        st.shared.v4.b32 [%r10], {{%r0, %r0, %r0, %r0}};
        bar.sync 0;
        ld.shared.b32 %r12, [%r11];
        {}
        cp.async.cg.shared.global [%r10], [%rd0], 16;
        cp.async.wait_all;
        ret;
    """
    x = torch.zeros(4)
    assert not run(body.format("bar.sync 0;"), x, threads=64, shared=1024)
    (finding,) = run(body.format(""), x, threads=64, shared=1024)
    assert (finding.kind, finding.detail) == (Kind.SHARED_RACE, "read by warp 1")


def test_groups_are_waited_for_in_their_order():
    body = """
        shl.b32 %r10, %r0, 2;
        mul.wide.u32 %rd10, %r0, 4;
        add.s64 %rd11, %rd0, %rd10;
        cp.async.ca.shared.global [%r10], [%rd11], 4;
        cp.async.commit_group;
        cp.async.ca.shared.global [%r10+128], [%rd11+128], 4;
        cp.async.commit_group;
        cp.async.commit_group;
        cp.async.wait_group {};
        ld.shared.b32 %r11, [%r10];
        ld.shared.b32 %r12, [%r10+128];
        ret;
    """
    x = torch.arange(64.0)
    found = {n: [f.text[-8:] for f in run(body.format(n), x, shared=256)] for n in range(4)}
    assert found == {0: [], 1: [], 2: ["r10+128]"], 3: [", [%r10]", "r10+128]"]}


@pytest.mark.parametrize(
    ("copy", "words"),
    [
        ("mov.b32 %r16, 16;\ncp.async.cg.shared.global.L2::128B [%r10], [%rd11], 16, %r16;", [0, 1, 2, 3]),
        ("cp.async.cg.shared::cta.global [%r10 + 0], [%rd11 + 0], 0x10, 0;", [None] * 4),
        ("cp.async.cg.shared.global [%r10], [%rd11], 16, 8;", [0, 1, None, None]),
        ("setp.lt.u32 %p2, %r0, 99;\ncp.async.ca.shared.global [%r10], [%rd11], 16, %p2;", [None] * 4),
        ("setp.gt.u32 %p2, %r0, 99;\ncp.async.ca.shared.global [%r10], [%rd11], 16, %p2;", [0, 1, 2, 3]),
        (
            "cp.async.ca.shared.global [%r10], [%rd11+8], 8;\ncp.async.ca.shared.global [%r10+8], [%rd11+4], 4;\n"
            "cp.async.ca.shared.global [%r10+12], [%rd11], 4, 0;",
            [2, 3, 1, None],
        ),
    ],
)
def test_what_a_copy_does_not_read_is_zero(copy, words):
    findings, x, y = copied(copy=copy, apart=0)
    assert not findings
    for n in range(len(x)):
        assert y[n].tolist() == [0 if word is None else int(x[n, word]) for word in words]


def test_a_copy_reads_no_more_than_it_says():
    body = "cp.async.cg.shared.global [global_smem], [%rd0], 16, {};\ncp.async.wait_all;\nret;"
    x = torch.zeros(8)[:3]
    assert not once(body.format(12), x, shared=16)
    assert not once(body.format(0), None, shared=16)
    assert kinds(once(body.format(13), x, shared=16)) == [Kind.OUTSIDE]
    assert kinds(once(body.format(12), x[1:], shared=16)) == [Kind.MISALIGNED]
