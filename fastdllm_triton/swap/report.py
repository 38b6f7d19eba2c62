"""What ``accelerate`` did to a module, as a table to read and a dict to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes:
        part: of the model.
        runs: ``triton`` or ``reference`` (plain PyTorch ops of this library) where the part was replaced, ``fused`` where
            parameters are views of one tensor, ``module`` where the module's own code stays.
        what: what runs.
        reason: why so.
    """

    part: str
    runs: Literal["triton", "reference", "fused", "module"]
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was replaced in a module and what not, with reasons. Printing it shows a table.

    Attributes:
        architecture: ``llada`` or ``dream``.
        layers: how many.
        device, dtype: of the parameters.
        entries: the lines.
        fused_bytes: memory of the fused tensors, which the module's parameters are views of.
    """

    architecture: str
    layers: int
    device: str
    dtype: str
    entries: tuple[Entry, ...]
    fused_bytes: int

    @property
    def replaced(self) -> tuple[str, ...]:
        """Parts that this library runs."""
        return tuple(entry.part for entry in self.entries if entry.runs != "module")

    @property
    def kept(self) -> tuple[str, ...]:
        """Parts that the module's own code still runs, or that are not run by ``generate``."""
        return tuple(entry.part for entry in self.entries if entry.runs == "module")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"entries": [asdict(entry) for entry in self.entries]}

    def __rich__(self) -> Table:
        title = f"{self.architecture}, {self.layers} layers, {self.dtype} on {self.device}"
        table = Table("part", "runs", "what", "why", title=title, title_justify="left")
        for entry in self.entries:
            table.add_row(entry.part, entry.runs, entry.what, entry.reason)
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()
