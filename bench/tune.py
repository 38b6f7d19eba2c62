"""Sweeps launch parameters on this GPU and writes the winners to ``kernels/tuned/<gpu>.json``, which the config functions read.

    python bench/tune.py [--op NAME]... [--minutes N] [--quick] [--out FOLDER]

Offline and deterministic but for the clock: every candidate is first checked against the reference, then all take turns with
what runs without the file. An op has at most 600 candidates over all its shapes, best guesses first: those nearest to what the
config functions choose, and tiles that are known to serve. A candidate is written only if it is faster than what runs without
the file by more than two runs of the same thing differ, and of those within a hundredth of the best the first in the list is
taken. The file is rewritten after every shape, whole or not at all; a shape that it holds already is not measured again, unless
it is another version of torch or Triton.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter, ne
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from fastdllm_triton.bench._session import Shape, check, label, sets_and_results
from fastdllm_triton.bench._timing import Run, Timer, Timing, sets_of_inputs, time_in_turns
from fastdllm_triton.bench.bench_ops import library_linear
from fastdllm_triton.kernels import (
    _library,
    _tuned,
    head_statistics,
    linear,
    rms_norm,
    rope_kv_write,
    swiglu,
    token_statistics,
    window_attention,
)
from fastdllm_triton.kernels._arch import Arch, arch_of
from fastdllm_triton.types import Activation
from fastdllm_triton.utils.files import write_atomically
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.cases._base import Function, OpCases
from fastdllm_triton.verify.cases.prefetch import PREFETCH
from fastdllm_triton.verify.cases.window_attention import HEADS

#: A candidate must take less than this share of the time without it.
MARGIN = 0.97
#: Candidates within this share of the best are as good as it.
TIE = 1.01
#: Candidates of an op, all shapes together: some minutes of compiling, and as many of timing.
MOST_CANDIDATES = 600


@dataclass(frozen=True)
class Candidate:
    """Launch parameters to try.

    Attributes:
        config: what the file would hold.
        function: the op with them.
    """

    config: Mapping[str, Any]
    function: Function


@dataclass
class Sweep:
    """How an op is tuned; decorates the function that makes its candidates.

    Attributes:
        cases: of what is timed.
        shapes: what is tried.
        key: of a shape and the inputs' dtype, the entry's ``shape`` in the words of the config function.
        rule: what runs without the file; the kernel if not given.
        op: its name in the file; that of the cases if not given.
    """

    cases: OpCases
    shapes: Sequence[Shape]
    key: Callable[[Shape, torch.dtype], dict[str, Any]]
    rule: Run | None = None
    op: str = ""

    def __call__(self, candidates: Callable[..., Iterator[Candidate]]) -> None:
        """Takes a function of an architecture and the entries of a ``key``, which gives the best guesses first."""
        self.op, self._candidates = self.op or self.cases.op, candidates
        SWEEPS[self.op] = self

    def candidates(self, arch: Arch, shape: Shape, dtype: torch.dtype) -> Iterator[Candidate]:
        return self._candidates(arch, **self.key(shape, dtype))

    def tried(self, arch: Arch, shape: Shape, dtype: torch.dtype) -> Iterator[Candidate]:
        """The candidates that there is time for."""
        return itertools.islice(self.candidates(arch, shape, dtype), max(MOST_CANDIDATES // len(self.shapes), 1))


#: By the ops' names; where a whole step spends its time first.
SWEEPS: dict[str, Sweep] = {}


def nearest_first(rule: Any, **choices: Sequence[Any]) -> Iterator[Any]:
    """Configs that differ from a rule's: in one choice, in two, and so on."""

    def distance(values: tuple[Any, ...]) -> int:
        return sum(getattr(rule, name) != value for name, value in zip(choices, values, strict=True))

    for values in sorted(itertools.product(*choices.values()), key=distance):
        if distance(values):
            yield replace(rule, **dict(zip(choices, values, strict=True)))


def of_config(kernel: Function, config: Any, *derived: str) -> Candidate:
    """A candidate from a kernel's config; fields that follow from the others are not written."""
    written = {name: value for name, value in asdict(config).items() if name not in derived}
    return Candidate(written, partial(kernel, config=config))


