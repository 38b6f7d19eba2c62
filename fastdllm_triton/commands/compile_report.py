"""``fastdllm-triton compile-report``: what the compilers make of every kernel, without a GPU."""

from __future__ import annotations

import json

import typer

from .. import cli_options as cli
from .._console import errors, say, show, status
from ..files import write_records
from ._shared import check_writable, read_earlier, require_triton


def compile_report(
    arch: cli.ArchsOption = None,
    op: cli.OpsOption = None,
    compare: cli.CompareOption = None,
    out: cli.ReportOutOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Compile every kernel for every architecture, without a GPU: registers, spills, shared memory, instructions.

    Takes minutes for all of them. Ends with status 1 if a configuration spills or does not fit.
    """
    require_triton("compile-report")
    check_writable("--out", out)
    from .. import compile_report as report

    earlier = read_earlier(compare)
    with status("compiling"):
        records = report.compile_report(arch, op)
    if out is not None:
        write_records(out, records)
    if as_json:
        typer.echo(json.dumps(records))
    else:
        show(report.render(records))
    faults = report.problems(records) + (report.differences(records, earlier) if earlier is not None else [])
    for fault in faults:
        say(errors, fault, style="red")
    if faults:
        raise typer.Exit(1)
