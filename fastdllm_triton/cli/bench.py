"""``fastdllm-triton bench``: measured, side by side, with the ceiling beside each number."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..utils.checks import known_names
from ..utils.files import check_folder, check_writable, locked, naming
from . import options as cli
from ._shared import as_words, require_triton
from .console import console, errors, say, show, status

if TYPE_CHECKING:
    import torch

    from ..bench._report import Report
    from ..bench._session import Measurable


class SuiteChoice(StrEnum):
    """What :func:`bench` can measure."""

    ops = "ops"
    step = "step"
    generate = "generate"
    host = "host"
    all = "all"


NO_GPU = "No GPU: every provider ran once on small shapes. This checks correctness and plumbing only; no speed is measured."


def bench(
    context: typer.Context,
    suite: Annotated[SuiteChoice, typer.Argument(help="What to measure.")] = SuiteChoice.all,
    op: Annotated[list[str] | None, typer.Option(help="A bench of the suite. All if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A baseline to run beside ours. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes; all that there is without a GPU.")] = False,
    device: cli.DeviceOption = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no case after so many minutes.")] = None,
    verified: Annotated[
        list[Path] | None, typer.Option(help="A file of verify --out, of this machine and commit: do not verify again.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Verify nothing more, time what does not verify too, and mark its rows.")
    ] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier folder: say what became faster or slower.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the results into this folder, case by case.", rich_help_panel=cli.OUTPUT)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the results in that folder end.", rich_help_panel=cli.OUTPUT)
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots and tables to this file.", rich_help_panel=cli.OUTPUT)
    ] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Time ours and the baselines in turns, each with its fraction of what this GPU reaches at its best.

    'host' times the launchers of a forward with every launch replaced by nothing, which needs no GPU.

    An op whose verification fails here is refused. Ends with status 1 if one was, with 3 if --minutes left cases out, and with
    4 if a kernel has failed so that this process can use the GPU no more; --resume goes on behind it.
    """
    require_triton("bench")
    if suite == SuiteChoice.host:
        from ..bench.host import table as host_time

        show(host_time())
        return
    check_writable("--html", html)
    if html is not None:
        from ..bench._page import check_installed

        check_installed()
    from .. import verify
    from ..bench._report import Report, changes, changes_table, check_unmixed
    from ..bench._run import benches, run
    from ..loading import find_device
    from ..tools import environment
    from ..verify.ledger import proven

    target = find_device(device)
    if target.type == "cpu" and verify.needs_interpreter(target):
        raise typer.Exit(verify.rerun_in_interpreter(as_words(context)))
    chosen = benches(suite.value, op or ())
    check_baselines(chosen, only or ())
    earlier = None if compare is None else _earlier(compare)
    if target.type == "cpu" and not quick:
        say(errors if as_json else console, "torch sees no GPU here, so nothing is measured; --quick tries the plumbing.")
        return
    report = Report(environment.describe(target))
    records = proven(verified or (), report.machine)
    if out is not None:
        check_folder("--out", out)
        check_unmixed(out, resume)
    with nullcontext() if out is None else locked(out, "--out"), status("measuring") as line:
        if out is not None and resume:
            report = _resumed(report, out)
        outcome = run(
            chosen,
            report,
            target,
            quick=quick,
            only=only or (),
            folder=out,
            minutes=minutes,
            verified=records,
            unverified=unverified,
            on_status=lambda text: line.update(Text(text)),
        )
    if as_json:
        results: dict[str, Any] = {"machine": report.machine, "verification": report.verification, "rows": report.rows}
        if earlier is not None:
            results["changes"] = [asdict(change) for change in changes(earlier, report)]
        typer.echo(json.dumps(results))
    else:
        show_report(report, target)
        if earlier is not None:
            show(changes_table(changes(earlier, report), earlier, report))
    if html is not None:
        from ..bench._page import write_page

        with naming("--html", html):
            write_page(report, html, earlier)
    if outcome.refused:
        say(errors, f"refused, as they do not verify here: {', '.join(outcome.refused)}", style="red")
    if outcome.is_lost:
        say(errors, "a kernel has failed and left the GPU unusable for this process; --resume goes on", style="red")
    elif outcome.is_cut:
        say(errors, "The time is up and cases are left; --out with --resume goes on with them.")
    if outcome.status:
        raise typer.Exit(outcome.status)


def show_report(report: Report, device: torch.device) -> None:
    """Prints what was verified, a table an op, and the ceilings."""
    from .. import verify
    from ..bench._report import table
    from ..tools import environment

    records = [verify.Record.from_json(record) for record in report.verification]
    show(verify.render(records, f"Verified on {environment.device_name(device)}"))
    for op, rows in report.by_op():
        show(table(rows, op))
    if report.ceilings is None:
        say(console, NO_GPU, style="bold")
    else:
        say(
            console,
            f"copy {report.ceilings.copy / 1e9:,.0f} GB/s, matrix {report.ceilings.matrix / 1e12:,.0f} TFLOP/s, as measured in "
            f"this run. 'of floor' is of the nearer of the two; 'x ours' is a baseline's time over ours.",
        )


def _earlier(folder: Path) -> Report:
    """The results of ``--compare``."""
    from ..bench._report import Report

    try:
        return Report.load(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"--compare: {error}") from None


def check_baselines(chosen: list[Measurable], only: list[str] | tuple[str, ...]) -> None:
    """Raises for a baseline that no bench has."""
    known = {name for bench in chosen for name in getattr(bench, "baselines", ())}
    known_names("--only", only, sorted(known))


def _resumed(new: Report, folder: Path) -> Report:
    """The results of the folder, to go on with; those of another machine or commit are not mixed with new ones."""
    from ..bench._report import Report
    from ..verify.ledger import SAME

    if not (folder / "machine.json").exists():
        return new
    old = Report.load(folder)
    for name in SAME:
        if old.machine[name] != new.machine[name]:
            raise ValueError(f"--resume: {folder} was measured with {name} = {old.machine[name]}, here it is {new.machine[name]}")
    old.rows = [row for row in old.rows if not row.get("refused")]
    return old
