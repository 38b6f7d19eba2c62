"""The plots of a report, each an SVG element for a page. Text stays text, so that the page's font and size apply."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._session import Row, label
from fastdllm_triton.bench._timing import Ceilings

#: Inches at 100 dots: as wide as a phone.
SIZE = (4.2, 3.1)
#: Ours, then baselines; distinguishable without red and green (Okabe and Ito's palette).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
#: Plots of an op along its axis, spread over its other sizes.
MOST_PANELS = 6


@dataclass(frozen=True)
class Plot:
    """A plot and what it shows, in words."""

    title: str
    svg: str


def plots_of(report: Report) -> list[tuple[str, list[Plot]]]:
    """The plots of a report by section; sections without data are left out."""
    import matplotlib

    rows = [row for row in report.rows if "median_ms" in row]
    by_op = {op: [row for row in rows if row["op"] == op] for op in dict.fromkeys(row["op"] for row in rows)}
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        sections = [
            ("How close to this GPU's ceilings", _ceiling_plots(rows, report.ceilings) if report.ceilings else []),
            *((f"{op}: time", _along_axis(of_op)) for op, of_op in by_op.items()),
        ]
    return [(title, plots) for title, plots in sections if plots]


def _ceiling_plots(rows: Sequence[Row], ceilings: Ceilings) -> list[Plot]:
    return [plot for plot in (_fractions(rows), _roofline(rows, ceilings)) if plot]


def _along_axis(rows: Sequence[Row]) -> list[Plot]:
    """Time against the op's axis, a plot for each other size and a line for each provider."""
    axis = rows[0]["axis"]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(label({key: value for key, value in row["shape"].items() if key != axis}), []).append(row)
    several = {name: found for name, found in panels.items() if len({row["shape"].get(axis) for row in found}) > 1}
    found = []
    for name in list(several)[:: max(1, math.ceil(len(several) / MOST_PANELS))]:
        providers = dict.fromkeys(row["provider"] for row in several[name])
        figure, axes = _figure(height=SIZE[1] + 0.09 * len(providers))
        for colour, provider in zip(_cycle(), providers, strict=False):
            mine = sorted((row for row in several[name] if row["provider"] == provider), key=lambda row: row["shape"][axis])
            x = [row["shape"][axis] for row in mine]
            axes.plot(x, [row["median_ms"] for row in mine], marker="o", markersize=3, color=colour, label=provider)
            axes.fill_between(x, [r["p20_ms"] for r in mine], [r["p80_ms"] for r in mine], color=colour, alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        _ticks_at(axes, sorted({row["shape"][axis] for row in several[name]}))
        figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
        found.append(Plot(name or axis, _svg(figure, f"{rows[0]['op']} {name}")))
    return found


def _fractions(rows: Sequence[Row]) -> Plot | None:
    """Our fraction of the floor: a dot a shape, a line an op."""
    mine = [row for row in rows if row["provider"] == "triton" and "of_floor" in row]
    if not mine:
        return None
    ops = list(dict.fromkeys(row["op"] for row in mine))
    figure, axes = _figure(height=0.6 + 0.4 * len(ops))
    for line, op in enumerate(reversed(ops)):
        x = [100 * row["of_floor"] for row in mine if row["op"] == op]
        axes.plot(x, [line] * len(x), "o", markersize=5, alpha=0.5, color=COLOURS[0])
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(ops)), reversed(ops))
    axes.set(xlim=(0, 110), ylim=(-0.5, len(ops) - 0.5), xlabel="% of the floor, a dot a shape")
    return Plot("Floor over time: bytes at copy bandwidth or FLOPs at matrix rate, whichever is longer", _svg(figure, "floors"))


def _roofline(rows: Sequence[Row], ceilings: Ceilings) -> Plot | None:
    """FLOP/s reached against FLOPs a byte, under the roof."""
    mine = [row for row in rows if row["provider"] == "triton" and row.get("flops")]
    if not mine:
        return None
    figure, axes = _figure()
    intensity = [row["flops"] / row["bytes"] for row in mine]
    ridge = ceilings.matrix / ceilings.copy
    reach = [min([ridge / 30, *intensity]) / 2, ridge, max([ridge * 10, *intensity]) * 2]
    axes.plot(reach, [min(x * ceilings.copy, ceilings.matrix) / 1e12 for x in reach], color="black", linewidth=1)
    for colour, op in zip(_cycle(), dict.fromkeys(row["op"] for row in mine), strict=False):
        points = [(row["flops"] / row["bytes"], row["tflop_per_s"]) for row in mine if row["op"] == op]
        axes.plot(*zip(*points, strict=True), "o", markersize=4, alpha=0.7, color=colour, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.legend(frameon=False, fontsize=8)
    return Plot("Roofline, as measured on this machine", _svg(figure, "roofline"))


def _cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


def _figure(height: float = SIZE[1]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(SIZE[0], height), layout="constrained")
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
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": name}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    pyplot.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", text, count=1)
