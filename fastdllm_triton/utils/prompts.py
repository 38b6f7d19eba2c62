"""Files of prompts: text with a prompt a line, or JSONL with an object a line. Every error names the file and the line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_bytes(option: str, path: Path) -> bytes:
    """A whole file; ``-`` is standard input.

    Args:
        option: what asks for it, for the message.
        path: the file.

    Raises:
        OSError: it cannot be read; says which option named it.
    """
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{option} {path}: {error.strerror or error}") from None


def read_lines(source: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with where it stands.

    Only a line feed ends a line, with the carriage return before it: what Unicode calls a line separator may be part of a prompt,
    and JSON writes it as it is. A byte order mark is dropped.

    Args:
        source: where the content comes from, such as ``--data x.jsonl``.
        content: UTF-8 text.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}: line {number}: not UTF-8 text: byte 0x{content[error.start]:02x}, {error.reason}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{source}: line {number}", line.removesuffix("\r")


def read_objects(source: str, content: bytes, *, messages: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with a ``prompt``, and with where it stands.

    Args:
        source, content: as of :func:`read_lines`.
        messages: whether a prompt may be the messages of a conversation, a ``role`` and a ``content`` each, instead of text.

    Raises:
        ValueError: a line is something else, or has no such prompt.
    """
    for where, line in read_lines(source, content):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: must be an object with a 'prompt', got {type(record).__name__}")
        if "prompt" not in record:
            raise ValueError(f"{where}: has no 'prompt'; it has {', '.join(map(repr, record)) or 'nothing'}")
        prompt = record["prompt"]
        is_text = isinstance(prompt, str) and prompt != ""
        if not is_text and not (messages and _is_conversation(prompt)):
            also = ", or a list of messages with a role and a content" if messages else ""
            hint = "; messages of a conversation need generate --chat" if _is_conversation(prompt) else ""
            raise ValueError(f"{where}: 'prompt' must be text and not empty{also}, got {_short(prompt)}{hint}")
        yield where, record


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and prompt != []
        and all(isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in prompt)
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
