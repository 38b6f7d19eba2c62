"""Barriers and waits of the kernels removed one at a time: the checks notice each that orders anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from _intervals import warps_meet

from fastdllm_triton.kernels import _arch
from fastdllm_triton.ptx.driver import Launch, driving
from fastdllm_triton.ptx.emulator import Emulator
from fastdllm_triton.ptx.mutation import Removal, removals
from fastdllm_triton.verify.cases import OPS

pytestmark = pytest.mark.ptx

#: Large enough that every loop turns, and every buffer of a pipeline is used again.
SIZES: dict[str, dict[str, Any]] = {
    "rms_norm": {"rows": 2, "width": 4096, "residual": True},
    "linear": {"rows": 16, "n": 64, "k": 1024, "residual": True},
    "window_attention": {"window": 16, "start": (3,), "end": (600,), "slots": 600, "heads": (8, 2, 64)},
    "token_statistics": {"rows": 3, "vocabulary": 5000},
    "head_statistics": {"rows": 6, "vocabulary": 2000, "width": 256},
    "commit_tokens": {"batch": 2, "block": 128, "rule": "factor", "eos": [1], "committed": True},
}
QUICK = ("rms_norm", "token_statistics")


@dataclass
class Outcome:
    """What came of the removals of an op.

    Attributes:
        noticed: by the checks.
        missed: not noticed, though warps meet in shared memory with no barrier between.
        idle: not noticed, and of no use in this launch.
    """

    noticed: list[Removal]
    missed: list[Removal]
    idle: list[Removal]


def _outcome(op: str, arch: str) -> Outcome:
    cases, outcome, seen = OPS[op], Outcome([], [], []), set()
    emulator = Emulator(arch)

    def launch(launch: Launch) -> None:
        if launch.kernel.name in seen:
            emulator._launch(launch)
            return
        seen.add(launch.kernel.name)
        before = {name: tensor.clone() for name, tensor in launch.tensors.items()}
        assert not warps_meet(launch)
        for removal in removals(launch):
            if removal.noticed:
                outcome.noticed.append(removal)
            else:
                for name, tensor in launch.tensors.items():
                    tensor.copy_(before[name])
                (outcome.missed if warps_meet(replace(launch, kernel=removal.kernel)) else outcome.idle).append(removal)

    with driving(arch, launch), _arch.emulated(arch):
        inputs = cases.inputs(SIZES[op], torch.device("cpu"), torch.float32 if op == "commit_tokens" else torch.bfloat16)
        for options in cases.variants(inputs).values():
            cases.outputs(cases.kernel, inputs, **cases.common, **options)
    return outcome


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", [pytest.param(op, marks=() if op in QUICK else pytest.mark.slow) for op in SIZES])
def test_a_barrier_that_is_missing_is_noticed(op: str, arch: str, record_property: Any) -> None:
    outcome = _outcome(op, arch)
    counts = {"noticed": len(outcome.noticed), "missed": len(outcome.missed), "idle": len(outcome.idle)}
    counts["changed"] = sum(removal.changed for removal in (*outcome.noticed, *outcome.missed, *outcome.idle))
    for name, count in counts.items():
        record_property(name, count)
    # What docs/ptx.md says of removals is the sum of these.
    print(op, arch, counts, *outcome.missed, *outcome.idle, sep="\n    ")
    assert not outcome.missed
    # Those of no use wait before the first copies of a pipeline, into memory that nobody has touched.
    assert len(outcome.idle) <= 5
    if op != "rms_norm" or arch == "sm_90":
        assert outcome.noticed
