"""Cache policies, played without a model."""

from __future__ import annotations

import json
from itertools import count
from typing import Any, ClassVar, get_args

import pytest
from conftest import GOLDEN, GOLDEN_BLOCK_CAUSAL, GOLDEN_DREAM, GOLDEN_MODELS
from hypothesis import given
from hypothesis import strategies as st

from fastdllm_triton.decoding.cache_policy import (
    CACHE_OPTIONS,
    CACHE_POLICIES,
    BidirectionalCache,
    BlockCausal,
    BlockState,
    CacheName,
    Window,
    cache_policy,
    decoded_blocks,
    play,
)
from fastdllm_triton.decoding.config import GenerationConfig
from fastdllm_triton.decoding.strategies import StrategySpec
from fastdllm_triton.evaluation.grid import CacheSpec, Variant
from fastdllm_triton.tools.roofline import Setting


def test_the_names_are_those_of_the_registry() -> None:
    assert get_args(CacheName) == tuple(CACHE_POLICIES)
    with pytest.raises(ValueError, match=r"cache must be one of none, prefix, dual, block_causal, got 'full'"):
        cache_policy("full")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", GOLDEN_MODELS)
def test_windows_are_those_of_the_recorded_trajectories(model: str) -> None:
    """Recorded slots are counted from where the official code's forward begins. With the windows that the policy gives, they
    must be the slots of the block that is decoded, each of them once.
    """
    played = set()
    for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        rows, prompt, gen_length, length = len(case["prompt"]), len(case["prompt"][0]), case["gen_length"], case["block_length"]
        policy = cache_policy(case["cache"])
        committed: list[set[int]] = [set() for _ in range(rows)]
        ordinal = forwards = 0
        for forward in case["selected"]:
            start = prompt + ordinal * length
            window = policy.next_window(BlockState(prompt, prompt + gen_length, start, start + length, ordinal, forwards))
            for slots, done in zip(forward, committed, strict=True):
                at = {window.start + slot for slot in slots}
                assert at <= set(range(start, min(start + length, window.end))) - done, (case, window)
                done |= at
            forwards += 1
            if all(len(done) == (ordinal + 1) * length for done in committed):  # The rows of the official code wait for all.
                ordinal, forwards = ordinal + 1, 0
        assert all(done == set(range(prompt, prompt + gen_length)) for done in committed)
        played.add(case["cache"])
    assert played == set(_BIDIRECTIONAL)


