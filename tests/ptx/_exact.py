"""Floating-point arithmetic from its definition: exact rational numbers, rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from random import Random

Number = Fraction | float


@dataclass(frozen=True)
class Format:
    """A binary format.

    Attributes:
        exponent, mantissa: bits of each.
        nan: bits of the canonical NaN; None where any may be returned.
    """

    exponent: int
    mantissa: int
    nan: int | None

    @cached_property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @cached_property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @cached_property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @cached_property
    def normal(self) -> int:
        """Bits of the smallest normal number."""
        return 1 << self.mantissa

    @cached_property
    def minus(self) -> int:
        return 1 << (self.width - 1)

    @cached_property
    def least(self) -> int:
        """The exponent of the last bit of subnormal numbers."""
        return 1 - self.bias - self.mantissa

    @lru_cache(maxsize=1 << 16)  # noqa: B019  (there are few formats)
    def number(self, bits: int) -> Number:
        """A rational, an infinity or NaN."""
        size = bits & (self.minus - 1)
        if size > self.infinity:
            return math.nan
        if size == self.infinity:
            return -math.inf if bits & self.minus else math.inf
        exponent, fraction = divmod(size, self.normal)
        value = Fraction(fraction + (self.normal if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 1 + self.least)
        return -value if bits & self.minus else value

    def bits(self, value: Number, mode: str = "rn", *, negative_zero: bool = False) -> int:
        """Rounds a number; ``rna`` is to nearest with ties away from zero."""
        if isinstance(value, float):
            if math.isnan(value):
                return self.infinity + 1 if self.nan is None else self.nan
            return self.infinity | (self.minus if value < 0 else 0)
        if value == 0:
            return self.minus if negative_zero else 0
        negative, above, below = value < 0, abs(value.numerator), value.denominator
        exponent = above.bit_length() - below.bit_length()
        exponent -= above << max(0, -exponent) < below << max(0, exponent)
        last = max(exponent - self.mantissa, self.least)
        below <<= max(0, last)
        whole, rest = divmod(above << max(0, -last), below)
        up = {
            "rn": 2 * rest + (whole & 1) > below,
            "rna": 2 * rest >= below,
            "rz": False,
            "rm": rest > 0 and negative,
            "rp": rest > 0 and not negative,
        }[mode]
        # The leading one counts as one more exponent, and carries into it.
        result = whole + up + (last - self.least) * self.normal
        if result >= self.infinity:
            outward = mode in ("rn", "rna") or (mode == "rm" and negative) or (mode == "rp" and not negative)
            result = self.infinity if outward else self.infinity - 1
        return result | (self.minus if negative else 0)

    def is_nan(self, bits: int) -> bool:
        return bits & (self.minus - 1) > self.infinity

    def is_subnormal(self, bits: int) -> bool:
        return 0 < bits & (self.minus - 1) < self.normal

    def flush(self, bits: int) -> int:
        """A zero of its sign for what is subnormal."""
        return bits & self.minus if self.is_subnormal(bits) else bits

    def same(self, got: int, want: int) -> bool:
        """Whether two results agree: any NaN does where none is canonical."""
        return got == want or (self.nan is None and self.is_nan(got) and self.is_nan(want))

    def mul(self, a: int, b: int, mode: str = "rn") -> int:
        x, y = self.number(a), self.number(b)
        negative = bool((a ^ b) & self.minus)
        if isinstance(x, float) or isinstance(y, float):
            return self.bits(_times(x, y, negative))
        return self.bits(x * y, mode, negative_zero=negative)

    def fma(self, a: int, b: int, c: int, mode: str = "rn") -> int:
        x, y, z = self.number(a), self.number(b), self.number(c)
        negative = bool((a ^ b) & self.minus)
        if isinstance(x, float) or isinstance(y, float) or isinstance(z, float):
            left = _times(x, y, negative) if isinstance(x, float) or isinstance(y, float) else 0.0
            right = z if isinstance(z, float) else 0.0
            return self.bits(left + right)
        total = x * y + z
        both = x * y == 0 and z == 0 and negative == bool(c & self.minus)
        return self.bits(total, mode, negative_zero=negative if both else mode == "rm")

    def add(self, a: int, b: int, mode: str = "rn") -> int:
        return self.fma(a, self.bias << self.mantissa, b, mode)

    def div(self, a: int, b: int, mode: str = "rn") -> int:
        x, y = self.number(a), self.number(b)
        negative = bool((a ^ b) & self.minus)
        if x != x or y != y:
            return self.bits(math.nan)
        infinite_x, infinite_y = isinstance(x, float), isinstance(y, float)
        if infinite_x or infinite_y or y == 0:
            if (infinite_x and infinite_y) or (x == 0 and y == 0):
                return self.bits(math.nan)
            return (
                self.bits(Fraction(0), negative_zero=negative) if infinite_y else self.bits(-math.inf if negative else math.inf)
            )
        return self.bits(Fraction(x) / Fraction(y), mode, negative_zero=negative)

    def sqrt(self, a: int, mode: str = "rn") -> int:
        x = self.number(a)
        if x == 0 or x == math.inf:
            return a
        if x != x or x < 0:
            return self.bits(math.nan)
        assert isinstance(x, Fraction)
        # With 200 more bits the integer root is close enough to tell any rounding, and is exact if the root is.
        scaled = x * Fraction(4) ** 1300
        root = math.isqrt(scaled.numerator // scaled.denominator)
        exact = root * root == scaled
        return self.bits((Fraction(root) + (0 if exact else Fraction(1, 2))) / Fraction(2) ** 1300, mode)

    def extreme(self, name: str, a: int, b: int, *, nan: bool = False) -> int:
        """The manual's ``min`` and ``max``."""
        if self.is_nan(a) or self.is_nan(b):
            if nan or (self.is_nan(a) and self.is_nan(b)):
                return self.bits(math.nan)
            return b if self.is_nan(a) else a
        low, high = sorted((a, b), key=lambda bits: (self.number(bits), not bits & self.minus))
        return low if name == "min" else high


