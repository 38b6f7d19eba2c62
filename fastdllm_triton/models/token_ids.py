"""Token ids in the forms in which users hold them: tensors, arrays, and lists of integers of any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.checks import is_int, short_repr, to_int
from .config import ModelConfig


def id_rows(name: str, value: Tensor | np.ndarray[Any, Any]) -> list[list[int]]:
    """The rows of a tensor or array ``[B, T]``.

    Raises:
        ValueError: it has another shape, or does not hold integers.
    """
    _check_integers(name, value, 2, "[B, T]")
    rows: list[list[int]] = value.tolist()
    return rows


def id_row(name: str, value: Any) -> list[int]:
    """The ids of a row: of a tensor or array ``[T]``, or a sequence of integers.

    Raises:
        TypeError: it is none of these, or holds what is no integer.
        ValueError: a tensor or array has another shape, or does not hold integers.
    """
    if isinstance(value, Tensor | np.ndarray):
        _check_integers(name, value, 1, "[T]")
        ids: list[int] = value.tolist()
        return ids
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise TypeError(f"{name} must be a list of token ids, got {short_repr(value)} of type {type(value).__name__}")
    for token in value:
        if not is_int(token):
            raise TypeError(f"{name} must hold token ids, got {short_repr(token)} of type {type(token).__name__}")
    return [to_int(token) for token in value]


def id_tensor(name: str, value: Any, model: ModelConfig) -> Tensor:
    """Whole sequences as a tensor that a model takes. Reads the ids: on a GPU, the host waits for them.

    Args:
        name: of the argument.
        value: a tensor or array ``[B, T]``, or a sequence of rows of one length, each as :func:`id_row` takes it.
        model: the shape of the model.

    Returns:
        ``[B, T]`` int64, where ``value`` was.

    Raises:
        TypeError, ValueError: it is none of these, is empty, is longer than the model takes, or holds an id outside the
            vocabulary.
    """
    if isinstance(value, Tensor | np.ndarray):
        _check_integers(name, value, 2, "[B, T]")
        # Of an array, a copy: torch takes neither foreign byte orders nor negative strides.
        ids = value.long() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.int64, order="C"))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        rows = [id_row(f"{name}: row {i}", row) for i, row in enumerate(value)]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"{name} must be rows of one length, got lengths {short_repr([len(row) for row in rows])}")
        check_range(name, [token for row in rows for token in row], model)  # A tensor holds none beyond 64 bits.
        ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 0)
    else:
        raise TypeError(f"{name} must be integers of shape [B, T], got {short_repr(value)} of type {type(value).__name__}")
    if ids.numel() == 0:
        raise ValueError(f"{name} must hold at least one token in at least one row, got shape {list(ids.shape)}")
    if ids.shape[1] > model.max_length:
        raise ValueError(f"{name}: the model takes at most {model.max_length} tokens, got rows of {ids.shape[1]}")
    check_range(name, [int(end) for end in ids.aminmax()], model)
    return ids


def check_range(name: str, ids: Sequence[int], model: ModelConfig) -> None:
    """Raises ``ValueError`` for ids outside the vocabulary."""
    if ids and ((low := min(ids)) < 0 or max(ids) >= model.vocab_size):
        outside = low if low < 0 else max(ids)
        raise ValueError(f"{name} holds token id {outside}, outside the vocabulary [0, {model.vocab_size})")


def _check_integers(name: str, value: Tensor | np.ndarray[Any, Any], dimensions: int, shape: str) -> None:
    if isinstance(value, Tensor):
        integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    else:
        integers = value.dtype.kind in "iu"
    if value.ndim != dimensions or not integers:
        raise ValueError(f"{name} must be integers of shape {shape}, got {value.dtype} {list(value.shape)}")
