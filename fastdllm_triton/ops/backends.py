"""Chooses, once and in one place, whether the ops run as Triton kernels, as PyTorch made for a CPU, or as the reference."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial, update_wrapper
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from ..types import DEFAULT_LAUNCH, LaunchOptions
from ..utils import environment

#: Of the kernels and the reference.
_PACKAGE = __package__.rpartition(".")[0]
Backend = Literal["auto", "triton", "cpu", "reference"]


class Prefetching(Protocol):
    """Asks for weights in the cache ahead of the kernels that read them."""

    def __call__(self, weight: Tensor) -> None:
        """Asks for the first bytes of a weight."""

    def join(self) -> None:
        """Ends the requests of a forward."""


class NoPrefetch:
    """Asks for nothing."""

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, weight: Tensor) -> None:
        pass

    def join(self) -> None:
        pass


@dataclass(frozen=True)
class Ops:
    """The ops of one backend, with the signatures of :mod:`fastdllm_triton.reference`.

    All of them are functions of a module, or partial ones: a model is pickled with its ops.

    Attributes:
        name: ``"triton"``, ``"cpu"``, ``"reference"``, or ``"mixed"`` where each has some.
        reason: why it was chosen, in words.
        required: whether it was asked for by name, so that nothing may fall back to anything slower.
        fuses_residual: of ``(x, weight)``: whether ``linear`` adds a residual without a launch of its own.
        prefetch: of a device: what asks for weights ahead during a forward; nothing does outside of captures.
        options: how kernels are launched.
    """

    name: str
    reason: str
    required: bool
    fuses_residual: Callable[..., bool]
    commit_tokens: Callable[..., Any]
    head_statistics: Callable[..., Any]
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope_kv_write: Callable[..., Any]
    swiglu: Callable[..., Any]
    token_statistics: Callable[..., Any]
    window_attention: Callable[..., Any]
    window_inputs: Callable[..., Any]
    prefetch: Callable[[torch.device], Prefetching] = NoPrefetch
    options: LaunchOptions = DEFAULT_LAUNCH

    def with_options(self, **changes: bool) -> Ops:
        """The same ops, launched in another way; those in plain PyTorch stay as they are.

        Args:
            changes: fields of :class:`fastdllm_triton.types.LaunchOptions`.

        Raises:
            ValueError: ``batch_invariant`` where some ops are not Triton kernels: the library that multiplies for them chooses by
                shape.
        """
        options = replace(self.options, **changes)
        if options.batch_invariant and self.name != "triton":
            raise ValueError(f"batch_invariant: needs the Triton kernels, and the backend is {self.name}: {self.reason}")
        kernels: dict[str, Any] = {
            name: partial(_function("triton", name), options=options)
            for name in (*NAMES, "fuses_residual")
            if "options" in inspect.signature(getattr(self, name)).parameters
        }
        return replace(self, options=options, **kernels)


_NO_OPS = ("name", "reason", "required", "fuses_residual", "prefetch", "options")
NAMES = tuple(field.name for field in fields(Ops) if field.name not in _NO_OPS)

#: The ops by the part of a model that they belong to.
PARTS = {
    "attention": ("rope_kv_write", "window_attention"),
    "norms": ("rms_norm", "swiglu", "linear"),
    "head": ("window_inputs", "head_statistics", "token_statistics", "commit_tokens"),
}


def resolve(backend: str, device: torch.device) -> Ops:
    """The ops to run on a device.

    Args:
        backend: ``"triton"`` raises where the kernels cannot run; ``"cpu"`` is plain PyTorch made for a CPU, and raises
            elsewhere; ``"reference"`` is plain PyTorch made to be read; ``"auto"`` is what the environment variable
            ``FASTDLLM_BACKEND`` says, and without it takes the kernels where they can run, and ``"cpu"`` on a CPU. On a GPU
            where they cannot, it falls back on the reference with one warning that says why.
        device: where the tensors live.

    Raises:
        ValueError: ``backend``, or one of :data:`fastdllm_triton.utils.environment.VARIABLES`, has a value that is not allowed.
        RuntimeError: ``backend="triton"`` and the kernels cannot run on this device, or ``"cpu"`` and it is none.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return _resolved(environment.BACKEND.value if backend == "auto" else backend, device)


