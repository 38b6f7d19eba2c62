"""What every launcher checks before it launches. Messages name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from ._arch import is_emulated

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Whether kernels are run by Triton's interpreter, on CPU tensors. Fixed when the first kernel is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret

#: Layouts that a check remembers before it forgets them all: a model has a handful, windows that shrink have many.
MOST_LAYOUTS = 4096

Answer = TypeVar("Answer")


def once(check: Callable[..., Answer]) -> Callable[..., Answer]:
    """Remembers the answers of a function of layouts: for the same shapes, strides, dtypes and devices it is not called again.

    A forward calls a launcher once a layer, with other tensors of one layout. Arguments that are not tensors count as they
    are. What the function raises is not remembered. It must not look at data, nor keep a tensor.
    """
    answers: dict[tuple[Any, ...], Answer] = {}

    @wraps(check)
    def call(*arguments: Any) -> Answer:
        key = tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments])
        try:
            return answers[key]
        except KeyError:
            pass
        except TypeError:  # an argument that cannot be hashed, which the check will name
            return check(*arguments)
        if len(answers) >= MOST_LAYOUTS:
            answers.clear()
        answer = answers[key] = check(*arguments)
        return answer

    return call


def require(argument: str, actual: object, allowed: str, ok: bool) -> None:
    """Raises ``ValueError`` unless ``ok``: as :func:`fastdllm_triton.utils.checks.require`, with ``actual`` in words."""
    if not ok:
        raise ValueError(f"{argument} must be {allowed}, got {actual}")


def check_floats(**tensors: Tensor | None) -> None:
    """Checks that tensors, but for None, share a supported dtype and a device that runs kernels, with a dense last dimension."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, pattern = next(iter(present.items()))
    require(first, pattern.dtype, "of dtype float16, bfloat16 or float32", pattern.dtype in DTYPES)
    check_device(first, pattern)
    # The interpreter's numpy has no bfloat16 and computes with its bits.
    interpretable = not INTERPRETED or pattern.dtype != torch.bfloat16
    require(first, pattern.dtype, "of dtype float16 or float32 in Triton's interpreter", interpretable)
    for name, tensor in present.items():
        require(name, tensor.dtype, f"of the dtype of {first}, {pattern.dtype}", tensor.dtype == pattern.dtype)
        require(name, f"one on {tensor.device}", f"on the device of {first}, {pattern.device}", tensor.device == pattern.device)
        dense = tensor.ndim > 0 and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1)
        require(name, f"strides {tensor.stride()}", "of last stride 1", dense)


def runs_on_cpu() -> bool:
    """Whether kernels take CPU tensors: in Triton's interpreter, or as compiled code that is executed without a GPU."""
    return INTERPRETED or is_emulated()


def check_device(name: str, tensor: Tensor) -> None:
    """Checks that the tensor is where kernels run."""
    runs = tensor.is_cuda or (tensor.device.type == "cpu" and runs_on_cpu())
    require(name, f"a tensor on {tensor.device}", "a GPU tensor (or a CPU tensor and TRITON_INTERPRET=1)", runs)


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Checks that the tensor, unless it is None, has this shape."""
    if tensor is not None:
        require(name, f"shape {list(tensor.shape)}", f"of shape {list(shape)}", tuple(tensor.shape) == shape)


def check_slots(batch: int, device: torch.device, **tensors: Tensor | None) -> None:
    """Checks that the tensors, but for None, hold one int32 slot a sequence, on the device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_shape(name, tensor, batch)
            require(name, tensor.dtype, "of dtype torch.int32", tensor.dtype == torch.int32)
            require(name, f"one on {tensor.device}", f"on {device}", tensor.device == device)
            require(name, f"strides {tensor.stride()}", "contiguous", batch <= 1 or tensor.stride(0) == 1)


@once
def row_stride(tensor: Tensor) -> int | None:
    """Elements from one row of ``[..., E]`` to the next; None where the leading dimensions do not collapse into one."""
    try:
        return tensor.view(-1, tensor.shape[-1]).stride(0)
    except RuntimeError:
        return None


def row_stride_of(name: str, tensor: Tensor) -> int:
    """The same of a tensor that must have one.

    Raises:
        ValueError: the leading dimensions do not collapse.
    """
    stride = row_stride(tensor)
    require(name, f"strides {tensor.stride()}", "of leading dimensions that collapse into one", stride is not None)
    return stride  # type: ignore[return-value]


def collapsed(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a contiguous copy where its leading dimensions do not collapse into one; and the step from row to row."""
    stride = row_stride(tensor)
    return (tensor, stride) if stride is not None else (tensor.contiguous(), tensor.shape[-1])


def scratch(workspace: Tensor | None, needed: int, device: torch.device) -> Tensor | None:
    """``needed`` elements of float32: the caller's workspace, which is checked, or a new one; None if none are needed."""
    if workspace is None:
        return torch.empty(needed, dtype=torch.float32, device=device) if needed else None
    _check_workspace(workspace, needed, device)
    return workspace


@once
def _check_workspace(workspace: Tensor, needed: int, device: torch.device) -> None:
    """Checks that the tensor is float32 scratch of enough elements."""
    is_scratch = workspace.dtype == torch.float32 and workspace.device == device and workspace.is_contiguous()
    require("workspace", f"{workspace.dtype} on {workspace.device}", f"contiguous float32 on {device}", is_scratch)
    require("workspace", f"{workspace.numel()} elements", f"of at least {needed}", workspace.numel() >= needed)
