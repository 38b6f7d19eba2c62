"""Block-causal models on the command line: their own defaults, their options, and what is drawn where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _block_causal import MASK, with_tokenizer
from rich.console import Console
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.conversation import Conversation
from fastdllm_triton.cli.live import AnswerView, LiveView

V2, SDAR = "fast-dllm-v2", "sdar"
PROMPTS = ("What is it?", "Tom has 51 coins. Tom finds 27 coins.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: with_tokenizer(name, tmp_path_factory.mktemp("models") / name) for name in (V2, SDAR)}


def _run(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def _generate(folder: Path, *arguments: object) -> Any:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    result = _run("generate", "--model", folder, "--device", "cpu", *prompts, "--gen-length", 21, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [entry["ids"] for entry in json.loads(result.stdout)["results"]], json.loads(result.stdout)["nfe"]


OPTIONS: list[tuple[str, tuple[object, ...], dict[str, Any]]] = [
    (V2, (), {}),
    (V2, ("--threshold", 1), {"strategy": fdt.Threshold(1, strict=True)}),
    (V2, ("--strategy", "threshold:0.5"), {"strategy": fdt.Threshold(0.5, strict=True)}),
    (
        V2,
        ("--cache", "block_causal", "--sub-block-length", 4, "--sub-block-cache", "--strategy", "fixed:2"),
        {"sub_block_length": 4, "sub_block_cache": True, "strategy": fdt.FixedSteps(12)},
    ),
    (V2, ("--cache", "none"), {"cache": "none"}),
    (SDAR, (), {}),
    (SDAR, ("--separate-store", "--denoising-steps", 2), {"separate_store": True, "strategy": fdt.DenoisingSteps(2)}),
    (SDAR, ("--strategy", "denoising:3:leftmost"), {"strategy": fdt.DenoisingSteps(3, score="leftmost")}),
    (SDAR, ("--block-length", 8, "--entropy-budget", 0.4), {"block_length": 8, "strategy": fdt.EntropyBudget(0.4)}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), OPTIONS, ids=[f"{n}-{a}" for n, a, _ in OPTIONS])
def test_options_are_those_of_generate(
    folders: dict[str, Path], name: str, arguments: tuple[object, ...], options: dict[str, Any]
) -> None:
    out = fdt.load(folders[name], device="cpu").generate(list(PROMPTS), gen_length=21, **options)
    assert _generate(folders[name], *arguments) == ([out.ids(0), out.ids(1)], out.nfe)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (V2, ("--cache", "dual", "--gen-length", 32), "--cache must be none or block_causal for fast_dllm_qwen, whose attention"),
        (SDAR, ("--cfg-scale", 1), "--cfg-scale must be 0.0 for sdar, whose attention is block-causal"),
        (SDAR, ("--sub-block-length", 3), "--sub-block-length must be a divisor of --block-length = 4"),
        (SDAR, ("--sub-block-cache",), "--sub-block-cache needs --sub-block-length"),
        (SDAR, ("--suffix-window", 4), "--suffix-window means something for cache = none or prefix or dual only"),
        ("tiny", ("--cache", "block_causal"), "--cache must be none or prefix or dual for llada, whose attention"),
        ("tiny", ("--sub-block-length", 4), "--sub-block-length must be None for llada"),
    ],
)
def test_options_of_the_other_kind_of_attention_are_refused(
    folders: dict[str, Path], name: str, arguments: tuple[object, ...], message: str
) -> None:
    result = _run("generate", "--model", folders.get(name, name), "--device", "cpu", "--prompt", "Hm", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", [V2, SDAR])
def test_a_conversation_sets_and_shows_their_settings(folders: dict[str, Path], name: str) -> None:
    result = _run(
        "chat",
        "--model",
        folders[name],
        "--device",
        "cpu",
        "--gen-length",
        20,
        stdin="Hello?\n/set block_length 8 sub_block_length 4 sub_block_cache on denoising_steps 2\nAnd now?\n/set\n",
    )
    assert result.exit_code == 0, result.output
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split()) == 2)
    expected = {"cache": "block_causal", "sub_block_length": "4", "sub_block_cache": "on", "denoising_steps": "2"}
    assert expected.items() <= {key: value.strip() for key, value in shown.items()}.items()


def test_settings_of_the_other_kind_change_nothing(folders: dict[str, Path]) -> None:
    conversation = Conversation(fdt.load(folders[SDAR], device="cpu"))
    before = conversation.config
    with pytest.raises(ValueError, match="cache must be none or block_causal for sdar"):
        conversation.set("cache", "dual", "gen_length", "32")
    assert conversation.config == before
    conversation.set("sub_block_length", "2", "sub_block_length", "none")
    assert conversation.config == before


@pytest.mark.parametrize("name", [V2, SDAR])
def test_blocks_are_underlined_where_they_are(folders: dict[str, Path], name: str) -> None:
    """A block is counted from the row's first token: the first one has as many slots as the prompt leaves of it."""
    lm = fdt.load(folders[name], device="cpu")
    length = lm.defaults.decoded_length
    console = Console(width=200)
    live, answer = LiveView(lm, 21, console), AnswerView(lm, 21, console)
    for prompt in PROMPTS:
        for forward in lm.stream([prompt], gen_length=21, stop_at_eos=False):
            (span,) = forward.spans
            first = (len(prompt) // length + forward.blocks[0]) * length - len(prompt)
            assert span == (first, first + length)
            _, (text,) = live.rows(forward)
            underlined = {i for part in text.spans if "underline" in str(part.style) for i in range(part.start, part.end)}
            assert underlined == set(range(max(first, 0), min(first + length, 21)))
            assert answer.shown(forward) == min(first + length, 21)
            assert all(token.position in range(*span) or forward.refresh for token in forward.committed)


def test_infilling_says_why_not(folders: dict[str, Path]) -> None:
    result = _run("generate", "--model", folders[SDAR], "--device", "cpu", "--infill", "--prompt", "a [MASK] b")
    assert result.exit_code == 2
    assert "infill needs a model whose positions attend those behind them, and sdar is block-causal" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize("name", [V2, SDAR])
def test_fixed_tokens_stay_and_decide_what_comes_behind_them(folders: dict[str, Path], name: str) -> None:
    lm = fdt.load(folders[name], device="cpu")
    fixed = {0: "ab", 9: "c", 16: [5, 6, 7]}
    options: dict[str, Any] = {"gen_length": 30, "constraints": fixed, "stop_at_eos": False}
    out = lm.generate(list(PROMPTS), **options)
    for ids in out.generated.tolist():
        assert [ids[0], ids[1], ids[9], *ids[16:19]] == [*lm.encode("abc"), 5, 6, 7]
        assert MASK not in ids
    assert (out.step_map[:, [0, 1, 9, 16, 17, 18]] == -1).all()
    without = lm.generate(list(PROMPTS), **options, cache="none")
    assert without.generated.tolist() == out.generated.tolist()
    # Each row alone: what is fixed later is not seen by blocks before it.
    other = lm.generate(list(PROMPTS), **(options | {"constraints": fixed | {27: "z"}}))
    for row, prompt in enumerate(PROMPTS):
        block = lm.defaults.block_length
        before = (len(prompt) + 27) // block * block - len(prompt)
        assert other.generated[row, :before].tolist() == out.generated[row, :before].tolist()
