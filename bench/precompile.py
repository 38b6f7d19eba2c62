"""Compiles what the key shapes of all benches launch, ours and the baselines, in as many processes as there are cores.

    python bench/precompile.py [--op NAME]... [--device cpu --quick]

Compilers use one core each, and keep what they have made on disk, Triton's as well as torch.compile's. So every provider is
launched once in some process, and the benches then find it compiled. Of a step one layer is enough, as all are alike. What
cannot be launched is none of this script's business: the benches say why.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Annotated

import torch
import typer

from fastdllm_triton.bench import bench_step
from fastdllm_triton.bench._models import network_of, prompt_of
from fastdllm_triton.bench._session import Bench, Shape, benches, label, needs_gpu
from fastdllm_triton.bench._timing import Run, reason
from fastdllm_triton.models.transformer import Transformer
from fastdllm_triton.verify import jobs_for


def shapes_of(op: str, quick: bool) -> list[Shape]:
    """The key shapes of an op or of a step; where there is no GPU the small ones."""
    (bench,) = benches("all", [op])
    if isinstance(bench, Bench):
        return [bench.cases.small] if quick else list(bench.cases.key)
    return list(bench_step.QUICK[:1] if quick else bench_step.SHAPES[: bench_step.KEY])


def launch(op: str, shape: Shape, device: str, quick: bool) -> list[str]:
    """Launches every provider once.

    Returns:
        Names of those that could not be launched.
    """
    what = f"{op} {label(shape)}"
    target, dtype = torch.device(device), torch.float16 if quick else torch.bfloat16
    (bench,) = benches("all", [op])
    if isinstance(bench, Bench):
        inputs = bench.cases.inputs(shape, target, dtype)
        providers: dict[str, Run] = {"triton": lambda i: bench.function(**i)}
        providers |= {name: run for name, run in bench.baselines.items() if not (quick and needs_gpu(name))}
        return [name for name, run in providers.items() if not _runs(f"{what} {name}", partial(run, inputs))]
    network = network_of(shape["model"], target, torch.float32 if quick else dtype, layers=1)
    ids = prompt_of(shape["model"], shape["batch"], shape["context"], target)
    networks = {"triton": network} if quick else {"triton": network, "triton fused": bench_step.launched(network, "triton fused")}

    def one(network: Transformer) -> None:
        step = bench_step.OurStep(network, ids, shape["window"])
        for run in (step.reset, step.refresh, step.step):
            run()

    return [name for name, network in networks.items() if not _runs(f"{what} {name}", partial(one, network))]


def _runs(what: str, run: Callable[[], object]) -> bool:
    """Whether it ran; why not goes to standard error."""
    try:
        run()
    except Exception as error:  # Whatever one provider raises, the others are still to be launched.
        typer.echo(f"{what}: {reason(error)}", err=True)
        return False
    return True


def main(
    op: Annotated[list[str] | None, typer.Option(help="An op, or 'step'. All if not given.")] = None,
    device: Annotated[str, typer.Option(help="'cuda', or 'cpu' to try the path.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, which the interpreter runs too.")] = False,
) -> None:
    """Compile what the key shapes of all benches launch."""
    began = time.perf_counter()
    ops = op or ["step", *(bench.op for bench in benches("ops"))]
    wanted = [(name, shape) for name in ops for shape in shapes_of(name, quick)]
    processes = min(jobs_for(torch.device(device)), len(wanted))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(launch, name, shape, device, quick): (name, shape) for name, shape in wanted}
        for future in as_completed(running):
            name, shape = running[future]
            failed = ["all", str(error)] if (error := future.exception()) else future.result()
            ended = f"not {', '.join(failed)}" if failed else "all"
            typer.echo(f"{time.perf_counter() - began:5.1f} s  {name} {label(shape)}: {ended}")


if __name__ == "__main__":
    typer.run(main)
