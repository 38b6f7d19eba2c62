"""Threads of a CPU: how many a forward uses, and using so many without changing what the rest of a program uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

#: Matrix weights that a forward reads, below which it uses one thread. Two make a step of 5.6 million 1.2 (bfloat16) to 1.4 times
#: (float32) as fast and one of 13 million 1.3 to 1.6 times, where nothing else runs; where a core is taken by something else,
#: all of them may be slower by far, and small ones have the least to lose.
TINY = 10_000_000

#: Set to a number, these say how many threads PyTorch is to use.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_threads(parameters: int, allowed: int) -> int:
    """Threads of a forward.

    Args:
        parameters: matrix weights that it reads.
        allowed: as :func:`allowed_threads`.

    Returns:
        1 for a tiny model, whose threads would spend their time waiting for each other; else all that are allowed.
    """
    return 1 if parameters < TINY else allowed


def allowed_threads() -> int:
    """Threads that the user lets PyTorch have: what ``torch.get_num_threads`` says, which minds ``torch.set_num_threads``,
    ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS``; without those variables no more than there are cores.
    """
    threads = torch.get_num_threads()
    return threads if any(os.environ.get(name) for name in _VARIABLES) else min(threads, available_cores())


@lru_cache(maxsize=1)
def available_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: by its affinity, and by the quota of its control group, where there is one.

    Args:
        root: where the file system of Linux begins.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    # Logical CPUs of one core have the same list of siblings.
    folder = root / "sys/devices/system/cpu"
    cores = {_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota = _quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


@contextmanager
def using(threads: int) -> Iterator[None]:
    """PyTorch computes with so many threads in this context, and with as many as before after it.

    Entering and leaving it takes a microsecond. What is set is that of the calling thread; a thread that calls PyTorch for the
    first time meanwhile begins with it.
    """
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota(root: Path) -> float | None:
    """CPUs that the control group of this process, or one that it is in, may use at a time; None without a limit."""
    quotas = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        # In a container the path is that outside of it, and the group that is seen there is the mount itself.
        group = mounted / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mounted))):
            quota, period = _limit(folder)
            if quota > 0 and period > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _limit(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU that a group may use in a period, and the period; -1 of them without a limit."""
    words = (_text(folder / "cpu.max") or "").split()  # of version 2
    words = words or [_text(folder / f"cpu.cfs_{name}_us") or "-1" for name in ("quota", "period")]
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (-1, -1)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
