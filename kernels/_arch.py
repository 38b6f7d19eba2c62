"""What the launch configurations need to know about a GPU architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Arch:
    """One GPU architecture.

    Attributes:
        name: ``sm_90``, ``gfx942``, as compilers spell it.
        backend: Triton's name of it, ``cuda`` or ``hip``.
        warp_size: threads a warp.
        shared_bytes: shared memory one program may use.
        shared_bytes_per_sm: shared memory of one SM.
        sms: SMs; of :data:`ARCHS` those of the architecture's usual data-centre or desktop part, of :func:`arch_of` the device's.
    """

    name: str
    backend: str
    warp_size: int
    shared_bytes: int
    shared_bytes_per_sm: int
    sms: int

    @property
    def capability(self) -> int | str:
        """What ``triton.backends.compiler.GPUTarget`` calls the architecture."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name


#: A100, RTX 4090, H100/H200, B200, RTX 5090, MI300X. Shared memory: CUDA C++ programming guide, table of compute capabilities.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 32, 166_912, 167_936, 108),
        Arch("sm_89", "cuda", 32, 101_376, 102_400, 128),
        Arch("sm_90", "cuda", 32, 232_448, 233_472, 132),
        Arch("sm_100", "cuda", 32, 232_448, 233_472, 148),
        Arch("sm_120", "cuda", 32, 101_376, 102_400, 170),
        Arch("gfx942", "hip", 64, 65_536, 65_536, 304),
    )
}


class _Emulated:
    """The architecture whose kernels are executed on CPU tensors without a GPU, if any (``fastdllm_triton.ptx``)."""

    arch: Arch | None = None


def is_emulated() -> bool:
    """Whether compiled kernels take CPU tensors."""
    return _Emulated.arch is not None


@contextmanager
def emulated(name: str) -> Iterator[None]:
    """Launchers take CPU tensors and choose for an architecture of :data:`ARCHS`; who launches must have put a driver there."""
    before, _Emulated.arch = _Emulated.arch, ARCHS[name]
    arch_of.cache_clear()
    try:
        yield
    finally:
        _Emulated.arch = before
        arch_of.cache_clear()


@cache
def arch_of(device: torch.device) -> Arch:
    """The architecture of a device, with the SMs that this device has; of a CPU the one that is emulated, or sm_80, for which
    Triton's interpreter runs.

    Raises:
        ValueError: the GPU is older than any architecture the kernels are built for.
    """
    if device.type != "cuda":
        return _Emulated.arch or ARCHS["sm_80"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        arch = ARCHS.get(name, ARCHS["gfx942"])
    else:
        capability = properties.major * 10 + properties.minor
        if capability < 80:
            raise ValueError(f"device {device} is sm_{capability}; the Triton kernels need sm_80 or newer")
        # A capability between two known ones runs with the limits of the one below it (8.6 has those of 8.9).
        nearest = {86: 89, 87: 80}.get(capability, max(c for c in (80, 89, 90, 100, 120) if c <= capability))
        arch = ARCHS[f"sm_{nearest}"]
    return replace(arch, sms=properties.multi_processor_count)
