"""The tuner: what it tries computes the right thing, and what it writes is what the config functions then choose."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _bench import DEVICE
from typer.testing import CliRunner

from fastdllm_triton.bench import tune as module
from fastdllm_triton.bench._session import check, sets_and_results
from fastdllm_triton.bench._timing import Timing
from fastdllm_triton.kernels import (
    _tuned,
    head_statistics,
    linear,
    prefetch,
    rms_norm,
    rope_kv_write,
    swiglu,
    token_statistics,
    window_attention,
)
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.cases.prefetch import PREFETCH
from fastdllm_triton.verify.cases.window_attention import HEADS

GPU = "NVIDIA Test 7"
ARCH = ARCHS["sm_90"]
#: A shape of each op that the interpreter runs in a blink.
SMALL: dict[str, dict[str, Any]] = {
    "linear": dict(OPS["linear"].small),
    "window_attention": {"model": "dream", "batch": 1, "window": 3, "slots": 300},
    "cudnn_attention": {"model": "dream", "batch": 1, "window": 3, "slots": 70},
    "prefetch": dict(PREFETCH.small),
    "head_statistics": {"rows": 3, "vocabulary": 300, "width": 64, "temperature": 0.0},
    "rope_kv_write": dict(OPS["rope_kv_write"].small),
    "rms_norm": dict(OPS["rms_norm"].small),
    "swiglu": {"rows": 3, "width": 700},
    "token_statistics": {"rows": 2, "vocabulary": 30_000, "temperature": 0.0, "bits": 16},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the package's."""
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    caches = (
        _tuned._entries,
        window_attention.select_config,
        window_attention.cudnn_wins,
        rms_norm.select_config,
        swiglu.select_config,
    )
    for function in (*caches, rope_kv_write.select_config, linear.measured_config):
        function.cache_clear()
    return tmp_path


