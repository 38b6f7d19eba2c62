"""What a loaded module is, judged by its config and the names of its parameters. Nothing is changed and no code imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...loading import HUB_PATTERNS, supported_dtype
from ...models.checkpoint import failures_as
from ...models.config import CheckpointError, ModelConfig, NameMap, shown, shown_name
from ...models.registry import ARCHITECTURES, architecture_of, config_of
from ...models.transformer import expected_shapes

#: How PEFT and others name a weight that sits inside a layer of theirs.
_WRAPPED = ".base_layer."

#: Fields of quantised layers (bitsandbytes, GPTQ, AWQ) and classes of bitsandbytes.
_QUANTISED_FIELDS = ("quant_state", "qweight", "SCB")
_QUANTISED_CLASSES = ("Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit", "Int8Params")


@dataclass(frozen=True)
class RecognisedModule:
    """A module that can be accelerated.

    Attributes:
        module: the one whose parameters have the names of a checkpoint; the given module or one inside it.
        architecture: the module of :data:`fastdllm_triton.models.registry.ARCHITECTURES` that reads it.
        config: its shape.
        parameters: by the names of a checkpoint.
        hooked: names of its parts with forward hooks, which no other code than its own forward runs.
    """

    module: nn.Module
    architecture: ModuleType
    config: ModelConfig
    parameters: Mapping[str, nn.Parameter]
    hooked: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where all parameters are."""
        return self.parameters[self.architecture.NAMES.embedding].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parameters."""
        return self.parameters[self.architecture.NAMES.embedding].dtype


def recognise(module: nn.Module) -> RecognisedModule:
    """Looks at a module.

    Args:
        module: a model of a known family with its head, of any transformers version or none; bare, or inside wrappers such as
            PEFT's, ``DistributedDataParallel`` or ``torch.compile``.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: it is of no known family, or something about it is not supported; names what, and says what to do.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    inner = _inner(module)
    raw = _raw_config(inner)
    try:
        architecture = architecture_of(raw, "module.config")
        # Only where a config lacks special tokens is there something to look up.
        config = config_of(raw, "module.config", folder_of(inner) if hasattr(architecture, "TOKENS") else None)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    _refuse_dropout(inner, raw)
    _refuse_quantised(inner, raw)
    _refuse_adapters(module, inner)
    parameters = _parameters(inner, config, architecture)
    _refuse_mixture(parameters, architecture.NAMES)
    hooked = tuple(name or "the module" for name, m in inner.named_modules() if m._forward_hooks or m._forward_pre_hooks)
    return RecognisedModule(inner, architecture, config, parameters, hooked)


def _inner(module: nn.Module) -> nn.Module:
    """The module whose parameters have the names of a checkpoint."""
    embeddings = list(dict.fromkeys(architecture.NAMES.embedding for architecture in ARCHITECTURES.values()))
    prefixes = {
        plain[: -len(embedding)]
        for name, _ in module.named_parameters(remove_duplicate=False)
        for embedding in embeddings
        if f".{(plain := name.replace(_WRAPPED, '.'))}".endswith(f".{embedding}")
    }
    if len(prefixes) == 1:
        return module.get_submodule(prefixes.pop().rstrip("."))
    what = f"{len(prefixes)} models" if prefixes else f"{type(module).__name__} without a parameter {' or '.join(embeddings)}"
    raise ValueError(
        f"module must be one model of a known family with its head, as AutoModel or the original classes load it, got {what}"
    )


def folder_of(module: nn.Module) -> Path | None:
    """Where a module's files are, if they are on this machine: the folder or the hub's cache that it was loaded from."""
    name = getattr(module.config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    from huggingface_hub import snapshot_download

    try:
        if (path := Path(name)).is_dir():
            return path
        revision = getattr(module.config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except Exception:  # Not in the cache, or not a name that a file system or a hub knows.
        return None


def _raw_config(module: nn.Module) -> dict[str, Any]:
    """A module's config as the fields of a ``config.json``."""
    config = getattr(module, "config", None)
    if config is None:
        raise ValueError(f"module.config is missing on {type(module).__name__}; give the model as the original classes load it")
    with failures_as(ValueError, f"module.config cannot be read as a config ({type(config).__name__})"):
        if callable(to_dict := getattr(config, "to_dict", None)):
            config = to_dict()
        return {str(name): value for name, value in (config if isinstance(config, Mapping) else vars(config)).items()}


def _refuse_dropout(module: nn.Module, raw: dict[str, Any]) -> None:
    for field, value in raw.items():
        if module.training and field.endswith("_dropout") and value is not None and value != 0:
            raise ValueError(f"module.config: {field} = {shown(value)} is at work in training mode; call module.eval() first")


def _refuse_quantised(module: nn.Module, raw: dict[str, Any]) -> None:
    advice = "give the module in bfloat16 or float32 (module.dequantize(), or load it without quantization_config)"
    quantised = raw.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, Mapping) and not quantised):
        raise ValueError(f"module.config: quantization_config is set; quantised modules are not supported; {advice}")
    for name, layer in module.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        for p in parameters.values():
            if is_lazy(p) or p.layout is not torch.strided:
                kind = type(p).__name__ if is_lazy(p) else str(p.layout)
                raise ValueError(f"module: {name} has a parameter that is not a plain tensor ({kind}), which is not supported")
        things = (layer, *parameters.values())
        signs = [type(thing).__name__ for thing in things if type(thing).__name__ in _QUANTISED_CLASSES]
        signs += [field for thing in things for field in _QUANTISED_FIELDS if getattr(thing, field, None) is not None]
        signs += [str(p.dtype) for p in parameters.values() if not p.is_floating_point() or p.element_size() == 1]
        signs += [type(p.data).__name__ for p in parameters.values() if type(p.data) is not Tensor]
        if signs:
            raise ValueError(f"module: {name} is quantised or not a plain tensor ({signs[0]}), which is not supported; {advice}")


