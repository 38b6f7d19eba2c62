"""``fastdllm-triton compile-report``: what the compilers make of every kernel, without a GPU."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..utils.files import check_writable, naming, write_records
from . import options as cli
from ._shared import counting, read_earlier, require_triton
from .console import errors, say, show


def compile_report(
    arch: cli.ArchsOption = None,
    op: cli.OpsOption = None,
    compare: cli.CompareOption = None,
    out: cli.ReportOutOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every configuration, not a line an op.", rich_help_panel=cli.OUTPUT)
    ] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """Compile every kernel for every architecture, without a GPU: registers, spills, shared memory, instructions.

    All of it takes about 5 minutes on two cores, and next to nothing the second time. Ends with status 1 if a configuration
    spills, does not fit, serialises its matrix products or loses a rounding.
    """
    require_triton("compile-report")
    check_writable("--out", out)
    from ..tools import compile_report as report

    earlier = read_earlier(compare)
    with counting("configurations") as progress:
        records = report.compile_report(arch, op, on_progress=progress)
    if as_json:
        typer.echo(json.dumps(records))
    else:
        show(report.full_table(records) if full else report.summary_table(records))
    if out is not None:
        with naming("--out", out):
            write_records(out, records)
    failures = report.problems(records) + (report.differences(records, earlier) if earlier is not None else [])
    for failure in failures:
        say(errors, failure, style="red")
    if failures:
        raise typer.Exit(1)
