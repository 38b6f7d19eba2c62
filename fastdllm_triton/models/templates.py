"""Chat templates of checkpoints, rendered within limits of time and memory.

Jinja's sandbox keeps a template from the machine, but not from its time and memory: ``'%1000000000d' | format(1)`` is one call
of C that nothing in the same process can end. Templates are therefore rendered in a process of their own
(:mod:`fastdllm_triton.models._template_worker`), which is started at the first chat, kept for the next ones, and given up when it
takes too long.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: What a template may take; those of released models take milliseconds.
SECONDS, MEMORY, CHARACTERS = 10.0, 512 << 20, 4_000_000

#: Marks where a message that is to be continued ends.
_END = "[END-OF-THE-LAST-MESSAGE]"

_WORKER = Path(__file__).with_name("_template_worker.py")
_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes.

    Args:
        template: its source, as transformers takes it.
        variables: what it can read, of the types of JSON.

    Raises:
        ValueError: the template raises, takes more than :data:`SECONDS` or :data:`MEMORY`, or makes more than
            :data:`CHARACTERS`. What the template itself says with ``raise_exception`` is the message.
    """
    request = json.dumps({"template": template, "variables": variables}).encode("ascii")
    with _lock:
        reply = _ask(request)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


def render_chat(
    template: object, special_tokens: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], next_turn: bool = True
) -> str:
    """A conversation as text, as ``apply_chat_template(messages, tokenize=False)`` of transformers renders it.

    Args:
        template: the source.
        special_tokens: such as ``bos_token``, which templates can write.
        messages: oldest first, a ``role`` and a ``content`` each.
        next_turn: whether the model's turn is next (``add_generation_prompt``); otherwise it goes on with the last message
            (``continue_final_message``).

    Raises:
        ValueError: as :func:`render_template`; or the template is no text, or there are no messages.
    """
    if not isinstance(template, str):
        raise ValueError(f"it must be text, got {type(template).__name__}")
    if not messages:
        raise ValueError("there must be at least one message")
    if not next_turn:
        *earlier, last = messages
        messages = [*earlier, {**last, "content": f"{last['content']}{_END} "}]
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": next_turn}
    text = render_template(template, {**variables, **special_tokens})
    if next_turn:
        return text
    begun, end, rest = text.rpartition(_END)
    if not end:
        raise ValueError("it leaves out the message that is to be continued")
    return begun if rest.startswith(" ") else begun.rstrip()  # A template that trims the message would have trimmed its end.


def _ask(request: bytes) -> dict[str, str]:
    global _process
    process = _process if _process is not None and _process.poll() is None else _start()
    _process = process
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    except BaseException:  # An interrupt: the answer to this request must not be taken for that to the next one.
        _stop()
        raise
    if line:
        reply: dict[str, str] = json.loads(line)
        return reply
    status = process.wait()
    _stop()
    if status == -getattr(signal, "SIGALRM", 0):
        return {"error": f"it takes more than {SECONDS:g} seconds"}
    return {"error": f"the process that renders it ended with status {status}"}


def _start() -> subprocess.Popen[bytes]:
    """A fresh process that finds the modules this one does; without ``site`` it starts in half the time."""
    paths = [path for path in sys.path if path]
    code = f"import runpy, sys; sys.path[:] = {paths!r}; runpy.run_path({str(_WORKER)!r}, run_name='__main__')"
    arguments = [sys.executable, "-I", "-S", "-c", code, str(SECONDS), str(MEMORY), str(CHARACTERS)]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is for this process alone.
    )


@atexit.register
def _stop() -> None:
    global _process
    process, _process = _process, None
    if process is not None:
        process.kill()
        process.communicate()


def _after_fork() -> None:
    """The parent's process answers the parent; and a thread that holds the lock there is not in the child."""
    global _lock, _process
    _lock, _process = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
