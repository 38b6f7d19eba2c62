"""What a verification consists of, in this process or in several others at once.

Most of its time goes into compiling, which uses one core. And a kernel that writes where it must not, dies or never ends takes
its process with it, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch

from .cases import OPS
from .emulation import emulated
from .models import DTYPE, MODEL_CHECKS, verify_model
from .ops import dtypes_of, verify_op
from .records import CaseRecord, Record

#: Besides the ops, what can be verified.
MODELS = "models"
#: The case that holds if executed PTX did nothing that its checks found.
FINDINGS = "addresses, races and waits"
#: Seconds after which a part in a process of its own is given up.
MOST_SECONDS = 600
#: Parts that take longest, to be begun first.
LONGEST = ("models", "window_attention", "head_statistics", "linear")


@dataclass(frozen=True)
class Part:
    """What gives one record.

    Attributes:
        name: an op, or ``models``.
        what: a dtype of the op, or a check of models.
        ptx: the architecture for which kernels are compiled and executed as PTX on the CPU; None where they run as they do here.
    """

    name: str
    what: str
    ptx: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return (self.what, DTYPE) if self.name == MODELS else (self.name, self.what)

    def run(self, device: torch.device, *, quick: bool) -> Record:
        if self.ptx is None:
            return self._run(device, quick)
        with emulated(self.ptx, strict=False) as emulator:
            record = self._run(device, quick)
        findings = emulator.unaccepted
        note = "; ".join(map(str, findings))
        return replace(record, cases=[*record.cases, CaseRecord(FINDINGS, len(findings), 0.0, ok=not findings, note=note)])

    def _run(self, device: torch.device, quick: bool) -> Record:
        if self.name == MODELS:
            return verify_model(self.what, device, quick=quick)
        return verify_op(self.name, self.what, device, quick=quick)


def names() -> list[str]:
    """What can be verified: the ops in the order of a forward, and ``models``."""
    return [*OPS, MODELS]


def parts_of(chosen: Iterable[str], ptx: str | None = None) -> list[Part]:
    return [Part(name, what, ptx) for name in chosen for what in (MODEL_CHECKS if name == MODELS else dtypes_of(name))]


def unproven(chosen: Sequence[str], records: Iterable[Record]) -> list[str]:
    """The names of which a part did not hold or was not tried."""
    held = {record.key for record in records if record.ok}
    return list(dict.fromkeys(part.name for part in parts_of(chosen) if part.key not in held))


def in_processes(parts: Sequence[Part], device: torch.device, *, quick: bool, jobs: int) -> Iterator[Record]:
    """The records of parts as they come, in no order."""
    first = sorted(parts, key=lambda part: LONGEST.index(part.name) if part.name in LONGEST else len(LONGEST))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(_in_process, part, device, quick) for part in first]):
                yield future.result()
        finally:  # where it is left early, nothing more is begun
            pool.shutdown(cancel_futures=True)


def _in_process(part: Part, device: torch.device, quick: bool) -> Record:
    program = f"from {__name__} import main; main()"
    command = [sys.executable, "-c", program, part.name, part.what, str(device), "quick" if quick else "full", part.ptx or ""]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
        if done.returncode == 0:
            return Record.from_json(json.loads(done.stdout.splitlines()[-1]))
        said = done.stderr.strip().splitlines()
        note = f"its process ended with status {done.returncode}: {said[-1][:120] if said else 'no message'}"
    except subprocess.TimeoutExpired:
        note = f"no end after {MOST_SECONDS} s"
    return Record(*part.key, [CaseRecord("all", math.inf, 0.0, ok=False, note=note)])


def main() -> None:
    """Runs a part and prints its record as JSON."""
    name, what, device, level, ptx = sys.argv[1:]
    print(json.dumps(Part(name, what, ptx or None).run(torch.device(device), quick=level == "quick").as_json()))
