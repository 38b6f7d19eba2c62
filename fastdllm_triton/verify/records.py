"""What a verification found, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from .tolerance import Judgement


@dataclass(frozen=True)
class CaseRecord:
    """One case.

    Attributes:
        case: its name.
        error, bound: the largest error, and what was allowed there; of ids and flags the number that differ.
        ok: whether it held. A skipped case holds.
        note: what did not hold.
        skipped: why it was not run.
    """

    case: str
    error: float
    bound: float
    ok: bool
    note: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Record:
    """One op in one dtype, or one check of whole models.

    Attributes:
        check: the op or the check.
        dtype: of the inputs.
        cases: what was tried.
        seconds: it took.
    """

    check: str
    dtype: str
    cases: Sequence[CaseRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What tells records apart: check and dtype."""
        return self.check, self.dtype

    @property
    def ok(self) -> bool:
        return all(case.ok for case in self.cases)

    @property
    def tried(self) -> int:
        return sum(not case.skipped for case in self.cases)

    @property
    def worst(self) -> CaseRecord | None:
        """The case that came closest to its bound, or went furthest beyond it."""
        tried = (case for case in self.cases if not case.skipped)
        return max(tried, key=lambda case: (not case.ok, Judgement(case.error, case.bound).severity), default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain data; an infinite error is null."""
        cases = [asdict(case) | {"error": case.error if math.isfinite(case.error) else None} for case in self.cases]
        return {
            "check": self.check, "dtype": self.dtype, "ok": self.ok, "tried": self.tried, "seconds": self.seconds, "cases": cases,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        cases = [CaseRecord(**case | {"error": math.inf if case["error"] is None else case["error"]}) for case in data["cases"]]
        return cls(data["check"], data["dtype"], cases, data["seconds"])


def render(records: Sequence[Record], title: str) -> Table:
    table = Table("check", "dtype", title=title)
    for column in ("cases", "max error", "bound"):
        table.add_column(column, justify="right")
    for column in ("ok", "note"):
        table.add_column(column)
    for record in records:
        worst = record.worst
        numbers = ["", ""] if worst is None else [_number(worst.error), _number(worst.bound)]
        table.add_row(
            record.check,
            record.dtype,
            str(record.tried),
            *numbers,
            "yes" if record.ok and record.tried else "-" if record.ok else "NO",
            Text("\n".join(_notes(record))),
            style=None if record.ok else "red",
        )
    return table


def _notes(record: Record) -> list[str]:
    failed = [f"{case.case}: {case.note}" for case in record.cases if not case.ok]
    skipped = [f"{case.case}: skipped, {case.skipped}" for case in record.cases if case.skipped]
    return failed[:4] + ([f"and {len(failed) - 4} more"] if len(failed) > 4 else []) + skipped


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"
