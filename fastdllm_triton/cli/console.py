"""The terminal: nothing that is printed here can steer it, and nothing is taken for markup.

Prompts, generated text, names in a checkpoint, paths and messages of exceptions come from outside. A terminal obeys the control
characters in them, and rich reads ``[red]`` as a style; so all that the command line prints goes through these two consoles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

#: Errors that a user can fix take one line; anything else is a bug and keeps its trace.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError)


#: Control characters but tab and line feed; what reorders or hides the text around it (Trojan Source, arXiv 2111.00169).
#: Joiners and direction marks are not among them: Persian, Indic and Hebrew text and family emoji are written with them.
_HARMFUL = (
    *(code for code in range(0x20) if chr(code) not in "\t\n"),
    *range(0x7F, 0xA0),
    *(0x180E, 0x200B, 0xFEFF),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_ESCAPES = {code: _escape(code) for code in _HARMFUL}


def visible(text: str) -> str:
    r"""Text with its control characters, direction overrides and invisible characters spelled out: ESC becomes ``\x1b``."""
    return text.translate(_ESCAPES)


class Terminal(Console):
    """A console for plain text: no markup, no emoji codes, no coloured numbers, and no control character but rich's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As of ``Console``, made :func:`visible`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


console = Terminal()
errors = Terminal(stderr=True)


def say(target: Console, *parts: str | tuple[str, str], style: str = "") -> None:
    """Prints a line, however long: the terminal breaks it.

    Args:
        target: :data:`console` or :data:`errors`.
        parts: plain text, or plain text with a style.
        style: of all of it.
    """
    shown = ((visible(part), "") if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts)
    target.print(Text.assemble(*shown, style=style), soft_wrap=True)


def say_list(target: Console, parts: Sequence[str], style: str = "") -> None:
    """Prints what belongs together, with commas; on a terminal no part is broken between two lines."""
    lines = [parts[0]]
    for part in parts[1:]:
        if target.is_terminal and len(lines[-1]) + len(part) + 3 > target.width:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] += f", {part}"
    say(target, "\n".join(lines), style=style)


def tell(error: BaseException | str) -> None:
    """An error in one line, however long."""
    say(errors, f"error: {' '.join(str(error).split()) or type(error).__name__}", style="red")


def warn(message: str) -> None:
    """A warning in one line."""
    say(errors, f"warning: {message}", style="yellow")


def status(what: str) -> Status:
    """A context manager: a line on standard error that moves while something takes long. ``update`` takes a ``Text``."""
    return errors.status(Text(visible(what)), spinner="dots" if can_show("⠋", errors.encoding) else "line")


def show(table: Table, target: Console = console) -> None:
    """Prints a table: as wide as it is where no terminal limits it, and row under row where a terminal is too narrow.

    One without a frame holds prose, which may be broken into lines.
    """
    needs = Measurement.get(target, target.options.update(max_width=10_000), table).maximum
    if not target.is_terminal:
        target = Terminal(file=target.file, width=max(target.width, needs))
    target.print(table if table.box is None or needs <= target.width else Text("\n").join(_stacked(table)))


def _stacked(table: Table) -> Iterator[Text]:
    """The lines of a table without its frame: the first cell of a row, under it the others with the names of their columns."""
    if table.title:
        yield _text(table.title).copy()
    names = [_text(column.header).plain for column in table.columns]
    width = max(map(len, names), default=0)
    for first, *rest in zip(*(column.cells for column in table.columns), strict=True):
        yield _text(first)
        for name, cell in zip(names[1:], rest, strict=True):
            if (value := _text(cell)).plain:
                yield Text(f"  {name:<{width}}  " if width else "  ").append_text(value)
    if table.caption:
        yield _text(table.caption)


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(visible(str(cell)))


def can_show(text: str, encoding: str) -> bool:
    """Whether a stream of this encoding has all the characters of a text."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def keep_printing() -> None:
    """Prints a question mark for what the locale cannot show; standard error does something of the kind by itself."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def wants_traceback() -> bool:
    """Whether ``FASTDLLM_DEBUG`` asks for the trace of every error."""
    return os.environ.get("FASTDLLM_DEBUG", "") not in ("", "0")
