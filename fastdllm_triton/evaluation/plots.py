"""The figures of an evaluation, drawn from its summary alone, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..decoding.strategies import STRATEGIES
from ..utils.files import write_atomically
from .summary import Record

#: Colours that the colour-blind can tell apart (Okabe and Ito), and markers for who prints in grey.
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "so^Dv<>P"
CACHE_COLORS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#0072B2", "#F0E442")
MARKERS = "os^Dv<>P"
_SCORES = {"exact_match": "exact match", "whole": "whole text right"}

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
    "svg.hashsalt": "fastdllm-triton",  # The same figure is the same file.
    "svg.fonttype": "none",
}


def draw_all(summary: Sequence[Record], comparison: Sequence[Record], caches: Sequence[Record], folder: Path) -> list[Path]:
    """Draws every figure that the grid has the data for.

    Args:
        summary: from :func:`~fastdllm_triton.evaluation.summary.summarize`.
        comparison: from :func:`~fastdllm_triton.evaluation.summary.compare`.
        caches: from :func:`~fastdllm_triton.evaluation.summary.compare_caches`.
        folder: where to.

    Returns:
        The files written, PNG ones only; an SVG lies beside each.
    """
    return save(_figures(summary, comparison, caches), folder)


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


def _figures(summary: Sequence[Record], comparison: Sequence[Record], caches: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    blocks = _values(summary, "block_length")
    # Caches with options have a figure of their own.
    plain = [r for r in summary if "+" not in r["cache"]] or list(summary)
    for block in blocks:
        yield f"accuracy-block-{block}", accuracy_against_speed([r for r in plain if r["block_length"] == block])
    yield "tokens-in-block", tokens_in_block(plain)
    if len(blocks) > 1:
        yield "block-length", against_block_length(plain)
    for block in blocks:
        records = [r for r in plain if r["block_length"] == block]
        if len({r["strategy"] for r in records if _family(r) == "threshold"}) > 1:
            yield f"threshold-sweep-block-{block}", threshold_sweep(records)
    if comparison and (against := [r for r in comparison if "+" not in r["cache"]] or comparison):
        yield "gain-over-fixed", gain_over_fixed(against)
    for block in blocks:
        if records := [r for r in caches if r["block_length"] == block]:
            yield f"caches-block-{block}", caches_with_options(records)


def accuracy_against_speed(records: Sequence[Record]) -> Figure:
    """Score against tokens per forward, a line a family, a column a cache, a row a score; bars are 95 % intervals."""
    caches, scores = _values(records, "cache"), _scores(records)
    figure, axes = _grid(len(scores), len(caches), sharey="row", width=4.4, height=3.6)
    labels: list[Annotation] = []
    for (score, cache), ax in zip([(s, c) for s in scores for c in caches], axes, strict=True):
        for family in STRATEGIES:
            points = sorted(
                (r for r in records if r["cache"] == cache and _family(r) == family), key=lambda r: float(r["tokens_per_forward"])
            )
            if points:
                _line_with_bars(ax, points, score, family)
                labels += [_label(ax, r, score) for r in points]
        _speed_axis(ax, [r["tokens_per_forward"] for r in records])
        if score == scores[0]:
            ax.set_title(f"cache: {cache}")
        if score == scores[-1]:
            ax.set_xlabel("tokens per forward")
        if cache == caches[0]:
            ax.set_ylabel(_SCORES.get(score, score))
    figure.suptitle(f"{_context(records)}, blocks of {records[0]['block_length']}; bars: 95 % intervals")
    _legend(figure, axes[0])
    _place(figure, labels)
    return figure


def tokens_in_block(summary: Sequence[Record]) -> Figure:
    """How parallel decoding gets as a block fills: by forward, and by slot. One strategy a family, the nearest in speed."""
    cache = summary[0]["cache"]
    blocks = _values(summary, "block_length")
    figure, axes = _grid(2, len(blocks), sharey="col")
    for row, (key, label) in enumerate(
        (("tokens_by_forward", "forward within the block"), ("tokens_by_position", "slot of the block"))
    ):
        for column, block in enumerate(blocks):
            ax = axes[row * len(blocks) + column]
            for r in _representatives([r for r in summary if r["cache"] == cache and r["block_length"] == block]):
                values, family = r[key], _family(r)
                ax.plot(range(1, len(values) + 1), values, ms=3, label=r["strategy"], **_style(family))
            ax.set_ylim(bottom=0)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlabel(label)
            if column == 0:
                ax.set_ylabel("tokens it commits" if row == 0 else "tokens committed\ntogether with it")
            if row == 0:
                ax.set_title(f"blocks of {block}")
                ax.legend()
    figure.suptitle(f"{_context(summary)}, cache {cache}: how many tokens a forward commits")
    return figure


def against_block_length(summary: Sequence[Record]) -> Figure:
    """Score, tokens per forward and tokens per second against the block length, a line a cache, a row a strategy."""
    blocks = _values(summary, "block_length")
    caches = _values(summary, "cache")
    chosen = [r["strategy"] for r in _representatives([r for r in summary if r["cache"] == caches[0]], slowest=True)]
    panels = [*((score, _SCORES.get(score, score)) for score in _scores(summary))]
    panels += [("tokens_per_forward", "tokens per forward"), ("tokens_per_second", "tokens per second")]
    figure, axes = _grid(len(chosen), len(panels), sharey="col", height=2.1)
    for i, (strategy, (key, label)) in enumerate([(s, p) for s in chosen for p in panels]):
        ax = axes[i]
        for number, cache in enumerate(caches):
            points = sorted(
                (r for r in summary if r["cache"] == cache and r["strategy"] == strategy and r[key] is not None),
                key=lambda r: int(r["block_length"]),
            )
            color = CACHE_COLORS[number % len(CACHE_COLORS)]
            # Side by side, so that bars of equal values can be told apart.
            x = [r["block_length"] * (1 + 0.03 * (number - (len(caches) - 1) / 2)) for r in points]
            ci = f"{key}_ci"
            bars = [[abs(r[key] - r[ci][side]) for r in points] for side in (0, 1)] if points and ci in points[0] else None
            ax.errorbar(
                x, [r[key] for r in points], yerr=bars, color=color, marker=MARKERS[number % len(MARKERS)], capsize=2, label=cache
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(blocks, [str(block) for block in blocks])
        ax.minorticks_off()
        if i < len(panels):
            ax.set_title(label)
        if i >= len(panels) * (len(chosen) - 1):
            ax.set_xlabel("block length")
        if i % len(panels) == 0:
            ax.set_ylabel(strategy)
    for i, (key, _) in enumerate(panels):  # Once all rows are drawn, since they share the axis.
        if key.startswith("tokens"):
            axes[i].set_ylim(bottom=0)
    figure.suptitle(f"{_context(summary)}; bars: 95 % intervals")
    _legend(figure, axes[0])
    return figure


def threshold_sweep(records: Sequence[Record]) -> Figure:
    """The sweep over thresholds among all strategies, with the Pareto front of each cache; and both axes against t."""
    caches = _values(records, "cache")
    figure, axes = _grid(2, len(caches), sharey=True, width=4.0, height=3.0)
    labels: list[Annotation] = []
    for column, cache in enumerate(caches):
        here = [r for r in records if r["cache"] == cache]
        sweep = sorted((r for r in here if _family(r) == "threshold"), key=lambda r: float(r["strategy"].split(":")[1]))
        ax = axes[column]
        for family in STRATEGIES:
            points = [r for r in here if _family(r) == family]
            if points:
                faint = 1.0 if family == "threshold" else 0.45
                x, y = [r["tokens_per_forward"] for r in points], [r["exact_match"] for r in points]
                ax.plot(x, y, ls="", alpha=faint, label=STRATEGIES[family].label, **_style(family))
        front = pareto([(r["tokens_per_forward"], r["exact_match"]) for r in here])
        ax.step(
            [x for x, _ in front],
            [y for _, y in front],
            where="pre",
            color="#999999",
            ls="--",
            lw=1.2,
            label="Pareto front",
            zorder=1,
        )
        labels += [_label(ax, r, "exact_match") for r in sweep]
        _speed_axis(ax, [r["tokens_per_forward"] for r in records])
        ax.set_title(f"cache: {cache}")
        ax.set_xlabel("tokens per forward")
        below = axes[len(caches) + column]
        t = [float(r["strategy"].split(":")[1]) for r in sweep]
        bars = [[abs(r["exact_match"] - r["exact_match_ci"][side]) for r in sweep] for side in (0, 1)]
        below.errorbar(t, [r["exact_match"] for r in sweep], yerr=bars, capsize=2, **_style("threshold"))
        below.set_xlabel("threshold t")
        speed = below.twinx()
        speed.plot(t, [r["tokens_per_forward"] for r in sweep], color="#D55E00", marker="^", ls=":")
        speed.set_ylim(bottom=0)
        speed.grid(False)
        speed.spines["right"].set_visible(True)
        speed.tick_params(axis="y", colors="#D55E00")
        below.tick_params(axis="y", colors=_style("threshold")["color"])
        if column == 0:
            ax.set_ylabel("exact match")
            below.set_ylabel("exact match", color=_style("threshold")["color"])
        if column == len(caches) - 1:
            speed.set_ylabel("tokens per forward", color="#D55E00")
    figure.suptitle(f"{_context(records)}, blocks of {records[0]['block_length']}; bars: 95 % intervals")
    _legend(figure, axes[0])
    _place(figure, labels)
    return figure


def gain_over_fixed(comparison: Sequence[Record]) -> Figure:
    """What each strategy scores above fixed steps at its own speed, with paired intervals."""
    scores = list(dict.fromkeys(r["score"] for r in comparison))
    rows = list(dict.fromkeys((r["block_length"], r["cache"], r["strategy"]) for r in comparison))
    figure = Figure(figsize=(4.2 * len(scores) + 1.6, 0.19 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for ax, score in zip(axes, scores, strict=True):
        for r in comparison:
            if r["score"] == score:
                y, family = rows.index((r["block_length"], r["cache"], r["strategy"])), _family(r)
                bars = [[r["gain"] - r["gain_ci"][0]], [r["gain_ci"][1] - r["gain"]]]
                ax.errorbar(r["gain"], y, xerr=bars, ms=4, capsize=2, **_style(family))
        ax.axvline(0, color="#000000", lw=0.8)
        ax.set_title(_SCORES.get(score, score))
        ax.set_xlabel("gain over fixed steps at equal tokens per forward")
        ax.grid(axis="y", visible=False)
    for y, (above, below) in enumerate(pairwise(rows)):
        if above[:2] != below[:2]:
            for ax in axes:
                ax.axhline(y + 0.5, color="#cccccc", lw=0.8)
    axes[0].set_yticks(range(len(rows)), [f"block {block}, {cache}, {strategy}" for block, cache, strategy in rows], fontsize=7)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"{comparison[0]['n']} requests; bars: paired 95 % intervals")
    return figure


def caches_with_options(records: Sequence[Record]) -> Figure:
    """What options of a cache change against the same cache without: accuracy, agreement, FLOPs and bytes of a request."""
    rows, strategies = _values(records, "cache"), _values(records, "strategy")
    figure = Figure(figsize=(12, 0.3 * len(rows) + 1.7), layout="constrained")
    axes = list(figure.subplots(1, 4, sharey=True))
    panels = (
        ("exact_match_gain", "exact match, difference"),
        ("same", "share of the same texts"),
        ("flops_ratio", "FLOPs a request, ratio"),
        ("bytes_ratio", "bytes a request, ratio"),
    )
    for ax, (key, label) in zip(axes, panels, strict=True):
        for r in records:
            number = strategies.index(r["strategy"])
            y = rows.index(r["cache"]) + 0.24 * (number - (len(strategies) - 1) / 2)
            ci = r.get(f"{key}_ci")
            bars = None if ci is None else [[max(0.0, r[key] - ci[0])], [max(0.0, ci[1] - r[key])]]
            named = r["strategy"] if r["cache"] == rows[0] else None
            style: Any = {"color": CACHE_COLORS[(number + 5) % 8], "marker": MARKERS[number % len(MARKERS)], "ms": 4, "ls": ""}
            ax.errorbar(r[key], y, xerr=bars, capsize=2, label=named, **style)
        ax.axvline(0 if key.endswith("gain") else 1, color="#000000", lw=0.8)
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=4)
        ax.grid(axis="y", visible=False)
    for y, (above, below) in enumerate(pairwise(rows)):
        if above.partition("+")[0] != below.partition("+")[0]:
            for ax in axes:
                ax.axhline(y + 0.5, color="#cccccc", lw=0.8)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, axes[0])
    figure.suptitle(
        f"against the same cache without options; {records[0]['n']} requests, blocks of {records[0]['block_length']}; "
        "bars: 95 % intervals"
    )
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _grid(
    rows: int, columns: int, *, sharey: bool | Literal["row", "col"], width: float = 3.1, height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 0.8), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten())


def _line_with_bars(ax: Axes, points: Sequence[Record], score: str, family: str) -> None:
    x, y = [r["tokens_per_forward"] for r in points], [r[score] for r in points]
    xerr, yerr = (
        [[abs(r[key] - r[f"{key}_ci"][side]) for r in points] for side in (0, 1)] for key in ("tokens_per_forward", score)
    )
    ax.errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=0.9, capsize=2, label=STRATEGIES[family].label, **_style(family))


def _label(ax: Axes, record: Record, score: str) -> Annotation:
    """The name of a point, such as "threshold 0.9", to be placed by :func:`_place`."""
    color, text = _style(_family(record))["color"], record["strategy"].replace(":", " ")
    return ax.annotate(
        text,
        (record["tokens_per_forward"], record[score]),
        xytext=(0, 0),
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
    """Moves each label to the place near its point where it covers the least of other labels, of points and of lines."""
    for label in labels:
        label.set_in_layout(False)
    figure.draw_without_rendering()  # Where the points are is known once the panels have their sizes.
    pixels = figure.dpi / 72
    angles = np.arange(16) * np.pi / 8
    directions = np.stack([np.sin(angles), np.cos(angles)], axis=1)  # the first one up
    distances = pixels * np.array([5, 10, 16, 24, 34, 46, 60, 80])
    taken: dict[Axes, np.ndarray] = {}
    for label in labels:
        ax = label.axes
        assert isinstance(ax, Axes)
        if ax not in taken:
            taken[ax] = _drawn(ax, pixels)
        half = np.array(label.get_window_extent().size) / 2
        offsets = (directions[None] * (distances[:, None, None] + half)).reshape(-1, 2)
        centres = ax.transData.transform(label.xy) + offsets
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        hidden = _overlaps(boxes, taken[ax]).sum(1) + 4 * half.prod() - _overlaps(boxes, np.array([ax.bbox.extents]))[:, 0]
        best = np.argmin(5 * hidden + np.hypot(*offsets.T))
        taken[ax] = np.concatenate([taken[ax], boxes[[best]]])
        label.set_position(tuple(offsets[best] / pixels))


def _drawn(ax: Axes, pixels: float) -> np.ndarray:
    """``[N, 4]``: what a panel shows, as boxes: points, and lines in short pieces."""
    centres, radii = [np.zeros((0, 2))], [np.zeros(0)]
    for line in ax.get_lines():
        points = np.asarray(line.get_transform().transform(line.get_xydata()))
        if line.get_marker() not in (None, "None"):
            centres.append(points)
            radii.append(np.full(len(points), 3.5 * pixels))
        if line.get_linestyle() not in ("", "None"):
            for start, end in pairwise(points):
                count = 1 + int(np.hypot(*(end - start)) / (3 * pixels))
                centres.append(np.linspace(start, end, count))
                radii.append(np.full(count, pixels))
    centre, radius = np.concatenate(centres), np.concatenate(radii)[:, None]
    return np.concatenate([centre - radius, centre + radius], axis=1)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas ``[M, N]`` that boxes ``[M, 4]`` and ``[N, 4]`` (left, bottom, right, top) have in common."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.asarray((high - low).clip(min=0).prod(-1))


def _speed_axis(ax: Axes, values: Sequence[float]) -> None:
    """Tokens per forward on a logarithmic axis with plain numbers."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(values) / 1.2, max(values) * 1.35)
    formatter: Callable[[float, int], str] = lambda value, _: f"{value:g}"  # noqa: E731
    ax.xaxis.set_major_formatter(FuncFormatter(formatter))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _representatives(records: Sequence[Record], *, slowest: bool = False) -> list[Record]:
    """One record a family, the nearest in speed to the middle threshold; and the slowest of all if asked for."""
    by_speed = sorted(records, key=lambda r: float(r["tokens_per_forward"]))
    middle = [r for r in by_speed if _family(r) == "threshold"] or by_speed
    target = min(middle, key=lambda r: (r["strategy"] != "threshold:0.9", middle.index(r)))["tokens_per_forward"]
    chosen = by_speed[:1] if slowest else []
    for family in STRATEGIES:
        members = [r for r in by_speed if _family(r) == family]
        if members:
            chosen.append(min(members, key=lambda r: abs(float(r["tokens_per_forward"]) - target)))
    return list({r["strategy"]: r for r in chosen}.values())


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))


def _context(records: Sequence[Record]) -> str:
    return f"{records[0]['n']} requests, {records[0]['gen_length']} tokens"


def _style(family: str) -> dict[str, Any]:
    """Colour and marker of a strategy, by its place in the registry."""
    place = list(STRATEGIES).index(family)
    return {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}


def _family(record: Record) -> str:
    return str(record["strategy"]).partition(":")[0]


def _scores(records: Sequence[Record]) -> list[str]:
    return [name for name in _SCORES if records[0].get(name) is not None]


def _values(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))
