"""The command line: ``fastdllm-triton generate``, ``demo``, ``info`` and ``compile-report``."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from . import cli_options as cli
from ._console import clear_errors, console, errors, wide
from .commands.bench import bench
from .commands.chat import chat as chat_command
from .commands.evaluate import evaluate, lm_eval
from .commands.info import info
from .commands.inspect import inspect
from .commands.performance_report import performance_report
from .commands.progress import counting
from .commands.roofline import roofline
from .commands.verify import verify
from .decoding import GenerationOutput
from .demo import demo as run_demo
from .files import check_writable, naming, write_records
from .live import LiveView, Painter
from .loading import load
from .model import MaskedDiffusionLM
from .settings import changed, strategy_of
from .trace import check_target

app = typer.Typer(help="Fast-dLLM decoding of masked-diffusion language models.", no_args_is_help=True, add_completion=False)


@app.command()
def generate(
    model: cli.ModelOption = "tiny",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Several are decoded as a batch.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt a line; a .jsonl file holds objects with a 'prompt'; '-' is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the checkpoint's chat template.")] = False,
    gen_length: cli.GenLengthOption = None,
    block_length: cli.BlockLengthOption = None,
    cache: cli.CacheOption = cli.CacheChoice.dual,
    threshold: cli.ThresholdOption = None,
    factor: cli.FactorOption = None,
    steps: cli.StepsOption = None,
    entropy_budget: cli.EntropyBudgetOption = None,
    score: cli.ScoreOption = None,
    temperature: cli.TemperatureOption = 0.0,
    seed: cli.SeedOption = 0,
    stop_at_eos: cli.StopAtEosOption = True,
    forbid: Annotated[list[int] | None, typer.Option(help="A token id that is never committed.")] = None,
    refresh_every: cli.RefreshEveryOption = None,
    prompt_refresh: cli.PromptRefreshOption = None,
    suffix_window: cli.SuffixWindowOption = None,
    look_back: cli.LookBackOption = 0,
    look_ahead: cli.LookAheadOption = 0,
    lockstep: Annotated[bool, typer.Option("--lockstep", help="Rows of a batch begin each block together.")] = False,
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    live: Annotated[bool, typer.Option("--live", help="Show the block denoise as it happens.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Record the generation: .html, a page that replays it, or .json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Generate text from one or more prompts. Ctrl-C prints the text so far and ends with status 130."""
    with clear_errors():
        prompts = _prompts(prompt, prompt_file)
        if live and as_json:
            raise ValueError("--live and --json exclude each other")
        options = {
            "gen_length": gen_length,
            "block_length": block_length,
            "cache": cache.value,
            "threshold": threshold,
            "factor": factor,
            "steps": steps,
            "entropy_budget": entropy_budget,
            "score": score,
            "temperature": temperature,
            "seed": seed,
            "stop_at_eos": stop_at_eos,
            "forbidden": tuple(forbid or ()),
            "refresh_every": refresh_every,
            "prompt_refresh": prompt_refresh,
            "suffix_window": suffix_window,
            "look_back": look_back,
            "look_ahead": look_ahead,
            "lockstep": lockstep,
        }
        given = {name: value for name, value in options.items() if value is not None}
        strategy_of(given)  # refused before the model is loaded
        if trace is not None:
            check_target("--trace", trace)
        lm = load(model, device=device, dtype=dtype, backend=backend.value)
        config = changed(lm.defaults, given)
        rows = [lm.encode(text, chat=chat) for text in prompts]
        view = LiveView(lm, config.gen_length, config.block_length, console) if live else None
        stopped: BaseException | None = None
        try:
            with view or nullcontext():
                output = lm.generate(rows, config, callback=view, trace=trace)
        except (KeyboardInterrupt, OSError) as error:
            if not isinstance(found := getattr(error, "output", None), GenerationOutput):
                raise
            output, stopped = found, error
        interrupted = isinstance(stopped, KeyboardInterrupt)
        if live:
            console.print()

        if as_json:
            typer.echo(json.dumps(_record(lm, prompts, output) | {"interrupted": interrupted}))
        else:
            painter = Painter(lm, lm.config.mask_id)
            for row, text in enumerate(prompts):
                console.print(Text(text, style="bold"), soft_wrap=True)
                console.print(painter.paint(output.ids(row)) if interrupted else Text(output.texts[row]), soft_wrap=True)
            console.print(
                f"[dim]{output.nfe} forwards ({output.refreshes} refreshes, {output.steps} steps), "
                f"{output.tokens_per_forward:.2f} tokens per forward, {output.tokens_per_second:.1f} tokens/s, "
                f"{output.seconds:.2f} s on {lm.device}[/dim]"
            )
        if interrupted:
            errors.print(Text("interrupted; what is still masked is shaded" if not as_json else "interrupted", style="red"))
            for note in getattr(stopped, "__notes__", ()):
                errors.print(Text(note, style="red"), soft_wrap=True)
            raise typer.Exit(130)
        if stopped is not None:  # The trace could not be written; the text is not lost with it.
            raise OSError(f"--{stopped}" if str(stopped).startswith("trace: ") else str(stopped))


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
    device: cli.DeviceOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
) -> None:
    """Decode unseen problems with the built-in model in every way, side by side."""
    with clear_errors():
        run_demo(console, count, seed, device, backend.value)


@app.command("compile-report")
def compile_report_command(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All if not given.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as window_attention. All if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print every configuration, not a line an op.")] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier report: say what changed, and fail if anything did.")] = None,
) -> None:
    """Compile every kernel for every architecture, without a GPU: registers, spills, shared memory, instructions.

    All of it takes about 5 minutes on two cores, and next to nothing the second time. Ends with status 1 if a configuration
    spills or does not fit.
    """
    with clear_errors():
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError("compile-report needs triton, which is not installed")
        from . import compile_report as report

        check_writable("--json", json_file)
        earlier = None if compare is None else report.read_json(compare)
        with counting("configurations") as progress:
            records = report.compile_report(arch, op, on_progress=progress)
        wide(160).print(report.render(records) if full else report.summary(records))
        if json_file is not None:
            with naming("--json", json_file):
                write_records(json_file, records)
        faults = report.problems(records) + (report.differences(records, earlier) if earlier is not None else [])
        for fault in faults:
            errors.print(Text(fault, style="red"))
    if faults:
        raise typer.Exit(1)


app.command()(bench)
app.command("chat")(chat_command)
app.command()(info)
app.command("performance-report")(performance_report)
app.command()(roofline)
app.command()(verify)
app.command()(evaluate)
app.command()(inspect)
# Every argument is the harness's own, --help too.
app.command("lm-eval", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
    lm_eval
)


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
