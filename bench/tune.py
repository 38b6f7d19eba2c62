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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from fastdllm_triton.bench import bench_linear, bench_window_attention
from fastdllm_triton.bench._session import Bench, Shape, benches, check, label
from fastdllm_triton.bench._timing import Inputs, Run, Timer, Timing, sets_of_inputs, time_in_turns
from fastdllm_triton.kernels import (
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
from fastdllm_triton.kernels.prefetch import Prefetch
from fastdllm_triton.utils.files import write_atomically

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
        run: a launch with them.
    """

    config: Mapping[str, Any]
    run: Run


@dataclass(frozen=True)
class Sweep:
    """How an op is tuned.

    Attributes:
        op: its name.
        shapes: what is tried, shapes of the op's bench.
        key: of a shape and the inputs' element size, the entry's ``shape`` in the words of the config function.
        candidates: what to try on a shape, best guesses first.
        bench: what is timed; the op's own bench if not given.
        baseline: the baseline of the bench to beat; what runs without the file if not given.
    """

    op: str
    shapes: Sequence[Shape]
    key: Callable[[Shape, torch.dtype], dict[str, Any]]
    candidates: Callable[[Arch, Shape, Bench, torch.dtype], Iterator[Candidate]]
    bench: Bench | None = None
    baseline: str | None = None

    def tried(self, arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
        """The candidates that there is time for."""
        return itertools.islice(self.candidates(arch, shape, bench, dtype), max(MOST_CANDIDATES // len(self.shapes), 1))


def nearest_first(rule: Any, **choices: Sequence[Any]) -> Iterator[Any]:
    """Configs that differ from a rule's: in one choice, in two, and so on."""

    def distance(values: tuple[Any, ...]) -> int:
        return sum(getattr(rule, name) != value for name, value in zip(choices, values, strict=True))

    for values in sorted(itertools.product(*choices.values()), key=distance):
        if distance(values):
            yield replace(rule, **dict(zip(choices, values, strict=True)))


@contextmanager
def instead(module: Any, name: str, config: Any) -> Iterator[None]:
    """A launcher of the module finds this config, whatever it asks its config function."""
    before = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: config)
    try:
        yield
    finally:
        setattr(module, name, before)


def _with(module: Any, name: str, config: Any, run: Run) -> Run:
    def launch(inputs: Inputs) -> Any:
        with instead(module, name, config):
            return run(inputs)

    return launch


