"""What runs a few instructions on threads whose registers a test sets, with shared memory that checks nothing."""

from __future__ import annotations

import numpy as np

from fastdllm_triton.ptx import program, wgmma  # noqa: F401  (a program knows all instructions)
from fastdllm_triton.ptx.findings import Findings
from fastdllm_triton.ptx.lanes import UNSIGNED, Lanes, registers_of
from fastdllm_triton.ptx.parser import parse
from fastdllm_triton.ptx.semantics import decode

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel()
.reqntid {threads}
{{
"""


class Shared:
    """Bytes of each program; addresses wrap around."""

    checks = True

    def __init__(self, programs, size):
        self.bytes = np.full((programs, size), 0xFF, np.uint8)

    def load(self, lanes, which, address, size):
        return self.bytes[lanes.place[which][:, None], (_signed(address) + np.arange(size)) % self.bytes.shape[1]]

    def unfenced(self, lanes, which, address, size):
        return np.zeros(len(which), bool)

    def store(self, lanes, which, address, data):
        self.bytes[lanes.place[which][:, None], _signed(address) + np.arange(data.shape[1])] = data


def _signed(address):
    """``[n, 1]`` int64: numpy makes a float of the sum of an unsigned one and a signed one."""
    return address.astype(np.int64)[:, None]


class Bench:
    """A body of instructions, the lanes of some programs, and the registers by name."""

    def __init__(self, body, threads=64, programs=2, shared=4096, memory=None):
        self.kernel = parse(HEAD.format(threads=threads) + body + "\n}\n")
        self.findings = Findings()
        self.shared = memory or Shared(programs, shared)
        self.lanes = Lanes(
            self.kernel, np.arange(programs), {}, {}, memory=self.shared, shared=self.shared, findings=self.findings
        )
        self.names = {}
        for instruction in self.kernel.instructions:
            for operand in (*instruction.operands, instruction.guard):
                self.names.update((register.name, register) for register in registers_of(operand))

    def __setitem__(self, name, values):
        """Sets a register to the bits of ``[N]`` values, or of one."""
        register = self.names[name]
        values = np.atleast_1d(np.asarray(values))
        dtype = UNSIGNED[register.bits]
        values = values.astype(bool) if dtype is np.bool_ else np.ascontiguousarray(values).view(dtype)
        self.lanes.registers[register.slot] = values

    def __getitem__(self, name):
        """The bits of a register in all lanes."""
        return np.array(self.lanes.spread(self.lanes.registers[self.names[name].slot]))

    def run(self, mask=None, steps=None):
        """Executes the instructions, or those in a slice, in the lanes of a mask; guards count."""
        for instruction in self.kernel.instructions[slice(None, -1) if steps is None else steps]:
            self.lanes.here = instruction
            here = mask
            if instruction.guard is not None:
                holds = self.lanes.spread(self.lanes.registers[instruction.guard.slot]) ^ instruction.negated
                here = holds if mask is None else holds & mask
            check = wgmma.guard(instruction, wgmma.watched(self.kernel))
            if check is not None:
                check(self.lanes, here)
            decode(instruction, self.kernel)(self.lanes, here)
        return self

    @property
    def kinds(self):
        return {finding.kind for finding in self.findings}
