"""A report as one page: plots, sortable tables, no network.

Each plot is an SVG element. Its text stays text, so that the page's font and size apply.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdllm_triton.bench._report import Report, cells_of, changes
from fastdllm_triton.bench._session import Row, label
from fastdllm_triton.bench._timing import Ceilings
from fastdllm_triton.utils.files import write_atomically

#: Inches at 100 dots: as wide as a phone.
SIZE = (4.2, 3.1)
#: Ours, then baselines; distinguishable without red and green (Okabe and Ito's palette).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
#: Plots of an op along its axis, spread over its other sizes.
MOST_PANELS = 6
#: A title and an SVG element.
Plot = tuple[str, str]


def check_installed() -> None:
    """Raises ``RuntimeError`` if what a page needs is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"--html needs {' and '.join(missing)}: pip install 'fastdllm-triton[bench]'")


def write_page(report: Report, file: Path, earlier: Report | None = None) -> None:
    write_atomically(file, page(report, earlier))


def page(report: Report, earlier: Report | None = None) -> str:
    import jinja2

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


def plots_of(report: Report) -> list[tuple[str, list[Plot]]]:
    """The plots of a report by section; sections without data are left out."""
    import matplotlib
    from cycler import cycler

    rows = [row for row in report.rows if "median_ms" in row]
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        sections = [("How close to this GPU's ceilings", _ceilings(rows, report.ceilings) if report.ceilings else [])]
        ops = dict.fromkeys(row["op"] for row in rows)
        sections += [(f"{op}: time", _along_axis([row for row in rows if row["op"] == op])) for op in ops]
    return [(title, plots) for title, plots in sections if plots]


def _along_axis(rows: Sequence[Row]) -> list[Plot]:
    """Time against the op's axis, a plot for each other size and a line for each provider."""
    axis = rows[0]["axis"]
    panels: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["shape"][axis]):
        panels.setdefault(label({key: value for key, value in row["shape"].items() if key != axis}), []).append(row)
    lines = [(name, panel) for name, panel in panels.items() if len({row["shape"][axis] for row in panel}) > 1]
    plots = []
    for name, panel in lines[:: max(1, math.ceil(len(lines) / MOST_PANELS))]:
        providers = dict.fromkeys(row["provider"] for row in panel)
        figure, axes = _figure(height=SIZE[1] + 0.09 * len(providers))
        for provider in providers:
            mine = [row for row in panel if row["provider"] == provider]
            x = [row["shape"][axis] for row in mine]
            (line,) = axes.plot(x, [row["median_ms"] for row in mine], marker="o", markersize=3, label=provider)
            low, high = ([row[key] for row in mine] for key in ("p20_ms", "p80_ms"))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        _ticks_at(axes, sorted({row["shape"][axis] for row in panel}))
        figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
        plots.append((name or axis, _svg(figure, f"{rows[0]['op']} {name}")))
    return plots


def _ceilings(rows: Sequence[Row], ceilings: Ceilings) -> list[Plot]:
    """Our fraction of the floor, a dot a shape and a line an op; and FLOP/s reached against FLOPs a byte, under the roof."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        if row["provider"] == "triton" and "of_floor" in row:
            by_op.setdefault(row["op"], []).append(row)
    plots = []
    if by_op:
        figure, axes = _figure(height=0.6 + 0.4 * len(by_op))
        for line, of_op in enumerate(by_op.values()):
            axes.plot([100 * row["of_floor"] for row in of_op], [line] * len(of_op), "o", alpha=0.5, color=COLOURS[0])
        axes.axvline(100, color="black", linewidth=1)
        axes.set_yticks(range(len(by_op)), by_op)
        axes.set(xlim=(0, 110), ylim=(len(by_op) - 0.5, -0.5), xlabel="% of the floor, a dot a shape")
        title = "Floor over time: bytes at copy bandwidth or FLOPs at matrix rate, whichever is longer"
        plots.append((title, _svg(figure, "floors")))
    by_op = {op: computing for op, of_op in by_op.items() if (computing := [row for row in of_op if row.get("flops")])}
    if by_op:
        figure, axes = _figure()
        ridge = ceilings.matrix / ceilings.copy
        intensity = [row["flops"] / row["bytes"] for of_op in by_op.values() for row in of_op]
        reach = [min([ridge / 30, *intensity]) / 2, ridge, max([ridge * 10, *intensity]) * 2]
        axes.plot(reach, [min(x * ceilings.copy, ceilings.matrix) / 1e12 for x in reach], color="black", linewidth=1)
        for op, of_op in by_op.items():
            x, y = [row["flops"] / row["bytes"] for row in of_op], [row["tflop_per_s"] for row in of_op]
            axes.plot(x, y, "o", markersize=4, alpha=0.7, label=op)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
        axes.legend(frameon=False, fontsize=8)
        plots.append(("Roofline, as measured on this machine", _svg(figure, "roofline")))
    return plots


def _figure(height: float = SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _ticks_at(axes: Any, values: Sequence[float]) -> None:
    """The sizes that were measured, thinned out until they fit."""
    shown = values[:: math.ceil(len(values) / 7)]
    axes.set_xticks(shown, [f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value) for value in shown])
    axes.minorticks_off()


def _svg(figure: Any, name: str) -> str:
    """The figure as one element that scales with the page; ids carry the name, since a page has many of them."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", text, count=1)
