"""Chooses, once and in one place, whether the ops run as Triton kernels or as their PyTorch twins."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from . import reference

Backend = Literal["auto", "triton", "reference"]
NAMES = (
    "commit_tokens",
    "head_statistics",
    "rms_norm",
    "rope_kv_write",
    "swiglu",
    "token_statistics",
    "window_attention",
)


@dataclass(frozen=True)
class Ops:
    """The ops of one backend.

    Attributes:
        name: ``"triton"`` or ``"reference"``.
        reason: why it was chosen, in words.
    """

    name: str
    reason: str
    commit_tokens: Callable[..., Any]
    head_statistics: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope_kv_write: Callable[..., Any]
    swiglu: Callable[..., Any]
    token_statistics: Callable[..., Any]
    window_attention: Callable[..., Any]


def _of(module: ModuleType, name: str, reason: str) -> Ops:
    return Ops(name, reason, **{op: getattr(importlib.import_module(f"{module.__name__}.{op}"), op) for op in NAMES})


def _obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}, and Triton kernels run on CUDA and ROCm devices"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    from . import kernels

    missing = [op for op in NAMES if importlib.util.find_spec(f"{kernels.__name__}.{op}") is None]
    return f"this version has no Triton kernel for {', '.join(missing)}" if missing else None


@cache
def resolve(backend: str, device: torch.device) -> Ops:
    """The ops to run on a device.

    Args:
        backend: ``"triton"`` raises where the kernels cannot run; ``"reference"`` is plain PyTorch; ``"auto"`` takes the
            kernels where they can run. On a GPU where they cannot, it falls back with one warning that says why.
        device: where the tensors live.

    Raises:
        ValueError: ``backend`` is not one of the three.
        RuntimeError: ``backend="triton"`` and the kernels cannot run on this device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "reference":
        return _of(reference, "reference", "asked for")
    obstacle = _obstacle(device)
    if obstacle is None:
        from . import kernels

        return _of(kernels, "triton", "a GPU with Triton" if backend == "auto" else "asked for")
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
    if device.type == "cuda":
        warnings.warn(f"falling back to the PyTorch reference ops: {obstacle}", stacklevel=2)
    return _of(reference, "reference", obstacle)
