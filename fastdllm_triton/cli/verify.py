"""``fastdllm-triton verify``: the first thing to run on a new GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..utils.checks import known_names, require
from ..utils.environment import BACKEND
from ..utils.files import check_writable
from . import options as cli
from ._shared import as_words, require_triton
from .console import console, errors, say, show, status

if TYPE_CHECKING:
    from ..verify import Record


def verify(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as swiglu, or 'models'. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A part: seconds on a GPU, a minute or two on a CPU.")] = False,
    device: cli.DeviceOption = None,
    ptx: Annotated[
        str | None,
        typer.Option(
            "--ptx", metavar="ARCH", help="Without a GPU: execute what is compiled for sm_80 or sm_90, and look for races."
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at once; on a GPU as many as there is room for.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write all that is found to this file, as it comes.", rich_help_panel=cli.OUTPUT)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where that file ends.", rich_help_panel=cli.OUTPUT)] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """Try every kernel against the reference and float64, then whole models, on this machine.

    Ends with status 1 if anything did not hold.
    """
    require_triton("verify")
    check_writable("--out", out)
    if resume and out is None:
        raise ValueError("--resume: needs --out FILE, which says what to go on with")
    from .. import verify as verification
    from ..loading import find_device
    from ..ptx.driver import TARGETS
    from ..tools import environment
    from ..verify.ledger import Ledger

    names = known_names("op", op, verification.names())
    target = find_device("cpu" if device is None and ptx else device)
    if ptx is not None:
        require("--ptx", ptx, f"one of {', '.join(TARGETS)}", ptx in TARGETS)
        require("--device", device, "cpu, or not given, beside --ptx", target.type == "cpu")
        if verification.is_interpreting():
            raise typer.Exit(verification.rerun_in_interpreter(as_words(context), interpret=False))
    elif verification.needs_interpreter(target):
        raise typer.Exit(verification.rerun_in_interpreter(as_words(context)))
    where = environment.device_name(target) if ptx is None else f"{ptx}, executed as PTX on {environment.device_name(target)}"
    ledger = Ledger(environment.describe(target) | {"device": where}, quick, out)
    if resume:
        ledger.resume()
    with status(f"verifying on {where}") as line:

        def on_record(record: Record) -> None:
            ledger.add(record)
            line.update(Text(f"verified {record.check} {record.dtype}"))

        records = verification.verify(
            names,
            target,
            quick=quick,
            jobs=jobs or verification.jobs_for(target),
            ptx=ptx,
            known=ledger.records,
            on_record=on_record,
        )
        ledger.records = records  # in order
        ledger.write()
    if as_json:
        typer.echo(json.dumps(ledger.as_json()))
    else:
        show(verification.render(records, f"Verified on {where}"))
        if ptx is not None:
            say(console, "No GPU: this is the compiler's PTX, executed on the CPU; it says nothing about speed.", style="dim")
        elif target.type == "cpu":
            say(console, "No GPU: this shows that the kernels compute the right thing, and nothing about speed.", style="dim")
    failed = [f"{record.check} {record.dtype}" for record in records if not record.ok]
    if failed:
        say(errors, f"did not hold: {', '.join(failed)}; {BACKEND.name}=reference runs without the kernels", style="red")
        raise typer.Exit(1)
