"""What the checks find: each kind of finding, where it was, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from .parser import Instruction


class Kind(StrEnum):
    """What can be wrong with a program that runs to its end."""

    OUTSIDE = "access outside of every tensor"
    OUTSIDE_SHARED = "access outside of the program's shared memory"
    MISALIGNED = "misaligned access"
    SHARED_RACE = "race between warps in shared memory"
    GLOBAL_RACE = "race in global memory"
    UNWRITTEN = "read of shared memory that nobody wrote"
    NOT_AWAITED = "use of a cp.async destination before its wait"
    PART_OF_WARP = "a warp-wide instruction that part of a warp reaches"
    UNEVEN_BARRIER = "barrier that not all threads reach"
    UNFENCED = "shared memory read by wgmma with no fence.proxy.async since it was written"
    EARLY_ACCUMULATOR = "registers of a wgmma in flight, used before its wait"
    WGMMA = "wgmma against its rules"
    EARLY_ACCESS = "access to memory before griddepcontrol.wait"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; equal to any other of the instruction and kind, whoever did it.

    Attributes:
        kind: what.
        kernel: the kernel's name.
        location: lines of its source, innermost first.
        line: of the PTX.
        text: the instruction.
        program, thread: the first that did it.
        detail: more, where there is more to say.
    """

    kind: Kind
    kernel: str
    location: str
    line: int
    text: str
    program: int = field(compare=False)
    thread: int = field(compare=False)
    detail: str = field(default="", compare=False)

    def __str__(self) -> str:
        more = f" ({self.detail})" if self.detail else ""
        where = f"{self.kernel}, {self.location}, PTX line {self.line}: {self.text}"
        return f"{self.kind}{more} in {where} [program {self.program}, thread {self.thread}]"


@dataclass
class Findings:
    """The findings of one or more launches; of one instruction, those of a kind count as one.

    Attributes:
        counts: how many lanes did it, by the first finding of each instruction and kind.
    """

    counts: dict[Finding, int] = field(default_factory=dict)

    def add(self, kind: Kind, kernel: str, instruction: Instruction, program: int, thread: int, count: int, detail: str) -> None:
        """Notes that ``count`` lanes did it, the first being ``thread`` of ``program``."""
        finding = Finding(kind, kernel, instruction.location, instruction.line, instruction.text, program, thread, detail)
        self.counts[finding] = self.counts.get(finding, 0) + count  # a dict keeps the first of equal keys

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def clear(self) -> None:
        """Forgets all."""
        self.counts.clear()
