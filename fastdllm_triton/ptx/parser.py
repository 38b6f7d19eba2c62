"""Reads the PTX that Triton makes into kernels of typed instructions.

Only what LLVM's back-end and Triton's inline assembly write is read (PTX ISA, chapters 4, "Syntax", and 5, "State Spaces, Types,
and Variables"): one entry, no calls, no local memory.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import NoReturn


class PtxError(ValueError):
    """PTX that is not understood; the message names the kernel, the line and its text."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register.

    Attributes:
        name: as it is written.
        slot: its place in :attr:`Kernel.registers`.
        bits: its width; 1 of a predicate.
    """

    name: str
    slot: int
    bits: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant: an integer, possibly negative, or the bits of ``0f3F800000`` and ``0d...``."""

    value: int


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as ``%tid.x`` (PTX ISA, chapter 10), without the ``%``."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A label, a parameter, or the name of shared memory."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``, in bytes."""

    base: Register | Immediate | Symbol
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``, or the two results of ``a|b``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Sink:
    """``_``: a result that nobody wants."""


Operand = Register | Immediate | Special | Symbol | Address | Vector | Sink


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all modifiers, such as ``ld.global.v4.b32``.
        operands: in order, results first.
        guard: the predicate of ``@%p`` and ``@!%p``.
        negated: of ``@!%p``.
        location: lines of the kernel's source, innermost first: ``_pdl.py:65, called at _attention.py:31``.
        line: of the PTX, from 1.
        text: as it is written.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    location: str
    line: int
    text: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @property
    def name(self) -> str:
        """What comes before the modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def type(self) -> str:
        """The last modifier: most instructions' type."""
        return self.opcode.rsplit(".", 1)[-1]


@dataclass(slots=True)
class Block:
    """Instructions that run one after the other.

    Attributes:
        instructions: without the one that ends it.
        end: a branch, a return, a barrier or a wait for the launch before; None where the next block follows.
        target: the block that a branch goes to.
    """

    instructions: list[Instruction]
    end: Instruction | None
    target: int | None


@dataclass(slots=True, eq=False)
class Kernel:
    """A kernel; equal to itself alone, so that what was made of it can be kept under it.

    Attributes:
        name: of the entry.
        target: ``sm_80`` or ``sm_90a``.
        parameters: type, such as ``u64``, by name, in order.
        threads: of a program.
        registers: widths in bits, 1 of predicates.
        blocks: in the order of the text; the first is where the kernel begins.
    """

    name: str
    target: str
    parameters: dict[str, str]
    threads: int
    registers: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def instructions(self) -> list[Instruction]:
        """All of them, in the order of the text."""
        return [i for block in self.blocks for i in (*block.instructions, *([block.end] if block.end else ()))]


#: What ends a block: where threads part, stop, or wait for others.
ENDS = ("bra", "ret", "exit", "bar.sync", "barrier.sync", "griddepcontrol.wait")

_WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}


def parse(ptx: str) -> Kernel:
    """Reads a module with one entry.

    Raises:
        PtxError: a line that is not understood.
    """
    return _Parser(ptx).kernel()


