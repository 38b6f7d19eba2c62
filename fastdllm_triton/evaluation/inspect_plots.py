"""The figures of ``fastdllm-triton inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plots import errorbar, legend, style
from .summary import Record

_KINDS = {"k": "keys", "v": "values"}
_REGION_NAMES = {"prompt": "prompt", "before": "blocks before", "block": "the block", "after": "masks after"}


def figures(report: Record) -> Iterator[tuple[str, Figure]]:
    """Every figure that a report has the data for, by name."""
    caches = report["caches"]
    yield "agreement", agreement(caches)
    drifting = [record for record in caches if "drift" in record]
    if drifting:
        yield "drift-by-layer", drift_by_layer(drifting)
        yield "drift-by-region", drift_by_region(drifting)
    if "similarity" in report:
        yield "similarity", similarity(report["similarity"])


def agreement(caches: Sequence[Record]) -> Figure:
    """How long answers stay those of exact decoding, and how many tokens agree in the end."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1.2])
    for i, record in enumerate(caches):
        color = style(i)["color"]
        left.step(range(len(record["same_up_to"])), record["same_up_to"], where="post", color=color, label=record["cache"])
        errorbar(right, [record | {"y": i - 0.15}], "same", "y", mfc="white", **style(i))
        errorbar(right, [record | {"y": i + 0.15}], "token_agreement", "y", **style(i))
    left.set_xlabel("slots generated")
    left.set_ylabel("share of answers still the same")
    left.set_ylim(0, 1.03)
    left.legend(fontsize=8)
    right.set_yticks(range(len(caches)), [record["cache"] for record in caches], fontsize=8)
    right.set_ylim(len(caches) - 0.5, -0.5)
    right.set_xlabel("hollow: answers that are the same\nfilled: tokens that agree")
    right.set_xlim(right=1.02)
    figure.suptitle(f"against decoding without a cache, {caches[0]['n']} prompts; bars: 95 % intervals")
    return figure


def drift_by_layer(caches: Sequence[Record]) -> Figure:
    """Mean cosine similarity of the cache with fresh keys and values: forwards since the refresh by layer."""
    maps = {f"{record['cache']}: {name}": np.array(_common(record, kind)).T for kind, name in _KINDS.items() for record in caches}
    figure = Figure(figsize=(2.6 * len(caches) + 1.6, 5.2), layout="constrained")
    _heat_maps(figure, maps, "forwards since the refresh", "layer", least=0.9999, aspect="auto")
    figure.suptitle("how stale the cache is, over all attended slots")
    return figure


def drift_by_region(caches: Sequence[Record]) -> Figure:
    """Mean over layers of one less the cosine similarity, a line a cache, a column a part of the sequence."""
    regions = [name for name in _REGION_NAMES if any(name in record["drift"]["regions"] for record in caches)]
    figure = Figure(figsize=(2.7 * len(regions) + 0.8, 4.8), layout="constrained")
    grid = figure.subplots(2, len(regions), sharex=True, sharey="row", squeeze=False)
    for axes, (kind, name) in zip(grid, _KINDS.items(), strict=True):
        for ax, region in zip(axes, regions, strict=True):
            for i, record in enumerate(caches):
                layers = record["drift"]["regions"].get(region, {kind: []})[kind][: len(_common(record, kind))]
                # None where the cache held no such slot.
                gaps = [np.nan if None in row else 1 - np.mean(row) for row in layers]
                ax.plot(range(len(gaps)), gaps, label=record["cache"], ms=3, **style(i))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if kind == "k":
                ax.set_title(_REGION_NAMES[region])
            else:
                ax.set_xlabel("forwards since the refresh")
        axes[0].set_ylabel(f"1 - cosine similarity,\n{name}")
    legend(figure, grid[0, 0])
    figure.suptitle("how stale the cache is, by part of the sequence (mean over layers)")
    return figure


def similarity(record: Record) -> Figure:
    """The paper's figure 3: forward against forward within a block, for the prompt and for the last block."""
    parts = {"prompt": "prompt", "last": "last block"}
    maps = {f"{name}, {where}": np.array(record[part][kind]) for kind, name in _KINDS.items() for part, where in parts.items()}
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    _heat_maps(figure, maps, "forward", "forward", least=1.0)
    figure.suptitle(f"keys and values of one forward against another, block {record['block'] + 1}, one token a forward")
    return figure


def _heat_maps(figure: Figure, maps: dict[str, np.ndarray], x_label: str, y_label: str, least: float, **options: Any) -> None:
    """Two rows of cosine similarities by title, on one scale that begins at ``least`` or below."""
    grid = figure.subplots(2, len(maps) // 2, sharey=True, squeeze=False)
    low = min(least, *(values.min() for values in maps.values()))
    for ax, (title, values) in zip(grid.flat, maps.items(), strict=True):
        image = ax.imshow(values, vmin=low, vmax=1, origin="lower", cmap="viridis", interpolation="nearest", **options)
        ax.grid(False)
        ax.set_title(title, fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in grid[:, 0]:
        ax.set_ylabel(y_label)
    for ax in grid[-1]:
        ax.set_xlabel(x_label)
    figure.colorbar(image, ax=grid, label="cosine similarity", shrink=0.8)


def _common(record: Record, kind: str) -> list[list[float]]:
    """The means up to the last forward that followed at least one refresh in twenty; further on they are noise."""
    counts = record["drift"]["forwards"]
    last = max(i for i, count in enumerate(counts) if 20 * count >= counts[0])
    rows: list[list[float]] = record["drift"][kind][: last + 1]
    return rows
