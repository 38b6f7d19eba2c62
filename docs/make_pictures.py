"""Draws the pictures of choosing.md, from runs of the built-in model, and of architecture.md:
``python docs/make_pictures.py [FOLDER]``.

Every mark of a run is something that a forward reported (:class:`fastdllm_triton.Forward`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import fastdllm_triton as fdt
from fastdllm_triton.engine.outputs import Committed
from fastdllm_triton.tiny.problems import problems, score

#: Test problems of the built-in task with this seed; the first of PROBLEMS is the one that is drawn alone.
SEED, PROBLEMS = 1, (3, 7, 18, 29)
GEN_LENGTH, BLOCK_LENGTH = 48, 16

#: What stands for tokens without a sign of their own; no sign for them survives being turned by a right angle.
SIGNS = SPACE, END = "space", "end"

REFRESH, STEP, KEPT, TOKEN, WRONG, INK, PALE = "#2f6fde", "#8fb5f2", "#ececec", "#e8590c", "#d6336c", "#222222", "#777777"


@dataclass(frozen=True)
class Seen:
    """What one forward reported: whether it was a refresh, its rows, their blocks and windows, and what it committed."""

    refresh: bool
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    committed: list[Committed]


@dataclass(frozen=True)
class Run:
    """A generation and its forwards."""

    forwards: list[Seen]
    output: fdt.GenerationOutput

    @property
    def slots(self) -> int:
        """Slots that all forwards recomputed together."""
        return sum(last - first for seen in self.forwards for first, last in seen.windows)


def record(model: fdt.MaskedDiffusionLM, count: int = 1, **options: Any) -> Run:
    """Decodes the first ``count`` of :data:`PROBLEMS` as a batch."""
    stream = model.stream([problem.prompt for problem in chosen()[:count]], **{"gen_length": GEN_LENGTH, **options})
    forwards = [Seen(f.refresh, f.rows, f.blocks, f.windows, f.committed) for f in stream]
    return Run(forwards, stream.output())


def chosen() -> list[Any]:
    first = list(islice(problems(SEED, test=True), max(PROBLEMS) + 1))
    return [first[i] for i in PROBLEMS]


def draw_windows(runs: dict[str, Run]) -> Figure:
    """One panel per run, one line per forward: the slots that it recomputed, and those that it committed."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.5), sharey=True, layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        slots = run.output.sequences.shape[1]
        prompt = slots - GEN_LENGTH
        for y, seen in enumerate(run.forwards):
            ((first, last),) = seen.windows
            axis.add_patch(Rectangle((0, y), slots, 0.86, color=KEPT, lw=0))
            axis.add_patch(Rectangle((first, y), last - first, 0.86, color=REFRESH if seen.refresh else STEP, lw=0))
            for token in seen.committed:
                axis.add_patch(Rectangle((prompt + token.position + 0.1, y + 0.13), 0.8, 0.6, color=TOKEN, lw=0))
        _blocks(axis, prompt, slots, len(run.forwards))
        axis.set_title(name, fontsize=11, fontweight="bold", color=INK, pad=22)
        axis.set_xlabel(f"{len(run.forwards)} forwards, {run.slots:,} slots recomputed", color=INK)
        axis.set_yticks([y + 0.43 for y in range(len(run.forwards))], [str(y + 1) for y in range(len(run.forwards))])
    axes[0].set_ylabel("forward", color=INK)
    kinds = {"refresh: recomputed": REFRESH, "step: recomputed": STEP, "not computed": KEPT, "committed": TOKEN}
    _legend(figure, kinds)
    return figure


