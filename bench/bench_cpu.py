"""Whole generations on a CPU, ours and the official code's re-created, with random weights: the same forwards on both sides.

    fastdllm-triton bench cpu [--case cache=dual --case batch=1] [--out DIR] [--resume]

Ours are the functions that replace the official ones (:mod:`fastdllm_triton.compat`), theirs the loops of ``official_step.py``.
With random weights no confidence reaches a threshold, so both spread each block over :data:`FORWARDS` forwards. Nothing is timed
before both sides have given the same tokens in float32; in bfloat16 they round at other places, and ``agreement`` is the share
of generated tokens that are the same.

The sides take turns, official, ours, official, ours, and the medians count. ``median_ms`` and ``times_triton`` are by ``clock``:
CPU time of the process in one thread, which other work on the machine hardly touches, and wall time in several. Both times are
in every row. Then each side runs once more with a clock around every matrix product and every attention, for their shares of the
whole; and once in a fresh process, for its peak memory: how far the peak of resident memory
(``VmHWM``) rises above what is resident once the weights are there. The process has decoded with a tiny model before, so that
what libraries take once is not counted. A profiler of allocations would not see what the libraries of the products allocate.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from fastdllm_triton.bench._models import network_of, prompt_of
from fastdllm_triton.bench._session import ModelBench, Row, Session, Shape, label
from fastdllm_triton.bench._timing import percentiles, reason
from fastdllm_triton.bench.official_step import OfficialModel, official_generate
from fastdllm_triton.compat import dream, fast_dllm
from fastdllm_triton.model import MaskedDiffusionLM

PROMPT, GENERATED, BLOCK = 128, 64, 32
#: Of each block; Dream without a cache, which has no blocks, spreads as many over all.
FORWARDS = 6
#: Runs of each side that are timed.
TURNS = 5

THREADS = torch.get_num_threads()
DTYPES, CACHES, BATCHES = ("bfloat16", "float32"), ("dual", "prefix", "none"), (1, 4, 8)
NAMES = ("threads", "dtype", "model", "cache", "batch")
SHAPES: list[dict[str, Any]] = [
    dict(zip(NAMES, values, strict=True))
    for values in product(sorted({1, THREADS}), DTYPES, ("llada-134m", "dream-139m"), CACHES, BATCHES)
]
QUICK: list[dict[str, Any]] = [
    dict(zip(NAMES, values, strict=True))
    for values in ((1, "float32", "tiny llada", "dual", 2), (1, "bfloat16", "tiny llada", "prefix", 1),
                   (1, "float32", "tiny dream", "none", 2), (1, "float32", "tiny dream", "dual", 2))
]  # fmt: skip

#: By what both sides multiply matrices, and attend, which is products for the most part.
CLOCKED = {"products": ((torch, "mm"), (F, "linear")), "attention": ((F, "scaled_dot_product_attention"),)}

#: A generation: the sequences ``[B, P + G]`` and the number of forwards.
Generate = Callable[[], tuple[Tensor, int]]


def sides(shape: Shape) -> dict[str, Generate]:
    """A generation by each side with the same weights and prompts."""
    device = torch.device("cpu")
    network = network_of(shape["model"], device, getattr(torch, shape["dtype"]), "cpu")
    prompt = prompt_of(shape["model"], shape["batch"], PROMPT, device)
    cache, blocks = shape["cache"], GENERATED // BLOCK
    lm, model, steps = MaskedDiffusionLM(network, None), OfficialModel(network), FORWARDS * blocks
    functions = {
        "none": fast_dllm.generate,
        "prefix": fast_dllm.generate_with_prefix_cache,
        "dual": fast_dllm.generate_with_dual_cache,
    }

    def ours() -> tuple[Tensor, int]:
        if not model.is_dream:
            return functions[cache](lm, prompt, steps, GENERATED, BLOCK)
        output: Any = dream.diffusion_generate(
            lm, prompt, max_new_tokens=GENERATED, steps=steps, alg="maskgit_plus" if cache == "none" else "entropy",
            block_length=BLOCK, cache=cache, temperature=0.0, top_p=None, top_k=None, return_dict_in_generate=True,
        )  # fmt: skip
        return output.sequences, output.nfe

    def official() -> tuple[Tensor, int]:
        return official_generate(model, prompt, GENERATED, BLOCK, cache, forwards=[FORWARDS] * blocks)

    return {"cpu": ours, "official": official}


def time_in_turns(runs: Mapping[str, Generate], turns: int = TURNS) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each run of each side by both clocks, official first."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in runs}
    for _ in range(turns):
        for name in reversed(list(runs)):
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            times[name]["cpu"].append(1e3 * (time.process_time() - cpu))
            times[name]["wall"].append(1e3 * (time.perf_counter() - wall))
    return times


def shares(run: Callable[[], object]) -> Row:
    """The shares of a run's time that products and attention take."""
    spent = dict.fromkeys(CLOCKED, 0.0)

    def clocked(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] += time.perf_counter() - began
            return result

        return call

    with contextlib.ExitStack() as stack:
        for kind, places in CLOCKED.items():
            for module, name in places:
                stack.enter_context(patch.object(module, name, clocked(kind, getattr(module, name))))
        began = time.perf_counter()
        run()
        whole = time.perf_counter() - began
    return {kind: seconds / whole for kind, seconds in spent.items()}


def peak_bytes(shape: Shape, side: str) -> int | None:
    """Peak memory of a generation above the weights; None where the system does not tell, or ended the process for it."""
    if not Path("/proc/self/status").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, contextlib.suppress(BrokenProcessPool):
        return pool.submit(_peak_here, dict(shape), side).result()
    return None


