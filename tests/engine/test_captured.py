"""Captured forwards against plain ones, in an emulator of what a CUDA graph does: tokens, step map and confidence, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cuda_graphs import Graph, emulate
from conftest import GOLDEN, GOLDEN_DREAM

import fastdllm_triton as fdt
from fastdllm_triton.engine.runner import ModelRunner

OPTIONS: dict[str, Any] = {"gen_length": 32, "block_length": 8, "strategy": fdt.Threshold(0.6), "stop_at_eos": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "dual": {"cache": "dual"},
    "sampled": {"cache": "dual", "temperature": 1.0, "seed": 5},
    "prefix-entropy": {"cache": "prefix", "strategy": fdt.EntropyBudget(0.5)},
    "none-factor": {"cache": "none", "strategy": fdt.Factor(1.0)},
    "windows": {
        "cache": "dual",
        "strategy": fdt.FixedSteps(16, score="random"),
        "look_back": 2,
        "look_ahead": 3,
        "suffix_window": 5,
        "prompt_refresh": 2,
    },
    "refreshes": {"cache": "prefix", "refresh_every": 3, "lockstep": True},
    "rounded": {"cache": "dual", "forbidden": (3, 4), "logits_dtype": torch.bfloat16},
    "ends": {"cache": "dual", "stop_at_eos": True},
}


def _prompts(rows: int, step: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randint(0, 300, (3 + step * i % 19,), generator=generator).tolist() for i in range(rows)]


def _plain(model: fdt.MaskedDiffusionLM, prompts: list[list[int]], **options: Any) -> fdt.GenerationOutput:
    """The same sizes without captures, and nothing kept of it."""
    model.buffers.use_cuda_graphs = False
    out = model.generate(prompts, **options)
    model.buffers.use_cuda_graphs = True
    model.release()
    return out


def _steps(runner: ModelRunner) -> dict[Any, Graph]:
    """The captured steps."""
    return {key: graph for key, graph in runner._graphs._graphs.items() if key.kind == "step"}


def _same(a: fdt.GenerationOutput, b: fdt.GenerationOutput) -> bool:
    same = torch.equal(a.sequences, b.sequences) and torch.equal(a.step_map, b.step_map)
    return same and torch.equal(a.confidence.nan_to_num(-1), b.confidence.nan_to_num(-1)) and a.nfe == b.nfe


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "rows", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)], ids=lambda rows: f"{rows}-rows"
)
@pytest.mark.parametrize("name", ["llada-gqa", GOLDEN_DREAM])
def test_captured_forwards_decode_what_plain_ones_do(
    name: str, rows: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fdt.load(GOLDEN / name, device="cpu", backend="reference")
    options, prompts, others = OPTIONS | variant, _prompts(rows, 7), _prompts(rows, 5)[::-1]
    emulate(monkeypatch, model)
    plain, plain_others = _plain(model, prompts, **options), _plain(model, others, **options)
    for _ in range(2):  # captured here, replayed there
        assert _same(model.generate(prompts, **options), plain)
        assert _same(model.generate(others, **options), plain_others)
    (batch,) = model.buffers._runners
    assert batch._graphs is not None and len(batch._graphs) > 0
    kinds = {key.kind for key, graph in batch._graphs._graphs.items() if graph.replays}
    assert kinds == ({"step"} if options["cache"] == "none" else {"step", "refresh"})


BLOCK_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("fast-dllm-v2", {}),
    "v2-sub-blocks": ("fast-dllm-v2", {"sub_block_length": 4}),
    "v2-sub-block-cache": ("fast-dllm-v2", {"sub_block_length": 4, "sub_block_cache": True}),
    "v2-sub-block-cache-sampled": (
        "fast-dllm-v2", {"sub_block_length": 2, "sub_block_cache": True, "temperature": 1.0, "seed": 3, "stop_at_eos": True},
    ),
    "v2-none": ("fast-dllm-v2", {"cache": "none"}),
    "sdar": ("sdar", {}),
    "sdar-steps": ("sdar", {"strategy": fdt.DenoisingSteps(3, 0.5), "stop_at_eos": True}),
    "sdar-separate-store": ("sdar", {"separate_store": True, "strategy": fdt.DenoisingSteps(3, score="leftmost")}),
    "sdar-none": ("sdar", {"cache": "none", "temperature": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), BLOCK_CAUSAL.values(), ids=BLOCK_CAUSAL)
@pytest.mark.parametrize("rows", [1, 3, pytest.param(5, marks=pytest.mark.slow)], ids=lambda rows: f"{rows}-rows")
def test_captured_forwards_of_block_causal_models_decode_what_plain_ones_do(
    name: str, rows: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that end at, before and behind the end of a block, and are shorter than one."""
    model = fdt.load(GOLDEN / name, device="cpu", backend="reference")
    options = OPTIONS | {"cache": "block_causal", "gen_length": 27} | variant
    lengths = ((9, 3, 16, 41, 8), (17, 24, 1, 30, 5))
    prompts, others = ([list(range(7 * i, 7 * i + n)) for i, n in enumerate(some[:rows])] for some in lengths)
    emulate(monkeypatch, model)
    plain, plain_others = _plain(model, prompts, **options), _plain(model, others, **options)
    for _ in range(2):  # captured here, replayed there
        assert _same(model.generate(prompts, **options), plain)
        assert _same(model.generate(others, **options), plain_others)
    (batch,) = model.buffers._runners
    assert batch._graphs is not None
    kinds = {key.kind for key, graph in batch._graphs._graphs.items() if graph.replays}
    expected = {"step"}
    if options["cache"] != "none" or name == "fast-dllm-v2":
        expected.add("refresh")
    if options.get("sub_block_cache"):
        expected.add("block_step")
    assert kinds == expected