def _refuse_adapters(outer: nn.Module, inner: nn.Module) -> None:
    """Refuses what changes the function of the weights from beside them: adapters that are neither merged nor disabled."""
    advice = "merge it first (merge_adapter() or merge_and_unload())"
    for name, layer in inner.named_modules():
        if isinstance(getattr(layer, "modules_to_save", None), nn.ModuleDict):
            raise ValueError(f"module: {name} is replaced by an adapter's copy of it; {advice}")
        if hasattr(layer, "base_layer"):
            merged = bool(getattr(layer, "merged_adapters", ()))
            off = getattr(layer, "disable_adapters", False) or not getattr(layer, "active_adapters", "unknown")
            if merged == off:  # at work beside the weight, or about to be taken out of it
                raise ValueError(f"module: {name} has an adapter that is not merged into its weight; {advice}")
    parameters = {id(p) for p in inner.parameters()}
    for name, p in outer.named_parameters():
        if id(p) not in parameters:
            raise ValueError(f"module: {name} lies outside the model and would not be used; give the model without it")


def _parameters(module: nn.Module, config: ModelConfig, architecture: ModuleType) -> dict[str, nn.Parameter]:
    """The parameters by the names of a checkpoint, each there and of the shape that the config asks for."""
    adapted = tuple(f"{name}." for name, layer in module.named_modules() if hasattr(layer, "base_layer"))
    parameters = {
        name.replace(_WRAPPED, "."): p
        for name, p in module.named_parameters(remove_duplicate=False)
        if _WRAPPED in name or not name.startswith(adapted)
    }
    names, expected = architecture.NAMES, []
    for name, shape in expected_shapes(config, names):
        if name not in parameters:
            raise ValueError(f"module: the parameter {name} is missing; module.config asks for it")
        if (stored := tuple(parameters[name].shape)) != shape:
            raise ValueError(f"module: {name} has shape {stored}, module.config asks for {shape}")
        expected.append(name)
    if surplus := sorted(set(parameters) - set(expected) - {names.head}):
        raise ValueError(f"module: {len(surplus)} parameters that the model has no place for, such as {shown_name(surplus[0])}")
    if config.tied and parameters.get(names.head, parameters[names.embedding]) is not parameters[names.embedding]:
        raise ValueError(
            f"module: {names.head} is a tensor of its own, which module.config ties to the embedding; untie them there"
        )
    return {name: parameters[name] for name in expected}


def _refuse_mixture(parameters: Mapping[str, nn.Parameter], names: NameMap) -> None:
    """Refuses parameters that are not all on one device in one dtype, or not there at all, or in one another's memory."""
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"module: {name} is on the meta device; load the module whole onto one device, without offloading")
    first = parameters[names.embedding]
    owners: dict[int, str] = {}
    for name, p in parameters.items():
        if p.device != first.device:
            raise ValueError(
                f"module: {name} is on {p.device}, {names.embedding} on {first.device}; "
                "put all parameters on one device, for example with device_map={'': 0}"
            )
        if p.dtype != first.dtype:
            raise ValueError(
                f"module: {name} is {p.dtype}, {names.embedding} {first.dtype}; "
                "give all parameters one dtype with module.to(dtype)"
            )
        if not p.is_contiguous():
            raise ValueError(f"module: {name} is not contiguous in memory; assign its .data.contiguous() first")
        owner = owners.setdefault(p.data_ptr(), name)
        if owner != name and {owner, name} != {names.embedding, names.head}:
            raise ValueError(f"module: {name} and {owner} share their memory; give each a tensor of its own")
    try:
        supported_dtype(first.dtype, first.device)
    except ValueError as error:
        raise ValueError(f"module: {error}; module.to(dtype) changes it") from None
