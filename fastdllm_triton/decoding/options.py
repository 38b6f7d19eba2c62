"""Options of a generation by the names that people type: ``threshold 0.8``, ``strategy fixed:4``, ``suffix_window none``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from .cache_policy import cache_options
from .config import GenerationConfig
from .strategies import STRATEGIES, Strategy, StrategySpec, Threshold


def strategy_of(options: Mapping[str, Any], current: Strategy | None = None, lengths: tuple[int, int] = (1, 1)) -> Strategy:
    """The strategy that options ask for.

    Args:
        options: at most one ``option`` of a strategy with its parameter, such as ``threshold``, and ``score``; or ``strategy``,
            as :class:`~fastdllm_triton.decoding.strategies.StrategySpec` reads it. Other names are ignored.
        current: what is in force, where they ask for none; what else it says stays if only its parameter changes. 0.9 as a
            threshold if not given.
        lengths: ``gen_length`` and the length of a block, or sub-block, over which ``fixed:4`` is spread.

    Raises:
        ValueError: a value is not allowed, or two strategies are asked for.
    """
    current = current or Threshold(0.9)
    kinds = {kind.option: kind for kind in STRATEGIES.values()}
    names = [name for name in (*kinds, "strategy") if name in options]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} exclude each other")
    if "strategy" in options:
        if "score" in options:
            raise ValueError("strategy and score exclude each other; a strategy has its score at its end, as in fixed:4:margin")
        asked = StrategySpec.parse(options["strategy"]).strategy(*lengths)
        return replace(asked, **_kept(current, type(asked)))
    score = {"score": options["score"]} if "score" in options else {}
    if not names:
        return replace(current, **score)
    kind: Any = kinds[names[0]]
    kept = _kept(current, kind)
    if isinstance(current, kind):
        kept["score"] = current.score
    strategy: Strategy = kind(options[names[0]], **(kept | score))
    return strategy


def _kept(current: Strategy, kind: type[Strategy]) -> dict[str, Any]:
    """What stays of a strategy where another of its kind is asked for: all but its parameter and its score."""
    if type(current) is not kind:
        return {}
    names = (entry.name for entry in fields(current))
    return {name: getattr(current, name) for name in names if name not in (kind.parameter_name(), "score")}


def changed(config: GenerationConfig, options: Mapping[str, Any]) -> GenerationConfig:
    """A configuration with some options replaced, all of them or none.

    Args:
        config: what to start from.
        options: fields of :class:`~fastdllm_triton.decoding.GenerationConfig`, and what :func:`strategy_of` reads.

    Raises:
        ValueError: a value is not allowed, or values do not go together.
        TypeError: a name is unknown.
    """
    of_strategies = ("strategy", "score", *(kind.option for kind in STRATEGIES.values()))
    others = {name: value for name, value in options.items() if name not in of_strategies}
    lengths = replace(config, strategy=Threshold(), **others)  # Checked before anything is divided by them.
    return replace(lengths, strategy=strategy_of(options, config.strategy, (lengths.gen_length, lengths.decoded_length)))


def named_in(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a generation among a command's parameters, by name; those without a value are left out."""
    names = (*_readers(), "forbidden", "lockstep")
    return {name: parameters[name] for name in names if parameters.get(name) is not None}


def current(config: GenerationConfig) -> dict[str, Any]:
    """Every option as it stands, by a name that :func:`parse` knows; of the strategies, the parameter of the one in force."""
    strategy = config.strategy
    others = {name: getattr(config, name) for name in _readers() if name != "strategy" and hasattr(config, name)}
    return others | {strategy.option: strategy.parameter, "score": strategy.score}


def parse(name: str, text: str) -> Any:
    """The value of an option as it is typed; whether it is allowed is for :func:`changed` to say.

    Raises:
        ValueError: there is no such option, or the text is not a value of its kind.
    """
    readers = _readers()
    if name not in readers:
        near = get_close_matches(name, readers, n=1)
        hint = f"did you mean {near[0]}? There are " if near else "there are "
        raise ValueError(f"no setting is called {name!r}; {hint}{', '.join(readers)}")
    kind, read = readers[name]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None


def _optional(text: str) -> int | None:
    return None if text == "none" else int(text)


def _flag(text: str) -> bool:
    return {"on": True, "true": True, "off": False, "false": False}[text.lower()]


_Reader = tuple[str, Callable[[str], Any]]
_INTEGER: _Reader = ("an integer", int)
_NUMBER: _Reader = ("a number", float)
_OPTIONAL: _Reader = ("an integer or none", _optional)
_WORD: _Reader = ("a word", str)
_FLAG: _Reader = ("on or off", _flag)
#: By the type of an option's default.
_READERS: dict[type, _Reader] = {type(None): _OPTIONAL, int: _INTEGER, bool: _FLAG}


def _readers() -> dict[str, _Reader]:
    """What reads each option, with what it reads; in the order in which they are listed."""
    return {
        "gen_length": _INTEGER,
        "block_length": _INTEGER,
        "sub_block_length": _OPTIONAL,
        "cache": _WORD,
        "strategy": _WORD,
        **{kind.option: _INTEGER if kind.number is int else _NUMBER for kind in STRATEGIES.values()},
        "score": _WORD,
        "temperature": _NUMBER,
        "cfg_scale": _NUMBER,
        "seed": _INTEGER,
        "stop_at_eos": _FLAG,
        **{name: _READERS[type(option.default)] for name, option in cache_options().items()},
    }
