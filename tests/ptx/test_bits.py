"""Logic, shifts, fields, permutations, counts and moves, bit by bit in Python."""

from __future__ import annotations

import pytest
from _instructions import check, edges, every, run, signed

LETTERS = {16: "h", 32: "r", 64: "d"}


def mask(number: int, bits: int) -> int:
    return number & ((1 << bits) - 1)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic(width):
    letter = LETTERS[width]
    columns = every(edges(width), edges(width, seed=1))
    operands = f"{letter}0, {letter}1, {letter}2"
    check(f"and.b{width} {operands}", lambda a, b: a & b, *columns, result=f"{letter}0")
    check(f"or.b{width} {operands}", lambda a, b: a | b, *columns, result=f"{letter}0")
    check(f"xor.b{width} {operands}", lambda a, b: a ^ b, *columns, result=f"{letter}0")
    check(f"not.b{width} {letter}0, {letter}1", lambda a: mask(~a, width), edges(width), result=f"{letter}0")
    check(f"cnot.b{width} {letter}0, {letter}1", lambda a: int(a == 0), edges(width), result=f"{letter}0")


def test_logic_of_predicates():
    columns = every([0, 1], [0, 1])
    check("and.pred p0, p1, p2", lambda a, b: a & b, *columns, result="p0")
    check("or.pred p0, p1, p2", lambda a, b: a | b, *columns, result="p0")
    check("xor.pred p0, p1, p2", lambda a, b: a ^ b, *columns, result="p0")
    check("not.pred p0, p1", lambda a: 1 - a, [0, 1], result="p0")


