"""The README's table of results: generated from what is committed, and saying so where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from _bench import made_up_report

from fastdllm_triton.bench import readme_table
from fastdllm_triton.bench._report import Report


def put(results: Path, gpu: str, name: str, report: Report) -> None:
    folder = results / gpu / name
    folder.mkdir(parents=True)
    report.write_machine(folder)
    for bench in {row["bench"] for row in report.rows}:
        report.write_rows(folder, bench)


def test_the_readme_is_what_the_script_writes() -> None:
    assert readme_table.main(["--check"]) == 0


def test_without_results_of_a_gpu_it_says_so(tmp_path: Path) -> None:
    assert readme_table.results_table(tmp_path) == readme_table.NOTHING
    put(tmp_path, "cpu", "2026-11-21-0123456789", Report({"device": "cpu", "gpu": None, "commit": None, "date": "2026-11-21"}))
    assert readme_table.results_table(tmp_path) == readme_table.NOTHING


def test_the_newest_run_of_each_gpu_counts(tmp_path: Path) -> None:
    old, new, other = made_up_report(2.0), made_up_report(), made_up_report()
    old.machine |= {"date": "2026-11-20T01:00:00+00:00", "commit": "old"}
    other.machine |= {"device": "Another GPU"}
    put(tmp_path, "made-up-gpu", "2026-11-20-old", old)
    put(tmp_path, "made-up-gpu", "2026-11-21-0123456789", new)
    put(tmp_path, "another-gpu", "2026-11-21-0123456789", other)
    text = readme_table.results_table(tmp_path, tmp_path)
    assert text.index("**Another GPU**") < text.index("**Made-up GPU**")
    assert "(made-up-gpu/2026-11-21-0123456789)" in text and "2026-11-20" not in text
    assert "copy 1,000 GB/s, matrix 100 TFLOP/s" in text
    # Of the made-up baselines the fastest that is none of ours takes twice our time; attention's first two are ours.
    assert "| `swiglu` | 10 |" in text and "| 2.00 (2.00 to 2.00) |" in text and "| 4.00 (4.00 to 4.00) |" in text


def test_unverified_rows_are_left_out(tmp_path: Path) -> None:
    report = made_up_report()
    for row in report.rows:
        if row["op"] == "swiglu" or row["shape"].get("rows") == 1:
            row["unverified"] = True
    put(tmp_path, "made-up-gpu", "2026-11-21-0123456789", report)
    text = readme_table.results_table(tmp_path, tmp_path)
    assert "`swiglu`" not in text and "| `window_attention` |" in text
    timed = [row["shape"] for row in report.rows if (row["op"], row["provider"]) == ("head_statistics", "triton")]
    assert f"| `head_statistics` | {sum(shape['rows'] > 1 for shape in timed)} |" in text


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    assert readme_table.rewritten(text, "new") == f"before\n{readme_table.BEGIN}\nnew\n{readme_table.END}\nafter\n"
    with pytest.raises(ValueError, match="needs the markers"):
        readme_table.rewritten("nothing", "new")
