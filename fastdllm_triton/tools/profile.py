"""Where the time of a generation goes: a refresh and a step of your model, prompt and options, op by op.

Forwards run as they are, uncaptured, with a clock around every op; a second pass counts launches. On a GPU the launches of a
forward are queued behind a pause, so that the device runs them back to back and no op pays for the host. Bytes and FLOPs are
those that an op cannot do without, and the roofline is what this machine reached in the same run: a copy and a matrix product.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..decoding.config import GenerationConfig
from ..engine.engine import now
from ..engine.generation import Generation
from ..engine.modes import decoding_modes
from ..engine.outputs import GenerationOutput
from ..model import MaskedDiffusionLM
from ..ops import NAMES, Ops
from .environment import describe
from .launch_count import ComputingCalls

#: What of a forward is in no op: gathers, flags, and on a CPU Python itself.
REST = "rest"

#: GPU cycles that a forward waits for the host to queue its launches.
_PAUSE = 40_000_000


@dataclass
class OpTime:
    """An op in one forward, on average.

    Attributes:
        calls: of the op.
        launches: kernels, on a CPU calls of PyTorch that compute.
        ms: milliseconds.
        bytes, flops: that it cannot do without.
    """

    calls: float = 0.0
    launches: float = 0.0
    ms: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.ms / 1e6 if self.ms else 0.0

    def roofline_fraction(self, limits: Limits) -> float:
        """The time that memory or arithmetic take at least, over the time that was taken."""
        return 1e3 * max(self.bytes / limits.copy, self.flops / limits.matrix) / self.ms if self.ms else 0.0


@dataclass(frozen=True)
class Limits:
    """What the machine reached in the same run.

    Attributes:
        copy: bytes a second of a copy, read and write counted.
        matrix: FLOPs a second of a matrix product in the model's dtype.
    """

    copy: float
    matrix: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a generation goes.

    Attributes:
        machine: what it was measured on.
        limits: what that machine reached.
        forwards: of each kind, ``refresh`` and ``step``, in one generation.
        windows: slots that a forward of each kind recomputed, on average over rows and forwards.
        ops: for each kind the ops of one forward, :data:`REST` among them.
        seconds, committed: of a generation as it runs otherwise, captured where it can be, and the tokens that it decided.
        bytes: that a generation cannot do without.
    """

    machine: dict[str, Any]
    limits: Limits
    forwards: dict[str, int]
    windows: dict[str, float]
    ops: dict[str, dict[str, OpTime]]
    seconds: float
    committed: int
    bytes: float

    @property
    def tokens_per_second(self) -> float:
        return self.committed / self.seconds

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    def as_json(self) -> dict[str, Any]:
        """Everything, with the figures that follow from it."""
        ops = {
            kind: {
                name: asdict(op) | {"gb_per_s": op.gb_per_s, "roofline_fraction": op.roofline_fraction(self.limits)}
                for name, op in each.items()
            }
            for kind, each in self.ops.items()
        }
        return asdict(self) | {"ops": ops, "tokens_per_second": self.tokens_per_second, "gb_per_s": self.gb_per_s}


