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
from fastdllm_triton.engine.request import Request, batch_requests
from fastdllm_triton.engine.runner import ModelRunner
from fastdllm_triton.engine.scheduler import RowFlags, Scheduler
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


class Copies(TorchDispatchMode):
    """Fails where a copy to the device makes the host wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)}
        if func is torch.ops.aten.copy_.default and len(devices) > 1:
            assert args[2:] == (True,), "the host waits for a copy"
        assert func is not torch.ops.aten._to_copy.default or len(devices) == 1, "the host waits for a copy"
        return out


class Launched:
    """A kernel that only counts, and takes no tensor of the host."""

    counts: Counter[str]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(arg.device == META for arg in args if isinstance(arg, torch.Tensor))
            self.counts["kernel"] += 1

        return launch


def engine_of(model: str, rows: int, options: dict[str, Any]) -> tuple[Transformer, list[Request], ModelRunner]:
    """A network of two layers whose kernels launch nothing, requests of ``SLOTS - 128`` tokens, and their buffers."""
    config = replace(config_of(model), layers=2)
    functions = {op: getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), op) for op in NAMES}
    ops = Ops(name="triton", reason="", required=True, fuses_residual=lambda x, weight: False, **functions)
    network = Transformer(config, Weights.allocate(config, META, torch.bfloat16), ops)
    asked = fdt.GenerationConfig(**{"gen_length": 128, "block_length": LENGTH} | options)
    requests = batch_requests([[1] * (SLOTS - 128)] * rows, None, asked, config)
    return network, requests, ModelRunner(network, rows, SLOTS, copies=asked.rows_per_sequence)


def forwards(
    model: str, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], Counter[str]]:
    """What a step and a refresh launch, Triton's kernels under one name."""
    step: Counter[str] = Counter()
    refresh: Counter[str] = Counter()
    monkeypatch.setattr(host, "_NoLaunch", Launched)
    with host.no_launches(), torch.no_grad():
        network, requests, runner = engine_of(model, rows, options)
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


BLOCK_CAUSAL: dict[str, tuple[str, dict[str, Any], set[tuple[str, int]]]] = {
    "v2": ("fast-dllm-v2-7b", {}, {("refresh", 384), ("refresh", 32), ("step", 32)}),
    "v2-cached": (
        "fast-dllm-v2-7b",
        {"sub_block_length": 8, "sub_block_cache": True},
        {("refresh", 384), ("refresh", 32), ("block_step", 32), ("step", 8)},
    ),
    "v2-none": ("fast-dllm-v2-7b", {"cache": "none"}, {("refresh", 384), ("refresh", 416), ("step", 416), ("step", 448)}),
    "sdar": ("sdar-4b", {}, {("refresh", 416), ("refresh", 64), ("step", 32)}),
    "sdar-stored": ("sdar-4b", {"separate_store": True}, {("refresh", 384), ("refresh", 32), ("step", 32)}),
    "sdar-sampled": ("sdar-4b", {"temperature": 0.7, "block_length": 4}, {("refresh", 388), ("refresh", 8), ("step", 4)}),
}


@pytest.mark.parametrize(("model", "options", "expected"), BLOCK_CAUSAL.values(), ids=BLOCK_CAUSAL)
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_code_of_block_causal_models_touches_the_host_nowhere(
    model: str, rows: int, options: dict[str, Any], expected: set[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of forward, as the scheduler plans them; and no copy to the device is waited for."""
    monkeypatch.setattr(host, "_NoLaunch", Launched)
    Launched.counts = Counter()
    seen = set()
    with host.no_launches(), torch.no_grad():
        network, requests, runner = engine_of(model, rows, {"cache": "block_causal"} | options)
        scheduler = Scheduler(rows)
        for request in requests:
            scheduler.add(request)
        scheduler.admit()
        block = requests[0].config.decoded_length
        for masked in (block - 1, block - 2, 0) * 5:
            plan = scheduler.schedule()
            runner.begin_blocks(plan.begun, plan.requests)
            for forward in plan.forwards:
                shape = runner.shape_of(forward, scheduler.rows)  # makes the tables, which are kept
                with Copies():
                    assert runner.shape_of(forward, scheduler.rows) == shape
                runner.run(network, shape)
                Launched.counts.clear()
                with Watch(Counter()):
                    runner._forward(network, shape)
                assert Launched.counts["kernel"] >= 8
                seen.add((shape.kind, shape.window))
            # Sub-blocks: the first token of the block is known, that of the next one is not.
            flags = [RowFlags(masked, False, False, len(r.history) + len(r.pending), False) for r in requests]
            if scheduler.update(flags):
                break
    assert seen >= expected


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("model", ["llada-8b", "dream-7b"])
def test_a_step_launches_what_is_counted(model: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Launched.counts = Counter()
    step, _ = forwards(model, rows, {}, monkeypatch)
    counted = count_launches(replace(config_of(model), layers=2), rows=rows, slots=SLOTS)
    # The library's products in the layers are replaced by nothing here; its float32 logits take no conversions on a GPU.
    assert step.total() + 2 * 4 - step["to_copy"] == counted.per_step
