"""What decoding promises: rows that do not feel each other, caches that are windows, a free end, honest records."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.engine.cuda_graphs import CUDAGraphRunner
from fastdllm_triton.engine.program import Program
from fastdllm_triton.engine.request import batch_requests
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.tiny.problems import problems

CACHES = ("none", "prefix", "dual")
STRATEGIES = [
    fdt.FixedSteps(16),
    fdt.FixedSteps(8, score="random"),
    fdt.FixedSteps(8, score="margin"),
    fdt.Threshold(0.6),
    fdt.Threshold(0.4, score="margin"),
    fdt.Factor(1.0),
    fdt.EntropyBudget(1.5),
    fdt.EntropyBudget(1.5, score="confidence"),
]


def _ragged(lm: fdt.MaskedDiffusionLM, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


def _id(strategy: fdt.Strategy) -> str:
    return f"{type(strategy).__name__}-{strategy.score}"


class Spy:
    """Records the calls of an op, and passes them on."""

    def __init__(self, call: Any) -> None:
        self.call, self.calls = call, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=_id)
def test_a_row_of_a_ragged_batch_gets_the_tokens_it_gets_alone(
    golden: fdt.MaskedDiffusionLM, cache: str, strategy: fdt.Strategy
) -> None:
    prompts = _ragged(golden, (3, 17, 1, 9))
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": cache, "strategy": strategy, "stop_at_eos": False}
    batch = golden.generate(prompts, seed=[5, 6, 7, 8], **options)
    for row, prompt in enumerate(prompts):
        alone = golden.generate([prompt], seed=5 + row, **options)
        assert batch.generated[row].tolist() == alone.generated[0].tolist()
        assert int(batch.row_forwards[row]) == alone.nfe
        torch.testing.assert_close(batch.confidence[row], alone.confidence[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache", CACHES)
def test_a_sampled_row_depends_on_its_seed_and_not_on_its_batch(golden: fdt.MaskedDiffusionLM, cache: str) -> None:
    prompts = _ragged(golden, (4, 11, 7))
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": cache, "temperature": 4.0, "stop_at_eos": False}
    batch = golden.generate(prompts, seed=3, **options)
    for row, prompt in enumerate(prompts):
        assert golden.generate([prompt], seed=3 + row, **options).generated[0].tolist() == batch.generated[row].tolist()
    other = golden.generate(prompts, seed=100, **options)
    assert other.generated.tolist() != batch.generated.tolist()
    twins = golden.generate([prompts[0]] * 2, seed=3, **options).generated
    assert twins[0].tolist() != twins[1].tolist()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=_id)
def test_dual_with_a_refresh_before_every_step_is_no_cache(golden: fdt.MaskedDiffusionLM, strategy: fdt.Strategy) -> None:
    prompts = _ragged(golden, (5, 12))
    options: dict[str, Any] = {"gen_length": 16, "block_length": 16, "strategy": strategy, "stop_at_eos": False}
    plain = golden.generate(prompts, cache="none", **options)
    fresh = golden.generate(prompts, cache="dual", refresh_every=1, **options)
    assert fresh.sequences.tolist() == plain.sequences.tolist()
    assert fresh.step_map.tolist() == plain.step_map.tolist()
    assert fresh.steps == 0
    assert fresh.refreshes == plain.nfe


def test_refresh_every_counts_forwards_within_a_block(llada: fdt.MaskedDiffusionLM) -> None:
    kinds: list[tuple[int, bool]] = []
    llada.generate(
        [[1, 2, 3]],
        gen_length=16,
        block_length=8,
        strategy=fdt.FixedSteps(16),
        refresh_every=3,
        stop_at_eos=False,
        callback=lambda forward: kinds.append((forward.blocks[0], forward.refresh)),
    )
    assert kinds == [(block, step % 3 == 0) for block in range(2) for step in range(8)]


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_recomputes_its_window_and_nothing_else(llada: fdt.MaskedDiffusionLM, cache: str) -> None:
    network = llada.network
    caches: list[Any] = []
    windows: list[tuple[int, int]] = []
    forward, new_cache = network.forward, network.new_cache

    def spied(ids: Tensor, window_start: Tensor, kv: Any, rows: Tensor, **options: Any) -> Tensor:
        first = int(window_start[0])
        before = kv.k.clone()
        hidden = forward(ids, window_start, kv, rows, **options)
        windows.append((first, first + ids.shape[1]))
        if len(windows) > 1:  # Before the first forward the buffers hold anything.
            torch.testing.assert_close(kv.k[..., :first, :], before[..., :first, :], rtol=0, atol=0)
            torch.testing.assert_close(
                kv.k[..., first + ids.shape[1] :, :], before[..., first + ids.shape[1] :, :], rtol=0, atol=0
            )
        return hidden

    network.forward = spied  # type: ignore[method-assign]
    network.new_cache = lambda *a: caches.append(new_cache(*a)) or caches[-1]  # type: ignore[method-assign, func-returns-value]
    llada.generate([[1, 2, 3, 4]], gen_length=16, block_length=8, cache=cache, strategy=fdt.FixedSteps(4), stop_at_eos=False)
    step = {"none": [(0, 20), (0, 20)], "prefix": [(4, 20), (12, 20)], "dual": [(4, 12), (12, 20)]}[cache]
    assert windows == [(0, 20), step[0], (0, 20), step[1]]
    assert len(caches) == 1


def test_only_masked_rows_of_the_block_go_through_the_head(llada: fdt.MaskedDiffusionLM) -> None:
    network = llada.network
    spy = Spy(network.ops.head_statistics)
    network.ops = replace(network.ops, head_statistics=spy)
    llada.generate([[1, 2, 3], [4, 5]], gen_length=16, block_length=8, strategy=fdt.FixedSteps(8), stop_at_eos=False)
    assert [len(args[0]) for args, _ in spy.calls] == [16, 12, 8, 4] * 2


def test_where_steps_are_captured_few_numbers_of_predictions_serve(llada: fdt.MaskedDiffusionLM) -> None:
    config = fdt.GenerationConfig(gen_length=32, block_length=32)
    runner = ModelRunner(llada.network, 8, 40)
    program = Program.of(batch_requests([[1]] * 8, None, config, llada.config))

    def predictions(masked: int, rows: int = 8) -> int:
        return runner._predictions(rows, program, masked)

    assert (predictions(256), predictions(100), predictions(0)) == (256, 100, 1)
    runner._graphs = CUDAGraphRunner(torch.device("cpu"), fall_back=False)
    assert [predictions(masked) for masked in (256, 129, 128, 65, 64, 1, 0)] == [256, 256, 128, 128, 64, 64, 64]
    assert [predictions(0, rows) for rows in (1, 2, 3)] == [32, 64, 96]


@pytest.mark.parametrize("cache", CACHES)
def test_masks_in_the_prompt_stay_masks(golden: fdt.MaskedDiffusionLM, cache: str) -> None:
    mask = golden.config.mask_id
    prompt = [5, mask, 7, mask]
    out = golden.generate([prompt], gen_length=16, block_length=8, cache=cache, stop_at_eos=False)
    assert out.sequences[0, :4].tolist() == prompt
    assert mask not in out.generated


def test_the_mask_is_never_committed_even_where_it_is_the_likeliest(llada: fdt.MaskedDiffusionLM) -> None:
    mask = llada.config.mask_id
    llada.network.weights.head[mask] *= 40
    likeliest = llada.logits(torch.tensor([[1, 2, 3] + [mask] * 16])).argmax(-1)
    assert (likeliest[0, 3:] == mask).any()
    out = llada.generate([[1, 2, 3]], gen_length=16, block_length=8, strategy=fdt.Threshold(0.5), stop_at_eos=False)
    assert mask not in out.generated


def test_forbidden_tokens_are_never_committed(llada: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"gen_length": 32, "block_length": 8, "stop_at_eos": False}
    free = set(llada.generate([[1, 2, 3]], **options).generated[0].tolist())
    banned = sorted(free)[::2]
    bound = set(llada.generate([[1, 2, 3]], forbidden=banned, **options).generated[0].tolist())
    assert bound
    assert not bound & set(banned)


def test_a_pruned_choice_of_one_token_is_certain(llada: fdt.MaskedDiffusionLM) -> None:
    allowed = 17
    banned = [token for token in range(llada.config.vocab_size) if token != allowed]
    out = llada.generate([[1, 2, 3]], gen_length=8, block_length=8, forbidden=banned, stop_at_eos=False)
    assert out.generated.tolist() == [[allowed] * 8]
    assert out.nfe == 1
    assert out.confidence.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", [fdt.FixedSteps(48), fdt.Threshold(0.9), fdt.Factor(1.0)], ids=_id)
def test_stopping_at_eos_changes_nothing_before_it_and_saves_the_rest(
    tiny: fdt.MaskedDiffusionLM, cache: str, strategy: fdt.Strategy
) -> None:
    short = (problem for problem in problems(11, test=True) if len(problem.changes) == 2)
    prompts = [tiny.encode(problem.prompt) for problem in islice(short, 6)]
    options: dict[str, Any] = {"gen_length": 48, "block_length": 8, "cache": cache, "strategy": strategy}
    stopped = tiny.generate(prompts, stop_at_eos=True, **options)
    full = tiny.generate(prompts, stop_at_eos=False, **options)
    eos = tiny.config.eos_ids[0]
    for row in range(len(prompts)):
        ids = stopped.ids(row)
        assert ids == full.ids(row)
        assert len(ids) < 48
        end = (len(ids) // 8 + 1) * 8  # The block with the end token is decoded to its end.
        assert stopped.generated[row, :end].tolist() == full.generated[row, :end].tolist()
        assert stopped.generated[row, end:].tolist() == [eos] * (48 - end)
        assert (stopped.step_map[row, :end] >= 0).all()
        assert (stopped.step_map[row, end:] == -1).all()
        assert stopped.confidence[row, end:].isnan().all()
        assert int(stopped.row_forwards[row]) == int((full.step_map[row, :end]).unique().numel())
    assert stopped.texts == full.texts
    assert stopped.nfe < full.nfe
    assert full.committed == 48 * len(prompts)


def test_a_row_that_ended_waits_without_taking_part(tiny: fdt.MaskedDiffusionLM) -> None:
    short, long = (next(p for p in problems(2, test=True) if len(p.changes) == n) for n in (2, 3))
    prompts = [tiny.encode(short.prompt), tiny.encode(long.prompt)]
    options: dict[str, Any] = {"gen_length": 48, "block_length": 8, "strategy": fdt.FixedSteps(48)}
    batch = tiny.generate(prompts, **options)
    alone = [tiny.generate([prompt], **options) for prompt in prompts]
    assert batch.row_forwards.tolist() == [out.nfe for out in alone]
    assert alone[0].nfe < alone[1].nfe == batch.nfe


def test_the_records_tell_what_happened(golden: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"gen_length": 32, "block_length": 8, "strategy": fdt.Threshold(0.7), "stop_at_eos": False}
    out = golden.generate(_ragged(golden, (6, 3)), lockstep=True, **options)
    assert out.nfe == out.refreshes + out.steps
    assert out.refreshes == 4
    assert out.committed == 64
    assert out.tokens_per_forward == pytest.approx(64 / int(out.row_forwards.sum()))
    assert out.seconds > 0
    for row in range(2):
        times = [out.step_map[row, first : first + 8] for first in range(0, 32, 8)]
        assert all(int(a.max()) < int(b.min()) for a, b in pairwise(times))
        for forward in range(out.nfe):
            sure = out.confidence[row][out.step_map[row] == forward]
            assert len(sure) <= 1 or (sure >= 0.7).all()
    assert ((out.confidence > 0) & (out.confidence <= 1)).all()


def test_the_confidence_is_the_models_probability(llada: fdt.MaskedDiffusionLM) -> None:
    mask = llada.config.mask_id
    out = llada.generate([[1, 2, 3]], gen_length=8, block_length=8, cache="none", strategy=fdt.FixedSteps(8), stop_at_eos=False)
    x = torch.tensor([[1, 2, 3] + [mask] * 8])
    for forward in range(8):
        slot = 3 + int((out.step_map[0] == forward).nonzero())
        logits = llada.logits(x).double()
        logits[..., mask] = -torch.inf
        p = logits.softmax(-1)[0]
        p[x[0] != mask] = 0
        assert slot == int(p.max(-1).values.argmax())
        token = int(out.sequences[0, slot])
        assert token == int(p[slot].argmax())
        assert float(out.confidence[0, slot - 3]) == pytest.approx(float(p[slot, token]), rel=1e-5)
        x[0, slot] = token


def test_the_callback_sees_every_forward(llada: fdt.MaskedDiffusionLM) -> None:
    seen: list[tuple[int, int]] = []
    out = llada.generate(
        [[1, 2, 3]],
        gen_length=16,
        block_length=8,
        callback=lambda forward: seen.append((forward.index, int((forward.x == llada.config.mask_id).sum()))),
        stop_at_eos=False,
    )
    assert [index for index, _ in seen] == list(range(out.nfe))
    left = [16, *(count for _, count in seen)]
    assert all(after < before for before, after in pairwise(left))
    assert left[-1] == 0


def test_nan_logits_are_an_error_that_names_the_forward_and_the_row(llada: fdt.MaskedDiffusionLM) -> None:
    llada.network.weights.embedding[9] = torch.nan
    with pytest.raises(FloatingPointError, match=r"forward 0 .* row 1"):
        llada.generate([[1, 2, 3], [9, 2, 3]], gen_length=8, block_length=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_decode(dtype: torch.dtype) -> None:
    lm = fdt.load("tiny", dtype=dtype)
    problem = next(problems(4, test=True))
    out = lm.generate(problem.prompt, strategy=fdt.FixedSteps(48))
    assert out.texts[0].endswith(f"#### {problem.total}")


def test_a_model_serves_many_shapes_in_a_row(llada: fdt.MaskedDiffusionLM) -> None:
    first = llada.generate([[1, 2, 3]], gen_length=16, block_length=8).sequences.tolist()
    llada.generate([[4] * 9, [5]], gen_length=8, block_length=4)
    assert llada.generate([[1, 2, 3]], gen_length=16, block_length=8).sequences.tolist() == first


@pytest.mark.parametrize(("prompts", "known"), [([[1, 2], [3, 4]], True), ([[1, 2], [3]], False)])
def test_a_refresh_tells_the_attention_what_all_its_rows_attend_where_that_is_the_same(
    llada: fdt.MaskedDiffusionLM, prompts: list[list[int]], known: bool
) -> None:
    spy = Spy(llada.network.ops.window_attention)
    llada.network.ops = replace(llada.network.ops, window_attention=spy)
    llada.generate(prompts, gen_length=8, block_length=8, stop_at_eos=False)
    spans = [kwargs.get("span") for args, kwargs in spy.calls if args[0].shape[1] > 8]
    assert spans == [(0, 10) if known else None] * llada.config.layers
    assert all("span" not in kwargs for args, kwargs in spy.calls if args[0].shape[1] == 8)
