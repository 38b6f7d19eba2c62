"""``fastdllm-triton bench``: measured, side by side, with the ceiling beside each number."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .. import machine
from .. import verify as proof
from .._console import clear_errors, console, errors, wide
from .verify import check_writable, require_triton

if TYPE_CHECKING:
    import torch

    from ..bench._report import Report
    from ..bench._session import Measurable

NO_GPU = "No GPU: every provider ran once on small shapes. This checks correctness and plumbing only; no speed is measured."


def bench(
    suite: Annotated[str, typer.Argument(help="ops, step, generate or all; or host.")] = "all",
    op: Annotated[list[str] | None, typer.Option(help="A bench of the suite. All if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A baseline to run beside ours. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes; all that there is without a GPU.")] = False,
    device: Annotated[str | None, typer.Option(help="'cuda' or 'cpu'; the GPU if there is one.")] = None,
    json_folder: Annotated[Path | None, typer.Option("--json", help="Write the results into this folder, case by case.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the results in that folder end.")] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier folder: say what became faster or slower.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots and tables to this file.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no case after so many minutes.")] = None,
) -> None:
    """Time ours and the baselines in turns, each with its fraction of what this GPU reaches at its best.

    'host' times the launchers of a forward with every launch replaced by nothing, which needs no GPU.

    An op whose verification fails here is refused. Ends with status 1 if one was, and with 3 if --minutes left cases out.
    """
    with clear_errors():
        require_triton("bench")
        if suite == "host":
            from ..bench.host import table as host_time

            wide(110).print(host_time())
            return
        target = proof.check_device(device)
        check_writable(html, "--html")
        if html is not None:
            from ..bench._page import check_installed

            check_installed()
        from ..bench._report import Report, changes, changes_table, check_folder
        from ..bench._session import benches

        if target.type == "cpu" and proof.needs_interpreter(target):
            raise typer.Exit(proof.rerun_in_interpreter(_arguments(suite, op, only, quick, json_folder, resume, compare, html)))
        chosen = benches(suite, op or ())
        check_baselines(chosen, only or ())
        earlier = None if compare is None else Report.load(compare)
        if target.type == "cpu" and not quick:
            console.print("torch sees no GPU here, so nothing is measured; --quick tries the plumbing.")
            return
        report = Report(machine.describe(target))
        if json_folder is not None:
            check_folder(json_folder, resume)
            report = _resumed(report, json_folder) if resume else report
        refused, is_cut = run(chosen, report, target, quick=quick, only=only or (), folder=json_folder, minutes=minutes)
        show(report, target)
        if earlier is not None:
            wide(150).print(changes_table(changes(earlier, report), earlier, report))
        if html is not None:
            from ..bench._page import write_page

            write_page(report, html, earlier)
        if refused:
            errors.print(Text(f"refused, as they do not verify here: {', '.join(refused)}", style="red"))
            raise typer.Exit(1)
        if is_cut:
            console.print("The time is up and cases are left; --json with --resume goes on with them.")
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
    from ..bench._session import Session, label
    from ..bench._timing import measure_ceilings, time_in_turns

    session = Session(device, quick=quick, only=only, done=report.done())
    session.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    gates = list(dict.fromkeys(name for bench in chosen for name in bench.gate))
    with console.status("verifying") as status:
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
                        status.update(f"{bench.op} {label(rows[0]['shape'])}")
                        report.rows += rows
                        if folder is not None:
                            report.write_rows(folder, bench.op)
            if any(row.get("refused") for row in report.rows if row["bench"] == bench.op):
                refused.append(bench.op)
            if folder is not None:
                report.write_rows(folder, bench.op)
    return refused, session.is_cut


def show(report: Report, device: torch.device) -> None:
    """All tables."""
    from ..bench._report import table

    records = [proof.Record.from_json(record) for record in report.verification]
    wide(110).print(proof.render(records, f"Verified on {machine.device_name(device)}"))
    for op, rows in report.by_op():
        wide(150).print(table(rows, op))
    if report.ceilings is None:
        console.print(f"[bold]{NO_GPU}[/bold]")
    else:
        console.print(
            f"copy {report.ceilings.copy / 1e9:,.0f} GB/s, matrix {report.ceilings.matrix / 1e12:,.0f} TFLOP/s, as measured in "
            f"this run. 'of floor' is of the nearer of the two; 'x ours' is a baseline's time over ours."
        )


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
    suite: str,
    op: list[str] | None,
    only: list[str] | None,
    quick: bool,
    json_folder: Path | None,
    resume: bool,
    compare: Path | None,
    html: Path | None,
) -> list[str]:
    """The command line again, for the process that interprets."""
    found = ["bench", suite, "--device", "cpu"]
    for option, values in (("--op", op), ("--only", only)):
        found += [part for value in values or () for part in (option, value)]
    for option, path in (("--json", json_folder), ("--compare", compare), ("--html", html)):
        found += [option, str(path)] if path is not None else []
    return found + ["--quick"] * quick + ["--resume"] * resume
