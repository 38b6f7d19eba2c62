"""What runs a few lines of PTX as a kernel on tensors."""

from __future__ import annotations

import numpy as np
import torch

from fastdllm_triton.ptx.findings import Findings
from fastdllm_triton.ptx.machine import Machine
from fastdllm_triton.ptx.memory import GlobalMemory
from fastdllm_triton.ptx.parser import parse

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.file 1 "kernel.py"
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<48>;
    .reg .b64 %rd<32>;
    .loc 1 1 0
{loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
{body}
}}
"""

#: Each thread copies 4 bytes of the first tensor to the second: those of its number in the grid.
COPY = """
    mul.wide.u32 %rd10, %r3, 4;
    add.s64 %rd11, %rd0, %rd10;
    add.s64 %rd12, %rd1, %rd10;
    ld.global.b32 %r10, [%rd11];
    st.global.b32 [%rd12], %r10;
    ret;
"""

#: The widths of parameters, by the type of a Python value.
WIDTHS = {int: "u32", torch.Tensor: "u64", type(None): "u64"}


def kernel(body, threads=32, parameters=()):
    """A kernel of which ``%r0`` is the thread, ``%r1`` the program, ``%r3`` the thread of the grid, ``%rd0`` ... the parameters.

    Parameters are types of :data:`WIDTHS`; those of an int are in ``%r40`` and so on, by their place.
    """
    declared = ",\n".join(f".param .{WIDTHS[type_]} kernel_param_{n}" for n, type_ in enumerate(parameters))
    loads = "\n".join(
        f"    ld.param.b{WIDTHS[type_][1:]} %r{f'{40 + n}' if type_ is int else f'd{n}'}, [kernel_param_{n}];"
        for n, type_ in enumerate(parameters)
    )
    return parse(HEAD.format(parameters=declared, threads=threads, loads=loads, body=body))


class Run:
    """A kernel, ready to run, and what is found when it does."""

    def __init__(self, body, *arguments, threads=32, programs=1, shared=0, grid=None, **options):
        self.kernel = kernel(body, threads, [type(argument) for argument in arguments])
        self.findings = Findings()
        names = [f"kernel_param_{n}" for n in range(len(arguments))]
        tensors = {name: a for name, a in zip(names, arguments, strict=True) if isinstance(a, torch.Tensor)}
        self.memory = GlobalMemory(tensors)
        parameters = {}
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, int):
                parameters[name] = np.array([argument & 0xFFFFFFFF], np.uint32)
            else:
                parameters[name] = np.array([0 if argument is None else argument.data_ptr()], np.uint64)
        self.machine = Machine(self.kernel, self.memory, parameters, grid or (programs, 1, 1), shared, self.findings, **options)

    @property
    def kinds(self):
        return sorted(str(finding.kind) for finding in self.findings)

    def go(self):
        self.machine.run()
        return self


def run(body, *arguments, **options):
    """Runs a kernel, and returns what was found."""
    return Run(body, *arguments, **options).go().findings


def kinds(findings):
    return sorted({finding.kind for finding in findings})
