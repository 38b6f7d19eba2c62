"""Which benches there are, and a run of them.

Verification comes first, then one bench after the other; every case is on disk as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastdllm_triton import verify as proof
from fastdllm_triton.bench import _session, _timing, bench_cpu, bench_generate, bench_ops, bench_step
from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._session import Measurable, Row, label
from fastdllm_triton.tools import environment as machine
from fastdllm_triton.utils.checks import known_names
from fastdllm_triton.verify.ledger import Ledger
from fastdllm_triton.verify.parts import unproven

SUITES = ("step", "generate", "ops", "cpu")


def benches(suite: str = "all", names: Sequence[str] = ()) -> list[Measurable]:
    """The benches of a suite, in the order of importance.

    Args:
        suite: one of :data:`SUITES`, or ``all`` that a GPU runs.
        names: ops to take; all if empty.

    Raises:
        ValueError: an unknown suite or op, or a suite that has no bench.
    """
    if suite != "all" and suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, needs all, {' or '.join(SUITES)}")
    everything: list[Measurable] = [bench_step.BENCH, bench_generate.BENCH, *bench_ops.BENCHES, bench_cpu.BENCH]
    ops = known_names("--op", names, [bench.op for bench in everything])
    chosen = [
        bench for bench in everything if (bench.suite == suite or (suite == "all" and bench.suite != "cpu")) and bench.op in ops
    ]
    if not chosen:
        raise ValueError(f"suite: there is no bench in {suite!r}" + (f" among {', '.join(names)}" if names else ""))
    return chosen


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        refused: benches whose verification did not hold, or whose kernels were wrong.
        is_cut: whether the time was too short for all cases.
        is_lost: whether a kernel failed in a way after which the process can use the GPU no more.
    """

    refused: list[str] = field(default_factory=list)
    is_cut: bool = False
    is_lost: bool = False

    @property
    def status(self) -> int:
        """Exit status: what is left to do comes before what cannot be done."""
        return 4 if self.is_lost else 3 if self.is_cut else 1 if self.refused else 0


def run(
    chosen: Sequence[Measurable],
    report: Report,
    device: torch.device,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    folder: Path | None = None,
    minutes: float | None = None,
    verified: Sequence[proof.Record] = (),
    unverified: bool = False,
    cases: Sequence[str] = (),
    on_status: Callable[[str], object] = lambda text: None,
) -> Outcome:
    """Runs benches.

    Args:
        chosen: in this order.
        report: with what an earlier run has measured.
        device: a GPU, or the CPU where nothing is timed.
        quick: few shapes.
        only: baselines; all if empty.
        folder: where results are written.
        minutes: after which no case is begun.
        verified: records of an earlier verification, which is not repeated.
        unverified: verify nothing more, time what was not verified or does not hold as well, and mark its rows.
        cases: see :class:`~fastdllm_triton.bench._session.Session`.
        on_status: told what is done at the moment.
    """
    session = _session.Session(device, quick=quick, only=only, done=report.done(), unverified=unverified, cases=cases)
    session.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    ledger = Ledger(report.machine, quick, None if folder is None else folder / "verify.json", list(verified))
    ledger.write()
    gates = list(dict.fromkeys(name for bench in chosen for name in bench.gate))
    if gates and not unverified:
        on_status("verifying")
        proof.verify(gates, device, quick=quick, jobs=proof.jobs_for(device), known=verified, on_record=ledger.add)
    report.verification = [record.as_json() for record in ledger.records]
    if device.type == "cuda":
        on_status("measuring the ceilings")
        session.timer = _timing.time_in_turns
        session.ceilings = report.ceilings = report.ceilings or _timing.measure_ceilings(device, _timing.time_in_turns)
        now = machine.clocks(device)  # when it has just worked; idle clocks say little
        report.machine |= {f"loaded_{name}": now[name] for name in ("sm_clock", "memory_clock", "temperature") if name in now}
    if folder is not None:
        report.write_machine(folder)

    outcome = Outcome()
    for bench in chosen:
        faults = unproven(bench.gate, ledger.records)
        report.add([marked(row, bool(faults)) for row in report.rows if row["bench"] == bench.op])
        if faults and not unverified:
            row: Row = {"bench": bench.op, "op": bench.op, "shape": {}, "axis": "", "provider": "triton", "refused": True}
            report.add([row | {"missing": f"refused: verification failed: {', '.join(faults)}"}])
        else:
            with proof.quiet(device):
                for rows in bench.measure(session):
                    on_status(f"{bench.op} {label(rows[0]['shape'])}")
                    report.add([marked(row, bool(faults)) for row in rows])
                    if folder is not None:
                        report.write_rows(folder, bench.op)
                    if _timing.is_lost(device):
                        outcome.is_lost = True
                        return outcome
        if any(row.get("refused") for row in report.rows if row["bench"] == bench.op):
            outcome.refused.append(bench.op)
        if folder is not None:
            report.write_rows(folder, bench.op)
    if folder is not None:
        report.write_machine(folder)  # which by now says that something was timed
    outcome.is_cut = session.is_cut
    return outcome


def marked(row: Row, faulty: bool) -> Row:
    """A row that says whether what it rests on was verified."""
    kept = {key: value for key, value in row.items() if key != "unverified"}
    return kept | ({"unverified": True} if faulty or "wrong" in row else {})
