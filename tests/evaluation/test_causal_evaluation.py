"""Evaluation of block-causal models: grids, costs, caches against no cache, drift, likelihoods, lm-evaluation-harness."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from _block_causal import MASK, with_tokenizer
from conftest import GOLDEN
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.evaluation.cost import Meter
from fastdllm_triton.evaluation.drift import drift, similarity
from fastdllm_triton.evaluation.grid import CacheSpec, parse_grid
from fastdllm_triton.evaluation.likelihood import MonteCarlo
from fastdllm_triton.tools.roofline import Cost, forward_cost

V2, SDAR = "fast-dllm-v2", "sdar"
FAMILIES = [V2, SDAR]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: with_tokenizer(name, tmp_path_factory.mktemp("models") / name) for name in FAMILIES}


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


# ----------------------------------------------------------------------------------------------------------------------
# Grids.


def test_a_cache_with_flags_is_read_and_written() -> None:
    text = "block_causal+sub_block_cache+separate_store"
    spec = CacheSpec.parse(text)
    assert (spec.options, str(spec)) == ((("sub_block_cache", True), ("separate_store", True)), text)
    for wrong in ("block_causal+sub_block_cache=1", "block_causal+look_back=2", "dual+sub_block_cache"):
        with pytest.raises(ValueError, match=r"cache: after (block_causal|dual)\+ comes .*, got"):
            CacheSpec.parse(wrong)


def test_a_grid_starts_from_the_options_of_the_model() -> None:
    base = fdt.load(GOLDEN / V2, device="cpu").defaults
    grid = parse_grid("threshold:0.8,fixed:1,fixed:4", "none,block_causal+sub_block_cache", "16,32", 40, base)
    assert [variant.config(40).sub_block_length for variant in grid] == [8] * 12
    assert grid[0].config(40).strategy == fdt.Threshold(0.8, strict=True)
    # Five sub-blocks: one token a forward, and four.
    assert [variant.config(40).strategy for variant in grid[1:3]] == [fdt.FixedSteps(40), fdt.FixedSteps(10)]
    assert grid[3].config(40).sub_block_cache
    assert grid[0].name == "threshold=0.8_none_block=16_sub=8"
    with pytest.raises(ValueError, match=r"threshold:0.9 with none and blocks of 4: sub_block_length must be None or a divisor"):
        parse_grid("threshold:0.9", "none", "4", 40, base)


@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_steps_commit_as_many_tokens_a_forward_as_they_say(name: str) -> None:
    lm = fdt.load(GOLDEN / name, device="cpu")
    (variant,) = parse_grid("fixed:2", "block_causal", str(lm.defaults.block_length), 32, lm.defaults)
    prompt = list(range(32))  # So that blocks begin with the generation.
    out = lm.generate([prompt], variant.config(32), stop_at_eos=False)
    counts = torch.bincount(out.step_map[0])
    if name == SDAR:
        assert counts.tolist() == [2] * 16
    else:  # A store has committed the first token of a block.
        assert counts[0] == 1 and sorted(counts.tolist()) == [1, 1] + [2] * 15


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_those_of_the_windows(name: str) -> None:
    """Every forward by itself: what it recomputed, attended and predicted, from what the engine's own ops were given."""
    lm = fdt.load(GOLDEN / name, device="cpu")
    c, ops = lm.config, lm.network.ops
    prompt = list(range(5, 18))
    for options in (
        {"cache": "none"},
        {},
        {"sub_block_length": 2, "block_length": 4, "sub_block_cache": True},
        {"separate_store": True},
    ):
        config = lm.options(gen_length=23, stop_at_eos=False, strategy=fdt.Threshold(0.3, strict=True), **options)  # type: ignore[arg-type]
        meter, seen = Meter(c, config), []

        def attention(q: torch.Tensor, *args: Any, seen: list[Any] = seen, **kwargs: Any) -> torch.Tensor:
            keys = int(args[3][0] - args[2][0])
            if "block_causal" in kwargs:  # A store ends where its window ends.
                start, length = kwargs["block_causal"]
                keys = min(keys, -(-(int(start[0] - args[2][0]) + q.shape[1]) // length) * length)
            seen.append((q.shape[1], keys))
            return ops.window_attention(q, *args, **kwargs)

        lm.network.ops = type(ops)(**{**vars(ops), "window_attention": attention})
        forwards: list[tuple[int, int]] = []

        def note(forward: fdt.Forward, meter: Meter = meter, forwards: list[Any] = forwards, seen: list[Any] = seen) -> None:
            meter(forward)
            forwards.append(seen[0])
            seen.clear()

        out = lm.generate([prompt], config, callback=note)
        lm.network.ops = ops
        cost = meter.cost(0, len(prompt), out.step_map[0].tolist())
        # The head's rows are not seen here: what is left are the layers.
        layers = sum((forward_cost(c, 1, window, keys, 0) for window, keys in forwards), Cost(0, 0))
        head = cost.flops - layers.flops
        assert head > 0 and head % (2 * c.width * c.vocab_size) == 0
        assert cost.bytes - layers.bytes == pytest.approx(head / (2 * c.width * c.vocab_size) * (28 * 2), abs=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_scores_a_grid(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    arguments = ("evaluate", "--model", folders[name], "--device", "cpu", "--problems", 3, "--gen-length", 24, "--batch-size", 2)
    caches = "none,block_causal,block_causal+sub_block_cache"
    sub = ("--sub-block-length", 2)
    result = _run(*arguments, "--out", tmp_path / "out", "--caches", caches, *sub, "--strategies", "fixed:1,threshold:0.5")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [record["cache"] for record in summary] == [cache for cache in caches.split(",") for _ in range(2)]
    assert len(summary[0]["tokens_by_position"]) == 2
    for none, cached in zip(summary[:2], summary[2:4], strict=True):  # Exact: the same text for less.
        assert none["exact_match"] == cached["exact_match"] and none["flops"] > cached["flops"]
    caches_compared = json.loads((tmp_path / "out" / "caches.json").read_text())
    assert {record["base"] for record in caches_compared} == {"block_causal"}
    # The model's own caches without being asked.
    result = _run(*arguments, "--out", tmp_path / "plain", "--strategies", "threshold:0.5")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert [record["cache"] for record in summary] == ["none", "block_causal"]
    arguments = tuple(32 if argument == 24 else argument for argument in arguments)
    result = _run(*arguments, "--out", tmp_path / "dual", "--caches", "dual", "--strategies", "threshold:0.5")
    assert result.exit_code == 2
    assert "--caches must be none or block_causal for" in result.stderr.replace("\n", " ")


# ----------------------------------------------------------------------------------------------------------------------
# What a cache changes.


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exact_cache_does_not_drift(name: str) -> None:
    lm = fdt.load(GOLDEN / name, device="cpu")
    prompts = [list(range(5, 18)), list(range(40))]
    config = lm.options(gen_length=27, block_length=8, sub_block_length=4, stop_at_eos=False)
    record = drift(lm, prompts, config)
    for kind in ("k", "v"):
        assert min(map(min, record[kind])) == pytest.approx(1, abs=1e-6)
    assert "after" in record["regions"] and "before" in record["regions"]
    stale = drift(lm, [list(range(16)), list(range(40))], lm.options(config, sub_block_cache=True))
    assert min(map(min, stale["k"])) < 0.9999
    after, before = (stale["regions"][region]["v"] for region in ("after", "prompt"))
    assert min(x for row in after for x in row if x is not None) < 0.9999
    assert min(x for row in before for x in row if x is not None) == pytest.approx(1, abs=1e-6)


def test_forwards_have_nothing_to_compare_before_a_block() -> None:
    lm = fdt.load(GOLDEN / SDAR, device="cpu")
    with pytest.raises(ValueError, match="keys and values before a block do not depend on it in sdar"):
        similarity(lm, [1, 2, 3], lm.options(gen_length=8, block_length=4), 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_inspects_their_caches(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    arguments = ("--model", folders[name], "--device", "cpu", "--problems", 3, "--gen-length", 24, "--drift-prompts", 1)
    result = _run("inspect", *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "inspect.json").read_text())
    caches = ["block_causal", "block_causal+sub_block_cache"] if name == V2 else ["block_causal"]
    assert [record["cache"] for record in report["caches"]] == caches
    assert report["caches"][0]["same"] == 1
    assert "similarity" not in report


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods.


@torch.no_grad()
def _exact(lm: fdt.MaskedDiffusionLM, tokens: list[int], start: int) -> float:
    """The bound over all sets of masks, block by block, with what is before a block known and nothing behind it."""
    length, total = lm.config.block_length or 0, 0.0
    for first in range(start // length * length, len(tokens), length):
        own = list(range(max(first, start), min(first + length, len(tokens))))
        text = tokens[: own[-1] + 1]
        for masked in range(1, len(own) + 1):
            values = []
            for places in combinations(own, masked):
                x = torch.tensor([text])
                x[0, list(places)] = lm.config.mask_id
                logits = lm.logits(x)[0].double().log_softmax(-1)
                values.append(sum(float(logits[max(i - lm.config.shift, 0), text[i]]) for i in places) * len(own) / masked)
            total += sum(values) / len(values) / len(own)
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_likelihoods_are_estimated_block_by_block(name: str) -> None:
    lm = fdt.load(GOLDEN / name, device="cpu")
    length = lm.config.block_length or 0
    context, continuation = list(range(length - 2)), [7, 20, 31, 44]  # Two tokens in a block, two in the next.
    exact = _exact(lm, context + continuation, len(context))
    estimate = MonteCarlo(mc_num=1024, mc_batch=64).log_likelihood(lm, context, continuation)
    assert estimate == pytest.approx(exact, rel=0.02)
    one = MonteCarlo().log_likelihood(lm, context, [7])
    assert one == pytest.approx(_exact(lm, [*context, 7], len(context)), rel=1e-5)
    with pytest.raises(ValueError, match=r"cfg must be 0 for .*, whose attention is block-causal, got 0.5"):
        MonteCarlo(cfg=0.5).log_likelihood(lm, context, continuation)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_what_one_token_a_forward_decodes(name: str) -> None:
    lm = fdt.load(GOLDEN / name, device="cpu")
    length = lm.config.block_length or 0
    context = list(range(length))  # A v2's store commits a block's first token whatever its confidence: none is the surest.
    options: dict[str, Any] = {"sub_block_length": None, "stop_at_eos": False, "strategy": fdt.Threshold(1, strict=True)}
    if name == V2:
        context = context[: length - 3]
    ids = lm.generate([context], gen_length=length - len(context) % length, **options).generated[0].tolist()
    greedy = MonteCarlo()
    assert MASK not in ids and greedy.is_greedy(lm, context, ids)
    assert not greedy.is_greedy(lm, context, [*ids[:-1], (ids[-1] + 1) % 300])


def test_likelihoods_of_shifted_predictions_are_shifted(dream: fdt.MaskedDiffusionLM) -> None:
    logits = dream.logits([[5, 9, 3, 11, MASK]])[0].double().log_softmax(-1)
    assert MonteCarlo().log_likelihood(dream, [5, 9, 3, 11], [7]) == pytest.approx(float(logits[3, 7]), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_harness_decodes_with_the_models_own_options(folders: dict[str, Path], name: str) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    from lm_eval.api.instance import Instance

    from fastdllm_triton.evaluation.lm_eval import FastDLLM

    lm = fdt.load(folders[name], device="cpu")
    model = FastDLLM(
        pretrained=str(folders[name]), device="cpu", threshold=1, sub_block_length=2, sub_block_cache=True, batch_size=2
    )
    wishes = {"until": ["<never>"], "max_gen_toks": 30}
    asked = [Instance("generate_until", {}, (prompt, wishes), i) for i, prompt in enumerate(("Hello?", "What else is there"))]
    strategy = fdt.Threshold(1, strict=name == V2)
    length = -(-30 // lm.defaults.block_length) * lm.defaults.block_length
    options: dict[str, Any] = {"gen_length": length, "sub_block_length": 2, "sub_block_cache": True, "strategy": strategy}
    expected = lm.generate([request.args[0] for request in asked], **options).texts
    assert model.generate_until(asked, disable_tqdm=True) == expected
    (value,) = model.loglikelihood([Instance("loglikelihood", {}, ("Hello", " there"), 0)], disable_tqdm=True)
    assert value[0] == MonteCarlo(seed=0).log_likelihood(lm, lm.encode("Hello"), lm.encode(" there"))
    with pytest.raises(ValueError, match="cache must be none or block_causal for"):
        FastDLLM(pretrained=str(folders[name]), device="cpu", cache="dual")
    with pytest.raises(ValueError, match="cfg must be 0 for"):
        FastDLLM(pretrained=str(folders[name]), device="cpu", cfg=1.0)
