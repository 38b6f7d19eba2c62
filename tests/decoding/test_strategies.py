"""The registry of strategies: whoever lists them asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

import fastdllm_triton as fdt
from fastdllm_triton.decoding import options
from fastdllm_triton.decoding.strategies import STRATEGIES, StrategySpec, strategy_forms, strategy_names
from fastdllm_triton.evaluation import plots
from fastdllm_triton.evaluation.grid import parse_grid
from fastdllm_triton.types import RuleName, ScoreName

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Leftmost(fdt.Strategy):
    """Commits so many tokens, in the order of reading."""

    name: ClassVar[str] = "leftmost"
    symbol: ClassVar[str] = "N"
    option: ClassVar[str] = "left_tokens"
    number: ClassVar[type[int]] = int
    help: ClassVar[str] = "Commit the first tokens that are masked."
    label: ClassVar[str] = "n tokens from the left"
    rule: ClassVar[RuleName] = "quota"
    scores: ClassVar[tuple[ScoreName, ...]] = ("confidence",)

    tokens: int


@pytest.fixture
def leftmost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that is in the registry and nowhere else."""
    monkeypatch.setitem(STRATEGIES, "leftmost", Leftmost)


def test_each_strategy_says_how_it_is_asked_for() -> None:
    assert list(STRATEGIES) == [kind.name for kind in STRATEGIES.values()]
    assert len({kind.option for kind in STRATEGIES.values()}) == len(STRATEGIES)
    for kind in STRATEGIES.values():
        assert kind.rule in get_args(RuleName)
        assert set(kind.scores) <= set(get_args(ScoreName))
        assert getattr(fdt, kind.__name__) is kind
        strategy: Any = StrategySpec.parse(f"{kind.name}:1").strategy(1, 1)
        assert type(strategy) is kind
        assert strategy.parameter == 1
        assert options.strategy_of({kind.option: 1}) == strategy
    assert strategy_forms().startswith("fixed:K, threshold:T, factor:F")
    assert strategy_names().startswith("FixedSteps, Threshold, Factor")


@pytest.mark.parametrize("text", ["fixed:inf", "fixed:nan", "fixed:1.5", "fixed:0", "threshold:nan", "factor:inf", "entropy:-1"])
def test_a_number_that_a_strategy_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"strategy: '{text}'"):
        StrategySpec.parse(text)


@pytest.mark.usefixtures("leftmost")
def test_a_new_strategy_is_known_to_options_and_to_the_grid() -> None:
    assert options.parse("left_tokens", "3") == 3
    config = options.changed(fdt.GenerationConfig(), {"left_tokens": 3})
    assert config.strategy == Leftmost(3)
    assert options.current(config)["left_tokens"] == 3
    with pytest.raises(ValueError, match="left_tokens exclude each other"):
        options.strategy_of({"threshold": 0.5, "left_tokens": 3})
    with pytest.raises(ValueError, match="or leftmost:N, each with"):
        StrategySpec.parse("rightmost:3")
    (variant,) = parse_grid("leftmost:2", "dual", "8", 16)
    assert variant.config(16).strategy == Leftmost(2)
    assert variant.cost(10, 16) == 2 * 26 + 2 * 8


@pytest.mark.usefixtures("leftmost")
def test_a_new_strategy_has_a_line_of_its_own_in_plots() -> None:
    def record(strategy: str, speed: float) -> dict[str, Any]:
        point = {"tokens_per_forward": speed, "exact_match": 0.5}
        return {"strategy": strategy, "cache": "dual", "block_length": 8, "gen_length": 16, "n": 9} | point | {
            f"{key}_ci": [value, value] for key, value in point.items()
        }  # fmt: skip

    figure = plots.accuracy_against_speed([record("threshold:0.9", 2.0), record("leftmost:2", 3.0)])
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["threshold t", "n tokens from the left"]


def test_a_new_strategy_is_known_to_the_command_line() -> None:
    program = """
import sys
from test_strategies import STRATEGIES, Leftmost
STRATEGIES["leftmost"] = Leftmost
for name in [name for name in sys.modules if name.startswith("fastdllm_triton.cli")]:
    del sys.modules[name]
import typer
from fastdllm_triton.cli.app import app
from fastdllm_triton.cli.names import option_names
commands = typer.main.get_command(app).commands
for name in ("generate", "chat", "evaluate", "inspect"):
    assert any("leftmost:N" in (p.help or "") for p in commands[name].params), name
for name in ("generate", "chat"):
    (option,) = [p for p in commands[name].params if "--left-tokens" in p.opts]
    assert option.help == Leftmost.help
    context = commands[name].make_context(name, ["--left-tokens", "3"])
    assert context.params["left_tokens"] == 3
    assert option_names(commands[name])["left_tokens"] == "--left-tokens"
"""
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
