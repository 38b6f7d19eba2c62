"""Reads checkpoints as the hub stores them: ``config.json`` and safetensors, one file or shards with an index.

Only data is read; nothing that comes with a checkpoint is executed.
"""

from __future__ import annotations

import itertools
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .config import CheckpointError, one_line, shown, shown_name

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

#: A file is mapped anew after this share of the checkpoint, so that the pages already copied are given back.
_MAPPED_SHARE = 0.05

#: Tensors that old exports carry and that are recomputed from the config.
_DERIVED = ("rotary_emb.inv_freq",)

#: As safetensors calls them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Hundreds of layers have some thousands of tensors; a header has room for more than a million.
_MOST_TENSORS = 100_000

#: Configs have kilobytes, indices and tokenizers of the largest vocabularies some megabytes, and few objects.
_LARGEST_TEXT, _MOST_OBJECTS = 16 << 20, 1_000_000

#: A file in the same folder, on any system.
_SHARD = re.compile(r"[^/\\:\0\r\n]+\.safetensors")


def read_text(path: Path) -> str:
    """The text of a file of a checkpoint.

    Raises:
        CheckpointError: it is missing, no regular file, larger than any file of that kind, or not UTF-8.
    """
    require_regular(path)
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise CheckpointError(f"{path} has more than {_LARGEST_TEXT >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: as :func:`read_text`; or it is not JSON (numbers that are none included), nested too deeply, no
            object, or names a field twice with two values.
    """
    text, count = read_text(path), itertools.count(1)

    def to_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(count) > _MOST_OBJECTS:
            raise ValueError(f"there are more than {_MOST_OBJECTS} objects")
        return _unambiguous(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=to_fields, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(raw).__name__}")
    return raw


def require_regular(path: Path) -> None:
    """Refuses what is no regular file nor a link to one, without opening it: a pipe would be waited for without end.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")


@contextmanager
def failures_as(kind: type[ValueError], what: str) -> Iterator[None]:
    """Turns whatever the code inside raises over data of a checkpoint into one kind of error, in one line.

    Libraries raise errors of any type over bad data; those in Rust also panics, which are no ``Exception``.

    Args:
        kind: of the error.
        what: begins its message.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(one_line(f"{what}: {str(error) or type(error).__name__}")) from error


class Checkpoint:
    """The tensors of a checkpoint folder.

    Attributes:
        folder: where it is.
        files: the file that holds each tensor.
        shapes: of each tensor.
        dtype: of the tensors, where all agree; of the first one otherwise.
        bytes: size of all files.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; an index and its shards disagree; a tensor has a
            dtype that is not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        placed = None
        if (folder / _INDEX).exists():
            placed = _placed(folder / _INDEX)
        elif not (folder / _SINGLE).exists():
            stored = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
            raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX} (found {stored}); only safetensors are read")

        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        dtypes: list[torch.dtype] = []
        shards = [folder / name for name in sorted(set(placed.values()))] if placed is not None else [folder / _SINGLE]
        for file in shards:
            with _opened(file) as handle, failures_as(CheckpointError, f"{file} is not a safetensors file"):
                names = handle.keys()
                if len(names) > _MOST_TENSORS:
                    raise CheckpointError(f"{file} holds {len(names)} tensors, more than any model that is read")
                for name in names:
                    if name.endswith(_DERIVED):
                        continue
                    if placed is not None and placed.get(name) != file.name:
                        where = f"places in {placed[name]}" if name in placed else "does not list"
                        raise CheckpointError(f"{file.name} holds {shown_name(name)}, which {_INDEX} {where}")
                    part = handle.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in _DTYPES:
                        allowed = "float64, float32, float16 and bfloat16 are"
                        raise CheckpointError(
                            f"{file.name}: {shown_name(name)} is stored in the dtype {dtype}, which is not read; {allowed}"
                        )
                    self.files[name] = file
                    self.shapes[name] = tuple(part.get_shape())
                    dtypes.append(_DTYPES[dtype])
        for name, shard in (placed or {}).items():
            if name not in self.files and not name.endswith(_DERIVED):
                raise CheckpointError(f"{_INDEX} places {shown_name(name)} in {shard}, which does not hold it")
        if not self.files:
            raise CheckpointError(f"{folder} holds no tensors")
        self.dtype = dtypes[0]
        self.bytes = sum(file.stat().st_size for file in shards)

    def check(self, expected: Iterable[tuple[str, tuple[int, ...]]], ignored: Iterable[str] = ()) -> None:
        """Compares names and shapes with what a model needs, before any data is read.

        Args:
            expected: name and shape of every tensor that must be there. Read up to the first that is not.
            ignored: names that may be there besides.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or would silently be dropped.
        """
        surplus = set(self.files) - set(ignored)
        for name, shape in expected:
            if name not in self.files:
                raise CheckpointError(f"{self.folder}: the tensor {name} is missing")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.files[name].name}: {name} has shape {self.shapes[name]}, config.json asks for {shape}"
                )
            surplus.discard(name)
        if surplus:
            example = shown_name(min(surplus))
            raise CheckpointError(f"{self.folder}: {len(surplus)} tensors that the model has no place for, such as {example}")

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

    def map(self, names: Iterable[str], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
        """Tensors that are read from the files when they are first needed, and again when their memory was needed otherwise.

        The mapping is private: what is written to a tensor is not written to its file. A file that is removed or replaced by
        another one stays as it was; one that is written to may change tensors, and one that is truncated ends the process with
        SIGBUS, as it does any that maps it.

        Args:
            names: of the tensors.
            dtype: that they are to have. A tensor of another one is copied, and so is one at an address that is no multiple
                of its element's size.

        Returns:
            The tensors, and how many of their bytes are mapped.
        """
        tensors: dict[str, Tensor] = {}
        handles: dict[Path, Any] = {}
        mapped = 0
        for name in names:
            file = self.files[name]
            if file not in handles:
                handles[file] = _opened(file)
            source = handles[file].get_tensor(name)
            if source.dtype != dtype or source.data_ptr() % source.itemsize:
                tensors[name] = source.to(dtype, copy=True)
                continue
            # Through numpy a tensor has a storage of its own, not a part of its file's: a copy of it is not one of the file.
            own = torch.from_numpy(source.view(-1).view(torch.uint8).numpy())
            tensors[name] = own.view(dtype).view(source.shape)
            mapped += source.nbytes
        return tensors, mapped


def _opened(file: Path) -> Any:
    require_regular(file)
    with failures_as(CheckpointError, f"{file} is truncated or not a safetensors file"):
        return safe_open(file, framework="pt")


def _placed(index: Path) -> dict[str, str]:
    """The name of the shard that an index places each tensor in.

    Raises:
        CheckpointError: it is no such index, or a shard is not the plain name of a safetensors file beside it. Elsewhere
            would be a file that is no part of the checkpoint.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index.name}: weight_map must be an object of tensors and their files, got {shown(shards)}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index.name}: weight_map places {shown_name(name)} in {shown(shard)}, "
                "which is not the name of a .safetensors file in the same folder"
            )
    return shards


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Readers differ in which of two values of one name they take, so there must not be two."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if fields[name] != value:
                raise ValueError(f"the field {shown(name)} is there twice")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
