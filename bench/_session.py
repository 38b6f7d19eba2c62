"""A run of benches: which there are, the gate before them, the rows they give.

Nothing is timed before its verification has held on this machine, and before the kernel agrees with the reference on the very
inputs that are timed, unless a run asks for it; then the rows say so. A row is a plain dict:

| key                          | meaning                                                                              |
|------------------------------|--------------------------------------------------------------------------------------|
| bench, op, shape, provider   | which bench and op, its shape as a dict, and who did the job; ``triton`` is ours     |
| axis                         | the entry of ``shape`` that a plot runs along                                        |
| median_ms, p20_ms, p80_ms    | milliseconds a launch                                                                |
| bytes, flops                 | that the shape cannot do without                                                     |
| gb_per_s, tflop_per_s        | what was reached                                                                     |
| of_copy, of_matrix, of_floor | fractions of the copy bandwidth, of the matrix rate, and of the nearer of the two    |
| times_triton                 | a baseline's time over ours: how many times faster ours is                           |
| peak_bytes                   | allocated at the highest point of a launch, beside its inputs; captured ones too     |
| parts                        | milliseconds by name, where a row is a whole step                                    |
| unverified                   | true where something that it rests on was not verified, or did not hold              |
| wrong                        | what did not hold on the very inputs of the row, or was not looked at yet            |
| missing                      | why there is no time: not installed, rejected, refused, too little memory, no GPU    |
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ._timing import Ceilings, Inputs, Run, Timer, Timing, reason, sets_of_inputs

Row = dict[str, Any]
Shape = Mapping[str, Any]

#: In the order of importance, so that a time limit cuts the least.
SUITES = ("step", "generate", "ops")
ORDER = (
    "window_attention",
    "head_statistics",
    "linear",
    "rope_kv_write",
    "rms_norm",
    "swiglu",
    "token_statistics",
    "commit_tokens",
)


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

    def is_over(self) -> bool:
        """Whether the time is up; asked before each case."""
        self.is_cut |= self.deadline is not None and time.monotonic() > self.deadline
        return self.is_cut

    def skips(self, op: str, shape: Shape, providers: Sequence[str] = ("triton",)) -> bool:
        """Whether a case was measured before, for all of these providers."""
        return all((op, label(shape), provider) in self.done for provider in providers)

    def wants(self, provider: str) -> bool:
        """Whether a provider is to run: all of ours that have no name in ``only`` of their own, and the baselines asked for."""
        return provider in ("triton", "triton eos") or not self.only or provider in self.only

    @property
    def cache(self) -> int:
        """Bytes of the L2 cache."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 1


class Measurable(Protocol):
    """What ``BENCH`` of a bench file is."""

    @property
    def op(self) -> str:
        """Its name."""

    @property
    def suite(self) -> str:
        """One of :data:`SUITES`."""

    @property
    def gate(self) -> Sequence[str]:
        """What must verify before anything is timed: names of :func:`fastdllm_triton.verify.names`."""

    def measure(self, session: Session) -> Iterator[list[Row]]:
        """The rows of each case, when they are there. Later rows of the same case and provider take the place of earlier ones."""


