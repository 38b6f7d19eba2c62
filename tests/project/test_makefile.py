"""What ``make demo`` installs, and what it says meanwhile; a script stands in for Python and only writes down its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
echo "$*" >> log
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/fastdllm-triton" ;;
*+cpu*) exit {status} ;;
"-c import sys"*) exit {old} ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make_demo(
    folder: Path, *variables: str, cpu_build: bool = True, old: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """``make demo`` in a copy, and the calls of Python and of the demo."""
    place = folder / "with a space"
    place.mkdir()
    for name in ("Makefile", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, place)
    python = place / "python"
    python.write_text(STAND_IN.format(status=int(not cpu_build), old=int(old)))
    python.chmod(0o755)
    command = ["make", "demo", "PYTHON=./python", *variables]
    # ``make test`` hands its own flags and variables on to every make below it.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    result = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    log = place / "log"
    return result, log.read_text().splitlines()


def torch_builds(calls: list[str]) -> list[str]:
    """The arguments of pip's calls for torch."""
    return [call.split(" install ")[1] for call in calls if call.startswith("-m pip") and "torch" in call]


def test_the_cpu_build_is_taken_where_there_is_no_gpu(tmp_path: Path) -> None:
    result, calls = make_demo(tmp_path, "GPU=false")
    assert result.returncode == 0
    assert "once: 1 to 6 GB, some minutes" in result.stdout.splitlines()[0]
    version = (ROOT / "constraints.txt").read_text().split("torch==")[1].split()[0]
    assert torch_builds(calls) == [f"torch=={version}+cpu"]
    assert calls[-1] == "demo"


def test_an_index_without_the_cpu_build_gives_what_it_has(tmp_path: Path) -> None:
    result, calls = make_demo(tmp_path, "GPU=false", cpu_build=False)
    assert result.returncode == 0
    assert [build.endswith("+cpu") for build in torch_builds(calls)] == [True, False]
    assert torch_builds(calls)[1] == "--constraint constraints.txt torch"
    assert "TORCH_INDEX=URL would take it from another package index" in result.stdout


def test_a_gpu_gets_the_build_of_the_index(tmp_path: Path) -> None:
    _, calls = make_demo(tmp_path, "GPU=true")
    assert torch_builds(calls) == ["--constraint constraints.txt torch"]


def test_an_index_that_was_given_is_the_one_that_torch_comes_from(tmp_path: Path) -> None:
    _, calls = make_demo(tmp_path, "GPU=false", "TORCH_INDEX=file:///builds")
    assert torch_builds(calls) == ["--index-url file:///builds --constraint constraints.txt torch"]


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    result, calls = make_demo(tmp_path, old=True)
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed, and ./python is none" in result.stdout
    assert len(calls) == 1
