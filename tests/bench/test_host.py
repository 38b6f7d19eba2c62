"""What the launchers cost the host: checks that held are not repeated, and `bench host` counts without a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from _support import DEVICE, ints, randn
from typer.testing import CliRunner

from fastdllm_triton import ops
from fastdllm_triton.bench import host
from fastdllm_triton.cli.app import app
from fastdllm_triton.kernels import _check


def calls() -> dict[str, Any]:
    """Arguments of the ops of a layer."""

    def tensor(*shape: int) -> torch.Tensor:
        return randn(*shape, dtype=torch.float32, device=DEVICE)

    start, cache = ints([0], DEVICE), tensor(1, 2, 8, 16)
    return {
        "rms_norm": ((tensor(3, 32), tensor(32), 1e-5), {"residual": tensor(3, 32)}),
        "swiglu": ((tensor(3, 32),), {}),
        "linear": ((tensor(3, 32), tensor(8, 32)), {}),
        "rope_kv_write": ((tensor(1, 3, 96), cache, cache.clone(), start, start, 1e4), {}),
        "window_attention": ((tensor(1, 3, 2, 16), cache, cache, start, start + 8), {}),
        "token_statistics": ((tensor(3, 40),), {}),
        "head_statistics": ((tensor(3, 16), tensor(40, 16)), {}),
    }


@pytest.mark.parametrize("op", calls())
def test_what_held_for_a_layout_is_not_checked_again(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), op)
    args, kwargs = calls()[op]
    function(*args, **kwargs)

    def checked(*_: Any, **__: Any) -> None:
        raise AssertionError("checked again")

    for module in (_check, importlib.import_module(f"fastdllm_triton.kernels.{op}")):
        for name in ("require", "check_floats", "check_device"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, checked)
    function(*args, **kwargs)  # other values of the same layout would pass as well
    with pytest.raises(AssertionError, match="checked again"):
        function(*(torch.cat((args[0], args[0])), *args[1:]), **kwargs)


def test_a_check_remembers_layouts_and_forgets_them_before_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    check = _check.once(lambda x, option: asked.append((x.shape, option)) or len(asked))  # type: ignore[func-returns-value]
    x = torch.zeros(2, 3)
    assert [check(x, None), check(x + 1, None), check(x.T, None), check(x, "a"), check(x.double(), None)] == [1, 1, 2, 3, 4]
    assert check(x, [1]) == 5  # cannot be a key
    monkeypatch.setattr(_check, "MOST_LAYOUTS", 4)
    assert check(x[:1], None) == 6
    assert check(x, None) == 7


def test_what_a_check_raises_is_raised_again() -> None:
    x = torch.zeros(3, 31, device=DEVICE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gate_up must be of an even last dimension, got one of 31"):
            ops.resolve("triton", DEVICE).swiglu(x)


def test_host_time_counts_every_op_of_a_forward_and_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "REPEATS", 2)
    found = host.microseconds("tiny dream", prompt=32)
    layer = {"linear", "rms_norm", "rope_kv_write", "window_attention"}
    assert layer | {"head_statistics", "commit_tokens"} <= set(found)
    assert all(0 < time < 1e6 for time in found.values())


def test_bench_host_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "REPEATS", 1)
    result = CliRunner().invoke(app, ["bench", "host"])
    assert result.exit_code == 0, result.output
    assert "window_attention" in result.output
    assert "step, us" in result.output