def test_values_that_are_data_on_the_device_need_no_capture_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    changes: list[dict[str, Any]] = [
        {"strategy": fdt.Threshold(0.2)},
        {"seed": 9, "gen_length": 16},
        {"strategy": fdt.Threshold(0.9), "look_ahead": 0},
    ]
    emulate(monkeypatch, model)
    expected = [_plain(model, [[5, 6, 7]], **OPTIONS | change) for change in changes]
    model.generate([[5, 6, 7, 8, 9]], **OPTIONS)
    (batch,) = model.buffers._runners
    steps = _steps(batch)
    for change, plain in zip(changes, expected, strict=True):
        assert _same(model.generate([[5, 6, 7]], **OPTIONS | change), plain)
    assert model.buffers._runners == [batch]
    assert _steps(batch) == steps


def test_prompts_of_other_lengths_neither_allocate_nor_capture_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    prompts = [[[1] * 100], [[2] * 5], [[3] * 70], [[4] * 100, [5] * 3]]
    emulate(monkeypatch, model)
    expected = [_plain(model, prompt, **OPTIONS) for prompt in prompts]
    model.generate([[1] * 100, [2] * 50], **OPTIONS)
    (batch,) = model.buffers._runners
    for prompt, plain in zip(prompts, expected, strict=True):
        assert _same(model.generate(prompt, **OPTIONS), plain)
    assert model.buffers._runners == [batch]
    assert {(key.first, key.last, key.window, key.predicted) for key in _steps(batch)} == {(0, 2, 8, 16), (0, 1, 8, 8)}


def test_the_prefix_cache_captures_a_bounded_number_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    options = OPTIONS | {"cache": "prefix", "gen_length": 256, "strategy": fdt.FixedSteps(128)}
    emulate(monkeypatch, model)
    plain = _plain(model, [[5, 6, 7]], **options)
    assert _same(model.generate([[5, 6, 7]], **options), plain)
    (batch,) = model.buffers._runners
    windows = {key.window for key in _steps(batch)}
    assert {window for window in windows if window > 128} <= {144, 160, 176, 192, 208, 224, 240, 256}
    assert len(windows) <= 24 < 256 // 8


def test_a_forward_that_commits_nothing_is_an_error_and_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    emulate(monkeypatch, model)
    monkeypatch.setattr(Graph, "replay", lambda self: None)  # what a graph of the wrong device does
    with pytest.raises(RuntimeError, match=r"forward \d+ committed nothing in row 0, .* try FASTDLLM_GRAPHS=0"):
        model.generate([[5, 6, 7]], **OPTIONS | {"strategy": fdt.FixedSteps(32)})
