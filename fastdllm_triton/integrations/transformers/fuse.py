"""Parameters of a module as views of the fused tensors that the runtime multiplies with: one copy of everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ...models.config import ModelConfig, NameMap
from ...models.transformer import Layer, Linear, Weights


@torch.inference_mode(False)
def fuse(parameters: Mapping[str, nn.Parameter], config: ModelConfig, names: NameMap) -> Weights:
    """Makes the weights of a runtime out of a module's parameters.

    Projections that share an input are stacked in a new tensor, and their parameters become views of it, one fused tensor after
    the other: besides the parameters there is never more than one of them. Everything else is shared as it is. The parameters
    keep identity, names, shapes and values, and within ``torch.inference_mode`` too they stay what can be trained.

    Args:
        parameters: by the names of a checkpoint; all on one device, of one dtype, contiguous.
        config: the model's shape.
        names: the name map of its architecture.

    Raises:
        RuntimeError: there is no memory for a fused tensor; what was fused until then is undone.
    """
    moved: list[nn.Parameter] = []
    layers: list[Layer] = []
    try:
        for i in range(config.layers):
            layers.append(_layer(parameters, names, i, moved))
            if moved and moved[0].is_cuda:
                torch.cuda.empty_cache()  # No fused tensor fits where a parameter was: the allocator would keep all of that.
    except BaseException:
        with contextlib.suppress(RuntimeError):  # Without memory for copies either, they stay views: as good as what they were.
            _separate(moved)
        raise
    embedding = parameters[names.embedding].data
    head = embedding if config.tied else parameters[names.head].data
    return Weights(embedding, layers, parameters[names.final_norm].data, head)


@torch.inference_mode(False)
def unfuse(parameters: Iterable[nn.Parameter], storages: Set[int]) -> None:
    """Gives each parameter that is a part of a fused tensor memory of its own again.

    Once nothing else holds the fused tensors, each goes as soon as its parts are out of it.

    Args:
        parameters: what :func:`fuse` was given. Those that have moved elsewhere since are left alone.
        storages: what :func:`fused_storages` says of its result.

    Raises:
        RuntimeError: there is no memory for the parts of one fused tensor.
    """
    _separate([p for p in parameters if p.untyped_storage().data_ptr() in storages])


def fused_storages(weights: Weights) -> dict[int, int]:
    """Address and bytes of the memory of each tensor that several parameters are views of."""
    tensors = (t for layer in weights.layers for t in (layer.qkv.weight, layer.gate_up.weight, layer.qkv_bias))
    return {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t is not None}


def _layer(parameters: Mapping[str, nn.Parameter], names: NameMap, i: int, moved: list[nn.Parameter]) -> Layer:
    """Layer ``i``, its parameters stacked; those that were moved to that end are added to a list."""
    stacked = {field: _stack([parameters[part.format(i=i)] for part in parts], moved) for field, parts in names.layer.items()}
    fields: dict[str, Any] = {field: Linear(t) if t.dim() == 2 else t for field, t in stacked.items()}
    return Layer(**fields)


def _stack(parts: list[nn.Parameter], moved: list[nn.Parameter]) -> Tensor:
    """The parameters one below the other in one tensor; they are views of it afterwards."""
    if len(parts) == 1:
        return parts[0].data
    if (fused := _adjacent(parts)) is not None:
        return fused
    fused = torch.cat([p.data for p in parts])
    for p, view in zip(parts, torch.split(fused, [len(p) for p in parts]), strict=True):
        p.data = view
    moved += parts
    return fused


def _separate(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.data = p.data.clone()


def _adjacent(parts: list[nn.Parameter]) -> Tensor | None:
    """The tensor that the parameters together are, where they already follow one another in one storage."""
    first = parts[0].data
    end = first.data_ptr()
    for p in parts:
        if p.data_ptr() != end or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += p.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
