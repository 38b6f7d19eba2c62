"""Options that several commands share. Their names are those of the API's fields and arguments, see ``docs/cli.md``."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, StrEnum
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..decoding.cache_policy import CACHE_POLICIES, cache_options
from ..decoding.strategies import STRATEGIES, strategy_forms

#: Panels of ``--help``.
PROMPTS, DECODING, CACHE, MODEL, OUTPUT = "Prompts", "Decoding", "Cache", "Model", "Output"

ModelOption = Annotated[str, typer.Option(help="'tiny' (built in), a checkpoint folder, or a hub id.", rich_help_panel=MODEL)]
DeviceOption = Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; the GPU if there is one.", rich_help_panel=MODEL)]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64; the checkpoint's own if not given.", rich_help_panel=MODEL),
]


class BackendChoice(StrEnum):
    """What ``load(backend)`` takes."""

    auto = "auto"
    triton = "triton"
    cpu = "cpu"
    reference = "reference"


BackendOption = Annotated[BackendChoice, typer.Option(help="What runs the ops.", rich_help_panel=MODEL)]


ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Of the CPU; the cores there are, and 1 for a tiny model, if not given.", rich_help_panel=MODEL),
]

CacheChoice = StrEnum("CacheChoice", {name: name for name in CACHE_POLICIES})  # type: ignore[misc]

PromptOption = Annotated[
    list[str] | None, typer.Option(help="A prompt. Several are decoded as a batch.", rich_help_panel=PROMPTS)
]
PromptFileOption = Annotated[
    Path | None,
    typer.Option(
        help="One prompt a line; a .jsonl file holds objects with a 'prompt'; '-' is standard input.", rich_help_panel=PROMPTS
    ),
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Wrap prompts in the checkpoint's chat template.", rich_help_panel=PROMPTS)
]

GenLengthOption = Annotated[
    int | None, typer.Option(help="Tokens to generate (the model's default, or 128).", rich_help_panel=DECODING)
]
BlockLengthOption = Annotated[
    int | None, typer.Option(help="Slots decoded together (the model's default, or 32).", rich_help_panel=DECODING)
]
SubBlockLengthOption = Annotated[
    int | None,
    typer.Option(
        help="Slots of a block that are decoded together, of block-causal models (the model's default, or the whole block).",
        rich_help_panel=DECODING,
    ),
]
#: How strategies are written, as every command says it.
STRATEGY_HELP = f"{strategy_forms(glosses=True)}; each may add :SCORE."
#: How lists of caches are written.
CACHES_HELP = f"{', '.join(CACHE_POLICIES)}; each may add options, as in dual+refresh_every=4."
CacheOption = Annotated[
    CacheChoice | None,
    typer.Option(
        help=f"What a step recomputes: {'; '.join(f'{name}: {kind.recomputes}' for name, kind in CACHE_POLICIES.items())} "
        "(dual; of block-causal models block_causal, which is theirs).",
        rich_help_panel=CACHE,
    ),
]

# What is measured, and where the results go.
ProblemSeedOption = Annotated[int, typer.Option(help="Which problems of the built-in task.", rich_help_panel=PROMPTS)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead, for machines.", rich_help_panel=OUTPUT)]
JsonCopyOption = Annotated[Path | None, typer.Option("--json-copy", hidden=True)]  # What `evaluate --json FILE` was.
ArchsOption = Annotated[list[str] | None, typer.Option(help="An architecture, such as sm_90. All if not given.")]
OpsOption = Annotated[list[str] | None, typer.Option(help="An op, such as window_attention. All if not given.")]
ReportOutOption = Annotated[Path | None, typer.Option(help="Write the records to this file.", rich_help_panel=OUTPUT)]
CompareOption = Annotated[Path | None, typer.Option(help="An earlier report: say what changed, and fail if anything did.")]


def decoding_options() -> list[Parameter]:
    """How to decode, as parameters of a command: fields of ``GenerationConfig``, and strategies."""
    scores = dict.fromkeys(score for kind in STRATEGIES.values() for score in kind.scores)
    score = f"{', '.join(scores)}: what ranks the tokens, where the strategy allows it."
    decoding: list[tuple[str, Any, Any, str]] = [
        ("strategy", str | None, None, f"{STRATEGY_HELP} Short forms follow."),
        *((kind.option, kind.number | None, None, kind.help) for kind in STRATEGIES.values()),
        ("score", str | None, None, score),
        ("temperature", float, 0.0, "0 takes the likeliest token."),
        ("cfg_scale", float, 0.0, "Classifier-free guidance, above 0; each forward then has twice the rows."),
        ("seed", int, 0, "Of sampling: row b draws with seed + b."),
        ("stop_at_eos", bool, True, "Leave out the blocks after an end token."),
    ]
    return [
        _parameter("gen_length", GenLengthOption, None),
        _parameter("block_length", BlockLengthOption, None),
        *(_parameter(name, _annotated(kind, text, DECODING), default) for name, kind, default, text in decoding),
        _parameter("sub_block_length", SubBlockLengthOption, None),
        _parameter("cache", CacheOption, None),
        *cache_parameters(),
    ]


def cache_parameters() -> list[Parameter]:
    """Options of the caches, as parameters of a command."""
    return [
        _parameter(
            name,
            _annotated(int | None if option.default is None else type(option.default), option.metadata["help"], CACHE),
            option.default,
        )
        for name, option in cache_options().items()
    ]


def _annotated(kind: Any, text: str, panel: str) -> Any:
    return Annotated[kind, typer.Option(help=text, rich_help_panel=panel)]


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def decoding_values(context: typer.Context, **others: Any) -> dict[str, Any]:
    """The values of :func:`decoding_options` and of others that a command has, by name; those without one are left out."""
    from ..decoding.options import named_in

    values = named_in(context.params | others)
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def with_decoding_options(before: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command :func:`decoding_options`, listed before one of its parameters; their values are in ``context.params``."""
    return with_parameters(before, decoding_options())


def with_parameters(before: str, more: list[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command more parameters, listed before one of its own; their values are in ``context.params``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        plain = signature(command, eval_str=True)

        @wraps(command)
        def wrapped(**values: Any) -> None:
            command(**{name: values[name] for name in plain.parameters})

        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in plain.parameters.values()]
        place = list(plain.parameters).index(before)
        parameters[place:place] = more
        wrapped.__signature__ = plain.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("Examples:", *(f"fastdllm-triton {command}" for command in commands)))
