"""Helpers of the tests of benches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._run import benches
from fastdllm_triton.bench._session import Bench, Measurable, Session, label, needs_gpu
from fastdllm_triton.bench._timing import Ceilings, Inputs, Run, Timing, reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CEILINGS = Ceilings(copy=1e12, matrix=1e14)


def bench_of(op: str) -> Bench:
    (bench,) = benches("all", [op])
    return bench


def small(op: str, baselines: Mapping[str, Run] | None = None, ours: Any = None, **options: Any) -> Bench:
    """The bench of an op on its small shape, without what needs a compiler."""
    bench = bench_of(op)
    anywhere = {name: run for name, run in bench.baselines.items() if not needs_gpu(name)}
    cases = replace(bench.cases, **{"shapes": [bench.cases.small], "key": ()} | options)
    return replace(bench, cases=cases, baselines=baselines or anywhere, ours=ours or bench.ours)


def run_once(runs: Mapping[str, Run], inputs: Sequence[Inputs]) -> dict[str, Timing | str]:
    """A timer that runs everything and finds that it took a millisecond."""
    found: dict[str, Timing | str] = {}
    for name, run in runs.items():
        try:
            for one in inputs:
                run(one)
            found[name] = Timing(1.0, 0.9, 1.2)
        except Exception as error:
            found[name] = reason(error)
    return found


def session(**options: Any) -> Session:
    """A session that times with :func:`run_once`."""
    return Session(DEVICE, **{"timer": run_once, "ceilings": CEILINGS} | options)


def rows_of(bench: Measurable, session: Session) -> list[dict[str, Any]]:
    """What a report holds in the end."""
    report = Report({})
    for rows in bench.measure(session):
        report.add(rows)
    return report.rows


def made_up_report(scale: float = 1.0) -> Report:
    """A report as a GPU would give it, with numbers by formula."""
    report = Report(
        {"device": "Made-up GPU", "gpu": "Made-up GPU", "driver": 580.0, "commit": "0123456789abcdef", "torch": "2.13.0",
         "triton": "3.6.0", "date": "2026-11-21T06:00:00+00:00"},
        CEILINGS,
        [{"check": "swiglu", "dtype": "bfloat16", "ok": True, "tried": 7, "seconds": 0.1, "cases": []}],
    )  # fmt: skip
    for op in ("window_attention", "head_statistics", "swiglu"):
        bench, cases = bench_of(op), bench_of(op).cases
        for shape in cases.shapes:
            needed, flops = cases.bytes(shape), cases.flops(shape)
            floor = max(needed / CEILINGS.copy, flops / CEILINGS.matrix) * 1e3
            for factor, provider in enumerate(("triton", *bench.baselines), start=1):
                base = {"bench": op, "op": op, "shape": dict(shape), "axis": cases.axis, "provider": provider}
                if provider == "flash-attn":
                    report.rows.append(base | {"missing": "not installed"})
                    continue
                # A few microseconds of launch on top of a share of the floor.
                ms = scale * factor * (floor / (0.6 + 0.3 * abs(math.sin(len(label(shape))))) + 0.004)
                report.rows.append(
                    base
                    | {"median_ms": ms, "p20_ms": 0.98 * ms, "p80_ms": 1.05 * ms, "bytes": needed}
                    | {"flops": flops, "gb_per_s": needed / ms / 1e6, "times_triton": float(factor)}
                    | {"tflop_per_s": flops / ms / 1e9, "of_floor": floor / ms, "peak_bytes": 2**20 * factor}
                    | {"of_copy": needed / ms * 1e3 / CEILINGS.copy}
                    | {"of_matrix": flops / ms * 1e3 / CEILINGS.matrix}
                )
    for provider, factor in (("triton", 1), ("official", 6)):
        for batch in (1, 4):
            ms = 3.6 * factor * (1 + batch / 20)
            report.rows.append(
                {"bench": "step", "op": "step", "shape": {"batch": batch}, "axis": "batch", "provider": provider,
                 "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bytes": 1, "flops": 0, "gb_per_s": 1.0, "tflop_per_s": 0.0,
                 "of_copy": 0.8 / factor, "of_matrix": 0.0, "of_floor": 0.8 / factor, "times_triton": float(factor)}
            )  # fmt: skip
    return report
