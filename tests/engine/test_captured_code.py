"""The forwards that a GPU captures, launchers included, on tensors without data: none touches the host, and their launches are
those that are counted without running them.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdllm_triton as fdt
from fastdllm_triton.bench import host
from fastdllm_triton.bench._models import config_of
from fastdllm_triton.engine.request import batch_requests
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.models.transformer import Transformer, Weights
from fastdllm_triton.ops import NAMES, Ops
from fastdllm_triton.tools.launch_count import _FREE, count_launches

META = torch.device("meta")
LENGTH, SLOTS = 32, 512
#: What launches nothing and waits for nothing, beside views.
FREE = {*_FREE, "t", "detach", "permute", "reshape", "transpose"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 0.7},
    "rounded": {"logits_dtype": torch.bfloat16},
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "entropy": {"strategy": fdt.EntropyBudget(0.5)},
    "random": {"strategy": fdt.FixedSteps(8, score="random")},
    "guided": {"cfg_scale": 0.5},
    "last": {"commit_last": (5, 6)},
}


class Watch(TorchDispatchMode):
    """Fails where an op reads the device or meets a tensor of the host, and counts what launches."""

    def __init__(self, launched: Counter[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0].lstrip("_")
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device == META for tensor in tensors), f"{name} meets a tensor of the host"
        assert name not in ("local_scalar_dense", "nonzero", "is_nonzero"), f"{name} waits for the device"
        if name not in FREE:
            self.launched[name] += 1
        return out


class Launched:
    """A kernel that only counts, and takes no tensor of the host."""

    counts: Counter[str]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(arg.device == META for arg in args if isinstance(arg, torch.Tensor))
            self.counts["kernel"] += 1

        return launch


def forwards(
    model: str, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], Counter[str]]:
    """What a step and a refresh launch, Triton's kernels under one name."""
    step: Counter[str] = Counter()
    refresh: Counter[str] = Counter()
    monkeypatch.setattr(host, "_NoLaunch", Launched)
    config = replace(config_of(model), layers=2)
    with host.no_launches(), torch.no_grad():
        functions = {op: getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), op) for op in NAMES}
        ops = Ops(name="triton", reason="", required=True, fuses_residual=lambda x, weight: False, **functions)
        network = Transformer(config, Weights.allocate(config, META, torch.bfloat16), ops)
        asked = fdt.GenerationConfig(**{"gen_length": 128, "block_length": LENGTH} | options)
        requests = batch_requests([[1] * (SLOTS - 128)] * rows, None, asked, config)
        runner = ModelRunner(network, rows, SLOTS, copies=asked.rows_per_sequence)
        program = runner.program_of(requests, requests)
        window, masked = len(requests[0].policy.step(requests[0].block_state)), rows * LENGTH
        # Constants are copied to the device in a first call, which is not captured.
        shape = runner.refresh_shape(program, 0, rows, 0, SLOTS, masked)
        runner.run(network, shape)
        Launched.counts = step
        with Watch(step):
            runner.run(network, runner.step_shape(program, 0, rows, window, masked))
        Launched.counts = refresh
        with Watch(refresh):
            runner._forward(network, shape)
    return step, refresh


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("model", ["llada-8b", "dream-7b"])
def test_captured_code_touches_the_host_nowhere(
    model: str, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Launched.counts = Counter()
    step, refresh = forwards(model, rows, options, monkeypatch)
    assert step["kernel"] > 10 and refresh["kernel"] > 10


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("model", ["llada-8b", "dream-7b"])
def test_a_step_launches_what_is_counted(model: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Launched.counts = Counter()
    step, _ = forwards(model, rows, {}, monkeypatch)
    counted = count_launches(replace(config_of(model), layers=2), rows=rows, slots=SLOTS)
    # The library's products in the layers are replaced by nothing here; its float32 logits take no conversions on a GPU.
    assert step.total() + 2 * 4 - step["to_copy"] == counted.per_step
