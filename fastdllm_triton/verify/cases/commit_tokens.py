"""The cases of commit_tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from ...kernels._arch import Arch
from ...reference.token_statistics import token_statistics
from ...types import PolicyState, RuleName, ScoreName
from ._base import CASE_MODELS, Case, Compiled, Function, Inputs, OpCases, Outputs, Random, Where

MASK = CASE_MODELS["llada"].mask_id
#: First slot of the blocks.
START = 3


def _make(
    random: Random,
    batch: int,
    block: int,
    rule: str,
    score: str | None = None,
    value: Any = 0.7,
    steps: Any = 1,
    eos: Sequence[int] = (),
    committed: bool = False,
    placed: bool = False,
    ends: str = "block",
    prompt_end: Any = 0,
) -> Inputs:
    """Blocks in which every token is [MASK] itself, so that every launch has all to decide; ``committed``: in which some slots
    hold tokens, and one row has nothing to commit; ``placed``: whose statistics are in another order.
    """
    slots, device = 2 * block + 3, random.device
    logits = random(batch * block, 40, scale=3, dtype=torch.float32)
    logits[0] = torch.nan  # a row that has no token to commit
    statistics = token_statistics(logits)
    x = torch.full((batch, slots), MASK, device=device)
    if committed:
        x[:, ::3] = 1
        x[-1, : block + START] = 2
    else:
        statistics = replace(statistics, token=torch.full_like(statistics.token, MASK))
    state = PolicyState.create(
        score or ("neg_entropy" if rule == "entropy_budget" else "confidence"),  # type: ignore[arg-type]
        rule,  # type: ignore[arg-type]
        value=value,
        steps=steps,
        shares=[0.2, 0.6] if rule == "schedule" else None,
        mask_id=MASK,
        eos_ids=eos,
        ends=ends,  # type: ignore[arg-type]
        prompt_end=prompt_end,
        kv_start=torch.arange(batch, dtype=torch.int32, device=device) % START,
        seed=torch.arange(batch, device=device) - 1,
        slots=slots,
    )
    if placed:
        place = torch.arange(batch * block, dtype=torch.int32, device=device).view(batch, block)
        options = {"place": place.flip(0)}
    else:
        statistics, options = statistics.view(batch, block), {}
    return options | {"x": x, "statistics": statistics, "window_start": torch.full_like(state.kv_start, START), "state": state}


def _named(result: None, inputs: Inputs) -> Outputs:
    state = {name: value for name, value in vars(inputs["state"]).items() if isinstance(value, Tensor)}
    return {"x": inputs["x"], **state}


def _twice(function: Function) -> Function:
    """Two forwards, so that the counters of the first one matter."""

    def call(**inputs: Any) -> None:
        for _ in range(2):
            function(**inputs)

    return call


def _case(why: str, where: Where, batch: int, block: int, rule: str, score: str = "confidence", **sizes: Any) -> Case:
    return Case(why, {"batch": batch, "block": block, "rule": rule, "score": score, "committed": True, **sizes}, where)


def _compiled(arch: Arch) -> list[Compiled]:
    """Every score with every rule at blocks of 32, and the commonest pairs at longer ones, all as the engine calls them; rows
    that end with a token in blocks, sub-blocks of 8 and single slots, as Fast-dLLM v2 has them.

    Not listed: margins in blocks of 1,024, whose exponentials spill some registers on sm_90, sm_100 and gfx942. They are right
    there as anywhere, and such blocks are far from where a launch's time matters.
    """
    common = [("confidence", "threshold"), ("confidence", "factor"), ("neg_entropy", "entropy_budget")]
    pairs = {32: product(get_args(ScoreName), get_args(RuleName)), 128: [*common, ("margin", "threshold")], 1024: common}
    sizes = [{"block": block, "score": score, "rule": rule} for block, listed in pairs.items() for score, rule in listed]
    sizes += [{"block": block, "rule": "threshold", "ends": "token"} for block in (1, 8, 32)]
    return [(torch.float32, {"batch": 16, "eos": [0], "placed": True, **size}, None) for size in sizes]


_SHAPES = [
    {"batch": batch, "block": block, "rule": rule}
    for batch, block in ((1, 32), (16, 32), (64, 32), (16, 128), (16, 1024))
    for rule in ("threshold", "factor", "entropy_budget")
]

COMMIT_TOKENS = OpCases(
    "commit_tokens",
    [
        _case("threshold", "quick", 3, 8, "threshold"),
        _case("factor", "quick", 3, 8, "factor", value=1.0),
        _case("quota at random", "quick", 3, 16, "quota", "random", steps=5),
        _case("entropy budget", "quick", 3, 8, "entropy_budget", "neg_entropy", value=0.6),
        _case("rows that end", "quick", 4, 8, "threshold", value=0.01, eos=range(15)),
        _case("a capped threshold", "quick", 3, 16, "capped_threshold", value=(0.05, 0.3, 0.9), steps=(4, 5, 16)),
        _case("a floored threshold", "quick", 3, 16, "floored_threshold", value=(0.05, 0.7, math.inf), steps=(4, 5, 3)),
        _case("from left to right", "quick", 3, 16, "floored_threshold", "leftmost", value=math.inf, steps=(4, 5, 3)),
        _case("rows that end with a token", "quick", 4, 8, "threshold", value=(0.01, 0.2, 0.4, 0.9), eos=range(15), ends="token"),
        _case("end tokens of a prompt", "quick", 3, 8, "threshold", value=0.01, eos=[1, 2], prompt_end=(0, START + 4, 99)),
        _case("a token behind the window", "quick", 3, 1, "threshold", value=math.inf, eos=range(9), ends="token"),
        _case("a schedule", "quick", 3, 16, "schedule"),
        _case("rows that differ", "quick", 3, 8, "threshold", value=(0.3, 0.6, 0.9)),
        _case("quotas that differ", "full", 3, 16, "quota", "margin", steps=(1, 3, 8)),
        _case("statistics in another order", "quick", 3, 8, "factor", value=1.0, placed=True),
        _case("margin", "full", 2, 33, "threshold", "margin", value=0.4),
        _case("factor by margin", "full", 2, 33, "factor", "margin", value=0.8),
        _case("quota by entropy", "full", 2, 32, "quota", "neg_entropy", steps=7),
        _case("a block of one", "full", 2, 1, "threshold", value=0.9),
        _case("a batch", "key", 64, 32, "factor", value=1.0),
        _case("the largest block", "gpu", 16, 1024, "threshold"),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["batch"] == 1],
    small={"batch": 2, "block": 8, "rule": "factor"},
    axis="block",
    # Each slot's id, token and two statistics in; id, step and confidence out.
    bytes=lambda shape: 40 * shape["batch"] * shape["block"],
    named=_named,
    called=_twice,
    writes=["x", "state"],
    dtypes=(torch.float32,),
    float64=False,
    compiled=_compiled,
    label=lambda kernel, dtype, c: f"{c['SCORE']} {c['RULE']} N={c['BLOCK']}{' token' if c['ENDS'] == 'token' else ''}",
    forward=lambda c: [{"batch": c.batch, "block": 32, "rule": "threshold", "eos": [0], "placed": True}],
)