AMOUNTS = [0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_beyond_the_width(width):
    letter = LETTERS[width]
    columns = every(edges(width), AMOUNTS)
    for type_, expected in {
        f"shl.b{width}": lambda a, n: mask(a << min(n, 99), width),
        f"shr.b{width}": lambda a, n: a >> min(n, 99),
        f"shr.u{width}": lambda a, n: a >> min(n, 99),
        f"shr.s{width}": lambda a, n: mask(signed(a, width) >> min(n, 99), width),
    }.items():
        check(f"{type_} {letter}0, {letter}1, r2", expected, *columns, result=f"{letter}0")
        for amount in AMOUNTS:
            text = f"{type_} {letter}0, {letter}1, {amount}"
            check(text, lambda a, n=amount, of=expected: of(a, n), edges(width), result=f"{letter}0")


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    columns = every(edges(32, 2), edges(32, 2, seed=1), AMOUNTS)

    def amount(n):
        return n % 32 if mode == "wrap" else min(n, 32)

    check(f"shf.l.{mode}.b32 r0, r1, r2, r3", lambda a, b, n: mask((b << 32 | a) << amount(n) >> 32, 32), *columns)
    check(f"shf.r.{mode}.b32 r0, r1, r2, r3", lambda a, b, n: mask((b << 32 | a) >> amount(n), 32), *columns)


POSITIONS = [0, 1, 5, 16, 31, 32, 33, 63, 64, 255, 256 + 4]


def extracted(a: int, position: int, length: int, type_: str) -> int:
    """The manual's loop."""
    top = int(type_[1:]) - 1
    position, length = position & 0xFF, length & 0xFF
    sign = 0 if type_[0] == "u" or length == 0 else a >> min(position + length - 1, top) & 1
    bits = [a >> position + i & 1 if i < length and position + i <= top else sign for i in range(top + 1)]
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_fields_extracted(type_):
    width = int(type_[1:])
    letter = LETTERS[width]
    numbers = [mask(0xA5A5A5A5_C3C3F00F, width), 1 << (width - 1), mask(-1, width), 0x7FFF]
    columns = every(numbers, POSITIONS, POSITIONS)
    check(f"bfe.{type_} {letter}0, {letter}1, r2, r3", lambda a, b, c: extracted(a, b, c, type_), *columns, result=f"{letter}0")
    for position in POSITIONS:
        for length in POSITIONS:
            text = f"bfe.{type_} {letter}0, {letter}1, {position}, {length}"
            check(text, lambda a, b=position, c=length: extracted(a, b, c, type_), numbers, result=f"{letter}0")


@pytest.mark.parametrize("width", [32, 64])
def test_bit_fields_inserted(width):
    def inserted(a, b, position, length):
        for i in range(length & 0xFF):
            at = (position & 0xFF) + i
            if at < width:
                b = b & ~(1 << at) | (a >> i & 1) << at
        return b

    letter = LETTERS[width]
    columns = every([0, mask(0x5A5A_1234_F00F_8421, width)], [mask(-1, width), 0x1234], POSITIONS, POSITIONS)
    check(f"bfi.b{width} {letter}0, {letter}1, {letter}2, r3, r4", inserted, *columns, result=f"{letter}0")


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_bit_masks(mode):
    def expected(a, b):
        """The manual's steps."""
        start, size = a & 31, b & 31
        first, second = mask(-1 << start, 32), mask(-1 << (start + size), 32)
        beyond = mode == "clamp" and a >= 32
        if beyond:
            first = 0
        if start + size >= 32 or beyond or (mode == "clamp" and b >= 32):
            second = 0
        elif size == 0:
            second = mask(-1, 32)
        return first & ~second

    check(f"bmsk.{mode}.b32 r0, r1, r2", expected, *every([0, 1, 5, 31, 32, 37, 2**31], [0, 1, 8, 27, 31, 32, 33, 64, 2**32 - 1]))


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
@pytest.mark.parametrize("type_", ["s32", "u32"])
def test_extension_of_some_bits(mode, type_):
    def expected(a, b):
        bits = min(b, 32) if mode == "clamp" else b % 32
        low = mask(a, bits)
        return mask(signed(low, bits) if type_ == "s32" and bits else low, 32)

    check(f"szext.{mode}.{type_} r0, r1, r2", expected, *every(edges(32), [0, 1, 2, 8, 31, 32, 33, 64, 2**32 - 1]))


@pytest.mark.parametrize("width", [32, 64])
def test_counts_and_positions(width):
    letter = LETTERS[width]
    numbers = [*edges(width), *(1 << n for n in range(width)), *((1 << n) - 1 for n in range(width))]
    check(f"popc.b{width} r0, {letter}1", lambda a: bin(a).count("1"), numbers)
    check(f"clz.b{width} r0, {letter}1", lambda a: width - a.bit_length(), numbers)
    check(f"brev.b{width} {letter}0, {letter}1", lambda a: int(f"{a:0{width}b}"[::-1], 2), numbers, result=f"{letter}0")

    def found(a, type_):
        size = mask(~a, width) if type_ == "s" and a >> (width - 1) else a
        return mask(size.bit_length() - 1, 32)

    def shift(a, type_):
        at = found(a, type_)
        return at if at == 0xFFFFFFFF else width - 1 - at

    for type_ in "us":
        check(f"bfind.{type_}{width} r0, {letter}1", lambda a, t=type_: found(a, t), numbers)
        check(f"bfind.shiftamt.{type_}{width} r0, {letter}1", lambda a, t=type_: shift(a, t), numbers)


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x40, 0x1A, 0x96, 0xE8, 0xCA])
def test_functions_of_three_bits(table):
    def expected(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    check(f"lop3.b32 r0, r1, r2, r3, {table:#x}", expected, *every(edges(32, 1), edges(32, 1, 1), edges(32, 1, 2)))


def test_permuted_bytes():
    def expected(a, b, selector):
        source = (b << 32 | a).to_bytes(8, "little")
        result = []
        for n in range(4):
            choice = selector >> 4 * n & 15
            byte = source[choice & 7]
            result.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
        return int.from_bytes(result, "little")

    words = [0x80FF7F01, 0x12345678, 0xFEDCBA98]
    selectors = [0x3340, 0x5410, 0x7632, 0x0123, 0x4567, 0xBA98, 0x8F0C, 0xFFFF, 0xABCD_3210]
    check("prmt.b32 r0, r1, r2, r3", expected, *every(words, words, selectors))
    for selector in selectors:
        check(f"prmt.b32 r0, r1, r2, {selector:#x}", lambda a, b, s=selector: expected(a, b, s), *every(words, words))


@pytest.mark.parametrize(
    ("mode", "bytes_"),
    [
        ("f4e", ["3210", "4321", "5432", "6543"]),
        ("b4e", ["5670", "6701", "7012", "0123"]),
        ("rc8", ["0000", "1111", "2222", "3333"]),
        ("ecl", ["3210", "3211", "3222", "3333"]),
        ("ecr", ["0000", "1110", "2210", "3210"]),
        ("rc16", ["1010", "3232", "1010", "3232"]),
    ],
)
def test_permutations_by_mode(mode, bytes_):
    """``bytes_``: the manual's table, the uppermost byte first."""

    def expected(a, b, c):
        source = (b << 32 | a).to_bytes(8, "little")
        return int.from_bytes([source[int(n)] for n in bytes_[c & 3]], "big")

    check(f"prmt.b32.{mode} r0, r1, r2, r3", expected, *every([0x83828180], [0x07060504], [0, 1, 2, 3, 7, 0x64]))


def test_moves():
    numbers = edges(32)
    for type_ in ("b32", "u32", "s32", "f32"):
        check(f"mov.{type_} r0, r1", lambda a: a, numbers)
    check("mov.b64 d0, d1", lambda a: a, edges(64), result="d0")
    assert run("mov.b16 h0, -1")["h0"] == [0xFFFF] * 4
    assert run("mov.u32 r0, 0xffffffffffffffff")["r0"] == [0xFFFFFFFF] * 4
    assert run("mov.b64 d0, 0xffffffffffffffff")["d0"] == [2**64 - 1] * 4
    assert run("mov.b32 r0, 0fFF800000")["r0"] == [0xFF800000] * 4
    assert run("mov.b64 d0, 0dBFF0000000000000")["d0"] == [0xBFF0000000000000] * 4
    assert run("mov.pred p0, -1")["p0"] == [1] * 4
    assert run("mov.pred p0, 0")["p0"] == [0] * 4
    assert run("mov.pred p0, p1", p1=[0, 1])["p0"] == [0, 1]
    assert run("mov.u32 r0, %tid.x")["r0"] == [0, 1, 2, 3]
    assert run("mov.b32 r0, global_smem")["r0"] == [0] * 4


def test_registers_packed_and_unpacked():
    numbers = edges(64)
    got = run("mov.b64 {r0, r1}, d2", d2=numbers)
    assert got["r0"] == [n & 0xFFFFFFFF for n in numbers]
    assert got["r1"] == [n >> 32 for n in numbers]
    assert run("mov.b64 {_, r1}, d2", d2=numbers)["r1"] == [n >> 32 for n in numbers]
    assert run("mov.b64 {r1, _}, d2", d2=numbers)["r1"] == [n & 0xFFFFFFFF for n in numbers]
    got = run("mov.b64 {h0, h1, h2, h3}, d4", d4=numbers)
    assert [got[f"h{n}"] for n in range(4)] == [[number >> 16 * n & 0xFFFF for number in numbers] for n in range(4)]
    check("mov.b32 r0, {h1, h2}", lambda a, b: b << 16 | a, *every(edges(16), edges(16)))
    check("mov.b64 d0, {r1, r2}", lambda a, b: b << 32 | a, *every(edges(32), edges(32)), result="d0")
    check("mov.b64 d0, {h1, h2, h3, h4}", lambda a, b, c, d: d << 48 | c << 32 | b << 16 | a, *[edges(16)] * 4, result="d0")


@pytest.mark.parametrize("type_", ["b16", "b32", "b64", "f32", "f64", "s32", "u64"])
def test_selection(type_):
    width = int(type_[1:])
    letter = LETTERS[width]
    columns = every(edges(width), edges(width, seed=1), [0, 1])
    text = f"selp.{type_} {letter}0, {letter}1, {letter}2, p3"
    check(text, lambda a, b, c: a if c else b, *columns, result=f"{letter}0")


def test_selection_of_constants():
    check("selp.b32 r0, 1, 0, p1", lambda c: c, [0, 1, 1, 0])
    check("selp.f32 r0, 0fFF800000, r1, p2", lambda a, c: 0xFF800000 if c else a, *every(edges(32), [0, 1]))
    check("selp.b16 h0, 7, -1, p1", lambda c: 7 if c else 0xFFFF, [0, 1], result="h0")
