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
    cpu = "cpu"
    host = "host"
    all = "all"


NO_GPU = "No GPU: every provider ran once on small shapes. This checks correctness and plumbing only; no speed is measured."


def bench(
    context: typer.Context,
    suite: Annotated[SuiteChoice, typer.Argument(help="What to measure.")] = SuiteChoice.all,
    op: Annotated[list[str] | None, typer.Option(help="A bench of the suite. All if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A baseline to run beside ours. All if not given.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Cases with this entry of their shape, as in batch=4. All if not given.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes; without a GPU all that there is, but for 'cpu'.")] = False,
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
    'cpu' times whole generations on the CPU, ours and the official code's; 'all' is what a GPU runs, without these two.

    An op whose verification fails here is refused. Ends with status 1 if one was, or if what must hold on a CPU does not; with 3
    if --minutes left cases out, and with 4 if a kernel has failed so that this process can use the GPU no more; --resume goes
    on behind it.
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
    from ..bench.bench_cpu import claims
    from ..loading import find_device
    from ..tools import environment
    from ..verify.ledger import proven

    on_cpu = suite == SuiteChoice.cpu
    target = find_device(device or ("cpu" if on_cpu else None))
    if on_cpu and target.type != "cpu":
        raise ValueError(f"--device: got {device}, and the suite cpu needs cpu")
    if not on_cpu and target.type == "cpu" and verify.needs_interpreter(target):
        raise typer.Exit(verify.rerun_in_interpreter(as_words(context)))
    chosen = benches(suite.value, op or ())
    check_baselines(chosen, only or ())
    check_cases(chosen, case or ())
    earlier = None if compare is None else _earlier(compare)
    if target.type == "cpu" and not quick and not on_cpu:
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
            cases=case or (),
            on_status=lambda text: line.update(Text(text)),
        )
    claimed = claims(report.rows)
    if as_json:
        results: dict[str, Any] = {"machine": report.machine, "verification": report.verification, "rows": report.rows}
        results["claims"] = [asdict(claim) for claim in claimed]
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
    if outcome.status or not all(claim.holds for claim in claimed):
        raise typer.Exit(outcome.status or 1)


def show_report(report: Report, device: torch.device) -> None:
    """Prints what was verified, a table an op, and the ceilings; of a CPU what must hold."""
    from .. import verify
    from ..bench._report import table
    from ..bench.bench_cpu import claims, claims_table
    from ..tools import environment

    records = [verify.Record.from_json(record) for record in report.verification]
    if records:
        show(verify.render(records, f"Verified on {environment.device_name(device)}"))
    for op, rows in report.by_op():
        show(table(rows, op))
    if any(row["bench"] == "cpu" for row in report.rows):
        if claimed := claims(report.rows):
            show(claims_table(claimed))
    elif report.ceilings is None:
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


def check_cases(chosen: list[Measurable], cases: list[str] | tuple[str, ...]) -> None:
    """Raises for an entry of a shape that no bench has."""
    from ..bench._session import entries

    known = {entry for bench in chosen for shape in bench.every_shape for entry in entries(shape)}
    keys = sorted({entry.partition("=")[0] for entry in known})
    for case in cases:
        key, sign, _ = case.partition("=")
        if not sign or key not in keys:
            raise ValueError(f"--case: got {case!r}, needs KEY=VALUE with a key among {', '.join(keys)}")
        known_names("--case", [case], sorted(entry for entry in known if entry.startswith(f"{key}=")))


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
