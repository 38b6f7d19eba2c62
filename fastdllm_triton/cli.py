"""The command line: ``fastdllm-triton generate``, ``demo``, ``info`` and ``compile-report``."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from ._console import clear_errors, console, errors, wide
from .cli_options import BackendChoice, BackendOption, DeviceOption, DtypeOption, ModelOption
from .commands.bench import bench
from .commands.performance_report import performance_report
from .commands.roofline import roofline
from .commands.verify import verify
from .decoding import EntropyBudget, Factor, FixedSteps, GenerationOutput, Strategy, Threshold
from .demo import demo as run_demo
from .live import LiveView
from .loading import load
from .model import MaskedDiffusionLM
from .ops import resolve

#: The option that asks for each strategy.
_STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "threshold": Threshold,
    "factor": Factor,
    "steps": FixedSteps,
    "entropy-budget": EntropyBudget,
}

app = typer.Typer(help="Fast-dLLM decoding of masked-diffusion language models.", no_args_is_help=True, add_completion=False)


class CacheChoice(StrEnum):
    """Caches."""

    none = "none"
    prefix = "prefix"
    dual = "dual"


@app.command()
def generate(
    model: ModelOption = "tiny",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Several are decoded as a batch.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt a line; a .jsonl file holds objects with a 'prompt'; '-' is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the checkpoint's chat template.")] = False,
    gen_length: Annotated[int | None, typer.Option(help="Tokens to generate (the model's default, or 128).")] = None,
    block_length: Annotated[int | None, typer.Option(help="Slots decoded together (the model's default, or 32).")] = None,
    cache: Annotated[
        CacheChoice, typer.Option(help="What a step recomputes: everything, from the block on, or the block.")
    ] = CacheChoice.dual,
    threshold: Annotated[float | None, typer.Option(help="Commit every token this sure, in (0, 1]. The default, at 0.9.")] = None,
    factor: Annotated[float | None, typer.Option(help="Commit by the factor rule, above 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Spread the generation evenly over this many forwards.")] = None,
    entropy_budget: Annotated[float | None, typer.Option(help="Commit while the entropies sum to this many nats.")] = None,
    score: Annotated[
        str | None, typer.Option(help="confidence, margin, neg_entropy or random, where the strategy allows it.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Row b draws with seed + b.")] = 0,
    stop_at_eos: Annotated[bool, typer.Option(help="Leave out the blocks after an end token.")] = True,
    forbid: Annotated[list[int] | None, typer.Option(help="A token id that is never committed.")] = None,
    refresh_every: Annotated[int | None, typer.Option(help="Forwards between refreshes of the cache within a block.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = BackendChoice.auto,
    live: Annotated[bool, typer.Option("--live", help="Show the block denoise as it happens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Generate text from one or more prompts."""
    with clear_errors():
        prompts = _prompts(prompt, prompt_file)
        options = {"threshold": threshold, "factor": factor, "steps": steps, "entropy-budget": entropy_budget}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"--{' and --'.join(given)} exclude each other; give one of --{', --'.join(options)}")
        name, value = next(iter(given.items()), ("threshold", 0.9))
        strategy = _STRATEGIES[name](value, **({} if score is None else {"score": score}))
        if live and as_json:
            raise ValueError("--live and --json exclude each other")

        lm = load(model, device=device, dtype=dtype, backend=backend.value)
        lengths: dict[str, Any] = {"gen_length": gen_length, "block_length": block_length}
        config = lm.options(
            cache=cache.value,
            strategy=strategy,
            temperature=temperature,
            seed=seed,
            stop_at_eos=stop_at_eos,
            forbidden=tuple(forbid or ()),
            refresh_every=refresh_every,
            **{name: value for name, value in lengths.items() if value is not None},
        )
        rows = [lm.encode(text, chat=chat) for text in prompts]
        view = LiveView(lm, config.gen_length, config.block_length, console) if live else None
        with view or nullcontext():
            output = lm.generate(rows, config, callback=view)
        if live:
            console.print()

        if as_json:
            typer.echo(json.dumps(_record(lm, prompts, output)))
            return
        for text, answer in zip(prompts, output.texts, strict=True):
            console.print(Text(text, style="bold"))
            console.print(Text(answer))
        console.print(
            f"[dim]{output.nfe} forwards ({output.refreshes} refreshes, {output.steps} steps), "
            f"{output.tokens_per_forward:.2f} tokens per forward, {output.tokens_per_second:.1f} tokens/s, "
            f"{output.seconds:.2f} s on {lm.device}[/dim]"
        )


def _record(lm: MaskedDiffusionLM, prompts: list[str], output: GenerationOutput) -> dict[str, Any]:
    """A generation as ``--json`` tells it."""
    return {
        "model": str(lm.folder),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "backend": lm.network.ops.name,
        "nfe": output.nfe,
        "refreshes": output.refreshes,
        "steps": output.steps,
        "committed": output.committed,
        "tokens_per_forward": output.tokens_per_forward,
        "seconds": output.seconds,
        "tokens_per_second": output.tokens_per_second,
        "results": [
            {
                "prompt": prompt,
                "text": output.texts[row],
                "ids": output.ids(row),
                "forwards": int(output.row_forwards[row]),
                "step_map": output.step_map[row].tolist(),
                "confidence": [None if math.isnan(p) else p for p in output.confidence[row].tolist()],
            }
            for row, prompt in enumerate(prompts)
        ],
    }


@app.command()
def demo(
    count: Annotated[int, typer.Option(min=1, help="Problems to decode.")] = 8,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 1,
    device: DeviceOption = None,
    backend: BackendOption = BackendChoice.auto,
) -> None:
    """Decode unseen problems with the built-in model in every way, side by side."""
    with clear_errors():
        run_demo(console, count, seed, device, backend.value)


@app.command()
def info() -> None:
    """Versions, the device, and the backend with the reason why it is chosen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = resolve("auto", device)
    table = Table(show_header=False, box=None)
    for package in ("fastdllm-triton", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy"):
        table.add_row(package, _version(package))
    table.add_row("python", platform.python_version())
    table.add_row(
        "device", torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    table.add_row("backend", f"{ops.name}: {ops.reason}")
    console.print(table)


@app.command("compile-report")
def compile_report_command(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All if not given.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as window_attention. All if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
    compare: Annotated[Path | None, typer.Option(help="An earlier report: say what changed, and fail if anything did.")] = None,
) -> None:
    """Compile every kernel for every architecture, without a GPU: registers, spills, shared memory, instructions.

    Ends with status 1 if a configuration spills or does not fit.
    """
    with clear_errors():
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError("compile-report needs triton, which is not installed")
        from . import compile_report as report

        earlier = None if compare is None else report.read_json(compare)
        records = report.compile_report(arch, op)
        wide(160).print(report.render(records))
        if json_file is not None:
            report.write_json(records, json_file)
        faults = report.problems(records) + (report.differences(records, earlier) if earlier is not None else [])
        for fault in faults:
            errors.print(Text(fault, style="red"))
    if faults:
        raise typer.Exit(1)


app.command()(bench)
app.command("performance-report")(performance_report)
app.command()(roofline)
app.command()(verify)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts from the options, or from standard input."""
    if given and file:
        raise ValueError("--prompt and --prompt-file exclude each other")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise ValueError("give --prompt, --prompt-file, or prompts on standard input")
    text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if file is not None and file.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"] for line in lines]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"--prompt-file: {file} must hold one JSON object with a 'prompt' a line ({error!r})") from None
    if not lines:
        raise ValueError(f"{'standard input' if file is None else file} holds no prompt")
    return lines


if __name__ == "__main__":
    app()
