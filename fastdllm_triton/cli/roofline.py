"""``fastdllm-triton roofline``: the floor of a generation, without a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..decoding.cache_policy import cache_options
from ..decoding.config import GenerationConfig
from ..tools import roofline as roofline_model
from ..tools.roofline import GPUS, SHAPES, Floor, Gpu, Setting
from . import options as cli
from .console import console, say, say_list, show

if TYPE_CHECKING:
    from ..decoding.cache_policy import CacheName
    from ..models.config import ModelConfig

#: The published models as their model cards write them.
_TITLES = {
    "llada-8b": "LLaDA-8B",
    "llada-1.5": "LLaDA-1.5",
    "dream-7b": "Dream-7B",
    "fast-dllm-v2-1.5b": "Fast-dLLM v2 1.5B",
    "fast-dllm-v2-7b": "Fast-dLLM v2 7B",
    "sdar-1.7b": "SDAR-1.7B",
    "sdar-4b": "SDAR-4B",
    "sdar-8b": "SDAR-8B",
}


@cli.with_parameters("model", cli.cache_parameters())
def roofline(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}; its data sheet's numbers.")] = "h200",
    bandwidth: Annotated[float | None, typer.Option(help="GB/s, instead of the data sheet's.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Dense bfloat16 TFLOP/s, instead of the data sheet's.")] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt.", rich_help_panel=cli.DECODING)] = 1000,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate.", rich_help_panel=cli.DECODING)] = 256,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens of a block (32; of block-causal models their own).", rich_help_panel=cli.DECODING)
    ] = None,
    sub_block_length: cli.SubBlockLengthOption = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in lockstep.", rich_help_panel=cli.DECODING)] = 1,
    tokens_per_forward: Annotated[
        float, typer.Option(help="Tokens committed a forward, refreshes among the forwards.", rich_help_panel=cli.DECODING)
    ] = 1.0,
    stop_at: Annotated[
        int | None,
        typer.Option(help="Tokens up to the end token: decoding stops after its block.", rich_help_panel=cli.DECODING),
    ] = None,
    cache: cli.CacheOption = None,
    model: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)}, tiny, or a config.json.", rich_help_panel=cli.MODEL)
    ] = "llada-8b",
    weight_bits: Annotated[
        float, typer.Option(help="Of the matrices: 16, 8, 4. Products stay bfloat16.", rich_help_panel=cli.MODEL)
    ] = 16,
    cache_bits: Annotated[float, typer.Option(help="Of keys and values.", rich_help_panel=cli.MODEL)] = 16,
    ops: Annotated[
        bool, typer.Option("--ops", help="Also each op of a refresh and of a step.", rich_help_panel=cli.OUTPUT)
    ] = False,
    as_json: cli.JsonOption = False,
) -> None:
    """The least time a generation can take on a GPU: per step, per refresh, in all; and what would change it."""
    shape = roofline_model.shape_of(model)
    target = gpu_of(gpu, bandwidth, tflops)
    given = {} if block_length is None else {"block_length": block_length}
    defaults = GenerationConfig.of_model(shape, **given) if shape.block_causal else GenerationConfig()
    block_length = defaults.block_length if block_length is None else block_length
    setting = Setting(
        prompt_length,
        gen_length,
        block_length,
        defaults.cache if cache is None else cast("CacheName", cache.value),
        tokens_per_forward,
        batch_size,
        stop_at=stop_at,
        sub_block_length=defaults.sub_block_length if sub_block_length is None else sub_block_length,
        weight_bits=weight_bits,
        cache_bits=cache_bits,
        **{name: context.params[name] for name in cache_options() if context.params[name] is not None},
    )
    floors = [(name, roofline_model.floor(shape, changed, target)) for name, changed in roofline_model.what_if(setting)]
    if as_json:
        typer.echo(json.dumps(record(model, shape, target, setting, floors)))
        return
    weights = f"{shape.streamed_parameters * weight_bits / 8 / 1e9:.2f} GB of weights a forward"
    say(console, _TITLES.get(model, model), style="bold")
    hardware = f"{target.bandwidth / 1e9:,.0f} GB/s", f"{target.matrix_rate / 1e12:,.0f} TFLOP/s bfloat16"
    say_list(console, [f"on {target.name}", *hardware, weights])
    lengths = f"prompt of {prompt_length}", f"{gen_length} tokens in blocks of {block_length}", f"cache {setting.cache}"
    say_list(
        console,
        [*lengths, f"{tokens_per_forward:g} tokens a forward", f"batch of {batch_size}"]
        + ([f"end token at {stop_at}"] if stop_at else []),
    )
    show(phases_table(shape, setting, target))
    if ops:
        show(ops_table(shape, setting, target))
    show(what_if_table(floors))
    say(console, "A floor: nothing here was measured.", style="dim")


def gpu_of(name: str, bandwidth: float | None, tflops: float | None) -> Gpu:
    """A GPU by name; ``bandwidth`` (GB/s) and ``tflops`` replace the data sheet's numbers, and both together any name."""
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if key not in GPUS and (bandwidth is None or tflops is None):
        raise ValueError(f"--gpu: got {name!r}, needs one of {', '.join(GPUS)}, or both --bandwidth and --tflops")
    for option, value in (("--bandwidth", bandwidth), ("--tflops", tflops)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{option} must be a number above 0, got {value}")
    known = GPUS.get(key)
    return Gpu(
        known.name if known else name,
        known.bandwidth if bandwidth is None and known else (bandwidth or 0) * 1e9,
        known.matrix_rate if tflops is None and known else (tflops or 0) * 1e12,
    )


def _table(title: str, first: str) -> Table:
    """A table that fits into 80 columns; its first column names the rows."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    return table


def phases_table(shape: ModelConfig, setting: Setting, gpu: Gpu) -> Table:
    table = _table("A forward", "forward")
    for column in ("how many", "rows", "keys", "head rows", "GB", "TFLOP", "bound", "floor ms"):
        table.add_column(column, justify="right")
    bits = {"weight_bits": setting.weight_bits, "cache_bits": setting.cache_bits}
    schedule = setting.schedule(shape)
    costs = roofline_model.generation_cost(shape, schedule, **bits)
    # Steps over a prefix differ from block to block: the first and the last one show the range.
    shown = costs if len(costs) <= 4 else [costs[0], costs[1], costs[-1]]
    for phase, total in shown:
        cost = total * (1 / phase.forwards)
        table.add_row(
            phase.name,
            f"{phase.forwards:.1f}",
            f"{phase.batch * phase.window:g}",
            f"{phase.keys:g}",
            f"{phase.batch * phase.head_rows:g}",
            f"{cost.bytes / 1e9:.2f}",
            f"{cost.flops / 1e12:.3f}",
            cost.bound(gpu),
            f"{cost.seconds(gpu) * 1e3:.3f}",
        )
    if len(shown) < len(costs):
        table.caption = f"{len(costs) - len(shown)} kinds of steps between the last two are left out"
    return table


def ops_table(shape: ModelConfig, setting: Setting, gpu: Gpu) -> Table:
    """The ops of the first refresh (or whole forward) and of the last step, each as if alone with a cold cache."""
    schedule = setting.schedule(shape)
    kinds = {"refresh": schedule[0], "step": schedule[-1]}
    if len(schedule) == 1 or kinds["refresh"].name != "refresh":
        del kinds["refresh"]
    table = _table("Its ops, each timed alone", "op")
    table.add_column("calls", justify="right")
    table.caption = "alone, an op's activations pass the memory too, so the sum is above the floor"
    for kind in kinds:
        for column in (f"{kind}: GB", "TFLOP", "bound", "ms"):
            table.add_column(column, justify="right")
    bits = {"weight_bits": setting.weight_bits, "cache_bits": setting.cache_bits}
    costs = [roofline_model.op_costs(shape, p.batch, p.window, p.keys, p.head_rows, **bits) for p in kinds.values()]
    for op, first in costs[0].items():
        cells = []
        for cost in (forward[op].alone for forward in costs):
            milliseconds = cost.seconds(gpu) * 1e3
            cells += [f"{cost.bytes / 1e9:.2f}", f"{cost.flops / 1e12:.2f}", cost.bound(gpu), f"{milliseconds:.3f}"]
        table.add_row(op, str(first.calls), *cells)
    return table


def what_if_table(floors: list[tuple[str, Floor]]) -> Table:
    table = _table("The generation", "what if")
    table.caption = "quantised weights are multiplied in bfloat16"
    for column in ("forwards", "refreshes ms", "steps ms", "all ms", "tokens/s", "speed-up"):
        table.add_column(column, justify="right")
    base = floors[0][1]
    for name, floor in floors:
        table.add_row(
            name,
            f"{floor.forwards:.1f}",
            f"{floor.refresh_seconds * 1e3:.1f}",
            f"{floor.step_seconds * 1e3:.1f}",
            f"{floor.seconds * 1e3:.1f}",
            f"{floor.tokens_per_second:,.0f}",
            f"{floor.tokens_per_second / base.tokens_per_second:.2f}",
        )
    return table


def record(name: str, shape: ModelConfig, gpu: Gpu, setting: Setting, floors: list[tuple[str, Floor]]) -> dict[str, Any]:
    """What ``--json`` prints: times in milliseconds."""
    bits = {"weight_bits": setting.weight_bits, "cache_bits": setting.cache_bits}
    costs = roofline_model.generation_cost(shape, setting.schedule(shape), **bits)
    return {
        "model": {"name": _TITLES.get(name, name), **asdict(shape)},
        "gpu": asdict(gpu),
        "setting": asdict(setting),
        "forwards": [
            asdict(phase)
            | {
                "bytes": total.bytes / phase.forwards,
                "flops": total.flops / phase.forwards,
                "floor_ms": total.seconds(gpu) / phase.forwards * 1e3,
            }
            for phase, total in costs
        ],
        "generation": {
            name: {
                "forwards": floor.forwards,
                "refresh_ms": floor.refresh_seconds * 1e3,
                "step_ms": floor.step_seconds * 1e3,
                "floor_ms": floor.seconds * 1e3,
                "tokens_per_second": floor.tokens_per_second,
            }
            for name, floor in floors
        },
    }
