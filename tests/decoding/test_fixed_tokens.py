"""Tokens that are given: constraints on an answer, and masks inside a text. Both against a plain loop over full logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _modules import load_module
from _plain_loop import decode
from conftest import GOLDEN, GOLDEN_DREAM
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton.cli.app import app

CACHES = ("none", "prefix", "dual")
STRATEGIES = [fdt.FixedSteps(8), fdt.Threshold(0.02), fdt.Factor(2.0), fdt.EntropyBudget(9.0), fdt.FixedSteps(4, score="margin")]
MODELS = {name: fdt.load(GOLDEN / name, device="cpu") for name in ("llada-gqa", GOLDEN_DREAM)}
PROBLEM = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("cache", CACHES)
def test_constraints_are_a_plain_loop_that_begins_with_them(name: str, strategy: fdt.Strategy, cache: str) -> None:
    lm = MODELS[name]
    prompt, mask = [3, 1, 4, 1, 5], lm.config.mask_id
    constraints = {1: 7, 2: [8, 9], 8: 11, 15: 12}
    answer = [constraints_of(constraints).get(i, mask) for i in range(16)]
    want = decode(lm, prompt, answer, 8, strategy, cache)
    out = lm.generate(
        [prompt], constraints=constraints, gen_length=16, block_length=8, strategy=strategy, cache=cache, stop_at_eos=False
    )
    assert out.sequences[0].tolist() == want.x
    assert out.step_map[0].tolist() == want.step_map[5:]
    assert out.nfe == want.forwards
    for slot, sure in want.confidence.items():
        assert float(out.confidence[0, slot - 5]) == pytest.approx(sure, rel=1e-4)
    assert out.confidence[0].isnan().tolist() == [token != mask for token in answer]
    assert out.committed == 11


def constraints_of(constraints: dict[int, Any]) -> dict[int, int]:
    """One token a position."""
    spread = {i: value if isinstance(value, list) else [value] for i, value in constraints.items()}
    return {i + j: token for i, tokens in spread.items() for j, token in enumerate(tokens)}


@settings(max_examples=25)
@given(data=st.data())
def test_any_masks_in_any_text_are_filled_in_as_by_the_plain_loop(data: st.DataObject) -> None:
    lm = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    mask, block_length = lm.config.mask_id, data.draw(st.sampled_from((1, 3, 4)))
    text = data.draw(
        st.lists(st.sampled_from([mask, mask, 5, 6, 7, 8, 9]), min_size=1, max_size=14).filter(lambda ids: mask in ids)
    )
    cache = data.draw(st.sampled_from(CACHES))
    strategy = data.draw(st.sampled_from((fdt.Threshold(0.02), fdt.Factor(2.0), fdt.EntropyBudget(9.0))))
    out = lm.infill([text], block_length=block_length, cache=cache, strategy=strategy)

    region = -(-(len(text) - text.index(mask)) // block_length) * block_length
    if region <= len(text):  # The plain loop has blocks within the text alone.
        want = decode(lm, text[: len(text) - region], text[len(text) - region :], block_length, strategy, cache)
        assert out.ids(0) == want.x
        assert out.nfe == want.forwards
    assert mask not in out.ids(0)
    assert [b for a, b in zip(text, out.ids(0), strict=True) if a != mask] == [a for a in text if a != mask]
    assert out.committed == text.count(mask)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_row_with_fixed_tokens_gets_in_a_batch_what_it_gets_alone(name: str, cache: str) -> None:
    lm = MODELS[name]
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5], [8]]
    each: list[dict[int, Any]] = [
        {0: 7, 9: [8, 8]},
        {},
        dict.fromkeys(range(8), 5),
        {i: i for i in range(8, 16)},
        dict.fromkeys(range(24), 5),
    ]
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8, "cache": cache, "strategy": fdt.Threshold(0.02)}
    options |= {"stop_at_eos": False, "prompt_refresh": None if cache == "none" else 2}
    batch = lm.generate(prompts, constraints=each, **options)
    for row, (prompt, constraints) in enumerate(zip(prompts, each, strict=True)):
        alone = lm.generate([prompt], constraints=constraints, **options)
        assert batch.generated[row].tolist() == alone.generated[0].tolist()
        assert int(batch.row_forwards[row]) == alone.nfe
        assert all(alone.generated[0, i] == token for i, token in constraints_of(constraints).items())
    assert int(batch.row_forwards[4]) == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_text_is_filled_in_in_a_batch_as_alone(name: str, cache: str) -> None:
    lm = MODELS[name]
    mask = lm.config.mask_id
    texts = [[mask, 4, mask], [1, 2, 3, mask, mask, 6, 7, 8, 9, mask, 3, 2], [9, mask, 8, 8, 8, 8, 8], [mask]]
    options: dict[str, Any] = {"block_length": 4, "cache": cache, "strategy": fdt.Threshold(0.02)}
    batch = lm.infill(texts, **options)
    for row, text in enumerate(texts):
        alone = lm.infill([text], **options)
        assert batch.ids(row) == alone.ids(0)
        assert int(batch.row_forwards[row]) == alone.nfe


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_blocks_without_masks_take_no_forward_and_the_prompt_is_still_cached(cache: str) -> None:
    lm = MODELS["llada-gqa"]
    options: dict[str, Any] = {"gen_length": 32, "block_length": 8, "cache": cache, "strategy": fdt.FixedSteps(32)}
    out = lm.generate(
        [[3, 1, 4]], constraints=dict.fromkeys((*range(8), *range(16, 24)), 5), prompt_refresh=2, stop_at_eos=False, **options
    )
    assert (out.refreshes, out.nfe) == (2, 16)
    mask = lm.config.mask_id
    want = decode(lm, [3, 1, 4], [5] * 8 + [mask] * 8, 8, fdt.FixedSteps(16), cache)
    assert want.forwards == 8
    seen = []
    lm.generate(
        [[3, 1, 4]],
        constraints=dict.fromkeys(range(8), 5),
        prompt_refresh=2,
        stop_at_eos=False,
        callback=lambda f: seen.append((f.refresh, f.blocks, f.windows)),
        **options,
    )
    assert seen[0] == (True, (1,), ((0, 35),))  # The first refresh covers the prompt, whichever block it is for.


def test_the_first_token_of_a_dream_block_may_be_fixed_where_refreshes_commit_it_alone() -> None:
    lm = MODELS[GOLDEN_DREAM]
    options: dict[str, Any] = {"gen_length": 12, "block_length": 4, "refresh_commits": "first", "strategy": fdt.Threshold(0.02)}
    out = lm.generate([[3, 1]], constraints={0: 7, 5: 8, 6: 8, 7: 8}, stop_at_eos=False, **options)
    assert out.generated[0, [0, 5, 6, 7]].tolist() == [7, 8, 8, 8]
    assert lm.config.mask_id not in out.generated
    assert out.step_map[0, 1:4].min() == 1  # The first refresh had nothing to commit.
    assert (out.step_map[0] == out.step_map[0, 4]).sum() == 1  # The second block was finished by its refresh.
    end = int(out.generated[0, 4])
    stopped = lm.generate([[3, 1]], constraints={0: 7, 5: 8, 6: 8, 7: 8}, eos_ids=[end], **options)
    assert stopped.generated[0, 8:].tolist() == [end] * 4


@pytest.mark.parametrize("fixed", [{4: 0}, dict.fromkeys(range(8), 0)])
def test_a_fixed_end_token_ends_a_row_as_a_decoded_one_does(fixed: dict[int, int]) -> None:
    lm = MODELS["llada-gqa"]
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8, "forbidden": [0], "eos_ids": [0], "constraints": fixed}
    out = lm.generate([[3, 1, 4]], **options)
    assert out.generated[0, 8:].tolist() == [0] * 16
    assert (out.step_map[0, 8:] == -1).all()
    assert (0 in lm.generate([[3, 1, 4]], stop_at_eos=False, **options).generated[0, 8:]) is False
    kept = lm.generate([[3, 1, 4]], **(options | {"constraints": {**fixed, 20: 9}})).generated[0]
    assert kept[20] == 9
    assert kept[[8, 19, 21, 23]].tolist() == [0] * 4


def test_masks_and_constraints_as_text(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    out = tiny.generate(PROBLEM, gen_length=48, block_length=16, constraints={0: " That makes", 30: "#### 59"})
    assert out.texts[0].startswith(" That makes")
    assert out.generated[0, 30:].tolist()[: len(tiny.tokenizer("#### 59")["input_ids"])] == tiny.tokenizer("#### 59")["input_ids"]  # type: ignore[index, misc]
    solved = f"{PROBLEM} That makes it 51+27=[MASK][MASK]. That makes it 78-19=[MASK][MASK]. #### [MASK][MASK]"
    filled = tiny.infill(solved, block_length=16, trace=tmp_path / "t.json")
    assert filled.texts == [f"{PROBLEM} That makes it 51+27=78. That makes it 78-19=59. #### 59"]
    row = json.loads((tmp_path / "t.json").read_text())["rows"][0]
    decoded = [slot for slot, step in enumerate(filled.step_map[0].tolist()) if step >= 0]
    assert sorted(set(range(filled.gen_length)) - set(row["fixed"])) == decoded
    assert len(decoded) == 6


@pytest.mark.parametrize("cache", CACHES)
def test_what_stands_after_a_mask_decides_too(cache: str) -> None:
    texts = [[3, 318, 318, end, end] for end in (5, 50, 100, 150, 200, 250)]
    filled = MODELS["llada-gqa"].infill(texts, block_length=1, cache=cache).sequences[:, 1:3]
    assert len(filled.unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        ({16: 5}, ValueError, r"constraints: a position must be in \[0, 16\), got 16"),
        ({-1: 5}, ValueError, r"constraints: a position must be in \[0, 16\), got -1"),
        ({"2": 5}, ValueError, r"constraints: a position must be in \[0, 16\), got '2'"),
        ({2: 320}, ValueError, r"constraints: position 2 must be in the vocabulary \[0, 320\), got 320"),
        ({2: 318}, ValueError, r"constraints: position 2 must be another token than \[MASK\], got 318"),
        ({2: []}, ValueError, r"constraints: position 2 must be one token or more, got \[\]"),
        ({2: 1.5}, TypeError, r"constraints: position 2 must hold a text, a token id or a list of them, got 1.5"),
        ({2: "x"}, ValueError, r"constraints: .* has no tokenizer files; give token ids"),
        ({14: [1, 2, 3]}, ValueError, r"constraints: position 14 holds 3 tokens .*, and gen_length = 16 leaves 2"),
        ({2: [1, 2, 3], 4: 1}, ValueError, r"constraints: position 4 holds 1 tokens .* overlap"),
        ({4: 1, 2: [1, 2, 3]}, ValueError, r"constraints: position 2 holds 3 tokens .* overlap"),
        ([{}, {}], ValueError, r"constraints must be one dict, or one for each of 1 rows, got 2"),
        ([{40: 1}], ValueError, r"constraints: row 0: a position must be in"),
        ([5], TypeError, r"constraints: row 0 must be a dict of positions, got int"),
        ("0=x", TypeError, r"constraints must be a dict of positions, or a list of one a row, got str"),
    ],
)
def test_bad_constraints(llada: fdt.MaskedDiffusionLM, constraints: Any, error: type[Exception], message: str) -> None:
    llada.network.forward = _never  # type: ignore[method-assign]
    for call in (llada.generate, llada.stream):
        with pytest.raises(error, match=message):
            call([[1, 2, 3]], gen_length=16, block_length=8, constraints=constraints)


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a forward ran")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 318], [1, 2]], {}, r"prompts: row 1 has no mask to fill in"),
        ([[]], {}, r"prompts: row 0 has no mask"),
        ([], {}, r"prompts must hold at least one prompt"),
        ([[318, 320]], {}, r"prompts: row 0 holds token id 320"),
        ([[318] * 4097], {}, r"prompts: row 0 has 4097 tokens; the model takes at most 4096"),
        ([[318]], {"gen_length": 32}, r"gen_length: infill decodes the masks"),
        ([[318]], {"stop_at_eos": True}, r"stop_at_eos: infill decodes the masks"),
        ([[318]], {"block_length": 0}, r"block_length must be an integer of 1 or more, got 0"),
        ("[MASK]", {}, r"has no tokenizer files; give token ids"),
    ],
)
def test_bad_infilling(llada: fdt.MaskedDiffusionLM, prompts: Any, options: dict[str, Any], message: str) -> None:
    llada.network.forward = _never  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        llada.infill(prompts, **options)


def test_a_tensor_of_texts_with_masks() -> None:
    lm = MODELS["llada-gqa"]
    x = torch.tensor([[5, lm.config.mask_id, 6], [lm.config.mask_id, 5, 6]])
    out = lm.infill(x, block_length=2, mask_id=lm.config.mask_id)
    assert [out.ids(row)[2] for row in range(2)] == [6, 6]
    assert lm.infill(x.tolist(), block_length=2).sequences.tolist() == out.sequences.tolist()


def test_constraints_on_the_command_line(tiny: fdt.MaskedDiffusionLM) -> None:
    arguments = ["--constraint", "0= Tom now has", "--constraint", "30=#### 5=9", "--gen-length", "48", "--cfg-scale", "0.5"]
    result = CliRunner().invoke(app, ["generate", "--json", "--prompt", PROBLEM, *arguments])
    out = tiny.generate(PROBLEM, gen_length=48, cfg_scale=0.5, constraints={0: " Tom now has", 30: "#### 5=9"})
    assert json.loads(result.stdout)["results"][0]["ids"] == out.ids(0)


def test_infilling_on_the_command_line(tiny: fdt.MaskedDiffusionLM) -> None:
    text = f"{PROBLEM} #### [MASK][MASK]"
    result = CliRunner().invoke(app, ["generate", "--infill", "--steps", "2", "--block-length", "4", "--prompt", text])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    filled = tiny.infill(text, block_length=4, strategy=fdt.FixedSteps(2)).texts[0]
    assert told.startswith(" ".join(f"{text} {filled} 2 forwards".split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--constraint", "x=y"], "--constraint must be POS=TEXT, such as 5=hello, got 'x=y'"),
        (["--constraint", "5"], "--constraint must be POS=TEXT, such as 5=hello, got '5'"),
        (["--constraint", "5="], "--constraint must be POS=TEXT, such as 5=hello, got '5='"),
        (["--constraint", "5=a", "--constraint", "5=b"], "--constraint: position 5 is given twice"),
        (["--infill", "--chat"], "--infill and --chat exclude each other"),
        (["--infill", "--gen-length", "48"], "--infill and --gen-length exclude each other"),
        (["--infill"], "prompts: row 0 has no mask to fill in"),
        (["--cfg-scale", "-1"], "--cfg-scale must be 0 or more, got -1.0"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "x", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@(pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.slow)
@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_decode_the_same(name: str) -> None:
    """Fixed tokens, guidance and tokens that come last, all at once; minutes in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "strategy": fdt.Threshold(0.02), "temperature": 2.0}
    options |= {"constraints": {1: 5}, "cfg_scale": 1.0, "commit_last": (113, 150)}
    kernels = fdt.load(GOLDEN / name, device=device, backend="triton")
    by_kernels, by_reference = (lm.generate([[3, 1], [5]], **options) for lm in (kernels, MODELS[name]))
    assert by_kernels.sequences.tolist() == by_reference.sequences.tolist()


def test_an_accelerated_module_fills_in_and_keeps_constraints_as_a_loaded_model_does() -> None:
    module, lm = load_module(GOLDEN / "llada-gqa"), MODELS["llada-gqa"]
    fdt.accelerate(module)
    text = [5, lm.config.mask_id, 6, lm.config.mask_id]
    assert module.infill([text], block_length=2).sequences.tolist() == lm.infill([text], block_length=2).sequences.tolist()
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "constraints": {3: 7}}
    assert module.generate([[5, 6]], **options).sequences.tolist() == lm.generate([[5, 6]], **options).sequences.tolist()
    fdt.restore(module)
    assert not hasattr(module, "infill") and not hasattr(module, "release")
