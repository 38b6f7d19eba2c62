"""``fastdllm-triton evaluate`` and ``lm-eval``."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .._console import clear_errors, console, wide
from ..cli_options import BackendChoice, BackendOption, DeviceOption, DtypeOption, ModelOption
from ..evaluation.grid import Way, parse_grid
from ..evaluation.runner import Evaluation, Result
from ..evaluation.scoring import builtin_requests, builtin_scorer, find_scorer, read_requests
from ..evaluation.summary import Record, compare, compare_caches, summarize
from ..files import check_folder, check_writable, naming, write_json
from ..loading import load

_STRATEGIES = "fixed:1,fixed:2,fixed:4,threshold:0.9,factor:1.0"


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of the results. Run again with the same one to go on after an interruption.")],
    model: ModelOption = "tiny",
    data: Annotated[
        Path | None, typer.Option(help="A JSONL file: a 'prompt' and an 'answer' a line. Without it, the built-in task.")
    ] = None,
    problems: Annotated[
        int | None, typer.Option(help="Problems of the built-in task, none of them trained on (100); or lines of --data (all).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which problems of the built-in task.")] = 0,
    strategies: Annotated[
        str, typer.Option(help="fixed:K (K tokens a forward), threshold:T, factor:F, entropy:NATS; each may add :score.")
    ] = _STRATEGIES,
    caches: Annotated[
        str, typer.Option(help="none, prefix, dual; each may add options, as in dual+refresh_every=4.")
    ] = "none,dual",
    block_length: Annotated[str | None, typer.Option(help="Block lengths, such as 16,48 (the model's default).")] = None,
    gen_length: Annotated[int | None, typer.Option(help="Tokens to generate (the model's default).")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests decoded together.")] = 32,
    scorer: Annotated[
        str, typer.Option(help="For --data: number (after ####), text, regex:PATTERN, or module:function(text, record).")
    ] = "number",
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the checkpoint's chat template.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = BackendChoice.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary to this file too.")] = None,
) -> None:
    """Score a grid of strategies, caches and block lengths on the same requests, and draw the paper's figures.

    OUT receives summary.json, comparison.json, caches.json, the figures, and every request in requests/.
    """
    with clear_errors(), ExitStack() as stack:
        check_folder("--out", out)
        check_writable("--json", json_file)
        if data is None:
            requests, judge = builtin_requests(100 if problems is None else problems, seed), builtin_scorer()
        else:
            judge = find_scorer(scorer)
            requests = read_requests(data, problems)
        lm = load(model, device=device, dtype=dtype, backend=backend.value)
        length = lm.defaults.gen_length if gen_length is None else gen_length
        ways = parse_grid(strategies, caches, block_length or str(lm.defaults.block_length), length)
        run = stack.enter_context(Evaluation(lm, requests, judge, out, gen_length=length, batch_size=batch_size, chat=chat))
        console.print(f"{lm!r}: {len(requests)} requests, {len(ways)} ways", soft_wrap=True)
        try:
            results = _run(run, ways)
        except KeyboardInterrupt:
            console.print(f"interrupted; what is finished stays in {out}, run the same command to go on", soft_wrap=True)
            raise typer.Exit(130) from None
        except OSError as error:
            raise OSError(f"{error}; what is finished stays in {out}, run the same command to go on") from None

        summary = summarize(results)
        comparison = [record for score in ("exact_match", "whole") for record in compare(results, score)]
        caches_compared = compare_caches(results)
        _print(summary, comparison, caches_compared)
        with naming("--out", out):
            for name, records in (("summary", summary), ("comparison", comparison), ("caches", caches_compared)):
                write_json(out / f"{name}.json", records)
        if importlib.util.find_spec("matplotlib") is None:
            console.print("no figures: they need matplotlib (pip install 'fastdllm-triton[bench]')")
        else:
            from ..evaluation.plots import draw_all

            with naming("--out", out):
                written = draw_all(summary, comparison, caches_compared, out)
            for path in written:
                console.print(f"wrote {path}", soft_wrap=True)
        if json_file is not None:
            with naming("--json", json_file):
                write_json(json_file, summary)


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with --model fastdllm known to it; every argument is the harness's own."""
    with clear_errors():
        if importlib.util.find_spec("lm_eval") is None:
            raise RuntimeError("lm-eval needs lm-evaluation-harness: pip install 'fastdllm-triton[eval]'")
    from ..evaluation.harness import main

    main(context.args)


def _run(run: Evaluation, ways: list[Way]) -> dict[Way, list[Result]]:
    """Runs every way under a progress bar, whose time left weighs what each way costs."""
    prompt = sum(map(len, run.prompts)) / len(run.prompts)
    results: dict[Way, list[Result]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[done]} requests"),
        TextColumn("time left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        costs = [way.cost(prompt, run.gen_length) for way in ways]
        task = progress.add_task("", total=sum(costs) * len(run.requests), done="")
        for number, way in enumerate(ways):

            def show(done: int, number: int = number, way: Way = way) -> None:
                progress.update(
                    task,
                    completed=sum(costs[:number]) * len(run.requests) + costs[number] * done,
                    description=f"{number + 1}/{len(ways)} {way.strategy} {way.cache} {way.block_length}",
                    done=f"{done}/{len(run.requests)}",
                )

            results[way] = run.run(way, show)
    return results


def _print(summary: list[Record], comparison: list[Record], caches_compared: list[Record]) -> None:
    """The tables."""
    extra = any(record["whole"] is not None for record in summary)
    table = Table(title=f"{summary[0]['n']} requests; 95 % intervals")
    for column in ("block", "cache", "strategy"):
        table.add_column(column, no_wrap=True)
    for column in ("exact match", *(("whole",) if extra else ()), "tokens/forward", "forwards", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in summary:
        whole = [_with_interval(r["whole"], r["whole_ci"], 3)] if extra else []
        rate = "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}"
        table.add_row(
            str(r["block_length"]),
            r["cache"],
            r["strategy"],
            _with_interval(r["exact_match"], r["exact_match_ci"], 3),
            *whole,
            _with_interval(r["tokens_per_forward"], r["tokens_per_forward_ci"], 2),
            f"{r['nfe']:.1f}",
            rate,
        )
    wide(150).print(table)
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
        wide(150).print(table)

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
        wide(150).print(table)


def _with_interval(value: Any, ci: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f} [dim]{ci[0]:.{digits}f}-{ci[1]:.{digits}f}[/dim]"
