"""Every argument of the public functions with values that it must refuse: the error names the argument, and nothing is done.

An entry of the table is a call that works, one of its arguments, and values in whose place nothing sensible can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _modules import load_module
from conftest import GOLDEN, GOLDEN_DREAM

import fastdllm_triton as fdt
from fastdllm_triton import compat, ops

IDS = torch.tensor([[40, 41, 42, 43]])
LENGTHS = {"gen_length": 16, "block_length": 8}
NAN, INF = math.nan, math.inf

WORDS: list[Any] = ["x", b"4", [], {}, object()]
NO_INTEGER: list[Any] = [*WORDS, 1.5, NAN, INF, True, np.float32(2), np.array([1, 2])]
NO_COUNT: list[Any] = [*NO_INTEGER, 0, -1, -(2**70)]
NO_NUMBER: list[Any] = [*WORDS, True, NAN, INF, -INF]
NO_FLAG: list[Any] = ["no", "x", 2, None, []]


@dataclass(frozen=True)
class Attack:
    """Values that one argument must refuse.

    Attributes:
        call: makes the call with one keyword replaced.
        name: the argument.
        values: that it must refuse.
        told: how the message names it.
    """

    call: Callable[..., Any]
    name: str
    values: Sequence[Any]
    told: str


def _attacks(call: Callable[..., Any], arguments: dict[str, Sequence[Any]], **told: str) -> Iterator[Attack]:
    for name, values in arguments.items():
        yield Attack(call, name, values, told.get(name, name))


# ----------------------------------------------------------------------------------------------------------------------
# The calls. Each works as it is.


def load(**replaced: Any) -> Any:
    return fdt.load(**{"path_or_hub_id": "tiny", "device": "cpu", **replaced})


def generate(**replaced: Any) -> Any:
    return _tiny().generate(**{"prompts": IDS, **LENGTHS, **replaced})


def stream(**replaced: Any) -> Any:
    return next(iter(_tiny().stream(**{"prompts": IDS, **LENGTHS, **replaced})))


def encode(**replaced: Any) -> Any:
    return _tiny().encode(**{"text": "Tom has 51 coins.", **replaced})


def logits(**replaced: Any) -> Any:
    return _tiny().logits(**{"ids": IDS, **replaced})


def save(**replaced: Any) -> Any:
    return _tiny().save_pretrained(**replaced)


def fixed_steps(**replaced: Any) -> Any:
    return fdt.FixedSteps(**{"steps": 4, **replaced})


def threshold(**replaced: Any) -> Any:
    return fdt.Threshold(**replaced)


def factor(**replaced: Any) -> Any:
    return fdt.Factor(**replaced)


def entropy_budget(**replaced: Any) -> Any:
    return fdt.EntropyBudget(**{"gamma": 0.1, **replaced})


def accelerate(**replaced: Any) -> Any:
    return fdt.accelerate(**{"module": load_module(GOLDEN / "llada-gqa"), **replaced})


def dual(**replaced: Any) -> Any:
    return compat.generate_with_dual_cache(**{"model": _tiny(), "prompt": IDS, "steps": 16, **LENGTHS, **replaced})


def diffuse(**replaced: Any) -> Any:
    model = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")
    return compat.diffusion_generate(**{"model": model, "inputs": IDS, "max_new_tokens": 8, "steps": 8, **replaced})


def token_statistics(**replaced: Any) -> Any:
    return ops.token_statistics(**{"logits": torch.zeros(2, 8), **replaced})


def head_statistics(**replaced: Any) -> Any:
    return ops.head_statistics(**{"hidden": torch.zeros(2, 4), "weight": torch.zeros(8, 4), **replaced})


def rms_norm(**replaced: Any) -> Any:
    return ops.rms_norm(**{"x": torch.zeros(2, 4), "weight": torch.ones(4), "eps": 1e-5, **replaced})


def swiglu(**replaced: Any) -> Any:
    return ops.swiglu(**{"gate_up": torch.zeros(2, 8), **replaced})


def linear(**replaced: Any) -> Any:
    return ops.linear(**{"x": torch.zeros(2, 4), "weight": torch.zeros(8, 4), **replaced})


def window_attention(**replaced: Any) -> Any:
    start, end = torch.zeros(1, dtype=torch.int32), torch.full((1,), 8, dtype=torch.int32)
    tensors = {"q": torch.zeros(1, 4, 2, 16), "k_cache": torch.zeros(1, 2, 8, 16), "v_cache": torch.zeros(1, 2, 8, 16)}
    return ops.window_attention(**{**tensors, "kv_start": start, "kv_end": end, **replaced})


def rope_kv_write(**replaced: Any) -> Any:
    start, caches = torch.zeros(1, dtype=torch.int32), {name: torch.zeros(1, 2, 8, 16) for name in ("k_cache", "v_cache")}
    norms = {"q_norm": torch.ones(16), "k_norm": torch.ones(16), "eps": 1e-6}
    arguments = {"qkv": torch.zeros(1, 4, 128), **caches, "window_start": start, "kv_start": start, "theta": 1e4, **norms}
    return ops.rope_kv_write(**{**arguments, **replaced})


_MODELS: dict[str, fdt.MaskedDiffusionLM] = {}


def _tiny() -> fdt.MaskedDiffusionLM:
    if not _MODELS:
        _MODELS["tiny"] = fdt.load("tiny", device="cpu")
    return _MODELS["tiny"]


# ----------------------------------------------------------------------------------------------------------------------

SURROGATE = "Tom \ud800 has"
OPTIONS: dict[str, Sequence[Any]] = {
    "gen_length": [*NO_COUNT, None, 17],
    "block_length": [*NO_COUNT, None, 3],
    "cache": ["", "Dual", None, 1, ["dual"], True],
    "strategy": ["threshold", 0.9, None, fdt.Threshold],
    "temperature": [*NO_NUMBER, -1, None],
    "seed": [*WORDS[:2], {}, object(), 1.5, NAN, True, None, 2**63, -(2**63) - 1, [1, 2]],
    "stop_at_eos": NO_FLAG,
    "lockstep": NO_FLAG,
    "eos_ids": ["x", 1.5, [-1], [10**9], [1.5], [True], [None]],
    "forbidden": ["x", 1.5, None, [-1], [10**9], [1.5], [True], ["a"]],
    "mask_id": [*NO_INTEGER, -1, 10**9],
    "refresh_every": NO_COUNT,
    "prompt_refresh": NO_COUNT,
    "suffix_window": [*NO_INTEGER, -1],
    "look_back": [*NO_INTEGER, None, -1],
    "look_ahead": [*NO_INTEGER, None, -1],
    "refresh_commits": ["x", None, 1],
    "logits_dtype": ["float32", torch.int32, 1],
}
PROMPTS: list[Any] = [
    None,
    5,
    1.5,
    object(),
    {},
    b"text",
    bytearray(b"text"),
    [],
    [[]],
    [1, 2],
    [[True]],
    [[1.5]],
    [["a", "b"]],
    [[None]],
    [None],
    [b"x"],
    [[-1]],
    [[10**9]],
    [[40], []],
    [[40] * 10_000],
    IDS.float(),
    IDS.bool(),
    IDS[0],
    IDS[None],
    IDS - 100,
    IDS[:, :0],
    np.array([1.5, 2.5]),
    np.array("x"),
    "",
    [""],
    SURROGATE,
]

ATTACKS = [
    *_attacks(
        load,
        {
            "path_or_hub_id": [None, 5, "", "nosuch", "/proc/nosuch", b"tiny", ["tiny"]],
            "device": ["x", "", 1.5, "meta", "cuda:99", "mps", []],
            "dtype": ["x", "", "int8", torch.int8, torch.complex64, 5, [], "float8_e4m3fn"],
            "backend": ["x", "", None, 1, "Triton"],
            "batch_invariant": NO_FLAG,
        },
    ),
    *_attacks(
        generate,
        {
            "prompts": PROMPTS,
            "config": [5, "x", {}, object()],
            **OPTIONS,
            "callback": [5, "x"],
            "trace": ["x.pdf", 5, "/proc/nosuch/x.html", "", b"x.html"],
        },
    ),
    *_attacks(generate, {"nosuch": [1]}),
    *_attacks(stream, {"prompts": PROMPTS[:12], "gen_length": NO_COUNT[:3], "seed": [None, "x"]}),
    *_attacks(encode, {"text": [None, 5, b"x", [5], [{}], [{"role": "user"}], [None]], "chat": [True, "x"]}),
    *_attacks(
        logits,
        {
            "ids": [
                None,
                5,
                "x",
                IDS[0],
                IDS.float(),
                IDS.bool(),
                IDS - 100,
                IDS + 10**6,
                torch.zeros(1, 10_000, dtype=torch.int64),
                [[1.5]],
            ]
        },
    ),
    *_attacks(save, {"folder": [None, 5, "/proc/nosuch", ""]}),
    *_attacks(fixed_steps, {"steps": [*NO_COUNT, None], "score": ["x", None, 1, []]}),
    *_attacks(threshold, {"t": [*NO_NUMBER, None, 0, -1, 1.5], "score": ["x", "neg_entropy"]}, t="threshold"),
    *_attacks(factor, {"f": [*NO_NUMBER, None, 0, -1], "score": ["x", "neg_entropy"]}, f="factor"),
    *_attacks(entropy_budget, {"gamma": [*NO_NUMBER, None, -1], "score": ["x", "random"]}),
    *_attacks(
        accelerate,
        {
            "module": [None, 5, "tiny", torch.nn.Linear(2, 2), torch.nn.Module()],
            "backend": ["x", None],
            "attention": NO_FLAG,
            "strict": NO_FLAG,
            "weights": ["int8"],
        },
    ),
    *_attacks(
        dual,
        {
            "model": [None, 5, "tiny"],
            "prompt": [None, "x", IDS.float(), IDS[0], IDS - 100],
            "steps": NO_COUNT,
            "remasking": ["x", None],
            "threshold": NO_NUMBER,
            "factor": NO_NUMBER,
            "temperature": [*NO_NUMBER, -1],
            "mask_id": [-1, 10**9],
        },
    ),
    *_attacks(
        diffuse,
        {
            "model": [None, 5, _tiny],
            "inputs": [None, "x", IDS.float(), IDS[0], IDS - 100, IDS[:, :0]],
            "max_new_tokens": [*NO_COUNT, 10**9],
            "steps": NO_COUNT,
            "eps": [*NO_NUMBER, 0, 1],
            "alg": ["x", 1],
            "temperature": [*NO_NUMBER, -1],
            "top_p": [*NO_NUMBER, -1, 1.5],
            "top_k": [*WORDS, NAN, INF, True, 0, -1, 1.5],
            "cache": ["x", 1],
            "attention_mask": [5, "x", torch.ones(1, 2), torch.zeros_like(IDS)],
            "num_return_sequences": NO_COUNT,
            "seed": ["x", 1.5, True],
        },
    ),
    *_attacks(
        token_statistics,
        {
            "logits": [None, torch.zeros(8), torch.zeros(1, 2, 8), torch.zeros(2, 0), torch.zeros(2, 8, dtype=torch.int64)],
            "temperature": [-1, NAN, "x"],
            "forbidden": [[8], [-1], [1.5]],
        },
    ),
    *_attacks(
        head_statistics,
        {
            "hidden": [torch.zeros(4), torch.zeros(2, 4).int()],
            "weight": [torch.zeros(8), torch.zeros(8, 3), torch.zeros(0, 4)],
            "forbidden": [[8], [-1]],
        },
    ),
    *_attacks(rms_norm, {"x": [torch.zeros(())], "weight": [torch.ones(3), torch.ones(2, 4)]}),
    *_attacks(swiglu, {"gate_up": [torch.zeros(2, 7), torch.zeros(())]}),
    *_attacks(linear, {"x": [torch.zeros(())], "weight": [torch.zeros(8, 3), torch.zeros(4)]}),
    *_attacks(
        window_attention,
        {
            "q": [torch.zeros(1, 4, 3, 16), torch.zeros(4, 2, 16)],
            "k_cache": [torch.zeros(1, 2, 8, 8), torch.zeros(2, 8, 16)],
            "kv_start": [torch.zeros(2, dtype=torch.int32)],
            "block_causal": [4, (4,), (torch.zeros(1, dtype=torch.int32), 0), (torch.zeros(1), 4), (None, 4), (IDS, 4)],
        },
    ),
    *_attacks(
        rope_kv_write,
        {
            "q_norm": [None, torch.ones(8), torch.ones(16).half(), 1.0],
            "k_norm": [None, torch.ones(16, 1)],
            "eps": [None, -1, NAN, "x"],
            "norm_rounding": ["llada", None, 1],
        },
    ),
]

CALLS = [(attack, value) for attack in ATTACKS for value in attack.values]


def _label(value: Any) -> str:
    attack, bad = value
    text = (
        type(bad).__name__
        if type(bad) is object
        else repr(bad)
        if not isinstance(bad, torch.Tensor)
        else f"{bad.dtype}{list(bad.shape)}"
    )
    return f"{attack.call.__name__}-{attack.name}-{text[:24]}".encode("ascii", "backslashreplace").decode()


def _refuses(attack: Attack, value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError)) as caught:
        attack.call(**{attack.name: value})
    message = str(caught.value)
    assert attack.told in message, f"{attack.call.__name__}({attack.name}={value!r}): {type(caught.value).__name__}: {message}"
    assert "\n" not in message.strip()
    assert not list(folder.iterdir()), "something was left behind"


@pytest.mark.parametrize("call", CALLS[::12], ids=map(_label, CALLS[::12]))
def test_a_bad_argument_is_named(call: tuple[Attack, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuses(*call, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=map(_label, CALLS))
def test_every_bad_argument_is_named(call: tuple[Attack, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuses(*call, tmp_path, monkeypatch)


def test_each_call_of_the_table_works_as_it_is(tmp_path: Path) -> None:
    for call in dict.fromkeys(attack.call for attack in ATTACKS):
        call(**({"folder": tmp_path / "saved"} if call is save else {}))
