"""``fastdllm-triton generate``: text from prompts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.prompts import read_bytes, read_lines, read_objects
from . import options as cli
from ._shared import load_model
from .console import USER_ERRORS, console, errors, say, say_list

if TYPE_CHECKING:
    from ..decoding.config import GenerationConfig
    from ..engine.outputs import GenerationOutput
    from ..model import MaskedDiffusionLM
    from .live import TokenRenderer


@cli.with_decoding_options(before="forbidden")
def generate(
    context: typer.Context,
    prompt: cli.PromptOption = None,
    prompt_file: cli.PromptFileOption = None,
    chat: cli.ChatOption = False,
    infill: Annotated[
        bool,
        typer.Option(
            "--infill",
            help="Fill in each [MASK] of the prompts, one token each, instead of continuing them.",
            rich_help_panel=cli.PROMPTS,
        ),
    ] = False,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            help="POS=TEXT: what stands at a position of the answer, from 0. Can be repeated.", rich_help_panel=cli.PROMPTS
        ),
    ] = None,
    forbidden: Annotated[
        list[int] | None, typer.Option(help="A token id that is never committed.", rich_help_panel=cli.DECODING)
    ] = None,
    lockstep: Annotated[
        bool, typer.Option("--lockstep", help="Rows of a batch begin each block together.", rich_help_panel=cli.DECODING)
    ] = False,
    model: cli.ModelOption = "tiny",
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
    live: Annotated[
        bool, typer.Option("--live", help="Show the block denoise as it happens.", rich_help_panel=cli.OUTPUT)
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Record the generation: .html, a page that replays it, or .json.", rich_help_panel=cli.OUTPUT),
    ] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Generate text from one or more prompts.

    Ctrl-C prints the text so far and ends with status 130.
    """
    if live and as_json:
        raise ValueError("--live and --json exclude each other")
    exclusive = {"--chat": chat, "--constraint": constraint, "--gen-length": context.params["gen_length"] is not None}
    for option, is_given in exclusive.items():
        if infill and is_given:
            raise ValueError(f"--infill and {option} exclude each other")
    constraints = read_constraints(constraint or [])
    prompts = read_prompts(prompt, prompt_file, chat)
    from ..decoding.fixed_tokens import masked_length
    from ..decoding.options import changed, strategy_of
    from ..engine.outputs import GenerationOutput
    from ..engine.trace import check_target
    from .live import LiveView, TokenRenderer

    if trace is not None:
        check_target("--trace", trace)
    options = cli.decoding_values(context, forbidden=tuple(forbidden or ()))
    strategy_of(options)  # refused before the model is loaded
    lm = load_model(model, device=device, dtype=dtype, backend=backend.value, threads=threads)
    if infill:
        rows = [lm.encode_masks(str(prompt)) for prompt in prompts]
        decoded = masked_length(rows, options.get("block_length", lm.defaults.block_length), lm.config.mask_id)
        config = changed(lm.defaults, options | {"gen_length": decoded, "stop_at_eos": False})
        decode = partial(lm.infill, rows, config)
    else:
        config = changed(lm.defaults, options)
        rows = [lm.encode(prompt.text, chat=chat) for prompt in prompts]
        _check_lengths(prompts, rows, config, lm)
        decode = partial(lm.generate, rows, config, constraints=constraints or None)
    view = LiveView(lm, config.gen_length, console) if live else None
    failure: BaseException | None = None
    try:
        with view or nullcontext():
            output = decode(callback=view, trace=trace)
    except (KeyboardInterrupt, *USER_ERRORS) as error:
        # What was decoded is printed, whatever ended it.
        if not isinstance(so_far := getattr(error, "output", None), GenerationOutput):
            raise
        output, failure = so_far, error
    if live:
        console.print()

    interrupted = isinstance(failure, KeyboardInterrupt)
    renderer = TokenRenderer(lm, lm.config.mask_id, console.encoding)
    if as_json:
        typer.echo(json.dumps(_record(lm, prompts, output) | {"interrupted": interrupted}))
    else:
        _print(lm, prompts, output, renderer)
    if interrupted:
        say(errors, f"interrupted{'' if as_json else f'; what is still masked is shown as {renderer.mask}'}", style="red")
        raise typer.Exit(130)
    if failure is not None:
        raise failure


