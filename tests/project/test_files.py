"""Files and folders of results: tried before any work, written whole or not at all, one run at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdllm_triton.utils import files
from fastdllm_triton.utils.files import check_folder, check_writable, locked, write_atomically, write_json

#: The module alone, so that a process starts at once.
IMPORT = f"import importlib.util as u, sys; s = u.spec_from_file_location('files', {files.__file__!r})\n"
IMPORT += "files = u.module_from_spec(s); s.loader.exec_module(files); from pathlib import Path\n"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("old")
    check_writable("--json", tmp_path / "new.json")
    check_writable("--json", tmp_path / "there.json")
    check_writable("--json", None)
    check_folder("--out", tmp_path)
    check_folder("--out", tmp_path / "a" / "b")
    assert _names(tmp_path) == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        (".", IsADirectoryError, "it is a folder"),
        ("missing/x.json", FileNotFoundError, "there is no folder"),
        ("file/x.json", NotADirectoryError, "Not a directory"),
        ("x" * 300, OSError, "File name too long"),
        ("a\0b", OSError, "embedded null byte"),
        ("fifo", OSError, "it is no regular file"),
        # Root may do anything there, and yet no file can be made.
        pytest.param("/proc/x.json", OSError, "", marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")),
    ],
)
def test_what_cannot_be_a_file_is_told_by_the_option_s_name(tmp_path: Path, name: str, error: type[OSError], reason: str) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(error) as caught:
        check_writable("--trace", tmp_path / name)
    assert str(caught.value).startswith(f"--trace: {tmp_path / name} cannot be written: {reason}")
    assert _names(tmp_path) == ["fifo", "file"]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "a\0b"])
def test_what_cannot_be_a_folder_is_told_by_the_option_s_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out: ") as caught:
        check_folder("--out", tmp_path / name)
    assert str(caught.value).startswith(f"--out: {tmp_path / name} cannot be written: ")
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    for check in (check_writable, check_folder):
        with pytest.raises(OSError, match=f"cannot be written: {os.strerror(code)}$") as caught:
            check("--out", tmp_path / "x")
        assert caught.value.errno == code


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_and_an_interrupt_leave_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, call: str
) -> None:
    def fail(*_: object) -> None:
        raise fault

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(fault)):
        write_json(tmp_path / "x.json", [1])
    assert _names(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_an_error_names_the_file_and_not_the_one_beside_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "missing" / "x", "text")
    assert caught.value.filename == str(tmp_path / "missing" / "x")


def test_links_that_somebody_put_there_are_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("x.html", "x.html.part", ".lock"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "x.html", "page")
    assert (tmp_path / "x.html").read_text() == "page"
    assert not (tmp_path / "x.html").is_symlink()
    with pytest.raises(OSError, match=r"--out: .* cannot be written: "), locked(tmp_path, "--out"):
        pass
    assert victim.read_text() == "mine"


def test_names_beside_a_file_cannot_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.extend(_names(tmp_path)))
    for _ in range(20):
        write_atomically(tmp_path / "x", "text")
    parts = {name for name in seen if name != "x"}
    assert len(parts) == 20


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", b"\xff")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "x").read_bytes() == b"\xff"


def test_a_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with (
        locked(folder, "--out"),
        pytest.raises(BlockingIOError, match=f"^--out: another run is writing to {folder}$"),
        locked(folder, "--out"),
    ):
        pass
    with locked(folder, "--out"):
        pass


def test_a_run_that_dies_leaves_no_lock(tmp_path: Path) -> None:
    hold = IMPORT + "with files.locked(Path(sys.argv[1]), '--out'): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path, "--out"):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with locked(tmp_path, "--out"):
            pass


@pytest.mark.parametrize("missing", ["module", "support"])
def test_where_there_are_no_locks_a_folder_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path, "--out"), locked(tmp_path, "--out"):
        (tmp_path / "x").write_text("")


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write = IMPORT + "import itertools\nprint(flush=True)\nfor c in itertools.cycle('ab'):\n"
    write += "    files.write_atomically(Path(sys.argv[1]), c * 3_000_000)"
    for wait in (0.02, 0.05, 0.08, 0.11):
        with subprocess.Popen([sys.executable, "-c", write, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            while not path.exists():
                time.sleep(0.005)
            time.sleep(wait)
            child.kill()
        text = path.read_text()
        assert len(text) == 3_000_000 and len(set(text)) == 1
