"""Finished requests on disk, so that a run can be interrupted and nothing of it is computed twice or lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import check_folder, locked, naming


class Finished:
    """Results by key, in memory and, if there is a folder, in a JSONL file that is appended to.

    Args:
        folder: made if it is not there, and this object's alone as long as it lives; None keeps nothing.
        identity: what every key depends on.

    Raises:
        ValueError: the file holds something else.
        OSError: the folder cannot be written, or another run is writing to it.
    """

    def __init__(self, folder: Path | None, identity: Sequence[Any]) -> None:
        self.identity, self.entries = list(identity), dict[str, dict[str, Any]]()
        self.path = None if folder is None else folder / "finished.jsonl"
        if folder is None or self.path is None:
            return
        check_folder("save_dir", folder)
        self._lock = locked(folder, "save_dir")
        self._lock.__enter__()
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # A write that was cut off.
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line.encode()) for line in lines[:-1]))
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self.entries[entry.pop("key")] = entry
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
                raise ValueError(f"save_dir: {self.path}, line {number}, is not a finished request") from None

    def key(self, *parts: Any) -> str:
        """A hash of what a result depends on."""
        text = json.dumps([self.identity, *parts])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.entries[key]

    def add(self, entries: dict[str, dict[str, Any]]) -> None:
        """Keeps results: on disk before they count as finished."""
        if self.path is not None:
            with naming("save_dir", self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"key": key, **entry}) + "\n" for key, entry in entries.items()))
        self.entries |= entries
