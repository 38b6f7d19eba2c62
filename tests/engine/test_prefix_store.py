"""Finished blocks that later requests take over: the same tokens, fewer slots computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm_triton as fdt
from fastdllm_triton.engine.prefix_store import PrefixStore

FAMILIES = ("fast-dllm-v2", "sdar")
OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "strategy": fdt.Threshold(0.5)}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> fdt.MaskedDiffusionLM:
    return fdt.load(GOLDEN / request.param, device="cpu")


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=12, deadline=None)
@given(turns=st.lists(st.integers(1, 25), min_size=2, max_size=4), seed=st.integers(0, 5), cuts=st.integers(0, 30))
def test_a_conversation_gets_the_tokens_that_it_gets_without(
    model: fdt.MaskedDiffusionLM, turns: list[int], seed: int, cuts: int
) -> None:
    """Each turn's prompt is what was said before, and some more; at times the end of what was said is another."""
    store, said = PrefixStore(), _ids(cuts, seed)
    for number, length in enumerate(turns):
        prompt = said + _ids(length, 100 * seed + number)
        with_store = model.generate([prompt], reuse=store, **OPTIONS)
        without = model.generate([prompt], **OPTIONS)
        assert with_store.sequences.tolist() == without.sequences.tolist()
        said = prompt + without.generated[0].tolist()[: 20 - number]


def test_only_what_is_new_is_computed(model: fdt.MaskedDiffusionLM) -> None:
    store, prompt = PrefixStore(), _ids(40, 1)
    first = model.generate([prompt], reuse=store, stop_at_eos=False, **OPTIONS)
    # 40 positions of the prompt and 16 of the answer are whole blocks that another one followed.
    assert store.reused_tokens == 0 and len(store) == 7
    windows: list[tuple[int, int]] = []
    longer = [*prompt, *first.generated[0].tolist(), *_ids(5, 2)]
    model.generate([longer], reuse=store, callback=lambda forward: windows.append(forward.windows[0]), **OPTIONS)
    assert store.reused_tokens == 56
    assert windows[0][0] == 56


def test_requests_of_an_engine_share_a_prompt(model: fdt.MaskedDiffusionLM) -> None:
    """One row, so that the second request begins when the first one has ended; and a batch, whose rows all begin together."""
    shared, store = _ids(24, 3), PrefixStore()
    prompts = [shared + _ids(n, n) for n in (3, 9, 8)]
    alone = [model.generate([prompt], **OPTIONS).sequences.tolist() for prompt in prompts]
    for max_rows in (1, 3):
        store.clear()
        engine = fdt.Engine(model, max_rows=max_rows, max_length=64)
        requests = [engine.add_request(prompt, reuse=store, **OPTIONS) for prompt in prompts]
        while engine.has_unfinished:
            engine.step()
        assert [request.output.sequences.tolist() for request in requests] == alone
        again = [engine.add_request(prompt, reuse=store, **OPTIONS) for prompt in prompts]
        before = store.reused_tokens
        while engine.has_unfinished:
            engine.step()
        assert store.reused_tokens >= before + 3 * 24
        assert [request.output.sequences.tolist() for request in again] == alone


def test_an_answer_that_is_left_keeps_its_finished_blocks(model: fdt.MaskedDiffusionLM) -> None:
    store, prompt = PrefixStore(), _ids(17, 4)
    generation = model.stream([prompt], reuse=store, stop_at_eos=False, **OPTIONS)
    for forward in generation:
        if forward.blocks[0] == 2:
            break
    generation.close()
    known = generation.output().sequences[0].tolist()
    assert store.count(known, 8) == 32
    whole = model.generate([known[:33]], **OPTIONS).sequences.tolist()
    assert model.generate([known[:33]], reuse=store, **OPTIONS).sequences.tolist() == whole


def test_what_was_not_used_for_longest_goes_first() -> None:
    k = torch.zeros(2, 1, 8, 4)
    block = 2 * 2 * 4 * 2 * 4  # bytes of the keys and values of a block of 2
    store = PrefixStore(max_bytes=3 * block)
    store.put([1, 2, 3, 4], 2, k[:, :, :4], k[:, :, :4])
    store.put([5, 6], 2, k[:, :, :2], k[:, :, :2])
    assert store.nbytes == 3 * block
    assert store.find([1, 2], 2) is not None  # used: what follows it is now the oldest
    store.put([7, 8], 2, k[:, :, :2], k[:, :, :2])
    assert [store.count(ids, 2) for ids in ([1, 2, 3, 4], [5, 6], [7, 8])] == [2, 2, 2]
    assert store.nbytes == 3 * block
    store.put(list(range(10, 18)), 2, k, k)  # four blocks, of which the first three fit
    assert store.count(list(range(10, 18)), 2) == 6
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_block_lengths_are_kept_apart(model: fdt.MaskedDiffusionLM) -> None:
    store, prompt = PrefixStore(), _ids(33, 5)
    for length in (8, 16, 8):
        options = OPTIONS | {"block_length": length}
        want = model.generate([prompt], **options).sequences.tolist()
        assert model.generate([prompt], reuse=store, **options).sequences.tolist() == want


def test_bad_stores_are_refused(model: fdt.MaskedDiffusionLM, tiny: fdt.MaskedDiffusionLM) -> None:
    with pytest.raises(TypeError, match="reuse must be a PrefixStore or None, got bool"):
        model.generate([[1, 2]], reuse=True, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reuse must be None for llada: its attention is bidirectional"):
        tiny.generate([[1, 2]], reuse=PrefixStore())
    store = PrefixStore()
    model.generate([_ids(9, 1)], reuse=store, **OPTIONS)
    other = fdt.load(model.folder, device="cpu")
    with pytest.raises(ValueError, match="this store serves another model"):
        other.generate([[1, 2]], reuse=store, **OPTIONS)
    with pytest.raises(ValueError, match="max_bytes must be an integer of 1 or more, got 0"):
        PrefixStore(0)
