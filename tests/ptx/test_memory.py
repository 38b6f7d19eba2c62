import itertools

import numpy as np
import pytest
import torch
from _programs import COPY, Run, kinds, run

from fastdllm_triton.ptx.cells import Distinct, zeros
from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.ptx.machine import _resident
from fastdllm_triton.ptx.memory import GlobalMemory, Region


def read_at(offset, size=4):
    """Thread 0 reads at a byte of the first tensor, and writes what it got to the second."""
    register = {1: "%rs1", 2: "%rs1", 4: "%r10", 8: "%rd10"}
    if size <= 8:
        target, source = register[size], register[size]
        load = f"@%p1 ld.global.b{8 * size} {target}, [%rd0+{offset}]; @%p1 st.global.b{8 * size} [%rd1], {source};"
    else:
        load = f"@%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd0+{offset}];"
        load += "@%p1 st.global.v4.b32 [%rd1], {%r10, %r11, %r12, %r13};"
    return f"setp.eq.u32 %p1, %r0, 0;\n{load}\nret;"


def write_at(offset, size=4):
    """Thread 0 writes zeros at a byte of the first tensor."""
    store = (
        f"st.global.b32 [%rd0+{offset}], %r10;" if size == 4 else f"st.global.v4.b32 [%rd0+{offset}], {{%r10, %r10, %r10, %r10}};"
    )
    return f"setp.eq.u32 %p1, %r0, 0;\nmov.b32 %r10, 0;\n@%p1 {store}\nret;"


def elements(tensor):
    """The bytes of a tensor's elements, counted from the first."""
    item, found = tensor.element_size(), set()
    for index in itertools.product(*map(range, tensor.size())):
        start = sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) * item
        found.update(range(start, start + item))
    return found


