"""Files and folders that results go to: known to be writable before any work, and written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def naming(option: str, path: Path) -> Iterator[None]:
    """Names an option and its value in what goes wrong with its file or folder.

    Args:
        option: as the user typed it, such as ``--trace`` or ``trace``.
        path: its value.

    Raises:
        OSError: ``OPTION: PATH cannot be written: REASON``, of the class and number of the error.
    """
    try:
        yield
    except OSError as error:
        renamed_error = type(error)(f"{option}: {path} cannot be written: {error.strerror or error}")
        renamed_error.errno = error.errno
        raise renamed_error from None


def check_writable(option: str, path: Path | None) -> None:
    """Raises before any work if a file could not be written after it; leaves nothing.

    Permissions do not tell: root has them all, and a file system may be read-only, full, or not one to keep files on. So a
    file is made beside it and removed.

    Args:
        option: as the user typed it.
        path: its value; None is fine.

    Raises:
        OSError: as :func:`naming`; also for a folder and for a device, neither of which is replaced by a file.
    """
    if path is None:
        return
    with naming(option, path):
        mode = _mode(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError("it is a folder")
        if mode is not None and not stat.S_ISREG(mode):
            raise OSError("it is no regular file")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        _try_writing(path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Raises before any work if a folder could not be made, or no file in it; makes nothing.

    Raises:
        OSError: as :func:`naming`.
    """
    with naming(option, folder):
        _mode(folder)
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        _try_writing(there)


@contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if it is not there. A run that dies leaves no lock behind.

    Without effect on Windows, and on file systems without locks.

    Raises:
        BlockingIOError: another run has it.
        OSError: as :func:`naming`.
    """
    with naming(option, folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Through no link, which somebody else might have put there.
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{option}: another run is writing to {folder}") from None
            except OSError:
                pass
        yield
    finally:
        os.close(lock)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file by way of another one beside it; text as UTF-8. A link is replaced, not followed.

    Raises:
        OSError: it cannot be written. Then, and after an interrupt, what was there before is still there, and nothing else.
    """
    try:
        with _new_file(path.parent) as part:
            with part.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        if error.filename is not None:  # of the other file, whose name says nothing to anybody
            error.filename, error.filename2 = str(path), None
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


@contextmanager
def _new_file(folder: Path) -> Iterator[Path]:
    """A name in a folder that nobody can foresee. What has it in the end is removed."""
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """Of what is there, if anything is. Raises ``OSError`` where nothing can be."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except ValueError as error:  # a NUL
        raise OSError(str(error)) from None


def _try_writing(folder: Path) -> None:
    with _new_file(folder) as part, part.open("xb", buffering=0) as file:
        file.write(bytes(4096))  # what a full disk has no room for
