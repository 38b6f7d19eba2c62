"""Rows of a batch that stand at different blocks: none waits, none feels the others, finished ones leave."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.engine import buckets as shapes
from fastdllm_triton.engine import engine, generation, memory
from fastdllm_triton.engine.program import Program
from fastdllm_triton.tiny.problems import problems

CACHES = ("none", "prefix", "dual")
OPTIONS: dict[str, Any] = {"gen_length": 32, "block_length": 8, "strategy": fdt.Threshold(0.6), "stop_at_eos": False}

#: The window ideas one by one and together; each is a policy of its own, so each must leave the rows to themselves.
KNOBS: list[dict[str, Any]] = [
    {"cache": "none", "suffix_window": 4},
    {"cache": "prefix", "suffix_window": 8},
    {"cache": "dual", "suffix_window": 0},
    {"cache": "prefix", "look_back": 3},
    {"cache": "dual", "look_back": 9, "look_ahead": 5},
    {"cache": "dual", "prompt_refresh": 2},
    {"cache": "prefix", "prompt_refresh": 3, "refresh_every": 2},
    {"cache": "dual", "prompt_refresh": 2, "suffix_window": 6, "look_back": 2, "look_ahead": 8, "refresh_every": 3},
]


def _ragged(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


def _same(batch: fdt.GenerationOutput, lm: fdt.MaskedDiffusionLM, prompts: list[list[int]], **options: Any) -> None:
    for row, prompt in enumerate(prompts):
        alone = lm.generate([prompt], **options)
        assert batch.generated[row].tolist() == alone.generated[0].tolist()
        assert int(batch.row_forwards[row]) == alone.nfe
        assert batch.sequences[row, -len(prompt) - 32 : -32].tolist() == prompt


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lockstep", [True, False])
def test_a_row_gets_the_tokens_it_gets_alone(golden: fdt.MaskedDiffusionLM, cache: str, lockstep: bool) -> None:
    prompts = _ragged((3, 17, 1, 9, 5, 30))
    batch = golden.generate(prompts, cache=cache, lockstep=lockstep, **OPTIONS)
    _same(batch, golden, prompts, cache=cache, **OPTIONS)


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items()))
def test_a_row_gets_the_tokens_it_gets_alone_whatever_its_windows(golden: fdt.MaskedDiffusionLM, knobs: dict[str, Any]) -> None:
    prompts = _ragged((3, 17, 1, 9))
    batch = golden.generate(prompts, **knobs, **OPTIONS)
    _same(batch, golden, prompts, **knobs, **OPTIONS)


def test_no_row_waits_for_the_block_of_another(tiny: fdt.MaskedDiffusionLM) -> None:
    prompts = [tiny.encode(problem.prompt) for problem in islice(problems(5, test=True), 12)]
    options: dict[str, Any] = {"gen_length": 48, "block_length": 8, "strategy": fdt.Threshold(0.9)}
    free = tiny.generate(prompts, **options)
    lockstep = tiny.generate(prompts, lockstep=True, **options)
    assert free.sequences.tolist() == lockstep.sequences.tolist()
    assert free.row_forwards.tolist() == lockstep.row_forwards.tolist()
    # An iteration refreshes at most once and steps at most once, so a row is in every one until its end.
    assert free.steps <= int(free.row_forwards.max())
    assert free.steps < lockstep.steps


def test_a_forward_tells_rows_blocks_and_windows(llada: fdt.MaskedDiffusionLM) -> None:
    forwards = list(llada.stream([[1, 2, 3], [4, 5, 6, 7, 8]], cache="dual", **{**OPTIONS, "strategy": fdt.FixedSteps(8)}))
    assert [forward.index for forward in forwards] == list(range(8))
    assert [forward.refresh for forward in forwards] == [True, False] * 4
    assert all(forward.rows == (0, 1) for forward in forwards)
    assert [forward.blocks for forward in forwards] == [(block, block) for block in range(4) for _ in range(2)]
    assert forwards[0].windows == ((2, 37), (0, 37))  # not what lies in front of the shorter prompt
    assert forwards[3].windows == ((13, 21), (13, 21))


def test_refreshes_are_a_sub_batch_of_the_rows_that_begin_a_block(tiny: fdt.MaskedDiffusionLM) -> None:
    prompts = [tiny.encode(problem.prompt) for problem in islice(problems(5, test=True), 6)]
    seen: dict[int, list[int]] = {}
    for forward in tiny.stream(prompts, gen_length=48, block_length=8, strategy=fdt.Threshold(0.9)):
        if forward.refresh:
            for row, block in zip(forward.rows, forward.blocks, strict=True):
                seen.setdefault(row, []).append(block)
    assert sorted(seen) == list(range(6))
    assert all(blocks == list(range(len(blocks))) for blocks in seen.values())  # each block of each row once


def test_finished_rows_leave_the_batch(tiny: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = tiny.network.forward

    def spied(ids: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(len(ids))
        return forward(ids, *args, **options)

    monkeypatch.setattr(tiny.network, "forward", spied)
    short, long = (next(p for p in problems(2, test=True) if len(p.changes) == n) for n in (2, 3))
    prompts = [tiny.encode(p.prompt) for p in (short, long, short)]
    out = tiny.generate(prompts, gen_length=48, block_length=8, strategy=fdt.FixedSteps(48), lockstep=True)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (3, 1)
    assert sum(sizes) == int(out.row_forwards.sum())


@pytest.mark.parametrize("knobs", [{"cache": "none"}, {"cache": "prefix"}, {"cache": "dual"}, KNOBS[-1]], ids=str)
def test_buckets_change_nothing(golden: fdt.MaskedDiffusionLM, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _ragged((3, 17, 1, 9, 5))
    exact = golden.generate(prompts, **knobs, **OPTIONS)
    monkeypatch.setattr(engine, "buckets", lambda device: (shapes.rows_bucket, shapes.slots_bucket))
    rounded = golden.generate(prompts, **knobs, **OPTIONS)
    assert rounded.sequences.tolist() == exact.sequences.tolist()
    assert rounded.step_map.tolist() == exact.step_map.tolist()
    assert (rounded.refreshes, rounded.steps) == (exact.refreshes, exact.steps)


@pytest.mark.parametrize(("bucket", "grain", "share"), [(shapes.rows_bucket, 1, 0.5), (shapes.slots_bucket, 64, 0.25)])
def test_a_bucket_holds_what_is_asked_for_and_wastes_little(bucket: shapes.Bucket, grain: int, share: float) -> None:
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(n <= size < n + max(grain, share * n + 1) for n, size in enumerate(sizes, 1))
    assert all(a <= b for a, b in pairwise(sizes))
    assert all(bucket(size) == size for size in set(sizes))
    assert len(set(sizes)) <= 45


def test_rows_buckets() -> None:
    assert [shapes.rows_bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 24]


# ----------------------------------------------------------------------------------------------------------------------
# Windows.


def _windows(lm: fdt.MaskedDiffusionLM, prompt: list[int], **options: Any) -> list[tuple[bool, tuple[int, int]]]:
    """Each forward's kind and window, with two forwards a block of 8 and 24 slots to generate."""
    lengths: dict[str, Any] = {"gen_length": 24, "block_length": 8, "strategy": fdt.FixedSteps(6), "stop_at_eos": False}
    return [(forward.refresh, forward.windows[0]) for forward in lm.stream([prompt], **options, **lengths)]


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"cache": "none"}, [(0, 34), (0, 34), (0, 34), (0, 34), (0, 34), (0, 34)]),
        ({"cache": "none", "suffix_window": 4}, [(0, 22), (0, 22), (0, 30), (0, 30), (0, 34), (0, 34)]),
        ({"cache": "prefix", "suffix_window": 4}, [(0, 22), (10, 22), (0, 30), (18, 30), (0, 34), (26, 34)]),
        ({"cache": "dual", "suffix_window": 0}, [(0, 18), (10, 18), (0, 26), (18, 26), (0, 34), (26, 34)]),
        ({"cache": "prefix", "look_back": 3}, [(0, 34), (7, 34), (0, 34), (15, 34), (0, 34), (23, 34)]),
        ({"cache": "dual", "look_back": 2, "look_ahead": 5}, [(0, 34), (8, 23), (0, 34), (16, 31), (0, 34), (24, 34)]),
        ({"cache": "dual", "prompt_refresh": 2}, [(0, 34), (10, 18), (10, 34), (18, 26), (0, 34), (26, 34)]),
        ({"cache": "dual", "prompt_refresh": 5, "suffix_window": 2}, [(0, 20), (10, 18), (10, 28), (18, 26), (10, 34), (26, 34)]),
    ],
    ids=str,
)
def test_the_windows_of_every_policy(
    llada: fdt.MaskedDiffusionLM, options: dict[str, Any], windows: list[tuple[int, int]]
) -> None:
    found = _windows(llada, list(range(10)), **options)
    assert [window for _, window in found] == windows
    assert [refresh for refresh, _ in found] == [True, False] * 3


