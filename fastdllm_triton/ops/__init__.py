"""Chooses, once and in one place, whether the ops run as Triton kernels or as their PyTorch twins, and tells PyTorch of them.

Every op is registered with ``torch.library`` in the namespace ``fastdllm``: CUDA runs the kernel, CPU the reference, and
``torch.compile`` sees one opaque call with its mutations declared. Registered ops take and return tensors alone, in a fixed
number. Eager code calls the functions behind them directly: a pass through the dispatcher would only cost time.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial, update_wrapper, wraps
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from ..reference.token_statistics import statistics_merge as reference_merge
from ..types import Activation, PolicyState, RopeRounding, TokenStatistics, WindowInputs
from ..utils import environment
from . import arguments as op_arguments

__all__ = [
    "Ops",
    "commit_tokens",
    "head_statistics",
    "linear",
    "resolve",
    "rms_norm",
    "rope_kv_write",
    "statistics_merge",
    "swiglu",
    "token_statistics",
    "window_attention",
    "window_inputs",
]

_PACKAGE = __package__.rpartition(".")[0]

Backend = Literal["auto", "triton", "reference"]


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
        name: ``"triton"``, ``"reference"``, or ``"mixed"`` where each has some.
        reason: why it was chosen, in words.
        required: whether it was asked for by name, so that nothing may fall back to anything slower.
        fuses_residual: of ``(x, weight)``: whether ``linear`` adds a residual without a launch of its own.
        prefetch: of a device: what asks for weights ahead during a forward; nothing does outside of captures.
    """

    name: str
    reason: str
    required: bool
    fuses_residual: Callable[[Tensor, Tensor], bool]
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


_NO_OPS = ("name", "reason", "required", "fuses_residual", "prefetch")
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
        backend: ``"triton"`` raises where the kernels cannot run; ``"reference"`` is plain PyTorch; ``"auto"`` is what the
            environment variable ``FASTDLLM_BACKEND`` says, and without it takes the kernels where they can run. On a GPU
            where they cannot, it falls back with one warning that says why.
        device: where the tensors live.

    Raises:
        ValueError: ``backend``, or one of :data:`fastdllm_triton.utils.environment.VARIABLES`, has a value that is not allowed.
        RuntimeError: ``backend="triton"`` and the kernels cannot run on this device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return _resolved(environment.BACKEND.value if backend == "auto" else backend, device)


@cache
def _resolved(backend: str, device: torch.device) -> Ops:
    environment.check()
    if backend == "reference":
        return _ops("reference", "asked for", device, required=True)
    obstacle = _obstacle(device, interpreter=backend == "triton")
    if obstacle is None:
        required = backend == "triton"
        return _ops("triton", "asked for" if required else "a GPU with Triton", device, required=required)
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
    if device.type == "cuda":
        warnings.warn(f"falling back to the PyTorch reference ops: {obstacle}", stacklevel=2)
    return _ops("reference", obstacle, device)


def without_kernels(ops: Ops, parts: Sequence[str]) -> Ops:
    """``ops`` with some parts in plain PyTorch, to find out which kernel a difference comes from, or to do without it.

    Args:
        ops: what runs otherwise.
        parts: keys of :data:`PARTS`.

    Returns:
        Ops named ``"reference"`` where no kernel is left and ``"mixed"`` where some are; ``ops`` itself where nothing changes.
    """
    if not parts or ops.name == "reference":
        return ops
    names = {op for part in parts for op in PARTS[part]}
    functions: dict[str, Any] = {op: _function("reference", op) for op in NAMES if op in names}
    if "linear" in names:
        functions["fuses_residual"] = _fuses_residual("reference")
    name = "reference" if names == set(NAMES) else "mixed"
    return replace(ops, name=name, reason=f"{ops.reason}, but for {', '.join(parts)}", **functions)


def _obstacle(device: torch.device, *, interpreter: bool) -> str | None:
    """Why the kernels cannot run on a device, or None if they can; on a CPU they can in Triton's interpreter alone."""
    installed = importlib.util.find_spec("triton") is not None
    if device.type != "cuda" and not (interpreter and device.type == "cpu" and installed and _interpreted()):
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


def _interpreted() -> bool:
    from ..kernels import _check

    return _check.INTERPRETED


