"""``fastdllm-triton chat``: a conversation in the terminal, or over pipes."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Annotated

import typer

from . import options as cli
from ._shared import load_model
from .console import console, errors, say

_FORGETS = "This model has no chat template: each line is a problem of its own, and nothing of the lines before it is seen."


@cli.with_decoding_options(before="model")
def chat(
    context: typer.Context,
    system: Annotated[
        str | None, typer.Option(help="A message to the model before all others.", rich_help_panel=cli.PROMPTS)
    ] = None,
    model: cli.ModelOption = "tiny",
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
    threads: cli.ThreadsOption = None,
    pause: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait after each forward, to watch a fast model.", rich_help_panel=cli.OUTPUT),
    ] = 0.0,
) -> None:
    """Talk with a model and watch each block of its answers denoise.

    /help lists what else can be typed. Where the input is no terminal, its lines are read in turn and only answers are printed;
    the status is 2 if a line failed.
    """
    from ..decoding.options import changed, strategy_of
    from ._terminal import Terminal
    from .conversation import Conversation

    options = cli.decoding_values(context)
    strategy_of(options)  # refused before the model is loaded
    lm = load_model(model, device=device, dtype=dtype, backend=backend.value, threads=threads)
    conversation = Conversation(lm, changed(lm.defaults, options), system)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Where there is one, lines can be edited and recalled.
            importlib.import_module("readline")
        say(console, repr(lm), style="dim")
        say(console, "/help lists the commands", style="dim")
    if not conversation.remembers:
        say(console if interactive else errors, _FORGETS, style="dim")
    try:
        sound = Terminal(conversation, interactive, pause).run()
    except KeyboardInterrupt:  # The terminal has said so.
        raise typer.Exit(130) from None
    if not sound:
        raise typer.Exit(2)
