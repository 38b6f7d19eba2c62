"""``fastdllm-triton verify``: the first thing to run on a new GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .. import cli_options as cli
from .._console import console, errors, say, show, status
from ..files import check_writable, naming, write_json
from ._shared import require_triton


def verify(
    op: Annotated[list[str] | None, typer.Option(help="An op, such as swiglu, or 'models'. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A part: seconds on a GPU, a minute or two on a CPU.")] = False,
    device: cli.DeviceOption = None,
    out: Annotated[Path | None, typer.Option(help="Write all that was found to this file.", rich_help_panel=cli.OUTPUT)] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Try every kernel against the reference and float64, then whole models, on this machine.

    Ends with status 1 if anything did not hold.
    """
    require_triton("verify")
    check_writable("--out", out)
    from .. import machine
    from .. import verify as proof

    names = proof.check_names(op)
    target = proof.check_device(device)
    if proof.needs_interpreter(target):
        arguments = ["verify", "--device", "cpu", *(part for name in names for part in ("--op", name))]
        arguments += ["--quick"] * quick + ["--json"] * as_json
        arguments += ["--out", str(out)] if out else []
        raise typer.Exit(proof.rerun_in_interpreter(arguments))
    where = machine.device_name(target)
    with status(f"verifying on {where}") as line:
        records = proof.verify(
            names, target, quick=quick, on_record=lambda record: line.update(Text(f"verified {record.check} {record.dtype}"))
        )
    summary = proof.summary(records, machine.describe(target))
    if out is not None:
        with naming("--out", out):
            write_json(out, summary)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        show(proof.render(records, f"Verified on {where}"))
        if target.type == "cpu":
            say(console, "No GPU: this shows that the kernels compute the right thing, and nothing about speed.", style="dim")
    failed = [f"{record.check} {record.dtype}" for record in records if not record.ok]
    if failed:
        say(errors, f"did not hold: {', '.join(failed)}", style="red")
        raise typer.Exit(1)
