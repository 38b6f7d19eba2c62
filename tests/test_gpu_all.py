"""The script for a GPU machine, on its dry path: it ends, tells what happened, and goes on where it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _bench import made_up_report

from fastdllm_triton.bench.summary import summary

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu_all.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


def statuses(out: Path) -> dict[str, str]:
    return {line.split("\t")[0]: line.split("\t")[1] for line in (out / "status.tsv").read_text().splitlines()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry path is for machines without a GPU")
def test_the_dry_path_runs_to_its_end_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(str(out), "5", "--dry-run")
    assert found.returncode == 0, found.stdout + found.stderr
    expected = {"verify": "ok", "bench": "ok", "tests": "ok", "tune": "ok", "install": "skipped"}
    assert expected.items() <= statuses(out).items()
    folder = out / (out / "folder").read_text().strip()
    assert folder.parent.name == "cpu"
    assert {"machine.json", "verify.json", "rms_norm.json"} <= {path.name for path in folder.iterdir()}
    assert "all held" in found.stdout and "rms_norm           not timed" in found.stdout
    # One step is to be repeated, and nothing else is.
    status = out / "status.tsv"
    status.write_text("".join(line for line in status.read_text().splitlines(keepends=True) if not line.startswith("install")))
    again = run(str(out), "5", "--dry-run")
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(statuses(out)) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench/gpu_all.sh OUT [MINUTES]"),
        (["OUT", "soon"], "MINUTES must be a whole number, got soon"),
        (["OUT", "--fast"], "unknown option --fast"),
        (["/proc/nowhere"], "/proc/nowhere cannot be made"),
        pytest.param(
            ["OUT"], "torch sees no GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = run(*(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments))
    assert found.returncode == 2
    assert message in found.stdout + found.stderr


def test_the_summary_tells_of_steps_and_ceilings(tmp_path: Path) -> None:
    report = made_up_report()
    folder = tmp_path / "made-up-gpu" / "2026-11-21-0123456789"
    folder.mkdir(parents=True)
    report.write_machine(folder)
    for bench in ("swiglu", "window_attention"):
        report.write_rows(folder, bench)
    (tmp_path / "folder").write_text("made-up-gpu/2026-11-21-0123456789\n")
    (tmp_path / "status.tsv").write_text("verify\tok\t12\nbench-ops\tstopped\t600\n")
    text = "\n".join(summary(tmp_path))
    assert "verify           ok          12 s" in text and "bench-ops        stopped    600 s" in text
    assert "copy 1000 GB/s, matrix 100 TFLOP/s" in text
    # The baselines of the made-up report take two and three times ours.
    assert "swiglu              10 shapes" in text and "against the best other 2.00 .. 2.00 .. 2.00" in text
