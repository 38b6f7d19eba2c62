"""``fastdllm-triton profile``: where the time of your generation goes, op by op."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from . import options as cli
from ._shared import load_model
from .console import console, errors, say, show, status
from .generate import read_prompts

if TYPE_CHECKING:
    from ..tools.profile import Profile


@cli.with_decoding_options(before="model")
def profile(
    context: typer.Context,
    prompt: cli.PromptOption = None,
    prompt_file: cli.PromptFileOption = None,
    chat: cli.ChatOption = False,
    model: cli.ModelOption = "tiny",
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Generations that are timed; the fastest counts.")] = 3,
    as_json: cli.JsonOption = False,
) -> None:
    """Show where the time of a generation goes: a refresh and a step, op by op, and how far each is from the roofline.

    The roofline is what this machine reaches with a copy and a matrix product, measured in the same run.
    """
    prompts = read_prompts(prompt, prompt_file, chat)
    from ..decoding.options import changed, strategy_of
    from ..tools.profile import profile as measure

    options = cli.decoding_values(context)
    strategy_of(options)  # refused before the model is loaded
    lm = load_model(model, device=device, dtype=dtype, backend=backend.value, threads=threads)
    config = changed(lm.defaults, options)
    rows = [lm.encode(row.text, chat=chat) for row in prompts]
    with status("profiling"):
        result = measure(lm, rows, config, repeat=repeat)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
        return
    say(errors, f"{lm!r}, {len(rows)} rows, cache {config.cache}", style="dim")
    for kind in result.ops:
        show(_table(result, kind, lm.device.type))
        console.print()
    console.print(_last_line(result), soft_wrap=True)


def _table(result: Profile, kind: str, device: str) -> Table:
    """The ops of one forward, the slowest first."""
    count, window = result.forwards[kind], result.windows[kind]
    title = f"{kind}: {count} in a generation, {window:.0f} slots a row on average"
    table = Table(title=Text(title), box=None, title_justify="left")
    table.add_column("op")
    launches = "launches" if device == "cuda" else "PyTorch calls"
    for name in ("calls", launches, "ms", "share", "MB", "GB/s", "of roofline"):
        table.add_column(name, justify="right")
    ops = result.ops[kind]
    total = sum(op.ms for op in ops.values())
    for name, op in sorted(ops.items(), key=lambda item: -item[1].ms):
        measured: list[Any] = ["", "", ""]
        if op.bytes:
            measured = [f"{op.bytes / 1e6:,.2f}", f"{op.gb_per_s:,.1f}", f"{op.roofline_fraction(result.limits):.0%}"]
        calls = f"{op.calls:g}" if op.calls else ""
        table.add_row(name, calls, f"{op.launches:g}", f"{op.ms:,.3f}", f"{op.ms / total:.0%}", *measured)
    table.add_section()
    moved = sum(op.bytes for op in ops.values())
    fraction = sum(op.roofline_fraction(result.limits) * op.ms for op in ops.values()) / total
    sums = (f"{sum(op.launches for op in ops.values()):g}", f"{total:,.3f}", "", f"{moved / 1e6:,.2f}")
    table.add_row("all", "", *sums, f"{moved / total / 1e6:,.1f}", f"{fraction:.0%}")
    return table


def _last_line(result: Profile) -> Text:
    """The generation as a whole, as it runs without a clock in it."""
    limits = result.limits
    return Text(
        f"{result.tokens_per_second:,.1f} tokens/s, {result.gb_per_s:,.1f} GB/s "
        f"({result.committed} tokens in {result.seconds:.3f} s, {sum(result.forwards.values())} forwards; "
        f"this machine copies {limits.copy / 1e9:,.1f} GB/s and multiplies {limits.matrix / 1e12:,.2f} TFLOP/s)"
    )
