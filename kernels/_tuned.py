"""What was measured on a GPU and committed: ``kernels/tuned/<gpu>.json``, a list of launch parameters by op and shape.

    {"gpu": "NVIDIA H200", "versions": {...}, "entries": [{"op": "linear", "shape": {...}, "config": {...}, ...}, ...]}

Files are written by benches and read here; a GPU without one, and a shape that is not listed, have none.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"


def tuned(gpu: str | None, op: str, **shape: Any) -> dict[str, Any] | None:
    """The committed launch parameters of an op for exactly this shape on this GPU, or None.

    Args:
        gpu: its name as :func:`gpu_name` gives it.
        op: the op's name.
        shape: what the entry was measured for, in the op's own words.
    """
    return None if gpu is None else _entries(FOLDER, gpu).get(_key(op, shape))


def nearest(gpu: str | None, op: str, sizes: dict[str, int], **shape: Any) -> dict[str, Any] | None:
    """The committed launch parameters of the entry whose ``sizes`` are nearest, each within a factor of two, or None.

    Args:
        gpu: as :func:`tuned` takes it.
        op: the op's name.
        sizes: what may differ; nearness is that of their logarithms, and of equal ones the first entry is taken.
        shape: what must be equal.
    """
    best, least = None, math.inf
    for (name, *items), config in () if gpu is None else _entries(FOLDER, gpu).items():
        entry = dict(items)
        if name != op or any(entry.get(key) != value for key, value in shape.items()) or sizes.keys() - entry.keys():
            continue
        ratios = [abs(math.log2(entry[key] / size)) for key, size in sizes.items()]
        if max(ratios) <= 1 and sum(ratios) < least:
            best, least = config, sum(ratios)
    return best


@cache
def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU as its driver gives it; of a CPU None."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else None


def path_of(gpu: str) -> Path:
    """Where the measurements of a GPU are: its name in lower case, with dashes."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


@cache
def _entries(folder: Path, gpu: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    path = folder / path_of(gpu).name
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    # No config: nothing was faster than what runs without one.
    return {_key(entry["op"], entry["shape"]): entry["config"] for entry in entries if entry["config"] is not None}


def _key(op: str, shape: dict[str, Any]) -> tuple[Any, ...]:
    return (op, *sorted(shape.items()))
