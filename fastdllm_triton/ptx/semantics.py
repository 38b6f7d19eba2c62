"""Which function knows an instruction: the registry that the semantics modules fill, and decoding through it.

Two kinds: of a *scalar* instruction each lane's result depends on that lane's operands alone, so that it is a function of arrays;
an *effect* reads or writes memory, or other lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .lanes import Array, Lanes, Mask, Step, items, reader, writer
from .parser import Instruction, Kernel, PtxError

#: A function from arrays to an array.
Compute = Callable[..., Array]
Function = TypeVar("Function", bound=Callable[..., Any])


class UnknownInstructionError(PtxError):
    """An instruction, or a modifier of one, that nobody wrote down; the message names it, its line and the kernel."""


@dataclass(frozen=True)
class Scalar:
    """A function from arrays to arrays.

    Attributes:
        results: types of the results; their registers are the first operands (the items of a vector count).
        sources: types of the operands after them.
        compute: takes an array a source, ``[N]`` or ``[1]``, of :func:`~fastdllm_triton.ptx.lanes.dtype_of` its type, and returns
            the result, or a tuple of them, of the dtype or the width of its type. It changes none of them.
    """

    results: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[..., Any]


#: Several may know a name: one of integers, one of floats, and so on. Their types tell them apart.
_SCALARS: dict[str, list[Callable[[Instruction], Scalar | None]]] = {}
_EFFECTS: dict[str, Callable[[Instruction], Step | None]] = {}


def scalar(*names: str) -> Callable[[Function], Function]:
    """Registers what turns an instruction of one of these names into a :class:`Scalar`, or into None where it is not known."""

    def register(function: Function) -> Function:
        for name in names:
            _SCALARS.setdefault(name, []).append(function)
        return function

    return register


def effect(*names: str) -> Callable[[Function], Function]:
    """Registers what turns an instruction of one of these names into a step, or into None where it is not known."""

    def register(function: Function) -> Function:
        _EFFECTS.update(dict.fromkeys(names, function))
        return function

    return register


def decode(instruction: Instruction, kernel: Kernel) -> Step:
    """What an instruction does, its guard left aside.

    Raises:
        UnknownInstructionError: nobody wrote it down.
    """
    if make := _EFFECTS.get(instruction.name):
        step = make(instruction)
        if step is not None:
            return step
    elif meaning := scalar_of(instruction):
        return _step(instruction, meaning)
    raise UnknownInstructionError(
        f"{kernel.name}, PTX line {instruction.line}: the instruction {instruction.opcode} is not known: {instruction.text!r}"
    )


def scalar_of(instruction: Instruction) -> Scalar | None:
    """The meaning of a scalar instruction; None if nobody wrote it down."""
    for known in _SCALARS.get(instruction.name, ()):
        meaning = known(instruction)
        if meaning is not None and len(meaning.results) + len(meaning.sources) == _count(instruction):
            return meaning
    return None


def _count(instruction: Instruction) -> int:
    return sum(len(items(operand)) for operand in instruction.operands)


def modifiers(instruction: Instruction, types: int, *known: str) -> frozenset[str] | None:
    """The modifiers between the name and the last parts, which are types; None if one of them is not among ``known``."""
    found = instruction.parts[1 : len(instruction.parts) - types]
    return frozenset(found) if set(found) <= set(known) else None


def _step(instruction: Instruction, meaning: Scalar) -> Step:
    operands = [item for operand in instruction.operands for item in items(operand)]
    count = len(meaning.results)
    writers = [writer(operand, type_) for operand, type_ in zip(operands[:count], meaning.results, strict=True)]
    readers = [reader(operand, type_) for operand, type_ in zip(operands[count:], meaning.sources, strict=True)]
    compute = meaning.compute
    if count == 1 and len(readers) == 2:  # most instructions
        (write,), (left, right) = writers, readers
        return lambda lanes, mask: write(lanes, compute(left(lanes), right(lanes)), mask)
    if count == 1:
        (write,) = writers
        return lambda lanes, mask: write(lanes, compute(*[read(lanes) for read in readers]), mask)

    def step(lanes: Lanes, mask: Mask) -> None:
        results = compute(*[read(lanes) for read in readers])
        for write, result in zip(writers, results, strict=True):
            write(lanes, result, mask)

    return step
