"""The kernels of this package without a GPU: compiled for an architecture, and executed as PTX on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..kernels import _arch
from ..ops.backends import forget
from ..ptx.emulator import Accepted, Emulator

#: Findings that are no error, and why.
ACCEPTED: tuple[Accepted, ...] = ()


@contextmanager
def emulated(arch: str, *, checks: bool = True, seed: int | None = None) -> Iterator[Emulator]:
    """Launchers take CPU tensors, and what they launch is executed.

    Args:
        arch: ``sm_80`` or ``sm_90``.
        checks: whether to look for races.
        seed: of a random interleaving of warps and programs; in order if not given.

    Raises:
        ValueError: another architecture.
        RuntimeError: Triton's interpreter is on in this process, or Triton finds no ptxas.
        FindingsError: at the end, something was found that is not in :data:`ACCEPTED`.
    """
    emulator = Emulator(arch, checks=checks, seed=seed, accepted=ACCEPTED)
    forget()
    try:
        with emulator.running(), _arch.emulated(arch):
            yield emulator
    finally:
        forget()
