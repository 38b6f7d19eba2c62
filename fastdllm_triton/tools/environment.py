"""What a measurement was made on: enough to repeat it, and to doubt it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Columns of ``nvidia-smi --query-gpu``, and what they are called here. Clocks are in MHz, power in watts.
_SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock",
    "clocks.mem": "memory_clock",
    "clocks.max.sm": "max_sm_clock",
    "clocks.max.mem": "max_memory_clock",
    "power.limit": "power_limit",
    "temperature.gpu": "temperature",
    "clocks_throttle_reasons.active": "throttle_reasons",
}


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks, versions, commit and date; what cannot be found out is None."""
    return {
        "device": device_name(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **(_gpu(device) if device.type == "cuda" else _cpu()),
        "fastdllm-triton": version("fastdllm-triton"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def folder_name(machine: dict[str, Any]) -> str:
    """``<gpu>/<date>-<commit>``, where results of a machine belong in ``bench/results``."""
    gpu = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "cpu").lower()).strip("-")
    return f"{gpu}/{machine['date'][:10]}-{(machine['commit'] or 'unknown')[:10]}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that the package is imported from, or ``FASTDLLM_COMMIT``, for copies without a repository."""
    if stated := os.environ.get("FASTDLLM_COMMIT"):
        return stated
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+changes" if head and changed else head


def _cpu() -> dict[str, Any]:
    """The threads that PyTorch takes, and the instructions that its own kernels are compiled for."""
    return {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
    } | clocks(device)


def clocks(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power limit and temperature of a GPU at this moment, as nvidia-smi tells them; empty without it."""
    properties = torch.cuda.get_device_properties(device)
    # By its own id, since nvidia-smi counts all GPUs and torch only those it may see.
    which = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else "0"
    # One field that this nvidia-smi does not know makes it refuse all.
    fields = _query(which, list(_SMI)) or {key: value for name in _SMI for key, value in _query(which, [name]).items()}
    return {_SMI[name]: _number(value) for name, value in fields.items()}


def _query(which: str, names: list[str]) -> dict[str, str]:
    """Fields of a GPU; nothing if nvidia-smi does not tell them."""
    line = _output(["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"])
    values = [value.strip() for value in line.split(",")] if line else []
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _number(value: str) -> float | str:
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value


def _output(command: list[str]) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
