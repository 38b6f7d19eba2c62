"""What runs one instruction on lanes whose registers a test sets, as bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product

import numpy as np

from fastdllm_triton.ptx import (  # noqa: F401  (they register what they know)
    approximations,
    bits,
    comparisons,
    conversions,
    floats,
    half,
    integers,
)
from fastdllm_triton.ptx.findings import Findings
from fastdllm_triton.ptx.lanes import UNSIGNED, Lanes
from fastdllm_triton.ptx.parser import Kernel, parse
from fastdllm_triton.ptx.semantics import decode

#: Registers by the first letter of their names: ``%p0`` to ``%p7``, and so on.
WIDTHS = {"p": 1, "h": 16, "r": 32, "d": 64}
_BODY = """
.target sm_90a
.visible .entry kernel()
.reqntid {threads}
{{
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<8>;
.reg .b64 %d<8>;
{instruction};
ret;
}}
"""

Column = Iterable[int]


_NAME = re.compile(r"\b(?<![%$.])([phrd][0-7])\b")


def _names(instruction: str) -> set[str]:
    return set(_NAME.findall(instruction))


@lru_cache
def _kernel(instruction: str, threads: int) -> Kernel:
    return parse(_BODY.format(instruction=_NAME.sub(r"%\1", instruction), threads=threads))


def _step(instruction: str, threads: int, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kernel = _kernel(instruction, threads)
    lanes = Lanes(kernel, np.zeros(1, np.int64), {}, {"tid.x": np.arange(threads, dtype=np.uint32)}, None, None, Findings())
    slots = {f"{kind}{n}": 8 * place + n for place, kind in enumerate(WIDTHS) for n in range(8)}
    for name, values in registers.items():
        values.flags.writeable = False
        lanes.registers[slots[name]] = values
    block = kernel.blocks[0]
    with np.errstate(all="ignore"):
        decode(block.instructions[0], kernel)(lanes, None)
    return {name: lanes.spread(lanes.registers[slots[name]]) for name in _names(instruction)}


def run(instruction: str, **registers: Column) -> dict[str, list[int]]:
    """The registers of an instruction, as bits, after one such as ``add.s32 r0, r1, r2``.

    It runs on many lanes, and again with each register set to one value for all of them, which may take another path.
    """
    values = {name: np.array(list(column), UNSIGNED[WIDTHS[name[0]]]) for name, column in registers.items()}
    threads = max((len(column) for column in values.values()), default=4)
    assert all(len(column) == threads for column in values.values())
    results = _step(instruction, threads, values)
    for some in [{name} for name in values] + ([set(values)] if len(values) > 1 else []):
        single = {name: column[:1].copy() if name in some else column for name, column in values.items()}
        repeated = {name: np.repeat(column, threads // len(column)) for name, column in single.items()}
        one, all_ = _step(instruction, threads, single), _step(instruction, threads, repeated)
        for name in results:
            assert np.array_equal(one[name], all_[name]), f"{instruction}: {name} differs with {some} the same in all lanes"
    return {name: [int(value) for value in column] for name, column in results.items()}


def check(instruction: str, expected: Callable[..., int], *columns: Column, result: str = "r0") -> None:
    """Compares a result with a function of the operands' bits, given as columns of equal length.

    The operands are registers 1, 2, 3 of the instruction's text.
    """
    operands = sorted(set(re.findall(r"\b[phrd][1-7]\b", instruction)), key=lambda name: name[1])
    rows = list(zip(*columns, strict=True))
    assert len(operands) == len(columns) and rows
    got = run(instruction, **dict(zip(operands, columns, strict=True)))[result]
    for row, value in zip(rows, got, strict=True):
        want = expected(*row)
        shown = ", ".join(f"{operand:#x}" for operand in row)
        assert value == want, f"{instruction} of {shown} gives {value:#x}, not {want:#x}"


def every(*values: Iterable[int]) -> list[list[int]]:
    """Columns of all combinations."""
    return [list(column) for column in zip(*product(*values), strict=True)]


def signed(value: int, width: int) -> int:
    """The bits of an integer, with their sign."""
    return value - (1 << width) if value >> (width - 1) & 1 else value


def edges(width: int, more: int = 6, seed: int = 0) -> list[int]:
    """Integers of a width where something may go wrong, and some random ones."""
    top = 1 << (width - 1)
    fixed = {0, 1, 2, 7, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, int("5A" * (width // 8), 16)}
    random = np.random.default_rng(seed + width)
    return sorted(fixed | {int(n) for n in random.integers(0, 2 * top - 1, more, np.uint64, endpoint=True)})