def draw_strategies(model: fdt.MaskedDiffusionLM, runs: dict[str, Run]) -> Figure:
    """One panel per run: which forward committed each token, and with what confidence."""
    tallest = max(len(run.forwards) for run in runs.values())
    figure, axes = plt.subplots(len(runs), 1, figsize=(10.5, 10.4), layout="constrained",
                                height_ratios=[len(run.forwards) + 6 for run in runs.values()])  # fmt: skip
    shades = mpl.colormaps["viridis_r"]
    problem = chosen()[0]
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        output = run.output
        right, sound = score(problem, output.texts[0])
        for y in range(len(run.forwards)):
            axis.add_patch(Rectangle((0, y), GEN_LENGTH, 0.9, color="#f5f5f5", lw=0))
        for y, seen in enumerate(run.forwards):
            for token in seen.committed:
                axis.add_patch(Rectangle((token.position + 0.04, y), 0.92, 0.9, color=shades(token.confidence), lw=0))
        words = [_word(model, token) for token in output.generated[0].tolist()]
        axis.set_xticks([i + 0.5 for i in range(GEN_LENGTH)], words, rotation=90, fontsize=11, family="monospace")
        axis.set_xlim(0, GEN_LENGTH)
        axis.set_ylim(len(run.forwards), 0)
        step = 1 if len(run.forwards) < tallest else 8
        ticks = range(0, len(run.forwards), step)
        axis.set_yticks([y + 0.45 for y in ticks], [str(y + 1) for y in ticks], fontsize=9)
        for start in range(BLOCK_LENGTH, GEN_LENGTH, BLOCK_LENGTH):
            axis.axvline(start, color=INK, lw=0.8)
        verdict = "every step is right" if sound else "the last number is right, a step is not" if right else "wrong"
        axis.set_title(
            f"{name}: {len(run.forwards)} forwards, {output.tokens_per_forward:.1f} tokens each; {verdict}",
            fontsize=11, color=INK if sound else WRONG, loc="left",
        )  # fmt: skip
        axis.set_ylabel("forward", color=INK)
        _bare(axis)
        for label in axis.get_xticklabels():
            label.set_color(PALE if label.get_text() in SIGNS else INK)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), shades)
    label = "the model's probability of the token when it was committed"
    figure.colorbar(scale, ax=axes, location="bottom", shrink=0.5, aspect=40, label=label)
    return figure


def draw_batch(runs: dict[str, Run]) -> Figure:
    """One panel per run: a line per row of the batch, a column per forward, and the block at which the row was."""
    figure, axes = plt.subplots(len(runs), 1, figsize=(9.5, 4.4), sharex=True, layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        for x, seen in enumerate(run.forwards):
            for row, block in sorted(zip(seen.rows, seen.blocks, strict=True)):
                axis.add_patch(Rectangle((x + 0.04, row + 0.06), 0.92, 0.86, color=REFRESH if seen.refresh else STEP, lw=0))
                axis.text(x + 0.5, row + 0.5, str(block + 1), ha="center", va="center", fontsize=9,
                          color="white" if seen.refresh else INK)  # fmt: skip
        refreshed = sum(len(seen.rows) for seen in run.forwards if seen.refresh)
        output = run.output
        axis.set_title(
            f"{name}: {output.steps} steps, {output.refreshes} refreshes of {refreshed} rows together",
            fontsize=11, color=INK, loc="left",
        )  # fmt: skip
        rows = len(output.sequences)
        axis.set_yticks([row + 0.5 for row in range(rows)], [f"row {row}" for row in range(rows)])
        axis.set_ylim(rows, 0)
        _bare(axis)
    width = max(len(run.forwards) for run in runs.values())
    axes[-1].set_xlim(0, width)
    axes[-1].set_xticks([x + 0.5 for x in range(width)], [str(x + 1) for x in range(width)])
    axes[-1].set_xlabel("forward", color=INK)
    _legend(figure, {"refresh, with the number of the block": REFRESH, "step": STEP})
    return figure


def draw_architecture() -> Figure:
    """The way of a request: a box a class with its file, an arrow where one calls the next."""
    boxes = [
        ("generate, stream", "model.py", 0.0, 3.0),
        ("Engine.step", "engine/engine.py", 5.2, 3.0),
        ("Scheduler", "engine/scheduler.py", 10.4, 4.2),
        ("CachePolicy → Window", "decoding/cache_policy.py", 15.6, 4.2),
        ("ModelRunner", "engine/runner.py", 10.4, 1.8),
        ("Transformer", "models/transformer.py", 15.6, 1.8),
        ("Ops", "ops/", 20.8, 1.8),
        ("kernels", "kernels/", 26.0, 2.6),
        ("reference", "reference/", 26.0, 1.0),
        ("KVCache, records", "buffers on the device", 10.4, 0.0),
    ]
    arrows = [
        (0, 1, ""), (1, 2, "schedule"), (2, 3, "asks"), (1, 4, "run, read"), (4, 5, "forward"),
        (5, 6, ""), (6, 7, ""), (6, 8, ""), (4, 9, ""),
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(12, 2.8), layout="constrained")
    width, height = 4.0, 1.0
    for name, place, x, y in boxes:
        axis.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=REFRESH, lw=1.4))
        axis.text(x + width / 2, y + 0.62, name, ha="center", va="center", fontsize=9, color=INK)
        axis.text(x + width / 2, y + 0.28, place, ha="center", va="center", fontsize=7.2, color=PALE, family="monospace")
    for start, end, label in arrows:
        (_, _, x, y), (_, _, to_x, to_y) = boxes[start], boxes[end]
        below = to_x == x
        tail = (x + width / 2, y) if below else (x + width, y + height / 2)
        head = (to_x + width / 2, to_y + height) if below else (to_x, to_y + height / 2)
        axis.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.1})
        if label:  # above an arrow that goes up or ahead, below one that goes down
            side = -0.32 if head[1] < tail[1] else 0.22
            middle = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2 + side
            axis.text(*middle, label, ha="right" if head[1] != tail[1] else "center", va="center", fontsize=7.5, color=INK)
    axis.set_xlim(-0.2, 30.2)
    axis.set_ylim(-0.2, 5.4)
    axis.set_axis_off()
    return figure


