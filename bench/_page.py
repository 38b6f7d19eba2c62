"""A report as one page: plots, sortable tables, no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastdllm_triton.bench._report import Report, cells_of, changes
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
        tables=[(op, list(zip(rows, cells_of(rows), strict=True))) for op, rows in report.by_op()],
        changes=[] if earlier is None else [change for change in changes(earlier, report) if change.verdict != "same"],
        earlier=earlier,
    )
