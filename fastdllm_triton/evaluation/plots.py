"""The figures of an evaluation, drawn from its summary alone, as PNG and SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..decoding.strategies import STRATEGIES
from ..utils.files import write_atomically
from .summary import Record

#: Colours that the colour-blind can tell apart (Okabe and Ito), and markers for who prints in grey.
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "so^Dv<>P"
_SCORES = {"exact_match": "exact match", "whole": "whole text right"}
_SPEED = "tokens per forward"

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "svg.hashsalt": "fastdllm-triton",  # The same figure is the same file.
    "svg.fonttype": "none",
}


def save(figures: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Draws figures in one style and writes each as PNG and SVG; returns the PNG files. The same figure is the same bytes."""
    written: list[Path] = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in figures:
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                image = BytesIO()
                figure.savefig(image, format=suffix, dpi=160, bbox_inches="tight", metadata=metadata)
                write_atomically(folder / f"{name}.{suffix}", image.getvalue())
            written.append(folder / f"{name}.png")
    return written


def figures(summary: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Every figure that the records of :func:`~fastdllm_triton.evaluation.summary.summarize` have the data for, by name."""
    # Caches with options have a table of their own.
    plain = [r for r in summary if "+" not in r["cache"]] or list(summary)
    by_block = {block: [r for r in plain if r["block_length"] == block] for block in _values(summary, "block_length")}
    for block, records in by_block.items():
        yield f"accuracy-block-{block}", accuracy_against_speed(records)
    yield "tokens-in-block", tokens_in_block(plain)
    if len(by_block) > 1:
        yield "block-length", against_block_length(plain)
    for block, records in by_block.items():
        if len({r["strategy"] for r in records if _family(r) == "threshold"}) > 1:
            yield f"threshold-sweep-block-{block}", threshold_sweep(records)


def accuracy_against_speed(records: Sequence[Record]) -> Figure:
    """Score against tokens per forward with the Pareto front, a line a family, a column a cache, a row a score."""
    caches, scores = _values(records, "cache"), _scores(records)
    figure, axes = _grid(len(scores), len(caches), sharey="row", width=4.4, height=3.6)
    labels: list[Annotation] = []
    for (score, cache), ax in zip(product(scores, caches), axes, strict=True):
        for family in STRATEGIES:
            if points := _by_speed([r for r in records if r["cache"] == cache and _family(r) == family]):
                line = _family_style(family) | {"elinewidth": 0.9, "label": STRATEGIES[family].label}
                errorbar(ax, points, "tokens_per_forward", score, **line)
                labels += [_label(ax, r, score) for r in points]
        front = pareto([(r["tokens_per_forward"], r[score]) for r in records if r["cache"] == cache])
        ax.step(*zip(*front, strict=True), where="pre", color="#999999", ls="--", lw=1.2, label="Pareto front", zorder=1)
        _speed_axis(ax, records)
        if score == scores[0]:
            ax.set_title(f"cache: {cache}")
        if cache == caches[0]:
            ax.set_ylabel(_SCORES[score])
    figure.suptitle(f"{_context(records)}, blocks of {records[0]['block_length']}; bars: 95 % intervals")
    legend(figure, axes[0])
    _place(figure, labels)
    return figure


def tokens_in_block(summary: Sequence[Record]) -> Figure:
    """How parallel decoding gets as a block fills: by forward, and by slot. One strategy a family, the nearest in speed."""
    cache, blocks = summary[0]["cache"], _values(summary, "block_length")
    figure, axes = _grid(2, len(blocks), sharey="col")
    rows = (
        ("tokens_by_forward", "forward within the block", "tokens it commits"),
        ("tokens_by_position", "slot of the block", "tokens committed\ntogether with it"),
    )
    for ((key, x_label, y_label), block), ax in zip(product(rows, blocks), axes, strict=True):
        for r in _representatives([r for r in summary if r["cache"] == cache and r["block_length"] == block]):
            ax.plot(range(1, len(r[key]) + 1), r[key], ms=3, label=r["strategy"], **_family_style(_family(r)))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(x_label)
        if block == blocks[0]:
            ax.set_ylabel(y_label)
        if key == rows[0][0]:
            ax.set_title(f"blocks of {block}")
            ax.legend()
    figure.suptitle(f"{_context(summary)}, cache {cache}: how many tokens a forward commits")
    return figure


def against_block_length(summary: Sequence[Record]) -> Figure:
    """Score, tokens per forward and tokens per second against the block length, a line a cache, a row a strategy."""
    blocks, caches = _values(summary, "block_length"), _values(summary, "cache")
    chosen = [r["strategy"] for r in _representatives([r for r in summary if r["cache"] == caches[0]], slowest=True)]
    panels = {score: _SCORES[score] for score in _scores(summary)}
    panels |= {"tokens_per_forward": _SPEED, "tokens_per_second": "tokens per second"}
    figure, axes = _grid(len(chosen), len(panels), sharey="col", height=2.1)
    for (strategy, key), ax in zip(product(chosen, panels), axes, strict=True):
        for i, cache in enumerate(caches):
            points = [r for r in summary if (r["cache"], r["strategy"]) == (cache, strategy) and r[key] is not None]
            points.sort(key=lambda r: int(r["block_length"]))
            # Side by side, so that bars of equal values can be told apart.
            x = [r["block_length"] * (1 + 0.03 * (i - (len(caches) - 1) / 2)) for r in points]
            ax.errorbar(x, [r[key] for r in points], yerr=_bars(points, key), label=cache, **style(i))
        ax.set_xscale("log", base=2)
        ax.set_xticks(blocks, [str(block) for block in blocks])
        ax.minorticks_off()
        if strategy == chosen[0]:
            ax.set_title(panels[key])
        if strategy == chosen[-1]:
            ax.set_xlabel("block length")
        if key == next(iter(panels)):
            ax.set_ylabel(strategy)
    for key, ax in zip(panels, axes, strict=False):  # Once all rows are drawn, since they share the axis.
        if key.startswith("tokens"):
            ax.set_ylim(bottom=0)
    figure.suptitle(f"{_context(summary)}; bars: 95 % intervals")
    legend(figure, axes[0])
    return figure


def threshold_sweep(records: Sequence[Record]) -> Figure:
    """What a threshold t gains and costs, a column a cache: score and tokens per forward on two axes."""
    caches, score_line, speed_color = _values(records, "cache"), _family_style("threshold"), "#D55E00"
    figure, axes = _grid(1, len(caches), sharey=True, width=4.0, height=3.0)
    for cache, ax in zip(caches, axes, strict=True):
        sweep = [
            r | {"t": float(r["strategy"].split(":")[1])} for r in records if r["cache"] == cache and _family(r) == "threshold"
        ]
        sweep.sort(key=lambda r: float(r["t"]))
        errorbar(ax, sweep, "t", "exact_match", **score_line)
        ax.set_title(f"cache: {cache}")
        ax.set_xlabel("threshold t")
        ax.tick_params(axis="y", colors=score_line["color"])
        speed = ax.twinx()
        speed.plot([r["t"] for r in sweep], [r["tokens_per_forward"] for r in sweep], color=speed_color, marker="^", ls=":")
        speed.set_ylim(bottom=0)
        speed.grid(False)
        speed.spines["right"].set_visible(True)
        speed.tick_params(axis="y", colors=speed_color)
    axes[0].set_ylabel("exact match", color=score_line["color"])
    speed.set_ylabel(_SPEED, color=speed_color)
    figure.suptitle(f"{_context(records)}, blocks of {records[0]['block_length']}; bars: 95 % intervals")
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, in the order of the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def style(number: int) -> dict[str, Any]:
    """Colour and marker of the line of that number."""
    return {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}


def legend(figure: Figure, ax: Axes) -> None:
    """A legend below the panels, of what one of them shows."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))


def _grid(
    rows: int, columns: int, *, sharey: bool | Literal["row", "col"], width: float = 3.1, height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 0.8), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten())


