"""What ``gpu_all.sh`` prints in the end: how each stage ended, and how near each op came to the ceiling.

python bench/summary.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastdllm_triton.bench import readme_table
from fastdllm_triton.bench._report import Report


def summary(out: Path) -> list[str]:
    stages = [line.split("\t") for line in (out / "status.tsv").read_text().splitlines()]
    lines = [f"{name:16} {state:8} {seconds:>5} s" for name, state, seconds in stages]
    if (out / "verify.json").is_file():
        records = json.loads((out / "verify.json").read_text())["records"]
        failed = [f"{record['check']} {record['dtype']}" for record in records if not record["ok"]]
        lines.append(f"verified: {len(records)} checks, " + (f"NOT: {', '.join(failed)}" if failed else "all held"))
    folder = out / (out / "folder").read_text().strip()
    if (folder / "machine.json").is_file():
        report = Report.load(folder)
        lines += ["nothing was timed"] if report.ceilings is None else readme_table.summary(report)
    return [*lines, f"results: {folder}"]


if __name__ == "__main__":
    print("\n".join(summary(Path(sys.argv[1]))))
