"""``accelerate`` and ``restore``: a loaded LLaDA or Dream module generates with this library's engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding import GenerationOutput
from ..loading import HUB_PATTERNS, ops_for
from ..model import MaskedDiffusionLM
from ..models.transformer import Transformer, Weights
from ..ops import PARTS, Ops, without_kernels
from .fuse import fuse, fused_storages, unfuse
from .recognise import Found, recognise
from .report import Entry, Report

#: The attribute of an accelerated module that holds what it was accelerated with.
_ATTRIBUTE = "_fastdllm_triton"


def accelerate(
    module: nn.Module,
    backend: str = "auto",
    attention: bool = True,
    head: bool = True,
    norms: bool = True,
    weights: None = None,
    strict: bool = False,
) -> Report:
    """Gives a loaded LLaDA or Dream module this library's generation, in place.

    The module gets the methods ``generate`` (that of :class:`~fastdllm_triton.MaskedDiffusionLM`), ``fast_forward(input_ids)``
    (logits of a plain forward) and, if it is a Dream, ``diffusion_generate``; and the functions of
    :mod:`fastdllm_triton.compat` take it as their model. Its own ``forward``, its ``state_dict`` and its training stay as they
    are, to the bit.

    Memory is not doubled: the module's parameters become views of the fused tensors that the engine multiplies with. What
    changes them in place afterwards (an optimizer, ``load_state_dict``, merging an adapter) is seen by the next call without
    further ado. What gives them other memory (``module.to(...)``, ``load_state_dict(assign=True)``) is noticed by the next
    call, which fuses them again. Every call looks at the module in the same way as this function does, and raises what it would.

    Accelerating again is cheap, and takes over the options given last. Of an inner module that PEFT and others wrap, the
    wrapper and the module inside can both be accelerated; they share one copy.

    Args:
        module: a ``LLaDAModelLM`` or ``DreamModel`` of the checkpoints' own code, of any transformers version; bare, or wrapped
            by PEFT with its adapters merged. It is recognised by its config and the names of its parameters.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``, see :func:`fastdllm_triton.ops.resolve`.
        attention: run the kernels of rotation, cache and attention; plain PyTorch ops in their place if False.
        head: the same for the kernels from the head's weight to the committed tokens.
        norms: the same for the norms and the MLP's gate.
        weights: reserved for weight-only quantisation, which this version does not have for loaded modules.
        strict: raise where something would run otherwise than on the kernels, or be left out, that no argument asked for.

    Returns:
        What was replaced and what not, with reasons.

    Raises:
        TypeError: ``module`` is no module, or an option no bool.
        ValueError: the module is neither LLaDA nor Dream, or it has something that is not supported; says what, and what to do.
        RuntimeError: ``backend="triton"`` where the kernels cannot run; or ``strict`` and something falls back.

    Whatever is raised, the module is left as it was.
    """
    for name, value in (("attention", attention), ("head", head), ("norms", norms), ("strict", strict)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if weights is not None:
        raise ValueError(f"weights must be None, got {weights!r}; weights of a loaded module keep their dtype in this version")
    _require_module(module)
    plain = tuple(part for part, wanted in (("attention", attention), ("norms", norms), ("head", head)) if not wanted)
    options = Options(backend, plain, strict)
    before: Accelerated | None = vars(module).get(_ATTRIBUTE)
    accelerated = Accelerated(module, options, before.shadowed if before else None)
    report = accelerated.report()
    accelerated.install()
    return report


def restore(module: nn.Module) -> None:
    """Undoes :func:`accelerate`: takes the methods away, and gives every parameter memory of its own again.

    A module that is not accelerated is left alone.

    Args:
        module: what was given to :func:`accelerate`.

    Raises:
        TypeError: ``module`` is no module.
        RuntimeError: there is no memory to copy the parameters of one fused tensor; the methods are gone, the views stay.
    """
    _require_module(module)
    accelerated: Accelerated | None = vars(module).get(_ATTRIBUTE)
    if accelerated is not None:
        accelerated.remove()


def runtime_of(model: object) -> MaskedDiffusionLM:
    """The model that generates for what a user holds.

    Args:
        model: what :func:`fastdllm_triton.load` returns, or an accelerated module.

    Raises:
        TypeError: it is neither.
        ValueError: the module was changed in a way that is not supported.
    """
    if isinstance(model, MaskedDiffusionLM):
        return model
    accelerated = getattr(model, _ATTRIBUTE, None)
    if isinstance(accelerated, Accelerated):
        return accelerated.runtime()
    raise TypeError(
        "model must come from fastdllm_triton.load, or be a module that fastdllm_triton.accelerate was called on, "
        f"got {type(model).__name__}"
    )


def _require_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`accelerate`.

    Attributes:
        backend: as there.
        plain: keys of :data:`fastdllm_triton.ops.PARTS` that run without kernels.
        strict: as there.
    """

    backend: str
    plain: tuple[str, ...]
    strict: bool


