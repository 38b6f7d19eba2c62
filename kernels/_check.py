"""What every launcher checks before it launches. Messages name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

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


def require(ok: bool, argument: str, given: object, allowed: str) -> None:
    """Raises if a condition on an argument does not hold.

    Raises:
        ValueError: with the argument's name.
    """
    if not ok:
        raise ValueError(f"{argument}: got {given}, needs {allowed}")


def check_floats(**tensors: Tensor | None) -> None:
    """The tensors that are there share a supported dtype and a device that runs kernels, and their last dimension is dense."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, pattern = next(iter(given.items()))
    require(pattern.dtype in DTYPES, first, pattern.dtype, "float16, bfloat16 or float32")
    check_device(first, pattern)
    # The interpreter's numpy has no bfloat16 and computes with its bits.
    interpretable = not INTERPRETED or pattern.dtype != torch.bfloat16
    require(interpretable, first, pattern.dtype, "float16 or float32 in Triton's interpreter")
    for name, tensor in given.items():
        require(tensor.dtype == pattern.dtype, name, tensor.dtype, f"the dtype of {first}, {pattern.dtype}")
        require(tensor.device == pattern.device, name, tensor.device, f"the device of {first}, {pattern.device}")
        dense = tensor.ndim > 0 and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1)
        require(dense, name, f"strides {tensor.stride()}", "a last dimension of stride 1")


def check_device(name: str, tensor: Tensor) -> None:
    """The tensor is where kernels run."""
    runs = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    require(runs, name, f"a tensor on {tensor.device}", "a GPU tensor (or a CPU tensor and TRITON_INTERPRET=1)")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """The tensor, if it is there, has this shape."""
    if tensor is not None:
        require(tuple(tensor.shape) == shape, name, f"shape {list(tensor.shape)}", f"shape {list(shape)}")


def check_slots(batch: int, device: torch.device, **tensors: Tensor | None) -> None:
    """The tensors that are there hold one int32 slot a sequence, on the device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_shape(name, tensor, batch)
            require(tensor.dtype == torch.int32, name, tensor.dtype, "torch.int32")
            require(tensor.device == device, name, tensor.device, f"a tensor on {device}")
            require(batch <= 1 or tensor.stride(0) == 1, name, f"strides {tensor.stride()}", "a contiguous tensor")


def row_stride(tensor: Tensor) -> int | None:
    """From one row of ``[..., E]`` to the next, in elements; None where the leading dimensions do not collapse into one."""
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
    require(stride is not None, name, f"strides {tensor.stride()}", "leading dimensions that collapse into one")
    return stride  # type: ignore[return-value]


def collapsed(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its leading dimensions do not collapse into one."""
    return tensor if row_stride(tensor) is not None else tensor.contiguous()


@once
def check_workspace(workspace: Tensor, needed: int, device: torch.device) -> None:
    """The tensor is float32 scratch of enough elements."""
    is_scratch = workspace.dtype == torch.float32 and workspace.device == device and workspace.is_contiguous()
    require(is_scratch, "workspace", f"{workspace.dtype} on {workspace.device}", f"contiguous float32 on {device}")
    require(workspace.numel() >= needed, "workspace", f"{workspace.numel()} elements", f"at least {needed}")