def test_a_suffix_window_attends_what_a_shorter_sequence_would(llada: fdt.MaskedDiffusionLM) -> None:
    prompt = [[5, 9, 2, 7]]
    options: dict[str, Any] = {"block_length": 8, "strategy": fdt.Threshold(0.6), "stop_at_eos": False}
    cut = llada.generate(prompt, gen_length=32, suffix_window=8, **options)
    short = llada.generate(prompt, gen_length=16, **options)
    assert cut.generated[0, :8].tolist() == short.generated[0, :8].tolist()
    assert cut.confidence[0, :8].tolist() == pytest.approx(short.confidence[0, :8].tolist(), rel=1e-5)


def test_windows_as_wide_as_the_sequence_are_no_cache(golden: fdt.MaskedDiffusionLM) -> None:
    prompts = _ragged((6, 11))
    plain = golden.generate(prompts, cache="none", lockstep=True, **OPTIONS)
    wide = golden.generate(prompts, cache="dual", look_back=99, look_ahead=99, lockstep=True, **OPTIONS)
    assert wide.sequences.tolist() == plain.sequences.tolist()
    assert wide.step_map.tolist() == plain.step_map.tolist()


@pytest.mark.parametrize("options", [{"suffix_window": 99}, {"prompt_refresh": 1}, {"look_back": 0}], ids=str)
def test_a_policy_that_leaves_nothing_out_changes_nothing(golden: fdt.MaskedDiffusionLM, options: dict[str, Any]) -> None:
    prompts = _ragged((6, 11))
    assert torch.equal(golden.generate(prompts, **options, **OPTIONS).sequences, golden.generate(prompts, **OPTIONS).sequences)


