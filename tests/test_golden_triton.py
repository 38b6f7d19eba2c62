"""The engine with every op in Triton's interpreter, against the shortest of the recorded trajectories."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN
from test_golden import _cases, _selected, _strategy

import fastdllm_triton as fdt


@pytest.mark.parametrize(("model", "strategy"), [("llada-mha", "factor"), ("llada-gqa", "threshold")])
def test_the_kernels_decode_as_the_official_code(model: str, strategy: str) -> None:
    cases = [case for case in _cases(model) if (case["cache"], case["strategy"]) == ("dual", strategy)]
    case = min(cases, key=lambda case: (case["gen_length"], case["nfe"], len(case["prompt"])))
    out = fdt.load(GOLDEN / model, backend="triton").generate(
        torch.tensor(case["prompt"]),
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        cache="dual",
        strategy=_strategy(case),
        stop_at_eos=False,
    )
    assert out.generated.tolist() == case["tokens"]
    assert out.nfe == case["nfe"]
    assert _selected(out, case) == case["selected"]
