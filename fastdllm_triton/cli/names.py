"""Names of options: those they used to have, which still work, and those that messages of the API know them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..decoding.strategies import STRATEGIES
from .bench import SuiteChoice

#: Command, old name, name. A name that has become a flag is an old one where a value follows it.
RENAMED = (
    ("generate", "--forbid", "--forbidden"),
    ("demo", "--count", "--problems"),
    ("demo", "--seed", "--problem-seed"),
    ("evaluate", "--seed", "--problem-seed"),
    ("evaluate", "--json", "--json-copy"),
    ("inspect", "--seed", "--problem-seed"),
    ("inspect", "--json", "--json-copy"),
    ("info", "--batch", "--batch-size"),
    ("verify", "--json", "--out"),
    ("bench", "--json", "--out"),
    ("roofline", "--prompt", "--prompt-length"),
    ("roofline", "--gen", "--gen-length"),
    ("roofline", "--tpf", "--tokens-per-forward"),
    ("roofline", "--batch", "--batch-size"),
    ("roofline", "--refresh-every-blocks", "--prompt-refresh"),
    ("compile-report", "--json", "--out"),
    ("performance-report", "--json", "--out"),
)

#: What the API calls an argument, and how the command line's parameter is called where that differs.
_PARAMETERS = {
    "path_or_hub_id": "model",
    "strategy": "strategies",
    "cache": "caches",
    "block_lengths": "block_length",
    "archs": "arch",
    "ops": "op",
}
#: Options that may be given as nothing: no system message is not the same as an empty one.
_MAY_BE_EMPTY = {"--system"}
#: Words that a command takes by themselves, so that none of them is the value of a flag before it.
_POSITIONAL = {"bench": tuple(SuiteChoice)}
#: Options whose value may be given twice.
_MAY_REPEAT = {"--prompt"}


def renamed(command: Any, words: Sequence[str], warn: Callable[[str], None]) -> list[str]:
    """The words after a command's name, with old names replaced by those of today.

    Args:
        command: as typer made it.
        words: what was typed.
        warn: called with a message for each old name, and for a value that is given twice.

    Raises:
        ValueError: an option is given as nothing.
    """
    old = {before: now for name, before, now in RENAMED if name == command.name}
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("--")}
    positional = _POSITIONAL.get(command.name, ())
    result: list[str] = []
    seen: set[tuple[str, str]] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        name, equals, value = word.partition("=")
        has_value = bool(equals) or (bool(rest) and not rest[0].startswith("--") and rest[0] not in positional)
        if name in old and (name not in options or has_value):
            warn(f"{command.name} {name} is called {old[name]} now")
            name = old[name]
        if name in options and not options[name].is_flag and (equals or rest):
            value = value if equals else rest.pop(0)
            if not value.strip() and name not in _MAY_BE_EMPTY:
                raise ValueError(f"{name} must not be empty")
            if options[name].multiple and (name, value) in seen and name not in _MAY_REPEAT:
                warn(f"{name} {value} is given twice and counts once")
            seen.add((name, value))
            result += [f"{name}={value}"] if equals else [name, value]
        else:
            result.append(f"{name}{equals}{value}")
    return result


def option_names(command: Any) -> dict[str, str]:
    """What messages call the arguments of a command, to what a user types."""
    names = {p.name: p.opts[0] for p in command.params if p.param_type_name == "option"}
    parameters = {kind.parameter_name(): kind.option for kind in STRATEGIES.values()} | _PARAMETERS
    return {argument: names[parameter] for argument, parameter in parameters.items() if parameter in names} | names


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """A message of the API with the names of options: ``gamma must be 0 or more`` is ``--entropy-budget must be 0 or more``.

    A name stands at the beginning, or has an underscore, which no other word has; what is quoted stays as it is.
    """
    if not names:
        return message
    longest_first = sorted(names, key=len, reverse=True)
    known = f"(?:{'|'.join(longest_first)})"

    def typed(match: re.Match[str]) -> str:
        return names[match[0]]

    # As in `cache must be`, `device:` and `threshold and factor exclude each other`.
    verb = r"(?=:| must\b| means\b| leaves\b| needs?\b| does not go\b| exclude\b)"
    message = re.sub(rf"^{known}(?:(?:,| and) {known})*{verb}", lambda lead: re.sub(rf"\b{known}\b", typed, lead[0]), message)
    words = "|".join(name for name in longest_first if "_" in name)
    if words:
        message = re.sub(rf"(?<![\w'\"/.+-])(?:{words})(?![\w'\"/.])", typed, message)
    return message.replace(" must be None or ", " must be ")
