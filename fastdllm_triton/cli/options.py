"""Options that several commands share. Their names are those of the API's fields and arguments, see ``docs/cli.md``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

#: Panels of ``--help``.
PROMPTS, DECODING, CACHE, MODEL, OUTPUT = "Prompts", "Decoding", "Cache", "Model", "Output"

ModelOption = Annotated[str, typer.Option(help="'tiny' (built in), a checkpoint folder, or a hub id.", rich_help_panel=MODEL)]
DeviceOption = Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; the GPU if there is one.", rich_help_panel=MODEL)]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64; the checkpoint's own if not given.", rich_help_panel=MODEL),
]


class BackendChoice(StrEnum):
    """Backends."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


BackendOption = Annotated[BackendChoice, typer.Option(help="Who runs the ops.", rich_help_panel=MODEL)]


class CacheChoice(StrEnum):
    """Caches."""

    none = "none"
    prefix = "prefix"
    dual = "dual"


ChatOption = Annotated[
    bool, typer.Option("--chat", help="Wrap prompts in the checkpoint's chat template.", rich_help_panel=PROMPTS)
]

# How to decode. A field of GenerationConfig each, or a strategy's parameter (fastdllm_triton.decoding.options).
GenLengthOption = Annotated[
    int | None, typer.Option(help="Tokens to generate (the model's default, or 128).", rich_help_panel=DECODING)
]
BlockLengthOption = Annotated[
    int | None, typer.Option(help="Slots decoded together (the model's default, or 32).", rich_help_panel=DECODING)
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="fixed:K (K tokens a forward), threshold:T, factor:F or entropy:NATS; each may add :SCORE. Short forms follow.",
        rich_help_panel=DECODING,
    ),
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Commit every token this sure, in (0, 1]. The default, at 0.9.", rich_help_panel=DECODING)
]
FactorOption = Annotated[float | None, typer.Option(help="Commit by the factor rule, above 0.", rich_help_panel=DECODING)]
StepsOption = Annotated[
    int | None, typer.Option(help="Spread the generation evenly over this many forwards.", rich_help_panel=DECODING)
]
EntropyBudgetOption = Annotated[
    float | None, typer.Option(help="Commit while the entropies sum to this many nats.", rich_help_panel=DECODING)
]
ScoreOption = Annotated[
    str | None,
    typer.Option(help="confidence, margin, neg_entropy or random, where the strategy allows it.", rich_help_panel=DECODING),
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=DECODING)]
CfgScaleOption = Annotated[
    float,
    typer.Option(help="Classifier-free guidance, above 0; each forward then has twice the rows.", rich_help_panel=DECODING),
]
SeedOption = Annotated[int, typer.Option(help="Of sampling: row b draws with seed + b.", rich_help_panel=DECODING)]
StopAtEosOption = Annotated[bool, typer.Option(help="Leave out the blocks after an end token.", rich_help_panel=DECODING)]

CacheOption = Annotated[
    CacheChoice,
    typer.Option(help="What a step recomputes: everything, from the block on, or the block.", rich_help_panel=CACHE),
]
RefreshEveryOption = Annotated[
    int | None, typer.Option(help="Forwards between refreshes of the cache within a block.", rich_help_panel=CACHE)
]
PromptRefreshOption = Annotated[
    int | None,
    typer.Option(help="Blocks between refreshes of the prompt's part of the cache (every block).", rich_help_panel=CACHE),
]
SuffixWindowOption = Annotated[
    int | None, typer.Option(help="Masked slots behind the block that are computed (all of them).", rich_help_panel=CACHE)
]
LookBackOption = Annotated[
    int, typer.Option(help="Slots before the block that a step recomputes with it.", rich_help_panel=CACHE)
]
LookAheadOption = Annotated[
    int, typer.Option(help="Slots behind the block that a step recomputes with it (dual cache).", rich_help_panel=CACHE)
]

# What is measured, and where the results go.
ProblemSeedOption = Annotated[int, typer.Option(help="Which problems of the built-in task.", rich_help_panel=PROMPTS)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead, for machines.", rich_help_panel=OUTPUT)]
JsonCopyOption = Annotated[Path | None, typer.Option("--json-copy", hidden=True)]  # What `evaluate --json FILE` was.
ArchsOption = Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All if not given.")]
OpsOption = Annotated[list[str] | None, typer.Option(help="An op, such as window_attention. All if not given.")]
ReportOutOption = Annotated[Path | None, typer.Option(help="Write the records to this file.", rich_help_panel=OUTPUT)]
CompareOption = Annotated[Path | None, typer.Option(help="An earlier report: say what changed, and fail if anything did.")]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("Examples:", *(f"fastdllm-triton {command}" for command in commands)))
