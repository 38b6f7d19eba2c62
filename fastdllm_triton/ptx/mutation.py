"""Would the checks notice? Removes barriers, waits and fences of a kernel, one at a time, and runs what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import DeadlockError
from .driver import Launch
from .emulator import machine_of
from .findings import Findings
from .parser import Instruction, Kernel

#: What is removed: what orders threads, or the copies and products that they have begun.
ORDERING = ("bar.sync", "cp.async.wait_group", "cp.async.wait_all", "wgmma.wait_group", "griddepcontrol.wait")


@dataclass(frozen=True)
class Removal:
    """One instruction less.

    Attributes:
        kernel: what is left.
        instruction: the one that was removed.
        noticed: what was found that is not found in the kernel as it is; empty where nothing was.
        changed: whether memory holds something else at the end.
    """

    kernel: Kernel
    instruction: Instruction
    noticed: tuple[str, ...]
    changed: bool

    def __str__(self) -> str:
        outcome = ", ".join(self.noticed) or ("not noticed, results differ" if self.changed else "not noticed")
        removed = self.instruction
        return f"{self.kernel.name}, {removed.location}, PTX line {removed.line}: {removed.text}: {outcome}"


def mutants(kernel: Kernel) -> Iterator[tuple[Instruction, Kernel]]:
    """Each instruction of :data:`ORDERING`, and the kernel without it."""
    for n, block in enumerate(kernel.blocks):
        for instruction in (*block.instructions, *([block.end] if block.end else ())):
            if not instruction.opcode.startswith(ORDERING):
                continue
            if instruction is block.end:
                changed = replace(block, end=None)
            else:
                changed = replace(block, instructions=[other for other in block.instructions if other is not instruction])
            yield instruction, replace(kernel, blocks=[*kernel.blocks[:n], changed, *kernel.blocks[n + 1 :]])


def removals(launch: Launch) -> Iterator[Removal]:
    """Runs a launch without each instruction of :data:`ORDERING` in turn, and at last as it is.

    The tensors of the launch hold what they held before each run, and in the end what the launch as it is makes of them. A mutant
    whose threads wait for ever counts as noticed.
    """
    before = {name: _memory(tensor).clone() for name, tensor in launch.tensors.items()}
    known = _findings(launch)[0]
    after = {name: _memory(tensor).clone() for name, tensor in launch.tensors.items()}
    for instruction, kernel in mutants(launch.kernel):
        _restore(launch, before)
        found, stuck = _findings(replace(launch, kernel=kernel))
        same = all(_memory(tensor).equal(after[name]) for name, tensor in launch.tensors.items())
        new = sorted({kind for kind, line in found if (kind, line) not in known} | ({"deadlock"} if stuck else set()))
        yield Removal(kernel, instruction, tuple(new), not same)
    _restore(launch, after)


def _findings(launch: Launch) -> tuple[set[tuple[str, int]], bool]:
    """Kind and PTX line of all that is found in a run, and whether it came to no end."""
    findings, stuck = Findings(), False
    try:
        machine_of(launch, findings, dependent=launch.is_dependent).run()
    except DeadlockError:
        stuck = True
    return {(str(finding.kind), finding.line) for finding in findings}, stuck


def _memory(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _restore(launch: Launch, contents: dict[str, Tensor]) -> None:
    for name, tensor in launch.tensors.items():
        _memory(tensor).copy_(contents[name])