def _ops(name: str, reason: str, device: torch.device, *, required: bool = False) -> Ops:
    # What torch.compile may replace by the registered op: only where that op would run the same function.
    same = (name, device.type) in (("triton", "cuda"), ("reference", "cpu"))
    functions = {op: _function(name, op) for op in NAMES}
    if same:
        functions = {op: _compilable(op, f) for op, f in functions.items()}
    return Ops(name, reason, required, _fuses_residual(name), **functions, **_prefetch(name))


def _prefetch(name: str) -> dict[str, Callable[[torch.device], Prefetching]]:
    if name == "reference":
        return {}
    from ..kernels.prefetch import Prefetch

    return {"prefetch": Prefetch}


def _fuses_residual(name: str) -> Callable[[Tensor, Tensor], bool]:
    if name == "reference":
        return _never
    from ..kernels.linear import fuses_residual

    return fuses_residual


def _never(x: Tensor, weight: Tensor) -> bool:
    return False


def _function(backend: str, op: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{_PACKAGE}.{'kernels' if backend == 'triton' else 'reference'}.{op}")
    return cast("Callable[..., Any]", getattr(module, op))


def _compilable(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in eager mode, the registered op when compiled. Calls with an ``out`` or a hint are never replaced."""
    return update_wrapper(partial(_call, op, function), function)


def _call(op: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() and not kwargs.keys() & {"out", "residual_out", "workspace", "config", "span"}:
        return _REGISTERED[op](*args, **kwargs)
    return function(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Registration. For each op: what the dispatcher calls, with the backend's function first; the shapes of its results; and
# a function of the op's own signature that calls the registered op.

_LIBRARY = torch.library.Library("fastdllm", "DEF")  # type: ignore[no-untyped-call]


def _register(name: str, op: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``fastdllm::name`` and returns it."""

    def on(backend: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = run(_function(backend, op), *args)
            # The reference may return views in another order of dimensions than the kernels write.
            if isinstance(found, tuple):
                return tuple(tensor.contiguous() for tensor in found)
            return found if found is None else found.contiguous()

        return call

    _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, on("reference"), "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, on("triton"), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastdllm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastdllm, name).default


_rms_norm_op = _register(
    "rms_norm",
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda f, x, weight, eps: f(x, weight, eps),
    lambda x, weight, eps: x.new_empty(x.shape),
)
_add_rms_norm_op = _register(
    "add_rms_norm",
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual, Tensor? rows) -> (Tensor, Tensor)",
    lambda f, x, weight, eps, residual, rows: f(x, weight, eps, residual=residual, rows=rows),
    lambda x, weight, eps, residual, rows: _two(x, x.shape if rows is None else (*rows.shape, x.shape[-1])),
)


def _two(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape), like.new_empty(shape)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, rows: Tensor | None = None) -> Any:
    if residual is None and rows is None:
        return _rms_norm_op(x, weight, eps)
    return _add_rms_norm_op(x, weight, eps, residual, rows)


_swiglu_op = _register(
    "swiglu",
    "swiglu",
    "(Tensor gate_up) -> Tensor",
    lambda f, gate_up: f(gate_up),
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)


def _swiglu(gate_up: Tensor) -> Any:
    return _swiglu_op(gate_up)


def _fake_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2)))


_linear_op = _register(
    "linear",
    "linear",
    "(Tensor x, Tensor weight, Tensor? norm_weight, float? eps, Tensor? residual, str? activation) -> Tensor",
    lambda f, x, weight, norm_weight, eps, residual, activation: f(
        x, weight, norm_weight=norm_weight, eps=eps, residual=residual, activation=activation
    ),
    _fake_linear,
)


def _linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    return cast("Tensor", _linear_op(x, weight, norm_weight, eps, residual, activation))


_rope_kv_write_op = _register(
    "rope_kv_write",
    "rope_kv_write",
    "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor window_start, Tensor kv_start, float theta, Tensor? bias, "
    "str rounding) -> Tensor",
    lambda f, *args: f(*args[:6], bias=args[6], rounding=args[7]),
    lambda qkv, k_cache, *_: qkv.new_empty(
        (*qkv.shape[:2], qkv.shape[2] // k_cache.shape[3] - 2 * k_cache.shape[1], k_cache.shape[3])
    ),
)


def _rope_kv_write(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    kv_start: Tensor,
    theta: float,
    *,
    bias: Tensor | None = None,
    rounding: RopeRounding = "llada",
) -> Any:
    return _rope_kv_write_op(qkv, k_cache, v_cache, window_start, kv_start, theta, bias, rounding)


_ATTENTION_ARGUMENTS = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_start, Tensor kv_end, Tensor? skip_start, Tensor? skip_end, "
    "float? scale)"
)


