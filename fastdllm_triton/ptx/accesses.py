"""What instructions do to memory, read from their opcodes: the space, the width, and how it counts in the search for races."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from .lanes import bits_of
from .parser import Immediate, Instruction


class Space(Enum):
    """State spaces (PTX ISA, 5.1)."""

    GLOBAL = "global"
    SHARED = "shared"
    PARAM = "param"


class Use(IntEnum):
    """How an access counts in the search for races.

    ``ATOMIC`` are those that other threads may expect at any time: read-modify-writes, and stores that are volatile, relaxed or
    releases. ``STRONG_READ`` are loads of that kind. They do not race with each other.
    """

    READ = 0
    STRONG_READ = 1
    WRITE = 2
    ATOMIC = 3


@dataclass(frozen=True, slots=True)
class Access:
    """One of the accesses of an instruction.

    Attributes:
        space: where.
        use: what for.
        type: of an element, such as ``b32``.
        count: elements of a vector; 1 if there is none.
        operation: of an atomic, such as ``add``.
    """

    space: Space
    use: Use
    type: str
    count: int = 1
    operation: str = ""

    @property
    def size(self) -> int:
        """Bytes that a thread accesses."""
        return bits_of(self.type) // 8 * self.count


_SPACES = {
    "global": Space.GLOBAL,
    "shared": Space.SHARED,
    "shared::cta": Space.SHARED,
    "shared::cluster": Space.SHARED,  # clusters are of one program here, so that this is its own
    "param": Space.PARAM,
    "param::entry": Space.PARAM,
}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_SCOPES = frozenset({"cta", "cluster", "gpu", "sys"})
#: Hints that change nothing but speed (PTX ISA, 9.7.9.1, "Cache Operators", and 9.7.9.2, "Cache Eviction Priority Hints").
_PRIORITIES = ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
_HINTS = frozenset(
    {f"{level}::{priority}" for level in ("L1", "L2") for priority in _PRIORITIES}
    | {"L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"}
)
_LOAD_HINTS = _HINTS | {"ca", "cg", "cs", "lu", "cv", "nc"}
_STORE_HINTS = _HINTS | {"wb", "cg", "cs", "wt"}
_STRONG_LOAD = frozenset({"volatile", "relaxed", "acquire", "mmio"})
_STRONG_STORE = frozenset({"volatile", "relaxed", "release", "mmio"})
_TYPES = frozenset(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)) | {"f32", "f64"}

_INTEGERS = ("u32", "s32", "u64", "s64")
_HALVES = ("f16", "f16x2", "bf16", "bf16x2")
#: Types of each operation of ``atom`` and ``red``.
_OPERATIONS: dict[str, tuple[str, ...]] = {
    "add": (*_INTEGERS, "f32", "f64", *_HALVES),
    "min": _INTEGERS,
    "max": _INTEGERS,
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "inc": ("u32",),
    "dec": ("u32",),
}


def accesses_of(instruction: Instruction) -> tuple[Access, ...] | None:
    """The accesses of an instruction that addresses memory; none of others, and None where a modifier is not known."""
    name = instruction.name
    if name in ("ld", "st"):
        access = _transfer(instruction.parts)
        return (access,) if access else None
    if name in ("atom", "red"):
        access = _atomic(instruction.parts)
        return (access,) if access else None
    if instruction.opcode.startswith(("cp.async.ca", "cp.async.cg")):
        return _copy(instruction)
    if name in ("ldmatrix", "stmatrix", "wgmma"):  # rows of 16 bytes
        return (Access(Space.SHARED, Use.WRITE if name == "stmatrix" else Use.READ, "b64", 2),)
    return ()


def _transfer(parts: tuple[str, ...]) -> Access | None:
    """PTX ISA, 9.7.9.8, ld, and 9.7.9.11, st."""
    name, *modifiers, type_ = parts
    load = name == "ld"
    strong = _STRONG_LOAD if load else _STRONG_STORE
    space: Space | None = None
    count, use = 1, Use.READ if load else Use.WRITE
    for modifier in modifiers:
        if modifier in _SPACES and space is None:
            space = _SPACES[modifier]
        elif modifier in _VECTORS and count == 1:
            count = _VECTORS[modifier]
        elif modifier in strong:
            use = Use.STRONG_READ if load else Use.ATOMIC
        elif modifier not in (_LOAD_HINTS if load else _STORE_HINTS) and modifier not in _SCOPES and modifier != "weak":
            return None
    if space is None or type_ not in _TYPES or (space is Space.PARAM and not load):
        return None
    return Access(space, use, type_, count)


def _atomic(parts: tuple[str, ...]) -> Access | None:
    """PTX ISA, 9.7.13.5, atom, and 9.7.13.6, red."""
    name, *modifiers, type_ = parts
    space: Space | None = None
    operation, count, noftz = "", 1, False
    for modifier in modifiers:
        if modifier in _SPACES and space is None:
            space = _SPACES[modifier]
        elif modifier in _OPERATIONS and not operation:
            operation = modifier
        elif modifier in _VECTORS and count == 1:
            count = _VECTORS[modifier]
        elif modifier == "noftz":
            noftz = True
        elif modifier not in _SCOPES and modifier not in ("relaxed", "acquire", "release", "acq_rel", "L2::cache_hint"):
            return None
    if space not in (Space.GLOBAL, Space.SHARED) or type_ not in _OPERATIONS.get(operation, ()):
        return None
    if noftz != (type_ in _HALVES) or (count > 1 and (operation != "add" or type_ not in ("f32", *_HALVES))):
        return None
    if name == "red" and operation in ("exch", "cas"):
        return None
    return Access(space, Use.ATOMIC, type_, count, operation)


def _copy(instruction: Instruction) -> tuple[Access, ...] | None:
    """PTX ISA, 9.7.9.25.3.1, cp.async."""
    _, _, cache, *modifiers = instruction.parts
    size = instruction.operands[2]
    if modifiers[:1] not in (["shared"], ["shared::cta"]) or modifiers[1:2] != ["global"]:
        return None
    if any(modifier not in _HINTS for modifier in modifiers[2:]):
        return None
    if not isinstance(size, Immediate) or size.value not in ((16,) if cache == "cg" else (4, 8, 16)):
        return None
    count = size.value // 4
    return Access(Space.SHARED, Use.WRITE, "b32", count), Access(Space.GLOBAL, Use.READ, "b32", count)


def smallest(instructions: list[Instruction], space: Space) -> int:
    """Bytes of the smallest access to a space; 16 where there is none."""
    found = [a.size for i in instructions for a in accesses_of(i) or () if a.space is space]
    return min([16, *found])
