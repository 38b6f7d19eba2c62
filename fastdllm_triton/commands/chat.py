"""``fastdllm-triton chat``: a conversation in the terminal, or over pipes."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .. import cli_options as cli
from .._console import clear_errors, console, errors, tell
from ..chat import Conversation, Usage
from ..live import AnswerView
from ..loading import load
from ..settings import changed, current, strategy_of

_COMMANDS = {
    "/set [NAME VALUE ...]": "change settings, such as /set threshold 0.8 cache prefix; alone, show them",
    "/stats": "tokens, forwards and speed of the last answer and of the session",
    "/reset": "forget what has been said",
    "/help": "this list",
    "/quit": "leave; so does the end of the input (Ctrl-D), and Ctrl-C twice",
}
_NOTES = (
    "Ctrl-C stops an answer and keeps what was said so far. A line that ends in a backslash goes on in the next one; "
    "// begins a line that is no command."
)
_FORGETS = "This model has no chat template: each line is a problem of its own, and nothing of the lines before it is seen."
_STATS: dict[str, Callable[[Usage], str]] = {
    "answers": lambda u: f"{u.turns}",
    "prompt tokens": lambda u: f"{u.prompt_tokens:,}",
    "tokens": lambda u: f"{u.tokens:,}",
    "forwards": lambda u: f"{u.forwards:,}",
    "of them refreshes": lambda u: f"{u.refreshes:,}",
    "tokens per forward": lambda u: f"{u.tokens_per_forward:.2f}",
    "seconds": lambda u: f"{u.seconds:.2f}",
    "tokens/s": lambda u: f"{u.tokens_per_second:.1f}",
}


def chat(
    model: cli.ModelOption = "tiny",
    system: Annotated[str | None, typer.Option(help="A message to the model before all others.")] = None,
    gen_length: cli.GenLengthOption = None,
    block_length: cli.BlockLengthOption = None,
    cache: cli.CacheOption = cli.CacheChoice.dual,
    threshold: cli.ThresholdOption = None,
    factor: cli.FactorOption = None,
    steps: cli.StepsOption = None,
    entropy_budget: cli.EntropyBudgetOption = None,
    score: cli.ScoreOption = None,
    temperature: cli.TemperatureOption = 0.0,
    seed: cli.SeedOption = 0,
    refresh_every: cli.RefreshEveryOption = None,
    prompt_refresh: cli.PromptRefreshOption = None,
    suffix_window: cli.SuffixWindowOption = None,
    look_back: cli.LookBackOption = 0,
    look_ahead: cli.LookAheadOption = 0,
    pause: Annotated[float, typer.Option(min=0, help="Seconds to wait after each forward, to watch a fast model.")] = 0.0,
    device: cli.DeviceOption = None,
    dtype: cli.DtypeOption = None,
    backend: cli.BackendOption = cli.BackendChoice.auto,
) -> None:
    """Talk with a model and watch each block of its answers denoise. /help lists what else can be typed.

    Where the input is no terminal, its lines are read in turn and only answers are printed; the status is 2 if a line failed.
    """
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "cache": cache.value,
        "threshold": threshold,
        "factor": factor,
        "steps": steps,
        "entropy_budget": entropy_budget,
        "score": score,
        "temperature": temperature,
        "seed": seed,
        "refresh_every": refresh_every,
        "prompt_refresh": prompt_refresh,
        "suffix_window": suffix_window,
        "look_back": look_back,
        "look_ahead": look_ahead,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with clear_errors():
        strategy_of(given)  # refused before the model is loaded
        lm = load(model, device=device, dtype=dtype, backend=backend.value)
        config = changed(lm.defaults, given)
        conversation = Conversation(lm, config, system)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Where there is one, lines can be edited and recalled.
            importlib.import_module("readline")
        console.print(Text(f"{lm!r}", style="dim"))
        console.print(Text("/help lists the commands", style="dim"))
    if not conversation.remembers:
        (console if interactive else errors).print(Text(_FORGETS, style="dim"))
    try:
        sound = Terminal(conversation, interactive, pause).run()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not sound:
        raise typer.Exit(2)


class Terminal:
    """Reads lines, does what they ask, and shows what comes of it.

    Args:
        conversation: with whom.
        interactive: whether somebody types the lines.
        pause: seconds to wait after each forward.
    """

    def __init__(self, conversation: Conversation, interactive: bool, pause: float = 0.0) -> None:
        self.conversation, self.interactive, self.pause = conversation, interactive, pause
        self.interrupted = False  # since the last line

    def run(self) -> bool:
        """Goes on to ``/quit`` or the end of the input.

        Returns:
            Whether no line failed; always true where somebody types and sees the error.
        """
        sound = True
        while (line := self.read()) is not None and line.strip() != "/quit":
            try:
                self.obey(line.strip())
            except (ValueError, RuntimeError, MemoryError, ArithmeticError) as error:
                tell(error)
                sound = self.interactive
        return sound

    def read(self) -> str | None:
        """The next line, with those that continue it; None at the end."""
        lines: list[str] = []
        try:
            while not lines or lines[-1].endswith("\\"):
                lines.append(input(("... " if lines else "> ") if self.interactive else ""))
                self.interrupted = False
        except EOFError:
            if not lines:
                self.leave()
                return None
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.leave()
            if self.interrupted:
                return None
            # It may have come a moment too late for the answer it was meant for.
            self.interrupted = True
            console.print(Text("Ctrl-C again leaves", style="dim"))
            return ""
        return "\n".join(line.removesuffix("\\") for line in lines)

    def leave(self) -> None:
        """Ends the line that the prompt stands in."""
        if self.interactive:
            console.print()

    def obey(self, line: str) -> None:
        """A command, or a question."""
        if not line:
            return
        name, *words = line.split()
        if not line.startswith("/") or line.startswith("//"):
            self.answer(line.removeprefix("/") if line.startswith("//") else line)
        elif name == "/set":
            self.set(words)
        elif name in ("/stats", "/reset", "/help") and not words:
            {"/stats": self.stats, "/reset": self.reset, "/help": self.help}[name]()
        else:
            raise ValueError(f"{line!r} is no command; /help lists them, and // begins a line that is none")

    def answer(self, question: str) -> None:
        """Decodes an answer, visibly on a terminal. Ctrl-C stops it."""
        answer = None
        try:
            answer = self.conversation.ask(question)
            with AnswerView(
                self.conversation.model, answer.config.gen_length, answer.config.block_length, console, transient=True
            ) as view:
                for forward in answer:
                    if console.is_terminal:
                        view(forward)
                    time.sleep(self.pause)
        except KeyboardInterrupt:
            self.interrupted = True
            said = "" if answer is None else self.conversation.keep(answer)
            if said:
                console.print(Text(said), soft_wrap=True)
            errors.print(
                Text("stopped; what was said so far is kept" if said else "stopped before anything was said", style="dim")
            )
            if not self.interactive:
                raise
        else:
            console.print(Text(self.conversation.keep(answer)), soft_wrap=True)

    def set(self, words: list[str]) -> None:
        """Changes settings, or shows them."""
        if words:
            self.conversation.set(*words)
        if self.interactive or not words:
            table = Table(show_header=False, box=None)
            for name, value in current(self.conversation.config).items():
                if not words or name in words[::2]:
                    table.add_row(name, ("off", "on")[value] if isinstance(value, bool) else str(value).lower())
            console.print(table)

    def reset(self) -> None:
        """Forgets what has been said."""
        self.conversation.reset()
        if self.interactive:
            console.print(Text("a new conversation", style="dim"))

    def help(self) -> None:
        """The commands."""
        table = Table(show_header=False, box=None)
        for name, what in _COMMANDS.items():
            table.add_row(Text(name), Text(what))
        console.print(table)
        console.print(Text(_NOTES, style="dim"))

    def stats(self) -> None:
        """What the last answer and all of them took."""
        last, total = self.conversation.last, self.conversation.total
        table = Table("", box=None)
        for name in ("last answer", "session"):
            table.add_column(name, justify="right")
        for name, show in _STATS.items():
            table.add_row(name, show(last), show(total))
        console.print(table)
