"""``fastdllm-triton evaluate``: the grid, the scores, intervals, resuming, errors, figures."""

from __future__ import annotations

import errno
import json
import math
import re
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from matplotlib.text import Text
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton import loading
from fastdllm_triton.cli import evaluate as command
from fastdllm_triton.cli.app import app
from fastdllm_triton.decoding.strategies import StrategySpec
from fastdllm_triton.evaluation import plots, runner
from fastdllm_triton.evaluation.cost import Meter
from fastdllm_triton.evaluation.grid import CacheSpec, Variant, parse_grid
from fastdllm_triton.evaluation.runner import Evaluation, Result
from fastdllm_triton.evaluation.scoring import builtin_requests, builtin_scorer, final_number, find_scorer, read_requests
from fastdllm_triton.evaluation.statistics import paired_interval, ratio_interval, wilson
from fastdllm_triton.evaluation.summary import compare, compare_caches, summarize
from fastdllm_triton.tiny.problems import is_test_prompt
from fastdllm_triton.tools import roofline
from fastdllm_triton.utils.files import locked

FIXED, QUICK = "fixed:8", "threshold:0.9"


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("fixed:1", fdt.FixedSteps(48)),
        ("fixed:4", fdt.FixedSteps(12)),
        ("fixed:3", fdt.FixedSteps(18)),  # 16 slots take 6 forwards
        ("fixed:2:margin", fdt.FixedSteps(24, score="margin")),
        ("threshold:0.9", fdt.Threshold(0.9)),
        ("factor:1.0", fdt.Factor(1.0)),
        ("entropy:0.3", fdt.EntropyBudget(0.3)),
    ],
)
def test_strategies_as_text(text: str, strategy: fdt.Strategy) -> None:
    variant = parse_grid(text, "dual", "16", 48)[0]
    assert variant.config(48).strategy == strategy
    assert str(variant.strategy) == text