def _times(x: Number, y: Number, negative: bool) -> float:
    """Of which one at least is infinite or NaN."""
    if x != x or y != y or x == 0 or y == 0:
        return math.nan
    return -math.inf if negative else math.inf


F16 = Format(5, 10, 0x7FFF)
BF16 = Format(8, 7, 0x7FFF)
F32 = Format(8, 23, 0x7FFFFFFF)
F64 = Format(11, 52, None)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def samples(form: Format, more: int = 8, seed: int = 0) -> list[int]:
    """Numbers where something may go wrong, of both signs: zeros, limits, subnormal ones, infinities, NaN, and random bits."""
    one, step = form.bias << form.mantissa, form.normal
    fixed = [0, 1, step - 1, step, step + 1, one, one + 1, one - 1, one + step, form.infinity - 1, form.infinity]
    both = [*fixed, *(form.minus | bits for bits in fixed)]
    nans = [form.infinity | step >> 1, form.minus | form.infinity | 1]
    random = Random(seed)
    return [*both, *nans, *(random.getrandbits(form.width) for _ in range(more)), *(near(form, random) for _ in range(more))]


def near(form: Format, random: Random) -> int:
    """A number of moderate size."""
    exponent = form.bias + random.randrange(-3, 4)
    return random.getrandbits(1) * form.minus | exponent << form.mantissa | random.getrandbits(form.mantissa)


def ties(form: Format, count: int, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Operands whose product or sum lies half-way between two numbers, or almost."""
    random = Random(seed)
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    while len(columns[0]) < count:
        a, b = near(form, random), near(form, random)
        kind = random.randrange(4)
        x = form.number(a)
        assert isinstance(x, Fraction)
        if kind == 0:  # one significant bit less than a tie needs
            b = form.bits(Fraction(1) + Fraction(1, 2 ** random.randrange(1, form.mantissa + 1)))
        y = form.number(b)
        assert isinstance(y, Fraction)
        if kind == 1:  # the addend brings it to a tie
            product = x * y
            near_product = form.number(form.bits(product))
            assert isinstance(near_product, Fraction)
            unit = abs(near_product) / 2**form.mantissa
            c = form.bits(near_product * random.choice([1, 3, 16]) + unit / 2 * random.choice([1, -1]) - product)
        elif kind == 2:  # the addend is far below
            c = form.bits(x * y * random.choice([1, -1]) / 2 ** random.randrange(form.mantissa, 4 * form.mantissa))
        else:  # the product is
            c = form.bits(x * y * random.choice([1, -1]) * 2 ** random.randrange(1, 3 * form.mantissa))
        if not isinstance(form.number(c), float):
            for column, bits in zip(columns, (a, b, c), strict=True):
                column.append(bits)
    return columns