def _run_attention(f: Callable[..., Any], *args: Any, return_lse: bool = False) -> Any:
    return f(*args[:5], skip_start=args[5], skip_end=args[6], scale=args[7], return_lse=return_lse)


def _fake_attention_lse(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, window, heads = q.shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, window), dtype=dtype)


_window_attention_op = _register(
    "window_attention",
    "window_attention",
    _ATTENTION_ARGUMENTS + " -> Tensor",
    _run_attention,
    lambda q, *_: q.new_empty(q.shape),
)
_window_attention_lse_op = _register(
    "window_attention_lse",
    "window_attention",
    _ATTENTION_ARGUMENTS + " -> (Tensor, Tensor)",
    lambda f, *args: _run_attention(f, *args, return_lse=True),
    _fake_attention_lse,
)


def _window_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    *,
    skip_start: Tensor | None = None,
    skip_end: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    op = _window_attention_lse_op if return_lse else _window_attention_op
    return op(q, k_cache, v_cache, kv_start, kv_end, skip_start, skip_end, scale)


_ENTRIES = tuple(field.name for field in fields(TokenStatistics))
_STATE = tuple(field.name for field in fields(PolicyState))


def _entries(statistics: TokenStatistics) -> tuple[Tensor, ...]:
    return tuple(getattr(statistics, name) for name in _ENTRIES)


def _fake_statistics(rows: int | torch.SymInt, logits: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty((rows,), dtype=torch.int64 if name == "token" else dtype) for name in _ENTRIES)


def _as_tensor(value: int | Tensor | Sequence[int] | None, device: torch.device) -> Tensor | None:
    """A key or a list of token ids as registered ops take them."""
    return None if value is None else torch.as_tensor(value, dtype=torch.int64, device=device)


def _temperatures(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """A temperature as registered ops take it: one for all rows, or one a row."""
    return (0.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)


_STATISTICS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_token_statistics_op = _register(
    "token_statistics",
    "token_statistics",
    "(Tensor logits, float temperature, Tensor? temperatures, Tensor? seed, Tensor? position, Tensor step, Tensor? forbidden) -> "
    + _STATISTICS,
    lambda f, logits, temperature, temperatures, seed, position, step, forbidden: _entries(
        f(
            logits,
            temperature=temperature if temperatures is None else temperatures,
            seed=seed,
            position=position,
            step=step,
            forbidden=forbidden,
        )
    ),
    lambda logits, *_: _fake_statistics(logits.shape[0], logits),
)


def _token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
) -> TokenStatistics:
    seed, steps, ids = (_as_tensor(value, logits.device) for value in (seed, step, forbidden))
    return TokenStatistics(*_token_statistics_op(logits, *_temperatures(temperature), seed, position, steps, ids))


_head_statistics_op = _register(
    "head_statistics",
    "head_statistics",
    "(Tensor hidden, Tensor weight, Tensor? rows, Tensor? bias, float temperature, Tensor? temperatures, Tensor? seed, "
    "Tensor? position, Tensor step, Tensor? forbidden, ScalarType? logits_dtype) -> " + _STATISTICS,
    lambda f, hidden, weight, rows, bias, temperature, temperatures, seed, position, step, forbidden, logits_dtype: _entries(
        f(
            hidden,
            weight,
            rows=rows,
            bias=bias,
            temperature=temperature if temperatures is None else temperatures,
            seed=seed,
            position=position,
            step=step,
            forbidden=forbidden,
            logits_dtype=logits_dtype,
        )
    ),
    lambda hidden, weight, rows, *_: _fake_statistics((hidden if rows is None else rows).shape[0], hidden),
)


def _head_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    position: Tensor | None = None,
    step: int | Tensor = 0,
    forbidden: Tensor | Sequence[int] | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TokenStatistics:
    seed, steps, ids = (_as_tensor(value, hidden.device) for value in (seed, step, forbidden))
    keys = (*_temperatures(temperature), seed, position, steps)
    return TokenStatistics(*_head_statistics_op(hidden, weight, rows, bias, *keys, ids, logits_dtype))


