"""``fastdllm-triton bench``: measured, side by side, with the ceiling beside each number."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .. import cli_options as cli
from .._console import console, errors, say, show, status
from ..files import check_folder, check_writable, locked, naming
from ._shared import require_triton

if TYPE_CHECKING:
    import torch

    from ..bench._report import Report
    from ..bench._session import Measurable


class SuiteChoice(StrEnum):
    """Suites."""

    ops = "ops"
    step = "step"
    generate = "generate"
    all = "all"


NO_GPU = "No GPU: every provider ran once on small shapes. This checks correctness and plumbing only; no speed is measured."


def bench(
    suite: Annotated[SuiteChoice, typer.Argument(help="What to measure.")] = SuiteChoice.all,
    op: Annotated[list[str] | None, typer.Option(help="A bench of the suite. All if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A baseline to run beside ours. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes; all that there is without a GPU.")] = False,
    device: cli.DeviceOption = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no case after so many minutes.")] = None,
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

    An op whose verification fails here is refused. Ends with status 1 if one was, and with 3 if --minutes left cases out.
    """
    require_triton("bench")
    check_writable("--html", html)
    if html is not None:
        from ..bench._page import check_installed

        check_installed()
    from .. import machine
    from .. import verify as proof
    from ..bench._report import Report, changes, changes_table, check_unmixed
    from ..bench._session import benches

    target = proof.check_device(device)
    if target.type == "cpu" and proof.needs_interpreter(target):
        raise typer.Exit(proof.rerun_in_interpreter(_arguments(suite, op, only, quick, out, resume, compare, html, as_json)))
    chosen = benches(suite.value, op or ())
    check_baselines(chosen, only or ())
    earlier = None if compare is None else _earlier(compare)
    if target.type == "cpu" and not quick:
        say(errors if as_json else console, "torch sees no GPU here, so nothing is measured; --quick tries the plumbing.")
        return
    report = Report(machine.describe(target))
    if out is not None:
        check_folder("--out", out)
        check_unmixed(out, resume)
    with nullcontext() if out is None else locked(out, "--out"):
        if out is not None and resume:
            report = _resumed(report, out)
        refused, is_cut = run(chosen, report, target, quick=quick, only=only or (), folder=out, minutes=minutes)
    if as_json:
        told = {"machine": report.machine, "verification": report.verification, "rows": report.rows}
        typer.echo(json.dumps(told | {"changes": [asdict(change) for change in changes(earlier, report)]} if earlier else told))
    else:
        show_report(report, target)
        if earlier is not None:
            show(changes_table(changes(earlier, report), earlier, report))
    if html is not None:
        from ..bench._page import write_page

        with naming("--html", html):
            write_page(report, html, earlier)
    if refused:
        say(errors, f"refused, as they do not verify here: {', '.join(refused)}", style="red")
        raise typer.Exit(1)
    if is_cut:
        say(errors, "The time is up and cases are left; --out with --resume goes on with them.")
        raise typer.Exit(3)


def run(
    chosen: list[Measurable],
    report: Report,
    device: torch.device,
    *,
    quick: bool,
    only: list[str] | tuple[str, ...],
    folder: Path | None,
    minutes: float | None,
) -> tuple[list[str], bool]:
    """Fills a report, verification first, flushing each case.

    Returns:
        The benches that were refused, and whether the time was too short for all cases.
    """
    from .. import machine
    from .. import verify as proof
    from ..bench._session import Session, label
    from ..bench._timing import measure_ceilings, time_in_turns

    session = Session(device, quick=quick, only=only, done=report.done())
    session.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    gates = list(dict.fromkeys(name for bench in chosen for name in bench.gate))
    with status("verifying") as line:
        records = proof.verify(gates, device, quick=quick)
        report.verification = [record.as_json() for record in records]
        failed = {record.check for record in records if not record.ok}
        # Checks of models have names of their own.
        failed |= {proof.MODELS} if failed - set(gates) else set()
        if device.type == "cuda":
            session.timer = time_in_turns
            session.ceilings = report.ceilings = report.ceilings or measure_ceilings(device, time_in_turns)
            now = machine.clocks(device)  # when it has just worked; idle clocks say little
            report.machine |= {f"loaded_{name}": now[name] for name in ("sm_clock", "memory_clock", "temperature") if name in now}
        if folder is not None:
            report.write_machine(folder)
            report.write_verification(folder)
        refused = []
        for bench in chosen:
            if faults := sorted(failed & set(bench.gate)):
                missing = f"refused: verification failed: {', '.join(faults)}"
                row: dict[str, Any] = {"bench": bench.op, "op": bench.op, "shape": {}, "axis": "", "provider": "triton"}
                report.rows.append(row | {"missing": missing, "refused": True})
            else:
                with proof.quiet(device):
                    for rows in bench.measure(session):
                        line.update(Text(f"{bench.op} {label(rows[0]['shape'])}"))
                        report.rows += rows
                        if folder is not None:
                            report.write_rows(folder, bench.op)
            if any(row.get("refused") for row in report.rows if row["bench"] == bench.op):
                refused.append(bench.op)
            if folder is not None:
                report.write_rows(folder, bench.op)
    return refused, session.is_cut


def show_report(report: Report, device: torch.device) -> None:
    """All tables."""
    from .. import machine
    from .. import verify as proof
    from ..bench._report import table

    records = [proof.Record.from_json(record) for record in report.verification]
    show(proof.render(records, f"Verified on {machine.device_name(device)}"))
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
    if unknown := sorted(set(only) - known):
        raise ValueError(f"--only: got {', '.join(unknown)}, needs names among {', '.join(sorted(known))}")


def _resumed(new: Report, folder: Path) -> Report:
    """The results of the folder, to go on with; those of another machine or commit are not mixed with new ones."""
    from ..bench._report import Report

    if not (folder / "machine.json").exists():
        return new
    old = Report.load(folder)
    for name in ("device", "commit", "torch", "triton"):
        if old.machine[name] != new.machine[name]:
            raise ValueError(f"--resume: {folder} was measured with {name} = {old.machine[name]}, here it is {new.machine[name]}")
    old.rows = [row for row in old.rows if not row.get("refused")]
    return old


def _arguments(
    suite: SuiteChoice,
    op: list[str] | None,
    only: list[str] | None,
    quick: bool,
    out: Path | None,
    resume: bool,
    compare: Path | None,
    html: Path | None,
    as_json: bool,
) -> list[str]:
    """The command line again, for the process that interprets."""
    found = ["bench", suite.value, "--device", "cpu"]
    for option, values in (("--op", op), ("--only", only)):
        found += [part for value in values or () for part in (option, value)]
    for option, path in (("--out", out), ("--compare", compare), ("--html", html)):
        found += [option, str(path)] if path is not None else []
    return found + ["--quick"] * quick + ["--resume"] * resume + ["--json"] * as_json
