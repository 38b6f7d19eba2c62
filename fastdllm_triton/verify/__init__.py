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
from contextlib import contextmanager
from typing import Any

import torch

from .records import CaseRecord, Record, render

__all__ = ["CaseRecord", "Record", "quiet", "render", "rerun_in_interpreter", "verify"]

#: Besides the ops, what ``--op`` takes.
MODELS = "models"


def names() -> list[str]:
    """What can be verified: the ops in the order of a forward, and ``models``."""
    from .grids import GRIDS

    return [*GRIDS, MODELS]


def verify(
    ops: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    *,
    quick: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Tries kernels and models on this machine.

    Args:
        ops: names of :func:`names`; all if not given.
        device: the GPU if there is one.
        quick: a part that takes a minute or two on a CPU and seconds on a GPU.
        on_record: told of each record when it is there.

    Returns:
        A record for each op and dtype, and for each check of models.

    Raises:
        ValueError: an unknown name, or a device that is not there.
        RuntimeError: the kernels cannot run on the device, in this process.
    """
    chosen = check_names(ops)
    target = check_device(device)
    from ..ops import resolve
    from .models import verify_models
    from .ops import verify_op

    resolve("triton", target)  # raises where the kernels cannot run
    found: list[Record] = []
    with quiet(target):
        for name in chosen:
            for record in verify_models(target, quick=quick) if name == MODELS else verify_op(name, target, quick=quick):
                found.append(record)
                if on_record is not None:
                    on_record(record)
    return found


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """The interpreter computes in numpy, which warns of what a kernel then selects away."""
    with warnings.catch_warnings():
        if device.type == "cpu":
            warnings.simplefilter("ignore")
        yield


def check_names(ops: Sequence[str] | None) -> list[str]:
    """The names to verify, in order, each once."""
    known = names()
    unknown = sorted(set(ops or ()) - set(known))
    if unknown:
        raise ValueError(f"op: got {', '.join(unknown)}, needs names among {', '.join(known)}")
    return [name for name in known if not ops or name in ops]


def check_device(device: str | torch.device | None) -> torch.device:
    """The device to verify on."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = torch.device("meta")
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, needs cpu or cuda")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, but torch sees no GPU here")
    return target


def needs_interpreter(device: torch.device) -> bool:
    """Whether another process is needed: Triton reads the variable when a kernel is imported, which is too late now."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def rerun_in_interpreter(arguments: Sequence[str]) -> int:
    """Runs ``fastdllm-triton`` with these arguments in a process where Triton interprets, and gives back its status."""
    command = [sys.executable, "-m", __package__.split(".")[0], *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode


def summary(records: Iterable[Record], machine: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as JSON."""
    records = list(records)
    return {
        "ok": all(record.ok for record in records),
        "machine": machine,
        "records": [record.as_json() for record in records],
    }
