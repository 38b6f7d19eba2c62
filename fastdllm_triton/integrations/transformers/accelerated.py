"""The runtime behind an accelerated module, and the methods that the module gets."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ...decoding import CacheName
from ...engine.dream.generate import DreamModel, diffusion_generate
from ...engine.outputs import GenerationOutput
from ...loading import ops_for
from ...model import MaskedDiffusionLM
from ...models.transformer import Transformer
from ...ops import Ops, without_kernels
from .fuse import fuse, fused_storages, unfuse
from .recognise import RecognisedModule, folder_of, recognise
from .report import Report, functions_of, report_of

#: The attribute of an accelerated module that holds what it was accelerated with.
ATTRIBUTE = "_fastdllm_triton"

#: Arguments of the ``generate`` of Fast-dLLM v2 and of transformers, none of them an option of this library.
_OFFICIAL = frozenset(
    ("input_ids", "tokenizer", "max_new_tokens", "max_length", "block_size", "small_block_size", "use_block_cache", "do_sample")
)

#: What Dream's own ``diffusion_generate`` calls first.
_PREPARE = "_prepare_generation_config"

#: The module of Fast-dLLM whose ``diffusion_generate`` always decodes with a cache.
_BLOCK_MIXIN = "generation_utils_block"


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
        shadowed: instance attributes of the module in whose place the methods stand.
    """

    def __init__(self, module: nn.Module, options: Options, shadowed: dict[str, Any] | None = None) -> None:
        self._module = weakref.ref(module)  # The module holds this: without a cycle, its memory goes when it goes.
        self._inner = self._module
        self.options = options
        self.shadowed = shadowed or {}
        self._warned = False
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

    @property
    def config(self) -> Any:
        """The config of the model, which may lie inside the module; known once :meth:`runtime` has looked."""
        inner = self._inner()
        return getattr(inner, "config", None)

    @property
    def own_cache(self) -> CacheName:
        """What the module's own ``diffusion_generate`` decodes with where its caller does not say."""
        for module in (self.module, self._inner()):
            if module is not None and (method := _own_method(module, "diffusion_generate")) is not None:
                return "prefix" if str(getattr(method, "__module__", "")).endswith(_BLOCK_MIXIN) else "none"
        return "none"

    def runtime(self) -> MaskedDiffusionLM:
        """The model over the module's parameters as they are now.

        Raises:
            ValueError: the module was changed in a way that is not supported.
            RuntimeError: strict, and something falls back or would be left out; or a fused tensor has no memory.
        """
        recognised = recognise(self.module)
        self._inner = weakref.ref(recognised.module)
        if self.options.strict and recognised.hooked:
            where = ", ".join(recognised.hooked)
            raise RuntimeError(f"strict: forward hooks would not be run by generate: {where}; remove them first")
        parameters = list(recognised.parameters.values())
        if self._runtime is None or recognised.config != self._runtime.config or _places(parameters) != self._places:
            ops = _ops(recognised, self.options)
            self._runtime = None  # What it holds of the parameters' former memory goes first.
            weights = fuse(recognised.parameters, recognised.config, recognised.architecture.NAMES)
            self._runtime = MaskedDiffusionLM(Transformer(recognised.config, weights, ops), folder_of(recognised.module))
            self._parameters, self._places = parameters, _places(parameters)
        return self._runtime

    def report(self) -> Report:
        """What is replaced and what not."""
        fused = sum(fused_storages(self.runtime().network.weights).values())
        recognised = recognise(self.module)
        return report_of(
            recognised, ops_for(self.options.backend, recognised.device, recognised.dtype), self.options.plain, fused
        )

    def install(self) -> None:
        """Gives the module its methods."""
        attributes = vars(self.module)
        methods: dict[str, Callable[..., Any]] = {
            "generate": self.generate,
            "infill": self.infill,
            "fast_forward": self.fast_forward,
            "release": self.release,
        }
        config = self.runtime().config
        if config.shift and not config.block_causal:  # a Dream
            methods["diffusion_generate"] = self.diffusion_generate
            if hasattr(type(self.module), _PREPARE):
                methods[_PREPARE] = self.prepare_generation_config
        self.shadowed |= {name: attributes[name] for name in methods if name in attributes and not _is_ours(attributes[name])}
        attributes.update(methods, **{ATTRIBUTE: self})

    def remove(self) -> None:
        """Takes the methods away, and the parameters out of the fused tensors."""
        attributes = vars(self.module)
        for name in [name for name, value in attributes.items() if _is_ours(value)]:
            del attributes[name]
        del attributes[ATTRIBUTE]
        for name, value in self.shadowed.items():
            attributes.setdefault(name, value)
        if self._runtime is not None:
            storages = fused_storages(self._runtime.network.weights)
            self._runtime = None
            unfuse(self._parameters, storages.keys())
            self._parameters = []

    @wraps(MaskedDiffusionLM.generate)
    def generate(self, *args: Any, **kwargs: Any) -> GenerationOutput:
        """As :meth:`fastdllm_triton.MaskedDiffusionLM.generate`.

        Raises:
            TypeError: with arguments of the module's own ``generate``, whose place this takes.
        """
        if official := sorted(_OFFICIAL & kwargs.keys()):
            functions = ", ".join(f"{name}(model, ...)" for name in functions_of(self.runtime().config))
            raise TypeError(
                f"generate takes the options of GenerationConfig, not {', '.join(official)}; fastdllm_triton.compat has "
                f"{functions}, and fastdllm_triton.restore(model) puts the module's own generate back"
            )
        return self.runtime().generate(*args, **kwargs)

    @wraps(MaskedDiffusionLM.infill)
    def infill(self, *args: Any, **kwargs: Any) -> GenerationOutput:
        """As :meth:`fastdllm_triton.MaskedDiffusionLM.infill`."""
        return self.runtime().infill(*args, **kwargs)

    @wraps(MaskedDiffusionLM.release)
    def release(self) -> None:
        """As :meth:`fastdllm_triton.MaskedDiffusionLM.release`."""
        if self._runtime is not None:
            self._runtime.release()

    def diffusion_generate(self, *args: Any, **kwargs: Any) -> Any:
        """As :func:`fastdllm_triton.compat.diffusion_generate`, without its ``model``."""
        return diffusion_generate(self.dream, *args, **kwargs)

    def dream(self) -> DreamModel:
        """What :func:`fastdllm_triton.compat.diffusion_generate` decodes with."""
        return DreamModel(self.runtime(), self.config, self.own_cache)

    def prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``_prepare_generation_config``, with which its own ``diffusion_generate`` begins: tells that it runs.

        Scripts put another ``diffusion_generate`` on a module, and one that comes after this library's takes its place.
        """
        module = self.module
        replacement = vars(module).get("diffusion_generate")
        if replacement is not None and not _is_ours(replacement) and not self._warned:
            self._warned = True
            warnings.warn(
                f"diffusion_generate of this {type(module).__name__} was replaced after accelerate: {replacement.__module__} "
                "runs, not fastdllm_triton; call fastdllm_triton.accelerate(model) after the replacement",
                stacklevel=2,
            )
        return _own_method(module, _PREPARE)(*args, **kwargs)

    def fast_forward(self, input_ids: Tensor) -> Tensor:
        """Logits of a plain forward over whole sequences, as the module's own ``forward`` gives them, without gradients.

        Args:
            input_ids: ``[B, T]`` integers. All of them are attended.

        Returns:
            ``[B, T, V]`` in the model's dtype. A Dream's are not shifted: those at position ``i`` predict ``i + 1``.

        Raises:
            TypeError, ValueError: as :meth:`fastdllm_triton.MaskedDiffusionLM.logits`.
        """
        return self.runtime()._logits("input_ids", input_ids)


def _ops(recognised: RecognisedModule, options: Options) -> Ops:
    """The ops that the options ask for, on the module's device.

    Raises:
        RuntimeError: the backend cannot run; or, if strict, falls back.
    """
    ops = ops_for(options.backend, recognised.device, recognised.dtype)
    if options.strict and ops.name != "triton" and options.backend not in ("cpu", "reference"):
        raise RuntimeError(f"strict: the kernels cannot run on this module: {ops.reason}")
    return without_kernels(ops, options.plain)


def _places(parameters: list[nn.Parameter]) -> list[tuple[Any, ...]]:
    """What changes when a parameter gets other memory."""
    return [(p.data_ptr(), p.dtype, p.device) for p in parameters]


def _is_ours(method: object) -> bool:
    """Whether an attribute of a module is a method that :meth:`Accelerated.install` put there."""
    return isinstance(getattr(method, "__self__", None), Accelerated)


def _own_method(module: nn.Module, name: str) -> Any:
    """The method that a module has, or had before it was accelerated; None if there is none."""
    method = vars(module).get(name)
    if _is_ours(method):
        method = vars(module)[ATTRIBUTE].shadowed.get(name)
    if method is None and hasattr(type(module), name):
        method = getattr(type(module), name).__get__(module)
    return method
