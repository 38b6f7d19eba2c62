"""``fastdllm-triton performance-report``: what can be known of speed without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .._console import clear_errors, errors, wide
from ..files import check_writable, naming, write_atomically, write_records
from .progress import counting
from .verify import require_triton


def performance_report(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All NVIDIA ones if not given.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as window_attention. All if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print every launch, not a line a kernel.")] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier report: say what changed, and fail if anything did.")] = None,
) -> None:
    """Programs an SM, bytes under way against what memory needs, and the main loop's instructions, op by op, without a GPU.

    All of it takes about 5 minutes on two cores, and next to nothing the second time.
    """
    with clear_errors():
        require_triton("performance-report")
        check_writable("--json", json_file)
        check_writable("--markdown", markdown_file)
        from .. import performance_report as report
        from ..compile_report import differences, read_json

        earlier = None if compare is None else read_json(compare)
        with counting("launches") as progress:
            records = report.performance_report(arch, op, on_progress=progress)
        for table in report.render(records) if full else [report.summary(records)]:
            wide(170).print(table)
        if json_file is not None:
            with naming("--json", json_file):
                write_records(json_file, records)
        if markdown_file is not None:
            with naming("--markdown", markdown_file):
                write_atomically(markdown_file, report.markdown(records))
        changed = [] if earlier is None else differences(records, earlier)
        for line in changed:
            errors.print(Text(line, style="red"))
        if changed:
            raise typer.Exit(1)