def draw_all(folder: Path) -> list[Path]:
    """Writes every picture of choosing.md and architecture.md to a folder."""
    model = fdt.load("tiny", device="cpu")
    one: dict[str, Any] = {"block_length": BLOCK_LENGTH}
    pictures = {
        "architecture": draw_architecture(),
        "choosing-caches": draw_windows({cache: record(model, **one, cache=cache) for cache in ("none", "prefix", "dual")}),
        "choosing-windows": draw_windows(
            {
                "suffix_window=8": record(model, **one, suffix_window=8),
                "look_back=8, look_ahead=8": record(model, **one, look_back=8, look_ahead=8),
                "prompt_refresh=3": record(model, **one, prompt_refresh=3),
            }
        ),
        "choosing-strategies": draw_strategies(
            model,
            {
                "FixedSteps(48)": record(model, **one, strategy=fdt.FixedSteps(48)),
                "FixedSteps(12)": record(model, **one, strategy=fdt.FixedSteps(12)),
                "Threshold(0.9)": record(model, **one, strategy=fdt.Threshold(0.9)),
            },
        ),
        "choosing-batch": draw_batch(
            {
                "each row at its own block": record(model, len(PROBLEMS), block_length=8),
                "lockstep=True": record(model, len(PROBLEMS), block_length=8, lockstep=True),
            }
        ),
    }
    paths = []
    # The same run gives the same file: no date, no random names.
    with mpl.rc_context({"svg.hashsalt": "fastdllm-triton"}):
        for name, figure in pictures.items():
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, facecolor="white")
            plt.close(figure)
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
            paths.append(path)
    return paths


def _blocks(axis: Axes, prompt: int, slots: int, height: int) -> None:
    """Limits, and the names of the parts above."""
    edges = [0, *range(prompt, slots + 1, BLOCK_LENGTH)]
    names = ["prompt", *(f"block {i + 1}" for i in range(len(edges) - 2))]
    for first, last, name in zip(edges[:-1], edges[1:], names, strict=True):
        axis.text((first + last) / 2, -0.35, name, ha="center", fontsize=10, color=PALE)
        axis.axvline(first, color="white", lw=1.2)
    axis.set_xlim(0, slots)
    axis.set_ylim(height, 0)
    axis.set_xticks([])
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, colors=INK)


def _legend(figure: Figure, kinds: dict[str, str]) -> None:
    handles = [Patch(color=color, label=name) for name, color in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)


def _word(model: fdt.MaskedDiffusionLM, token: int) -> str:
    tokenizer: Any = model.tokenizer
    return END if token in model.config.eos_ids else tokenizer.decode([token]).strip() or SPACE


if __name__ == "__main__":
    for written in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(written)
