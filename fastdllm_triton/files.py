"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file by way of another one beside it.

    Raises:
        OSError: it cannot be written; what was there before is still there, and nothing else.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as people read it.

    Raises:
        OSError: as :func:`write_atomically`.
        TypeError: it is not JSON; nothing is written.
    """
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Writes a JSON list, a record a line, so that a change of one is a change of its line.

    Raises:
        OSError, TypeError: as :func:`write_json`.
    """
    write_atomically(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
