"""The figures of ``fastdllm-triton inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plots import CACHE_COLORS, MARKERS

Record = dict[str, Any]

_KINDS = {"k": "keys", "v": "values"}
_HEAT: Any = {"origin": "lower", "cmap": "viridis", "interpolation": "nearest"}
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
        color = CACHE_COLORS[i % len(CACHE_COLORS)]
        left.step(range(len(record["same_up_to"])), record["same_up_to"], where="post", color=color, label=record["cache"])
        for y, (key, hollow) in enumerate((("same", True), ("token_agreement", False))):
            low, high = record[f"{key}_ci"]
            bars = [[record[key] - low], [high - record[key]]]
            right.errorbar(
                record[key],
                i + (0.15 if y else -0.15),
                xerr=bars,
                color=color,
                marker=MARKERS[i % len(MARKERS)],
                mfc="white" if hollow else color,
                capsize=2,
            )
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
    figure = Figure(figsize=(2.6 * len(caches) + 1.6, 5.2), layout="constrained")
    grid = figure.subplots(2, len(caches), sharey=True, squeeze=False)
    data = [[np.array(_common(record, kind)).T for record in caches] for kind in _KINDS]
    low = min(float(part.min()) for row in data for part in row)
    for axes, row, name in zip(grid, data, _KINDS.values(), strict=True):
        for ax, part, record in zip(axes, row, caches, strict=True):
            image = ax.imshow(part, aspect="auto", vmin=min(low, 0.9999), vmax=1, **_HEAT)
            ax.grid(False)
            ax.set_title(f"{record['cache']}: {name}", fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("layer")
    for ax in grid[-1]:
        ax.set_xlabel("forwards since the refresh")
    figure.colorbar(image, ax=grid, label="cosine similarity with a fresh forward", shrink=0.8)
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
                part = record["drift"]["regions"].get(region)
                values = [] if part is None else [_mean(row) for row in part[kind][: len(_common(record, kind))]]
                gaps = [np.nan if value is None else 1 - value for value in values]
                style = {"color": CACHE_COLORS[i % len(CACHE_COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 3}
                ax.plot(range(len(gaps)), gaps, label=record["cache"], **style)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if kind == "k":
                ax.set_title(_REGION_NAMES[region])
        axes[0].set_ylabel(f"1 - cosine similarity,\n{name}")
    for ax in grid[-1]:
        ax.set_xlabel("forwards since the refresh")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    figure.suptitle("how stale the cache is, by part of the sequence (mean over layers)")
    return figure


def similarity(record: Record) -> Figure:
    """The paper's figure 3: forward against forward within a block, for the prompt and for the last block."""
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True, squeeze=False)
    low = min(min(min(row) for row in record[part][kind]) for part in ("prompt", "last") for kind in _KINDS)
    for axes, (kind, name) in zip(grid, _KINDS.items(), strict=True):
        for ax, (part, where) in zip(axes, (("prompt", "prompt"), ("last", "last block")), strict=True):
            image = ax.imshow(np.array(record[part][kind]), vmin=low, vmax=1, **_HEAT)
            ax.grid(False)
            ax.set_title(f"{name}, {where}")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("forward")
    for ax in grid[-1]:
        ax.set_xlabel("forward")
    figure.colorbar(image, ax=grid, label="cosine similarity", shrink=0.8)
    figure.suptitle(f"keys and values of one forward against another, block {record['block'] + 1}, one token a forward")
    return figure


def _common(record: Record, kind: str) -> list[list[float]]:
    """Up to the last forward that at least one refresh in twenty was followed by: means further on are noise."""
    counts = record["drift"]["forwards"]
    last = max(i for i, count in enumerate(counts) if 20 * count >= counts[0])
    rows: list[list[float]] = record["drift"][kind][: last + 1]
    return rows


def _mean(row: Sequence[float | None]) -> float | None:
    values = [value for value in row if value is not None]
    return sum(values) / len(values) if values else None