def chosen(op: str, shape: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """The config of a launch on a GPU of this name."""
    if op == "linear":
        keys = ("rows", "n", "k", "norm", "activation", "residual")
        size = {key: shape[key] for key in keys}
        found = linear.measured_config(gpu, dtype="float16", **size)
        return {} if found is None else asdict(found)
    if op == "window_attention":
        sizes = (shape["batch"], shape["window"], *HEADS[shape["model"]], shape["slots"], 2)
        return asdict(window_attention.select_config(ARCH, *sizes, gpu))
    if op == "cudnn_attention":
        sizes = (shape["batch"], shape["window"], *HEADS[shape["model"]], shape["slots"], 2)
        return {"library": "cudnn"} if window_attention.cudnn_wins(gpu, *sizes) else {}
    if op == "prefetch":
        return {"bytes": prefetch.prefetched_bytes(gpu, shape["n"], shape["k"], 2)}
    if op == "head_statistics":
        found = head_statistics.select_config(ARCH, shape["rows"], shape["vocabulary"], shape["width"], 2, False, gpu)
        return head_statistics.BY_LIBRARY if found is None else asdict(found)
    if op == "rope_kv_write":
        return asdict(rope_kv_write.select_config(ARCH, 4, 128, gpu))
    if op == "token_statistics":
        return asdict(token_statistics.select_config(ARCH, shape["rows"], shape["vocabulary"], 2, False, gpu))
    return asdict({"rms_norm": rms_norm, "swiglu": swiglu}[op].select_config(ARCH, shape["width"], gpu))


@pytest.mark.parametrize("op", module.SWEEPS)
def test_candidates_compute_the_right_thing(op: str) -> None:
    cases = module.SWEEPS[op].cases
    (inputs,), expected = sets_and_results(cases, SMALL[op], DEVICE, torch.float16)
    candidates = list(module.SWEEPS[op].candidates(module.arch_of(DEVICE), SMALL[op], torch.float16))
    assert len({json.dumps(candidate.config) for candidate in candidates}) == len(candidates) >= 1
    for candidate in candidates[:: max(1, len(candidates) // 4)]:
        check(cases, SMALL[op], candidate.function, inputs, expected)


@pytest.mark.parametrize("op", module.SWEEPS)
def test_what_is_written_is_what_is_chosen_there_and_nowhere_else(op: str, folder: Path) -> None:
    shape, sweep = SMALL[op], module.SWEEPS[op]
    before = chosen(op, shape, None)
    candidate = next(
        c
        for c in itertools.islice(sweep.candidates(ARCH, shape, torch.float16), 200)
        if any(before.get(key) != value for key, value in c.config.items())
    )
    key = sweep.key(shape, torch.float16) | ({"rows": 16} if op == "linear" else {})
    path = module.write([{"op": op, "shape": key, "config": dict(candidate.config)}], GPU, folder)
    assert path == _tuned.path_of(GPU)
    found = chosen(op, shape, GPU)
    derived = {"parts", "splits"} if op in ("head_statistics", "token_statistics") else set()
    assert {name: found[name] for name in candidate.config if name not in derived} == {
        name: value for name, value in candidate.config.items() if name not in derived
    }
    assert found != before
    assert chosen(op, shape, "NVIDIA Test 8") == before


def test_sweeps_try_shapes_that_the_benches_have_and_keys_are_all_different() -> None:
    for sweep in module.SWEEPS.values():
        assert all(set(shape) == set(sweep.cases.shapes[0]) for shape in sweep.shapes)
        keys = [json.dumps(sweep.key(shape, torch.bfloat16)) for shape in sweep.shapes]
        # Two projections of different names may be one product.
        assert len(set(keys)) == len(keys) or sweep.op == "linear"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_an_op_has_at_most_600_candidates_the_best_guesses_first(arch: str) -> None:
    for sweep in module.SWEEPS.values():
        tried = [list(sweep.tried(ARCHS[arch], shape, torch.bfloat16)) for shape in sweep.shapes]
        assert sum(map(len, tried)) <= module.MOST_CANDIDATES
        assert all(tried), sweep.op


def tried(op: str, **shape: Any) -> list[dict[str, Any]]:
    sweep = module.SWEEPS[op]
    return [dict(c.config) for c in sweep.tried(ARCH, shape, torch.bfloat16)]


def test_what_is_tried_reaches_large_tiles_and_short_chunks() -> None:
    refresh = tried("window_attention", model="llada", batch=1, window=1024, slots=1024)
    assert {"block_m": 128, "block_n": 128, "num_stages": 2}.items() <= refresh[0].items()
    step = tried("window_attention", model="llada", batch=1, window=32, slots=320)
    assert {2, 3} <= {config["splits"] for config in step}  # chunks of 192 and 128 slots


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_head_meets_the_library_at_every_number_of_rows(temperature: float) -> None:
    sizes = {"vocabulary": 126_464, "width": 4096, "temperature": temperature}
    for rows in (16, 32, 64):
        assert tried("head_statistics", rows=rows, **sizes)[0] == head_statistics.BY_LIBRARY
    assert all(config["block_vocabulary"] for config in tried("head_statistics", rows=128, **sizes))  # the rule is the library


def test_samples_and_float32_logits_are_tuned() -> None:
    shapes = module.SWEEPS["token_statistics"].shapes
    assert {(shape["bits"], shape["temperature"]) for shape in shapes} >= {(32, 0.0), (32, 1.0), (16, 0.0)}
    assert {shape["temperature"] for shape in module.SWEEPS["head_statistics"].shapes} == {0.0, 1.0}


def test_a_dry_run_writes_what_it_has_after_every_shape_and_goes_on_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU of 132 SMs on which everything takes a millisecond but candidates with four warps, and the clock.
    gpu = SimpleNamespace(name=GPU, L2_cache_size=1, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(module, "arch_of", lambda device: ARCH)
    monkeypatch.setattr(module, "check", lambda *call: None)
    monkeypatch.setattr(module, "sets_and_results", lambda *of: ([{}], None))
    monkeypatch.setattr(
        module, "time_in_turns",
        lambda runs, sets: {name: Timing(0.5 if '"num_warps": 4' in name else 1.0, 0, 0) for name in runs},
    )  # fmt: skip
    clock = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    app = module.typer.Typer()
    app.command()(module.main)
    lengths = []
    while CliRunner().invoke(app, ["--minutes", "0.5", "--out", str(folder)]).exit_code == 3:
        lengths.append(len(json.loads(_tuned.path_of(GPU).read_text())["entries"]))
    assert lengths == sorted(set(lengths)) and len(lengths) > 2
    entries = json.loads(_tuned.path_of(GPU).read_text())["entries"]
    keys = {json.dumps([entry["op"], entry["shape"]]) for entry in entries}
    every = {json.dumps([op, sweep.key(shape, torch.bfloat16)]) for op, sweep in module.SWEEPS.items() for shape in sweep.shapes}
    assert keys == every
    assert {entry["op"] for entry in entries if entry["config"]} >= {"window_attention", "head_statistics", "token_statistics"}


def test_the_nearest_entry_within_a_factor_of_two_counts(folder: Path) -> None:
    entries = [
        {"op": "x", "shape": {"rows": rows, "columns": columns, "dim": 8}, "config": {"n": n}}
        for n, (rows, columns) in enumerate([(32, 1024), (64, 1024), (64, 4096)])
    ]
    module.write(entries, GPU, folder)

    def near(rows: int, columns: int, dim: int = 8, op: str = "x") -> Any:
        return (_tuned.nearest(GPU, op, {"rows": rows, "columns": columns}, dim=dim) or {}).get("n")

    assert [near(32, 1024), near(33, 1024), near(60, 1100), near(128, 8192)] == [0, 0, 1, 2]
    assert near(64, 2048) == 1  # as near to 1024 as to 4096: the first
    assert [near(129, 1024), near(32, 511), near(32, 1024, dim=4), near(32, 1024, op="y")] == [None] * 4
    assert _tuned.nearest(None, "x", {"rows": 32, "columns": 1024}, dim=8) is None


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"a": 0.98, "b": 0.99}, None),  # no more than two runs of the same thing differ
        ({"a": 0.9, "b": 0.5, "c": 0.496}, "b"),  # as good as the best, and before it
        ({"a": 0.9, "b": 0.5, "c": 0.49}, "c"),
        ({}, None),
    ],
)
def test_the_choice_does_not_hang_on_noise(times: dict[str, float], best: str | None) -> None:
    assert module.choice(times, 1.0) == best


