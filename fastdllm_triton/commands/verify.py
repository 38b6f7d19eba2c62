"""``fastdllm-triton verify``: the first thing to run on a new GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .. import machine
from .. import verify as proof
from .._console import clear_errors, console, errors, wide
from ..verify.ledger import Ledger


def verify(
    device: Annotated[str | None, typer.Option(help="'cuda' or 'cpu'; the GPU if there is one.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as swiglu, or 'models'. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A part: seconds on a GPU, a minute or two on a CPU.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--out", "--json", help="Write all that is found to this file, as it comes.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where that file ends.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at once; on a GPU as many as there is room for.")] = None,
) -> None:
    """Try every kernel against the reference and float64, then whole models, on this machine.

    Ends with status 1 if anything did not hold.
    """
    with clear_errors():
        require_triton("verify")
        names = proof.check_names(op)
        target = proof.check_device(device)
        check_writable(json_file, "--out")
        if resume and json_file is None:
            raise ValueError("--resume: needs --out FILE, which says what to go on with")
        if proof.needs_interpreter(target):
            arguments = ["verify", "--device", "cpu", *(part for name in names for part in ("--op", name))]
            arguments += ["--quick"] if quick else []
            arguments += ["--out", str(json_file)] if json_file else []
            arguments += ["--resume"] * resume + (["--jobs", str(jobs)] if jobs else [])
            raise typer.Exit(proof.rerun_in_interpreter(arguments))
        where = machine.device_name(target)
        ledger = Ledger(machine.describe(target), quick, json_file)
        if resume:
            ledger.resume()
        with console.status(f"verifying on {where}") as status:

            def on_record(record: proof.Record) -> None:
                ledger.add(record)
                status.update(f"verified {record.check} {record.dtype}")

            records = proof.verify(
                names, target, quick=quick, jobs=jobs or proof.jobs_for(target), known=ledger.records, on_record=on_record
            )
        ledger.records = records  # in order
        ledger.write()
        wide(110).print(proof.render(records, f"Verified on {where}"))
        if target.type == "cpu":
            console.print("[dim]No GPU: this shows that the kernels compute the right thing, and nothing about speed.[/dim]")
        failed = [f"{record.check} {record.dtype}" for record in records if not record.ok]
        if failed:
            errors.print(Text(f"did not hold: {', '.join(failed)}", style="red"))
            raise typer.Exit(1)


def require_triton(command: str) -> None:
    """Raises where there are no kernels to run."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{command} needs triton, which is not installed")


def check_writable(file: Path | None, option: str = "--json") -> None:
    """Raises before any work if a file could not be written after it."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: {file} cannot be written; give a file in a folder that exists and can be written")
