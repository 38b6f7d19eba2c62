"""The results of a run: a folder of JSON files, written after every case, and the table that people read.

| file              | holds                                                                                      |
|-------------------|--------------------------------------------------------------------------------------------|
| ``machine.json``  | what it was measured on, the ceilings, whether anything was timed                          |
| ``verify.json``   | the verification before it                                                                 |
| ``<bench>.json``  | the rows of a bench, a row a line                                                          |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fastdllm_triton.bench._session import Row, label
from fastdllm_triton.bench._timing import Ceilings
from fastdllm_triton.utils.files import write_json, write_records


@dataclass
class Report:
    """All that a run found.

    Attributes:
        machine: see :func:`fastdllm_triton.tools.environment.describe`.
        ceilings: None where nothing was timed.
        verification: records as JSON.
        rows: of all benches.
    """

    machine: dict[str, Any]
    ceilings: Ceilings | None = None
    verification: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Reads a folder.

        Raises:
            ValueError: it is not one that a run has written.
        """
        file = folder / "machine.json"
        if not file.is_file():
            raise ValueError(f"{folder} holds no results of a bench: {file.name} is missing")
        try:
            about = json.loads(file.read_text())
            report = cls(about["machine"], Ceilings(**about["ceilings"]) if about["ceilings"] else None)
            for path in sorted(folder.glob("*.json")):
                if path.name == "verify.json":
                    report.verification = json.loads(path.read_text())["records"]
                elif path != file:
                    rows = json.loads(path.read_text())
                    report.rows += rows if isinstance(rows, list) and all("bench" in row for row in rows) else []
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds damaged results: {error!r}") from None
        return report

    def by_op(self) -> list[tuple[str, list[Row]]]:
        """The rows of each op, in order; a refused op has no shape, and its own table."""
        groups = groupby(self.rows, key=lambda row: (row["op"], tuple(row["shape"])))
        return [(op, list(rows)) for (op, _), rows in groups]

    def write_machine(self, folder: Path) -> None:
        ceilings = None if self.ceilings is None else asdict(self.ceilings)
        timed = ceilings is not None or any("median_ms" in row for row in self.rows)
        write_json(folder / "machine.json", {"machine": self.machine, "ceilings": ceilings, "timed": timed})

    def write_rows(self, folder: Path, bench: str) -> None:
        """Writes the rows of a bench, one a line, whole or not at all."""
        write_records(folder / f"{bench}.json", [row for row in self.rows if row["bench"] == bench])

    def done(self) -> set[tuple[str, str, str]]:
        """The rows that need no second run: those that were timed, or that cannot run here."""
        return {_key(row) for row in self.rows if not row.get("refused")}

    def add(self, rows: Sequence[Row]) -> None:
        """Takes rows over, in the place of those of the same case and provider."""
        new = {_key(row) for row in rows}
        self.rows = [row for row in self.rows if _key(row) not in new] + list(rows)


def check_unmixed(folder: Path, resume: bool) -> None:
    """Raises ``ValueError`` for a folder whose results would be mixed with others."""
    if (folder / "machine.json").exists() and not resume:
        raise ValueError(f"--out: {folder} holds results; give another folder, or --resume to go on where they end")


#: The numbers of a row as people read them: title, key, form, and the factor of the key's value.
COLUMNS = (
    ("median ms", "median_ms", "{:.4g}", 1),
    ("p20", "p20_ms", "{:.4g}", 1),
    ("p80", "p80_ms", "{:.4g}", 1),
    ("wall ms", "wall_ms", "{:.4g}", 1),
    ("GB/s", "gb_per_s", "{:.0f}", 1),
    ("TFLOP/s", "tflop_per_s", "{:.1f}", 1),
    ("% of copy", "of_copy", "{:.0f}", 100),
    ("% of matrix", "of_matrix", "{:.0f}", 100),
    ("% of floor", "of_floor", "{:.0f}", 100),
    ("x ours", "times_triton", "{:.2f}", 1),
    ("x ours, wall", "times_wall", "{:.2f}", 1),
    ("% in products", "products", "{:.0f}", 100),
    ("% in attention", "attention", "{:.0f}", 100),
    ("% same tokens", "agreement", "{:.0f}", 100),
    ("peak MB", "peak_bytes", "{:.1f}", 2**-20),
)


