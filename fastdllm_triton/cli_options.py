"""What the commands share: options, consoles, and errors that are one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[str, typer.Option(help="'tiny' (built in), a checkpoint folder, or a hub id.")]
DeviceOption = Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; the GPU if there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64; the checkpoint's own if not given.")
]


class BackendChoice(StrEnum):
    """Backends."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


BackendOption = Annotated[BackendChoice, typer.Option(help="Who runs the ops.")]


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is told in a line; anything else is a bug and keeps its trace."""
    try:
        yield
    except typer.Exit:  # A RuntimeError to Python.
        raise
    except (ValueError, RuntimeError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None
