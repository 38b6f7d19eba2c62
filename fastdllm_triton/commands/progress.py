"""A bar on standard error for work that takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._console import errors


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how much is done, as the function that it gives is told: how many, of how many."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("time left"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=errors, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
