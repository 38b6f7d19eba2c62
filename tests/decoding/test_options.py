"""Bad input is refused before any forward, by an error that names the argument and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm_triton as fdt
from fastdllm_triton.decoding.strategies import SpreadStrategy
from fastdllm_triton.engine.dream.config import DiffusionConfig

MASK = 318


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a forward ran")


@pytest.fixture
def idle(llada: fdt.MaskedDiffusionLM) -> fdt.MaskedDiffusionLM:
    """A model that must not run."""
    llada.network.forward = _never  # type: ignore[method-assign]
    return llada


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, r"gen_length must be an integer of 1 or more, got 0"),
        ({"gen_length": 16.0}, r"gen_length must be an integer"),
        ({"block_length": -4}, r"block_length must be an integer of 1 or more, got -4"),
        ({"gen_length": 20, "block_length": 8}, r"gen_length must be a multiple of block_length = 8, got 20"),
        ({"cache": "both"}, r"cache must be one of none, prefix, dual, block_causal, got 'both'"),
        (
            {"strategy": 0.9},
            r"strategy must be FixedSteps, Threshold, CappedThreshold, DenoisingSteps, .* EntropyBudget or Timesteps, got 0.9",
        ),
        ({"strategy": fdt.FixedSteps(3)}, r"steps must be a multiple of the number of blocks, 2 .*, got 3"),
        ({"strategy": fdt.FixedSteps(1)}, r"steps must be a multiple of the number of blocks, 2 .*, got 1"),
        ({"strategy": fdt.Timesteps(3)}, r"timesteps must be a multiple of the number of blocks, 2 .*, got 3"),
        ({"temperature": -1}, r"temperature must be 0 or more, got -1"),
        ({"temperature": float("nan")}, r"temperature must be 0 or more, got nan"),
        ({"refresh_every": 0}, r"refresh_every must be None or an integer of 1 or more, got 0"),
        ({"forbidden": (320,)}, r"forbidden must be in the vocabulary \[0, 320\), got 320"),
        ({"forbidden": range(320)}, r"forbidden leaves no token"),
        ({"eos_ids": (-1,)}, r"eos_ids must be in the vocabulary \[0, 320\), got -1"),
        ({"eos_ids": ()}, r"eos_ids must name at least one token"),
        ({"mask_id": 999}, r"mask_id must be in the vocabulary \[0, 320\), got 999"),
        ({"seed": [1, 2]}, r"seed must be an integer or one for each of 1 rows, got 2"),
        ({"seed": 2**63}, r"seed must be in \[-2\^63, 2\^63\)"),
        ({"logits_dtype": torch.int8}, r"logits_dtype must be None or a floating-point dtype, got torch.int8"),
        ({"gen_length": True}, r"gen_length must be an integer of 1 or more, got True"),
        ({"gen_length": 4096}, r"gen_length must be below the 4096 tokens that the model takes, got 4096"),
        ({"temperature": 1e300}, r"temperature must be at most 1,000,000, got 1e\+300"),
        ({"temperature": 10**400}, r"temperature must be 0 or more, got 10+\.\.\.$"),
        ({"seed": None}, r"seed must be an integer, or a sequence of one a row, got None"),
        ({"seed": 1.5}, r"seed must be an integer, or a sequence of one a row, got 1.5"),
        ({"seed": True}, r"seed must be an integer, or a sequence of one a row, got True"),
        ({"seed": [True]}, r"seed must be an integer, or a sequence of one a row, got \[True\]"),
        ({"eos_ids": 5}, r"eos_ids must be None or a sequence of token ids, got 5"),
        ({"eos_ids": "ab"}, r"eos_ids must be None or a sequence of token ids, got 'ab'"),
        ({"forbidden": None}, r"forbidden must be a sequence of token ids, got None"),
        ({"forbidden": 5}, r"forbidden must be a sequence of token ids, got 5"),
        (
            {"forbidden": torch.ones(2, 2).long()},
            r"forbidden must be a sequence of token ids, got tensor\(\[\[1, 1\], \[1, 1\]\]\)$",
        ),
        ({"mask_id": "x"}, r"mask_id must be None or an integer of 0 or more, got 'x'"),
        ({"stop_at_eos": "no"}, r"stop_at_eos must be True or False, got 'no'"),
        ({"lockstep": 1}, r"lockstep must be True or False, got 1"),
    ],
)
def test_bad_options(idle: fdt.MaskedDiffusionLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        idle.generate([[1, 2, 3]], **{"gen_length": 16, "block_length": 8, **options})


def test_an_unknown_option(idle: fdt.MaskedDiffusionLM) -> None:
    with pytest.raises(TypeError, match="treshold"):
        idle.generate([[1]], treshold=0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fdt.FixedSteps(0), r"steps must be an integer of 1 or more, got 0"),
        (lambda: fdt.FixedSteps(2.5), r"steps must be an integer of 1 or more, got 2.5"),  # type: ignore[arg-type]
        (lambda: fdt.Threshold(0), r"threshold must be in \(0, 1\], got 0"),
        (lambda: fdt.Threshold(1.01), r"threshold must be in \(0, 1\], got 1.01"),
        (lambda: fdt.Threshold("0.9"), r"threshold must be in \(0, 1\], got '0.9'"),  # type: ignore[arg-type]
        (lambda: fdt.Factor(0.0), r"factor must be above 0, got 0.0"),
        (lambda: fdt.Factor(float("inf")), r"factor must be above 0, got inf"),
        (lambda: fdt.EntropyBudget(-0.1), r"gamma must be 0 or more, got -0.1"),
        (lambda: fdt.Threshold(0.9, score="neg_entropy"), r"score must be one of confidence, margin, random for Threshold"),
        (lambda: fdt.EntropyBudget(1, score="random"), r"score must be one of neg_entropy, confidence, margin for EntropyBudget"),
        (lambda: fdt.Timesteps(0), r"timesteps must be an integer of 1 or more, got 0"),
        (lambda: fdt.CappedThreshold(0), r"capped_steps must be an integer of 1 or more, got 0"),
        (lambda: fdt.CappedThreshold(8, 1.5), r"threshold must be in \(0, 1\], got 1.5"),
        (lambda: fdt.DenoisingSteps(0), r"denoising_steps must be an integer of 1 or more, got 0"),
        (lambda: fdt.DenoisingSteps(4, 1.5), r"threshold must be None or in \(0, 1\], got 1.5"),
        (lambda: fdt.DenoisingSteps(4, 0.9, score="leftmost"), r"threshold must be None with score='leftmost', .*, got 0.9"),
        (lambda: fdt.DenoisingSteps(4, score="margin"), r"score must be one of confidence, leftmost for Denoising"),
        (lambda: fdt.Threshold(0.9, strict=1), r"strict must be True or False, got 1"),
        (lambda: fdt.CappedThreshold(8, score="neg_entropy"), r"score must be one of confidence, margin, random for Capped"),
        (lambda: fdt.Timesteps(2.5), r"timesteps must be an integer of 1 or more, got 2.5"),  # type: ignore[arg-type]
        (lambda: fdt.Timesteps(8, 1.0), r"eps must be above 0 and below 1, got 1.0"),
        (lambda: fdt.Timesteps(8, eps=0), r"eps must be above 0 and below 1, got 0"),
        (lambda: fdt.Timesteps(8, score="random"), r"score must be one of confidence, margin, neg_entropy for Timesteps"),
        (lambda: fdt.FixedSteps(8, score="low_confidence"), r"score must be one of confidence, random, margin, neg_entropy"),  # type: ignore[arg-type]
    ],
)
def test_bad_strategies(make: Callable[[], fdt.Strategy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, r"prompts must hold at least one prompt"),
        ([[1], []], ValueError, r"prompts: row 1 is empty"),
        ([[1, 320]], ValueError, r"prompts: row 0 holds token id 320, outside the vocabulary \[0, 320\)"),
        ([[-1, 5]], ValueError, r"prompts: row 0 holds token id -1"),
        ([[1] * 4081], ValueError, r"prompts: row 0 has 4081 tokens; with gen_length = 16 the model takes at most 4080"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"prompts must be integers of shape \[B, T\], got torch.int64 \[3\]"),
        (torch.zeros(1, 3), ValueError, r"prompts must be integers of shape \[B, T\], got torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, r"prompts: row 0 is empty"),
        (torch.zeros(0, 4, dtype=torch.long), ValueError, r"prompts must hold at least one prompt"),
        ([1, 2, 3], TypeError, r"prompts: row 0 must be a list of token ids, got 1 of type int"),
        ([[1], [1.5]], TypeError, r"prompts: row 1 must hold token ids, got 1.5 of type float"),
        ([[True]], TypeError, r"prompts: row 0 must hold token ids, got True of type bool"),
        ([[None]], TypeError, r"prompts: row 0 must hold token ids, got None"),
        ([b"abc"], TypeError, r"prompts: row 0 must be a list of token ids, got b'abc' of type bytes"),
        (bytearray(b"abc"), TypeError, r"prompts must be a tensor .*, got bytearray\(b'abc'\)"),
        (17, TypeError, r"prompts must be a tensor .*, got 17 of type int"),
        (np.zeros((1, 3)), ValueError, r"prompts must be integers of shape \[B, T\], got float64 \[1, 3\]"),
        (np.ones((1, 3), dtype=bool), ValueError, r"prompts must be integers of shape \[B, T\], got bool \[1, 3\]"),
        ([torch.ones(1, 3).long()], ValueError, r"prompts: row 0 must be integers of shape \[T\], got torch.int64 \[1, 3\]"),
        ([[2**70]], ValueError, r"prompts: row 0 holds token id 1180591620717411303424"),
        ("hello", ValueError, r"has no tokenizer files; give token ids"),
    ],
)
def test_bad_prompts(idle: fdt.MaskedDiffusionLM, prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        idle.generate(prompts, gen_length=16, block_length=8)


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[7, 8, 9]]),
        np.array([[9, 8, 7]], dtype=">i2")[:, ::-1],
        torch.tensor([[7, 8, 9]], dtype=torch.uint8),
        [list(np.array([7, 8, 9]))],
        [list(torch.tensor([7, 8, 9]))],
        [np.array([7, 8, 9])],
        [torch.tensor([7, 8, 9])],
        ((7, 8, 9),),
        [range(7, 10)],
    ],
    ids=lambda prompts: str(getattr(prompts, "dtype", type(prompts[0]).__name__)),
)
def test_ids_of_any_library_are_ids(prompts: Any) -> None:
    plain = [[7, 8, 9]]
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8}
    assert torch.equal(LLADA.generate(prompts, **options).sequences, LLADA.generate(plain, **options).sequences)
    assert torch.equal(LLADA.logits(prompts), LLADA.logits(plain))


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, torch.tensor], ids=["int64", "uint8", "array", "tensor"])
def test_numbers_of_any_library_are_numbers(integer: Any) -> None:
    """They are kept as Python's own, so that a config is equal, hashable and JSON whatever it was made with."""
    number = torch.tensor if integer is torch.tensor else np.float64

    def config(whole: Any, real: Any) -> fdt.GenerationConfig:
        return fdt.GenerationConfig(
            gen_length=whole(16),
            block_length=whole(8),
            strategy=fdt.FixedSteps(whole(4)),
            temperature=real(0.5),
            seed=whole(3),
            eos_ids=[whole(2)],
            forbidden=[whole(5)],
            mask_id=whole(9),
            refresh_every=whole(2),
            look_back=whole(1),
        )

    made, plain = config(integer, number), config(int, float)
    assert made == plain
    assert hash(made) == hash(plain)
    assert repr(made) == repr(plain)
    for kind, value in ((fdt.Threshold, 0.5), (fdt.Factor, 2.5), (fdt.EntropyBudget, 0.25)):
        assert repr(kind(number(value))) == repr(kind(value))
    seeds = fdt.GenerationConfig(seed=torch.tensor([1, 2]), eos_ids=np.array([3]), forbidden=range(2))
    assert (seeds.seed, seeds.eos_ids, seeds.forbidden) == ((1, 2), (3,), (0, 1))
    dream = DiffusionConfig(integer(32), steps=integer(8), top_k=integer(5), seed=integer(1), temperature=number(0.5))
    assert repr(dream) == repr(DiffusionConfig(32, steps=8, top_k=5, seed=1, temperature=0.5))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([1, 2]), ValueError, r"ids must be integers of shape \[B, T\], got torch.int64 \[2\]"),
        (torch.ones(1, 2), ValueError, r"ids must be integers of shape \[B, T\], got torch.float32"),
        ([[1, 320]], ValueError, r"ids holds token id 320, outside the vocabulary \[0, 320\)"),
        ([[-1]], ValueError, r"ids holds token id -1, outside"),
        ([[2**70]], ValueError, r"ids holds token id 1180591620717411303424, outside"),
        ([[1], [1, 2]], ValueError, r"ids must be rows of one length, got lengths \[1, 2\]"),
        ([], ValueError, r"ids must hold at least one token in at least one row, got shape \[0, 0\]"),
        ([[]], ValueError, r"ids must hold at least one token in at least one row, got shape \[1, 0\]"),
        ([[1] * 4097], ValueError, r"ids: the model takes at most 4096 tokens, got rows of 4097"),
        ([1, 2], TypeError, r"ids: row 0 must be a list of token ids, got 1 of type int"),
        ([[1.5]], TypeError, r"ids: row 0 must hold token ids, got 1.5 of type float"),
        ("text", TypeError, r"ids must be integers of shape \[B, T\], got 'text' of type str"),
    ],
)
def test_bad_ids_for_logits(idle: fdt.MaskedDiffusionLM, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        idle.logits(ids)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (5, TypeError, r"text must be a string or a list of messages, got 5 of type int"),
        (None, TypeError, r"text must be a string or a list of messages, got None"),
        (b"Hi", TypeError, r"text must be a string or a list of messages, got b'Hi'"),
        ([], ValueError, r"text must hold at least one message"),
        ([5], TypeError, r"text: message 0 must be a dict with strings as its role and content, got 5"),
        ([{"role": "user"}], TypeError, r"text: message 0 must be a dict with strings as its role and content"),
    ],
)
def test_bad_texts(tiny: fdt.MaskedDiffusionLM, text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.encode(text)


def test_a_model_of_a_billion_positions_allocates_none_of_them() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa")
    lm.network.config = replace(lm.network.config, max_length=10**9)
    assert lm.logits([[1, 2]]).shape == (1, 2, 320)
    with pytest.raises(MemoryError, match="not even one row fits"):
        lm.generate([[1]], gen_length=10**8, block_length=10**8)


def test_the_longest_prompt_that_fits() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa")
    lm.network.config = replace(lm.network.config, max_length=24)
    assert lm.generate([[1] * 16], gen_length=8, block_length=8).sequences.shape == (1, 24)
    with pytest.raises(ValueError, match="has 17 tokens"):
        lm.generate([[1] * 17], gen_length=8, block_length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forbidden": range(64)}, r"forbidden: the Triton kernels take at most 64, got 65"),
        ({"eos_ids": range(17)}, r"eos_ids: the Triton kernels take at most 16, got 17"),
        ({"gen_length": 2048, "block_length": 2048}, r"block_length: the Triton kernels take at most 1024, got 2048"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_at_once(
    idle: fdt.MaskedDiffusionLM, options: dict[str, Any], message: str
) -> None:
    idle.network.ops = replace(idle.network.ops, name="triton")
    with pytest.raises(ValueError, match=message):
        idle.generate([[1, 2, 3]], **{"gen_length": 16, "block_length": 8, **options})


STRATEGIES = st.one_of(
    st.builds(fdt.FixedSteps, st.integers(1, 24), score=st.sampled_from(fdt.FixedSteps.scores)),
    st.builds(fdt.Threshold, st.floats(0.01, 1), score=st.sampled_from(fdt.Threshold.scores)),
    st.builds(fdt.Factor, st.floats(0.01, 20), score=st.sampled_from(fdt.Factor.scores)),
    st.builds(fdt.DenoisingSteps, st.integers(1, 24), score=st.sampled_from(fdt.DenoisingSteps.scores)),
    st.builds(fdt.CappedThreshold, st.integers(1, 24), score=st.sampled_from(fdt.CappedThreshold.scores)),
    st.builds(fdt.Timesteps, st.integers(1, 24), score=st.sampled_from(fdt.Timesteps.scores)),
    st.builds(fdt.EntropyBudget, st.floats(0, 20), score=st.sampled_from(fdt.EntropyBudget.scores)),
)
OPTIONS = st.fixed_dictionaries(
    {
        "gen_length": st.integers(0, 24),
        "block_length": st.integers(0, 12),
        "cache": st.sampled_from(("none", "prefix", "dual")),
        "strategy": STRATEGIES,
        "temperature": st.sampled_from((0.0, 0.5, 3.0)),
        "seed": st.integers(-(2**40), 2**40),
        "stop_at_eos": st.booleans(),
        "eos_ids": st.lists(st.integers(0, 317), min_size=1, max_size=3),
        "forbidden": st.lists(st.integers(0, 319), max_size=6),
        "refresh_every": st.none() | st.integers(1, 5),
    }
)
PROMPTS = st.lists(st.lists(st.integers(0, 319), max_size=12), max_size=3)
LLADA = fdt.load(GOLDEN / "llada-mha")


@settings(max_examples=150)
@given(OPTIONS, PROMPTS)
def test_every_combination_of_options_decodes_completely_or_is_refused_at_once(
    options: dict[str, Any], prompts: list[list[int]]
) -> None:
    gen_length, block_length, strategy = options["gen_length"], options["block_length"], options["strategy"]
    blocks = gen_length // block_length if block_length else 0
    sound = (
        bool(prompts)
        and all(prompts)
        and blocks > 0
        and gen_length % block_length == 0
        and not (isinstance(strategy, SpreadStrategy) and (strategy.steps < blocks or strategy.steps % blocks))
    )
    if not sound:
        with pytest.raises(ValueError, match=r"gen_length|block_length|steps|prompts"):
            LLADA.generate(prompts, callback=_never, **options)
        return

    out = LLADA.generate(prompts, **options)
    filled = set(options["eos_ids"][:1])
    banned = {MASK, *options["forbidden"]}
    longest = max(map(len, prompts))
    assert out.sequences.shape == (len(prompts), longest + gen_length)
    for row, prompt in enumerate(prompts):
        assert out.sequences[row, longest - len(prompt) : longest].tolist() == prompt
        for token, step, confidence in zip(
            *(t[row].tolist() for t in (out.generated, out.step_map, out.confidence)), strict=True
        ):
            if step < 0:
                assert options["stop_at_eos"]
                assert {token} == filled
            else:
                assert token not in banned
                assert 0 <= token < 320
                assert 0 < confidence <= 1
    assert out.refreshes >= 1
    steps = strategy.steps if isinstance(strategy, fdt.Timesteps) else gen_length
    assert int(out.step_map.max()) < out.nfe
    assert int(out.row_forwards.max()) <= max(steps, gen_length)  # rows that wait for no other take more forwards together
    assert out.committed == int((out.step_map >= 0).sum()) >= block_length