@cache
def _resolved(backend: str, device: torch.device) -> Ops:
    environment.check()
    if backend == "reference":
        return _ops("reference", "asked for", device, required=True)
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"backend='cpu' cannot run here: the device is {device.type}")
        return _ops("cpu", "asked for", device, required=True)
    obstacle = _obstacle(device, on_cpu=backend == "triton")
    if obstacle is None:
        required = backend == "triton"
        return _ops("triton", "asked for" if required else "a GPU with Triton", device, required=required)
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
    if device.type == "cuda":
        warnings.warn(f"falling back to the PyTorch reference ops: {obstacle}", stacklevel=2)
    return _ops("cpu" if device.type == "cpu" else "reference", obstacle, device)


def forget() -> None:
    """Lets :func:`resolve` look again at what can run here."""
    _resolved.cache_clear()


def without_kernels(ops: Ops, parts: Sequence[str]) -> Ops:
    """``ops`` with some parts in plain PyTorch, to find out which kernel a difference comes from, or to do without it.

    Args:
        ops: what runs otherwise.
        parts: keys of :data:`PARTS`.

    Returns:
        Ops named ``"reference"`` where no kernel is left and ``"mixed"`` where some are; ``ops`` itself where nothing changes, or
        where it has no kernels.
    """
    if not parts or ops.name in ("cpu", "reference"):
        return ops
    names = {op for part in parts for op in PARTS[part]}
    functions: dict[str, Any] = {op: _function("reference", op) for op in NAMES if op in names}
    if "linear" in names:
        functions["fuses_residual"] = _never
    name = "reference" if names == set(NAMES) else "mixed"
    return replace(ops, name=name, reason=f"{ops.reason}, but for {', '.join(parts)}", **functions)


def _obstacle(device: torch.device, *, on_cpu: bool) -> str | None:
    """Why the kernels cannot run on a device, or None if they can; on a CPU they can where they are interpreted or emulated."""
    installed = importlib.util.find_spec("triton") is not None
    if device.type != "cuda" and not (on_cpu and device.type == "cpu" and installed and _runs_on_cpu()):
        return f"the device is {device.type}, and Triton kernels run on CUDA and ROCm devices"
    if not installed:
        return "triton is not installed"
    missing = [op for op in NAMES if importlib.util.find_spec(f"{_PACKAGE}.kernels.{op}") is None]
    if missing:
        return f"this version has no Triton kernel for {', '.join(missing)}"
    from ..kernels._arch import arch_of

    try:
        arch_of(device)
    except ValueError as error:
        return str(error)
    return None


def _runs_on_cpu() -> bool:
    from ..kernels import _check

    return _check.runs_on_cpu()


def _ops(name: str, reason: str, device: torch.device, *, required: bool = False) -> Ops:
    # What torch.compile may replace by the registered op: only where that op would run the same function.
    same = (name, device.type) in (("triton", "cuda"), ("cpu", "cpu"))
    functions: dict[str, Any] = {op: _function(name, op) for op in NAMES}
    if same:
        functions = {op: _compilable(op, f) for op, f in functions.items()}
    if name != "triton":
        return Ops(name, reason, required, _always if name == "cpu" else _never, **functions)
    from ..kernels.prefetch import Prefetch

    return Ops(name, reason, required, _function("triton", "fuses_residual"), **functions, prefetch=Prefetch)


def _never(x: Tensor, weight: Tensor) -> bool:
    return False


def _always(x: Tensor, weight: Tensor) -> bool:
    return True


def _function(backend: str, op: str) -> Callable[..., Any]:
    """An op of a backend; ``fuses_residual`` goes with ``linear``."""
    file = "linear" if op == "fuses_residual" else op
    places = {"triton": f"kernels.{file}", "cpu": "ops.cpu", "reference": f"reference.{file}"}
    module = importlib.import_module(f"{_PACKAGE}.{places[backend]}")
    return cast("Callable[..., Any]", getattr(module, op))


def _compilable(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in eager mode, the registered op when compiled. Calls with an ``out`` or a hint are never replaced."""
    return update_wrapper(partial(_call, op, function), function)


def _call(op: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() and not kwargs.keys() & {"out", "residual_out", "workspace", "config", "options", "span"}:
        return REGISTERED[op](*args, **kwargs)
    return function(*args, **kwargs)


#: The ops as ``torch.compile`` calls them, filled by :mod:`fastdllm_triton.ops.registry`.
REGISTERED: dict[str, Callable[..., Any]] = {}