@dataclass(frozen=True)
class Bench:
    """The bench of one op.

    Attributes:
        op: the op's name.
        shapes: what to run, each a mapping of names to numbers.
        key: of these the ones that matter most: a step and a refresh of one row.
        quick: small shapes, which the interpreter runs too.
        axis: the name along which a plot runs.
        inputs: makes the inputs of a shape, on a device, from a seed.
        ours: the kernel.
        oracle: the reference; its result is compared with the kernel's.
        baselines: what else does the job. One that rejects a shape is listed with its reason.
        bytes: of memory traffic that a shape cannot do without.
        flops: of a shape; 0 if they do not matter.
        gpu_only: baselines that need a GPU or a C++ compiler.
        most_sets: of inputs, where a shape is so small that a cache full of sets would be a hundred thousand.
    """

    op: str
    shapes: Sequence[Shape]
    quick: Sequence[Shape]
    axis: str
    inputs: Callable[..., Inputs]
    ours: Run
    oracle: Run
    baselines: Mapping[str, Run]
    bytes: Callable[[Shape], int]
    flops: Callable[[Shape], int] = lambda shape: 0
    gpu_only: Sequence[str] = ()
    most_sets: int | None = None
    suite: str = "ops"
    key: Sequence[Shape] = ()

    @property
    def gate(self) -> Sequence[str]:
        """The op itself."""
        return (self.op,)

    def measure(self, session: Session) -> Iterator[list[Row]]:
        """The rows of every shape: ours first, then the baselines."""
        for shape in self.chosen(session):
            if session.skips(self.op, shape):
                continue
            if session.is_over():
                return
            base: Row = {"bench": self.op, "op": self.op, "shape": dict(shape), "axis": self.axis}
            try:
                rows = self.rows_of(shape, session)
            except torch.OutOfMemoryError as error:
                rows = {"triton": {"missing": reason(error)}}
            except AssertionError as error:
                rows = {"triton": {"missing": f"refused: wrong on these inputs: {_first_line(error)}", "refused": True}}
            yield [base | {"provider": provider} | row for provider, row in rows.items()]
            gc.collect()

    def chosen(self, session: Session) -> Sequence[Shape]:
        """The small shapes on a CPU; on a GPU the key ones, and then the others if it is not to be quick."""
        if session.timer is None:
            return self.quick
        return self.key if session.quick else [*self.key, *(shape for shape in self.shapes if shape not in self.key)]

    def rows_of(self, shape: Shape, session: Session) -> dict[str, Row]:
        """One shape, by provider."""
        needed, timer, ceilings = self.bytes(shape), session.timer, session.ceilings
        sets = min(sets_of_inputs(needed, session.cache), self.most_sets or 2**30) if timer else 1
        # The interpreter has no bfloat16.
        dtype = {} if timer else {"dtype": torch.float16}
        inputs = [self.inputs(shape, session.device, seed, **dtype) for seed in range(sets)]
        wrong = {}
        try:
            check(self, shape, inputs[0])
        except AssertionError as error:
            if not session.unverified:
                raise
            wrong = {"wrong": _first_line(error)}
        runs = {"triton": self.ours} | {name: run for name, run in self.baselines.items() if session.wants(name)}
        if timer is None or ceilings is None:
            return {name: self._plumbing(name, run, inputs[0]) | wrong for name, run in runs.items()}
        times = timer(runs, inputs)
        ours = times["triton"]
        rows: dict[str, Row] = {}
        for name, timing in times.items():
            if isinstance(timing, str) or isinstance(ours, str):
                rows[name] = {"missing": str(timing)}
                continue
            rows[name] = timed(timing, needed, self.flops(shape), ceilings)
            rows[name] |= {"times_triton": timing.median / ours.median, "peak_bytes": peak(runs[name], inputs[0])} | wrong
        return rows

    def _plumbing(self, name: str, run: Run, inputs: Inputs) -> Row:
        """Runs a provider where nothing is timed."""
        if name in self.gpu_only:
            return {"missing": "needs a GPU"}
        try:
            run(inputs)
        except Exception as error:
            return {"missing": reason(error)}
        return {"missing": "ran, untimed"}


def _first_line(error: AssertionError) -> str:
    lines = str(error).strip().splitlines() or ["the kernel disagrees with the reference"]
    return lines[0][:80]


def timed(timing: Timing, needed: int, flops: int, ceilings: Ceilings) -> Row:
    """A time next to its ceilings."""
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


def check(bench: Bench, shape: Shape, inputs: Inputs) -> None:
    """The kernel agrees with the reference.

    Raises:
        AssertionError: it does not; nothing may be timed.
    """
    for got, want in zip(_tensors(bench.ours(inputs)), _tensors(bench.oracle(inputs)), strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2, msg=lambda text: f"{bench.op} {dict(shape)}: {text}")


def _tensors(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


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


def label(shape: Shape) -> str:
    """A shape as text."""
    return " ".join(f"{key}={value}" for key, value in shape.items())


def benches(suite: str = "all", names: Sequence[str] = ()) -> list[Measurable]:
    """The benches of a suite, in the order of importance.

    Args:
        suite: one of :data:`SUITES`, or ``all``.
        names: ops to take; all if empty.

    Raises:
        ValueError: an unknown suite or op, or a suite that has no bench.
    """
    if suite != "all" and suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, needs all, {' or '.join(SUITES)}")
    from fastdllm_triton import bench as package

    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith("bench_")]
    found: list[Measurable] = [importlib.import_module(f"{package.__name__}.{name}").BENCH for name in modules]
    unknown = sorted(set(names) - {bench.op for bench in found})
    if unknown:
        raise ValueError(f"--op: got {', '.join(unknown)}, needs names among {', '.join(bench.op for bench in found)}")
    found = [bench for bench in found if suite in ("all", bench.suite) and (not names or bench.op in names)]
    if not found:
        raise ValueError(f"suite: there is no bench in {suite!r}" + (f" among {', '.join(names)}" if names else ""))

    def rank(bench: Measurable) -> tuple[int, int]:
        return SUITES.index(bench.suite), ORDER.index(bench.op) if bench.op in ORDER else len(ORDER)

    return sorted(found, key=rank)


def main(op: str) -> None:
    """A bench as a script: ``fastdllm-triton bench --op`` with the script's arguments."""
    run_command("bench", "all", "--op", op)


def run_command(*words: str) -> None:
    """A command of ``fastdllm-triton`` with these words, and the script's arguments behind them."""
    sys.argv[1:1] = words
    runpy.run_module("fastdllm_triton", run_name="__main__")