@pytest.mark.parametrize("model", GOLDEN_BLOCK_CAUSAL)
def test_windows_of_block_causal_models_are_those_of_the_recorded_trajectories(model: str) -> None:
    """Played alone, from the slots that were recorded as committed. Neither a last store nor a last commit follows a block."""
    for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case.get("use_block_cache"):
            continue  # Its windows depend on what is masked; the engine's tests have them.
        prompt, length = len(case["prompt"]), case["block_length"]
        steps = [start for kind, start, _ in case["windows"] if kind == "step"]
        forwards = [steps.count(start) for start in range(prompt // length * length, max(steps, default=0) + 1, length)]
        policy = BlockCausal(separate_store=True)
        # A refresh is the first forward of a block, but of one without anything before it.
        first = prompt < length
        counts = [count + (not first or index > 0) for index, count in enumerate(forwards)]
        gen_length = len(forwards) * length - prompt % length
        windows = [[w.start, len(w)] for w in play(policy, prompt, gen_length, length, counts, causal=length)]
        recorded = [[start, size] for _, start, size in case["windows"]]
        assert windows == recorded[: len(windows)]
        assert all(kind in ("store", "commit") for kind, _, _ in case["windows"][len(windows) :])


def test_dream_takes_one_refresh_a_block_and_steps_for_the_rest() -> None:
    for line in (GOLDEN / GOLDEN_DREAM / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case["cache"] == "none":
            continue
        blocks, length = case["max_new_tokens"] // case["block_length"], case["block_length"]
        policy = GenerationConfig(
            gen_length=case["max_new_tokens"], block_length=length, cache=case["cache"], refresh_commits="first"
        ).cache_policy(shift=True)
        each = [case["nfe"] // blocks + (i < case["nfe"] % blocks) for i in range(blocks)]
        windows = list(play(policy, len(case["prompt"]), case["max_new_tokens"], length, each))
        assert len(windows) == case["nfe"]
        assert sum(window.kind == "refresh" for window in windows) == blocks
        starts = {len(case["prompt"]) + i * length for i in range(blocks)}
        assert {window.start for window in windows if window.kind == "step"} <= starts


_BIDIRECTIONAL = [name for name, kind in CACHE_POLICIES.items() if issubclass(kind, BidirectionalCache)]
_NUMBERS = {
    "refresh_every": st.none() | st.integers(1, 4),
    "prompt_refresh": st.none() | st.integers(1, 4),
    "suffix_window": st.none() | st.integers(0, 40),
    "look_back": st.integers(0, 9),
    "look_ahead": st.integers(0, 9),
}


@st.composite
def _policies(draw: st.DrawFn) -> BidirectionalCache:
    name = draw(st.sampled_from(_BIDIRECTIONAL))
    policy = cache_policy(name, **{option: draw(_NUMBERS[option]) for option in CACHE_OPTIONS[name]})
    assert isinstance(policy, BidirectionalCache)
    return policy


@given(st.booleans(), st.booleans(), st.integers(0, 40), st.integers(1, 40), st.integers(1, 8), st.data())
def test_a_block_causal_step_attends_nothing_that_is_not_written(
    first_from_store: bool, separate_store: bool, prompt: int, gen_length: int, length: int, data: st.DataObject
) -> None:
    """Every block before the one that is decoded has been computed in its final state, and nothing behind it is attended."""
    policy = BlockCausal(first_from_store=first_from_store, separate_store=separate_store)
    bounds = decoded_blocks(prompt, gen_length, length, causal=length)
    assert bounds[0][0] <= prompt < bounds[0][1] and bounds[-1][0] < prompt + gen_length <= bounds[-1][1]
    assert all(start % length == 0 and end == start + length for start, end in bounds)
    forwards = data.draw(st.lists(st.integers(1, 4), min_size=len(bounds), max_size=len(bounds)))
    windows = play(policy, prompt, gen_length, length, forwards, causal=length)
    stored = 0
    for (start, end), taken in zip(bounds, forwards, strict=True):
        for _ in range(taken):
            window = next(windows)
            if window.kind == "refresh":
                assert window.start == stored and window.end == (end if policy.refresh_commits == "rule" else start)
                stored = window.stored
            else:
                assert (window.start, window.end) == (start, end)
            assert stored == start and window.attend_end == window.end
    assert next(windows, None) is None


@given(_policies(), st.integers(0, 20), st.integers(1, 4), st.integers(1, 16), st.data())
def test_every_policy_decodes_its_block_and_reads_only_what_was_written(
    policy: BidirectionalCache, prompt: int, blocks: int, length: int, data: st.DataObject
) -> None:
    forwards = data.draw(st.lists(st.integers(0, 4), min_size=blocks, max_size=blocks))
    windows = play(policy, prompt, blocks * length, length, forwards)
    written = 0  # [0, written) has been computed at least once
    for index, taken in enumerate(forwards):
        start = prompt + index * length
        for done in range(taken):
            window = next(windows)
            assert 0 <= window.start <= start, "the block is in the window"
            assert start + length <= window.end <= window.attend_end <= prompt + blocks * length
            if not policy.reuses:
                assert (window.start, window.end) == (0, window.attend_end)
            assert window.start <= written, "what is attended has been written"
            written = max(written, window.end)
            assert window.attend_end <= written
            assert (window.kind == "refresh") == (done % policy.refresh_every == 0 if policy.refresh_every else done == 0)
    assert next(windows, None) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cache": "none"}, [Window(0, 20, 20, "refresh"), Window(0, 20, 20, "step")]),
        ({"cache": "none", "suffix_window": 2}, [Window(0, 14, 14, "refresh"), Window(0, 14, 14, "step")]),
        ({"cache": "prefix"}, [Window(0, 20, 20, "refresh"), Window(8, 20, 20, "step")]),
        ({"cache": "prefix", "look_back": 3}, [Window(0, 20, 20, "refresh"), Window(5, 20, 20, "step")]),
        ({"cache": "prefix", "look_back": 30}, [Window(0, 20, 20, "refresh"), Window(0, 20, 20, "step")]),
        ({"cache": "dual"}, [Window(0, 20, 20, "refresh"), Window(8, 12, 20, "step")]),
        ({"cache": "dual", "look_ahead": 2}, [Window(0, 20, 20, "refresh"), Window(8, 14, 20, "step")]),
        ({"cache": "dual", "look_ahead": 5, "suffix_window": 3}, [Window(0, 15, 15, "refresh"), Window(8, 15, 15, "step")]),
        ({"cache": "dual", "refresh_every": 1}, [Window(0, 20, 20, "refresh"), Window(0, 20, 20, "refresh")]),
        ({"cache": "dual", "prompt_refresh": 2}, [Window(4, 20, 20, "refresh"), Window(8, 12, 20, "step")]),
    ],
)
def test_the_second_block_of_a_row(options: dict[str, Any], expected: list[Window]) -> None:
    policy = GenerationConfig(gen_length=16, block_length=4, **options).cache_policy()
    blocks = (BlockState(4, 20, 8, 12, ordinal=1, forwards=forwards) for forwards in count())
    assert [policy.next_window(block) for block, _ in zip(blocks, expected, strict=False)] == expected


def test_a_shifted_model_recomputes_the_slot_that_predicts_the_first_of_a_block() -> None:
    block = BlockState(4, 20, 8, 12, ordinal=1, forwards=1)
    config = GenerationConfig(gen_length=16, block_length=4, cache="dual")
    assert config.cache_policy(shift=True).next_window(block) == Window(7, 12, 20, "step")
    first = GenerationConfig(gen_length=16, block_length=4, cache="dual", refresh_commits="first")
    assert first.cache_policy(shift=True).next_window(block) == Window(8, 12, 20, "step")


class Tail(BidirectionalCache):
    """A step recomputes the block and all after it but one slot."""

    name: ClassVar[Any] = "tail"
    reuses = True
    recomputes = "the tail"

    def step(self, block: BlockState) -> Window:
        return Window(block.start, block.length - 1, block.length, "step")


def test_a_new_policy_is_known_to_options_grid_and_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHE_POLICIES, "tail", Tail)  # type: ignore[arg-type]
    monkeypatch.setitem(CACHE_OPTIONS, "tail", ("refresh_every", "suffix_window"))  # type: ignore[arg-type]
    variant = Variant(StrategySpec.parse("fixed:4"), CacheSpec.parse("tail+refresh_every=3"), 8)
    assert variant.config(16).cache_policy() == Tail(refresh_every=3)
    assert variant.cost(10, 16) == (26 + 15) + (26 + 7)  # two forwards a block of 8
    with pytest.raises(ValueError, match=r"an option of refresh_every, suffix_window, got 'tail\+look_back=2'"):
        CacheSpec.parse("tail+look_back=2")
    schedule = Setting(10, 16, 8, "tail", tokens_per_forward=4).schedule()  # type: ignore[arg-type]
    assert [(phase.name, phase.forwards, phase.window, phase.keys) for phase in schedule] == [
        ("refresh", 2, 26, 26),
        ("step", 1, 15, 26),
        ("step", 1, 7, 26),
    ]
