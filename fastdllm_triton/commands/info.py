"""``fastdllm-triton info``: versions, the device, the backend; and what a generation needs in memory, without the weights."""

from __future__ import annotations

import platform
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from .. import cli_options as cli
from .._console import clear_errors, console
from ..configs import read_config
from ..kernels._limits import MAX_ROWS
from ..machine import version
from ..memory import Memory, available_bytes, largest_batch
from ..models.config import ModelConfig
from ..ops import resolve
from ..shapes import buckets

_PACKAGES = ("fastdllm-triton", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def info(
    model: Annotated[
        str | None, typer.Option(help="Also what it needs in memory: 'tiny', a folder, a config.json, or a hub id.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 1000,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    dtype: cli.DtypeOption = None,
) -> None:
    """Versions, the device, and the backend with the reason why it is chosen; with --model, the memory of a generation.

    Memory is arithmetic on config.json: no weights are read, nor need they be there.
    """
    with clear_errors():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config, itemsize = None, 0
        if model is not None:
            config, own = read_config(model)
            itemsize = _itemsize(dtype, own)
            if prompt_length + gen_length > config.max_length:
                raise ValueError(
                    f"prompt_length + gen_length must be at most the model's {config.max_length} slots, "
                    f"got {prompt_length} + {gen_length}"
                )
        ops = resolve("auto", device)
        table = Table(show_header=False, box=None)
        for package in _PACKAGES:
            table.add_row(package, version(package) or "not installed")
        table.add_row("python", platform.python_version())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        table.add_row("device", name)
        table.add_row("backend", f"{ops.name}: {ops.reason}")
        console.print(table)
        if config is not None:
            console.print()
            console.print(memory_table(config, str(model), prompt_length, gen_length, batch, itemsize, device))


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
    rows_bucket, slots_bucket = buckets(device)
    rows, slots = rows_bucket(batch), slots_bucket(prompt_length + gen_length)
    memory, available = Memory.of(config, rows, slots, itemsize), available_bytes(device)
    table = Table(
        "", title=Text(f"{name}: {batch} x ({prompt_length} + {gen_length}) slots, {8 * itemsize} bits an element"), box=None
    )
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


def human(size: int) -> str:
    """Bytes in the largest decimal unit of which there is one."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _itemsize(dtype: str | None, own: str | None) -> int:
    """Bytes of an element of the dtype that was asked for, or else of the checkpoint's own."""
    name = dtype or own
    if name is None:
        raise ValueError("dtype: config.json does not say which; give --dtype")
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {name!r}")
    return found.itemsize