def _run_commit(f: Callable[..., Any], x: Tensor, *args: Any) -> None:
    entries, window_start, place, state = args[:6], args[6], args[7], args[8:]
    f(x, TokenStatistics(*entries), window_start, PolicyState(*state), place=place)


_commit_tokens_op = _register(
    "commit_tokens",
    "commit_tokens",
    "(Tensor(a!) x, Tensor token, Tensor logit, Tensor second_logit, Tensor logsumexp, Tensor rest, Tensor entropy, "
    "Tensor window_start, Tensor? place, str score, str rule, Tensor value, Tensor steps, Tensor shares, int mask_id, "
    "Tensor eos_ids, Tensor kv_start, Tensor seed, "
    "Tensor(b!) step, Tensor(c!) masked, Tensor(d!) remaining, Tensor(f!) invalid, Tensor(k!) ended, "
    "Tensor(g!) forward, Tensor(i!) step_map, Tensor(j!) confidence) -> ()",
    _run_commit,
    lambda *_: None,
)


def _commit_tokens(
    x: Tensor, statistics: TokenStatistics, window_start: Tensor, state: PolicyState, *, place: Tensor | None = None
) -> None:
    _commit_tokens_op(x, *_entries(statistics), window_start, place, *(getattr(state, name) for name in _STATE))


_WINDOW = ("back", "window", "block", "predicted", "shift", "mask_id", "seed", "step")
_window_inputs_op = _register(
    "window_inputs",
    "window_inputs",
    "(Tensor x, Tensor base, Tensor block_start, Tensor remaining, Tensor kv_start, int back, int window, int block, "
    "int predicted, bool shift, int mask_id, Tensor? seed, Tensor? step) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda f, *args: tuple(vars(f(*args[:5], **dict(zip(_WINDOW, args[5:], strict=True)))).values()),
    lambda x, base, block_start, remaining, kv_start, back, window, block, predicted, shift, mask_id, seed, step: (
        x.new_empty((len(x), window)),
        x.new_empty(len(x), dtype=torch.int32),
        x.new_empty(predicted),
        x.new_empty((len(x), block), dtype=torch.int32),
        x.new_empty((3, 0 if seed is None else predicted)),
        x.new_empty(predicted),
    ),
)


def _window_inputs(
    x: Tensor,
    base: Tensor,
    block_start: Tensor,
    remaining: Tensor,
    kv_start: Tensor,
    *,
    back: int = 0,
    window: int,
    block: int,
    predicted: int,
    shift: bool = False,
    mask_id: int,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> WindowInputs:
    sizes = (back, window, block, predicted, shift, mask_id)
    return WindowInputs(*_window_inputs_op(x, base, block_start, remaining, kv_start, *sizes, seed, step))


_REGISTERED: dict[str, Callable[..., Any]] = {
    "commit_tokens": _commit_tokens,
    "head_statistics": _head_statistics,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "rope_kv_write": _rope_kv_write,
    "swiglu": _swiglu,
    "token_statistics": _token_statistics,
    "window_attention": _window_attention,
    "window_inputs": _window_inputs,
}


# ----------------------------------------------------------------------------------------------------------------------
# The ops as functions, for callers with tensors of their own: arguments are checked, and each runs where its tensors are.


def _dispatched(op: str) -> Callable[..., Any]:
    check = getattr(op_arguments, op)

    @wraps(_function("reference", op))
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        else:
            device = check(*args, **kwargs)
        return getattr(resolve("auto", device), op)(*args, **kwargs)

    return call


@wraps(reference_merge)
def statistics_merge(a: TokenStatistics, b: TokenStatistics) -> TokenStatistics:
    op_arguments.statistics_merge(a, b)
    return reference_merge(a, b)


commit_tokens = _dispatched("commit_tokens")
head_statistics = _dispatched("head_statistics")
linear = _dispatched("linear")
rms_norm = _dispatched("rms_norm")
rope_kv_write = _dispatched("rope_kv_write")
swiglu = _dispatched("swiglu")
token_statistics = _dispatched("token_statistics")
window_attention = _dispatched("window_attention")
window_inputs = _dispatched("window_inputs")
