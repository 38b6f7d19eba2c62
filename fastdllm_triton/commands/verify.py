"""``fastdllm-triton verify``: the first thing to run on a new GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .. import machine
from .. import verify as proof
from .._console import clear_errors, console, errors, wide
from ..files import check_writable, naming, write_json


def verify(
    device: Annotated[str | None, typer.Option(help="'cuda' or 'cpu'; the GPU if there is one.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as swiglu, or 'models'. All if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A part: seconds on a GPU, a minute or two on a CPU.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
) -> None:
    """Try every kernel against the reference and float64, then whole models, on this machine.

    Ends with status 1 if anything did not hold.
    """
    with clear_errors():
        require_triton("verify")
        names = proof.check_names(op)
        target = proof.check_device(device)
        check_writable("--json", json_file)
        if proof.needs_interpreter(target):
            arguments = ["verify", "--device", "cpu", *(part for name in names for part in ("--op", name))]
            arguments += ["--quick"] if quick else []
            arguments += ["--json", str(json_file)] if json_file else []
            raise typer.Exit(proof.rerun_in_interpreter(arguments))
        where = machine.device_name(target)
        with console.status("") as status:
            status.update(f"verifying on {where}")
            records = proof.verify(
                names, target, quick=quick, on_record=lambda record: status.update(f"verified {record.check} {record.dtype}")
            )
        wide(110).print(proof.render(records, f"Verified on {where}"))
        if target.type == "cpu":
            console.print("[dim]No GPU: this shows that the kernels compute the right thing, and nothing about speed.[/dim]")
        if json_file is not None:
            with naming("--json", json_file):
                write_json(json_file, proof.summary(records, machine.describe(target)))
        failed = [f"{record.check} {record.dtype}" for record in records if not record.ok]
        if failed:
            errors.print(Text(f"did not hold: {', '.join(failed)}", style="red"))
            raise typer.Exit(1)


def require_triton(command: str) -> None:
    """Raises where there are no kernels to run."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{command} needs triton, which is not installed")
