"""A report as one page: plots, sortable tables, no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastdllm_triton.bench._report import Report, changes, columns_of, note_of
from fastdllm_triton.bench._session import Row
from fastdllm_triton.utils.files import write_atomically


def check_installed() -> None:
    """Raises where a page cannot be made."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"--html needs {' and '.join(missing)}: pip install 'fastdllm-triton[bench]'")


def write_page(report: Report, file: Path, earlier: Report | None = None) -> None:
    write_atomically(file, page(report, earlier))


def page(report: Report, earlier: Report | None = None) -> str:
    import jinja2

    from fastdllm_triton.bench._plots import plots_of

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        machine=report.machine,
        ceilings=report.ceilings,
        verification=report.verification,
        sections=plots_of(report),
        tables=[_table(op, rows) for op, rows in report.by_op()],
        changes=[] if earlier is None else [change for change in changes(earlier, report) if change.verdict != "same"],
        earlier=earlier,
    )


def _table(op: str, rows: list[Row]) -> dict[str, Any]:
    """The cells of an op: what is shown, and the number that it is sorted by."""
    shape, columns = list(rows[0]["shape"]), columns_of(rows)
    notes = ["note"] if any(note_of(row) for row in rows) else []
    return {
        "op": op,
        "heads": [*shape, "provider", *(column.title for column in columns), *notes],
        "rows": [
            {
                "ours": row["provider"] == "triton",
                "refused": bool(row.get("refused") or row.get("unverified")),
                "cells": [
                    *({"text": str(row["shape"].get(key, "")), "sort": row["shape"].get(key)} for key in shape),
                    {"text": row["provider"], "sort": None},
                    *({"text": column.text(row), "sort": row.get(column.key)} for column in columns),
                    *({"text": note_of(row), "sort": None} for _ in notes),
                ],
            }
            for row in rows
        ],
    }
