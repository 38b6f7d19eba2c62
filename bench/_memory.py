"""Peak memory of every provider of a bench, beside the times: a fused op's second promise is what it never allocates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _timing
import torch
from _timing import Bench, Inputs, Row, Run


def main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """:func:`_timing.main`, then the peak memory of a launch for every shape and provider, also into the file of ``--json``."""
    status = _timing.main(bench, argv)
    if status or not torch.cuda.is_available():
        return status
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    path = parser.parse_known_args(argv)[0].json
    rows = peaks(bench, torch.device("cuda"))
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if path:
        report: dict[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps(report | {"peaks": rows}, indent=1) + "\n")
    return 0


def peaks(bench: Bench, device: torch.device) -> list[Row]:
    """Bytes that a launch allocates at its highest, on top of its inputs."""
    rows = []
    for shape in bench.shapes:
        inputs = bench.inputs(shape, device, 0)
        for provider, run in {"triton": bench.ours, **bench.baselines}.items():
            try:
                rows.append({"op": bench.op, **shape, "provider": provider, "peak_bytes": peak(run, inputs)})
            except ValueError:  # a baseline that does not take the shape; the table of times has said so
                continue
    return rows


def peak(run: Run, inputs: Inputs) -> int:
    """Bytes allocated at the highest point of a launch that has run before, its results included."""
    run(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
