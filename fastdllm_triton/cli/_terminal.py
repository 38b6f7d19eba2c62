"""The terminal of a conversation: reads lines, runs them, and shows the result."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.table import Table

from ..decoding.options import current
from .console import USER_ERRORS, console, errors, say, show, tell, wants_traceback
from .conversation import Conversation, Usage
from .live import AnswerView

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


class Terminal:
    """Reads lines, runs them, and shows the result.

    Args:
        conversation: whose questions and answers they are.
        interactive: whether a person types the lines.
        pause: seconds to wait after each forward.
    """

    def __init__(self, conversation: Conversation, interactive: bool, pause: float = 0.0) -> None:
        self.conversation, self.interactive, self.pause = conversation, interactive, pause
        self.interrupted = False  # since the last line

    def run(self) -> bool:
        """Goes on to ``/quit`` or the end of the input.

        Returns:
            Whether no line failed; always true where a person types and sees the error.
        """
        sound = True
        while (line := self.read()) is not None and line.strip() != "/quit":
            try:
                self.obey(line.strip())
            except USER_ERRORS as error:
                if wants_traceback() or isinstance(error, BrokenPipeError):
                    raise
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
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not {error.encoding.upper()} text: {error.reason}") from None
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
            say(console, "Ctrl-C again leaves", style="dim")
            return ""
        return "\n".join(line.removesuffix("\\") for line in lines)

    def leave(self) -> None:
        """Ends the line that the prompt stands in."""
        if self.interactive:
            console.print()

    def obey(self, line: str) -> None:
        """Runs a command, or asks a question."""
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
            with AnswerView(self.conversation.model, answer.config.gen_length, console, transient=True) as view:
                for forward in answer:
                    if console.is_terminal:
                        view(forward)
                    time.sleep(self.pause)
        except KeyboardInterrupt:
            self.interrupted = True
            said = "" if answer is None else self.conversation.keep(answer)
            if said:
                say(console, said)
            say(errors, "stopped; what was said so far is kept" if said else "stopped before anything was said", style="dim")
            if not self.interactive:
                raise
        else:
            say(console, self.conversation.keep(answer))

    def set(self, words: list[str]) -> None:
        """Changes settings, or shows them."""
        if words:
            self.conversation.set(*words)
        if self.interactive or not words:
            table = Table(show_header=False, box=None)
            for name, value in current(self.conversation.config).items():
                if not words or name in words[::2]:
                    table.add_row(name, ("off", "on")[value] if isinstance(value, bool) else str(value).lower())
            show(table)

    def reset(self) -> None:
        self.conversation.reset()
        if self.interactive:
            say(console, "a new conversation", style="dim")

    def help(self) -> None:
        table = Table(show_header=False, box=None)
        for name, what in _COMMANDS.items():
            table.add_row(name, what)
        show(table)
        say(console, _NOTES, style="dim")

    def stats(self) -> None:
        """What the last answer and all of them took."""
        last, total = self.conversation.last, self.conversation.total
        table = Table("", box=None)
        for name in ("last answer", "session"):
            table.add_column(name, justify="right")
        for name, figure in _STATS.items():
            table.add_row(name, figure(last), figure(total))
        show(table)
