"""A kernel made ready to run: steps instead of instructions, and which registers nobody needs any more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

# Importing them fills the registry.
from . import (  # noqa: F401
    approximations,
    atomics,
    bits,
    comparisons,
    conversions,
    copies,
    floats,
    half,
    integers,
    mma,
    transfers,
    wgmma,
)
from .accesses import Space, smallest
from .lanes import Lanes, Mask, Step, items, registers_of
from .parser import Block, Instruction, Kernel, Special
from .pointers import Origin, origins
from .semantics import UnknownInstructionError, decode, scalar_of
from .warp import together

#: Special registers that there are (PTX ISA, chapter 10).
SPECIAL = frozenset(
    {f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
    | {"laneid", "warpid", "nwarpid"}
    | {f"lanemask_{order}" for order in ("eq", "le", "lt", "ge", "gt")}
)
#: Effects of which the first operand is written, whatever it was.
_RESULT_FIRST = frozenset({"ld", "atom", "shfl", "redux", "vote", "match", "elect", "activemask", "ldmatrix", "mma", "movmatrix"})
#: Effects on registers alone: what they do in the lanes of programs that have ended does no harm.
_HARMLESS = frozenset({"shfl", "redux", "vote", "match", "elect", "activemask", "mma", "movmatrix", "createpolicy"})


class Action(NamedTuple):
    """An instruction of a block.

    Attributes:
        instruction: as it was parsed.
        step: what it does.
        guard: slot of its predicate, or None.
        negated: of ``@!%p``.
        harmless: whether it may run in lanes that have ended.
        last: slots of registers that nobody reads after it.
    """

    instruction: Instruction
    step: Step
    guard: int | None
    negated: bool
    harmless: bool
    last: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """A block made ready.

    Attributes:
        actions: its instructions, but for the end.
        end: the instruction that ends it; None where the next block follows.
        target: the block that a branch goes to.
        whole: whether a warp has to be together for it.
    """

    actions: tuple[Action, ...]
    end: Instruction | None
    target: int | None
    whole: bool


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel made ready.

    Attributes:
        kernel: it.
        sequences: its blocks.
        widest: bytes that a lane needs for registers, at most.
        origins: its accesses to global memory.
        granule: bytes of its smallest access to shared memory.
        has_wgmma: whether it reads shared memory through the async proxy.
    """

    kernel: Kernel
    sequences: tuple[Sequence, ...]
    widest: int
    origins: tuple[Origin, ...]
    granule: int
    has_wgmma: bool

    @classmethod
    def of(cls, kernel: Kernel) -> Program:
        """The program of a kernel; made once for each.

        Raises:
            ValueError: its threads are no whole warps, or more than 1024.
            UnknownInstructionError: the kernel has an instruction, a barrier or a special register that nobody wrote down.
        """
        return _make(kernel)


@lru_cache(maxsize=1024)
def _make(kernel: Kernel) -> Program:
    if kernel.threads % 32 or not 32 <= kernel.threads <= 1024:
        raise ValueError(f"{kernel.name}: programs of {kernel.threads} threads, not of whole warps up to 1024")
    instructions = kernel.instructions
    for instruction in instructions:
        _check(instruction, kernel)
    watched = wgmma.watched(kernel)
    uses = [[_uses(instruction) for instruction in block.instructions] for block in kernel.blocks]
    sequences, widest = [], 0
    for block, used, after in zip(kernel.blocks, uses, _living(kernel.blocks, uses), strict=True):
        sequence, most = _sequence(block, used, after, kernel, watched)
        sequences.append(sequence)
        widest = max(widest, most)
    has_wgmma = any(instruction.name == "wgmma" for instruction in instructions)
    granule = smallest(instructions, Space.SHARED)
    return Program(kernel, tuple(sequences), widest, tuple(origins(kernel)), granule, has_wgmma)