LAYOUTS = [
    ((5,), (1,)),
    ((5,), (3,)),
    ((3, 5), (8, 1)),
    ((5, 3), (1, 8)),
    ((3, 4, 5), (40, 8, 1)),
    ((3, 4, 5), (32, 8, 1)),
    ((2, 3, 4), (3, 7, 24)),
    ((4, 3), (1, 2)),  # overlapping
    ((4, 6), (6, 0)),  # expanded
    ((2, 2, 4), (12, 8, 1)),  # rows that meet
    ((1, 5, 1), (99, 2, 7)),
    ((), ()),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(("sizes", "strides"), LAYOUTS, ids=str)
def test_region_holds_the_elements_of_a_tensor_and_no_gap(sizes, strides, dtype):
    tensor = torch.zeros(400, dtype=dtype)[7:].as_strided(sizes, strides)
    memory = GlobalMemory({"x": tensor})
    (region,) = memory.regions
    inside = elements(tensor)
    low = region.extent.low - tensor.data_ptr()
    for size in (1, 2, 4, 8, 16):
        step = min(size, tensor.element_size())
        offset = np.arange(-low % step, 400 * tensor.element_size(), step, dtype=np.uint64)
        expected = np.array([all(low + int(o) + n in inside for n in range(size)) for o in offset])
        found = region.holds(offset, size)
        np.testing.assert_array_equal(np.ones(len(offset), bool) if found is None else found, expected, err_msg=f"{size} bytes")
        some = offset[expected]
        assert not len(some) or region.holds(some, size) is None


def test_interleaved_elements_count_as_one_run():
    region = Region.of("x", torch.zeros(100).as_strided((2, 3), (4, 3)))
    assert (region.run, region.steps, region.length) == (44, (), 44)


@pytest.mark.parametrize("checks", [False, True])
def test_copies_bits_of_any_type(checks):
    x = torch.arange(192, dtype=torch.int64).view(torch.bfloat16)
    y = torch.zeros_like(x)
    assert not run(COPY, x, y, programs=12, checks=checks)
    assert torch.equal(x.view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize("checks", [False, True])
def test_a_store_one_element_too_far_is_dropped_and_noted(checks):
    x, storage = torch.arange(64.0), torch.full((64,), -1.0)
    findings = run(COPY, x, storage[:63], programs=2, checks=checks)
    (finding,) = findings
    assert finding.kind is Kind.OUTSIDE
    assert (finding.program, finding.thread, findings.counts[finding]) == (1, 31, 1)
    assert finding.text.startswith("st.global.b32")
    assert finding.detail == "4 bytes behind the end of kernel_param_1"
    assert finding.location == "kernel.py:1"
    assert torch.equal(storage, torch.cat([x[:63], torch.tensor([-1.0])]))


def test_a_load_outside_reads_ones_and_is_noted():
    x, y = torch.arange(32.0), torch.zeros(64, dtype=torch.int32)
    findings = run(COPY, x[:30], y[:32])
    assert kinds(findings) == [Kind.OUTSIDE]
    assert y[:32].tolist() == [*x[:30].view(torch.int32).tolist(), -1, -1]


def test_a_pointer_does_not_lead_to_another_tensor():
    storage = torch.zeros(128)
    x, y = storage[:64], storage[64:]
    (finding,) = run(write_at(256), x, y)
    assert finding.detail == "4 bytes behind the end of kernel_param_0, inside of kernel_param_1"
    (finding,) = run(write_at(-4), y, x)
    assert finding.detail == "4 bytes before kernel_param_0, inside of kernel_param_1"


def test_gaps_between_rows_are_outside():
    storage = torch.ones(4, 8)
    x = storage[:, :5]
    for offset, outside in ((16, False), (20, True), (28, True), (32, False), (112, False), (116, True)):
        storage.fill_(1)
        assert kinds(run(write_at(offset), x)) == [Kind.OUTSIDE] * outside, offset
        assert storage.view(-1)[offset // 4] == (1 if outside else 0)
    (finding,) = run(write_at(20), x)
    assert finding.detail == "in a gap of kernel_param_0"
    assert kinds(run(write_at(16, 16), x)) == [Kind.OUTSIDE]  # its first element is within, its last is not
    assert not run(write_at(32, 16), x)


def test_a_vector_with_gaps_between_its_ends_is_outside():
    x = torch.zeros(64, dtype=torch.int16)[::3]  # of 8 bytes at 0 the first and the last element are x's
    assert kinds(run(read_at(0, 8), x, torch.zeros(8))) == [Kind.OUTSIDE]
    assert not run(read_at(6, 2), x, torch.zeros(8))


@pytest.mark.parametrize(("offset", "size"), [(1, 2), (2, 4), (4, 8), (8, 16), (12, 16)])
def test_misaligned_accesses_are_noted(offset, size):
    x, y = torch.arange(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    (finding,) = run(read_at(offset, size), x, y)
    assert (finding.kind, finding.detail) == (Kind.MISALIGNED, f"of {size} bytes")
    assert y.view(torch.uint8)[:size].tolist() == [0xFF] * size
    assert not run(read_at(2 * size, size), x, y)
    assert bytes(y.numpy())[:size] == bytes(x.numpy())[2 * size : 3 * size]


def test_a_view_that_begins_anywhere_is_aligned_by_its_address():
    x = torch.arange(64, dtype=torch.int16)
    assert kinds(run(read_at(0), x[1:], torch.zeros(4))) == [Kind.MISALIGNED]
    y = torch.zeros(4, dtype=torch.int16)
    assert not run(read_at(2), x[1:], y)
    assert y.tolist() == [2, 3, 0, 0]


@pytest.mark.parametrize("nothing", [None, torch.zeros(0), torch.zeros(3, 0)], ids=["None", "0", "3x0"])
def test_nothing_can_be_read_of_what_has_no_elements(nothing):
    y = torch.zeros(4, dtype=torch.int32)
    assert kinds(run(read_at(0), nothing, y)) == [Kind.OUTSIDE]
    assert y.tolist() == [-1, 0, 0, 0]


def test_uniform_addresses_are_read_once_for_all():
    x, y = torch.arange(8.0), torch.zeros(64)
    body = """
        ld.global.b32 %r10, [%rd0+12];
        mul.wide.u32 %rd10, %r3, 4;
        add.s64 %rd11, %rd1, %rd10;
        st.global.b32 [%rd11], %r10;
        ret;
    """
    assert not run(body, x, y, programs=2)
    assert y.tolist() == [3.0] * 64
    findings = run(body.replace("+12", "+32"), x, y, programs=2)
    assert [findings.counts[f] for f in findings] == [64]


def test_addresses_chosen_between_two_tensors():
    a, b, y = torch.arange(32.0), torch.arange(32.0) + 100, torch.zeros(32)
    body = """
        and.b32 %r10, %r0, 1;
        setp.eq.u32 %p1, %r10, 0;
        selp.b64 %rd10, %rd0, %rd1, %p1;
        mul.wide.u32 %rd11, %r0, 4;
        add.s64 %rd10, %rd10, %rd11;
        ld.global.b32 %r11, [%rd10];
        add.s64 %rd12, %rd2, %rd11;
        st.global.b32 [%rd12], %r11;
        ret;
    """
    assert not run(body, a, b, y)
    assert y.tolist() == [n if n % 2 == 0 else n + 100 for n in range(32)]


def test_addresses_read_from_memory():
    a, b, y = torch.arange(32.0), torch.arange(32.0) + 100, torch.zeros(32)
    table = torch.tensor([b.data_ptr(), a.data_ptr()])
    body = """
        and.b32 %r10, %r0, 1;
        mul.wide.u32 %rd10, %r10, 8;
        add.s64 %rd10, %rd0, %rd10;
        ld.global.b64 %rd11, [%rd10];
        mul.wide.u32 %rd12, %r0, 4;
        add.s64 %rd11, %rd11, %rd12;
        ld.global.b32 %r11, [%rd11];
        add.s64 %rd13, %rd1, %rd12;
        st.global.b32 [%rd13], %r11;
        ret;
    """
    assert not run(body, table, y, a, b)
    assert y.tolist() == [n + 100 if n % 2 == 0 else n for n in range(32)]


def test_an_index_read_from_memory_stays_in_its_tensor():
    x, y = torch.arange(32.0), torch.zeros(32)
    index = torch.arange(31, -1, -1)
    body = """
        mul.wide.u32 %rd10, %r0, 8;
        add.s64 %rd10, %rd0, %rd10;
        ld.global.b64 %rd11, [%rd10];
        shl.b64 %rd11, %rd11, 2;
        add.s64 %rd11, %rd1, %rd11;
        ld.global.b32 %r11, [%rd11];
        mul.wide.u32 %rd12, %r0, 4;
        add.s64 %rd13, %rd2, %rd12;
        st.global.b32 [%rd13], %r11;
        ret;
    """
    assert not run(body, index, x, y)
    assert y.tolist() == x.flip(0).tolist()
    index[5] = (y.data_ptr() - x.data_ptr()) // 4
    (finding,) = run(body, index, x, y)
    assert finding.kind is Kind.OUTSIDE
    assert finding.detail.endswith("inside of kernel_param_2")


def test_views_of_one_storage_see_each_other():
    storage = torch.arange(65.0)
    assert not run(COPY, storage[:48], storage[32:])
    assert torch.equal(storage[32:64], torch.arange(32.0))
    assert not run(COPY, storage[:-1], storage[1:])  # a warp reads before it writes
    assert torch.equal(storage[:33], torch.tensor([0.0, *range(32)]))
    assert kinds(run(COPY, storage[:-1], storage[1:], threads=64)) == [Kind.GLOBAL_RACE]


@pytest.mark.parametrize("checks", [False, True])
def test_tensors_of_more_than_2_to_the_31_elements_cost_nothing(checks):
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    before = _resident()
    y = torch.zeros(2, dtype=torch.int32)
    far = 2 * 2**31 + 64
    body = f"""
        setp.eq.u32 %p1, %r0, 0;
        mov.b32 %r10, 77;
        mov.b64 %rd10, {far};
        add.s64 %rd10, %rd0, %rd10;
        @%p1 st.global.b32 [%rd10], %r10;
        @%p1 ld.global.b32 %r11, [%rd10];
        @%p1 st.global.b32 [%rd1], %r11;
        @%p1 ld.global.b32 %r11, [%rd10+64];
        ret;
    """
    findings = run(body, x, y, checks=checks)
    assert y.tolist() == [77, 0]
    assert [(f.kind, f.text[-5:-1]) for f in findings] == [(Kind.OUTSIDE, "0+64")]
    assert _resident() - before < 64 << 20


def test_memory_that_a_program_needs_is_limited():
    with pytest.raises(MemoryError, match=r"kernel: a program needs \d+ bytes .*; 1000 are allowed"):
        Run("ret;", shared=4096, limit=1000)
    for checks, expected in ((False, 4), (True, 2)):  # its checks need memory as well
        few = Run("ret;", shared=4096, programs=64, limit=20_000, checks=checks)
        assert len(few.machine._waiting[0]) == expected
    assert len(Run("ret;", programs=64).machine._waiting) == 1


def test_memory_that_grows_is_limited():
    ready = Run("ret;", programs=4, limit=1 << 26)
    ready.machine._before = _resident() - (1 << 26) - 1
    with pytest.raises(MemoryError, match=r"needs \d+ bytes beside its tensors; 67108864 are allowed"):
        ready.go()


def test_zeros_take_no_memory_before_they_are_touched():
    before = _resident()
    large = zeros(1 << 40)
    assert large[1 << 39] == 0 and len(large) == 1 << 40
    assert _resident() - before < 1 << 20


def test_distinct_places():
    distinct, instruction = Distinct(), object()
    turned = np.arange(64).reshape(8, 8).T.reshape(-1)
    assert distinct(instruction, np.arange(5)) and distinct(instruction, np.array([3]))
    assert distinct(instruction, turned) and distinct(instruction, turned + 9)
    twice = turned.copy()
    twice[5] = twice[50]
    assert not distinct(instruction, twice)
    assert distinct(instruction, turned + 1)
