"""The built-in model: its task, its tokenizer, its size, and the paper's effect at a size that runs anywhere."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdllm_triton as fdt
from fastdllm_triton.tiny import PATH
from fastdllm_triton.tiny.module import hf_module
from fastdllm_triton.tiny.problems import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS, Problem, is_test_prompt, problems, score
from fastdllm_triton.tiny.vocabulary import build_tokenizer

COUNT = 150


@given(st.integers(0, 2**31), st.booleans())
def test_problems_are_well_formed_and_their_answers_score(seed: int, test: bool) -> None:
    for problem in islice(problems(seed, test=test), 5):
        totals = [problem.start + sum(problem.changes[:n]) for n in range(len(problem.changes) + 1)]
        assert len(problem.changes) in (2, 3)
        assert all(10 <= total <= 99 for total in totals)
        assert all(10 <= abs(change) <= 89 for change in problem.changes)
        assert is_test_prompt(problem.prompt) is test
        assert score(problem, problem.answer) == (True, True)


def test_the_stream_is_a_function_of_its_seed() -> None:
    assert list(islice(problems(3, test=False), 20)) == list(islice(problems(3, test=False), 20))
    assert list(islice(problems(3, test=False), 20)) != list(islice(problems(4, test=False), 20))


PROBLEM = Problem("Tom", 51, (27, -19), "", "")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (" Tom now has 51+27=78. That makes it 78-19=59. #### 59", (True, True)),
        (" That makes it 51+27=78. Tom now has 78-19=59. #### 59", (True, True)),
        (" Tom now has 51+27=79. That makes it 78-19=59. #### 59", (True, False)),  # a wrong equation
        (" Tom now has 51+27=78. That makes it 78+19=59. #### 59", (True, False)),  # a wrong sign
        (" Ann now has 51+27=78. That makes it 78-19=59. #### 59", (True, False)),  # the wrong person
        (" That now has 51+27=78. That makes it 78-19=59. #### 59", (True, False)),  # wordings mixed
        (" Tom now has 51+27=78. #### 59", (True, False)),  # a step left out
        (" Tom now has 51+27=78. That makes it 78-19=59. Tom #### 59", (True, False)),  # words too many
        (" Tom now has 51+27=78. That makes it 78-19=59. #### 58", (False, False)),
        (" Tom now has 51+27=78. That makes it 78-19=59.", (False, False)),
        ("", (False, False)),
    ],
)
def test_scores(text: str, verdict: tuple[bool, bool]) -> None:
    assert score(PROBLEM, text) == verdict


def test_the_tokenizer_is_the_one_the_task_builds(tiny: fdt.MaskedDiffusionLM) -> None:
    built, shipped = build_tokenizer(), tiny.tokenizer
    assert shipped is not None
    assert shipped.get_vocab() == built.get_vocab()
    assert len(shipped) == tiny.config.vocab_size
    assert (shipped.mask_token_id, shipped.eos_token_id) == (tiny.config.mask_id, tiny.config.eos_ids[0])


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_printable_ascii_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompts_and_answers_fit() -> None:
    tokenizer = build_tokenizer()
    for problem in islice(problems(0, test=False), 200):
        assert len(tokenizer(problem.prompt).input_ids) <= MAX_PROMPT_TOKENS
        assert len(tokenizer(problem.answer).input_ids) < MAX_ANSWER_TOKENS


def test_the_weights_are_small() -> None:
    assert (PATH / "model.safetensors").stat().st_size < 4_000_000


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return list(islice(problems(2024, test=True), COUNT))


def _decode(
    lm: fdt.MaskedDiffusionLM, asked: list[Problem], strategy: fdt.Strategy, cache: str = "dual", block_length: int = 16
) -> tuple[float, float, float]:
    """Exact match, whole answers right, tokens per forward."""
    torch.set_num_threads(1)
    prompts = [lm.encode(problem.prompt) for problem in asked]
    out = lm.generate(prompts, gen_length=48, block_length=block_length, cache=cache, strategy=strategy)
    scores = [score(problem, text) for problem, text in zip(asked, out.texts, strict=True)]
    return sum(s[0] for s in scores) / len(asked), sum(s[1] for s in scores) / len(asked), out.tokens_per_forward


# A model this small feels a stale cache, so what is compared is decoded over the same one.
@pytest.mark.parametrize(("cache", "least", "lost"), [("none", 0.9, 0.05), ("dual", 0.75, 0.02)])
def test_threshold_keeps_the_accuracy_that_fixed_steps_at_its_speed_lose(
    tiny: fdt.MaskedDiffusionLM, asked: list[Problem], cache: str, least: float, lost: float
) -> None:
    exact, whole, _ = _decode(tiny, asked, fdt.FixedSteps(48), cache)
    exact_threshold, whole_threshold, speed = _decode(tiny, asked, fdt.Threshold(0.9), cache)
    assert exact >= least
    assert exact_threshold >= exact - 0.02
    assert whole_threshold >= whole - 0.02
    assert speed >= 2.5
    # As many tokens a forward, but always the same number: the nearest schedule that the blocks divide.
    exact_fixed, whole_fixed, speed_fixed = _decode(tiny, asked, fdt.FixedSteps(3 * round(16 / speed)), cache)
    assert speed_fixed == pytest.approx(speed, rel=0.15)
    assert exact_fixed < exact_threshold - lost
    assert whole_fixed < whole_threshold - 0.2


@pytest.mark.parametrize("architecture", ["llada", "dream"])
def test_the_stand_in_is_accelerated_as_a_module_of_the_hub_is(tiny: fdt.MaskedDiffusionLM, architecture: str) -> None:
    ids = torch.tensor([tiny.encode("Tom has 51 coins.")])
    module = hf_module(architecture)  # type: ignore[arg-type]
    logits = module(ids).logits
    torch.testing.assert_close(logits, tiny.logits(ids), rtol=1e-4, atol=1e-3)
    fdt.accelerate(module)
    assert torch.equal(module(ids).logits, logits)
    torch.testing.assert_close(module.fast_forward(ids), logits, rtol=1e-4, atol=1e-3)
    assert hasattr(module, "diffusion_generate") == (architecture == "dream")
    assert module.generate("Tom has 51 coins.", gen_length=16, block_length=16).texts
    fdt.restore(module)


def test_there_is_no_third_stand_in() -> None:
    with pytest.raises(ValueError, match=r"architecture must be llada or dream, got 'gpt'"):
        hf_module("gpt")  # type: ignore[arg-type]
