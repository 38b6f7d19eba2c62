"""``fastdllm-triton info``: versions, the device, the backend; and what a generation needs in memory, without the weights."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory, counts = None, None
    if launches and model is None:
        raise ValueError("--launches needs --model: the launches of which model?")
    if model is not None:
        announce_lookup(model)
        config, checkpoint_dtype = read_config(model)
        if launches:
            counts = launches_text(config, arch, device, batch_size or 1)
        gen = gen_length or min(256, config.max_length // 2)
        prompt = prompt_length or max(min(1000, config.max_length - gen), 1)
        if prompt + gen > config.max_length:
            raise ValueError(
                f"prompt_length + gen_length must be at most the model's {config.max_length} slots, got {prompt} + {gen}"
            )
        memory = memory_table(config, model, prompt, gen, batch_size or 1, _itemsize(dtype, checkpoint_dtype), device)
    elif names := [name for name, value in sizes.items() if value is not None]:
        raise ValueError(f"--{' and --'.join(names)} need --model: the memory of which model?")
    ops = resolve("auto", device)
    table = Table(show_header=False, box=None)
    for package in _PACKAGES:
        table.add_row(package, version(package) or "not installed")
    table.add_row("python", platform.python_version())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    table.add_row("device", name)
    table.add_row("backend", f"{ops.name}: {ops.reason}")
    for variable in environment.VARIABLES:
        table.add_row(variable.name, f"{variable.value}: {variable.meaning}; one of {', '.join(variable.allowed)}")
    show(table)
    if memory is not None:
        console.print()
        show(memory)
    if counts is not None:
        console.print()
        console.print(counts)


def memory_table(
    config: ModelConfig, name: str, prompt_length: int, gen_length: int, batch: int, itemsize: int, device: torch.device
) -> Table:
    """What a generation needs, what there is, and the largest batch that fits.

    Args:
        config: the model's shape.
        name: the model's, for the title.
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
    title = f"{visible(name)}: {batch} x ({prompt_length} + {gen_length}) slots, {8 * itemsize} bits an element"
    table = Table("", title=Text(title), box=None)
    table.add_column("", justify="right")
    table.add_column("bytes", justify="right")
    for what, size in (
        ("weights", memory.weights),
        ("cache", memory.cache),
        ("workspace, at most", memory.workspace),
        ("all", memory.total),
        (f"available on {device.type}", available),
    ):
        table.add_row(what, *(("unknown", "") if size is None else (human(size), f"{size:,}")))
    if available is not None:
        most = largest_batch(config, slots, itemsize, max(available - memory.weights, 0), rows_bucket)
        most = min(most, MAX_ROWS) if device.type == "cuda" else most
        table.add_row("largest batch that fits", f"{most:,}" if most else "none", "")
    if (rows, slots) != (batch, prompt_length + gen_length):
        table.caption = f"allocated as {rows} x {slots} slots"
    return table


def launches_text(config: ModelConfig, arch: str, device: torch.device, batch: int) -> Text:
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
    ops = ", ".join(f"{op} {times}" for op, times in sorted(now.layer.items()))
    return Text(
        f"launches per layer: {now.per_layer}\n"
        f"launches per step: {now.per_step}\n"
        f"  ({arch}, {batch} x {step.block_length} slots over 1,024, cache {step.cache}; a layer: {ops})\n"
        f"with every product fused with what stands around it: {fused.per_layer} per layer, {fused.per_step} per step"
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
