"""Renders chat templates in a process of its own, see :mod:`fastdllm_triton.models.templates`.

Started as a script with the limits as arguments: a request a line on stdin, an answer a line on stdout, both JSON in ASCII.
Imports jinja2 alone, which takes a tenth of a second; transformers would take seconds.
"""

from __future__ import annotations

import encodings.unicode_escape  # noqa: F401 - What jinja imports when it needs it is imported here: later no file can be opened.
import json
import pprint  # noqa: F401
import signal
import sys
import textwrap  # noqa: F401
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):  # type: ignore[misc]
    """``{% generation %} ... {% endgeneration %}`` marks what the model said, for training; here it is its text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """A call with the block as its caller, so that what the block sets stays inside, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

    def text(self, caller: Callable[[], str]) -> str:
        """The block's text."""
        return caller()


def raise_exception(message: str) -> None:
    """By which templates refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """The filter ``tojson``, without the escapes for HTML that jinja's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(layout: str) -> str:
    """The time, for templates that tell the model the date."""
    return datetime.now().strftime(layout)


@lru_cache(maxsize=8)
def compiled_template(template: str) -> Any:
    """A template in the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template)


def answer(request: dict[str, Any], most_characters: int) -> dict[str, str]:
    """``{"text": ...}`` or ``{"error": ...}``."""
    try:
        text = compiled_template(request["template"]).render(**request["variables"])
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # Templates can make Python raise anything.
        message = str(error)[:1000]
        is_own = type(error) is jinja2.TemplateError  # What the template itself says is message in its words.
        return {"error": message if is_own and message else f"{type(error).__name__}: {message}"}
    if len(text) > most_characters:
        return {"error": f"it makes {len(text)} characters, more than {most_characters}"}
    return {"text": text}


def limit(memory: int) -> None:
    """Bounds what this process can take, and leaves it no file to open, should a template get out of jinja's sandbox."""
    time.localtime()  # Reads the time zone.
    try:
        import resource
    except ImportError:  # Windows has neither limits nor the signal below.
        return
    for kind, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 3)):
        with suppress(OSError, ValueError):  # macOS does not limit memory in this way.
            resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def main(seconds: float, memory: int, most_characters: int) -> None:
    """Answers requests until there are no more."""
    limit(memory)
    alarm = getattr(signal, "setitimer", lambda *_: None)
    for line in sys.stdin.buffer:
        # The signal ends the process, also in the middle of a call of C, where no exception could be raised.
        alarm(getattr(signal, "ITIMER_REAL", 0), seconds)
        reply = json.dumps(answer(json.loads(line), most_characters)).encode("ascii")
        alarm(getattr(signal, "ITIMER_REAL", 0), 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
