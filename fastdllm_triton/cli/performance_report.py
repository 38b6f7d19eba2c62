"""``fastdllm-triton performance-report``: what can be known of speed without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..utils.files import check_writable, naming, write_atomically, write_records
from . import options as cli
from ._shared import counting, read_earlier, require_triton
from .console import errors, say, show


def performance_report(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All NVIDIA ones if not given.")] = None,
    op: cli.OpsOption = None,
    compare: cli.CompareOption = None,
    out: cli.ReportOutOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.", rich_help_panel=cli.OUTPUT)] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every launch, not a line a kernel.", rich_help_panel=cli.OUTPUT)
    ] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """Programs an SM, bytes under way against what memory needs, and the main loop's instructions, op by op, without a GPU.

    All of it takes about 5 minutes on two cores, and next to nothing the second time.
    """
    require_triton("performance-report")
    check_writable("--out", out)
    check_writable("--markdown", markdown)
    from ..tools import performance_report as report
    from ..tools.compile_report import differences

    earlier = read_earlier(compare)
    with counting("launches") as progress:
        records = report.performance_report(arch, op, on_progress=progress)
    if as_json:
        typer.echo(json.dumps(records))
    else:
        for table in report.full_tables(records) if full else [report.summary_table(records)]:
            show(table)
    if out is not None:
        with naming("--out", out):
            write_records(out, records)
    if markdown is not None:
        with naming("--markdown", markdown):
            write_atomically(markdown, report.markdown(records))
    changed = [] if earlier is None else differences(records, earlier)
    for line in changed:
        say(errors, line, style="red")
    if changed:
        raise typer.Exit(1)
