"""``fastdllm-triton performance-report``: what can be known of speed without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import cli_options as cli
from .._console import errors, say, show, status
from ..files import write_atomically, write_records
from ._shared import check_writable, read_earlier, require_triton


def performance_report(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All NVIDIA ones if not given.")] = None,
    op: cli.OpsOption = None,
    compare: cli.CompareOption = None,
    out: cli.ReportOutOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.", rich_help_panel=cli.OUTPUT)] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Programs an SM, bytes under way against what memory needs, and the main loop's instructions, op by op, without a GPU.

    Takes about five minutes for all ops and architectures.
    """
    require_triton("performance-report")
    check_writable("--out", out)
    check_writable("--markdown", markdown)
    from .. import performance_report as report
    from ..compile_report import differences

    earlier = read_earlier(compare)
    with status("compiling and reading the main loops"):
        records = report.performance_report(arch, op)
    if out is not None:
        write_records(out, records)
    if markdown is not None:
        write_atomically(markdown, report.markdown(records))
    if as_json:
        typer.echo(json.dumps(records))
    else:
        for table in report.render(records):
            show(table)
    changed = [] if earlier is None else differences(records, earlier)
    for line in changed:
        say(errors, line, style="red")
    if changed:
        raise typer.Exit(1)