def read_constraints(texts: Sequence[str]) -> dict[int, str]:
    """What ``--constraint POS=TEXT`` says.

    Raises:
        ValueError: one is of another form, or two have one position.
    """
    constraints: dict[int, str] = {}
    for text in texts:
        position, sign, held = text.partition("=")
        if not (sign and position.strip().isdecimal() and held):
            raise ValueError(f"--constraint must be POS=TEXT, such as 5=hello, got {text!r}")
        if int(position) in constraints:
            raise ValueError(f"--constraint: position {int(position)} is given twice")
        constraints[int(position)] = held
    return constraints


@dataclass(frozen=True)
class Prompt:
    """What to answer.

    Attributes:
        source: where it comes from, for messages.
        text: a prompt, or the messages of a conversation.
    """

    source: str
    text: str | list[dict[str, str]]

    def __str__(self) -> str:
        if isinstance(self.text, str):
            return self.text
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.text)


def read_prompts(texts: Sequence[str] | None, file: Path | None, chat: bool) -> list[Prompt]:
    """The prompts of ``--prompt``, of ``--prompt-file``, or of standard input.

    Raises:
        ValueError: there is none, or a line of the file cannot be used.
        OSError: the file cannot be read.
    """
    if texts and file:
        raise ValueError("--prompt and --prompt-file exclude each other")
    if texts:
        return [
            Prompt(f"--prompt {number}" if len(texts) > 1 else "--prompt", text) for number, text in enumerate(texts, start=1)
        ]
    if file is None and sys.stdin.isatty():
        raise ValueError("give --prompt, --prompt-file, or prompts on standard input")
    content = read_bytes("--prompt-file", file or Path("-"))
    source = "standard input" if file is None or str(file) == "-" else f"--prompt-file {file}"
    if file is not None and file.suffix == ".jsonl":
        prompts = [Prompt(where, record["prompt"]) for where, record in read_objects(source, content, messages=chat)]
    else:
        prompts = [Prompt(where, line) for where, line in read_lines(source, content)]
    if not prompts:
        raise ValueError(f"{source} holds no prompt")
    return prompts


def _check_lengths(prompts: Sequence[Prompt], rows: Sequence[list[int]], config: GenerationConfig, lm: MaskedDiffusionLM) -> None:
    """Raises for a prompt that does not fit, with the place that it comes from."""
    from ..engine.limits import check_prompts

    for prompt, row in zip(prompts, rows, strict=True):
        try:
            check_prompts([row], config, lm.network)
        except ValueError as error:
            raise ValueError(f"{prompt.source} {str(error).removeprefix('prompts: row 0 ')}") from None


def _print(lm: MaskedDiffusionLM, prompts: Sequence[Prompt], output: GenerationOutput, renderer: TokenRenderer) -> None:
    """Prompts and texts, and what they took."""
    for row, prompt in enumerate(prompts):
        say(console, str(prompt), style="bold")
        ids = output.ids(row)
        if lm.config.mask_id in ids:
            console.print(renderer.render(ids), soft_wrap=True)
        else:
            say(console, output.texts[row])
    summary = [
        f"{output.nfe} forwards ({output.refreshes} refreshes, {output.steps} steps)",
        f"{output.tokens_per_forward:.2f} tokens per forward",
        f"{output.tokens_per_second:.1f} tokens/s",
        f"{output.seconds:.2f} s on {lm.device}",
    ]
    say_list(console, summary, style="dim")


def _record(lm: MaskedDiffusionLM, prompts: Sequence[Prompt], output: GenerationOutput) -> dict[str, Any]:
    """What ``--json`` prints of a generation."""
    return {
        "model": str(lm.folder),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "backend": lm.network.ops.name,
        "threads": lm.threads,
        "nfe": output.nfe,
        "refreshes": output.refreshes,
        "steps": output.steps,
        "committed": output.committed,
        "tokens_per_forward": output.tokens_per_forward,
        "seconds": output.seconds,
        "tokens_per_second": output.tokens_per_second,
        "results": [
            {
                "prompt": prompt.text,
                "text": output.texts[row],
                "ids": output.ids(row),
                "forwards": int(output.row_forwards[row]),
                "step_map": output.step_map[row].tolist(),
                "confidence": [None if math.isnan(p) else p for p in output.confidence[row].tolist()],
            }
            for row, prompt in enumerate(prompts)
        ],
    }
