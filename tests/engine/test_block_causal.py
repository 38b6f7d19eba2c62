"""Block-causal models against recorded trajectories of the official code: tokens, forwards, windows and committed slots."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton.decoding.config import _warn_of_block_length

V2, SDAR = "fast-dllm-v2", "sdar"


def _cases(model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines()]


@cache
def _model(name: str, backend: str) -> fdt.MaskedDiffusionLM:
    return fdt.load(GOLDEN / name, device="cpu", backend=backend)


def _v2_options(case: dict[str, Any]) -> dict[str, Any]:
    prompt, block = len(case["prompt"]), case["block_length"]
    return {
        "gen_length": (prompt // block + case["max_new_tokens"] // block) * block + 1 - prompt,
        "block_length": block,
        "sub_block_length": case["sub_block_length"],
        "sub_block_cache": case["use_block_cache"],
        "strategy": fdt.Threshold(case["threshold"], strict=True),
        "mask_id": case["mask_id"],
        "eos_ids": [case["stop_token"]],
    }


def _sdar_options(case: dict[str, Any]) -> dict[str, Any]:
    score = "leftmost" if case["strategy"] == "sequential" else "confidence"
    prompt, block = len(case["prompt"]), case["block_length"]
    return {
        "gen_length": -(-(prompt + case["gen_length"]) // block) * block - prompt,
        "block_length": block,
        "strategy": fdt.DenoisingSteps(case["denoising_steps"], case["threshold"], score=score),
        "eos_ids": case["stop_tokens"],
    }


OPTIONS = {V2: _v2_options, SDAR: _sdar_options}


Seen = tuple[fdt.GenerationOutput, list[tuple[int, int]], list[list[int]]]


def _seen(lm: fdt.MaskedDiffusionLM, case: dict[str, Any], **options: Any) -> Seen:
    """The output, and of each forward the window and the slots that it committed."""
    windows, selected = [], []
    prompt = len(case["prompt"])

    def see(forward: fdt.Forward) -> None:
        windows.append(forward.windows[0])
        selected.append([prompt + token.position for token in forward.committed])

    out = lm.generate([case["prompt"]], callback=see, **options)
    return out, windows, selected


def _tokens(out: fdt.GenerationOutput, case: dict[str, Any]) -> list[int]:
    return out.generated[0, : len(case["tokens"])].tolist()


def test_no_case_is_lost() -> None:
    assert [len(_cases(model)) for model in (V2, SDAR)] == [96, 96]


@pytest.mark.parametrize("case", _cases(V2), ids=lambda case: f"P={len(case['prompt'])}")
def test_fast_dllm_v2_decodes_as_the_official_code(case: dict[str, Any]) -> None:
    out, windows, selected = _seen(_model(V2, "cpu"), case, **_v2_options(case))
    assert _tokens(out, case) == case["tokens"]
    assert windows == [(start, start + length) for _, start, length in case["windows"]]
    shown = len(case["prompt"]) + len(case["tokens"])
    assert [[slot for slot in slots if slot < shown] for slots in selected] == case["selected"]
    assert out.nfe == case["nfe"]


@pytest.mark.parametrize("case", _cases(SDAR), ids=lambda case: f"P={len(case['prompt'])}")
def test_sdar_decodes_as_the_official_code(case: dict[str, Any]) -> None:
    out, windows, selected = _seen(_model(SDAR, "cpu"), case, **_sdar_options(case), separate_store=True)
    assert _tokens(out, case) == case["tokens"]
    # The official code stores the last block as well, which nothing reads.
    assert windows == [(start, start + length) for _, start, length in case["windows"][:-1]]
    assert selected == case["selected"][:-1]
    assert out.nfe == case["nfe"] - 1


def test_sdar_stores_a_block_with_the_next_ones_first_step() -> None:
    """The same tokens; neither prefills nor stores are forwards of their own, and nothing is stored that nobody reads."""
    cases, forwards = _cases(SDAR), 0
    for case in cases:
        out = _model(SDAR, "cpu").generate([case["prompt"]], **_sdar_options(case))
        assert _tokens(out, case) == case["tokens"]
        assert out.nfe == sum(kind == "step" for kind, _, _ in case["windows"])
        forwards += out.nfe
    assert (sum(case["nfe"] for case in cases), forwards) == (1899, 1484)


#: Cases whose forwards are of the same kinds, by name, with what the shortest one must have.
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "v2": (V2, {"use_block_cache": False}, ["prefill", "step", "commit"]),
    "v2-sub-block-cache": (V2, {"use_block_cache": True}, ["prefill", "step", "sub"]),
    "sdar-static": (SDAR, {"strategy": "static"}, ["prefill", "step", "store", "store"]),
    "sdar-dynamic": (SDAR, {"strategy": "dynamic"}, ["prefill", "step", "store", "store"]),
    "sdar-sequential": (SDAR, {"strategy": "sequential"}, ["prefill", "step", "store", "store"]),
}


def _of_kind(kind: str) -> list[dict[str, Any]]:
    model, wanted, _ = KINDS[kind]
    return [case for case in _cases(model) if wanted.items() <= case.items()]


def _shortest(kind: str) -> dict[str, Any]:
    needed = KINDS[kind][2]
    windows = {i: [name for name, _, _ in case["windows"]] for i, case in enumerate(_of_kind(kind))}
    whole = [i for i in windows if all(windows[i].count(name) >= needed.count(name) for name in needed)]
    # A forward costs what ten slots do, about.
    cost = [case["nfe"] * 10 + sum(length for _, _, length in case["windows"]) for case in _of_kind(kind)]
    return _of_kind(kind)[min(whole, key=lambda i: cost[i])]


def _decode_as_recorded(lm: fdt.MaskedDiffusionLM, model: str, case: dict[str, Any], **options: Any) -> None:
    """Tokens and forwards; SDAR's by default without the official forwards that only store."""
    out = lm.generate([case["prompt"]], **OPTIONS[model](case), **options)
    assert _tokens(out, case) == case["tokens"], case
    kinds = [kind for kind, _, _ in case["windows"]]
    stored = 0 if model == V2 else 1 if options.get("separate_store") else len(kinds) - kinds.count("step")
    assert out.nfe == case["nfe"] - stored, case


