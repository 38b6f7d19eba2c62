"""Options of a generation by the names that people type: ``threshold 0.8``, ``strategy fixed:4``, ``suffix_window none``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from ..evaluation.grid import StrategySpec
from .config import GenerationConfig
from .strategies import EntropyBudget, Factor, FixedSteps, Strategy, Threshold

#: The name that asks for each strategy, with its parameter.
STRATEGIES: dict[str, Any] = {
    "threshold": Threshold,
    "factor": Factor,
    "steps": FixedSteps,
    "entropy_budget": EntropyBudget,
}


def strategy_of(given: Mapping[str, Any], now: Strategy | None = None, lengths: tuple[int, int] = (1, 1)) -> Strategy:
    """The strategy that settings ask for.

    Args:
        given: at most one name of :data:`STRATEGIES` with its parameter, and ``score``; or ``strategy``, as
            :class:`~fastdllm_triton.evaluation.grid.StrategySpec` reads it; the rest is not read.
        now: what is in force, where they ask for none; its score stays if only its parameter changes. 0.9 as a threshold if
            not given.
        lengths: ``gen_length`` and ``block_length``, over which ``fixed:4`` is spread.

    Raises:
        ValueError: a value is not allowed, or two strategies are asked for.
    """
    now = now or Threshold(0.9)
    asked = [name for name in (*STRATEGIES, "strategy") if name in given]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} exclude each other")
    if "strategy" in given:
        if "score" in given:
            raise ValueError("strategy and score exclude each other; a strategy has its score at its end, as in fixed:4:margin")
        return StrategySpec.parse(given["strategy"]).strategy(*lengths)
    score = {"score": given["score"]} if "score" in given else {}
    if not asked:
        return replace(now, **score)
    kind = STRATEGIES[asked[0]]
    kept = {"score": now.score} if isinstance(now, kind) else {}
    strategy: Strategy = kind(given[asked[0]], **(score or kept))
    return strategy


def changed(config: GenerationConfig, given: Mapping[str, Any]) -> GenerationConfig:
    """A configuration with some settings replaced, all of them or none.

    Args:
        config: what to start from.
        given: fields of :class:`~fastdllm_triton.decoding.GenerationConfig`, and what :func:`strategy_of` reads.

    Raises:
        ValueError: a value is not allowed, or values do not go together.
        TypeError: a name is unknown.
    """
    rest = {name: value for name, value in given.items() if name not in (*STRATEGIES, "strategy", "score")}
    lengths = replace(config, strategy=Threshold(), **rest)  # Checked before anything is divided by them.
    return replace(lengths, strategy=strategy_of(given, config.strategy, (lengths.gen_length, lengths.block_length)))


def named_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's options, by name; those without a value are left out."""
    names = (*_READERS, "forbidden", "lockstep")
    return {name: options[name] for name in names if options.get(name) is not None}


def current(config: GenerationConfig) -> dict[str, Any]:
    """Every setting as it stands, by a name that :func:`parse` knows; of the strategies, the parameter of the one in force."""
    strategy = config.strategy
    name = next(name for name, kind in STRATEGIES.items() if isinstance(strategy, kind))
    own = next(field.name for field in fields(strategy) if field.name != "score")
    found = {name: getattr(strategy, own), "score": strategy.score}
    rest = {name: getattr(config, name) for name in _READERS if name != "strategy" and hasattr(config, name)}
    return rest | found


def parse(name: str, text: str) -> Any:
    """The value of a setting as it is typed; whether it is allowed is for :func:`changed` to say.

    Raises:
        ValueError: there is no such setting, or the text is not a value of its kind.
    """
    if name not in _READERS:
        near = get_close_matches(name, _READERS, n=1)
        hint = f"did you mean {near[0]}? There are " if near else "there are "
        raise ValueError(f"no setting is called {name!r}; {hint}{', '.join(_READERS)}")
    kind, read = _READERS[name]
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

_READERS: dict[str, _Reader] = {
    "gen_length": _INTEGER,
    "block_length": _INTEGER,
    "cache": _WORD,
    "strategy": _WORD,
    "threshold": _NUMBER,
    "factor": _NUMBER,
    "steps": _INTEGER,
    "entropy_budget": _NUMBER,
    "score": _WORD,
    "temperature": _NUMBER,
    "cfg_scale": _NUMBER,
    "seed": _INTEGER,
    "stop_at_eos": ("on or off", _flag),
    "refresh_every": _OPTIONAL,
    "prompt_refresh": _OPTIONAL,
    "suffix_window": _OPTIONAL,
    "look_back": _INTEGER,
    "look_ahead": _INTEGER,
}
