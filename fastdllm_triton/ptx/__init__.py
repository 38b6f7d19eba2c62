"""Executes compiled Triton kernels without a GPU: PTX, interpreted by numpy over all threads of many programs, with checks.

See docs/ptx.md. Needs Triton and nothing else of this package.
"""

from .emulator import Accepted, Emulator, FindingsError
from .findings import Finding, Kind
from .parser import PtxError
from .semantics import UnknownInstructionError

__all__ = ["Accepted", "Emulator", "Finding", "FindingsError", "Kind", "PtxError", "UnknownInstructionError"]