def _check(instruction: Instruction, kernel: Kernel) -> None:
    """Refuses what no step would."""

    def refuse(what: str) -> None:
        raise UnknownInstructionError(f"{kernel.name}, PTX line {instruction.line}: {what} is not known: {instruction.text!r}")

    for operand in instruction.operands:
        for item in items(operand):
            if isinstance(item, Special) and item.name not in SPECIAL:
                refuse(f"the special register %{item.name}")
    if instruction.name in ("bar", "barrier") and not instruction.opcode.startswith("bar.warp"):
        number, *threads = [getattr(operand, "value", None) for operand in instruction.operands]
        if instruction.opcode not in ("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync"):
            refuse(f"the barrier {instruction.opcode}")
        if number != 0 or threads not in ([], [kernel.threads]):
            refuse("a barrier but that of all threads, 0,")


def _sequence(block: Block, uses: list[_Uses], after: set[int], kernel: Kernel, watched: frozenset[int]) -> tuple[Sequence, int]:
    """A block made ready, and bytes that a lane needs for registers in it, at most."""
    live = set(after)
    if block.end is not None and block.end.guard is not None:
        live.add(block.end.guard.slot)
    size = most = _bytes(live, kernel)
    actions: list[Action] = []
    for instruction, used in zip(reversed(block.instructions), reversed(uses), strict=True):
        last = tuple((used.written | used.read) - live)
        most = max(most, size + _bytes(last, kernel))
        gone, new = (used.written & live) - used.read, used.read - live
        live = (live - used.written) | used.read
        size += _bytes(new, kernel) - _bytes(gone, kernel)
        step = _guarded(decode(instruction, kernel), wgmma.guard(instruction, watched))
        guard = instruction.guard.slot if instruction.guard is not None else None
        actions.append(Action(instruction, step, guard, instruction.negated, used.harmless, last))
    whole = any(together(instruction) for instruction in block.instructions)
    return Sequence(tuple(reversed(actions)), block.end, block.target, whole), most


def _guarded(step: Step, check: Step | None) -> Step:
    """A step that looks first whether its registers are a wgmma's in flight."""
    if check is None:
        return step
    look = check

    def both(lanes: Lanes, mask: Mask) -> None:
        look(lanes, mask)
        step(lanes, mask)

    return both


def _bytes(slots: Iterable[int], kernel: Kernel) -> int:
    return sum(max(kernel.registers[slot] // 8, 1) for slot in slots)


class _Uses(NamedTuple):
    """What an instruction does with registers, by slots.

    Attributes:
        written: whatever they were.
        read: those too of which it is not certain, so that they are kept.
        harmless: as :attr:`Action.harmless`.
    """

    written: set[int]
    read: set[int]
    harmless: bool


def _uses(instruction: Instruction) -> _Uses:
    meaning = scalar_of(instruction)
    operands = [item for operand in instruction.operands for item in items(operand)]
    count = 0
    if meaning is not None:
        count = len(meaning.results)
    elif instruction.name in _RESULT_FIRST:
        count = len(items(instruction.operands[0]))
    written = {register.slot for operand in operands[:count] for register in registers_of(operand)}
    read = {register.slot for operand in operands[count:] for register in registers_of(operand)}
    harmless = meaning is not None or instruction.name in _HARMLESS
    if instruction.guard is not None:  # the old value stays where it is false
        return _Uses(set(), written | read | {instruction.guard.slot}, harmless)
    return _Uses(written, read, harmless)


def _living(blocks: list[Block], uses: list[list[_Uses]]) -> list[set[int]]:
    """Of each block, the registers that are read after it."""
    written: list[set[int]] = []
    read: list[set[int]] = []
    for block, used in zip(blocks, uses, strict=True):
        new: set[int] = set()
        old: set[int] = set()
        for one in used:
            old |= one.read - new
            new |= one.written
        if block.end is not None and block.end.guard is not None:
            old |= {block.end.guard.slot} - new
        written.append(new)
        read.append(old)
    before: list[set[int]] = [set(slots) for slots in read]
    after: list[set[int]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for n in range(len(blocks) - 1, -1, -1):
            out: set[int] = set().union(*(before[follower] for follower in _followers(blocks, n)))
            if out != after[n]:
                after[n] = out
                before[n] = read[n] | (out - written[n])
                changed = True
    return after


def _followers(blocks: list[Block], n: int) -> list[int]:
    end, target = blocks[n].end, blocks[n].target
    found = [] if target is None else [target]
    leaves = end is not None and end.name in ("bra", "ret", "exit") and end.guard is None
    if not leaves and n + 1 < len(blocks):
        found.append(n + 1)
    return found