class Accelerated:
    """The runtime behind a module, made anew when the module's parameters have moved.

    Attributes:
        options: what :func:`accelerate` was called with.
        shadowed: instance attributes of the module in whose place the methods stand; None before they do.
    """

    def __init__(self, module: nn.Module, options: Options, shadowed: dict[str, Any] | None = None) -> None:
        self._module = weakref.ref(module)  # The module holds this: without a cycle, its memory goes when it goes.
        self.options = options
        self.shadowed = shadowed
        self._runtime: MaskedDiffusionLM | None = None
        self._parameters: list[nn.Parameter] = []
        self._places: list[tuple[Any, ...]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of the module is accelerated likewise, over parameters of its own."""
        return Accelerated, (self.module, self.options, self.shadowed)

    @property
    def module(self) -> nn.Module:
        """The accelerated module."""
        module = self._module()
        if module is None:
            raise ReferenceError("the accelerated module is gone; keep a reference to it")
        return module

    def runtime(self) -> MaskedDiffusionLM:
        """The model over the module's parameters as they are now.

        Raises:
            ValueError: the module was changed in a way that is not supported.
        """
        found = recognise(self.module)
        parameters = list(found.parameters.values())
        if self._runtime is None or found.config != self._runtime.config or _places(parameters) != self._places:
            ops = _ops(found, self.options)
            self._runtime = None  # What it holds of the parameters' former memory goes first.
            weights = fuse(found.parameters, found.config, found.architecture.NAMES)
            self._runtime = MaskedDiffusionLM(Transformer(found.config, weights, ops), _folder(found.module))
            self._parameters, self._places = parameters, _places(parameters)
        return self._runtime

    def report(self) -> Report:
        """What is replaced and what not."""
        runtime = self.runtime()
        return _report(recognise(self.module), runtime.network.weights, runtime.network.ops, self.options)

    def install(self) -> None:
        """Gives the module its methods."""
        attributes = vars(self.module)
        methods: dict[str, Callable[..., Any]] = {"generate": self.generate, "fast_forward": self.fast_forward}
        if self.runtime().config.shift:
            methods["diffusion_generate"] = self.diffusion_generate
        if self.shadowed is None:
            self.shadowed = {name: attributes[name] for name in methods if name in attributes}
        attributes.update(methods, **{_ATTRIBUTE: self})

    def remove(self) -> None:
        """Takes the methods away, and the parameters out of the fused tensors."""
        attributes = vars(self.module)
        for name in ("generate", "fast_forward", "diffusion_generate", _ATTRIBUTE):
            attributes.pop(name, None)
        attributes.update(self.shadowed or {})
        if self._runtime is not None:
            storages = fused_storages(self._runtime.network.weights)
            self._runtime = None
            unfuse(self._parameters, storages.keys())
            self._parameters = []

    @wraps(MaskedDiffusionLM.generate)
    def generate(self, *args: Any, **kwargs: Any) -> GenerationOutput:
        """As :meth:`fastdllm_triton.MaskedDiffusionLM.generate`."""
        return self.runtime().generate(*args, **kwargs)

    def diffusion_generate(self, *args: Any, **kwargs: Any) -> Any:
        """As :func:`fastdllm_triton.compat.diffusion_generate`, without its ``model``."""
        from ..compat import diffusion_generate

        return diffusion_generate(self.runtime(), *args, **kwargs)

    def fast_forward(self, input_ids: Tensor) -> Tensor:
        """Logits of a plain forward over whole sequences, as the module's own ``forward`` gives them, without gradients.

        Args:
            input_ids: ``[B, T]`` integers. All of them are attended.

        Returns:
            ``[B, T, V]`` in the model's dtype. A Dream's are not shifted: those at position ``i`` predict ``i + 1``.

        Raises:
            ValueError: ``input_ids`` is not of that shape, or holds ids outside the vocabulary.
        """
        runtime = self.runtime()
        rows = runtime.config.vocab_size
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids must be integers of shape [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < rows:
            raise ValueError(f"input_ids holds ids outside the vocabulary [0, {rows})")
        return runtime.logits(input_ids)


def _ops(found: Found, options: Options) -> Ops:
    """The ops that the options ask for, on the module's device.

    Raises:
        RuntimeError: the backend cannot run; or, if strict, something falls back or would be left out.
    """
    ops = ops_for(options.backend, found.device, found.dtype)
    if options.strict and ops.name == "reference" and options.backend != "reference":
        raise RuntimeError(f"strict: the kernels cannot run on this module: {ops.reason}")
    if options.strict and found.hooked:
        raise RuntimeError(f"strict: forward hooks would not be run by generate: {', '.join(found.hooked)}; remove them first")
    return without_kernels(ops, options.plain)


def _places(parameters: list[nn.Parameter]) -> list[tuple[Any, ...]]:
    """What changes when a parameter gets other memory."""
    return [(p.data_ptr(), p.dtype, p.device) for p in parameters]


#: What each part of :data:`fastdllm_triton.ops.PARTS` is, in a reader's words.
_WHAT = {
    "attention": "rotation, cache in place, attention",
    "norms": "norms with residual, gate of the MLP",
    "head": "head, statistics and commit of the masked rows",
}


def _report(found: Found, weights: Weights, ops: Ops, options: Options) -> Report:
    layers = found.config.layers
    entries = []
    for part in PARTS:
        plain = part in options.plain or ops.name == "reference"
        reason = f"{part}=False" if part in options.plain else ops.reason
        entries.append(Entry(part, "reference" if plain else "triton", _WHAT[part], reason))
    for field, parts in found.architecture.NAMES.layer.items():
        if len(parts) > 1:
            names = ", ".join(part.split(".")[-2] for part in parts)
            entries.append(Entry(field, "fused", f"{layers} x ({names})", "the parameters are views of one tensor a layer"))
    entries.append(Entry("forward", "module", "its own code", "kept for training; fast_forward gives its logits"))
    if found.hooked:
        where = ", ".join(found.hooked[:3]) + (", ..." if len(found.hooked) > 3 else "")
        entries.append(Entry("hooks", "module", f"forward hooks of {where}", "only its own forward runs them"))
    return Report(
        architecture=found.config.architecture,
        layers=layers,
        device=str(found.device),
        dtype=str(found.dtype).removeprefix("torch."),
        entries=tuple(entries),
        fused_bytes=sum(fused_storages(weights).values()),
    )


def _folder(module: nn.Module) -> Path | None:
    """Where the module's tokenizer is, if it is on this machine: the folder or the hub's cache that it was loaded from."""
    name = getattr(module.config, "_name_or_path", None)
    if not name:
        return None
    if (path := Path(name)).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        revision = getattr(module.config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except Exception:  # Not in the cache, or not a name that a hub knows.
        return None