def _peak_here(shape: Shape, side: str) -> int:
    torch.set_num_threads(shape["threads"])
    family = "tiny dream" if "dream" in shape["model"] else "tiny llada"
    sides({**shape, "model": family})[side]()
    run = sides(shape)[side]
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes that Linux tells of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


class CpuBench(ModelBench):
    """Generations of whole models on a CPU."""

    op = suite = "cpu"
    shapes, quick = SHAPES, QUICK
    baselines, ours = ("official",), ("cpu",)

    @property
    def gate(self) -> Sequence[str]:
        """No kernel is used; tokens are compared before each case is timed."""
        return ()

    def chosen(self, session: Session) -> Sequence[Shape]:
        return self.quick if session.quick else self.shapes

    def rows_of(self, shape: Shape, session: Session) -> Iterator[list[Row]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(shape["threads"])
        try:
            rows = self.measured(shape, session)
        finally:
            torch.set_num_threads(threads)
        base: Row = {"bench": self.op, "op": self.op, "shape": dict(shape), "axis": "batch"}
        yield [base | {"provider": provider} | row for provider, row in rows.items()]

    def measured(self, shape: Shape, session: Session) -> dict[str, Row]:
        """The rows of both sides by provider."""
        runs = {name: run for name, run in sides(shape).items() if session.wants(name)}
        rows: dict[str, Row] = {name: {} for name in runs}
        tokens, forwards = runs["cpu"]()
        if "official" in runs:
            try:
                theirs, count = runs["official"]()
            except Exception as error:  # Dream's dual cache is for one row
                rows["official"] = {"missing": reason(error)}
                del runs["official"]
            else:
                agreement = (tokens == theirs)[:, PROMPT:].double().mean().item()
                rows["cpu"] = {"agreement": agreement}
                if count != forwards or (shape["dtype"] == "float32" and agreement < 1):
                    wrong = f"{forwards} forwards against {count}, {agreement:.1%} of the tokens are the official ones"
                    if not session.unverified:
                        return {name: {"missing": f"refused: {wrong}", "refused": True} for name in rows}
                    rows = {name: row | {"wrong": wrong} for name, row in rows.items()}
        times = time_in_turns(runs)
        clock = "cpu" if shape["threads"] == 1 else "wall"
        for name, run in runs.items():
            timing, (wall, cpu) = percentiles(times[name][clock]), (percentiles(times[name][c]).median for c in ("wall", "cpu"))
            rows[name] |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "clock": clock}
            rows[name] |= {"wall_ms": wall, "cpu_ms": cpu, "turns": len(times[name][clock]), "forwards": forwards}
            rows[name] |= shares(run) | {"peak_bytes": peak_bytes(shape, name)}
        for row in rows.values():
            if "median_ms" in row:
                row["times_triton"] = row["median_ms"] / rows["cpu"]["median_ms"]
                row["times_wall"] = row["wall_ms"] / rows["cpu"]["wall_ms"]
        return rows


@dataclass(frozen=True)
class Claim:
    """What must hold, and the case where it holds the least.

    Attributes:
        text: what.
        holds: whether it does, in all cases.
        worst: the figure of the worst case.
        where: that case.
        cases: how many there are.
    """

    text: str
    holds: bool
    worst: float
    where: str
    cases: int


def claims(rows: Sequence[Row]) -> list[Claim]:
    """What must hold of the rows of the models that are meant, as far as they were measured."""
    pairs: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["bench"] == "cpu" and "median_ms" in row and not row["shape"]["model"].startswith("tiny"):
            pairs.setdefault(label(row["shape"]), {})[row["provider"]] = row
    found = []

    def claim(text: str, least: float, figures: Mapping[str, float]) -> None:
        if figures:
            where = min(figures, key=lambda case: figures[case])
            found.append(Claim(text, figures[where] >= least, figures[where], where, len(figures)))

    gains = {where: pair["official"]["times_triton"] for where, pair in pairs.items() if "official" in pair and "cpu" in pair}
    dual = {case: gains[case] for case in gains if {"dtype=bfloat16", "cache=dual"} <= set(case.split())}
    memory = {
        case: pairs[case]["official"]["peak_bytes"] / max(pairs[case]["cpu"]["peak_bytes"], 1)
        for case in gains
        if all(pairs[case][side]["peak_bytes"] is not None for side in ("cpu", "official"))
    }
    claim("official time / ours: at least 1 everywhere", 1, gains)
    claim("bfloat16, dual, batch 1: at least 1.3", 1.3, {case: gain for case, gain in dual.items() if case.endswith("batch=1")})
    claim("bfloat16, dual, batch 4 and 8: at least 1.5", 1.5, {c: gain for c, gain in dual.items() if not c.endswith("batch=1")})
    inside = {case: pair["cpu"]["products"] + pair["cpu"]["attention"] for case, pair in pairs.items() if "cpu" in pair}
    claim("share of our time in products and attention: at least 0.8", 0.8, inside)
    claim("official peak memory above the weights / ours: at least 1", 1, memory)
    return found


def claims_table(claimed: Sequence[Claim]) -> Table:
    """What must hold, whether it does, and where the least."""
    table = Table("must hold", "", "worst", "case", "cases", title="What must hold on a CPU")
    for claim in claimed:
        style, verdict = (None, "pass") if claim.holds else ("red", "FAIL")
        table.add_row(claim.text, verdict, f"{claim.worst:.2f}", claim.where, str(claim.cases), style=style)
    return table


BENCH = CpuBench()
