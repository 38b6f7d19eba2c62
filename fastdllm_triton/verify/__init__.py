"""Proof on this machine: every kernel against the reference and float64, then whole models.

On a GPU the kernels run as compiled; on a CPU Triton's interpreter runs them, which shows that they compute the right thing
and says nothing about speed, bfloat16 or the compilers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from ..loading import find_device
from ..ops import resolve
from ..utils.checks import known_names
from .emulation import emulated
from .parts import in_processes, names, parts_of
from .records import CaseRecord, Record, render

__all__ = ["CaseRecord", "Record", "names", "quiet", "render", "rerun_in_interpreter", "verify"]

#: Bytes of GPU memory that a part may take.
MEMORY = 10 * 2**30


def verify(
    ops: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    *,
    quick: bool = False,
    jobs: int = 1,
    ptx: str | None = None,
    known: Iterable[Record] = (),
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Tries kernels and models on this machine.

    Args:
        ops: names of :func:`names`; all if not given.
        device: the GPU if there is one.
        quick: a part that takes a minute or two on a CPU and seconds on a GPU.
        jobs: processes at once; with one everything happens in this process.
        ptx: the architecture, ``sm_80`` or ``sm_90``, for which kernels are compiled and executed as PTX on the CPU.
        known: records of an earlier run, which are not made again.
        on_record: told of each new record when it is there.

    Returns:
        A record for each op and dtype, and for each check of models.

    Raises:
        ValueError: an unknown name or architecture, no jobs, or a device that is not there.
        RuntimeError: the kernels cannot run on the device, in this process.
    """
    chosen = known_names("op", ops, names())
    target = find_device(device)
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, needs 1 or more")
    with nullcontext() if ptx is None else emulated(ptx):
        resolve("triton", target)  # raises where the kernels cannot run
    records = {record.key: record for record in known}
    parts = parts_of(chosen, ptx)
    todo = [part for part in parts if part.key not in records]
    here = (part.run(target, quick=quick) for part in todo)
    with quiet(target):
        for record in here if jobs == 1 else in_processes(todo, target, quick=quick, jobs=jobs):
            records[record.key] = record
            if on_record is not None:
                on_record(record)
    return [records[part.key] for part in parts]


def jobs_for(device: torch.device) -> int:
    """Processes that the cores and the memory of the machine have room for; on a CPU one."""
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(os.cpu_count() or 1, memory // MEMORY))


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """The interpreter computes in numpy, which warns of what a kernel then selects away."""
    with warnings.catch_warnings():
        if device.type == "cpu":
            warnings.simplefilter("ignore")
        yield


def needs_interpreter(device: torch.device) -> bool:
    """Whether another process is needed: Triton reads ``TRITON_INTERPRET`` when kernels are imported, as they are by now."""
    return device.type == "cpu" and not is_interpreting()


def is_interpreting() -> bool:
    """Whether Triton interprets kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rerun_in_interpreter(arguments: Sequence[str], *, interpret: bool = True) -> int:
    """Runs ``fastdllm-triton`` with these arguments in a process where Triton interprets, or does not, and returns its status."""
    command = [sys.executable, "-m", __package__.split(".")[0], *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": str(int(interpret))}, check=False).returncode
