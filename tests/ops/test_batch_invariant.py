"""The batch-invariant mode: the bits of a row's result depend on that row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _support import DEVICE
from conftest import GOLDEN
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.kernels.window_attention import INVARIANT_CHUNK as CHUNK
from fastdllm_triton.ops import resolve


@pytest.fixture(autouse=True)
def rows_of_a_product_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tiles with BLAS, where a row's bits depend on its place in the tile, which an MMA's do not."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


PROMPTS = [[5, 9, 2], list(range(20, 49)), [7, 1]]


def _hidden(lm: fdt.MaskedDiffusionLM, prompts: list[list[int]], slots: int) -> list[Tensor]:
    """Hidden states of each prompt after a forward over left-padded rows of so many slots."""
    start = torch.tensor([slots - len(prompt) for prompt in prompts], dtype=torch.int32, device=lm.device)
    ids = torch.tensor([[0] * (slots - len(prompt)) + prompt for prompt in prompts], device=lm.device)
    with torch.no_grad():
        hidden = lm.network.forward(ids, torch.zeros_like(start), lm.network.new_cache(start, slots))
    return [row[-len(prompt) :] for row, prompt in zip(hidden, prompts, strict=True)]


@pytest.mark.parametrize("model", ["llada-gqa", "dream-gqa"])
def test_hidden_states_have_the_same_bits_alone_and_in_company(model: str) -> None:
    lm = fdt.load(GOLDEN / model, device=DEVICE, backend="triton", batch_invariant=True)
    together = _hidden(lm, PROMPTS, 33)
    for row, slots in ((0, 3), (1, 40)):  # alone, and alone behind more padding
        assert torch.equal(_hidden(lm, [PROMPTS[row]], slots)[0], together[row])


def test_statistics_have_the_same_bits_whatever_they_are_asked_with() -> None:
    lm = fdt.load(GOLDEN / "llada-mha", device=DEVICE, backend="triton", batch_invariant=True)
    hidden = torch.randn(90, lm.config.width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    keys = {"seed": torch.arange(90, device=DEVICE), "position": torch.arange(90, device=DEVICE) * 3}
    for sampling in ({}, {"temperature": 1.0}):
        options = {"step": torch.full((90,), 2, device=DEVICE), **keys, **sampling} if sampling else {}
        whole = lm.network.ops.head_statistics(hidden, lm.network.head, **options)
        for rows in ([3], [89, 5]):
            index = torch.tensor(rows, device=DEVICE)
            own = {name: key[index] if isinstance(key, Tensor) else key for name, key in options.items()}
            part = lm.network.ops.head_statistics(hidden, lm.network.head, rows=index, **own)
            for name, entry in vars(part).items():
                assert torch.equal(entry, getattr(whole, name)[index]), name


def test_options_of_a_row_and_default_positions_go_with_their_rows() -> None:
    ops = resolve("triton", DEVICE).with_options(batch_invariant=True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 32, generator=generator).to(DEVICE), torch.randn(90, 32, generator=generator).to(DEVICE)
    row = torch.arange(70, device=DEVICE)
    options = {"seed": 3, "temperature": 0.1 * (row % 5), "forbidden": torch.stack((row, -torch.ones_like(row)), dim=1)}
    whole = ops.head_statistics(hidden, weight, position=row, **options)
    out = ops.head_statistics(hidden[:1], weight)
    assert torch.equal(ops.head_statistics(hidden, weight, **options).token, whole.token)
    part = ops.head_statistics(
        hidden[69:], weight, position=row[69:], seed=3, temperature=options["temperature"][69:], forbidden=[69], out=out
    )
    assert part is out
    for name, entry in vars(part).items():
        assert torch.equal(entry, getattr(whole, name)[69:]), name


def test_chunks_of_keys_are_counted_from_a_rows_own_first_key() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device=DEVICE, backend="triton", batch_invariant=True)
    generator = torch.Generator().manual_seed(1)
    length, q_heads, kv_heads, dim = CHUNK + 70, 4, 2, 16
    q = torch.randn(1, 3, q_heads, dim, generator=generator).to(DEVICE)
    k, v = (torch.randn(1, kv_heads, length, dim, generator=generator).to(DEVICE) for _ in range(2))
    results = []
    for padding in (0, 37, CHUNK):
        slots = padding + length + 5
        caches = [torch.full((1, kv_heads, slots, dim), torch.nan, device=DEVICE) for _ in range(2)]
        for cache, part in zip(caches, (k, v), strict=True):
            cache[:, :, padding : padding + length] = part
        bounds = (torch.tensor([end], dtype=torch.int32, device=DEVICE) for end in (padding, padding + length))
        results.append(lm.network.ops.window_attention(q, *caches, *bounds))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_batch_invariant_decoding_is_that_of_the_reference() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device=DEVICE, backend="triton", batch_invariant=True)
    reference = fdt.load(GOLDEN / "llada-gqa", device="cpu", backend="reference")
    options = {"gen_length": 4, "block_length": 4, "strategy": fdt.Threshold(0.3), "stop_at_eos": False}
    found, expected = lm.generate(PROMPTS[::2], **options), reference.generate(PROMPTS[::2], **options)
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_in_bfloat16_each_row_gets_the_tokens_it_gets_alone(cache: str) -> None:
    lm = fdt.load("tiny", device="cuda", dtype=torch.bfloat16, backend="triton", batch_invariant=True)
    prompts = [lm.encode(text) for text in ("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?", "Ann has 20 books.", "Bo")]
    batch = lm.generate(prompts, gen_length=48, block_length=8, cache=cache)
    for row, prompt in enumerate(prompts):
        alone = lm.generate([prompt], gen_length=48, block_length=8, cache=cache)
        assert torch.equal(batch.generated[row], alone.generated[0])
        assert torch.equal(batch.confidence[row].nan_to_num(), alone.confidence[0].nan_to_num())


def test_the_option_goes_by_its_old_name_too() -> None:
    with pytest.warns(DeprecationWarning, match="deterministic is batch_invariant now"):
        lm = fdt.load(GOLDEN / "llada-mha", device=DEVICE, backend="triton", deterministic=True)
    assert lm.network.ops.options.batch_invariant
    with pytest.raises(ValueError, match="deterministic must be True or False, got 'yes'"):
        fdt.load("tiny", deterministic="yes")  # type: ignore[arg-type]


def test_without_the_kernels_it_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_invariant: needs the Triton kernels, and the backend is reference"):
        fdt.load("tiny", device="cpu", backend="reference", batch_invariant=True)
