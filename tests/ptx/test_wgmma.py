"""wgmma: matrices in shared memory by the manual's canonical layouts, in registers by its figures, and every type."""

import numpy as np
import pytest
from ptx._elements import some, to_bits
from ptx._layouts import SWIZZLES, descriptor
from ptx._warps import Bench
from ptx._wgmmas import (
    AFTER,
    BEFORE,
    BF16,
    END,
    GROUPS,
    HEAD,
    LANES,
    PARTS,
    PROGRAMS,
    START_B,
    bits_of,
    d_names,
    prepared,
    result,
    text_of,
)

from fastdllm_triton.ptx.semantics import UnknownInstructionError


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
