"""What several commands do."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from .console import console, errors, say, status, warn

if TYPE_CHECKING:
    from ..model import MaskedDiffusionLM


def announce_lookup(model: str) -> bool:
    """Says that a model is looked for on the hub, if it is: the first time takes long, and so does a hub out of reach."""
    from ..loading import is_hub_id

    if os.path.exists(Path(model).expanduser()) or not is_hub_id(model):
        return False
    from huggingface_hub.utils import logging

    # A line for each of its attempts would say no more than the error at their end.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    say(errors, f"looking on the hub for {model}", style="dim")
    return True


def load_model(model: str, *, device: str | None, dtype: str | None, backend: str, threads: int | None) -> MaskedDiffusionLM:
    """As :func:`fastdllm_triton.load`, with a word on what takes its time."""
    from ..loading import load

    # The hub's client draws bars of its own.
    with nullcontext() if announce_lookup(model) else status(f"loading {model}"):
        return load(model, device=device, dtype=dtype, backend=backend, threads=threads)


def as_words(context: typer.Context) -> list[str]:
    """The command line of a command again, every option of it, for another process."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        for entry in value if isinstance(value, list | tuple) else (value,):
            if entry is None:
                continue
            if parameter.param_type_name == "argument":
                words.append(str(entry))
            elif not isinstance(entry, bool):
                words += [parameter.opts[0], str(entry)]
            elif entry or parameter.secondary_opts:
                words.append((parameter.opts if entry else parameter.secondary_opts)[0])
    return words


def require_triton(command: str) -> None:
    """Raises where there are no kernels to run."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{command} needs triton, which is not installed")


def progress(*columns: str | ProgressColumn, **options: Any) -> Progress:
    """A bar on standard error, where that is a terminal; elsewhere nothing stands beside the error that may come."""
    return Progress(*columns, console=errors, disable=not errors.is_terminal, speed_estimate_period=300, **options)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function ``(done, total)`` that shows on standard error how much is done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("time left"), TimeRemainingColumn(compact=True))
    with progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_matplotlib() -> bool:
    """Whether figures can be drawn; says how, if they cannot."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        say(errors, "no figures: they need matplotlib (pip install 'fastdllm-triton[bench]')")
    return there


def say_written(paths: Iterable[Path]) -> None:
    """Names files."""
    for path in paths:
        say(console, f"wrote {path}")


def read_earlier(path: Path | None) -> list[dict[str, Any]] | None:
    """The records of ``--compare``.

    Raises:
        ValueError: the file is no report.
        OSError: it cannot be read.
    """
    if path is None:
        return None
    from ..tools.compile_report import read_json

    try:
        records = read_json(path)
    except OSError as error:
        raise OSError(f"--compare {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"--compare {path}: not a report: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"--compare {path}: not a report: it must hold a list of objects")
    return records


def warn_of_repeats(option: str, values: str) -> None:
    """Says that what stands twice in a list counts once."""
    seen: set[str] = set()
    for value in map(str.strip, values.split(",")):
        if value in seen:
            warn(f"{option}: {value} is given twice and counts once")
        seen.add(value)


def with_interval(value: float | None, ci: Sequence[float], digits: int) -> Text:
    """A number and its confidence interval, for a table."""
    if value is None:
        return Text()
    return Text.assemble(f"{value:.{digits}f} ", (f"{ci[0]:.{digits}f}-{ci[1]:.{digits}f}", "dim"))