def linear_candidates(
    arch: Arch, rows: int, n: int, k: int, itemsize: int, activation: Activation | None
) -> list[linear.Config]:  # fmt: skip
    """The choice of ``linear.select_config``, then what differs from it in one respect, in two, and so on."""
    first, gated = linear.select_config(arch, rows, n, k, itemsize, activation), activation == "swiglu"
    configs = [first]
    outputs, tiles_m = n // (2 if gated else 1), triton.cdiv(rows, first.block_m)
    for block_n, block_k, swap_ab, splits in itertools.product((32, 64, 128), (64, 128), (False, True), (1, 2, 4)):
        programs = tiles_m * triton.cdiv(outputs, block_n) * splits
        sums = first.block_m * block_n * (2 if gated else 1)
        stage = itemsize * block_k * (first.block_m + block_n * (2 if gated else 1))
        wide_enough = not swap_ab or (block_n >= 64 and (arch.name == "sm_90" or (arch.name == "sm_100" and not gated)))
        # Not more registers than were seen to fit, no more splits than two programs an SM, all columns shared equally.
        if not wide_enough or sums > 16_384 or (splits > 1 and programs > 2 * arch.sms) or k % (splits * block_k):
            continue
        resident = 2 if programs > arch.sms else 1
        room = min(arch.shared_bytes, arch.shared_bytes_per_sm // resident - 1024) - 4 * sums
        num_stages = 2 if arch.backend == "hip" else min(room // stage, 6)
        if num_stages >= 2:
            configs.append(linear.Config(first.block_m, block_n, block_k, swap_ab, splits, 8 if sums > 4096 else 4, num_stages))
    choices = attrgetter("block_n", "block_k", "swap_ab", "splits")  # The rest follows from them.
    return sorted(dict.fromkeys(configs), key=lambda c: sum(map(ne, choices(c), choices(first))))


@Sweep(
    OPS["linear"],
    [shape for shape in OPS["linear"].shapes if shape["rows"] in (16, 32, 64, 128)],
    lambda shape, dtype: {
        **{name: shape[name] for name in ("rows", "n", "k", "norm", "activation", "residual")},
        "dtype": str(dtype).removeprefix("torch."),
    },
    rule=library_linear,
)
def _linear(arch: Arch, *, rows: int, n: int, k: int, activation: Activation | None, dtype: str, **_: Any) -> Iterator[Candidate]:
    for config in linear_candidates(arch, rows, n, k, getattr(torch, dtype).itemsize, activation):
        yield of_config(linear.linear, config)


def _attention_key(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    heads = dict(zip(("q_heads", "kv_heads", "dim"), HEADS[shape["model"]], strict=True))
    return {**heads, "itemsize": dtype.itemsize, **{name: shape[name] for name in ("batch", "window", "slots")}}


def _attention_shapes(sizes: Iterable[tuple[int, int, int]]) -> list[Shape]:
    """Shapes of all models, from batch, window and slots."""
    return [dict(zip(("model", "batch", "window", "slots"), (model, *size), strict=True)) for model in HEADS for size in sizes]


@Sweep(
    OPS["window_attention"],
    _attention_shapes(
        [
            (batch, window, slots)
            for slots in (1024, 320, 2048, 4096)
            for batch, window in ((1, 32), (4, 32), (16, 32), (1, 64), (1, slots))
        ]
    ),
    _attention_key,
)
def _attention(arch: Arch, **sizes: int) -> Iterator[Candidate]:
    rule, slots = window_attention.select_config(arch, **sizes), sizes["slots"]
    rows = sizes["window"] * sizes["q_heads"] // sizes["kv_heads"]
    tiles = [block for block in (16, 32, 64, 128) if block < 2 * triton.next_power_of_2(rows)][-2:]
    splits = sorted({max(rule.splits // 2, 1), rule.splits, rule.splits + 1, rule.splits + 2, 2 * rule.splits})
    # The usual tile of a large product on Hopper, and Ampere's with longer tiles of keys.
    large = [replace(rule, block_m=128, block_n=128, num_warps=8, num_stages=2, swap_ab=False)] if tiles[-1] == 128 else []
    large += [replace(rule, block_m=128, block_n=64, num_warps=8, num_stages=4, swap_ab=False)] if tiles[-1] == 128 else []
    choices = {"splits": splits, "block_n": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8), "block_m": tiles}
    choices |= {"swap_ab": (False, True)} if arch.name == "sm_90" else {}
    seen = {rule}
    for guess in (*large, *nearest_first(rule, **choices)):
        config = guess.split(slots, guess.splits)
        fits = window_attention.shared_bytes(arch, config, sizes["dim"], sizes["itemsize"]) <= arch.shared_bytes
        if config in seen or not fits or config.block_m * config.block_n > 128 * 128:
            continue
        seen.add(config)
        yield of_config(window_attention.window_attention, config, "chunk")


@Sweep(
    OPS["window_attention"],
    _attention_shapes([(batch, slots, slots) for slots in (512, 1024, 2048, 4096) for batch in (1, 4)]),
    _attention_key,
    op="cudnn_attention",
)
def _cudnn(arch: Arch, slots: int, **_: Any) -> Iterator[Candidate]:
    yield Candidate({"library": "cudnn"}, lambda q, k_cache, v_cache, **_: _library.by_cudnn(q, k_cache, v_cache, (0, slots)))


@Sweep(
    PREFETCH,
    PREFETCH.shapes,
    lambda shape, dtype: {"n": shape["n"], "k": shape["k"], "itemsize": dtype.itemsize},
)
def _prefetch(arch: Arch, n: int, k: int, itemsize: int) -> Iterator[Candidate]:
    for megabytes in (8, 16, 4, 32, 2, 48):
        size = megabytes * 2**20
        if size <= itemsize * n * k:
            yield Candidate({"bytes": size}, partial(PREFETCH.kernel, size=size))


@Sweep(
    OPS["head_statistics"],
    [shape for rows in (32, 64, 16, 128) for shape in OPS["head_statistics"].shapes if shape["rows"] == rows],
    lambda shape, dtype: {
        "block_rows": max(16, triton.next_power_of_2(shape["rows"])),
        **{name: shape[name] for name in ("vocabulary", "width")},
        "element_size": dtype.itemsize,
        "sample": shape["temperature"] > 0,
    },
)
def _head(arch: Arch, *, block_rows: int, vocabulary: int, width: int, element_size: int, sample: bool) -> Iterator[Candidate]:
    rule = head_statistics.select_config(arch, block_rows, vocabulary, width, element_size, sample)
    if rule is not None:
        yield Candidate(head_statistics.BY_LIBRARY, head_statistics.by_library)
    else:  # beyond what is sure not to spill
        part = triton.cdiv(triton.cdiv(vocabulary, arch.sms), 16) * 16
        rule = head_statistics.Config(block_rows, 0, 64, part, triton.cdiv(vocabulary, part), 8, 4)
    choices = {"block_vocabulary": (64, 128), "num_warps": (8, 4), "num_stages": (4, 3, 5, 6), "block_width": (64, 128)}
    for resident in (1, 2, 3):
        part = triton.cdiv(triton.cdiv(vocabulary, resident * arch.sms), 16) * 16
        near = replace(rule, part=part, parts=triton.cdiv(vocabulary, part))
        for config in (near, *nearest_first(near, **choices)):
            stage = (config.block_vocabulary + config.block_rows) * config.block_width * element_size
            if config == rule or not config.block_vocabulary:
                continue
            if config.num_stages * stage <= min(arch.shared_bytes_per_sm // resident - 1024, arch.shared_bytes):
                written = {name: getattr(config, name) for name in choices} | {"parts": resident * arch.sms}
                yield Candidate(written, partial(head_statistics.head_statistics, config=config))


@Sweep(
    OPS["rope_kv_write"],
    [shape for shape in OPS["rope_kv_write"].shapes if (shape["batch"], shape["window"]) == (1, 32)],
    lambda shape, dtype: dict(zip(("kv_heads", "dim"), HEADS[shape["model"]][1:], strict=True)),
)
def _rope(arch: Arch, kv_heads: int, dim: int) -> Iterator[Candidate]:
    rule = rope_kv_write.select_config(arch, kv_heads, dim)
    for config in nearest_first(rule, block_h=(1, 2, 4, 8, 16, 32), num_warps=(1, 2, 4, 8)):
        lanes = config.num_warps * arch.warp_size
        if config.block_h <= triton.next_power_of_2(kv_heads) and 2 <= config.block_h * dim // lanes <= 64:
            yield of_config(rope_kv_write.rope_kv_write, config)


def _width(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {"width": shape["width"]}


@Sweep(OPS["rms_norm"], [shape for shape in OPS["rms_norm"].shapes if shape["rows"] == 32 and shape["residual"]], _width)
def _rms_norm(arch: Arch, width: int) -> Iterator[Candidate]:
    for config in nearest_first(rms_norm.select_config(arch, width), num_warps=(1, 2, 4, 8, 16)):
        yield of_config(rms_norm.rms_norm, config)


@Sweep(OPS["swiglu"], [shape for shape in OPS["swiglu"].shapes if shape["rows"] == 32], _width)
def _swiglu(arch: Arch, width: int) -> Iterator[Candidate]:
    rule = swiglu.select_config(arch, width)
    for config in nearest_first(rule, block_f=(256, 512, 1024, 2048), num_warps=(1, 2, 4, 8)):
        if 4 * config.num_warps * arch.warp_size <= config.block_f <= triton.next_power_of_2(width):
            yield of_config(swiglu.swiglu, config)


@Sweep(
    OPS["token_statistics"],
    [
        shape
        for rows in (128, 512, 32)
        for shape in OPS["token_statistics"].shapes
        if shape["rows"] == rows and (shape["bits"] == 32 or not shape["temperature"])
    ],
    lambda shape, dtype: {
        **{name: shape[name] for name in ("rows", "vocabulary")},
        "element_size": 4 if shape["bits"] == 32 else dtype.itemsize,
        "sample": shape["temperature"] > 0,
    },
)
def _token(arch: Arch, rows: int, vocabulary: int, element_size: int, sample: bool) -> Iterator[Candidate]:
    rule = token_statistics.select_config(arch, rows, vocabulary, element_size, sample)
    seen = {rule}
    # Splits follow from programs an SM, and tiles from warps.
    for guess in nearest_first(replace(rule, splits=4), splits=(4, 8, 2, 1), num_stages=(4, 3, 2, 1), num_warps=(4, 8, 2)):
        written = {"num_warps": guess.num_warps, "num_stages": guess.num_stages}
        written["splits"] = max(triton.cdiv(guess.splits * arch.sms, rows), 1)
        config = token_statistics.tiling(arch, rows, vocabulary, element_size, **written)
        if config not in seen:
            seen.add(config)
            yield Candidate(written, partial(token_statistics.token_statistics, config=config))


def tune(
    sweep: Sweep, shape: Shape, device: torch.device, *, timer: Timer, cache: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Sweeps one shape.

    Returns:
        The entry: ``config`` is None where nothing beat what runs without the file, which for linear is the library.
    """
    cases = sweep.cases
    sets, expected = sets_and_results(cases, shape, device, dtype, sets_of_inputs(cases.bytes(shape), cache))
    runs: dict[str, Run] = {"rule": sweep.rule or (lambda i: cases.kernel(**i))}
    configs = {}
    for candidate in sweep.tried(arch_of(device), shape, dtype):
        name = json.dumps(candidate.config)
        try:
            check(cases, shape, candidate.function, sets[0], expected)
        except Exception as error:  # too many registers or too much shared memory; a wrong result is said aloud
            if isinstance(error, AssertionError):
                print(f"wrong: {sweep.op} {label(shape)} {name}", file=sys.stderr)
            continue
        runs[name] = lambda i, function=candidate.function: function(**i)  # type: ignore[misc]
        configs[name] = dict(candidate.config)
    measured = timer(runs, sets)
    times = {name: timing.median for name, timing in measured.items() if isinstance(timing, Timing)}
    before = times.pop("rule")
    entry = {"op": sweep.op, "shape": sweep.key(shape, dtype), "config": None, "ms": before, "without_ms": before}
    best = choice(times, before)
    return entry if best is None else entry | {"config": configs[best], "ms": times[best]}


def choice(times: Mapping[str, float], before: float) -> str | None:
    """The first candidate that is as good as the best, if that beats the time without it by the margin."""
    if not times or min(times.values()) >= MARGIN * before:
        return None
    limit = TIE * min(times.values())
    return next(name for name, milliseconds in times.items() if milliseconds <= limit)


def write(entries: Sequence[dict[str, Any]], gpu: str, folder: Path) -> Path:
    """Writes all entries of a GPU, one a line, whole or not at all."""
    path = folder / _tuned.path_of(gpu).name
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomically(path, f'{{"gpu": {json.dumps(gpu)}, "versions": {json.dumps(_versions())}, "entries": [\n{rows}\n]}}\n')
    return path


def earlier(gpu: str, folder: Path) -> list[dict[str, Any]]:
    """The entries that were measured with these versions."""
    path = folder / _tuned.path_of(gpu).name
    if not path.exists():
        return []
    tuned = json.loads(path.read_text())
    return list(tuned["entries"]) if tuned["versions"] == _versions() else []


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


def main(
    op: Annotated[list[str] | None, typer.Option(help="An op to tune. All if not given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no shape after so many minutes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape an op.")] = False,
    out: Annotated[Path, typer.Option(help="Where the file goes; the package reads its own folder.")] = _tuned.FOLDER,
) -> None:
    """Tune the launch parameters of this GPU."""
    if unknown := sorted(set(op or ()) - set(SWEEPS)):
        raise typer.BadParameter(f"got {', '.join(unknown)}, needs names among {', '.join(SWEEPS)}", param_hint="--op")
    if not torch.cuda.is_available():
        typer.echo("tune: torch sees no GPU here, so nothing is tuned.")
        return
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_properties(device)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    entries = earlier(gpu.name, out)
    done = {_tuned._key(entry["op"], entry["shape"]) for entry in entries}
    for sweep in (SWEEPS[name] for name in SWEEPS if not op or name in op):
        for shape in sweep.shapes[:1] if quick else sweep.shapes:
            if _tuned._key(sweep.op, sweep.key(shape, torch.bfloat16)) in done:
                continue
            if end is not None and time.monotonic() > end:
                typer.echo("the time is up; the next run goes on here")
                raise typer.Exit(3)
            entry = tune(sweep, shape, device, timer=time_in_turns, cache=gpu.L2_cache_size)
            entries.append(entry)
            typer.echo(f"{sweep.op} {label(shape)}: {entry['without_ms']:.4f} ms -> {entry['ms']:.4f} ms {entry['config']}")
            write(entries, gpu.name, out)


if __name__ == "__main__":
    typer.run(main)
