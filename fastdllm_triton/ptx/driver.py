"""Triton's driver of a GPU that is not there: ``kernel[grid](...)`` on CPU tensors compiles for an architecture as ever, up to
the PTX, and hands that on to be executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .lanes import Array
from .parser import Kernel, parse

#: What can be executed: shared memory that a program may use (CUDA C++ programming guide, table of compute capabilities).
TARGETS = {"sm_80": 166_912, "sm_90": 232_448}


@dataclass(frozen=True)
class Launch:
    """A launch, before it runs.

    Attributes:
        kernel: the compiled kernel.
        grid: programs along x, y and z.
        parameters: the values of the kernel's parameters, ``[1]`` unsigned integers by name.
        tensors: those that pointers lead to, by the parameter's name.
        shared_bytes: shared memory of a program.
        is_dependent: whether it may begin before the launch before it has ended (programmatic dependent launch).
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    parameters: Mapping[str, Array]
    tensors: Mapping[str, Tensor]
    shared_bytes: int
    is_dependent: bool


@lru_cache(maxsize=1024)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


class PtxBackend(CUDABackend):  # type: ignore[misc]
    """Triton's CUDA back-end, whose last stage is the PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        """Those of CUDA but for the assembler's."""
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        """Of the cache's keys: what this compiles is not what CUDA compiles.

        Raises:
            RuntimeError: Triton finds no assembler to ask for the version of PTX that it reads.
        """
        try:
            return f"ptx only {super().hash()}"
        except Exception as error:  # Of the many kinds that a missing or broken program gives.
            raise RuntimeError(
                f"Triton finds no ptxas, which says what PTX to write; TRITON_PTXAS_PATH names one: {error}"
            ) from error


class _Utils:
    """What Triton asks of a driver about the device and about binaries."""

    def __init__(self, shared_bytes: int) -> None:
        self._properties = {
            "max_shared_mem": shared_bytes,
            "max_num_regs": 65_536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills, and most threads."""
        return name, (_parsed(binary.decode()), shared), 32, 0, 1024


class EmulatedDriver(DriverBase):  # type: ignore[misc]
    """A driver that hands launches to a function.

    Args:
        arch: a name of :data:`TARGETS`.
        launch: runs a launch, at once or later.
    """

    def __init__(self, arch: str, launch: Callable[[Launch], None]) -> None:
        super().__init__()
        self.utils = _Utils(TARGETS[arch])
        self._capability = int(arch.removeprefix("sm_"))
        self.launch = launch
        self.launcher_cls = _Launcher

    @staticmethod
    def is_active() -> bool:
        return False  # It is put in the active one's place, never found.

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device: each architecture is one."""
        return self._capability

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("executed PTX says nothing about speed")


class _Launcher:
    """What Triton calls to launch a compiled kernel. It keeps it with the kernel, beyond the driver that made it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types, self._metadata = list(source.signature.values()), metadata
        for size in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, size, 0):
                raise NotImplementedError(f"{metadata.name}: kernels with a {size.removesuffix('_size')} are not executed")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: tuple[Kernel, int],
        packed: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        kernel, shared = function
        if x * y * z == 0:
            return
        given = [(type_, value) for type_, value in zip(self._types, arguments, strict=True) if type_ != "constexpr"]
        scratch = [("*i8", None)] * (len(kernel.parameters) - len(given))  # Triton's own, which these kernels do not use
        parameters: dict[str, Array] = {}
        tensors: dict[str, Tensor] = {}
        for name, (type_, value) in zip(kernel.parameters, [*given, *scratch], strict=True):
            if isinstance(value, Tensor):
                if value.device.type != "cpu":
                    raise ValueError(f"{kernel.name}: executed PTX takes CPU tensors, got one on {value.device}")
                tensors[name] = value
            parameters[name] = _bits(type_, value)
        is_dependent = bool(getattr(self._metadata, "launch_pdl", False))
        active = triton.runtime.driver.active
        assert isinstance(active, EmulatedDriver)
        active.launch(Launch(kernel, (x, y, z), parameters, tensors, shared, is_dependent))


def _bits(type_: str, value: Any) -> Array:
    """A parameter's value, ``[1]``."""
    if type_.startswith("*"):
        address = value.data_ptr() if isinstance(value, Tensor) else int(value or 0)
        return np.array([address], np.uint64)
    if type_ in ("fp16", "fp32", "fp64"):
        number = np.array([value], {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}[type_])
        return number.view({"fp16": np.uint16, "fp32": np.uint32, "fp64": np.uint64}[type_])
    if type_[0] in "iu" and type_[1:].isdigit():
        bits = max(int(type_[1:]), 8)  # a bool is a byte
        return np.array([int(value) & (2**bits - 1)], f"u{bits // 8}")
    raise NotImplementedError(f"an argument of type {type_} cannot be given to executed PTX")


@contextmanager
def driving(arch: str, launch: Callable[[Launch], None]) -> Iterator[None]:
    """Triton compiles for an architecture and gives all launches to a function.

    Args:
        arch: a name of :data:`TARGETS`.
        launch: what runs them.

    Raises:
        ValueError: another architecture.
        RuntimeError: Triton's interpreter is on, which takes kernels away from the compiler when they are defined.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {arch!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; executed PTX needs it unset or 0")
    config = triton.runtime.driver
    before = config._active
    nvidia = backends["nvidia"]
    with ExitStack() as stack:
        stack.enter_context(patch.dict(backends, nvidia=type(nvidia)(compiler=PtxBackend, driver=nvidia.driver)))
        stack.callback(config.set_active, before)
        config.set_active(EmulatedDriver(arch, launch))
        yield
