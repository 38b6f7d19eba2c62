"""What each kernel is tried on: shapes as data, with the reason why each is there.

``quick`` cases are small and cover what breaks kernels: tails, empty ranges, ties, head ratios. ``full`` adds more of these.
``key`` and ``gpu`` cases have the sizes of LLaDA-8B and Dream-7B, too large for Triton's interpreter: ``key`` those of a step and
of a refresh of one row, ``gpu`` the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..reference.token_statistics import token_statistics
from ..types import PolicyState, TokenStatistics

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Function = Callable[..., Any]
Where = Literal["quick", "full", "key", "gpu"]


@dataclass(frozen=True)
class Case:
    """A shape to try.

    Attributes:
        why: the reason, which is also its name.
        sizes: what the maker of the inputs takes.
        where: in which runs: every one; those that are not quick; those on a GPU; those on a GPU that are not quick.
    """

    why: str
    sizes: Mapping[str, Any]
    where: Where = "full"


@dataclass(frozen=True)
class Grid:
    """How to try an op.

    Attributes:
        op: its name.
        cases: the shapes.
        inputs: makes the keyword arguments of a case from its sizes.
        outputs: calls the kernel or the reference, which take the same arguments, and names what comes out.
        twin: PyTorch's own result in the inputs' dtype, whose error sets the bound; the reference if not given.
        dtypes: that the inputs come in.
        float64: whether the reference can be run on the inputs in float64.
    """

    op: str
    cases: Sequence[Case]
    inputs: Callable[..., Inputs]
    outputs: Callable[[Function, Inputs], Outputs]
    twin: Callable[[Inputs], Outputs] | None = None
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    float64: bool = True


class Random:
    """Normal numbers of one seed, drawn on a device in a dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, scale: float = 1.0) -> Tensor:
        """``size`` numbers, ``scale`` wide."""
        return (torch.randn(size, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def slots(self, values: Sequence[int]) -> Tensor:
        """An int32 tensor."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


# --- rms_norm -------------------------------------------------------------------------------------------------------------


def _rms_norm_inputs(random: Random, rows: int, width: int, residual: bool, gather: Sequence[int] | None = None) -> Inputs:
    found: Inputs = {"x": random(rows, width), "weight": random(width), "eps": 1e-5}
    found |= {} if gather is None else {"rows": torch.tensor(gather, device=random.device)}
    return found | ({"residual": random(rows, width)} if residual else {})


def _rms_norm_outputs(function: Function, inputs: Inputs) -> Outputs:
    found = function(**inputs)
    return {"y": found[0], "sum": found[1]} if isinstance(found, tuple) else {"y": found}


RMS_NORM = Grid(
    "rms_norm",
    [
        Case("one element", {"rows": 1, "width": 1, "residual": False}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7, "residual": True}, "quick"),
        Case("the built-in model", {"rows": 5, "width": 128, "residual": True}, "quick"),
        Case("gathered rows, some of them none", {"rows": 4, "width": 24, "residual": True, "gather": (3, -1, 0)}, "quick"),
        Case("Dream's width, no power of two", {"rows": 2, "width": 3584, "residual": True}),
        Case("LLaDA's width", {"rows": 4, "width": 4096, "residual": False}),
        Case("a step of LLaDA", {"rows": 32, "width": 4096, "residual": True}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": 3584, "residual": True}, "key"),
    ],
    _rms_norm_inputs,
    _rms_norm_outputs,
)


# --- swiglu ---------------------------------------------------------------------------------------------------------------

SWIGLU = Grid(
    "swiglu",
    [
        Case("one product", {"rows": 1, "width": 1}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7}, "quick"),
        Case("a tail", {"rows": 6, "width": 130}, "quick"),
        Case("LLaDA's width", {"rows": 2, "width": 12_288}),
        Case("Dream's width", {"rows": 2, "width": 18_944}),
        Case("a step of LLaDA", {"rows": 32, "width": 12_288}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": 18_944}, "key"),
    ],
    lambda random, rows, width: {"gate_up": random(rows, 2 * width, scale=4)},
    lambda function, inputs: {"y": function(**inputs)},
)


# --- linear ---------------------------------------------------------------------------------------------------------------


def _linear_inputs(
    random: Random, rows: int, n: int, k: int, norm: bool = False, activation: str | None = None, residual: bool = False
) -> Inputs:
    found: Inputs = {"x": random(rows, k), "weight": random(n, k, scale=k**-0.5), "activation": activation}
    found |= {"norm_weight": random(k), "eps": 1e-5} if norm else {}
    return found | ({"residual": random(rows, n // 2 if activation else n)} if residual else {})


def _linear_outputs(function: Function, inputs: Inputs) -> Outputs:
    found = {"library": function(**inputs)}
    if "config" in signature(function).parameters:  # the kernel's own product too, whatever was measured
        from ..kernels._arch import arch_of
        from ..kernels.linear import select_config

        x, (n, k) = inputs["x"], inputs["weight"].shape
        config = select_config(arch_of(x.device), x.shape[0], n, k, x.element_size(), inputs["activation"])
        return found | {"kernel": function(**inputs, config=config)}
    return found | {"kernel": found["library"]}


_FUSED = {"norm": True, "activation": "swiglu"}
LINEAR = Grid(
    "linear",
    [
        Case("one row", {"rows": 1, "n": 2, "k": 16}, "quick"),
        Case("tails of rows, outputs and columns", {"rows": 19, "n": 74, "k": 88, "residual": True}, "quick"),
        Case("a norm and a gated unit", {"rows": 5, "n": 70, "k": 130, **_FUSED, "residual": True}, "quick"),
        Case("split columns", {"rows": 3, "n": 64, "k": 2048, **_FUSED}),
        Case("LLaDA's qkv", {"rows": 32, "n": 12_288, "k": 4096, "norm": True}, "key"),
        Case("LLaDA's gate and up", {"rows": 64, "n": 24_576, "k": 4096, **_FUSED}, "key"),
        Case("LLaDA's down", {"rows": 128, "n": 4096, "k": 12_288, "residual": True}, "key"),
        Case("Dream's gate and up", {"rows": 32, "n": 37_888, "k": 3584, **_FUSED}, "key"),
        Case("Dream's down", {"rows": 512, "n": 3584, "k": 18_944, "residual": True}, "gpu"),
    ],
    _linear_inputs,
    _linear_outputs,
)


# --- rope_kv_write --------------------------------------------------------------------------------------------------------


def _rope_inputs(
    random: Random,
    window: int,
    window_start: Sequence[int],
    kv_start: Sequence[int],
    q_heads: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    slots: int = 12,
    rounding: str = "llada",
    bias: bool = False,
    theta: float = 10_000.0,
) -> Inputs:
    batch, columns = len(window_start), (q_heads + 2 * kv_heads) * dim
    return {
        "qkv": random(batch, window, columns),
        "k_cache": random(batch, kv_heads, slots, dim),
        "v_cache": random(batch, kv_heads, slots, dim),
        "window_start": random.slots(window_start),
        "kv_start": random.slots(kv_start),
        "theta": theta,
        "bias": random(columns) if bias else None,
        "rounding": rounding,
    }


def _rope_outputs(function: Function, inputs: Inputs) -> Outputs:
    caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    return {"q": function(**inputs | caches), **caches}


_LLADA: Mapping[str, Any] = {"q_heads": 32, "kv_heads": 32, "dim": 128, "theta": 500_000.0}
_DREAM: Mapping[str, Any] = {
    "q_heads": 28, "kv_heads": 4, "dim": 128, "theta": 1_000_000.0, "rounding": "dream", "bias": True,
}  # fmt: skip

ROPE_KV_WRITE = Grid(
    "rope_kv_write",
    [
        Case("a refresh", {"window": 12, "window_start": (0,), "kv_start": (0,)}, "quick"),
        Case("ragged left padding", {"window": 12, "window_start": (0, 0, 0), "kv_start": (0, 5, 11)}, "quick"),
        Case("past either end", {"window": 8, "window_start": (8, -3, 18), "kv_start": (0, 0, 0)}, "quick"),
        Case(
            "Dream's rounding, bias and ratio of heads",
            {**_DREAM, "window": 3, "window_start": (5, 3), "kv_start": (2, 0), "q_heads": 7, "kv_heads": 1, "dim": 16},
            "quick",
        ),
        Case("one token at the end", {"window": 1, "window_start": (11,), "kv_start": (0,)}),
        Case("a window of padding", {"window": 8, "window_start": (0, 2), "kv_start": (8, 9)}),
        Case("head dim 80", {"window": 5, "window_start": (4, 8), "kv_start": (0, 1), "dim": 80}),
        Case("head dim 128", {"window": 5, "window_start": (4,), "kv_start": (3,), "dim": 128}),
        Case("a step of LLaDA", {**_LLADA, "window": 32, "window_start": (960, 960), "kv_start": (0, 70), "slots": 1024}, "key"),
        Case("a refresh of Dream", {**_DREAM, "window": 4096, "window_start": (0,), "kv_start": (9,), "slots": 4096}, "key"),
    ],
    _rope_inputs,
    _rope_outputs,
)


# --- window_attention -----------------------------------------------------------------------------------------------------


def _attention_inputs(
    random: Random,
    window: int,
    start: Sequence[int],
    end: Sequence[int],
    skip: Sequence[tuple[int, int]] | None = None,
    q_heads: int = 1,
    kv_heads: int = 1,
    dim: int = 16,
    slots: int = 80,
) -> Inputs:
    batch = len(start)
    found: Inputs = {
        "q": random(batch, window, q_heads, dim),
        "k_cache": random(batch, kv_heads, slots, dim),
        "v_cache": random(batch, kv_heads, slots, dim),
        "kv_start": random.slots(start),
        "kv_end": random.slots(end),
    }
    if skip is not None:
        found["skip_start"] = random.slots([first for first, _ in skip])
        found["skip_end"] = random.slots([last for _, last in skip])
    return found


def _attention_outputs(function: Function, inputs: Inputs) -> Outputs:
    out, lse = function(**inputs, return_lse=True)
    return {"out": out, "lse": lse}


def _attention_of_torch(inputs: Inputs) -> Outputs:
    """PyTorch's attention in the dtype of the inputs, a sequence at a time, over its attended slots alone."""
    i, out = inputs, torch.zeros_like(inputs["q"])
    slot = torch.arange(i["k_cache"].shape[2], device=out.device)
    q_heads, dim = i["q"].shape[2:]
    group = q_heads // i["k_cache"].shape[1]
    lse = torch.full((len(out), q_heads, out.shape[1]), -torch.inf, device=out.device)
    for b in range(len(out)):
        kept = (slot >= i["kv_start"][b]) & (slot < i["kv_end"][b])
        if "skip_start" in i:
            kept &= (slot < i["skip_start"][b]) | (slot >= i["skip_end"][b])
        if kept.any():
            q = i["q"][b].transpose(0, 1)  # [Hq, W, D]
            k, v = (i[name][b][:, kept].repeat_interleave(group, dim=0) for name in ("k_cache", "v_cache"))
            out[b] = scaled_dot_product_attention(q, k, v).transpose(0, 1)
            lse[b] = ((q @ k.mT).float() / math.sqrt(dim)).logsumexp(-1) * math.log2(math.e)
    return {"out": out, "lse": lse}


def _attention_case(why: str, where: Where, model: Mapping[str, Any], batch: int, window: int, slots: int) -> Case:
    heads = {name: model[name] for name in ("q_heads", "kv_heads", "dim")}
    start = [0, 7, 100, 31][: batch % 5] + [0] * (batch - batch % 5)
    return Case(why, {**heads, "window": window, "start": start, "end": [slots] * batch, "slots": slots}, where)


#: Batch, window and slots at the true sizes.
_ATTENTION_SIZES: list[tuple[Where, int, int, int]] = [
    ("key", 1, 32, 1024), ("gpu", 1, 16, 1029), ("gpu", 3, 32, 2048), ("gpu", 4, 64, 1024), ("gpu", 2, 128, 4096),
    ("gpu", 1, 32, 16_384), ("key", 1, 1024, 1024),
]  # fmt: skip

WINDOW_ATTENTION = Grid(
    "window_attention",
    [
        Case("a step over everything", {"window": 8, "start": (0,), "end": (80,), "q_heads": 2, "kv_heads": 2}, "quick"),
        Case("an odd window, ragged rows", {"window": 7, "start": (0, 5, 79), "end": (80, 77, 80)}, "quick"),
        Case("an empty row between others", {"window": 4, "start": (0, 40, 80), "end": (80, 40, 80)}, "quick"),
        Case("ratio 7 of heads", {"window": 5, "start": (0, 2), "end": (80, 60), "q_heads": 14, "kv_heads": 2}, "quick"),
        Case("a skip inside a tile", {"window": 4, "start": (0, 3), "end": (80, 80), "skip": ((5, 9), (40, 41))}, "quick"),
        Case("head dim 128", {"window": 4, "start": (1,), "end": (79,), "dim": 128}, "quick"),
        Case("one query", {"window": 1, "start": (0,), "end": (80,)}),
        Case("a refresh", {"window": 80, "start": (0,), "end": (80,)}),
        Case("around a tile of 32", {"window": 4, "start": (0, 0, 0, 0), "end": (31, 32, 33, 1)}),
        Case("around a tile of 64", {"window": 4, "start": (0, 0, 0, 7), "end": (63, 64, 65, 71)}),
        Case("a window of 33", {"window": 33, "start": (3,), "end": (80,)}),
        Case("ratio 4 of heads", {"window": 5, "start": (0, 2), "end": (80, 60), "q_heads": 8, "kv_heads": 2}),
        Case("head dim 80", {"window": 4, "start": (1,), "end": (79,), "dim": 80}),
        Case("a skip of whole tiles", {"window": 4, "start": (0, 0), "end": (80, 80), "skip": ((32, 64), (16, 80))}),
        Case("a skip of everything", {"window": 4, "start": (0, 4), "end": (80, 60), "skip": ((0, 80), (4, 60))}),
        Case("several chunks", {"window": 4, "start": (3,), "end": (600,), "slots": 600}),
        *(
            _attention_case(f"{name}, batch {batch}, window {window}, context {slots}", where, model, batch, window, slots)
            for name, model in (("LLaDA", _LLADA), ("Dream", _DREAM))
            for where, batch, window, slots in _ATTENTION_SIZES
        ),
    ],
    _attention_inputs,
    _attention_outputs,
    _attention_of_torch,
)  # fmt: skip


# --- token_statistics, head_statistics ------------------------------------------------------------------------------------


def _statistics(found: TokenStatistics) -> Outputs:
    """What is compared. The odds against a token span many orders of magnitude, so their logarithm is."""
    return {
        "token": found.token,
        "logit": found.logit,
        "second_logit": found.second_logit,
        "logsumexp": found.logsumexp,
        "log_rest": found.rest.log(),
        "entropy": found.entropy,
    }


def _token_inputs(
    random: Random, rows: int, vocabulary: int, temperature: float = 0.0, ties: Sequence[int] = (), broken: bool = False,
    forbidden: Sequence[int] | None = None, by_row: bool = False,
) -> Inputs:  # fmt: skip
    logits = random(rows, vocabulary, scale=3)
    logits[:, list(ties)] = 40.0
    if broken:  # rows of -inf, with a NaN, and with +inf have no token to choose
        logits[0], logits[1, 2], logits[2, 1] = -torch.inf, torch.nan, torch.inf
        logits[3:, ::2] = -torch.inf
    if by_row:
        return {"logits": logits, "seed": 7, **_options_by_row(rows, vocabulary, random.device)}
    return {"logits": logits, "temperature": temperature, "seed": 7 if temperature else None, "forbidden": forbidden}


def _options_by_row(rows: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Temperatures of which every other is 0, and none to two forbidden ids a row."""
    row = torch.arange(rows, device=device)
    ids = torch.stack((row * 37 % vocabulary, row * 101 % vocabulary), dim=1)
    return {
        "temperature": (row % 2) * 0.5 * row,
        "forbidden": ids.masked_fill(torch.stack((row % 3 == 0, row % 2 == 0), dim=1), -1),
    }


TOKEN_STATISTICS = Grid(
    "token_statistics",
    [
        Case("one token", {"rows": 1, "vocabulary": 1}, "quick"),
        Case("less than a tile", {"rows": 2, "vocabulary": 7}, "quick"),
        Case("ties across tiles", {"rows": 3, "vocabulary": 9000, "ties": (12, 4096, 8999)}, "quick"),
        Case("rows without a choice", {"rows": 5, "vocabulary": 3000, "broken": True}, "quick"),
        Case("forbidden ids", {"rows": 2, "vocabulary": 500, "ties": (3, 4), "forbidden": (3, 77)}, "quick"),
        Case("samples", {"rows": 4, "vocabulary": 1000, "temperature": 1.0}, "quick"),
        Case("rows that differ", {"rows": 6, "vocabulary": 1000, "by_row": True}, "quick"),
        Case("the built-in model", {"rows": 130, "vocabulary": 137}),
        Case("an odd vocabulary", {"rows": 2, "vocabulary": 50_257}),
        Case("LLaDA's vocabulary", {"rows": 1, "vocabulary": 126_464}),
        Case("a block of LLaDA", {"rows": 32, "vocabulary": 126_464}, "key"),
        Case("samples of a block of LLaDA", {"rows": 32, "vocabulary": 126_464, "temperature": 0.7}, "gpu"),
        Case("many rows of Dream", {"rows": 512, "vocabulary": 152_064}, "gpu"),
    ],
    _token_inputs,
    lambda function, inputs: _statistics(function(**inputs)),
)


def _head_inputs(
    random: Random, rows: int, vocabulary: int, width: int, asked: Sequence[int] | None = None, by_row: bool = False
) -> Inputs:
    return {
        "hidden": random(rows, width),
        "weight": random(vocabulary, width, scale=3 / math.sqrt(width)),
        "rows": None if asked is None else torch.tensor(asked, device=random.device),
        **({"seed": 7, **_options_by_row(rows, vocabulary, random.device)} if by_row else {}),
    }


def _head_outputs(function: Function, inputs: Inputs) -> Outputs:
    """A rounding may make two logits swap places, so a token is judged by its float64 logit."""
    found = function(**inputs)
    hidden = inputs["hidden"] if inputs["rows"] is None else inputs["hidden"][inputs["rows"]]
    chosen = (hidden.double() * inputs["weight"][found.token].double()).sum(1)
    missing = found.token < 0
    named = _statistics(found)
    del named["token"]
    return {"chosen": chosen.masked_fill(missing, torch.nan).to(found.logit.dtype), "missing": missing, **named}


HEAD_STATISTICS = Grid(
    "head_statistics",
    [
        Case("one token", {"rows": 1, "vocabulary": 1, "width": 16}, "quick"),
        Case("the built-in model", {"rows": 3, "vocabulary": 137, "width": 128}, "quick"),
        Case("nothing divides a tile", {"rows": 5, "vocabulary": 999, "width": 80}, "quick"),
        Case("listed rows, some of them none", {"rows": 6, "vocabulary": 500, "width": 32, "asked": (5, -1, 2, 2, -1)}, "quick"),
        Case("rows that differ", {"rows": 6, "vocabulary": 500, "width": 32, "by_row": True}, "quick"),
        Case("many rows", {"rows": 66, "vocabulary": 640, "width": 64}),
        Case("many rows that differ", {"rows": 66, "vocabulary": 640, "width": 64, "by_row": True}),
        Case("a wide one", {"rows": 17, "vocabulary": 4096, "width": 96}),
        *(
            Case(
                f"{rows} rows of {name}", {"rows": rows, "vocabulary": vocabulary, "width": width}, "key" if rows == 32 else "gpu"
            )
            for name, vocabulary, width in (("LLaDA", 126_464, 4096), ("Dream", 152_064, 3584))
            for rows in (1, 32, 64, 200)
        ),
    ],
    _head_inputs,
    _head_outputs,
)


# --- window_inputs --------------------------------------------------------------------------------------------------------

_MASK = 9


def _window_inputs(
    random: Random, batch: int, block: int, window: int, share: float, back: int = 0, shift: bool = False, sample: bool = False
) -> Inputs:
    slots, device = 3 * block + window, random.device
    x = (torch.rand((batch, slots), generator=random.generator, device=device) < share).long() * _MASK
    start = torch.arange(batch, dtype=torch.int32, device=device) % (2 * block) + back
    # Some rows have fewer masks left than places, one has none.
    left = torch.full_like(start, block)
    left[batch // 2] = 0
    keys = {"seed": start.long() * 7, "step": start} if sample else {}
    sizes = {"back": back, "window": window, "block": block, "predicted": batch * block, "shift": shift, "mask_id": _MASK}
    return {"x": x, "base": start, "block_start": start, "remaining": left, "kv_start": start // 2, **sizes, **keys}


WINDOW_INPUTS = Grid(
    "window_inputs",
    [
        Case("some masks left", {"batch": 3, "block": 4, "window": 4, "share": 0.5}, "quick"),
        Case("a shifted model that samples", {
            "batch": 5, "block": 7, "window": 8, "share": 0.7, "back": 1, "shift": True, "sample": True,
        }, "quick"),
        Case("one row, nothing masked", {"batch": 1, "block": 1, "window": 3, "share": 0.0}),
        Case("a window of several programs", {"batch": 2, "block": 32, "window": 600, "share": 0.9}),
        Case("a step", {"batch": 1, "block": 32, "window": 32, "share": 0.8}, "key"),
        Case("more rows than a warp has threads", {"batch": 130, "block": 8, "window": 8, "share": 0.5, "sample": True}, "gpu"),
        Case("a large batch", {"batch": 1024, "block": 32, "window": 32, "share": 0.5}, "gpu"),
    ],
    _window_inputs,
    lambda function, inputs: dict(vars(function(**inputs))),
    dtypes=(torch.float32,),
    float64=False,
)  # fmt: skip


# --- commit_tokens --------------------------------------------------------------------------------------------------------

_VOCABULARY = 40


def _commit_inputs(
    random: Random, batch: int, block: int, score: str, rule: str, value: Any = 0.0, steps: Any = 1, eos: Sequence[int] = ()
) -> Inputs:
    logits = random(batch * block, _VOCABULARY, scale=3)
    logits[0] = torch.nan  # a row that has no token to commit
    statistics = token_statistics(logits, forbidden=[_MASK]).view(batch, block)
    slots, device = 2 * block + 3, random.device
    x = torch.full((batch, slots), _MASK, device=device)
    x[:, ::3] = 1  # committed before
    x[-1, : block + 3] = 2  # nothing left in this row's block
    state = PolicyState.create(
        score,  # type: ignore[arg-type]
        rule,  # type: ignore[arg-type]
        value=value,
        steps=steps,
        shares=[0.2, 0.6] if rule == "schedule" else None,
        mask_id=_MASK,
        eos_ids=eos,
        kv_start=torch.arange(batch, dtype=torch.int32, device=device) % 3,
        seed=torch.arange(batch, device=device) - 1,
        slots=slots,
    )
    return {"x": x, "statistics": statistics, "window_start": torch.full_like(state.kv_start, 3), "state": state}


def _commit_outputs(function: Function, inputs: Inputs) -> Outputs:
    """Two forwards, so that the counters of the first one matter."""
    state: PolicyState = inputs["state"]
    names = [field.name for field in fields(PolicyState) if isinstance(getattr(state, field.name), Tensor)]
    state = replace(state, **{name: getattr(state, name).clone() for name in names})
    x = inputs["x"].clone()
    for _ in range(2):
        function(x, inputs["statistics"], inputs["window_start"], state)
    return {"x": x, **{name: getattr(state, name) for name in names}}


COMMIT_TOKENS = Grid(
    "commit_tokens",
    [
        Case("threshold", {"batch": 3, "block": 8, "score": "confidence", "rule": "threshold", "value": 0.7}, "quick"),
        Case("factor", {"batch": 3, "block": 8, "score": "confidence", "rule": "factor", "value": 1.0}, "quick"),
        Case("quota at random", {"batch": 3, "block": 16, "score": "random", "rule": "quota", "steps": 5}, "quick"),
        Case("entropy budget", {"batch": 3, "block": 8, "score": "neg_entropy", "rule": "entropy_budget", "value": 0.6}, "quick"),
        Case(
            "rows that end",
            {"batch": 4, "block": 8, "score": "confidence", "rule": "threshold", "value": 0.01, "eos": range(15)},
            "quick",
        ),
        Case("a schedule", {"batch": 3, "block": 16, "score": "confidence", "rule": "schedule"}, "quick"),
        Case(
            "rows that differ",
            {"batch": 3, "block": 8, "score": "confidence", "rule": "threshold", "value": (0.3, 0.6, 0.9)},
            "quick",
        ),
        Case("quotas that differ", {"batch": 3, "block": 16, "score": "margin", "rule": "quota", "steps": (1, 3, 8)}),
        Case("margin", {"batch": 2, "block": 33, "score": "margin", "rule": "threshold", "value": 0.4}),
        Case("factor by margin", {"batch": 2, "block": 33, "score": "margin", "rule": "factor", "value": 0.8}),
        Case("quota by entropy", {"batch": 2, "block": 32, "score": "neg_entropy", "rule": "quota", "steps": 7}),
        Case("a block of one", {"batch": 2, "block": 1, "score": "confidence", "rule": "threshold", "value": 0.9}),
        Case("a batch", {"batch": 64, "block": 32, "score": "confidence", "rule": "factor", "value": 1.0}, "key"),
        Case("the largest block", {"batch": 16, "block": 1024, "score": "confidence", "rule": "threshold", "value": 0.7}, "gpu"),
    ],
    _commit_inputs,
    _commit_outputs,
    dtypes=(torch.float32,),
    float64=False,
)  # fmt: skip

#: In the order of a forward.
GRIDS = {
    grid.op: grid
    for grid in (
        WINDOW_INPUTS,
        RMS_NORM,
        LINEAR,
        ROPE_KV_WRITE,
        WINDOW_ATTENTION,
        SWIGLU,
        TOKEN_STATISTICS,
        HEAD_STATISTICS,
        COMMIT_TOKENS,
    )
}  # fmt: skip
