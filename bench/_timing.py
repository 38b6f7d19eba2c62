"""How an op is timed: on a GPU, from memory rather than from the L2 cache, many launches in one CUDA graph.

A launch of some microseconds cannot be timed by itself, and inputs that a previous launch left in the cache flatter it. So
each launch of a graph takes the next of several sets of inputs, which together are larger than the cache; a replay is timed
with events and divided by its launches. What is reported is the median over replays, with the 20th and 80th percentile.

Nothing is timed before the kernel agrees with the reference on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], Any]
Row = dict[str, Any]

REPLAYS = 50
LAUNCHES = 40
#: Sets of inputs take at most this many bytes.
MEMORY = 16 * 2**30


@dataclass(frozen=True)
class Timing:
    """Milliseconds a launch."""

    median: float
    p20: float
    p80: float


Timer = Callable[[Run, Sequence[Inputs]], Timing]


@dataclass(frozen=True)
class Bench:
    """What a bench of one op consists of.

    Attributes:
        op: the op's name.
        shapes: what to run, each a mapping of names to numbers.
        inputs: makes the inputs of a shape, on a device, from a seed.
        ours: the kernel.
        oracle: the reference; its result is compared with the kernel's.
        baselines: what else does the job. A baseline that rejects a shape is left out there, and the table says so.
        bytes: of memory traffic that a shape cannot do without.
        flops: of a shape; 0 if they do not matter.
    """

    op: str
    shapes: Sequence[Mapping[str, Any]]
    inputs: Callable[[Mapping[str, Any], torch.device, int], Inputs]
    ours: Run
    oracle: Run
    baselines: Mapping[str, Run]
    bytes: Callable[[Mapping[str, Any]], int]
    flops: Callable[[Mapping[str, Any]], int] = lambda shape: 0


def time_cold(run: Run, inputs: Sequence[Inputs]) -> Timing:
    """Times ``run`` over sets of inputs in turn, in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs[:3]:
            run(one)  # compiles, and fills caches of what is made once
    torch.cuda.current_stream().wait_stream(stream)
    launches = math.ceil(LAUNCHES / len(inputs)) * len(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(launches):
            run(inputs[launch % len(inputs)])
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return percentiles([a.elapsed_time(b) / launches for a, b in pairwise(events)])


def percentiles(milliseconds: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    times = torch.tensor(milliseconds, dtype=torch.float64)
    return Timing(*(float(times.quantile(q)) for q in (0.5, 0.2, 0.8)))


def sets_of_inputs(bytes_each: int, cache: int) -> int:
    """How many sets of inputs: three times the L2 cache, within the memory allowed, and two at the least."""
    return max(2, min(math.ceil(3 * cache / bytes_each), MEMORY // bytes_each))


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Bytes a second of a plain copy of 1 GiB, read and write counted: the ceiling of everything bound by memory."""
    buffers = [{"x": torch.zeros(2**28, device=device), "y": torch.empty(2**28, device=device)} for _ in range(2)]
    return 2 * 2**30 / (timer(lambda i: i["y"].copy_(i["x"]), buffers).median / 1e3)


def measure(
    bench: Bench, device: torch.device, *, timer: Timer, bandwidth: float, cache: int, only: Sequence[str] = ()
) -> list[Row]:
    """A row for each shape and provider."""
    rows = []
    for shape in bench.shapes:
        needed = bench.bytes(shape)
        inputs = [bench.inputs(shape, device, seed) for seed in range(sets_of_inputs(needed, cache))]
        check(bench, shape, inputs[0])
        ours = timer(bench.ours, inputs)
        for provider, run in {"triton": bench.ours, **bench.baselines}.items():
            if provider != "triton" and only and provider not in only:
                continue
            row: Row = {"op": bench.op, **shape, "provider": provider}
            try:
                timing = ours if provider == "triton" else timer(run, inputs)
            except Exception as error:  # whatever a library says to a shape it does not take
                rows.append(
                    row | {"rejected": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}" if str(error) else ""}
                )
                continue
            seconds = timing.median / 1e3
            rows.append(
                row
                | {f"{name}_ms": value for name, value in asdict(timing).items()}
                | {
                    "bytes": needed,
                    "gb_per_s": needed / seconds / 1e9,
                    "of_copy": needed / seconds / bandwidth,
                    "tflop_per_s": bench.flops(shape) / seconds / 1e12,
                    "times_triton": timing.median / ours.median,
                }
            )
    return rows


def check(bench: Bench, shape: Mapping[str, Any], inputs: Inputs) -> None:
    """The kernel agrees with the reference.

    Raises:
        AssertionError: it does not; nothing may be timed.
    """
    for got, want in zip(_tensors(bench.ours(inputs)), _tensors(bench.oracle(inputs)), strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2, msg=lambda text: f"{bench.op} {dict(shape)}: {text}")


def _tensors(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def table(rows: Sequence[Row], bandwidth: float) -> Table:
    """The rows, with every number next to its ceiling."""
    found = Table(title=f"copy: {bandwidth / 1e9:.0f} GB/s; a baseline's time over Triton's is how many times faster Triton is")
    measured = ("median_ms", "p20_ms", "p80_ms", "gb_per_s", "of_copy", "tflop_per_s", "times_triton")
    shape = [key for key in rows[0] if key not in (*measured, "op", "provider", "bytes", "rejected")]
    for key in (*shape, "provider", *measured):
        found.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        numbers = [f"{row[key]:.4g}" for key in measured] if "rejected" not in row else [row["rejected"]]
        found.add_row(*(str(row[key]) for key in shape), row["provider"], *numbers)
    return found


def plot(rows: Sequence[Row], bandwidth: float, path: Path) -> None:
    """Bandwidth by shape, one line a provider, under the line of a copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "rejected" not in row]
    keys = [key for key in rows[0] if key not in ("op", "provider") and not key.endswith("_ms")]
    keys = keys[: keys.index("bytes")]
    labels = list(dict.fromkeys(" ".join(f"{key}={row[key]}" for key in keys) for row in timed))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.35 * len(labels)), 5), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in timed):
        mine = {" ".join(f"{key}={row[key]}" for key in keys): row["gb_per_s"] for row in timed if row["provider"] == provider}
        axes.plot(range(len(labels)), [mine.get(label, math.nan) for label in labels], marker=".", label=provider)
    axes.axhline(bandwidth / 1e9, color="grey", linestyle="--", label="copy")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_ylabel("GB/s")
    axes.set_title(rows[0]["op"])
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Runs a bench from the command line. Without a GPU it says so, and measures and claims nothing."""
    parser = argparse.ArgumentParser(prog=f"bench_{bench.op}", description=f"Times {bench.op} on a GPU.")
    parser.add_argument("--json", type=Path, help="write the rows and what they were measured on")
    parser.add_argument("--plot", type=Path, help="draw the rows (needs matplotlib)")
    parser.add_argument("--only", default="", help=f"baselines to run, by commas, of: {', '.join(bench.baselines)}")
    arguments = parser.parse_args(argv)
    only = [name for name in arguments.only.split(",") if name]
    unknown = set(only) - set(bench.baselines)
    if unknown:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, needs names among {', '.join(bench.baselines)}")
    if not torch.cuda.is_available():
        print(f"bench_{bench.op}: torch sees no GPU here, so nothing is measured.")
        return 0
    device = torch.device("cuda")
    torch.cuda.set_device(0)
    bandwidth = copy_bandwidth(device, time_cold)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    rows = measure(bench, device, timer=time_cold, bandwidth=bandwidth, cache=cache, only=only)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, bandwidth))
    if arguments.json:
        machine = {
            "gpu": torch.cuda.get_device_name(device),
            "copy_gb_per_s": bandwidth / 1e9,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        }
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        plot(rows, bandwidth, arguments.plot)
    return 0