class _Parser:
    def __init__(self, ptx: str) -> None:
        self.lines = ptx.split("\n")
        self.name = "?"
        self.files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"[^"]*")?', ptx)}
        self.registers: list[int] = []
        self.scopes: list[dict[str, Register]] = [{}]
        self.labels: dict[str, int] = {}
        self.found: list[Instruction] = []
        self.location = "?"
        self.at = 0

    def refuse(self, why: str) -> NoReturn:
        raise PtxError(f"{self.name}, PTX line {self.at + 1}: {why}: {self.lines[self.at].strip()!r}")

    def kernel(self) -> Kernel:
        entry = next((n for n, line in enumerate(self.lines) if ".entry" in line), None)
        if entry is None:
            raise PtxError("the PTX has no .entry")
        text = "\n".join(self.lines)
        begin = next((n for n in range(entry, len(self.lines)) if self.lines[n].strip() == "{"), None)
        head = "\n".join(self.lines[entry:begin])
        name = re.search(r"\.entry\s+([\w$]+)", head)
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*1)*\s*$", head, re.MULTILINE)
        target = re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
        self.at = entry
        if begin is None or name is None or threads is None or target is None:
            self.refuse("needs a name, .target, .reqntid and a body")
        self.name = name[1]
        parameters = {m[2]: m[1] for m in re.finditer(r"\.param\s+\.(\w+)[^,)\n]*?([\w$]+_param_\d+)", head)}
        self.body(begin + 1)
        kernel = Kernel(name[1], target[1], parameters, int(threads[1]), self.registers)
        kernel.blocks = self.blocks()
        return kernel

    def body(self, first: int) -> None:
        for at in range(first, len(self.lines)):
            self.at = at
            line, _, comment = self.lines[at].partition("//")
            line = line.strip()
            if line.startswith(".loc"):
                self.locate(line, comment)
                continue
            for piece in re.findall(r"[{}](?=\s|$)|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;|[\w$]+:", line) if line else ():
                if piece == "{":
                    self.scopes.append({})
                elif piece == "}":
                    self.scopes.pop()
                    if not self.scopes:
                        return
                elif piece.endswith(":"):
                    self.labels[piece[:-1]] = len(self.found)
                else:
                    self.statement(piece[:-1].strip())

    def locate(self, line: str, comment: str) -> None:
        chain = re.findall(r"([\w.<>-]+):(\d+):\d+", comment)
        if not chain:
            _, number, row, *_ = line.split()
            chain = [(self.files.get(number, number), row)]
        self.location = ", called at ".join(f"{file}:{row}" for file, row in chain)

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
            return
        if text.startswith(".") or not text:
            return  # a pragma
        guard, negated, rest = None, False, text
        if m := re.match(r"@(!?)([%\w$]+)\s+(.*)$", text, re.DOTALL):
            found = self.operand(m[2])
            if not isinstance(found, Register) or found.bits != 1:
                self.refuse(f"{m[2]} is no predicate")
            guard, negated, rest = found, bool(m[1]), m[3]
        m = re.match(r"([a-z][\w.:]*)\s*(.*)$", rest, re.DOTALL)
        if m is None:
            self.refuse("is no instruction")
        operands = tuple(self.operand(part) for part in _split(m[2]))
        self.found.append(Instruction(m[1], operands, guard, negated, self.location, self.at + 1, text))

    def declare(self, text: str) -> None:
        """``.reg .b32 %r<10>`` or ``.reg .pred p, q``."""
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if m is None or m[1] not in _WIDTHS:
            self.refuse("declares registers of an unknown type")
        for part in m[2].split(","):
            many = re.match(r"([%\w$]+)<(\d+)>$", part.strip())
            for name in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [part.strip()]:
                self.scopes[-1][name] = Register(name, len(self.registers), _WIDTHS[m[1]])
                self.registers.append(_WIDTHS[m[1]])

    def operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip())
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if m := re.match(r"0[fF]([0-9A-Fa-f]{8})$|0[dD]([0-9A-Fa-f]{16})$", text):
            return Immediate(int(m[1] or m[2], 16))
        if re.match(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?$", text):
            return Immediate(int(text.rstrip("U"), 0))
        if text[0] == "%":
            return Special(text[1:])
        if re.match(r"-?\d+\.\d+$", text):  # a double, of createpolicy
            return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"))
        if text in ("true", "false"):
            return Immediate(int(text == "true"))
        if re.match(r"[\w$]+$", text):
            return Symbol(text)
        self.refuse(f"{text} is no operand")

    def address(self, text: str) -> Address:
        m = re.match(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?$", text)
        base = self.operand(m[1]) if m else None
        if m is None or not isinstance(base, Register | Immediate | Symbol):
            self.refuse(f"[{text}] is no address")
        return Address(base, int(m[2], 0) if m[2] else 0)

    def blocks(self) -> list[Block]:
        instructions = self.found
        if not instructions or instructions[-1].name not in ("ret", "exit"):
            instructions.append(Instruction("ret", (), None, False, self.location, self.at + 1, "ret"))
        starts = {0, *self.labels.values(), *(n + 1 for n, i in enumerate(instructions) if _ends(i))}
        order = sorted(start for start in starts if start < len(instructions))
        index = {start: n for n, start in enumerate(order)}
        blocks = []
        for start, stop in zip(order, [*order[1:], len(instructions)], strict=True):
            inside = instructions[start:stop]
            end = inside.pop() if _ends(inside[-1]) else None
            target = None
            if end is not None and end.name == "bra":
                label = end.operands[0] if end.operands else None
                self.at = end.line - 1
                if not isinstance(label, Symbol) or label.name not in self.labels:
                    self.refuse("branches to an unknown label")
                target = index[self.labels[label.name]]
            blocks.append(Block(inside, end, target))
        return blocks


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(ENDS)


def _split(text: str) -> list[str]:
    """Operands, at the commas that are in no bracket."""
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)
    return [part.strip() for part in parts if part.strip()]