@dataclass(frozen=True)
class Cell:
    """What a table shows under a head, and the number that it is sorted by."""

    head: str
    text: str
    sort: float | None = None


def cells_of(rows: Sequence[Row]) -> list[list[Cell]]:
    """The cells of the rows of one op, every number next to its ceiling; empty columns are left out."""
    columns = [column for column in COLUMNS if any(row.get(column[1]) for row in rows)]
    notes = [note_of(row) for row in rows]
    return [
        [
            *(Cell(name, str(row["shape"].get(name, "")), row["shape"].get(name)) for name in rows[0]["shape"]),
            Cell("provider", row["provider"]),
            *(
                Cell(title, "" if row.get(key) is None else form.format(row[key] * factor), row.get(key))
                for title, key, form, factor in columns
            ),
            *([Cell("note", note)] if any(notes) else []),
        ]
        for row, note in zip(rows, notes, strict=True)
    ]


def note_of(row: Row) -> str:
    """Why a row has no time, or why it is to be doubted."""
    doubt = f"unverified: {row.get('wrong', 'verification failed or is missing')}" if row.get("unverified") else ""
    return ", ".join(filter(None, (row.get("missing"), doubt)))


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows of one op."""
    table, cells = Table(title=title), cells_of(rows)
    for cell in cells[0]:
        table.add_column(cell.head, justify="left" if cell.head in ("provider", "note") else "right")
    for row, line in zip(rows, cells, strict=True):
        style = "red" if row.get("refused") or row.get("unverified") else "dim" if "missing" in row else None
        table.add_row(*(Text(cell.text) for cell in line), style=style)
    return table


@dataclass(frozen=True)
class Change:
    """A case in two runs; times are in milliseconds.

    Attributes:
        op, shape, provider: which case.
        before, after: medians.
        spread: the larger distance from a median to its percentiles, as a share of it.
        verdict: ``faster``, ``slower``, or ``same`` where the ranges from p20 to p80 meet.
    """

    op: str
    shape: str
    provider: str
    before: float
    after: float
    spread: float
    verdict: str


def changes(before: Report, after: Report) -> list[Change]:
    """What became of the cases that both runs have timed, the largest change first."""
    earlier = {_key(row): row for row in before.rows if "median_ms" in row}
    pairs = [(earlier[_key(row)], row) for row in after.rows if "median_ms" in row and _key(row) in earlier]
    compared = []
    for old, new in pairs:
        apart = new["p80_ms"] < old["p20_ms"] or new["p20_ms"] > old["p80_ms"]
        verdict = ("faster" if new["median_ms"] < old["median_ms"] else "slower") if apart else "same"
        spread = max(max(r["p80_ms"] - r["median_ms"], r["median_ms"] - r["p20_ms"]) / r["median_ms"] for r in (old, new))
        compared.append(Change(*_key(new), old["median_ms"], new["median_ms"], spread, verdict))
    return sorted(compared, key=lambda change: -abs(change.after / change.before - 1))


def changes_table(compared: Sequence[Change], before: Report, after: Report) -> Table:
    """What became faster or slower; what stayed the same is counted."""
    moved = [change for change in compared if change.verdict != "same"]
    title = f"Against {before.machine['date'][:10]}, {(before.machine['commit'] or 'unknown commit')[:10]}"
    if before.machine["device"] != after.machine["device"]:
        title += f", on another device: {before.machine['device']}"
    table = Table("op", "shape", "provider", title=title)
    for column in ("before ms", "after ms", "change", "spread"):
        table.add_column(column, justify="right")
    for change in moved:
        ratio, style = change.after / change.before - 1, "green" if change.verdict == "faster" else "red"
        numbers = f"{change.before:.4g}", f"{change.after:.4g}", f"{ratio:+.1%}", f"±{change.spread:.1%}"
        table.add_row(change.op, change.shape, change.provider, *numbers, style=style)
    table.caption = f"{len(compared)} cases in both runs; {len(compared) - len(moved)} the same within their spread"
    return table


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], label(row["shape"]), row["provider"]
