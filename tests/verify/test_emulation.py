"""This package's kernels as compiled, executed without a GPU: whole models, chains of launches, and faults put into them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels._pdl import dependent_launch
from fastdllm_triton.kernels.rope_kv_write import rope_kv_write
from fastdllm_triton.ptx.emulator import Emulator, FindingsError
from fastdllm_triton.ptx.findings import Kind
from fastdllm_triton.types import DEFAULT_LAUNCH, PolicyState, TokenStatistics
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.emulation import ACCEPTED, emulated

pytestmark = pytest.mark.ptx


@pytest.fixture(params=["sm_80", "sm_90"])
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulated(request.param) as made:
        yield made


def test_a_generation_in_bfloat16_is_that_of_the_reference(emulator: Emulator) -> None:
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual", "strategy": fdt.Threshold(0.6)}
    prompts = [[40, 41, 42, 43, 44], [7, 8, 9]]
    want, out = (
        fdt.load(GOLDEN / "llada-gqa", device="cpu", dtype="bfloat16", backend=backend).generate(prompts, **options)
        for backend in ("reference", "triton")
    )
    assert out.sequences.tolist() == want.sequences.tolist()
    assert out.step_map.tolist() == want.step_map.tolist()
    assert out.steps > out.refreshes >= 2
    kernels = {"_rms_norm_kernel", "_window_attention_kernel", "_head_statistics_kernel", "_commit_tokens_kernel"}
    assert kernels <= emulator.launches.keys()


def _forward(model: fdt.MaskedDiffusionLM) -> torch.Tensor:
    """The hidden states of a forward over everything, in which all is done by kernels."""
    ids = torch.arange(40, 72)[None]
    start = torch.zeros(1, dtype=torch.int32)
    model.network.ops = model.network.ops.with_options(fuse_linear=True)
    with torch.no_grad():
        return model.network.forward(ids, start, model.network.new_cache(start, 32), rows=torch.arange(32))


def test_a_forward_whose_launches_overlap_is_that_of_launches_in_order() -> None:
    with emulated("sm_90") as emulator:
        model = fdt.load(GOLDEN / "llada-gqa", device="cpu", dtype="bfloat16", backend="triton")
        want = _forward(model)
        with emulator.overlapping():
            hidden = _forward(model)
        assert torch.equal(hidden, want)
        assert dependent_launch(ARCHS["sm_90"], DEFAULT_LAUNCH) == {"PDL": True, "launch_pdl": True}


@pytest.mark.parametrize("fuses", [False, True])
def test_dreams_rounding_is_lost_where_products_and_sums_are_fused(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, fuses: bool
) -> None:
    module = importlib.import_module(rope_kv_write.__module__)
    monkeypatch.setattr(module, "_fuses", lambda rounding: fuses)
    qkv = torch.randn(1, 12, 3 * 4 * 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    caches = torch.zeros(2, 1, 4, 80, 128, dtype=torch.bfloat16)
    start, zero = torch.tensor([37], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    queries = [
        function(qkv, caches[0].clone(), caches[1].clone(), start, zero, 1e6, rounding="dream")
        for function in (rope_kv_write, OPS["rope_kv_write"].reference)
    ]
    equal = (queries[0] == queries[1]).double().mean().item()
    assert equal < 0.95 if fuses else equal > 0.999


def test_what_is_accepted_still_occurs() -> None:
    """The end of a block shorter than its program has threads, in front of masked slots."""
    block, slots, mask = 33, 120, 9
    statistics = TokenStatistics(torch.ones(1, block, dtype=torch.int64), *torch.zeros(5, 1, block))
    first = torch.zeros(1, dtype=torch.int32)
    state = PolicyState.create(
        "confidence",
        "threshold",
        value=0.5,
        mask_id=mask,
        kv_start=first,
        seed=torch.zeros(1, dtype=torch.int64),
        slots=slots,
        eos_ids=[1],
    )
    with emulated("sm_90", strict=False) as emulator:
        OPS["commit_tokens"].kernel(torch.full((1, slots), mask), statistics, first, state)
    assert state.ended.item()
    occurring = {known for known in ACCEPTED for finding in emulator.findings if known.covers(finding)}
    assert occurring == set(ACCEPTED)
    assert not emulator.unaccepted


def test_a_kernel_that_does_not_wait_for_its_predecessor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pdl = importlib.import_module("fastdllm_triton.kernels._pdl")
    x, weight = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()
    rms_norm = OPS["rms_norm"].kernel
    with emulated("sm_90", strict=False) as emulator, emulator.overlapping():
        rms_norm(rms_norm(x, weight, 1e-5), weight, 1e-5)
    assert not emulator.findings
    module = importlib.import_module(rms_norm.__module__)
    monkeypatch.setattr(module, "dependent_launch", lambda arch, options: {"PDL": False, "launch_pdl": True})
    assert pdl.in_use(ARCHS["sm_90"])
    with pytest.raises(FindingsError, match=str(Kind.EARLY_ACCESS)), emulated("sm_90") as emulator, emulator.overlapping():
        rms_norm(rms_norm(x, weight, 1e-5), weight, 1e-5)
