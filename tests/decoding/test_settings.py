"""Options by the names that people type: the command line's and those of /set in a conversation."""

from __future__ import annotations

from typing import Any

import pytest

import fastdllm_triton as fdt
from fastdllm_triton.decoding.options import changed, current, parse, strategy_of

CONFIG = fdt.GenerationConfig(gen_length=48, block_length=16)


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({}, fdt.Threshold(0.9)),
        ({"threshold": 0.5}, fdt.Threshold(0.5)),
        ({"factor": 2.0}, fdt.Factor(2.0)),
        ({"steps": 12}, fdt.FixedSteps(12)),
        ({"entropy_budget": 0.3}, fdt.EntropyBudget(0.3)),
        ({"steps": 12, "score": "margin"}, fdt.FixedSteps(12, score="margin")),
        ({"score": "margin"}, fdt.Threshold(0.9, score="margin")),
    ],
)
def test_each_name_asks_for_its_strategy(given: dict[str, Any], strategy: fdt.Strategy) -> None:
    assert strategy_of(given) == strategy
    assert changed(CONFIG, given).strategy == strategy


def test_a_new_parameter_keeps_the_score_and_a_new_strategy_does_not() -> None:
    now = fdt.Threshold(0.9, score="margin")
    assert strategy_of({"threshold": 0.5}, now) == fdt.Threshold(0.5, score="margin")
    assert strategy_of({"factor": 1.0}, now) == fdt.Factor(1.0)
    assert strategy_of({}, now) == now


def test_settings_change_together_or_not_at_all() -> None:
    assert changed(CONFIG, {"gen_length": 20, "block_length": 10}).blocks == 2  # neither goes alone
    with pytest.raises(ValueError, match="gen_length must be a multiple of block_length = 16, got 20"):
        changed(CONFIG, {"gen_length": 20})
    with pytest.raises(ValueError, match="steps and threshold exclude each other"):
        changed(CONFIG, {"steps": 48, "threshold": 0.5})
    with pytest.raises(TypeError, match="blocks"):
        changed(CONFIG, {"blocks": 3})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threshold", "0.8", 0.8),
        ("steps", "12", 12),
        ("cache", "prefix", "prefix"),
        ("stop_at_eos", "off", False),
        ("stop_at_eos", "True", True),
        ("suffix_window", "none", None),
        ("suffix_window", "16", 16),
        ("look_back", "0", 0),
    ],
)
def test_text_becomes_a_value(name: str, text: str, value: Any) -> None:
    assert parse(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("treshold", "0.8", "no setting is called 'treshold'; did you mean threshold?"),
        ("mask_id", "1", "no setting is called 'mask_id'; there are gen_length, "),
        ("gen_length", "many", "gen_length must be an integer, got 'many'"),
        ("gen_length", "64.5", "gen_length must be an integer"),
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("stop_at_eos", "maybe", "stop_at_eos must be on or off, got 'maybe'"),
        ("refresh_every", "never", "refresh_every must be an integer or none, got 'never'"),
    ],
)
def test_text_that_is_no_value(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(name, text)


@pytest.mark.parametrize("strategy", [fdt.Threshold(0.7), fdt.Factor(2), fdt.FixedSteps(6, score="margin"), fdt.EntropyBudget(1)])
def test_what_is_shown_makes_the_same_configuration(strategy: fdt.Strategy) -> None:
    config = fdt.GenerationConfig(gen_length=48, block_length=16, cache="prefix", strategy=strategy, suffix_window=8)
    shown = current(config)
    assert changed(fdt.GenerationConfig(), {name: parse(name, str(value).lower()) for name, value in shown.items()}) == config
