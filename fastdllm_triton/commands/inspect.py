"""``fastdllm-triton inspect``: what the caches change, in the text and in the cache."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .._console import clear_errors, console, wide
from ..cli_options import BackendChoice, BackendOption, DeviceOption, DtypeOption, ModelOption
from ..engine import check_prompts
from ..evaluation.agreement import agreement, answers, decode
from ..evaluation.drift import drift, similarity
from ..evaluation.grid import CacheSpec, StrategySpec, Way
from ..evaluation.runner import use_few_threads
from ..evaluation.scoring import builtin_requests, read_requests
from ..files import check_folder, check_writable, locked, naming, write_json
from ..loading import load


def inspect(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    model: ModelOption = "tiny",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, any number of times.")] = None,
    data: Annotated[Path | None, typer.Option(help="A JSONL file with a 'prompt' and an 'answer' a line.")] = None,
    problems: Annotated[int | None, typer.Option(help="Problems of the built-in task (64), or lines of --data (all).")] = None,
    seed: Annotated[int, typer.Option(help="Which problems of the built-in task.")] = 0,
    caches: Annotated[
        str, typer.Option(help="prefix, dual; each may add options, as in dual+suffix_window=16.")
    ] = "prefix,dual,dual+suffix_window=16,dual+refresh_every=4",
    strategy: Annotated[str, typer.Option(help="fixed:K, threshold:T, factor:F or entropy:NATS.")] = "threshold:0.9",
    block_length: Annotated[int | None, typer.Option(help="Slots of a block (the model's default).")] = None,
    gen_length: Annotated[int | None, typer.Option(help="Tokens to generate (the model's default).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together for the agreement.")] = 32,
    drift_prompts: Annotated[int, typer.Option(min=0, help="Prompts that the drift is measured on, the first ones.")] = 8,
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the checkpoint's chat template.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = BackendChoice.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")] = None,
) -> None:
    """Measure what each cache changes: agreement with no cache, and the drift of keys and values between refreshes.

    OUT receives inspect.json and the figures.
    """
    with clear_errors(), ExitStack() as stack:
        check_folder("--out", out)
        check_writable("--json", json_file)
        texts = _texts(prompt, data, problems, seed)
        lm = load(model, device=device, dtype=dtype, backend=backend.value)
        use_few_threads(lm)
        length = lm.defaults.gen_length if gen_length is None else gen_length
        size = lm.defaults.block_length if block_length is None else block_length
        rule = StrategySpec.parse(strategy)
        exact = Way(rule, CacheSpec("none"), size).config(length)
        ways = {str(spec): Way(rule, spec, size).config(length) for spec in map(CacheSpec.parse, caches.split(","))}
        rows = [lm.encode(text, chat=chat) for text in texts]
        check_prompts(rows, exact, lm.network)
        stack.enter_context(locked(out, "--out"))

        measured = rows[:drift_prompts]
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("time left"), TimeRemainingColumn(compact=True))
        records: list[dict[str, Any]] = []
        with Progress(*columns, console=console) as progress:
            total = (len(ways) + 1) * -(-len(rows) // batch_size) + len(ways) * len(measured) + 1
            task = progress.add_task("without a cache", total=total)
            batches = -(-len(rows) // batch_size)
            wanted = answers(decode(lm, rows, exact, batch_size))
            progress.advance(task, batches)
            for name, config in ways.items():
                progress.update(task, description=name)
                record = {"cache": name, **agreement(wanted, decode(lm, rows, config, batch_size))}
                progress.advance(task, batches)
                if measured:
                    record["drift"] = drift(lm, measured, config, lambda: progress.advance(task))
                records.append(record)
            report: dict[str, Any] = {
                "model": repr(lm),
                "strategy": str(rule),
                "gen_length": length,
                "block_length": size,
                "caches": records,
            }
            if measured:
                progress.update(task, description="forward against forward")
                report["similarity"] = similarity(lm, measured[0], exact, min(1, exact.blocks - 1))
            progress.advance(task)

        _print(report)
        with naming("--out", out):
            write_json(out / "inspect.json", report)
        if importlib.util.find_spec("matplotlib") is None:
            console.print("no figures: they need matplotlib (pip install 'fastdllm-triton[bench]')")
        else:
            from ..evaluation.inspect_plots import figures
            from ..evaluation.plots import save

            with naming("--out", out):
                written = save(figures(report), out)
            for path in written:
                console.print(f"wrote {path}", soft_wrap=True)
        if json_file is not None:
            with naming("--json", json_file):
                write_json(json_file, report)


def _texts(prompt: list[str] | None, data: Path | None, problems: int | None, seed: int) -> list[str]:
    if prompt and data is not None:
        raise ValueError("--prompt and --data exclude each other")
    if prompt:
        return prompt
    found = builtin_requests(64 if problems is None else problems, seed) if data is None else read_requests(data, problems)
    return [request.prompt for request in found]


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"against no cache, {report['caches'][0]['n']} prompts, {report['strategy']}; 95 % intervals")
    table.add_column("cache", no_wrap=True)
    for column in ("same answer", "tokens that agree", "median first difference", "forwards", "least cosine: keys", "values"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in report["caches"]:
        slots = sorted(slot for slot in r["first_divergence"] if slot is not None)
        least = [f"{min(min(row) for row in r['drift'][kind]):.3f}" if "drift" in r else "" for kind in ("k", "v")]
        table.add_row(
            r["cache"],
            f"{r['same']:.3f} [dim]{r['same_ci'][0]:.3f}-{r['same_ci'][1]:.3f}[/dim]",
            f"{r['token_agreement']:.3f} [dim]{r['token_agreement_ci'][0]:.3f}-{r['token_agreement_ci'][1]:.3f}[/dim]",
            f"slot {slots[len(slots) // 2] + 1}" if slots else "none",
            f"{r['nfe']:.1f}",
            *least,
        )
    wide(130).print(table)