# ----------------------------------------------------------------------------------------------------------------------
# Streams, interrupts, memory.


def test_a_stream_tells_what_each_forward_committed(golden: fdt.MaskedDiffusionLM) -> None:
    prompts = _ragged((6, 3, 8))
    generation = golden.stream(prompts, **OPTIONS)
    tokens: dict[tuple[int, int], tuple[int, float, int]] = {}
    for forward in generation:
        assert forward.committed
        for row, position, token, sure in forward.committed:
            assert (row, position) not in tokens
            tokens[row, position] = token, sure, forward.index
    out = generation.output()
    assert len(tokens) == out.committed == 3 * 32
    for (row, position), (token, sure, index) in tokens.items():
        assert int(out.generated[row, position]) == token
        assert float(out.confidence[row, position]) == sure
        assert int(out.step_map[row, position]) == index
    whole = golden.generate(prompts, **OPTIONS)
    assert torch.equal(out.sequences, whole.sequences)
    assert list(generation) == []


def test_a_stream_can_be_left_and_the_model_used_again(golden: fdt.MaskedDiffusionLM) -> None:
    prompts = _ragged((6, 3))
    before = golden.generate(prompts, **OPTIONS).sequences
    generation = golden.stream(prompts, **OPTIONS)
    next(generation)
    left = generation.output()
    mask = golden.config.mask_id
    assert (left.generated == mask).any()
    assert left.committed == int((left.generated != mask).sum()) > 0
    other = golden.stream(prompts, **OPTIONS)  # two at once
    next(other)
    del generation
    list(other)
    assert torch.equal(other.output().sequences, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_generation_gives_the_tokens_so_far(golden: fdt.MaskedDiffusionLM, error: type[BaseException]) -> None:
    prompts = _ragged((6, 3))

    def stop(forward: generation.Forward) -> None:
        if forward.index == 3:
            raise error

    with pytest.raises(error) as caught:
        golden.generate(prompts, callback=stop, **OPTIONS)
    output = caught.value.output  # type: ignore[attr-defined]
    assert output.nfe == 4
    assert int(output.step_map.max()) == 3
    whole = golden.generate(prompts, **OPTIONS)
    known = output.step_map >= 0
    assert torch.equal(output.generated[known], whole.generated[known])
    assert (output.generated[~known] == golden.config.mask_id).all()


def test_too_little_memory_is_an_error_before_the_first_forward(
    llada: fdt.MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = memory.Memory.of(llada.config, 1, 35, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * (one.cache + one.workspace))
    llada.generate([[1, 2, 3]] * 3, **OPTIONS)
    monkeypatch.setattr(llada.network, "forward", None)
    with pytest.raises(MemoryError, match=r"4 rows of 35 slots .* need [\d,]+ bytes .* the largest batch that fits is 3"):
        llada.generate([[1, 2, 3]] * 4, **OPTIONS)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    with pytest.raises(MemoryError, match="not even one row fits"):
        llada.generate([[1, 2, 3]], **OPTIONS)


def test_the_estimate_of_memory_counts_what_is_allocated(golden: fdt.MaskedDiffusionLM) -> None:
    c = golden.config
    estimate = memory.Memory.of(c, 3, 40, 4)
    weights = {t.data_ptr(): t.nbytes for t in _parameters(golden)}
    assert estimate.weights == sum(weights.values())
    cache = golden.network.new_cache(torch.zeros(3, dtype=torch.int32), 40)
    assert estimate.cache == cache.k.nbytes + cache.v.nbytes
    assert estimate.total == estimate.weights + estimate.cache + estimate.workspace


def _parameters(lm: fdt.MaskedDiffusionLM) -> list[Tensor]:
    w = lm.network.weights
    fused = [t.weight for layer in w.layers for t in (layer.qkv, layer.attn_out, layer.gate_up, layer.down)]
    norms = [t for layer in w.layers for t in (layer.attn_norm, layer.mlp_norm)]
    biases = [layer.qkv_bias for layer in w.layers if layer.qkv_bias is not None]
    return [w.embedding, w.head, w.final_norm, *fused, *norms, *biases]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suffix_window": -1}, "suffix_window must be None or an integer of 0 or more, got -1"),
        ({"look_back": -1}, "look_back must be an integer of 0 or more, got -1"),
        ({"look_ahead": 1.5}, "look_ahead must be an integer of 0 or more, got 1.5"),
        ({"prompt_refresh": 0}, "prompt_refresh must be None or an integer of 1 or more, got 0"),
        ({"look_ahead": 2, "cache": "prefix"}, "look_ahead means something for cache = dual only, got cache = 'prefix'"),
        ({"look_back": 2, "cache": "none"}, "look_back means something for cache = prefix or dual only"),
        ({"prompt_refresh": 2, "cache": "none"}, "prompt_refresh means something for cache = prefix or dual only"),
    ],
)
def test_bad_windows(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdt.GenerationConfig(**options)


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_after_the_end_is_a_no_op(golden: fdt.MaskedDiffusionLM, cache: str) -> None:
    generation = golden.stream(_ragged((6, 3)), cache=cache, lockstep=True, **OPTIONS)
    batch = generation.batch
    next(generation)
    while not batch.state.done.all():  # up to the end of the first block, before anything moves on
        next(generation)
    before = [tensor.clone() for tensor in (batch.x, batch.cache.k, batch.cache.v, batch.state.step_map, batch.state.step)]
    program = Program.of(generation._run.requests)
    with torch.no_grad():
        batch.run(golden.network, batch.step_shape(program, 0, 2, batch.slots if cache != "dual" else 8, 16))
    after = (batch.x, batch.cache.k, batch.cache.v, batch.state.step_map, batch.state.step)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
