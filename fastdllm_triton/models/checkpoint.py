"""Reads checkpoints as the hub stores them: ``config.json`` and safetensors, one file or shards with an index.

Only data is read; nothing that comes with a checkpoint is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

#: A file is mapped anew after this share of the checkpoint, so that the pages already copied are given back.
_MAPPED_SHARE = 0.05

#: Tensors that old exports carry and that are recomputed from the config.
_DERIVED = ("rotary_emb.inv_freq",)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(raw).__name__}")
    return raw


class Checkpoint:
    """The tensors of a checkpoint folder.

    Attributes:
        folder: where it is.
        files: the file that holds each tensor.
        dtype: of the tensors, where all agree; of the first one otherwise.
        bytes: size of all files.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; an index names tensors that are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).exists():
            names: dict[str, str] = read_json(folder / _INDEX).get("weight_map", {})
            listed = {folder / name for name in names.values()}
        elif (folder / _SINGLE).exists():
            names, listed = {}, {folder / _SINGLE}
        else:
            found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
            raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX} (found {found}); only safetensors are read")

        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes: list[str] = []
        for file in sorted(listed):
            with _opened(file) as handle:
                for name in list(handle.keys()):
                    if not name.endswith(_DERIVED):
                        self.files[name] = file
                        part = handle.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        dtypes.append(part.get_dtype())
        if lost := sorted(set(names) - set(self.files) - {name for name in names if name.endswith(_DERIVED)}):
            raise CheckpointError(f"{_INDEX} names {lost[0]} in {names[lost[0]]}, which does not hold it")
        if not self.files:
            raise CheckpointError(f"{folder} holds no tensors")
        self.dtype = _DTYPES.get(dtypes[0])
        self.bytes = sum(file.stat().st_size for file in listed)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Compares names and shapes with what a model needs, before any data is read.

        Args:
            expected: shape of every tensor that must be there.
            ignored: names that may be there besides.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or would silently be dropped.
        """
        for name, shape in expected.items():
            if name not in self.files:
                raise CheckpointError(f"{self.folder}: the tensor {name} is missing")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.files[name].name}: {name} has shape {self.shapes[name]}, config.json asks for {shape}"
                )
        if surplus := sorted(set(self.files) - set(expected) - set(ignored)):
            raise CheckpointError(f"{self.folder}: {len(surplus)} tensors that the model has no place for, such as {surplus[0]}")

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copies tensors into place through memory mapping, converting dtype and device on the way."""
        budget = _MAPPED_SHARE * self.bytes
        by_file: dict[Path, list[str]] = {}
        for name in targets:
            by_file.setdefault(self.files[name], []).append(name)
        for file, names in by_file.items():
            while names:
                mapped = 0
                with _opened(file) as handle:
                    while names and mapped <= budget:
                        name = names.pop()
                        source = handle.get_tensor(name)
                        targets[name].copy_(source)
                        mapped += source.nbytes
                        del source  # The last view of the mapping must go before the file is closed.


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint's shard {file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
