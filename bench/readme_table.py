"""Writes the README's table of measured results from ``bench/results/<gpu>/<date>-<commit>/``, between two markers.

python bench/readme_table.py [--check]

Of each GPU the newest run counts, and of it what was verified there; and the newest run of ``fastdllm-triton bench cpu``. With
``--check`` nothing is written, and the status says whether the README is up to date.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._session import Row, Shape, label
from fastdllm_triton.bench.bench_cpu import BENCH, BLOCK, FORWARDS, GENERATED, NAMES, PROMPT, TURNS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (bench/readme_table.py) -->", "<!-- results: end -->"
NOTHING = "No results of a GPU are committed yet, so no speed is claimed."


def results_table(results: Path, root: Path = ROOT) -> str:
    """What was verified in the newest timed run of each GPU."""
    sections = []
    for gpu in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = [(Report.load(path), path) for path in gpu.iterdir() if (path / "machine.json").is_file()]
        if timed := [run for run in runs if run[0].ceilings is not None]:
            report, path = max(timed, key=lambda run: run[0].machine["date"])
            report.rows = [row for row in report.rows if not row.get("unverified")]
            sections.append("\n".join(summary(report, f"[all numbers]({path.relative_to(root)}), ")))
    sections = sections or [NOTHING]
    runs = [(Report.load(path), path) for path in (results / "cpu").glob("*/") if (path / f"{BENCH.op}.json").is_file()]
    if runs:
        report, path = max(runs, key=lambda run: run[0].machine["date"])
        sections.append("\n".join(cpu_summary(report, f"[all numbers]({path.relative_to(root)}), ")))
    return "\n\n".join(sections)


def cpu_summary(report: Report, link: str = "") -> list[str]:
    """The machine of a run on a CPU, the times of the official code over ours, memory and the share of products."""
    rows = [row for row in report.rows if row["bench"] == BENCH.op and not row.get("unverified")]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(label(row["shape"]), {})[row["provider"]] = row
    threads, batches = (sorted({row["shape"][name] for row in rows}) for name in ("threads", "batch"))
    columns = list(product(threads, batches))
    heads = [f"{count} thread{'s' * (count > 1)}, batch {batch}" for count, batch in columns]
    kinds = dict.fromkeys(tuple(row["shape"][name] for name in ("model", "dtype", "cache")) for row in rows)
    both = [pair for pair in cases.values() if all("median_ms" in pair.get(side, {}) for side in ("cpu", "official"))]
    memory = [
        pair["cpu"]["peak_bytes"] / pair["official"]["peak_bytes"] for pair in both if pair["official"]["peak_bytes"] is not None
    ]
    timed = [pair["cpu"] for pair in cases.values() if "median_ms" in pair.get("cpu", {})]
    shares = [100 * (row["products"] + row["attention"]) for row in timed]
    machine = report.machine

    def cell(shape: Shape) -> str:
        official = cases.get(label(shape), {}).get("official", {})
        return "raises" if "missing" in official else f"{official['times_triton']:.2f}" if "median_ms" in official else "-"

    return [
        f"**{machine['device']}**, no GPU: time of the official code, re-created, over ours. Random models of the formats of "
        f"LLaDA (134M parameters) and Dream (139M), not LLaDA-8B or Dream-7B: {PROMPT} tokens of prompt, {GENERATED} generated "
        f"in blocks of {BLOCK}, {FORWARDS} forwards a block on both sides. Medians of {TURNS} runs in turns, CPU time in one "
        f"thread and wall time in several ({link}{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:10]}, torch "
        f"{machine['torch']}). 'raises': the official code cannot.",
        "",
        f"| model, dtype, cache | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
        *(
            f"| {', '.join(kind)} | "
            + " | ".join(
                cell(dict(zip(NAMES, (count, kind[1], kind[0], kind[2], batch), strict=True))) for count, batch in columns
            )
            + " |"
            for kind in kinds
        ),
        "",
        f"Our peak memory above the weights over the official one: {_range(memory, '{:.2f}')}. "
        f"% of our time in matrix products and attention: {_range(shares, '{:.0f}')}. Median (least to most) of all cases.",
    ]


def summary(report: Report, link: str = "") -> list[str]:
    """The machine of a report that was timed, and a line for each op."""
    machine, ceilings = report.machine, report.ceilings
    assert ceilings is not None
    return [
        f"**{machine['device']}**: copy {ceilings.copy / 1e9:,.0f} GB/s, matrix {ceilings.matrix / 1e12:,.0f} TFLOP/s, "
        f"as measured in the same run ({link}{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:10]}, "
        f"torch {machine['torch']}, triton {machine['triton']})",
        "",
        "| op | shapes | % of the floor: median (least to most) | time of the best baseline over ours: the same |",
        "|---|---|---|---|",
        *(line for op in dict.fromkeys(row["op"] for row in report.rows) if (line := _line(op, report.rows))),
    ]


def _line(op: str, rows: Sequence[Row]) -> str | None:
    """How many shapes of an op were timed, their shares of the floor, and the best baselines' times over ours."""
    ours = [row for row in rows if row["op"] == op and row["provider"] == "triton" and "median_ms" in row]
    floors = [100 * row["of_floor"] for row in ours if "of_floor" in row]
    ratios = [ratio for row in ours if (ratio := fastest_other(rows, row))]
    unverified = sum(bool(row.get("unverified")) for row in ours)
    count = f"{len(ours)} ({unverified} UNVERIFIED)" if unverified else len(ours)
    return f"| `{op}` | {count} | {_range(floors, '{:.0f}')} | {_range(ratios, '{:.2f}')} |" if ours else None


def fastest_other(rows: Sequence[Row], ours: Row) -> float | None:
    """Time of the fastest baseline over ours; other forms of our own kernel do not count."""
    times = [
        row["median_ms"]
        for row in rows
        if (row["op"], label(row["shape"])) == (ours["op"], label(ours["shape"]))
        and not row["provider"].startswith("triton")
        and "median_ms" in row
    ]
    return min(times) / ours["median_ms"] if times else None


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def rewritten(text: str, results: str) -> str:
    """The README with the table in its place.

    Raises:
        ValueError: it has no such place.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README needs the markers {BEGIN} and {END}, once each, in this order")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + results + "\n" + text[text.index(END) :]


def main(arguments: Sequence[str]) -> int:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewritten(before, results_table(ROOT / "bench" / "results"))
    if "--check" in arguments:
        if before != after:
            print("README.md: the table of results is not what bench/readme_table.py writes")
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