def _rms_norm(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    rule = rms_norm.select_config(arch, shape["width"])
    for num_warps in (1, 2, 4, 8, 16):
        if num_warps != rule.num_warps:
            config = replace(rule, num_warps=num_warps)
            yield Candidate({"num_warps": num_warps}, _with(rms_norm, "select_config", config, bench.ours))


def _swiglu(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    rule = swiglu.select_config(arch, shape["width"])
    for block, num_warps in itertools.product((256, 512, 1024, 2048), (1, 2, 4, 8)):
        config = swiglu.Config(block, num_warps)
        if config != rule and 4 * num_warps * arch.warp_size <= block <= triton.next_power_of_2(shape["width"]):
            yield Candidate(asdict(config), _with(swiglu, "select_config", config, bench.ours))


def _rope(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    _, kv_heads, dim = window_attention.MODELS[shape["model"]]
    rule = rope_kv_write.select_config(arch, kv_heads, dim)
    for block, num_warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        config = rope_kv_write.Config(block, num_warps)
        enough = block <= triton.next_power_of_2(kv_heads) and 2 <= block * dim // (num_warps * arch.warp_size) <= 64
        if config != rule and enough:
            yield Candidate(asdict(config), _with(rope_kv_write, "select_config", config, bench.ours))


def _token(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    rows, vocabulary, sample = shape["rows"], shape["vocabulary"], shape["temperature"] > 0
    itemsize = _itemsize(shape, dtype)
    rule = token_statistics.select_config(arch, rows, vocabulary, itemsize, sample)
    seen = {rule}
    # Splits follow from programs an SM, and tiles from warps.
    wanted = replace(rule, splits=4)
    for guess in nearest_first(wanted, splits=(4, 8, 2, 1), num_stages=(4, 3, 2, 1), num_warps=(4, 8, 2)):
        found = {"num_warps": guess.num_warps, "num_stages": guess.num_stages}
        found["splits"] = max(triton.cdiv(guess.splits * arch.sms, rows), 1)
        with instead(token_statistics, "nearest", found):
            config = token_statistics.select_config(arch, rows, vocabulary, itemsize, sample)
        if config not in seen:
            seen.add(config)
            yield Candidate(found, _with(token_statistics, "select_config", config, bench.ours))


def _head(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    rows, vocabulary, width, sample = shape["rows"], shape["vocabulary"], shape["width"], shape["temperature"] > 0
    rule = head_statistics.select_config(arch, rows, vocabulary, width, dtype.itemsize, sample)
    if rule is not None:
        yield Candidate(head_statistics.BY_LIBRARY, _with(head_statistics, "select_config", None, bench.ours))
    else:  # beyond what is sure not to spill
        block_rows = max(16, triton.next_power_of_2(rows))
        part = triton.cdiv(triton.cdiv(vocabulary, arch.sms), 16) * 16
        rule = head_statistics.Config(block_rows, 0, 64, part, triton.cdiv(vocabulary, part), 8, 4)
    choices = {"block_vocabulary": (64, 128), "num_warps": (8, 4), "num_stages": (4, 3, 5, 6), "block_width": (64, 128)}
    for resident in (1, 2, 3):
        part = triton.cdiv(triton.cdiv(vocabulary, resident * arch.sms), 16) * 16
        near = replace(rule, part=part, parts=triton.cdiv(vocabulary, part))
        for config in (near, *nearest_first(near, **choices)):
            stage = (config.block_vocabulary + config.block_rows) * config.block_width * dtype.itemsize
            if config == rule or not config.block_vocabulary:
                continue
            if config.num_stages * stage <= min(arch.shared_bytes_per_sm // resident - 1024, arch.shared_bytes):
                found = {name: getattr(config, name) for name in choices} | {"parts": resident * arch.sms}
                yield Candidate(found, _with(head_statistics, "select_config", config, bench.ours))


def _attention(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    heads, slots = window_attention.MODELS[shape["model"]], shape["slots"]
    rule = window_attention.select_config(arch, shape["batch"], shape["window"], *heads, slots, dtype.itemsize)
    rows = shape["window"] * heads[0] // heads[1]
    tiles = [block for block in (16, 32, 64, 128) if block < 2 * triton.next_power_of_2(rows)][-2:]
    splits = sorted({max(rule.splits // 2, 1), rule.splits, rule.splits + 1, rule.splits + 2, 2 * rule.splits})
    # The usual tile of a large product on Hopper, and Ampere's with longer tiles of keys.
    large = [replace(rule, block_m=128, block_n=128, num_warps=8, num_stages=2, swap=False)] if tiles[-1] == 128 else []
    large += [replace(rule, block_m=128, block_n=64, num_warps=8, num_stages=4, swap=False)] if tiles[-1] == 128 else []
    choices = {"splits": splits, "block_n": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8), "block_m": tiles}
    choices |= {"swap": (False, True)} if arch.name == "sm_90" else {}
    seen = {rule}
    for guess in (*large, *nearest_first(rule, **choices)):
        config = guess.split(slots, guess.splits)
        fits = window_attention.shared_bytes(arch, config, heads[2], dtype.itemsize) <= arch.shared_bytes
        if config in seen or not fits or config.block_m * config.block_n > 128 * 128:
            continue
        seen.add(config)
        found = {name: value for name, value in asdict(config).items() if name != "chunk"}
        yield Candidate(found, partial(_attend, config=config))


def _attend(inputs: Inputs, config: window_attention.Config) -> Any:
    return window_attention.window_attention(**inputs, config=config)


def _cudnn(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    yield Candidate({"library": "cudnn"}, _attend_by_cudnn)


def _attend_by_cudnn(inputs: Inputs) -> Any:
    q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
    return window_attention.by_cudnn(q, k, v, (0, k.shape[2]))


def _prefetch(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    for megabytes in (8, 16, 4, 32, 2, 48):
        size = megabytes * 2**20
        if size <= dtype.itemsize * shape["n"] * shape["k"]:
            yield Candidate({"bytes": size}, partial(_ahead_of_a_product, size=size))


def _ahead_inputs(shape: Shape, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    attention = {"model": shape["model"], "batch": 1, "window": 32, "slots": shape["slots"]}
    i = dict(bench_window_attention.inputs(attention, device, seed, dtype=dtype))
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn((shape["n"], shape["k"]), generator=generator, device=device, dtype=dtype)
    x = torch.randn((32, shape["k"]), generator=generator, device=device, dtype=dtype)
    return i | {"weight": weight.mul_(shape["k"] ** -0.5), "x": x, "norm": torch.ones_like(x[0]), "before": shape["before"]}


def _ahead_of_a_product(i: Inputs, size: int = 0) -> Any:
    """What stands in front of a product in a layer, and the product, with its weight asked for meanwhile."""
    ahead = Prefetch(i["x"].device, size)
    ahead(i["weight"])
    if i["before"] == "attention":
        names = ("q", "k_cache", "v_cache", "kv_start", "kv_end")
        x = window_attention.window_attention(*(i[name] for name in names)).view(32, -1)  # type: ignore[union-attr]
    else:
        x = rms_norm.rms_norm(i["x"], i["norm"], 1e-5)
    y = linear.linear(x, i["weight"])
    ahead.join()
    return y


AHEAD = Bench(
    op="prefetch",
    shapes=[
        {"model": model, "slots": 1024, "before": before, "n": n, "k": k}
        for model in window_attention.MODELS
        for before, part in (("attention", "out"), ("norm", "gate_up"), ("norm", "qkv"))
        for n, k in (linear.PROJECTIONS[f"{model} {part}"][:2],)
    ],
    quick=[],
    axis="n",
    inputs=_ahead_inputs,
    ours=_ahead_of_a_product,
    oracle=_ahead_of_a_product,
    baselines={},
    bytes=lambda shape: 2 * shape["n"] * shape["k"],
)


def _linear(arch: Arch, shape: Shape, bench: Bench, dtype: torch.dtype) -> Iterator[Candidate]:
    sizes = (shape["rows"], shape["n"], shape["k"], dtype.itemsize, shape["activation"])
    for config in linear.candidates(arch, *sizes):
        yield Candidate(asdict(config), partial(bench_linear.ours, config=config))


def _linear_key(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    found = {name: shape[name] for name in ("rows", "n", "k", "norm", "activation", "residual")}
    return found | {"dtype": str(dtype).removeprefix("torch.")}


def _attention_key(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    q_heads, kv_heads, dim = window_attention.MODELS[shape["model"]]
    sizes = {name: shape[name] for name in ("batch", "window", "slots")}
    return {"q_heads": q_heads, "kv_heads": kv_heads, "dim": dim, "itemsize": dtype.itemsize, **sizes}


def _head_key(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    rows = max(16, triton.next_power_of_2(shape["rows"]))
    return {
        "block_rows": rows, "vocabulary": shape["vocabulary"], "width": shape["width"], "element_size": dtype.itemsize,
        "sample": shape["temperature"] > 0,
    }  # fmt: skip


def _token_key(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    sizes = {"rows": shape["rows"], "vocabulary": shape["vocabulary"]}
    return sizes | {"element_size": _itemsize(shape, dtype), "sample": shape["temperature"] > 0}


def _itemsize(shape: Shape, dtype: torch.dtype) -> int:
    return 4 if shape["bits"] == 32 else dtype.itemsize


#: Where a whole step spends its time first. Ops whose entries hold for any rows are tried on those of a step.
SWEEPS = {
    sweep.op: sweep
    for sweep in (
        Sweep(
            "linear",
            [shape for shape in bench_linear.SHAPES if shape["rows"] in (16, 32, 64, 128)],
            _linear_key,
            _linear,
            baseline="library",
        ),
        Sweep(
            "window_attention",
            [
                {"model": model, "batch": batch, "window": window, "slots": slots}
                for model in window_attention.MODELS
                for slots in (1024, 320, 2048, 4096)
                for batch, window in ((1, 32), (4, 32), (16, 32), (1, 64), (1, slots))
            ],
            _attention_key,
            _attention,
        ),
        Sweep(
            "cudnn_attention",
            [
                {"model": model, "batch": batch, "window": slots, "slots": slots}
                for model in window_attention.MODELS
                for slots in (512, 1024, 2048, 4096)
                for batch in (1, 4)
            ],
            _attention_key,
            _cudnn,
            bench=bench_window_attention.BENCH,
        ),
        Sweep(
            "prefetch",
            AHEAD.shapes,
            lambda shape, dtype: {"n": shape["n"], "k": shape["k"], "itemsize": dtype.itemsize},
            _prefetch,
            bench=AHEAD,
        ),
        Sweep(
            "head_statistics",
            [
                {"rows": rows, "vocabulary": vocabulary, "width": width, "temperature": temperature}
                for vocabulary, width in ((126_464, 4096), (152_064, 3584))
                for rows, temperature in ((32, 0.0), (64, 0.0), (32, 1.0), (64, 1.0), (16, 0.0), (128, 0.0), (128, 1.0))
            ],
            _head_key,
            _head,
        ),
        Sweep(
            "rope_kv_write",
            [{"model": model, "batch": 1, "window": 32, "slots": 4096} for model in window_attention.MODELS],
            lambda shape, dtype: dict(zip(("kv_heads", "dim"), window_attention.MODELS[shape["model"]][1:], strict=True)),
            _rope,
        ),
        Sweep(
            "rms_norm",
            [{"rows": 32, "width": width, "residual": True} for width in (3584, 4096)],
            lambda shape, dtype: {"width": shape["width"]},
            _rms_norm,
        ),
        Sweep(
            "swiglu",
            [{"rows": 32, "width": width} for width in (12_288, 18_944)],
            lambda shape, dtype: {"width": shape["width"]},
            _swiglu,
        ),
        Sweep(
            "token_statistics",
            [
                {"rows": rows, "vocabulary": vocabulary, "temperature": temperature, "bits": bits}
                for bits, temperature in ((32, 0.0), (32, 1.0), (16, 0.0))
                for vocabulary in (126_464, 152_064)
                for rows in (128, 512, 32)
            ],
            _token_key,
            _token,
        ),
    )
}  # fmt: skip


def bench_of(sweep: Sweep) -> Bench:
    """What a sweep times."""
    if sweep.bench is not None:
        return sweep.bench
    (bench,) = benches("ops", [sweep.op])
    assert isinstance(bench, Bench)
    return bench


def tune(
    sweep: Sweep, shape: Shape, device: torch.device, *, timer: Timer, cache: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Sweeps one shape.

    Returns:
        The entry: ``config`` is None where nothing beat what runs without the file, which for linear is the library.
    """
    bench = bench_of(sweep)
    sets = [bench.inputs(shape, device, seed, dtype=dtype) for seed in range(sets_of_inputs(bench.bytes(shape), cache))]
    arch, runs, configs = arch_of(device), {}, {}
    for candidate in sweep.tried(arch, shape, bench, dtype):
        name = json.dumps(candidate.config)
        try:
            check(replace(bench, ours=candidate.run), shape, sets[0])
        except Exception as error:  # too many registers or too much shared memory; a wrong result is said aloud
            if isinstance(error, AssertionError):
                print(f"wrong: {sweep.op} {label(shape)} {name}", file=sys.stderr)
            continue
        runs[name], configs[name] = candidate.run, dict(candidate.config)
    rule = bench.ours if sweep.baseline is None else bench.baselines[sweep.baseline]
    found = timer({"rule": rule} | runs, sets)
    times = {name: timing.median for name, timing in found.items() if isinstance(timing, Timing)}
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
    found = json.loads(path.read_text())
    return list(found["entries"]) if found["versions"] == _versions() else []


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
