"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="'tiny' (built in), a checkpoint folder, or a hub id.")]
DeviceOption = Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; the GPU if there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64; the checkpoint's own if not given.")
]


class BackendChoice(StrEnum):
    """Backends."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


BackendOption = Annotated[BackendChoice, typer.Option(help="Who runs the ops.")]


class CacheChoice(StrEnum):
    """Caches."""

    none = "none"
    prefix = "prefix"
    dual = "dual"


# How to decode. A field of GenerationConfig each, or a strategy's parameter (fastdllm_triton.settings).
GenLengthOption = Annotated[int | None, typer.Option(help="Tokens to generate (the model's default, or 128).")]
BlockLengthOption = Annotated[int | None, typer.Option(help="Slots decoded together (the model's default, or 32).")]
CacheOption = Annotated[CacheChoice, typer.Option(help="What a step recomputes: everything, from the block on, or the block.")]
ThresholdOption = Annotated[float | None, typer.Option(help="Commit every token this sure, in (0, 1]. The default, at 0.9.")]
FactorOption = Annotated[float | None, typer.Option(help="Commit by the factor rule, above 0.")]
StepsOption = Annotated[int | None, typer.Option(help="Spread the generation evenly over this many forwards.")]
EntropyBudgetOption = Annotated[float | None, typer.Option(help="Commit while the entropies sum to this many nats.")]
ScoreOption = Annotated[str | None, typer.Option(help="confidence, margin, neg_entropy or random, where the strategy allows it.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
SeedOption = Annotated[int, typer.Option(help="Row b draws with seed + b.")]
StopAtEosOption = Annotated[bool, typer.Option(help="Leave out the blocks after an end token.")]
RefreshEveryOption = Annotated[int | None, typer.Option(help="Forwards between refreshes of the cache within a block.")]
PromptRefreshOption = Annotated[
    int | None, typer.Option(help="Blocks between refreshes of the prompt's part of the cache (every block).")
]
SuffixWindowOption = Annotated[int | None, typer.Option(help="Masked slots behind the block that are computed (all of them).")]
LookBackOption = Annotated[int, typer.Option(help="Slots before the block that a step recomputes with it.")]
LookAheadOption = Annotated[int, typer.Option(help="Slots behind the block that a step recomputes with it (dual cache).")]
CfgScaleOption = Annotated[float, typer.Option(help="Classifier-free guidance, above 0; each forward then has twice the rows.")]
