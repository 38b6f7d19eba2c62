"""Where the command line writes, and how it tells of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

console = Console()
errors = Console(stderr=True)


def wide(columns: int) -> Console:
    """The console; where it is no terminal, at least so wide that a table of this many columns is not cut."""
    return console if console.is_terminal else Console(width=max(console.width, columns))


def tell(error: BaseException) -> None:
    """An error in a line, however long."""
    errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is told in a line; anything else is a bug and keeps its trace."""
    try:
        yield
    except typer.Exit:  # A RuntimeError to Python.
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        tell(error)
        raise typer.Exit(2) from None
