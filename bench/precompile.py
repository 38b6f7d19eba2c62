"""Compiles what the key shapes of all benches launch, ours and the baselines, in as many processes as there are cores.

    python bench/precompile.py [--op NAME]... [--device cpu --quick]

Compilers use one core each, and keep what they have made on disk, Triton's as well as torch.compile's. So every provider is
launched once in some process, and the benches then find it compiled. Of a step one layer is enough, as all are alike. What
cannot be launched is none of this script's business: the benches say why.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Annotated

import torch
import typer

from fastdllm_triton.bench import bench_step
from fastdllm_triton.bench._models import network_of, prompt_of
from fastdllm_triton.bench._run import benches
from fastdllm_triton.bench._session import Bench, Measurable, Session, Shape, label, needs_gpu
from fastdllm_triton.bench._timing import reason, time_in_turns
from fastdllm_triton.models.transformer import Transformer
from fastdllm_triton.verify import jobs_for


def shapes_of(bench: Measurable, quick: bool) -> Sequence[Shape]:
    """The key shapes of a bench; where there is no GPU the small ones."""
    return bench.chosen(Session(torch.device("cpu"), timer=None if quick else time_in_turns, quick=True))


def providers_of(bench: Measurable, shape: Shape, device: torch.device, quick: bool) -> dict[str, Callable[[], object]]:
    """What a bench launches at a shape."""
    dtype = torch.float16 if quick else torch.bfloat16
    if isinstance(bench, Bench):
        inputs = bench.cases.inputs(shape, device, dtype)
        baselines = {name: partial(run, inputs) for name, run in bench.baselines.items() if not (quick and needs_gpu(name))}
        return {"triton": partial(bench.function, **inputs), **baselines}
    network = network_of(shape["model"], device, torch.float32 if quick else dtype, layers=1)
    ids = prompt_of(shape["model"], shape["batch"], shape["context"], device)

    def step_of(network: Transformer) -> None:
        step = bench_step.OurStep(network, ids, shape["window"])
        for run in (step.reset, step.refresh, step.step):
            run()

    fused = {} if quick else {"triton fused": partial(step_of, bench_step.launched(network, "triton fused"))}
    return {"triton": partial(step_of, network), **fused}


def launch(op: str, shape: Shape, device: str, quick: bool) -> dict[str, str]:
    """Launches every provider once; returns why some could not be launched."""
    failed = {}
    (bench,) = benches("all", [op])
    for name, run in providers_of(bench, shape, torch.device(device), quick).items():
        try:
            run()
        except Exception as error:  # Whatever one provider raises, the others are still to be launched.
            failed[name] = reason(error)
    return failed


def main(
    op: Annotated[list[str] | None, typer.Option(help="An op, or 'step'. All if not given.")] = None,
    device: Annotated[str, typer.Option(help="'cuda', or 'cpu' to try the path.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, which the interpreter runs too.")] = False,
) -> None:
    """Compile what the key shapes of all benches launch."""
    began = time.perf_counter()
    chosen = benches("all", op) if op else [*benches("step"), *benches("ops")]
    cases = [(bench.op, shape) for bench in chosen for shape in shapes_of(bench, quick)]
    processes = min(jobs_for(torch.device(device)), len(cases))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(launch, *case, device, quick): case for case in cases}
        for future in as_completed(running):
            name, shape = running[future]
            failed = {"all": error} if (error := future.exception()) else future.result()
            typer.echo(f"{time.perf_counter() - began:5.1f} s  {name} {label(shape)}{f': not {failed}' if failed else ''}")


if __name__ == "__main__":
    typer.run(main)