@pytest.mark.parametrize(("candidate_ms", "wins"), [(0.5, True), (1.0, False)])
def test_only_winners_have_a_config(candidate_ms: float, wins: bool) -> None:
    def timer(runs: Any, inputs: Any) -> dict[str, Timing | str]:
        for run in runs.values():
            run(inputs[0])
        return {name: Timing(1.0 if name == "rule" else candidate_ms, 0, 0) for name in runs}

    entry = module.tune(module.SWEEPS["rms_norm"], SMALL["rms_norm"], DEVICE, timer=timer, cache=1, dtype=torch.float16)
    assert (entry["shape"], entry["without_ms"], entry["ms"]) == ({"width": 64}, 1.0, candidate_ms)
    assert (entry["config"] is not None) == wins


def test_a_shape_that_nothing_won_is_known_and_chooses_nothing(folder: Path) -> None:
    module.write([{"op": "rms_norm", "shape": {"width": 64}, "config": None}], GPU, folder)
    assert chosen("rms_norm", SMALL["rms_norm"], GPU) == chosen("rms_norm", SMALL["rms_norm"], None)
    assert len(module.earlier(GPU, folder)) == 1
    other = json.loads(_tuned.path_of(GPU).read_text()) | {"versions": {"torch": "1.0", "triton": "1.0"}}
    _tuned.path_of(GPU).write_text(json.dumps(other))
    assert module.earlier(GPU, folder) == []


def test_committed_files_hold_entries_that_config_functions_take() -> None:
    for path in (Path(_tuned.__file__).parent / "tuned").glob("*.json"):
        found = json.loads(path.read_text())
        assert path.name == _tuned.path_of(found["gpu"]).name
        assert {entry["op"] for entry in found["entries"]} <= set(module.SWEEPS)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="would tune")
def test_without_a_gpu_nothing_is_tuned_and_an_unknown_op_is_named(tmp_path: Path) -> None:
    app = module.typer.Typer()
    app.command()(module.main)
    assert "nothing is tuned" in CliRunner().invoke(app, ["--out", str(tmp_path)]).stdout
    assert not list(tmp_path.iterdir())
    assert "got gemv" in CliRunner().invoke(app, ["--op", "gemv"]).output


@pytest.mark.gpu
def test_an_op_is_tuned_on_a_gpu(folder: Path) -> None:
    sweep = module.SWEEPS["rms_norm"]
    entry = module.tune(sweep, sweep.shapes[0], DEVICE, timer=module.time_in_turns, cache=2**20)
    assert 0 < entry["ms"] <= entry["without_ms"]
