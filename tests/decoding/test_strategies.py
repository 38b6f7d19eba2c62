"""The registry of strategies: whoever lists them asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DREAM

import fastdllm_triton as fdt
from fastdllm_triton import compat
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
    assert strategy_forms().startswith("fixed:K, threshold:T, capped:K")
    assert strategy_names().startswith("FixedSteps, Threshold, CappedThreshold")


@pytest.mark.parametrize(
    "text",
    [
        "fixed:inf",
        "fixed:nan",
        "fixed:1.5",
        "fixed:0",
        "threshold:nan",
        "factor:inf",
        "entropy:-1",
        "timesteps:1.5",
        "timesteps:nan",
    ],
)
def test_a_number_that_a_strategy_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"strategy: '{text}'"):
        StrategySpec.parse(text)


def _official_counts(masks: int, steps: int, eps: float) -> list[int]:
    """How many tokens each step commits in Dream's generation_utils.py."""
    timesteps, counts = torch.linspace(1, eps, steps + 1), []
    for i in range(steps):
        t, s = timesteps[i], timesteps[i + 1]
        num_mask_token = torch.tensor(masks) / 1  # the mean over one row
        counts.append(int(num_mask_token * (1 - s / t)) if i < steps - 1 else int(num_mask_token))
        masks -= counts[-1]
    return counts


@pytest.mark.parametrize("eps", [1e-3, 0.3, 1e-6])
@pytest.mark.parametrize(("masks", "steps"), [(32, 32), (256, 256), (512, 512), (97, 31), (7, 1), (5, 64), (1024, 100)])
def test_timesteps_commit_as_many_tokens_as_the_official_schedule(masks: int, steps: int, eps: float) -> None:
    for blocks in (1, 3):
        shares = fdt.Timesteps(steps * blocks, eps).shares(blocks)
        assert len(shares) == steps
        left, counts = torch.tensor([masks]), []
        for share in torch.tensor(shares, dtype=torch.float32):
            counts.append(int((left.to(torch.float32) * share).int()))  # as commit_tokens has it
            left -= counts[-1]
        assert counts == _official_counts(masks, steps, eps)
        assert sum(counts) == masks


@pytest.mark.parametrize(
    ("alg", "score"), [("maskgit_plus", "confidence"), ("topk_margin", "margin"), ("entropy", "neg_entropy")]
)
@pytest.mark.parametrize("steps", [5, 12, 40])
def test_timesteps_over_one_block_are_the_official_decoding(alg: Any, score: Any, steps: int) -> None:
    model, prompt = fdt.load(GOLDEN / GOLDEN_DREAM), torch.tensor([[40, 41, 42, 43, 44]])
    want = compat.diffusion_generate(
        model, prompt, max_new_tokens=24, steps=steps, alg=alg, temperature=0.0, top_k=None, return_dict_in_generate=True
    )
    out = model.generate(
        prompt,
        gen_length=24,
        block_length=24,
        cache="none",
        strategy=fdt.Timesteps(steps, score=score),
        stop_at_eos=False,
    )
    assert out.sequences.tolist() == want.sequences.tolist()
    assert out.committed == 24
    assert out.nfe == want.nfe == steps


@pytest.mark.parametrize("steps", [1, 4, 12, 24])
def test_a_capped_threshold_over_one_block_is_the_official_threshold_of_dream(steps: int) -> None:
    model, prompt = fdt.load(GOLDEN / GOLDEN_DREAM), torch.tensor([[40, 41, 42, 43, 44]])
    want = compat.diffusion_generate(
        model,
        prompt,
        max_new_tokens=24,
        steps=steps,
        alg="confidence_threshold",
        threshold=0.5,
        temperature=0.0,
        generation_logits_hook_func=lambda step, x, logits: logits,  # which the loop apart from the engine calls
        return_dict_in_generate=True,
    )
    out = model.generate(
        prompt, gen_length=24, block_length=24, cache="none", strategy=fdt.CappedThreshold(steps, 0.5), stop_at_eos=False
    )
    assert out.sequences.tolist() == want.sequences.tolist()
    assert out.nfe == want.nfe >= steps
    forwards = out.step_map[0].bincount(minlength=steps).cumsum(0)
    assert all(committed <= 24 // steps * (i + 1) for i, committed in enumerate(forwards[:steps].tolist()))


@pytest.mark.parametrize(("steps", "forwards"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (8, [1] * 8), (20, [1] * 8)])
def test_denoising_steps_are_of_a_block(llada: fdt.MaskedDiffusionLM, steps: int, forwards: list[int]) -> None:
    for score in ("confidence", "leftmost"):
        strategy = fdt.DenoisingSteps(steps, score=score)
        out = llada.generate([[1, 2, 3]], gen_length=16, block_length=8, strategy=strategy, stop_at_eos=False)
        assert out.step_map[0].bincount().tolist() == forwards * 2
    assert out.step_map[0].tolist() == sorted(out.step_map[0].tolist())  # from left to right
    fixed = fdt.FixedSteps(2 * min(steps, 8))  # the same while nothing of a block is given
    found, want = (
        llada.generate([[1, 2, 3]], gen_length=16, block_length=8, strategy=strategy, stop_at_eos=False).sequences
        for strategy in (fdt.DenoisingSteps(steps), fixed)
    )
    assert found.tolist() == want.tolist()


def test_a_dynamic_schedule_is_no_slower_than_a_static_one(llada: fdt.MaskedDiffusionLM) -> None:
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}
    static = llada.generate([[1, 2, 3]], strategy=fdt.DenoisingSteps(4), **options)
    certain = llada.generate([[1, 2, 3]], strategy=fdt.DenoisingSteps(4, 1.0), **options)
    lax = llada.generate([[1, 2, 3]], strategy=fdt.DenoisingSteps(4, 1e-6), **options)
    assert certain.sequences.tolist() == static.sequences.tolist() and certain.nfe == static.nfe == 8
    assert lax.nfe == 2
    one = llada.generate([[1, 2, 3]], strategy=fdt.Threshold(1, strict=True), **options)
    assert one.nfe == 16 and one.step_map[0].bincount().tolist() == [1] * 16


def test_only_a_schedule_has_shares() -> None:
    strategies = (
        fdt.FixedSteps(4),
        fdt.Threshold(),
        fdt.CappedThreshold(4),
        fdt.DenoisingSteps(4),
        fdt.Factor(),
        fdt.EntropyBudget(0.1),
    )
    assert all(strategy.shares(2) == () for strategy in strategies)
    assert fdt.Timesteps(4).shares(4) == (1.0,)
    assert fdt.Timesteps(6).steps_per_block(3) == 2
    for steps in (2, 7):
        with pytest.raises(ValueError, match=f"timesteps must be a multiple of the number of blocks, 3 .*, got {steps}"):
            fdt.Timesteps(steps).shares(3)
    assert StrategySpec.parse("timesteps:6:margin").strategy(12, 4) == fdt.Timesteps(6, score="margin")


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
    assert labels == ["Pareto front", "threshold t", "n tokens from the left"]


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
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
