"""``fastdllm-triton evaluate``: accuracy where speed is claimed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..utils.files import check_folder, check_writable, naming, write_json
from . import options as cli
from ._shared import check_matplotlib, load_model, progress, say_written, warn_of_repeats, with_interval
from .console import console, errors, say, show

if TYPE_CHECKING:
    from ..evaluation.grid import Variant
    from ..evaluation.runner import Evaluation, Result
    from ..evaluation.summary import Record


def evaluate(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the results. Run again with the same one to go on after an interruption.", rich_help_panel=cli.OUTPUT
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL file: a 'prompt' and an 'answer' a line. Without it, the built-in task.", rich_help_panel=cli.PROMPTS
        ),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(
            help="Problems of the built-in task, none of them trained on (100); or lines of --data (all).",
            rich_help_panel=cli.PROMPTS,
        ),
    ] = None,
    problem_seed: cli.ProblemSeedOption = 0,
    chat: cli.ChatOption = False,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="For --data: number (after ####, the default), text, regex:PATTERN, or module:function(text, record).",
            rich_help_panel=cli.PROMPTS,
        ),
    ] = None,
    gen_length: cli.GenLengthOption = None,
    block_length: Annotated[
        str | None, typer.Option(help="One or several, such as 16,48 (the model's default).", rich_help_panel=cli.DECODING)
    ] = None,
    sub_block_length: cli.SubBlockLengthOption = None,
    strategies: Annotated[
        str,
        typer.Option(help=cli.STRATEGY_HELP, rich_help_panel=cli.DECODING),
    ] = "fixed:1,fixed:2,fixed:4,threshold:0.9,factor:1.0",
    batch_size: Annotated[int, typer.Option(help="Requests decoded together.", rich_help_panel=cli.DECODING)] = 32,
    caches: Annotated[
        str | None,
        typer.Option(help=f"{cli.CACHES_HELP} None and the model's default if not given.", rich_help_panel=cli.CACHE),
    ] = None,
    model: cli.ModelOption = "tiny",
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
    json_copy: cli.JsonCopyOption = None,
) -> None:
    """Score a grid of strategies, caches and block lengths on the same requests, and draw the paper's figures.

    OUT receives summary.json, comparison.json, caches.json, the figures, and every request in requests/.
    """
    if scorer is not None and data is None:
        raise ValueError("--scorer needs --data: the built-in task has a scorer of its own")
    for option, values in (("--strategies", strategies), ("--caches", caches or ""), ("--block-length", block_length or "")):
        warn_of_repeats(option, values)
    check_folder("--out", out)
    check_writable("--json-copy", json_copy)
    from ..evaluation.grid import parse_grid
    from ..evaluation.runner import Evaluation
    from ..evaluation.scoring import builtin_requests, builtin_scorer, find_scorer, read_requests

    if data is None:
        requests, score = builtin_requests(100 if problems is None else problems, problem_seed), builtin_scorer()
    else:
        score = find_scorer(scorer or "number")
        requests = read_requests(data, problems)
    lm = load_model(model, device=device, dtype=dtype, backend=backend.value, threads=threads)
    length = lm.defaults.gen_length if gen_length is None else gen_length
    base = lm.defaults if sub_block_length is None else replace(lm.defaults, sub_block_length=sub_block_length)
    caches = caches or f"none,{base.cache}"
    variants = parse_grid(strategies, caches, block_length or str(base.block_length), length, base)
    for variant in variants:
        variant.config(length).check_fits(lm.config)
    with Evaluation(lm, requests, score, out, gen_length=length, batch_size=batch_size, chat=chat) as run:
        _evaluate(run, variants, out, as_json, json_copy)


def _evaluate(run: Evaluation, variants: list[Variant], out: Path, as_json: bool, json_copy: Path | None) -> None:
    """Runs all variants, and prints and writes the results."""
    from ..evaluation.summary import compare, compare_caches, summarize

    say(errors if as_json else console, f"{run.model!r}: {len(run.requests)} requests, {len(variants)} variants")
    try:
        results = _run(run, variants)
    except KeyboardInterrupt:
        say(errors, f"interrupted; what is finished stays in {out}, run the same command to go on", style="red")
        raise typer.Exit(130) from None
    except OSError as error:
        raise OSError(f"{error}; what is finished stays in {out}, run the same command to go on") from None

    summary = summarize(results)
    comparison = [record for score in ("exact_match", "whole") for record in compare(results, score)]
    caches_compared = compare_caches(results)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, comparison, caches_compared)
    with naming("--out", out):
        for name, records in (("summary", summary), ("comparison", comparison), ("caches", caches_compared)):
            write_json(out / f"{name}.json", records)
    if check_matplotlib():
        from ..evaluation.plots import figures, save

        with naming("--out", out):
            drawn = save(figures(summary), out)
        if not as_json:
            say_written(drawn)
    if json_copy is not None:
        with naming("--json-copy", json_copy):
            write_json(json_copy, summary)


def _run(run: Evaluation, variants: list[Variant]) -> dict[Variant, list[Result]]:
    """Runs every variant under a progress bar, whose time left follows from what each of them costs."""
    prompt = sum(map(len, run.prompts)) / len(run.prompts)
    results: dict[Variant, list[Result]] = {}
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[done]} requests"),
        TextColumn("time left"),
        TimeRemainingColumn(compact=True),
    )
    with progress(*columns) as bar:
        costs = [variant.cost(prompt, run.gen_length, run.model.config) for variant in variants]
        task = bar.add_task("", total=sum(costs) * len(run.requests), done="")
        for number, variant in enumerate(variants):

            def show(done: int, number: int = number, variant: Variant = variant) -> None:
                bar.update(
                    task,
                    completed=sum(costs[:number]) * len(run.requests) + costs[number] * done,
                    description=f"{number + 1}/{len(variants)} {variant.strategy} {variant.cache} {variant.block_length}",
                    done=f"{done}/{len(run.requests)}",
                )

            results[variant] = run.run(variant, show)
    return results


def _print(summary: list[Record], comparison: list[Record], caches_compared: list[Record]) -> None:
    extra = any(record["whole"] is not None for record in summary)
    table = Table(title=f"{summary[0]['n']} requests; 95 % intervals")
    for column in ("block", "cache", "strategy"):
        table.add_column(column, no_wrap=True)
    for column in ("exact match", *(("whole",) if extra else ()), "tokens/forward", "forwards", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in summary:
        whole = [with_interval(r["whole"], r["whole_ci"], 3)] if extra else []
        rate = "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}"
        table.add_row(
            str(r["block_length"]),
            r["cache"],
            r["strategy"],
            with_interval(r["exact_match"], r["exact_match_ci"], 3),
            *whole,
            with_interval(r["tokens_per_forward"], r["tokens_per_forward_ci"], 2),
            f"{r['nfe']:.1f}",
            rate,
        )
    show(table)
    if comparison:
        table = Table(title="against fixed steps at equal tokens per forward; paired 95 % intervals")
        for column in ("block", "cache", "strategy", "score"):
            table.add_column(column, no_wrap=True)
        for column in ("tokens/forward", "strategy's", "fixed", "gain"):
            table.add_column(column, justify="right", no_wrap=True)
        for r in comparison:
            table.add_row(
                str(r["block_length"]),
                r["cache"],
                r["strategy"],
                r["score"],
                f"{r['tokens_per_forward']:.2f}",
                f"{r['value']:.3f}",
                f"{r['fixed_at_equal_speed']:.3f}",
                f"{r['gain']:+.3f} [{r['gain_ci'][0]:+.3f}, {r['gain_ci'][1]:+.3f}]",
            )
        show(table)

    if caches_compared:
        table = Table(title="caches with options against the same cache without; paired 95 % intervals")
        for column in ("block", "cache", "strategy"):
            table.add_column(column, no_wrap=True)
        for column in ("same text", "exact match", "FLOPs", "bytes"):
            table.add_column(column, justify="right", no_wrap=True)
        for r in caches_compared:
            gain, ci = r["exact_match_gain"], r["exact_match_gain_ci"]
            table.add_row(
                str(r["block_length"]),
                r["cache"],
                r["strategy"],
                f"{r['same']:.3f}",
                f"{gain:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]",
                f"{r['flops_ratio'] - 1:+.1%}",
                f"{r['bytes_ratio'] - 1:+.1%}",
            )
        show(table)
