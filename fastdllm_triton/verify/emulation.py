"""The kernels of this package without a GPU: compiled for an architecture, and executed as PTX on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..kernels import _arch
from ..ops.backends import forget
from ..ptx.emulator import Accepted, Emulator
from ..ptx.findings import Kind

#: Findings that are no error, and why. A test demands that each still occurs.
ACCEPTED = (
    Accepted(
        "_commit_tokens_kernel",
        Kind.GLOBAL_RACE,
        "commit_tokens.py:274",
        "where a block has fewer slots than its program has threads, warps hold copies of slots: one may read a slot after its "
        "owner has filled it, but only the owner stores, and it reads first",
    ),
)


@contextmanager
def emulated(arch: str, *, checks: bool = True, seed: int | None = None, strict: bool = True) -> Iterator[Emulator]:
    """Launchers take CPU tensors, and what they launch is executed.

    Args:
        arch: ``sm_80`` or ``sm_90``.
        checks: whether to look for races.
        seed: of a random interleaving of warps and programs; in order if not given.
        strict: whether findings that are not in :data:`ACCEPTED` are an error at the end.

    Raises:
        ValueError: another architecture.
        RuntimeError: Triton's interpreter is on in this process, or Triton finds no ptxas.
        FindingsError: something was found.
    """
    emulator = Emulator(arch, checks=checks, seed=seed, accepted=ACCEPTED)
    forget()
    try:
        with emulator.running(strict=strict), _arch.emulated(arch):
            yield emulator
    finally:
        forget()