def profile(model: MaskedDiffusionLM, prompts: Sequence[list[int]], config: GenerationConfig, *, repeat: int = 3) -> Profile:
    """Profiles a generation.

    Args:
        model: the model.
        prompts: token ids of each row.
        config: the options.
        repeat: generations that are timed, after one that compiles; the fastest counts.

    Raises:
        ValueError: as :meth:`~fastdllm_triton.MaskedDiffusionLM.generate`.
    """

    def run() -> GenerationOutput:
        return Generation(model, [list(prompt) for prompt in prompts], config).run()

    run()
    fastest = min((run() for _ in range(repeat)), key=lambda output: output.seconds)
    clock, counter = _Clock(model.device), _Counter(model.device)
    with _instrumented(model, clock):
        run()  # an uncaptured forward may compile what a captured one did not
        clock.forwards.clear()
        timed = _recorded(model, prompts, config, clock)
    with _instrumented(model, counter):
        counted = _recorded(model, prompts, config, counter)
    kinds = [kind for kind in ("refresh", "step") if any(forward.kind == kind for forward in timed)]
    ops: dict[str, dict[str, OpTime]] = {}
    for kind in kinds:
        of_kind = [(a, b) for a, b in zip(timed, counted, strict=True) if a.kind == kind]
        ops[kind] = _average(of_kind)
    of = {kind: [forward for forward in timed if forward.kind == kind] for kind in kinds}
    with decoding_modes(model.network):
        limits = measure_limits(model.device, model.dtype)
    return Profile(
        machine=describe(model.device) | {"model": repr(model)},
        limits=limits,
        forwards={kind: len(forwards) for kind, forwards in of.items()},
        windows={kind: sum(forward.window for forward in forwards) / len(forwards) for kind, forwards in of.items()},
        ops=ops,
        seconds=fastest.seconds,
        committed=fastest.committed,
        bytes=sum(call.bytes for forward in counted for call in forward.calls),
    )


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """What the device reaches with a copy and with a matrix product: the best of five each."""
    cuda = device.type == "cuda"
    x = torch.ones((2**28 if cuda else 2**24), dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    size = 8192 if cuda else 1024
    a, b = (torch.rand((size, size), device=device).to(dtype) for _ in range(2))

    def best(function: Callable[[], object]) -> float:
        function()
        seconds = []
        for _ in range(5):
            began = now(device)
            function()
            seconds.append(now(device) - began)
        return min(seconds)

    return Limits(copy=2 * x.nbytes / best(lambda: y.copy_(x)), matrix=2 * size**3 / best(lambda: a @ b))


# --- one pass -------------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A call of an op: what it took, and what it cannot do without."""

    op: str
    seconds: float = 0.0
    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    events: tuple[Any, Any] | None = None


@dataclass
class _Forward:
    kind: str = ""
    window: float = 0.0
    seconds: float = 0.0
    launches: int = 0
    calls: list[_Call] = field(default_factory=list)


class _Probe:
    """What stands around every op and every forward of a pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forwards: list[_Forward] = []

    def call(self, op: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs an op."""
        record = _Call(op)
        with self.around(record):
            result = function(*args, **kwargs)
        self.note(record, args, kwargs, result)
        self.forwards[-1].calls.append(record)
        return result

    def forward(self, run: Callable[..., None], *args: Any) -> None:
        """Runs a forward."""
        self.forwards.append(_Forward())
        record = _Call(REST)
        with self.around_forward(), self.around(record):
            run(*args)
        self.finish(record)

    def note(self, record: _Call, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """What is noted of an op besides."""

    @contextmanager
    def around(self, record: _Call) -> Iterator[None]:
        """What is measured of an op, or of a whole forward."""
        yield

    def around_forward(self) -> Any:
        """What stands around a forward besides."""
        return nullcontext()

    def finish(self, record: _Call) -> None:
        """Notes what a whole forward took."""


class _Clock(_Probe):
    """Times ops."""

    @contextmanager
    def around(self, record: _Call) -> Iterator[None]:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            record.events = first, last
        else:
            began = time.perf_counter()
            yield
            record.seconds = time.perf_counter() - began

    def around_forward(self) -> Any:
        if self.device.type == "cuda":
            torch.cuda._sleep(_PAUSE)  # type: ignore[no-untyped-call]
        return nullcontext()

    def finish(self, record: _Call) -> None:
        forward = self.forwards[-1]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            for call in (*forward.calls, record):
                first, last = call.events or (None, None)
                call.seconds, call.events = first.elapsed_time(last) / 1e3, None  # type: ignore[union-attr]
        forward.seconds = record.seconds


class _Counter(_Probe):
    """Counts launches, of Triton's kernels and calls of PyTorch that compute, and what ops cannot do without."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.launches = 0

    @contextmanager
    def around(self, record: _Call) -> Iterator[None]:
        before = self.launches
        yield
        record.launches = self.launches - before

    def note(self, record: _Call, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        with _disable_current_modes():  # It waits for the device, which a clock must not.
            record.bytes, record.flops = traffic(record.op, args, kwargs, result)

    @contextmanager
    def around_forward(self) -> Iterator[None]:
        from triton.runtime.jit import JITFunction

        launch = JITFunction.run

        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += not kwargs.get("warmup")
            return launch(function, *args, **kwargs)

        def on_call(name: str) -> None:
            self.launches += 1

        with patch.object(JITFunction, "run", run), ComputingCalls(on_call):
            yield

    def finish(self, record: _Call) -> None:
        self.forwards[-1].launches = record.launches


@contextmanager
def _instrumented(model: MaskedDiffusionLM, probe: _Probe) -> Iterator[None]:
    """Lets a probe stand around the model's ops and forwards, none of them captured."""
    from ..engine.runner import ModelRunner

    network, forward, graphs = model.network, ModelRunner._forward, model.buffers.use_cuda_graphs
    ops: Ops = network.ops

    def around(op: str) -> Callable[..., Any]:
        function = getattr(ops, op)
        return lambda *args, **kwargs: probe.call(op, function, *args, **kwargs)

    def run(runner: ModelRunner, *args: Any) -> None:
        probe.forward(lambda: forward(runner, *args))

    functions: dict[str, Any] = {op: around(op) for op in NAMES}
    network.ops = replace(ops, **functions)
    model.buffers.use_cuda_graphs = False
    try:
        with patch.object(ModelRunner, "_forward", run), decoding_modes(network):
            yield
    finally:
        network.ops, model.buffers.use_cuda_graphs = ops, graphs


def _recorded(model: MaskedDiffusionLM, prompts: Sequence[list[int]], config: GenerationConfig, probe: _Probe) -> list[_Forward]:
    """The forwards of a generation, as a probe saw them."""
    for forward in Generation(model, [list(prompt) for prompt in prompts], config):
        record = probe.forwards[-1]
        record.kind = "refresh" if forward.refresh else "step"
        record.window = sum(end - first for first, end in forward.windows) / len(forward.windows)
    return probe.forwards


def _average(forwards: Sequence[tuple[_Forward, _Forward]]) -> dict[str, OpTime]:
    """The ops of one forward, from the same forwards timed and counted."""
    ops: dict[str, OpTime] = defaultdict(OpTime)
    rest = OpTime()
    for timed, counted in forwards:
        for call, count in zip(timed.calls, counted.calls, strict=True):
            op = ops[call.op]
            op.calls += 1
            op.launches += count.launches
            op.ms += 1e3 * call.seconds
            op.bytes += count.bytes
            op.flops += count.flops
        rest.ms += 1e3 * (timed.seconds - sum(call.seconds for call in timed.calls))
        rest.launches += counted.launches - sum(call.launches for call in counted.calls)
    everything = {**ops, REST: rest}
    for op in everything.values():
        for name in ("calls", "launches", "ms", "bytes", "flops"):
            setattr(op, name, getattr(op, name) / len(forwards))
    return everything


# --- what an op cannot do without ---------------------------------------------------------------------------------------------


def traffic(op: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[float, float]:
    """Bytes and FLOPs of a call: its arguments read once and its results written once, of a cache only what is attended.

    Args:
        op: its name.
        args, kwargs, result: of the call.
    """
    read = sum(tensor.nbytes for tensor in _tensors([*args, *kwargs.values()]))
    written = sum(tensor.nbytes for tensor in _tensors([result]))
    if op == "linear":
        x, weight = args[:2]
        return read + written, 2 * x.numel() * weight.shape[0]
    if op == "head_statistics":
        hidden, weight = args[:2]
        return read + written, 2 * hidden.numel() * weight.shape[0]
    if op == "rms_norm" and kwargs.get("rows") is not None:  # which are gathered
        rows, x = kwargs["rows"], args[0]
        gathered = rows.numel() * x.shape[-1] * x.element_size()
        residual = kwargs.get("residual")
        return gathered * (1 if residual is None else 2) + rows.nbytes + args[1].nbytes + written, 0.0
    if op == "rope_kv_write":
        qkv, k_cache = args[:2]
        heads, dim = k_cache.shape[1], k_cache.shape[3]
        return qkv.nbytes + written + 2 * qkv.shape[0] * qkv.shape[1] * heads * dim * k_cache.element_size(), 0.0
    if op == "window_attention":
        q, k_cache, _, kv_start, kv_end = args[:5]
        keys = int((kv_end - kv_start).clamp(min=0).sum())
        cached = 2 * keys * k_cache.shape[1] * k_cache.shape[3] * k_cache.element_size()
        return q.nbytes + written + cached, 4 * keys * q.shape[1] * q.shape[2] * q.shape[3]
    if op in ("commit_tokens", "window_inputs"):  # of the sequences only the block
        return read + written - args[0].nbytes - _records(args), 0.0
    return read + written, 0.0


def _records(args: Sequence[Any]) -> int:
    """Bytes of records that have a slot each, of which a commit writes a block."""
    state = next((arg for arg in args if hasattr(arg, "step_map")), None)
    return 0 if state is None else int(state.step_map.nbytes + state.confidence.nbytes)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among values, those of tuples and dataclasses too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif hasattr(value, "__dataclass_fields__"):
            yield from _tensors(list(vars(value).values()))
