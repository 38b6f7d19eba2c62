"""Parts of a verification in processes of their own, several at once.

Most of its time goes into compiling, which uses one core. And a kernel that writes where it must not, dies or never ends takes
its process with it, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from .parts import Part
from .records import CaseRecord, Record

#: Seconds after which a part is given up.
MOST_SECONDS = 600
#: Parts that take longest, to be begun first.
LONGEST = ("models", "window_attention", "head_statistics", "linear")


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
    level = "quick" if quick else "full"
    command = [sys.executable, "-m", __name__, part.name, part.what, str(device), level]
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


if __name__ == "__main__":
    name, what, device, level = sys.argv[1:]
    print(json.dumps(Part(name, what).run(torch.device(device), quick=level == "quick").as_json()))
