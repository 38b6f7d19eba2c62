"""``fastdllm-triton info``: versions, the device, the backend; and what a generation needs in memory, without the weights."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from . import options as cli
from ._shared import announce_lookup
from .console import console, show, visible

if TYPE_CHECKING:
    import torch

    from ..models.config import ModelConfig

_PACKAGES = ("fastdllm-triton", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def info(
    model: Annotated[
        str | None,
        typer.Option(
            help="Also what it needs in memory: 'tiny', a folder, a config.json, or a hub id.", rich_help_panel=cli.MODEL
        ),
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest prompt (1000, or what the model has room for).")
    ] = None,
    gen_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate (256, or half of what the model has room for).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences at once (1).")] = None,
    dtype: cli.DtypeOption = None,
    launches: Annotated[bool, typer.Option("--launches", help="Also the kernels that a step of --model launches.")] = False,
    arch: Annotated[str, typer.Option(help="Architecture that launches are counted for; on a GPU its own.")] = "sm_90",
    as_json: cli.JsonOption = False,
) -> None:
    """Versions, the device, and the backend with the reason why it is chosen; with --model, the memory of a generation.

    Memory and launches follow from config.json: no weights are read, nor need they be there.
    """
    sizes = {"prompt-length": prompt_length, "gen-length": gen_length, "batch-size": batch_size, "dtype": dtype}
    import torch

    from ..loading import read_config
    from ..ops import resolve
    from ..tools.environment import version
    from ..utils import environment
    from ..utils.threads import TINY, allowed_threads, available_cores, default_threads

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launches and model is None:
        raise ValueError("--launches needs --model: the launches of which model?")
    about_model: dict[str, Any] = {}
    if model is not None:
        announce_lookup(model)
        config, checkpoint_dtype = read_config(model)
        gen = gen_length or min(256, config.max_length // 2)
        prompt = prompt_length or max(min(1000, config.max_length - gen), 1)
        if prompt + gen > config.max_length:
            raise ValueError(
                f"prompt_length + gen_length must be at most the model's {config.max_length} slots, got {prompt} + {gen}"
            )
        itemsize = _itemsize(dtype, checkpoint_dtype)
        about_model = {"memory": {"model": model} | memory_of(config, prompt, gen, batch_size or 1, itemsize, device)}
        if launches:
            about_model["launches"] = launches_of(config, arch, device, batch_size or 1)
    elif names := [name for name, value in sizes.items() if value is not None]:
        raise ValueError(f"--{' and --'.join(names)} need --model: the memory of which model?")
    ops, threads = resolve("auto", device), None
    if device.type == "cpu":
        threads = allowed_threads() if model is None else default_threads(config.streamed_parameters, allowed_threads())
    record: dict[str, Any] = {
        "versions": {package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": available_cores(),
        "threads": threads,
        "backend": ops.name,
        "backend_reason": ops.reason,
        "environment": {variable.name: variable.value for variable in environment.VARIABLES},
        **about_model,
    }
    if as_json:
        typer.echo(json.dumps(record))
        return
    table = Table(show_header=False, box=None)
    for package, number in record["versions"].items():
        table.add_row(package, number or "not installed")
    table.add_row("device", record["device"])
    if threads is not None:
        said = f"{threads}, of {available_cores()} cores"
        table.add_row("threads", f"{said}; 1 for models below {TINY / 1e6:.0f} million parameters" if model is None else said)
    table.add_row("backend", f"{ops.name}: {ops.reason}")
    for variable in environment.VARIABLES:
        table.add_row(variable.name, f"{variable.value}: {variable.meaning}; one of {', '.join(variable.allowed)}")
    show(table)
    if "memory" in record:
        console.print()
        show(memory_table(record["memory"], device))
    if "launches" in record:
        console.print()
        console.print(launches_text(record["launches"]))


def memory_of(
    config: ModelConfig, prompt_length: int, gen_length: int, batch: int, itemsize: int, device: torch.device
) -> dict[str, int | None]:
    """What a generation needs, what there is (None where the system does not tell), and the largest batch that fits.

    Args:
        config: the model's shape.
        prompt_length, gen_length: slots of a row.
        batch: rows.
        itemsize: bytes of an element.
        device: where it would run; decides how sizes are rounded up.
    """
    from ..engine.buckets import buckets
    from ..engine.memory import Memory, available_bytes, largest_batch
    from ..kernels._limits import MAX_ROWS

    rows_bucket, slots_bucket = buckets(device)
    rows, slots = rows_bucket(batch), slots_bucket(prompt_length + gen_length)
    memory, available = Memory.of(config, rows, slots, itemsize), available_bytes(device)
    most = None
    if available is not None:
        most = largest_batch(config, slots, itemsize, max(available - memory.weights, 0), rows_bucket)
        most = min(most, MAX_ROWS) if device.type == "cuda" else most
    return {
        "prompt_length": prompt_length,
        "gen_length": gen_length,
        "batch_size": batch,
        "bits": 8 * itemsize,
        "rows": rows,
        "slots": slots,
        "weights": memory.weights,
        "cache": memory.cache,
        "workspace": memory.workspace,
        "all": memory.total,
        "available": available,
        "largest_batch": most,
    }


def memory_table(need: dict[str, Any], device: torch.device) -> Table:
    """:func:`memory_of` a model, for people."""
    title = "{}: {batch_size} x ({prompt_length} + {gen_length}) slots, {bits} bits an element"
    table = Table("", title=Text(title.format(visible(need["model"]), **need)), box=None)
    table.add_column("", justify="right")
    table.add_column("bytes", justify="right")
    names = {"workspace": "workspace, at most", "available": f"available on {device.type}"}
    for name in ("weights", "cache", "workspace", "all", "available"):
        size = need[name]
        table.add_row(names.get(name, name), *(("unknown", "") if size is None else (human(size), f"{size:,}")))
    if (most := need["largest_batch"]) is not None:
        table.add_row("largest batch that fits", f"{most:,}" if most else "none", "")
    if (need["rows"], need["slots"]) != (need["batch_size"], need["prompt_length"] + need["gen_length"]):
        table.caption = f"allocated as {need['rows']} x {need['slots']} slots"
    return table


def launches_of(config: ModelConfig, arch: str, device: torch.device, batch: int) -> dict[str, Any]:
    """Launches of a layer and of a step over the model's default cache: as this GPU was measured for, and with fused products."""
    from ..tools.launch_count import count_launches, step_config

    gpu = None
    if device.type == "cuda":
        from ..kernels._arch import arch_of
        from ..kernels._tuned import gpu_name

        arch, gpu = arch_of(device).name, gpu_name(device)
    step = step_config(config)
    now = count_launches(config, arch=arch, gpu=gpu, rows=batch)
    fused = count_launches(config, arch=arch, rows=batch, fused=True)
    return {
        "arch": arch,
        "batch_size": batch,
        "block_length": step.block_length,
        "cache": step.cache,
        "layer": dict(sorted(now.layer.items())),
        "per_layer": now.per_layer,
        "per_step": now.per_step,
        "per_layer_fused": fused.per_layer,
        "per_step_fused": fused.per_step,
    }


def launches_text(launches: dict[str, Any]) -> Text:
    """:func:`launches_of` a model, for people."""
    ops = ", ".join(f"{op} {times}" for op, times in launches["layer"].items())
    return Text(
        "launches per layer: {per_layer}\n"
        "launches per step: {per_step}\n"
        "  ({arch}, {batch_size} x {block_length} slots over 1,024, cache {cache}; a layer: {ops})\n"
        "with every product fused with what stands around it: {per_layer_fused} per layer, {per_step_fused} per step".format(
            ops=ops, **launches
        )
    )


def human(size: int) -> str:
    """Bytes in the largest decimal unit of which there is one."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _itemsize(dtype: str | None, checkpoint_dtype: str | None) -> int:
    """Bytes of an element of a dtype by name, or else of the checkpoint's."""
    import torch

    name = dtype or checkpoint_dtype
    if name is None:
        raise ValueError("dtype: config.json does not say which; give --dtype")
    element = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(element, torch.dtype) or not element.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {name!r}")
    return element.itemsize