@pytest.mark.parametrize(
    ("strategies", "caches", "blocks", "message"),
    [
        ("greedy:1", "none", "16", "strategy must be fixed:K"),
        ("fixed", "none", "16", "strategy must be fixed:K, threshold:T"),
        ("fixed:x", "none", "16", "needs a number after its name, got 'x'"),
        ("fixed:0.5", "none", "16", "a whole number of tokens a forward"),
        ("threshold:1.5", "none", "16", "threshold must be in (0, 1], got 1.5"),
        ("entropy:0.3:best", "none", "16", "score must be one of"),
        ("fixed:1", "full", "16", "cache must be one of none, prefix, dual, block_causal, got 'full'"),
        ("fixed:1", "dual+refresh=4", "16", "OPTION=INTEGER with an option of refresh_every"),
        ("fixed:1", "dual+refresh_every=0", "16", "refresh_every must be None or an integer of 1 or more, got 0"),
        ("fixed:1", "none", "sixteen", "block_lengths must be a list of integers of 1 or more"),
        ("fixed:1", "none", "16,0", "block_lengths must be a list of integers of 1 or more, got '16,0'"),
        ("fixed:1", "dual", "32", "gen_length must be a multiple of block_length = 32"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(strategies: str, caches: str, blocks: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_grid(strategies, caches, blocks, 48)
    assert message in str(caught.value)


def test_the_grid_is_every_combination_once() -> None:
    variants = parse_grid("fixed:1,fixed:4,fixed:1", "none,dual+refresh_every=4", "16,48", 48)
    assert [variant.name for variant in variants] == [
        f"{s}_{c}_block={b}" for b in (16, 48) for c in ("none", "dual+refresh_every=4") for s in ("fixed=1", "fixed=4")
    ]
    assert variants[2].config(48).refresh_every == 4


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson(successes, n) == pytest.approx(interval, abs=5e-5)
    low, high = wilson(n - successes, n)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)


def test_paired_intervals_are_those_of_the_literature() -> None:
    # Approval of a prime minister in two surveys of 1,600: 150 turned away, 86 came over (Agresti, Categorical Data Analysis).
    assert paired_interval(86, 150, 1600) == pytest.approx((-0.059, -0.021), abs=5e-4)
    low, high = paired_interval(0, 0, 100)
    assert low == -high
    assert 0.01 < high < 0.03  # Rule of three: differences of up to 3 in 100 may go unseen.


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        forwards = rng.integers(5, 20, 100).astype(float)
        tokens = forwards * 3 + rng.normal(0, 5, 100)
        low, high = ratio_interval(tokens, forwards)
        covered += low <= 3 <= high
    assert 180 <= covered <= 198


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3+4=7. #### 7", "7"),
        ("#### 12 apples, not 13", "12"),
        ("#### $1,234.00", "1234"),
        ("#### -5", "-5"),
        ("it is 3, then 4.5", "4.5"),  # no mark: the last one
        ("3 before #### nothing", None),
        ("none", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_lines_after_the_limit_are_not_read(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p", "answer": "1"}\n\n{"prompt": "q", "answer": "2"}\nnot JSON\n')
    assert [request.prompt for request in read_requests(data, 2)] == ["p", "q"]
    assert [request.prompt for request in read_requests(data, 1)] == ["p"]
    for limit in (None, -1, 3):
        with pytest.raises(ValueError, match="line 4: not JSON"):
            read_requests(data, limit)
    with pytest.raises(ValueError, match="holds no request"):
        read_requests(data, 0)


def test_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p", "answer": "so 1+1=2 #### 2"}\n\n{"prompt": "q", "answer": 2}\n')
    first, second = read_requests(data)
    assert (first.source, second.source) == (f"{data}: line 1", f"{data}: line 3")
    number, regex = find_scorer("number"), find_scorer(r"regex:answer: (\d+)")
    assert [number(r, "it is #### 2.0")["exact_match"] for r in (first, second)] == [1, 1]
    assert number(second, "")["exact_match"] == 0
    assert regex(second, "answer: 1, no, answer: 2")["exact_match"] == 1
    assert regex(second, "2")["exact_match"] == 0
    assert find_scorer("text")(second, " 2 ")["exact_match"] == 1
    (tmp_path / "my_scores.py").write_text(
        "def score(text, record):\n    return {'exact_match': text == str(record['answer']), 'length': 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_scorer("my_scores:score")(second, "2") == {"exact_match": 1.0, "length": 0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "data.jsonl: line 2: not JSON"),
        ("[1]", "line 2: must be an object with a 'prompt', got list"),
        ('{"prompt": "x"}', "line 2: has no 'answer'; it has 'prompt'"),
        ('{"prompt": "", "answer": "x"}', "line 2: 'prompt' must be text and not empty"),
        ('{"prompt": "x", "answer": null}', "line 2: 'answer' must be text or a number, got None"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Tom has 51 coins.", "answer": "1"}\n' + line + "\n")
    result = _evaluate(tmp_path / "out", "--data", data, "--strategies", FIXED)
    assert result.exit_code == 2
    assert message in _flat(result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "--scorer must be number, text, regex:PATTERN or module:function, got 'best'"),
        ("regex:(", "is no regular expression"),
        ("regex:", "--scorer: regex: needs a pattern"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("math:pi", "is not a function"),
    ],
)
def test_unknown_scorers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        find_scorer(name)
    assert message in str(caught.value)


def test_the_command_reports_what_single_generations_give(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    result = _evaluate(tmp_path, "--problems", 10, "--problem-seed", 7, "--strategies", f"{FIXED},{QUICK}", "--json-copy", table)
    assert result.exit_code == 0, result.output
    summary = json.loads(table.read_text())
    assert table.read_text() == (tmp_path / "summary.json").read_text()
    assert [(r["strategy"], r["cache"], r["block_length"], r["n"]) for r in summary] == [
        (s, "dual", 16, 10) for s in (FIXED, QUICK)
    ]

    requests = builtin_requests(10, 7)
    assert all(is_test_prompt(request.prompt) for request in requests)
    alone = [tiny.generate(request.prompt, strategy=fdt.Threshold(0.9), cache="dual") for request in requests]
    scores = [builtin_scorer()(request, out.texts[0]) for request, out in zip(requests, alone, strict=True)]
    quick = summary[1]
    assert quick["exact_match"] == pytest.approx(sum(s["exact_match"] for s in scores) / 10)
    assert quick["whole"] == pytest.approx(sum(s["whole"] for s in scores) / 10)
    assert quick["nfe"] == pytest.approx(sum(out.nfe for out in alone) / 10)
    committed = sum(out.committed for out in alone)
    assert quick["tokens_per_forward"] == pytest.approx(committed / sum(out.nfe for out in alone), abs=1e-6)
    assert quick["exact_match_ci"] == pytest.approx(wilson(10 * quick["exact_match"], 10), abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "requests" / "threshold=0.9_dual_block=16.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [out.texts[0] for out in alone]
    assert quick["seconds"] == pytest.approx(sum(line["seconds"] for line in lines), abs=1e-6)


def test_the_profile_of_a_block_counts_what_its_forwards_commit() -> None:
    variant = parse_grid("fixed:2", "none", "4", 8)[0]
    maps = ([0, 0, 1, 2, 3, 3, 3, 3], [0, 1, 1, 1, -1, -1, -1, -1])
    results = [
        Result(i, "p", "a", "t", 8 - 4 * i, 4 - 2 * i, 10.0, 20.0, 1.0, m, {"exact_match": 1.0}) for i, m in enumerate(maps)
    ]
    (record,) = summarize({variant: results})
    assert record["tokens_by_forward"] == pytest.approx([(2 + 4 + 1) / 3, (1 + 3) / 2, 1], abs=1e-6)
    assert record["tokens_by_position"] == pytest.approx([7 / 3, 9 / 3, 8 / 3, 8 / 3], abs=1e-6)
    assert (record["tokens_per_forward"], record["nfe"], record["seconds"], record["whole"]) == (2.0, 3.0, 2.0, None)


def test_a_strategy_is_compared_with_fixed_steps_at_its_own_speed() -> None:
    def results(speed: float, right: int) -> list[Result]:
        return [
            Result(i, "p", "a", "", int(12 * speed), 12, 1, 1, 1.0, [0], {"exact_match": float(i < right)}) for i in range(100)
        ]

    fixed = {parse_grid(f"fixed:{k}", "none", "16", 48)[0]: results(k, right) for k, right in ((2, 90), (4, 70))}
    threshold, fast = parse_grid("threshold:0.9,threshold:0.5", "none", "16", 48)
    (record,) = compare(fixed | {threshold: results(3, 88), fast: results(5, 50)})  # Nothing fixed is as fast as 5.
    assert record["strategy"] == "threshold:0.9"
    assert record["fixed_at_equal_speed"] == pytest.approx(0.8)
    assert record["gain"] == pytest.approx(0.08)
    low, high = record["gain_ci"]
    # The same requests: the spread is that of 8 differing ones and half of 10, not of two samples of 100.
    assert 0.02 < low < 0.08 < high < 0.15


def test_the_cost_of_a_request_is_that_of_its_windows(tiny: fdt.MaskedDiffusionLM) -> None:
    prompts = [tiny.encode(request.prompt) for request in builtin_requests(3, 1)]
    # One token a forward: blocks have 16, 15, ... masked slots, and nothing about the counts is an average.
    for cache, options in (("none", {}), ("prefix", {}), ("dual", {}), ("dual", {"suffix_window": 8, "look_ahead": 4})):
        config = tiny.options(cache=cache, strategy=fdt.FixedSteps(48), stop_at_eos=False, **options)
        meter = Meter(tiny.config, config)
        step_maps = tiny.generate(prompts, config, callback=meter).step_map.tolist()
        for row, (prompt, step_map) in enumerate(zip(map(len, prompts), step_maps, strict=True)):
            cost, expected = meter.cost(row, prompt, step_map), roofline.Cost(0, 0)
            for block in range(3):
                start = prompt + 16 * block
                end = min(prompt + 48, start + 16 + options.get("suffix_window", 48))
                ahead = min(end, start + 16 + options.get("look_ahead", 0))
                window = {"none": end, "prefix": end - start, "dual": ahead - start}[cache]
                expected += roofline.forward_cost(tiny.config, 1, end, end, 16)
                for masked in range(15, 0, -1):
                    expected += roofline.forward_cost(tiny.config, 1, window, end, masked)
            assert (cost.bytes, cost.flops) == pytest.approx((expected.bytes, expected.flops))


@pytest.mark.parametrize("name", ["llada-gqa", "dream-gqa"])
@pytest.mark.parametrize("strategy", [fdt.Factor(0.3), fdt.Timesteps(60)], ids=["factor", "timesteps"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none", "suffix_window": 4},
        {"cache": "prefix", "prompt_refresh": 2, "look_back": 3},
        {"cache": "dual", "refresh_every": 2, "look_ahead": 4},
    ],
    ids=str,
)
def test_what_a_request_costs_is_what_the_engine_recomputed(name: str, strategy: Any, options: dict[str, Any]) -> None:
    """In a ragged batch, with a model whose predictions are shifted, with forwards that commit nothing (timesteps), and with
    blocks after an end token left out.
    """
    model = fdt.load(GOLDEN / name, device="cpu")
    config = model.options(gen_length=32, block_length=8, strategy=strategy, eos_ids=(201, 264), **options)
    prompts = [[5, 6, 7], [8] * 12, [9] * 7]
    forwards: list[fdt.Forward] = []
    meter = Meter(model.config, config)

    def callback(forward: fdt.Forward) -> None:
        forwards.append(forward)
        meter(forward)

    output = model.generate(prompts, config, callback=callback)
    assert (output.step_map < 0).any()
    for row, (prompt, step_map) in enumerate(zip(prompts, output.step_map.tolist(), strict=True)):
        expected, padding = roofline.Cost(0, 0), output.sequences.shape[1] - 32 - len(prompt)
        for forward in forwards:
            if row in forward.rows:
                at = forward.rows.index(row)
                block, (first, end) = forward.blocks[at], forward.windows[at]
                after = options.get("suffix_window", 32)
                attended = min(len(prompt) + 32, len(prompt) + 8 * (block + 1) + after)
                masked = sum(step >= forward.index for step in step_map[8 * block : 8 * (block + 1)])
                expected += roofline.forward_cost(model.config, 1, end - max(first, padding), attended, masked)
        cost = meter.cost(row, len(prompt), step_map)
        assert (cost.bytes, cost.flops) == pytest.approx((expected.bytes, expected.flops))


def test_a_cache_with_options_is_compared_with_the_same_without() -> None:
    def results(cache: str, right: int, texts: str, flops: float) -> dict[Variant, list[Result]]:
        variant = parse_grid("threshold:0.9", cache, "16", 48)[0]
        scores = [{"exact_match": float(i < right)} for i in range(100)]
        return {variant: [Result(i, "p", "a", texts[i], 9, 3, 4.0, flops, 1.0, [0], scores[i]) for i in range(100)]}

    plain, changed = results("dual", 90, "a" * 100, 8.0), results("dual+suffix_window=8", 84, "a" * 75 + "b" * 25, 6.0)
    (record,) = compare_caches(plain | changed | results("none", 99, "a" * 100, 9.0))
    assert (record["cache"], record["base"]) == ("dual+suffix_window=8", "dual")
    assert (record["same"], record["flops_ratio"], record["bytes_ratio"]) == (0.75, 0.75, 1.0)
    assert record["exact_match_gain"] == pytest.approx(-0.06)
    assert record["exact_match_gain_ci"] == pytest.approx(paired_interval(0, 6, 100), abs=1e-6)
    assert compare_caches(changed) == []


class _Clock:
    """A model whose times are a function of the batch, so that two runs can be compared byte for byte."""

    def __init__(self, lm: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.calls, generate = count(1), lm.generate

        def timed(prompts: Any, config: fdt.GenerationConfig, **options: Any) -> fdt.GenerationOutput:
            if stop_after is not None and next(self.calls) > stop_after:
                raise KeyboardInterrupt
            output = generate(prompts, config, **options)
            output.seconds = sum(map(len, prompts)) / 7 + config.block_length
            return output

        monkeypatch.setattr(lm, "generate", timed)
        monkeypatch.setattr(loading, "load", lambda *_, **__: lm)


GRID = ("--problems", 11, "--batch-size", 4, "--strategies", f"{FIXED},{QUICK}", "--caches", "none,dual")


@pytest.mark.parametrize("stop_after", [0, 1, 5])
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    with monkeypatch.context() as patch:
        _Clock(fdt.load("tiny"), patch)
        assert _evaluate(straight, *GRID).exit_code == 0
    with monkeypatch.context() as patch:
        _Clock(fdt.load("tiny"), patch, stop_after)
        stopped = _evaluate(resumed, *GRID)
        assert stopped.exit_code == 130
        assert f"what is finished stays in {resumed}" in _flat(stopped.stderr)
        assert not (resumed / "summary.json").exists()
    for path in (resumed / "requests").glob("*.jsonl"):  # A write that was cut off.
        path.write_text(path.read_text() + '{"index": 8, "prompt": "To')
    with monkeypatch.context() as patch:
        clock = _Clock(fdt.load("tiny"), patch, stop_after=1000)
        assert _evaluate(resumed, *GRID).exit_code == 0
        assert next(clock.calls) - 1 == 12 - stop_after  # Nothing that was finished is decoded again.
    files = sorted(path.relative_to(straight) for path in straight.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(resumed) for path in resumed.rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file


def test_the_same_command_again_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _evaluate(tmp_path, *GRID).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    _Clock(fdt.load("tiny"), monkeypatch, stop_after=0)
    assert _evaluate(tmp_path, *GRID).exit_code == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    grid = ("--strategies", FIXED, "--problems", 4)
    assert _evaluate(tmp_path, *grid).exit_code == 0
    for changed, message in (
        (("--problems", 5), "requests = '4 requests"),
        (("--problem-seed", 5), "requests = "),
        (("--batch-size", 3), "--batch-size = 32, this one has 3"),
        (("--gen-length", 64), "--gen-length = 48, this one has 64"),
        (("--dtype", "float64"), "dtype = 'float32', this one has 'float64'"),
    ):
        result = _evaluate(tmp_path, *grid, *changed)
        assert result.exit_code == 2
        assert message in _flat(result.stderr)


def test_a_scorer_that_raises_keeps_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": r.prompt, "answer": r.answer}) + "\n" for r in builtin_requests(3, 0)))
    (tmp_path / "raising.py").write_text("def score(text, record):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", data, "--strategies", FIXED)
    result = _evaluate(out, *arguments, "--scorer", "raising:score")
    assert result.exit_code == 2
    assert f"scorer raising:score failed on {data}: line 1, answer " in _flat(result.stderr)
    assert "ZeroDivisionError: division by zero" in _flat(result.stderr)
    assert len((out / "requests" / "fixed=8_dual_block=16.jsonl").read_text().splitlines()) == 3
    _Clock(fdt.load("tiny"), monkeypatch, stop_after=0)
    assert _evaluate(out, *arguments).exit_code == 0  # Scored with another one, nothing decoded.
    assert json.loads((out / "summary.json").read_text())[0]["whole"] is None


def test_scores_of_a_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": r.prompt, "answer": r.answer}) + "\n" for r in builtin_requests(4, 0)))
    (tmp_path / "own.py").write_text(
        "def score(text, record):\n    return {'exact_match': record['answer'] in text, 'n': 0.25}\n"
        "def moody(text, record):\n    return {'exact_match': 1, text[-1:]: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", data, "--strategies", QUICK)
    assert _evaluate(tmp_path / "out", *arguments, "--scorer", "own:score").exit_code == 0
    (record,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (record["n"], record["other_scores"]) == (4, {"n": [0.25, 0.25, 0.25]})
    result = _evaluate(tmp_path / "out", *arguments, "--scorer", "own:moody")
    assert result.exit_code == 2
    assert "must give the same scores for every request" in _flat(result.stderr)


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = count(1)

    def fsync(_: int) -> None:
        if next(syncs) == 5:  # run.json, the emptied file of the variant, two batches, and the third
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runner.os, "fsync", fsync)
        result = _evaluate(tmp_path, *GRID)
    assert result.exit_code == 2
    told = f"error: --out: {tmp_path} cannot be written: No space left on device"
    assert _flat(result.stderr) == f"{told}; what is finished stays in {tmp_path}, run the same command to go on"
    variant = parse_grid(FIXED, "none", "16", 48)[0]
    run = Evaluation(fdt.load("tiny"), builtin_requests(11, 0), builtin_scorer(), tmp_path, gen_length=48, batch_size=4)
    assert len(run.finished(variant)) >= 8
    assert not list(tmp_path.rglob("*.part"))
    assert _evaluate(tmp_path, *GRID).exit_code == 0


def test_a_target_that_cannot_be_written_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", None)
    (tmp_path / "file").write_text("")
    for out, arguments, message in (
        (tmp_path / "out", ("--json-copy", tmp_path / "missing" / "x.json"), "--json-copy: "),
        (tmp_path / "out", ("--json-copy", tmp_path), "--json-copy: "),
        (tmp_path / "file", (), "--out: "),
        (tmp_path / "file" / "below", (), "--out: "),
    ):
        result = _evaluate(out, *arguments)
        assert result.exit_code == 2
        assert _flat(result.stderr).startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tables_and_figures_come_before_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    print_tables = command._print

    def vanish(*arguments: Any) -> None:
        print_tables(*arguments)
        folder.rmdir()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_print", vanish)
        result = _evaluate(out, "--problems", 3, "--strategies", FIXED, "--json-copy", folder / "x.json")
    assert result.exit_code == 2
    assert "exact match" in result.stdout
    assert (out / "summary.json").exists() and list(out.glob("*.png"))
    assert _flat(result.stderr) == f"error: --json-copy: {folder / 'x.json'} cannot be written: No such file or directory"


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path: Path) -> None:
    with locked(tmp_path, "--out"):
        result = _evaluate(tmp_path, "--problems", 2, "--strategies", FIXED)
    assert result.exit_code == 2
    assert _flat(result.stderr) == f"error: --out: another run is writing to {tmp_path}"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert _evaluate(tmp_path, "--problems", 2, "--strategies", FIXED).exit_code == 0


def test_a_prompt_that_does_not_fit_is_named_before_any_work(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "x", "answer": "1"}) + "\n" + json.dumps({"prompt": "1" * 500, "answer": "1"}) + "\n")
    result = _evaluate(tmp_path / "out", "--data", data, "--strategies", FIXED)
    assert result.exit_code == 2
    assert "line 2: prompts: row 0 has 500 tokens" in _flat(result.stderr)


def test_time_left_weighs_what_a_way_costs() -> None:
    def cost(strategy: str, cache: str) -> float:
        return Variant(StrategySpec.parse(strategy), CacheSpec.parse(cache), 16).cost(28, 48)

    assert cost("fixed:1", "none") > cost("fixed:1", "prefix") > cost("fixed:1", "dual") > cost("fixed:4", "dual")
    assert cost("fixed:2", "none") == cost("fixed:1", "none") / 2


def test_the_pareto_front() -> None:
    points = [(1.0, 0.9), (2.0, 0.9), (4.0, 0.8), (3.0, 0.7), (5.0, 0.8), (6.0, 0.1)]
    assert plots.pareto(points) == [(2.0, 0.9), (5.0, 0.8), (6.0, 0.1)]


def test_every_figure_is_drawn_from_the_summary(tmp_path: Path) -> None:
    strategies = "fixed:2,fixed:8,threshold:0.5,threshold:0.9,entropy:0.3"
    assert _evaluate(tmp_path, "--problems", 6, "--strategies", strategies, "--block-length", "16,48",
                     "--caches", "dual,dual+suffix_window=8").exit_code == 0  # fmt: skip
    names = ["accuracy-block-16", "accuracy-block-48", "tokens-in-block", "block-length", "threshold-sweep-block-16"]
    names += ["threshold-sweep-block-48"]
    assert {path.stem for path in tmp_path.glob("*.png")} == set(names)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "95 % intervals" in svg or name == "tokens-in-block"
    records = [r for r in json.loads((tmp_path / "summary.json").read_text()) if (r["block_length"], r["cache"]) == (16, "dual")]
    figure = plots.accuracy_against_speed(records)
    drawn = [line.get_xydata() for line in figure.axes[0].get_lines()]
    expected = sorted([r["tokens_per_forward"], r["exact_match"]] for r in records if r["strategy"].startswith("threshold"))
    assert any(points.shape == (2, 2) and np.allclose(points, expected) for points in drawn)
    assert all(math.isfinite(r["exact_match"]) for r in records)


def test_points_have_names_that_do_not_cover_each_other_and_scores_one_scale() -> None:
    folder = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "2026-11-21-618ec41" / "strategies"
    records = [r for r in json.loads((folder / "summary.json").read_text()) if r["block_length"] == 16]
    left, right, *_ = plots.accuracy_against_speed(records).axes
    names = [label.get_text() for label in left.texts]
    assert "threshold 0.9" in names and all(re.fullmatch(r"[a-z]+ [\d.]+", name) for name in names)
    assert len(names) == len(right.texts) == 16
    for ax in (left, right):
        boxes = [Text.get_window_extent(label) for label in ax.texts]  # the words, without the lines to the points
        assert not any(one.shrunk(0.9, 0.9).overlaps(other) for one, other in combinations(boxes, 2))
        assert ax.get_ylim() == left.get_ylim()


def test_a_sweep_shows_score_and_speed_of_every_threshold() -> None:
    folder = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "2026-11-21-618ec41" / "strategies"
    records = [r for r in json.loads((folder / "summary.json").read_text()) if r["block_length"] == 16]
    figure = plots.threshold_sweep(records)
    scores, speeds = figure.axes[: len(figure.axes) // 2], figure.axes[len(figure.axes) // 2 :]
    for cache, score_axis, speed_axis in zip(dict.fromkeys(r["cache"] for r in records), scores, speeds, strict=True):
        sweep = {float(r["strategy"][10:]): r for r in records if r["cache"] == cache and r["strategy"].startswith("threshold:")}
        assert len(sweep) == 5
        for ax, key in ((score_axis, "exact_match"), (speed_axis, "tokens_per_forward")):
            assert ax.get_lines()[0].get_xydata().tolist() == [[t, sweep[t][key]] for t in sorted(sweep)]
        assert score_axis.get_ylim() == scores[0].get_ylim()


def _evaluate(out: Path, *arguments: object) -> Any:
    caches = () if "--caches" in arguments else ("--caches", "dual")
    return CliRunner().invoke(app, ["evaluate", "--out", str(out), *caches, *map(str, arguments)])


def _flat(text: str) -> str:
    return " ".join(text.split())
