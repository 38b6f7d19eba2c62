"""The short table at the end of ``gpu_all.sh``: how each step ended, and how near each op came to the ceiling.

python bench/summary.py OUT
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from fastdllm_triton.bench._report import Report
from fastdllm_triton.bench._session import Row
from fastdllm_triton.bench.readme_table import figures


def summary(out: Path) -> list[str]:
    lines = []
    for line in (out / "status.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        lines.append(f"{name:16} {status:8} {seconds:>5} s")
    if (out / "verify.json").is_file():
        found = json.loads((out / "verify.json").read_text())
        failed = [f"{record['check']} {record['dtype']}" for record in found["records"] if not record["ok"]]
        lines.append(f"verified: {len(found['records'])} checks, " + (f"NOT: {', '.join(failed)}" if failed else "all held"))
    folder = out / (out / "folder").read_text().strip()
    if (folder / "machine.json").is_file():
        report = Report.load(folder)
        lines.append(report.machine["device"])
        if report.ceilings is not None:
            lines.append(f"copy {report.ceilings.copy / 1e9:.0f} GB/s, matrix {report.ceilings.matrix / 1e12:.0f} TFLOP/s")
        lines += _ops(report.rows)
        lines.append(f"results: {folder}")
    return lines


def _ops(rows: list[Row]) -> list[str]:
    """A line an op: fraction of the floor, and how many times faster than the fastest baseline, median and extremes."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        ours, floors, ratios = figures(op, rows)
        line = f"{op:18} {len(ours):3} shapes" if ours else f"{op:18} not timed"
        if doubted := sum(bool(row.get("unverified")) for row in ours):
            line += f" ({doubted} UNVERIFIED)"
        if floors:
            line += f", of the floor {min(floors):3.0f}% .. {statistics.median(floors):3.0f}% .. {max(floors):3.0f}%"
        if ratios:
            line += f", against the best other {min(ratios):.2f} .. {statistics.median(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("\n".join(summary(Path(sys.argv[1]))))
