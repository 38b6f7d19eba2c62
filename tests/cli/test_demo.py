"""The demo: a table that fills in while it computes, and a sentence in which every number is of the run."""

from __future__ import annotations

import io
import re
from itertools import islice

import pytest
import torch
from rich.console import Console

import fastdllm_triton as fdt
from fastdllm_triton.tiny.problems import problems
from fastdllm_triton.tools.demo import Variant, demo, print_results, verdict

ASKED = list(islice(problems(1, test=True), 2))


def output(model: fdt.MaskedDiffusionLM, text: str, forwards: int, seconds: float) -> fdt.GenerationOutput:
    """A generation of 40 tokens."""
    ids = torch.tensor([model.encode(text)])
    step_map = torch.arange(48)[None].clamp(max=40) % 41 - 1
    return fdt.GenerationOutput(
        sequences=ids,
        gen_length=ids.shape[1],
        refreshes=3,
        steps=forwards - 3,
        row_forwards=torch.tensor([forwards]),
        step_map=step_map.roll(-1, 1).where(torch.arange(48) < 40, -1),
        confidence=torch.ones(1, 48),
        seconds=seconds,
        eos_ids=(0,),
        tokenizer=model.tokenizer,
    )


@pytest.fixture
def plain(tiny: fdt.MaskedDiffusionLM) -> Variant:
    answers = [output(tiny, problem.answer, 40, 2.0) for problem in ASKED]
    return Variant("none", "1 a forward", fdt.FixedSteps(48), answers)


def fast(model: fdt.MaskedDiffusionLM, *answers: str) -> Variant:
    return Variant("dual", "threshold 0.9", fdt.Threshold(0.9), [output(model, answer, 16, 0.5) for answer in answers])


def test_the_sentence_tells_what_is_the_same_and_what_is_not(tiny: fdt.MaskedDiffusionLM, plain: Variant) -> None:
    same = fast(tiny, *(problem.answer for problem in ASKED))
    assert verdict(plain, same, ASKED) == (
        "The same 2 answers with 32 forwards instead of 80: 2.5 tokens a forward instead of 1, 4x as fast"
    )
    differing = fast(tiny, ASKED[0].answer, " 5 #### 5")
    assert verdict(plain, differing, ASKED) == (
        "1 of 2 answers the same, 1 right instead of 2, with 32 forwards instead of 80: 2.5 tokens a forward instead of 1, "
        "4x as fast"
    )


@pytest.mark.parametrize("width", [80, 60])
def test_nothing_is_cut_and_what_differs_is_shown(tiny: fdt.MaskedDiffusionLM, plain: Variant, width: int) -> None:
    told = io.StringIO()
    print_results(Console(file=told, width=width), [plain, fast(tiny, ASKED[0].answer, " 5 #### 5")], ASKED, "cpu")
    lines = [line.rstrip() for line in told.getvalue().splitlines()]
    assert lines[0].split()[:4] == ["cache", "commits", "right", "forwards"]
    assert lines[1].split() == ["none", "1", "a", "forward", "2/2", "80", "1.0", "20", "1.0x"]
    assert lines[2].split() == ["dual", "threshold", "0.9", "1/2", "32", "2.5", "80", "4.0x"]
    assert max(len(line) for line in lines if "fastdllm-triton" not in line) <= width
    assert "…" not in told.getvalue()
    for word in ("forward", "block", "commit"):
        assert re.search(rf"^{word} +\w", told.getvalue(), flags=re.M)
    assert ASKED[1].prompt in lines
    assert "  dual, threshold 0.9: 5 #### 5  (wrong)" in lines
    assert ASKED[0].prompt not in lines  # The answer of both.


def test_the_table_fills_in_while_it_computes() -> None:
    told = io.StringIO()
    demo(Console(file=told, width=80, height=24, force_terminal=True, color_system=None), 1, 1, "cpu", "auto")
    drawn = told.getvalue().split("cache   commits")
    assert [text.count("1/1") for text in drawn[1:7]] == [1, 2, 3, 4, 5, 6]
    assert "The same answer with " in drawn[-1]