def test_every_case_is_of_one_kind() -> None:
    assert sum(len(_of_kind(kind)) for kind in KINDS) == 192


# With a GPU these belong to its tests.
@(pytest.mark.gpu if torch.cuda.is_available() else lambda test: test)
@pytest.mark.parametrize("separate_store", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_decode_the_same(kind: str, separate_store: bool) -> None:
    """On a GPU every case; in Triton's interpreter, which takes a second a forward, the shortest one of each kind."""
    model, gpu = KINDS[kind][0], torch.cuda.is_available()
    if separate_store and (model == V2 or not (gpu or kind == "sdar-dynamic")):
        pytest.skip("the same forwards, or those of another kind")
    lm = fdt.load(GOLDEN / model, device="cuda" if gpu else "cpu", backend="triton")
    assert lm.network.ops.name == "triton"
    for case in _of_kind(kind) if gpu else [_shortest(kind)]:
        _decode_as_recorded(lm, model, case, **({"separate_store": True} if separate_store else {}))


@pytest.mark.ptx
@pytest.mark.parametrize("kind", KINDS)
def test_executed_ptx_decodes_the_same(kind: str) -> None:
    model = KINDS[kind][0]
    lm = fdt.load(GOLDEN / model, device="cpu", backend="triton")
    assert lm.network.ops.name == "triton"
    for options in [{}] if model == V2 else [{}, {"separate_store": True}]:
        _decode_as_recorded(lm, model, _shortest(kind), **options)


@pytest.mark.parametrize("model", [V2, SDAR])
def test_nothing_is_lost_to_the_cache(model: str) -> None:
    """Finished blocks are exact: decoding without a cache gives the same tokens in the same forwards, but for prefills."""
    lm = _model(model, "cpu")
    for case in _cases(model)[::6]:
        options = OPTIONS[model](case) | {"sub_block_cache": False}
        cached, plain = (lm.generate([case["prompt"]], **options, cache=cache) for cache in ("block_causal", "none"))
        assert plain.sequences.tolist() == cached.sequences.tolist()
        assert plain.step_map.tolist() == cached.step_map.tolist()
        assert plain.nfe <= cached.nfe


@pytest.mark.parametrize("model", [V2, SDAR])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_of_a_batch_get_what_they_get_alone(model: str, backend: str) -> None:
    """Prompts of any lengths, multiples of the block among them: what the official batches get wrong."""
    lm = _model(model, backend)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in (1, 8, 31, 16, 17, 40, 33, 5)]
    options: dict[str, Any] = {"gen_length": 27, "block_length": 8}
    variants: list[dict[str, Any]] = [{"cache": "none"}, {"strategy": fdt.Threshold(0.5)}]
    if model == V2:
        strict = fdt.Threshold(0.5, strict=True)
        variants = [
            {"cache": "none", "strategy": strict},
            {"strategy": strict},
            {"sub_block_length": 4, "strategy": strict},
            {"sub_block_length": 4, "sub_block_cache": True, "strategy": strict},
            {"sub_block_length": 2, "sub_block_cache": True, "strategy": fdt.FixedSteps(14)},
        ]
    else:
        variants += [
            {"strategy": fdt.DenoisingSteps(3, 0.4)},
            {"strategy": fdt.DenoisingSteps(3), "separate_store": True},
            {"strategy": fdt.EntropyBudget(0.5), "temperature": 0.7},
            {"sub_block_length": 4, "strategy": fdt.DenoisingSteps(2, score="leftmost")},
        ]
    for variant in variants:
        of_all = options | variant
        batch = lm.generate(prompts, **of_all)
        for row, prompt in enumerate(prompts):
            alone = lm.generate([prompt], **of_all, seed=row)
            assert batch.generated[row].tolist() == alone.generated[0].tolist(), (variant, row)
            assert int(batch.row_forwards[row]) == int(alone.row_forwards[0]), (variant, row)
            assert batch.sequences[row, -len(prompt) - 27 : -27].tolist() == prompt


