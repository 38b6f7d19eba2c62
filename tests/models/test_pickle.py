"""A model goes to another process, and comes back from a file, by value: its weights, its ops, its tokenizer."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM

import fastdllm_triton as fdt

PROMPT = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"


def decode(model: fdt.MaskedDiffusionLM, prompt: Any) -> tuple[list[list[int]], str]:
    out = model.generate(prompt, gen_length=16, block_length=8)
    return out.sequences.tolist(), out.texts[0] if model.tokenizer else ""


def test_a_spawned_worker_generates_the_same_tokens(tiny: fdt.MaskedDiffusionLM) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(decode, tiny, PROMPT).result() == decode(tiny, PROMPT)


@pytest.mark.parametrize("name", ["tiny", "llada-gqa", GOLDEN_DREAM])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_has_the_weights_as_they_are_and_memory_of_its_own(name: str, make: Any) -> None:
    model = fdt.load(name if name == "tiny" else GOLDEN / name, device="cpu")
    model.network.weights.final_norm.mul_(0.5)  # No longer those of the folder.
    before = decode(model, [[7, 8, 9]])
    model.buffers.limit = 2**40  # As on a GPU: what is kept is not for another process.
    model.generate([[5, 6, 7]], gen_length=8, block_length=8)
    assert len(model.buffers) == 1
    twin = make(model)
    assert len(twin.buffers) == 0
    assert decode(twin, [[7, 8, 9]]) == before
    twin.network.weights.final_norm.zero_()
    model.release()
    assert decode(model, [[7, 8, 9]]) == before


@pytest.mark.parametrize(("backend", "batch_invariant"), [("reference", False), ("triton", False), ("triton", True)])
def test_the_ops_are_those_of_the_original(backend: str, batch_invariant: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = fdt.load(GOLDEN / "llada-gqa", device=device, backend=backend, batch_invariant=batch_invariant).network.ops
    twin = pickle.loads(pickle.dumps(ops))
    x, weight = torch.randn(3, 32, device=device), torch.randn(64, 32, device=device)
    assert torch.equal(twin.linear(x, weight), ops.linear(x, weight))
    for field in fields(ops):
        value, again = getattr(ops, field.name), getattr(twin, field.name)
        assert getattr(value, "func", value) == getattr(again, "func", again)  # Partial functions are equal to themselves alone.
