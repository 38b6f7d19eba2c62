"""``fastdllm-triton inspect``: agreement with exact decoding, and the drift of keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.evaluation.agreement import agreement, answers, decode, first_divergence
from fastdllm_triton.evaluation.drift import drift, similarity

PROMPT = [7, 30, 2, 91, 14, 5]


@pytest.mark.parametrize(
    ("one", "other", "slot"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2, 3], [1, 2], 2), ([1], [1, 2], 1), ([], [], None)],
)
def test_first_divergence(one: list[int], other: list[int], slot: int | None) -> None:
    assert first_divergence(one, other) == slot


def test_agreement_counts_slots_up_to_the_end_of_the_longer_answer() -> None:
    eos = 0
    generated = [[5, 6, 7, 8], [5, 6, eos, eos], [5, 9, 7, 8], [eos, eos, eos, eos]]
    exact = [[5, 6, 7, 8], [5, 6, 7, eos], [5, 6, 7, 8], [5, eos]]
    output = fdt.GenerationOutput(
        sequences=torch.tensor(generated),
        gen_length=4,
        refreshes=1,
        steps=1,
        row_forwards=torch.tensor([2, 2, 2, 2]),
        step_map=torch.zeros(4, 4, dtype=torch.int32),
        confidence=torch.ones(4, 4),
        seconds=1.0,
        eos_ids=(eos,),
    )
    assert answers([output]) == [[5, 6, 7, 8], [5, 6, eos], [5, 9, 7, 8], [eos]]
    record = agreement(exact, [output])
    assert record["first_divergence"] == [None, 2, 1, 0]
    assert record["same"] == 0.25
    assert record["token_agreement"] == pytest.approx((4 + 2 + 3 + 0) / (4 + 4 + 4 + 2), abs=1e-6)
    assert record["same_up_to"] == [1.0, 0.75, 0.5, 0.25, 0.25]
    assert record["nfe"] == 2.0


def test_exact_decoding_agrees_with_itself(tiny: fdt.MaskedDiffusionLM) -> None:
    prompts = [tiny.encode(f"Tom has {n} coins. Tom finds 27. Tom sells 19. How many?") for n in (51, 34, 20)]
    config = tiny.options(cache="none")
    exact = answers(decode(tiny, prompts, config, 2))
    record = agreement(exact, decode(tiny, prompts, config, 3))
    assert (record["same"], record["token_agreement"]) == (1.0, 1.0)


def _fresh(lm: fdt.MaskedDiffusionLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    start = torch.zeros(1, dtype=torch.int32)
    cache = lm.network.new_cache(start, ids.shape[1])
    with torch.no_grad():
        lm.network.forward(ids, start, cache)
    return cache.k[:, 0], cache.v[:, 0]


@pytest.mark.parametrize("name", ["llada-gqa", "dream-gqa"])
def test_drift_is_the_cosine_between_what_was_cached_and_what_would_be_now(name: str) -> None:
    lm = fdt.load(GOLDEN / name, device="cpu", dtype="float64")
    mask = lm.config.mask_id
    # Two tokens in two forwards: the refresh sees both masked, the one step after it one of them filled in.
    config = fdt.GenerationConfig(gen_length=4, block_length=2, strategy=fdt.FixedSteps(4), cache="dual", stop_at_eos=False)
    output = lm.generate([PROMPT], config)
    own, tokens, steps = len(PROMPT), output.sequences[0], output.step_map[0].tolist()
    got = drift(lm, [PROMPT], config)
    assert got["forwards"] == [2, 2]
    expected = {kind: torch.zeros(4, lm.config.layers, dtype=torch.float64) for kind in "kv"}
    for block in (0, 1):

        def before(forward: int) -> torch.Tensor:
            kept = [token if -1 < step < forward else mask for token, step in zip(tokens[own:].tolist(), steps, strict=True)]
            return torch.tensor([[*PROMPT, *kept]])

        refreshed, now = _fresh(lm, before(2 * block)), _fresh(lm, before(2 * block + 1))
        for kind, then, fresh in zip("kv", refreshed, now, strict=True):
            alike = F.cosine_similarity(then, fresh, dim=-1).mean(1)  # [layers, slots]
            expected[kind][0] += alike[:, :own].mean(1) / 2
            if block == 0:
                expected[kind][3] += alike[:, own + 2 :].mean(1)
            else:
                expected[kind][1] += alike[:, own : own + 2].mean(1)
    # Shifted predictions recompute the slot before the block too, so there only what comes after it is as the refresh left it.
    regions = (("after", 3),) if lm.config.shift else (("prompt", 0), ("before", 1), ("after", 3))
    for kind in "kv":
        for region, row in regions:
            measured = got["regions"][region][kind]
            assert measured[0] == pytest.approx([1.0] * lm.config.layers, abs=1e-6)
            assert measured[1] == pytest.approx(expected[kind][row].tolist(), abs=1e-6)
        assert min(got["regions"]["prompt"][kind][1]) < 0.9999  # There was something to measure.
        assert got[kind][1][0] == 1.0  # Keys and values of the first layer depend on nothing but the token.


def test_nothing_drifts_without_a_cache_and_less_with_more_refreshes(tiny: fdt.MaskedDiffusionLM) -> None:
    prompts = [tiny.encode("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?")]

    def worst(**options: Any) -> float:
        record = drift(tiny, prompts, tiny.options(strategy=fdt.FixedSteps(48), **options))
        return 1 - min(min(row) for row in record["v"])

    assert worst(cache="none") == pytest.approx(0, abs=1e-6)
    assert 0 < worst(cache="dual", refresh_every=2) < worst(cache="dual")
    stale = drift(tiny, prompts, tiny.options(cache="dual", prompt_refresh=2))["regions"]["prompt"]["v"]
    assert min(stale[0]) < 0.99999  # A refresh that leaves the prompt out leaves it stale.


def test_similarity_of_forwards_is_a_matrix_of_cosines(tiny: fdt.MaskedDiffusionLM) -> None:
    prompt = tiny.encode("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?")
    record = similarity(tiny, prompt, tiny.options(), 1)
    assert record["layers"] == [0, 1, 2, 3]
    for part in ("prompt", "last"):
        for kind in "kv":
            matrix = torch.tensor(record[part][kind])
            assert matrix.shape == (16, 16)
            torch.testing.assert_close(matrix, matrix.T)
            torch.testing.assert_close(matrix.diagonal(), torch.ones(16), atol=1e-5, rtol=0)
            assert matrix.min() < 0.9999


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_writes_a_report_and_figures(tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    caches = "prefix,dual+suffix_window=16+look_back=8"
    arguments = ("--problems", 6, "--problem-seed", 3, "--drift-prompts", 1, "--caches", caches, "--json-copy", copy)
    result = _run("--out", out, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "inspect.json").read_text())
    assert copy.read_text() == (out / "inspect.json").read_text()
    assert [record["cache"] for record in report["caches"]] == caches.split(",")
    for record in report["caches"]:
        assert len(record["first_divergence"]) == 6
        assert record["drift"]["forwards"][0] >= 2
        assert len(record["drift"]["k"][0]) == 4
    for name in ("agreement", "drift-by-layer", "drift-by-region", "similarity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--caches", "full"), "--caches must be one of none, prefix, dual, block_causal, got 'full'"),
        (("--strategy", "greedy"), "--strategy must be fixed:K"),
        (("--prompt", "x", "--data", "y"), "--prompt and --data exclude each other"),
        (("--data", "/no/such/file"), "No such file"),
        (("--model", str(GOLDEN / "llada-gqa")), "has no tokenizer files"),
        (("--problems", "0"), "--problems must be in [1, 10,000,000], got 0"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = _run("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
