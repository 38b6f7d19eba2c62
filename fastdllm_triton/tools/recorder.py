"""What launchers would launch, without a GPU: they take tensors on the meta device, which have shapes and no data, and every
kernel notes its launch instead of running. What is compiled ahead of time, counted and timed on the host comes from here.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .. import kernels
from ..kernels import _pdl
from ..kernels._arch import Arch
from ..ops import NAMES, Ops

META = torch.device("meta")
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments: all of the kernel's, by name.
        options: ``num_warps`` and the like.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def file(self) -> str:
        """Where the kernel is: an op, or what two ops share."""
        module: str = self.kernel.fn.__module__
        return module.rsplit(".", 1)[1]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def dtype(self) -> str:
        """The type of the numbers that it computes with: the 16-bit type among its pointers, or float32."""
        types = [_TYPES[value.dtype] for value in self.arguments.values() if isinstance(value, Tensor)]
        return next((name for name in types if name in ("bf16", "fp16")), "fp32")

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments whose values the compiler knows: constexprs, what is not there, and, as Triton has it, integers of 1."""
        return {name: value for name, value in self.arguments.items() if self._type(name) == "constexpr"}

    @property
    def signature(self) -> dict[str, str]:
        constants = self.constants
        return {name: self._type(name) for name in self.arguments if name not in constants}

    @property
    def divisible(self) -> tuple[str, ...]:
        """The arguments of the signature that are divisible by 16, as memory from PyTorch is."""
        fixed = {*self._listed("do_not_specialize"), *self._listed("do_not_specialize_on_alignment")}
        values = ((name, self.arguments[name]) for name in self.signature if name not in fixed)
        return tuple(name for name, value in values if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0))

    def _type(self, name: str) -> str:
        value = self.arguments[name]
        if value is None or "constexpr" in str(self.kernel.fn.__annotations__.get(name)):
            return "constexpr"
        if isinstance(value, Tensor):
            return f"*{_TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if value == 1 and name not in self._listed("do_not_specialize"):
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    def _listed(self, option: str) -> tuple[str, ...]:
        # Of the interpreter, and of the compiler.
        options = self.kernel.kwargs if hasattr(self.kernel, "kwargs") else vars(self.kernel)
        return tuple(options.get(option) or ())


class _Recorded:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, note: Callable[[Launch], None]) -> None:
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in list(named) if name not in self.kernel.arg_names}
            self.note(Launch(self.kernel, grid, dict(zip(self.kernel.arg_names, values, strict=False)) | named, options))

        return launch


@contextmanager
def recorded(arch: Arch, gpu: str | None = None, stand_in: Callable[[Any], Any] | None = None) -> Iterator[list[Launch]]:
    """Lets launchers take tensors on the meta device, choose for an architecture, and launch nothing.

    Args:
        arch: what the config functions are asked for.
        gpu: the name of a GPU whose committed measurements count.
        stand_in: makes what is in a kernel's place; if not given, it notes the launches in the list that this yields.
    """
    launches: list[Launch] = []
    instead: dict[str, Any] = {
        "INTERPRETED": False,
        "check_device": lambda *_: None,
        "arch_of": lambda _: arch,
        "gpu_name": lambda _: gpu,
        "in_use": _pdl.has_dependent_launch,
    }
    with ExitStack() as stack:
        for info in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"{kernels.__name__}.{info.name}")
            replacements = {name: value for name, value in instead.items() if hasattr(module, name)}
            for name, value in vars(module).items():
                if name.endswith("_kernel") and hasattr(value, "arg_names"):
                    replacements[name] = _Recorded(value, launches.append) if stand_in is None else stand_in(value)
            for name, value in replacements.items():
                stack.enter_context(patch.object(module, name, value))
        stack.enter_context(torch.no_grad())
        yield launches


def launchers(wrapped: Callable[[str, Callable[..., Any]], Callable[..., Any]], fuses_residual: Callable[..., bool]) -> Ops:
    """The kernels' launchers, each wrapped by its name, as the ops of a network on the meta device."""
    functions = {op: getattr(importlib.import_module(f"{kernels.__name__}.{op}"), op) for op in NAMES}
    ops: dict[str, Any] = {op: wrapped(op, function) for op, function in functions.items()}
    return Ops(name="recorded", reason="no launches", required=True, fuses_residual=fuses_residual, **ops)