def _bars(records: Sequence[Record], key: str) -> list[list[float]] | None:
    """How far the intervals of a value reach below and above it; None where it has none."""
    if not records or f"{key}_ci" not in records[0]:
        return None
    intervals = [(r[key], *r[f"{key}_ci"]) for r in records]
    return [[max(0.0, value - low) for value, low, _ in intervals], [max(0.0, high - value) for value, _, high in intervals]]


def errorbar(ax: Axes, records: Sequence[Record], x: str, y: str, **line: Any) -> None:
    """Records as points with the intervals that they have, by the names of both values."""
    ax.errorbar([r[x] for r in records], [r[y] for r in records], xerr=_bars(records, x), yerr=_bars(records, y), **line)


def _label(ax: Axes, record: Record, score: str) -> Annotation:
    """The name of a point, such as "threshold 0.9", to be placed by :func:`_place`."""
    color = _family_style(_family(record))["color"]
    return ax.annotate(
        record["strategy"].replace(":", " "),
        (record["tokens_per_forward"], record[score]),
        (0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=7,
        color=color,
        zorder=5,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
    )


def _place(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Moves each label to the place nearest its point where it covers no other label and no point of its panel."""
    for label in labels:
        label.set_in_layout(False)
    figure.draw_without_rendering()  # Where the points are is known once the panels have their sizes.
    covered: dict[Any, list[Bbox]] = defaultdict(list)
    for label in labels:
        x, y = label.axes.transData.transform(label.xy)  # type: ignore[union-attr]
        covered[label.axes].append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
    angles = np.arange(16) * np.pi / 8  # the first one up
    for label in labels:
        for distance, angle in product((10, 14, 20, 28, 38, 50, 64, 80), angles):
            label.set_position((2 * distance * np.sin(angle), distance * np.cos(angle)))
            box = Text.get_window_extent(label)  # without the line to the point
            if box.count_overlaps(covered[label.axes]) == 0:
                break
        covered[label.axes].append(box)


def _speed_axis(ax: Axes, records: Sequence[Record]) -> None:
    """Tokens per forward on a logarithmic axis with plain numbers."""
    values = [r["tokens_per_forward"] for r in records]
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(values) / 1.2, max(values) * 1.35)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(_SPEED)


def _representatives(records: Sequence[Record], *, slowest: bool = False) -> list[Record]:
    """One record a family, the nearest in speed to threshold 0.9 or else the slowest one; and the slowest of all if asked for."""
    by_speed = _by_speed(records)
    middle = [r for r in by_speed if _family(r) == "threshold"] or by_speed
    target = next((r for r in middle if r["strategy"] == "threshold:0.9"), middle[0])["tokens_per_forward"]
    chosen = by_speed[:1] if slowest else []
    for family in STRATEGIES:
        if members := [r for r in by_speed if _family(r) == family]:
            chosen.append(min(members, key=lambda r: abs(float(r["tokens_per_forward"]) - target)))
    return list({r["strategy"]: r for r in chosen}.values())


def _by_speed(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda r: float(r["tokens_per_forward"]))


def _context(records: Sequence[Record]) -> str:
    return f"{records[0]['n']} requests, {records[0]['gen_length']} tokens"


def _family_style(family: str) -> dict[str, Any]:
    """Colour and marker of a strategy, by its place in the registry."""
    return style(list(STRATEGIES).index(family))


def _family(record: Record) -> str:
    return str(record["strategy"]).partition(":")[0]


def _scores(records: Sequence[Record]) -> list[str]:
    return [name for name in _SCORES if records[0].get(name) is not None]


def _values(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))
