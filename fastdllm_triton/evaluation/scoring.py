"""Requests and how their answers are scored: the built-in task, or a JSONL file of prompts and answers."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..tiny.problems import problems, score
from ..utils.prompts import read_bytes, read_objects

#: Scores of one answer, each in [0, 1], by name; ``exact_match`` among them.
Scores = dict[str, float]


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: its text.
        answer: what is right.
        source: where it comes from, for messages.
        record: what a scorer is given besides the text: the line of the data file, or the problem.
    """

    prompt: str
    answer: str
    source: str
    record: Any


@dataclass(frozen=True)
class Scorer:
    """Scores answers.

    Attributes:
        name: as given on the command line.
        function: ``(request, text) -> scores``.
    """

    name: str
    function: Callable[[Request, str], Scores]

    def __call__(self, request: Request, text: str) -> Scores:
        """Scores one answer.

        Raises:
            RuntimeError: the function raised, or returned what is no score; says which request it was.
        """
        try:
            return self.function(request, text)
        except Exception as error:
            raise RuntimeError(
                f"scorer {self.name} failed on {request.source}, answer {text[:80]!r}: {type(error).__name__}: {error}"
            ) from error


#: More than anybody waits for.
MAX_PROBLEMS = 10_000_000


def builtin_requests(count: int, seed: int) -> list[Request]:
    """``count`` test problems of the built-in task: a stream that is a function of the seed, none of it trained on."""
    if not 1 <= count <= MAX_PROBLEMS:
        raise ValueError(f"--problems must be in [1, {MAX_PROBLEMS:,}], got {count}")
    chosen = islice(problems(seed, test=True), count)
    return [Request(p.prompt, str(p.total), f"problem {i} of seed {seed}", p) for i, p in enumerate(chosen)]


def read_requests(path: Path, limit: int | None = None) -> list[Request]:
    """Requests from a JSONL file: an object a line with a ``prompt`` and an ``answer``, both text. Empty lines are passed over.

    Args:
        path: the file.
        limit: read this many at most; all if None or negative.

    Raises:
        ValueError: a line is not that, with its number; or there is none.
        OSError: the file cannot be read.
    """
    requests: list[Request] = []
    source = f"--data {path}"
    for where, record in islice(read_objects(source, read_bytes("--data", path)), None if limit is None or limit < 0 else limit):
        if "answer" not in record:
            raise ValueError(f"{where}: has no 'answer'; it has {', '.join(map(repr, record))}")
        if isinstance(record["answer"], (dict, list, type(None))):
            raise ValueError(f"{where}: 'answer' must be text or a number, got {record['answer']!r}")
        requests.append(Request(record["prompt"], str(record["answer"]), where.removeprefix("--data "), record))
    if not requests:
        raise ValueError(f"{source} holds no request")
    return requests


def find_scorer(name: str) -> Scorer:
    r"""The scorer of that name.

    Args:
        name: ``number`` compares the number after the last ``####`` (the last number if there is none); ``text`` the whole
            text, less white space around it; ``regex:PATTERN`` what the pattern finds last in the text (its first group if it
            has one) with the answer; ``module:function`` calls ``function(text, record)`` with the line of the data file,
            which returns a bool, a number in [0, 1], or a dict of them with ``exact_match`` among its keys.

    Raises:
        ValueError: there is no such scorer, the pattern is not valid, or the function cannot be found.
    """
    if name == "number":
        return Scorer(name, lambda request, text: _exact(final_number(text), final_number(request.answer)))
    if name == "text":
        return Scorer(name, lambda request, text: _exact(text.strip(), request.answer.strip()))
    if name == "regex:":
        raise ValueError("--scorer: regex: needs a pattern after it")
    if name.startswith("regex:"):
        try:
            pattern = re.compile(name.removeprefix("regex:"))
        except re.error as error:
            raise ValueError(f"--scorer: {name!r} is no regular expression: {error}") from None
        return Scorer(name, lambda request, text: _exact(_last(pattern, text), request.answer.strip()))
    if not all(name.partition(":")):
        raise ValueError(f"--scorer must be number, text, regex:PATTERN or module:function, got {name!r}")
    return Scorer(name, _call(_import(name)))


def builtin_scorer() -> Scorer:
    """Exact match of the number and the whole text, as :func:`fastdllm_triton.tiny.problems.score` has them."""

    def function(request: Request, text: str) -> Scores:
        exact, whole = score(request.record, text)
        return {"exact_match": float(exact), "whole": float(whole)}

    return Scorer("builtin", function)


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The number after the last ``####``, or without that mark the last number; commas and a trailing ``.0`` dropped."""
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail if mark else text)
    if not numbers:
        return None
    number = (numbers[0] if mark else numbers[-1]).replace(",", "")
    return re.sub(r"\.0+$", "", number)


def digest(requests: Sequence[Request]) -> str:
    """A hash of prompts and answers, in order."""
    text = json.dumps([(request.prompt, request.answer) for request in requests])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _exact(said: str | None, answer: str | None) -> Scores:
    return {"exact_match": float(said is not None and said == answer)}


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    part: str | None = matches[-1].group(1 if pattern.groups else 0)
    return None if part is None else part.strip()


def _import(name: str) -> Callable[[str, Any], Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As with `python -m`.
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # Whatever a module does when it is imported.
        raise ValueError(f"--scorer: {name!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"--scorer: {name!r} is not a function")
    return function  # type: ignore[no-any-return]


def _call(function: Callable[[str, Any], Any]) -> Callable[[Request, str], Scores]:
    def scores(request: Request, text: str) -> Scores:
        result = function(text, request.record)
        named = result if isinstance(result, dict) else {"exact_match": result}
        if "exact_match" not in named:
            raise TypeError(f"it must return a score named 'exact_match' among others, got {result!r}")
        for value in named.values():
            if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
                raise TypeError(f"it must return a bool, a number in [0, 1] or a dict of them, got {result!r}")
        return {key: float(value) for key, value in named.items()}

    return scores