@pytest.mark.parametrize("model", [V2, SDAR])
def test_tokens_behind_a_block_change_nothing_in_it(model: str) -> None:
    """Logits of a position depend on its own block and those before it alone."""
    lm = _model(model, "cpu")
    assert lm.config.block_length is not None
    length = lm.config.block_length
    ids = torch.randint(0, 300, (1, 3 * length), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, 2 * length :] = 7
    before, after = lm.logits(ids), lm.logits(other)
    torch.testing.assert_close(before[:, : 2 * length], after[:, : 2 * length], rtol=0, atol=0)
    assert not torch.equal(before[:, 2 * length :], after[:, 2 * length :])
    other[:, 0] = 9
    assert not torch.equal(lm.logits(other)[:, length : 2 * length], before[:, length : 2 * length])


@pytest.mark.parametrize("model", [V2, SDAR])
def test_a_request_for_the_other_kind_of_attention_is_refused(model: str, tiny: fdt.MaskedDiffusionLM) -> None:
    lm = _model(model, "cpu")
    causal, other = (fdt.Engine(m, max_rows=2, max_length=128) for m in (lm, tiny))
    with pytest.raises(ValueError, match=f"cache must be none or block_causal for {lm.config.architecture}, whose attention is"):
        causal.add_request([1, 2, 3], gen_length=32, block_length=32, cache="dual")
    with pytest.raises(ValueError, match="cache must be none or prefix or dual for llada, whose attention is bidirectional"):
        other.add_request([1, 2, 3], lm.options(gen_length=32))
    assert not causal.has_unfinished and not other.has_unfinished
    request = causal.add_request([1, 2, 3], gen_length=30)
    while causal.has_unfinished:
        causal.step()
    assert request.output.generated.tolist() == lm.generate([[1, 2, 3]], gen_length=30).generated.tolist()


def test_blocks_of_another_length_than_the_weights_were_trained_with_give_a_warning_once() -> None:
    _warn_of_block_length.cache_clear()
    lm = _model(SDAR, "cpu")
    with pytest.warns(UserWarning, match=r"block_length = 8: the weights of this sdar were trained with blocks of 4;") as seen:
        _ = [lm.generate([[1, 2, 3]], gen_length=8, block_length=8) for _ in range(2)]
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate([[1, 2, 3]], gen_length=8)
        lm.generate([[1, 2, 3]], gen_length=8, block_length=8)


@pytest.mark.parametrize("model", [V2, SDAR])
def test_a_trace_draws_blocks_where_they_are(model: str, tmp_path: Path) -> None:
    lm, length = _model(model, "cpu"), 8
    prompts = [list(range(3)), list(range(16)), list(range(21))]
    out = lm.generate(prompts, gen_length=20, block_length=length, trace=tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    assert [row["blocks"] for row in data["rows"]] == [[-3, 5, 13], [0, 8, 16], [-5, 3, 11, 19]]
    for forward in data["forwards"]:
        for part in forward["rows"]:
            blocks = data["rows"][part["row"]]["blocks"]
            first = blocks[part["block"]]
            assert all(first <= slot < first + length for slot, _ in part["committed"]) or forward["refresh"]
            assert part["window"][0] >= -len(prompts[part["row"]])
    assert [row["generated"] for row in data["rows"]] == out.generated.tolist()
