"""What a bench is: the gate before it, what it knows of the run, the rows it gives.

Nothing is timed before its verification has held on this machine, and before the kernel agrees with the reference on the very
inputs that are timed, unless a run asks for it; then the rows say so. A row is a plain dict:

| key                          | meaning                                                                              |
|------------------------------|--------------------------------------------------------------------------------------|
| bench, op, shape, provider   | which bench and op, its shape as a dict, and who did the job; ``triton`` is ours, on |
|                              | a CPU ``cpu``                                                                        |
| axis                         | the entry of ``shape`` that a plot runs along                                        |
| median_ms, p20_ms, p80_ms    | milliseconds a launch                                                                |
| bytes, flops                 | that the shape cannot do without                                                     |
| gb_per_s, tflop_per_s        | what was reached                                                                     |
| of_copy, of_matrix, of_floor | fractions of the copy bandwidth, of the matrix rate, and of the nearer of the two    |
| times_triton                 | a baseline's time over ours: how many times faster ours is                           |
| clock, wall_ms, cpu_ms       | on a CPU: whose time median_ms is, and the medians of both clocks                    |
| products, attention          | on a CPU: the shares of the time inside matrix products and inside attention         |
| agreement                    | on a CPU: the share of generated tokens that are the official ones                   |
| peak_bytes                   | allocated at the highest point of a launch, beside its inputs; captured ones too     |
| unverified                   | true where something that it rests on was not verified, or did not hold              |
| wrong                        | what did not hold on the very inputs of the row, or was not looked at yet            |
| missing                      | why there is no time: not installed, rejected, refused, too little memory, no GPU    |
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdllm_triton.verify.cases._base import Function, OpCases
from fastdllm_triton.verify.ops import Expected
from fastdllm_triton.verify.ops import wrong as wrong_outputs

from ._timing import Ceilings, Inputs, Run, Timer, Timing, reason, sets_of_inputs

Row = dict[str, Any]
Shape = Mapping[str, Any]


@dataclass
class Session:
    """What a bench needs to know of the run.

    Attributes:
        device: a GPU; or the CPU, where providers run once, small, and nothing is timed.
        timer: None on a CPU.
        ceilings: of the GPU; None on a CPU.
        quick: the shapes that matter most.
        only: baselines to run; all if empty.
        deadline: ``time.monotonic()`` after which no further case is begun.
        is_cut: whether a case was not begun for that reason.
        done: ``(op, shape as text, provider)`` of the rows that an earlier run has measured.
        unverified: also time what gives another result than the reference.
        cases: ``key=value`` of shapes: of each key that is named, a shape has one of the values; all shapes if empty.
    """

    device: torch.device
    timer: Timer | None = None
    ceilings: Ceilings | None = None
    quick: bool = False
    only: Sequence[str] = ()
    deadline: float | None = None
    is_cut: bool = False
    done: set[tuple[str, str, str]] = field(default_factory=set)
    unverified: bool = False
    cases: Sequence[str] = ()

    def left(self, op: str, shapes: Sequence[Shape], providers: Sequence[str] = ("triton",)) -> Iterator[Shape]:
        """The shapes that were not measured before for all of these providers, until the time is up."""
        for shape in shapes:
            if not self.has(shape) or all((op, label(shape), provider) in self.done for provider in providers):
                continue
            self.is_cut |= self.deadline is not None and time.monotonic() > self.deadline
            if self.is_cut:
                return
            gc.collect()
            yield shape

    def has(self, shape: Shape) -> bool:
        """Whether a shape is among the cases that are asked for."""
        named = {case.partition("=")[0] for case in self.cases}
        return named <= {entry.partition("=")[0] for entry in entries(shape) & set(self.cases)}

    def wants(self, provider: str) -> bool:
        """Whether a provider is to run: ours always, others if ``only`` names them or is empty."""
        return provider in ("triton", "triton eos", "cpu") or not self.only or provider in self.only

    @property
    def cache(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 1


#: Baselines that need a GPU or a C++ compiler have one of these in their names.
GPU_ONLY = ("torch.compile", "flex")


@dataclass(frozen=True)
class Bench:
    """The bench of one op.

    Attributes:
        cases: what is known of the op: inputs, shapes, bytes and FLOPs.
        baselines: what else does the job. One that rejects a shape is listed with its reason.
        ours: what is timed as ours; the kernel if not given.
        most_sets: of inputs, where a shape is so small that a cache full of sets would be a hundred thousand.
    """

    cases: OpCases
    baselines: Mapping[str, Run]
    ours: Function | None = None
    most_sets: int = 2**30
    suite: str = "ops"

    @property
    def op(self) -> str:
        return self.cases.op

    @property
    def gate(self) -> Sequence[str]:
        return (self.op,)

    @property
    def function(self) -> Function:
        return self.ours or self.cases.kernel

    def measure(self, session: Session) -> Iterator[list[Row]]:
        """The rows of every shape: ours first, then the baselines."""
        for shape in session.left(self.op, self.chosen(session)):
            base: Row = {"bench": self.op, "op": self.op, "shape": dict(shape), "axis": self.cases.axis}
            try:
                rows = self.rows_of(shape, session)
            except torch.OutOfMemoryError as error:
                rows = {"triton": {"missing": reason(error)}}
            except AssertionError as error:
                rows = {"triton": {"missing": f"refused: wrong on these inputs: {_first_line(error)}", "refused": True}}
            yield [base | {"provider": provider} | row for provider, row in rows.items()]

    @property
    def every_shape(self) -> Sequence[Shape]:
        return [self.cases.small, *self.cases.key, *self.cases.shapes]

    def chosen(self, session: Session) -> Sequence[Shape]:
        """The small shape on a CPU; on a GPU the key ones, and then the others if it is not to be quick."""
        if session.timer is None:
            return [self.cases.small]
        key = self.cases.key
        return key if session.quick else [*key, *(shape for shape in self.cases.shapes if shape not in key)]

    def rows_of(self, shape: Shape, session: Session) -> dict[str, Row]:
        needed, flops = self.cases.bytes(shape), self.cases.flops(shape)
        count = min(sets_of_inputs(needed, session.cache), self.most_sets) if session.timer else 1
        # The interpreter has no bfloat16.
        dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float16
        inputs, expected = sets_and_results(self.cases, shape, session.device, dtype, count)
        wrong = {}
        try:
            check(self.cases, shape, self.function, inputs[0], expected)
        except AssertionError as error:
            if not session.unverified:
                raise
            wrong = {"wrong": _first_line(error)}
        del expected
        runs: dict[str, Run] = {"triton": lambda i: self.function(**i)}
        runs |= {name: run for name, run in self.baselines.items() if session.wants(name)}
        times = (session.timer or run_untimed)(runs, inputs)
        ours = times["triton"]
        rows: dict[str, Row] = {}
        for name, timing in times.items():
            if isinstance(timing, str) or isinstance(ours, str) or session.ceilings is None:
                rows[name] = {"missing": str(timing)} | wrong
                continue
            rows[name] = timed(timing, needed, flops, session.ceilings)
            rows[name] |= {"times_triton": timing.median / ours.median, "peak_bytes": peak(runs[name], inputs[0])} | wrong
        return rows


def run_untimed(runs: Mapping[str, Run], inputs: Sequence[Inputs]) -> dict[str, Timing | str]:
    """Stands for a timer where there is no GPU: runs every provider once."""

    def ended(name: str, run: Run) -> str:
        if needs_gpu(name):
            return "needs a GPU"
        try:
            run(inputs[0])
        except Exception as error:
            return reason(error)
        return "ran, untimed"

    return {name: ended(name, run) for name, run in runs.items()}


class ModelBench(ABC):
    """A bench of whole models; a subclass gives the names, the shapes, and the rows of a shape.

    Attributes:
        shapes: the most asked for first, of which the first ``key`` are the key ones.
        quick: small ones.
    """

    op: str
    suite: str
    shapes: Sequence[Shape]
    quick: Sequence[Shape]
    key: int | None = None
    baselines: Sequence[str] = ()
    ours: Sequence[str] = ("triton",)

    @property
    def gate(self) -> Sequence[str]:
        from fastdllm_triton.verify import names

        return names()

    def measure(self, session: Session) -> Iterator[list[Row]]:
        providers = [provider for provider in (*self.ours, *self.baselines) if session.wants(provider)]
        for shape in session.left(self.op, self.chosen(session), providers):
            yield from self.rows_of(shape, session)

    @property
    def every_shape(self) -> Sequence[Shape]:
        return [*self.quick, *self.shapes]

    def chosen(self, session: Session) -> Sequence[Shape]:
        """The small shapes on a CPU; on a GPU the key ones if it is to be quick, all if not."""
        return self.quick if session.timer is None else self.shapes[: self.key] if session.quick else self.shapes

    @abstractmethod
    def rows_of(self, shape: Shape, session: Session) -> Iterator[list[Row]]:
        """The rows of a shape as they come."""


#: What ``BENCH`` of a bench file is. It has an op, a suite, and a gate that must verify before anything is timed; it measures the
#: rows of each case as they come, where later rows of a case and provider take the place of earlier ones.
Measurable = Bench | ModelBench


def needs_gpu(baseline: str) -> bool:
    return any(word in baseline for word in GPU_ONLY)


def sets_and_results(
    cases: OpCases, shape: Shape, device: torch.device, dtype: torch.dtype, count: int = 1
) -> tuple[list[dict[str, Any]], Expected]:
    """Sets of inputs, each with memory for the results, and what the first one must give."""
    first = cases.inputs(shape, device, dtype)
    expected = Expected.of(cases, first)  # which takes much memory for a moment, before the other sets are there
    sets = [first, *(cases.inputs(shape, device, dtype, seed) for seed in range(1, count))]
    return [inputs | cases.result_memory(expected.plain) for inputs in sets], expected


def _first_line(error: AssertionError) -> str:
    return str(error).strip().split("\n")[0][:80]


def timed(timing: Timing, needed: int, flops: int, ceilings: Ceilings) -> Row:
    seconds = timing.median / 1e3
    floor = max(needed / ceilings.copy, flops / ceilings.matrix)
    return {
        "median_ms": timing.median,
        "p20_ms": timing.p20,
        "p80_ms": timing.p80,
        "bytes": needed,
        "flops": flops,
        "gb_per_s": needed / seconds / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "of_copy": needed / seconds / ceilings.copy,
        "of_matrix": flops / seconds / ceilings.matrix,
        "of_floor": floor / seconds,
    }


def check(cases: OpCases, shape: Shape, function: Function, inputs: Inputs, expected: Expected) -> None:
    """Checks that a function gives what the op must give.

    Raises:
        AssertionError: it does not; nothing may be timed.
    """
    judged = expected.judge(cases.outputs(function, dict(inputs)))
    if names := wrong_outputs(judged):
        worst = judged[names[0]]
        where = f"{cases.op} {dict(shape)}: {', '.join(names)}"
        raise AssertionError(f"{where}: error {worst.error:.2e}, {worst.bound:.2e} allowed")


def peak(run: Run, inputs: Inputs) -> int | None:
    """Bytes allocated at the highest point of a launch that has run before, its results included; None if there is no room for
    it now.
    """
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        run(inputs)
    except torch.OutOfMemoryError:
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def entries(shape: Shape) -> set[str]:
    """``key=value`` of each entry."""
    return {f"{key}={value}" for key, value in shape.items()}


def label(shape: Shape) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())
