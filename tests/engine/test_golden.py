"""The engine against recorded trajectories of the official code: the same tokens, from the same slots, in as many forwards."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM, GOLDEN_MODELS
from safetensors.torch import load_file

import fastdllm_triton as fdt
from fastdllm_triton import compat
from fastdllm_triton.engine.dream.config import DiffusionOutput

OFFICIAL = {
    "none": compat.generate,
    "prefix": compat.generate_with_prefix_cache,
    "dual": compat.generate_with_dual_cache,
}


def _cases(model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines()]


def _strategy(case: dict[str, Any]) -> fdt.Strategy:
    kind = {"fixed": fdt.FixedSteps, "threshold": fdt.Threshold, "factor": fdt.Factor}[case["strategy"]]
    return kind(case["value"])


def _decode(lm: fdt.MaskedDiffusionLM, case: dict[str, Any]) -> fdt.GenerationOutput:
    return lm.generate(
        torch.tensor(case["prompt"]),
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        cache=case["cache"],
        strategy=_strategy(case),
        stop_at_eos=False,
        lockstep=True,
    )


def _key(case: dict[str, Any]) -> tuple[str, str]:
    return case["cache"], case["strategy"]


GROUPS = [
    pytest.param(model, list(cases), id=f"{model}-{'-'.join(key)}")
    for model in GOLDEN_MODELS
    for key, cases in groupby(sorted(_cases(model), key=_key), key=_key)
]


def test_no_case_is_lost() -> None:
    assert [len(_cases(model)) for model in GOLDEN_MODELS] == [336, 336]
    assert sum(len(group.values[1]) for group in GROUPS) == 672


@pytest.mark.parametrize(("model", "cases"), GROUPS)
def test_tokens_slots_and_forwards_are_those_of_the_official_code(model: str, cases: list[dict[str, Any]]) -> None:
    lm = fdt.load(GOLDEN / model, device="cpu", backend="cpu")
    for case in cases:
        out = _decode(lm, case)
        assert out.generated.tolist() == case["tokens"], case
        assert out.nfe == case["nfe"], case
        assert _selected(out, case) == case["selected"], case


@pytest.mark.parametrize(("model", "cases"), GROUPS)
def test_the_reference_decodes_the_same(model: str, cases: list[dict[str, Any]]) -> None:
    lm = fdt.load(GOLDEN / model, device="cpu", backend="reference")
    for case in cases[::8]:
        out = _decode(lm, case)
        assert out.generated.tolist() == case["tokens"], case
        assert out.nfe == case["nfe"], case


def _selected(out: fdt.GenerationOutput, case: dict[str, Any]) -> list[list[list[int]]]:
    """The step map in the form of the recording."""
    prompt, block = len(case["prompt"][0]), case["block_length"]
    selected = []
    for forward in range(out.nfe):
        slots = [(out.step_map[row] == forward).nonzero()[:, 0] for row in range(len(out.sequences))]
        first = min(int(s[0]) for s in slots if len(s)) // block * block
        refresh = not (out.step_map[:, first : first + block] < forward).any()
        origin = prompt if refresh or case["cache"] == "none" else -first
        selected.append([(s + origin).tolist() for s in slots])
    return selected


# With a GPU these belong to its tests.
@(pytest.mark.gpu if torch.cuda.is_available() else lambda test: test)
@pytest.mark.parametrize(("model", "cases"), GROUPS if torch.cuda.is_available() else GROUPS[len(GROUPS) // 2 :])
def test_the_kernels_decode_the_same(model: str, cases: list[dict[str, Any]]) -> None:
    """On a GPU every case; in Triton's interpreter, which takes a second a forward, one short case of each kind."""
    gpu = torch.cuda.is_available()
    lm = fdt.load(GOLDEN / model, device="cuda" if gpu else "cpu", backend="triton")
    assert lm.network.ops.name == "triton"
    # With at least one step, so that a window over the cache is among them.
    several = [case for case in cases if case["nfe"] > case["gen_length"] // case["block_length"]]
    chosen = cases if gpu else [min(several, key=lambda case: case["nfe"] * case["gen_length"] * len(case["prompt"]))]
    for case in chosen:
        out = _decode(lm, case)
        assert out.generated.tolist() == case["tokens"], case
        assert out.nfe == case["nfe"], case


@pytest.mark.parametrize("model", GOLDEN_MODELS)
@pytest.mark.parametrize("cache", OFFICIAL)
def test_the_official_calls_give_the_official_results(model: str, cache: str) -> None:
    lm = fdt.load(GOLDEN / model, device="cpu")
    cases = [case for case in _cases(model) if case["cache"] == cache]
    for case in cases[:: len(cases) // 16]:
        arguments: dict[str, Any] = {"steps": case["gen_length"], case["strategy"]: case["value"]}
        if case["strategy"] == "fixed":
            arguments = {"steps": case["value"]}
        prompt = torch.tensor(case["prompt"])
        lengths = {"gen_length": case["gen_length"], "block_length": case["block_length"]}
        x, nfe = OFFICIAL[cache](lm, prompt, **lengths, **arguments)
        assert x.tolist() == [row + tokens for row, tokens in zip(case["prompt"], case["tokens"], strict=True)]
        assert nfe == case["nfe"]


def _diffuse(lm: fdt.MaskedDiffusionLM, case: dict[str, Any]) -> DiffusionOutput:
    given = {name: case[name] for name in ("block_length", "threshold") if case[name] is not None}
    out = compat.diffusion_generate(
        lm,
        torch.tensor([case["prompt"]]),
        max_new_tokens=case["max_new_tokens"],
        steps=case["steps"],
        alg=case["alg"],
        cache=case["cache"],
        temperature=0.0,
        top_k=None,
        return_dict_in_generate=True,
        **given,
    )
    assert isinstance(out, DiffusionOutput)
    return out


DREAM_GROUPS = [
    pytest.param(list(cases), id="-".join(key))
    for key, cases in groupby(
        sorted(_cases(GOLDEN_DREAM), key=lambda case: (case["cache"], case["alg"])), key=lambda case: (case["cache"], case["alg"])
    )
]


def test_no_case_of_dream_is_lost() -> None:
    assert sum(len(group.values[0]) for group in DREAM_GROUPS) == len(_cases(GOLDEN_DREAM)) == 96


@pytest.mark.parametrize("cases", DREAM_GROUPS)
def test_dreams_tokens_and_forwards_are_those_of_the_official_code(dream: fdt.MaskedDiffusionLM, cases: list[Any]) -> None:
    for case in cases:
        out = _diffuse(dream, case)
        assert out.sequences[0].tolist() == case["prompt"] + case["tokens"], case
        assert out.nfe == case["nfe"], case


@(pytest.mark.gpu if torch.cuda.is_available() else lambda test: test)
@pytest.mark.parametrize("cases", DREAM_GROUPS if torch.cuda.is_available() else DREAM_GROUPS[:1])
def test_the_kernels_decode_the_same_of_dream(cases: list[dict[str, Any]]) -> None:
    """On a GPU every case; in Triton's interpreter the shortest one, dual cache with a threshold."""
    gpu = torch.cuda.is_available()
    lm = fdt.load(GOLDEN / GOLDEN_DREAM, device="cuda" if gpu else "cpu", backend="triton")
    for case in cases if gpu else [min(cases, key=lambda case: case["nfe"] * len(case["prompt"]))]:
        out = _diffuse(lm, case)
        assert out.sequences[0].tolist() == case["prompt"] + case["tokens"], case
        assert out.nfe == case["nfe"], case


EVERY_MODEL = pytest.mark.parametrize("golden", [*GOLDEN_MODELS, GOLDEN_DREAM], indirect=True)


@EVERY_MODEL
def test_logits_of_a_full_forward(golden: fdt.MaskedDiffusionLM) -> None:
    data = load_file(golden.folder / "logits.safetensors")
    torch.testing.assert_close(golden.logits(data["input_ids"]), data["logits"], rtol=0, atol=1e-5)


@EVERY_MODEL
@pytest.mark.parametrize(("window", "name"), [((24, 40), "prefix_logits"), ((24, 32), "dual_logits")])
def test_logits_of_a_window_over_the_cache(golden: fdt.MaskedDiffusionLM, window: tuple[int, int], name: str) -> None:
    data = load_file(golden.folder / "logits.safetensors")
    network, (first, last) = golden.network, window
    start = torch.zeros(2, dtype=torch.int32)
    with torch.no_grad():
        cache = network.new_cache(start, 40)
        network.forward(data["input_ids"], start, cache)
        hidden = network.forward(data["next_ids"][:, first:last], start + first, cache)
        logits = network.final_norm(hidden) @ network.head.T
    recorded = data[name]  # of Dream, row 0 alone
    torch.testing.assert_close(logits[: len(recorded)], recorded, rtol=0, atol=1e-5)
