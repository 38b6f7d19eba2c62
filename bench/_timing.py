"""How providers are timed: on a GPU, from memory rather than from the L2 cache, taking turns.

A launch of some microseconds cannot be timed by itself, and inputs that a previous launch left in the cache flatter it. So
the launches of a provider are captured in a CUDA graph, each with the next of several sets of inputs, which together are
larger than the cache. A provider that cannot be captured leaves nothing behind: each has a stream and a memory pool of its
own. A GPU also changes its clock while it is measured. So the providers take turns, a graph of ours, a graph of each
baseline, and again; all are queued ahead, so that the GPU never waits for the host. What is reported is the median over the
turns, with the 20th and 80th percentile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdllm_triton.tools.profile import Limits
from fastdllm_triton.verify.cases._base import Random

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], Any]
Events = tuple[torch.cuda.Event, torch.cuda.Event]

#: Turns of each provider, and the milliseconds that a turn takes at least.
TURNS, TURN_MS = 50, 0.5
#: Most replays of a graph in a turn.
MOST_REPLAYS = 64
#: Sets of inputs take at most this many bytes.
MEMORY = 16 * 2**30


@dataclass(frozen=True)
class Timing:
    """Milliseconds a launch."""

    median: float
    p20: float
    p80: float


#: Times providers together over sets of inputs; a provider that cannot run has a reason instead of a time.
Timer = Callable[[Mapping[str, Run], Sequence[Inputs]], dict[str, Timing | str]]


def time_in_turns(runs: Mapping[str, Run], inputs: Sequence[Inputs]) -> dict[str, Timing | str]:
    """Times providers that do the same job."""
    times: dict[str, Timing | str] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    replays: dict[str, int] = {}
    for name, run in runs.items():
        try:
            graph = _captured(run, inputs)
            replays[name] = _replays(graph)
            graphs[name] = graph
        except Exception as error:
            times[name] = reason(error)
    turns: dict[str, list[Events]] = {name: [] for name in graphs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            turns[name].append(events_around(graph.replay, replays[name]))
    torch.cuda.synchronize()
    for name, events in turns.items():
        launches = len(inputs) * replays[name]
        times[name] = percentiles([begin.elapsed_time(end) / launches for begin, end in events])
    return {name: times[name] for name in runs}


def events_around(run: Callable[[], object], repeat: int = 1) -> Events:
    """Two events on the GPU's clock, with runs in a row between them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    return begin, end


def _captured(run: Run, inputs: Sequence[Inputs]) -> torch.cuda.CUDAGraph:
    """A graph of one launch for each set of inputs."""
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs[:3]:
            run(one)  # compiles, and fills caches of what is made once
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for one in inputs:
                run(one)
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own as the current one
    return graph


def _replays(graph: torch.cuda.CUDAGraph) -> int:
    graph.replay()
    begin, end = events_around(graph.replay)
    torch.cuda.synchronize()
    return max(1, min(MOST_REPLAYS, math.ceil(TURN_MS / max(begin.elapsed_time(end), 1e-3))))


def pool_bytes() -> int:
    """Bytes that the memory pools of captured graphs hold. A replay allocates nothing, so no peak shows them."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


def is_lost(device: torch.device) -> bool:
    """Whether a kernel has failed in a way that leaves the GPU unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def reason(error: Exception) -> str:
    """Why a provider did not run, in a line."""
    if isinstance(error, ImportError):
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "too little GPU memory"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:80]}" if first else type(error).__name__


def percentiles(milliseconds: Sequence[float]) -> Timing:
    times = torch.tensor(milliseconds, dtype=torch.float64)
    return Timing(*(float(times.quantile(q)) for q in (0.5, 0.2, 0.8)))


def sets_of_inputs(bytes_each: int, cache: int) -> int:
    """How many sets of inputs: three times the L2 cache, within the memory allowed, and two at the least."""
    return max(2, min(math.ceil(3 * cache / bytes_each), MEMORY // bytes_each))


#: What the machine reaches at its best, measured before anything else: with a plain copy of 1 GiB, and with cuBLAS on a product
#: of 8192 x 8192 matrices in bfloat16.
Ceilings = Limits


def measure_ceilings(device: torch.device, timer: Timer) -> Ceilings:
    """Times a copy and a product of normal numbers, since zeros draw less power and run at a higher clock."""
    random, size = Random(device, torch.bfloat16), 8192
    copies = [{"x": random(2**28, dtype=torch.float32), "y": torch.empty(2**28, device=device)} for _ in range(2)]
    copy = timer({"copy": lambda i: i["y"].copy_(i["x"])}, copies)["copy"]
    del copies
    factors = [{name: random(size, size) for name in ("a", "b", "out")} for _ in range(2)]
    product = timer({"matmul": lambda i: torch.matmul(i["a"], i["b"], out=i["out"])}, factors)["matmul"]
    if isinstance(copy, str) or isinstance(product, str):
        raise RuntimeError(f"the ceilings of this GPU could not be measured: copy {copy}, matmul {product}")
    return Ceilings(2 * 2**30 / (copy.median / 1e3), 2 * size**3 / (product.median / 1e3))
