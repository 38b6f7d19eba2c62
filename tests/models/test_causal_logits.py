"""Block-causal models against recorded logits of the official code: a prompt in one forward, then a block over its cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_BLOCK_CAUSAL
from safetensors.torch import load_file
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.models.kv_cache import KVCache
from fastdllm_triton.models.transformer import Transformer

#: Other orders of summation than the official code's, over logits of up to 40.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
#: Model, slots of the prompt's full blocks, its block length, and what is recorded over their cache: ids, slot, logits.
RECORDED = {
    "fast-dllm-v2": (64, 32, [("block_ids", 64, "block_logits"), ("sub_ids", 72, "sub_logits")]),
    "sdar": (32, 4, [("step_ids", 32, "step_logits")]),
}
EVERY_MODEL = pytest.mark.parametrize("model", GOLDEN_BLOCK_CAUSAL)
#: SDAR's kernels are those of v2 and the norms of heads besides; Triton's interpreter takes a minute for v2's longer prompt.
BACKENDS = [(model, backend) for model in GOLDEN_BLOCK_CAUSAL for backend in ("reference", "cpu")]
WITH_TRITON = [*BACKENDS, ("sdar", "triton"), pytest.param("fast-dllm-v2", "triton", marks=pytest.mark.slow)]
NOTHING = torch.zeros(0, dtype=torch.int64)


def _slots(value: int, rows: int) -> Tensor:
    return torch.full((rows,), value, dtype=torch.int32)


def _forward(network: Transformer, ids: Tensor, slot: int, cache: KVCache, **options: Any) -> Tensor:
    """Logits of a window that begins at a slot."""
    hidden = network.forward(ids, _slots(slot, len(ids)), cache, **options)
    return network.final_norm(hidden) @ network.head.T


@pytest.mark.parametrize(("model", "backend"), BACKENDS)
def test_logits_of_a_prompt_in_one_forward(model: str, backend: str) -> None:
    lm, data = fdt.load(GOLDEN / model, device="cpu", backend=backend), load_file(GOLDEN / model / "logits.safetensors")
    recorded = data["prefill_logits"]
    torch.testing.assert_close(lm.logits(data["input_ids"][:, : recorded.shape[1]]), recorded, **CLOSE)


@pytest.mark.parametrize(("model", "backend"), WITH_TRITON)
@torch.no_grad()
def test_logits_of_a_block_over_the_cache_of_a_prompt(model: str, backend: str) -> None:
    """The prefill writes keys and values alone. Slots behind a block are not there yet: what they hold is NaN."""
    network, data = (
        fdt.load(GOLDEN / model, device="cpu", backend=backend).network,
        load_file(GOLDEN / model / "logits.safetensors"),
    )
    prompt, length, windows = RECORDED[model]
    rows, first = len(data["input_ids"]), windows[0]
    cache = network.new_cache(_slots(0, rows), first[1] + data[first[0]].shape[1])
    nothing = network.forward(data["input_ids"][:, :prompt], _slots(0, rows), cache, NOTHING, block_length=length)
    assert nothing.shape == (0, network.config.width)
    for ids, slot, logits in windows:
        torch.testing.assert_close(_forward(network, data[ids], slot, cache), data[logits], **CLOSE)


@EVERY_MODEL
@torch.no_grad()
def test_a_forward_for_keys_and_values_alone_writes_the_same_to_the_bit(model: str) -> None:
    network = fdt.load(GOLDEN / model, device="cpu").network
    ids, start = (torch.arange(80).view(2, 40) * 7) % 300, _slots(0, 2)
    whole, alone = (network.new_cache(start, 40) for _ in range(2))
    network.forward(ids, start, whole, block_length=8)
    network.forward(ids, start, alone, NOTHING, block_length=8)
    assert torch.equal(whole.k, alone.k) and torch.equal(whole.v, alone.v)


def test_a_forward_for_keys_and_values_alone_leaves_out_what_nobody_reads() -> None:
    network, calls = fdt.load(GOLDEN / "sdar", device="cpu").network, []
    ops = network.ops

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append("attention")
        return ops.window_attention(*args, **kwargs)

    network.ops = replace(ops, window_attention=attend)
    start = _slots(0, 1)
    network.forward(torch.tensor([[5, 6, 7, 8]]), start, network.new_cache(start, 4), NOTHING)
    assert len(calls) == network.config.layers - 1


@EVERY_MODEL
@torch.no_grad()
def test_rows_with_padding_in_front_have_blocks_of_their_own(model: str) -> None:
    """Blocks are counted from a row's first slot, wherever that is; a prefill in chunks of blocks is the prefill."""
    lm = fdt.load(GOLDEN / model, device="cpu")
    network, length = lm.network, RECORDED[model][1]
    prompts = [[(3 + 7 * i) % 300 for i in range(2 * length)], [(11 + 5 * i) % 300 for i in range(3 * length)]]
    slots = 3 * length + 5
    kv_start = torch.tensor([slots - len(prompt) for prompt in prompts], dtype=torch.int32)
    ids = torch.tensor([[0] * (slots - len(prompt)) + prompt for prompt in prompts])
    logits = _forward(network, ids, 0, network.new_cache(kv_start, slots), block_length=length)
    for row, prompt in enumerate(prompts):
        alone = lm.logits(torch.tensor([prompt]))[0]
        torch.testing.assert_close(logits[row, slots - len(prompt) :], alone, **CLOSE)
    cache = network.new_cache(_slots(0, 1), 3 * length)
    chunks = [
        _forward(network, ids[1:, 5:][:, s : s + length], s, replace(cache, kv_end=_slots(s + length, 1)))
        for s in range(0, 3 * length, length)
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), logits[1:, 5:], **CLOSE)
