"""``fastdllm-triton inspect``: what the caches change, in the text and in the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..utils.files import check_folder, check_writable, locked, naming, write_json
from . import options as cli
from ._shared import check_matplotlib, load_model, progress, say_written, warn_of_repeats, with_interval
from .console import show

#: What is measured if nothing is asked for.
_CACHES = "prefix,dual,dual+suffix_window=16,dual+refresh_every=4"


def inspect(
    out: Annotated[Path, typer.Option(help="Folder of the results.", rich_help_panel=cli.OUTPUT)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, any number of times.", rich_help_panel=cli.PROMPTS)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A JSONL file with a 'prompt' and an 'answer' a line.", rich_help_panel=cli.PROMPTS)
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(help="Problems of the built-in task (64), or lines of --data (all).", rich_help_panel=cli.PROMPTS),
    ] = None,
    problem_seed: cli.ProblemSeedOption = 0,
    chat: cli.ChatOption = False,
    gen_length: cli.GenLengthOption = None,
    block_length: cli.BlockLengthOption = None,
    sub_block_length: cli.SubBlockLengthOption = None,
    strategy: Annotated[
        str,
        typer.Option(help=cli.STRATEGY_HELP, rich_help_panel=cli.DECODING),
    ] = "threshold:0.9",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts decoded together for the agreement.", rich_help_panel=cli.DECODING)
    ] = 32,
    drift_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts that the drift is measured on, the first ones.", rich_help_panel=cli.DECODING)
    ] = 8,
    caches: Annotated[
        str | None,
        typer.Option(
            help=f"{cli.CACHES_HELP} {_CACHES} if not given; of block-causal models block_causal, and with sub_block_cache.",
            rich_help_panel=cli.CACHE,
        ),
    ] = None,
    model: cli.ModelOption = "tiny",
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
    json_copy: cli.JsonCopyOption = None,
) -> None:
    """Measure what each cache changes: agreement with no cache, and the drift of keys and values between refreshes.

    OUT receives inspect.json and the figures.
    """
    warn_of_repeats("--caches", caches or "")
    check_folder("--out", out)
    check_writable("--json-copy", json_copy)
    from ..decoding.strategies import StrategySpec
    from ..engine.limits import check_prompts
    from ..evaluation.agreement import agreement, answers, decode
    from ..evaluation.drift import drift, similarity
    from ..evaluation.grid import CacheSpec, Variant

    texts = _texts(prompt, data, problems, problem_seed)
    lm = load_model(model, device=device, dtype=dtype, backend=backend.value, threads=threads)
    length = lm.defaults.gen_length if gen_length is None else gen_length
    size = lm.defaults.block_length if block_length is None else block_length
    rule = StrategySpec.parse(strategy)
    base = lm.defaults if sub_block_length is None else replace(lm.defaults, sub_block_length=sub_block_length)
    if caches is None and base.cache == "block_causal":
        caches = f"block_causal{',block_causal+sub_block_cache' if base.sub_block_length else ''}"
    specs = [CacheSpec("none"), *map(CacheSpec.parse, (caches or _CACHES).split(","))]
    exact, *configs = (Variant(rule, spec, size, base).config(length) for spec in specs)
    variants = dict(zip(map(str, specs[1:]), configs, strict=True))
    for config in configs:
        config.check_fits(lm.config)
    rows = [lm.encode(text, chat=chat) for text in texts]
    check_prompts(rows, exact, lm.network)
    measured = rows[:drift_prompts]
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(compact=True),
    )
    records: list[dict[str, Any]] = []
    with locked(out, "--out"), progress(*columns) as bar:
        total = (len(variants) + 1) * -(-len(rows) // batch_size) + len(variants) * len(measured) + 1
        task = bar.add_task("without a cache", total=total)
        batches = -(-len(rows) // batch_size)
        wanted = answers(decode(lm, rows, exact, batch_size))
        bar.advance(task, batches)
        for name, config in variants.items():
            bar.update(task, description=name)
            record = {"cache": name, **agreement(wanted, decode(lm, rows, config, batch_size))}
            bar.advance(task, batches)
            if measured:
                record["drift"] = drift(lm, measured, config, lambda: bar.advance(task))
            records.append(record)
        report: dict[str, Any] = {
            "model": repr(lm),
            "strategy": str(rule),
            "gen_length": length,
            "block_length": size,
            "caches": records,
        }
        if measured and not lm.config.block_causal:  # Where what is behind changes nothing before it, there is nothing to see.
            bar.update(task, description="forward against forward")
            report["similarity"] = similarity(lm, measured[0], exact, min(1, exact.blocks - 1))
        bar.advance(task)

    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)
    with naming("--out", out):
        write_json(out / "inspect.json", report)
    if check_matplotlib():
        from ..evaluation.inspect_plots import figures
        from ..evaluation.plots import save

        with naming("--out", out):
            drawn = save(figures(report), out)
        if not as_json:
            say_written(drawn)
    if json_copy is not None:
        with naming("--json-copy", json_copy):
            write_json(json_copy, report)


def _texts(prompt: list[str] | None, data: Path | None, problems: int | None, seed: int) -> list[str]:
    if prompt and data is not None:
        raise ValueError("--prompt and --data exclude each other")
    if prompt:
        return prompt
    from ..evaluation.scoring import builtin_requests, read_requests

    requests = builtin_requests(64 if problems is None else problems, seed) if data is None else read_requests(data, problems)
    return [request.prompt for request in requests]


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
            with_interval(r["same"], r["same_ci"], 3),
            with_interval(r["token_agreement"], r["token_agreement_ci"], 3),
            f"slot {slots[len(slots) // 2] + 1}" if slots else "none",
            f"{r['nfe']:.1f}",
            *least,
        )
    show(table)
