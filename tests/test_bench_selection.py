"""The benches of the selection ops, but for the timing itself: providers agree, formulas, baselines, and no GPU."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
timing = importlib.import_module("_timing")
baselines = importlib.import_module("_baselines")

#: A small shape of each bench, and its bytes.
SMALL = {
    "token_statistics": ({"rows": 3, "vocabulary": 500, "temperature": 0.0}, 2 * 3 * 500 + 3 * 28),
    "head_statistics": ({"rows": 3, "vocabulary": 500, "width": 32}, 2 * (500 + 3) * 32),
    "commit_tokens": ({"batch": 2, "block": 8, "rule": "factor"}, 2 * 8 * 40),
}


def run_once(run, inputs):
    """A timer that runs everything and takes a millisecond."""
    for one in inputs:
        run(one)
    return timing.Timing(1.0, 0.9, 1.2)


@pytest.mark.parametrize("op", SMALL)
def test_every_provider_runs_on_what_the_kernel_was_checked_on(op):
    module = importlib.import_module(f"bench_{op}")
    shape, needed = SMALL[op]
    make = module.inputs if op == "commit_tokens" else partial(module.inputs, dtype=torch.float16)
    bench = replace(module.BENCH, shapes=[shape], inputs=make)
    # Inductor wants a C++ compiler where there is no GPU.
    bench = replace(bench, baselines={name: run for name, run in bench.baselines.items() if "compile" not in name})
    rows = timing.measure(bench, DEVICE, timer=run_once, bandwidth=1e12, cache=1)
    assert [row["provider"] for row in rows] == ["triton", *bench.baselines]
    rejected = [row["provider"] for row in rows if "rejected" in row]
    assert rejected == (["official"] if op == "commit_tokens" else [])
    assert {row["bytes"] for row in rows if "bytes" in row} == {needed}


def test_nothing_is_timed_that_disagrees():
    module = importlib.import_module("bench_token_statistics")
    bench = replace(module.BENCH, shapes=[SMALL["token_statistics"][0]], inputs=partial(module.inputs, dtype=torch.float16))
    wrong = replace(bench, ours=lambda i: module.compared(module.kernel(i["logits"] + 1)))
    with pytest.raises(AssertionError, match="token_statistics"):
        timing.measure(wrong, DEVICE, timer=run_once, bandwidth=1e12, cache=1)


@pytest.mark.parametrize("choose", [baselines.official_float64, baselines.torch_float32])
def test_the_baselines_choose_what_the_kernel_chooses(choose):
    module = importlib.import_module("bench_token_statistics")
    logits = module.inputs({"rows": 4, "vocabulary": 300, "temperature": 0.0}, DEVICE, 0, torch.float32)["logits"]
    token, confidence = choose(logits)
    found = module.reference(logits)
    assert token.tolist() == found.token.tolist()
    torch.testing.assert_close(confidence.float(), found.confidence)


def test_the_official_baseline_commits_what_the_threshold_rule_commits():
    module = importlib.import_module("bench_commit_tokens")
    i = module.inputs({"batch": 5, "block": 16, "rule": "threshold"}, DEVICE, 0)
    statistics = i["statistics"]
    statistics.token.copy_(torch.arange(16))
    statistics.rest[4] += 1  # nothing passes: the best alone
    x = i["x"].clone()
    done = baselines.official_threshold(x, statistics.token, statistics.confidence.double(), module.START, module.MASK, 0.7)
    module.reference(i["x"], statistics, i["window_start"], i["state"])
    assert x.tolist() == i["x"].tolist() and (x[4] != module.MASK).sum() == 1
    assert done.tolist() == i["state"].done.tolist()


def test_every_launch_of_the_commit_bench_decides_anew():
    module = importlib.import_module("bench_commit_tokens")
    i = module.inputs({"batch": 2, "block": 8, "rule": "factor"}, DEVICE, 0)
    counts = [module.run_kernel(i)[0].tolist() for _ in range(3)]
    assert counts[0] == counts[1] == counts[2] and max(counts[0]) < 8
    assert math.isnan(i["state"].confidence[0, 0].item())


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_claimed(op, tmp_path):
    command = [sys.executable, BENCH / f"bench_{op}.py", "--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png"]
    paths = os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "no GPU here, so nothing is measured" in ran.stdout
    assert not list(tmp_path.iterdir())
