"""What every launcher checks before it launches. Messages name the argument, what was given and what is allowed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Whether kernels are run by Triton's interpreter, on CPU tensors. Fixed when the first kernel is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


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


def as_rows(name: str, tensor: Tensor) -> Tensor:
    """``[..., E]`` as ``[rows, E]``, sharing memory."""
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        raise ValueError(f"{name}: got strides {tensor.stride()}, needs leading dimensions that collapse into one") from None
