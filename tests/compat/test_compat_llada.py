"""ML-GSAI's and d1's ``generate``: their signatures, and their tokens as a plain loop finds them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from _modules import load_module
from _plain_loop import decode
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton.compat import d1, llada

REQUIRED = inspect.Parameter.empty
PROMPT = torch.tensor([[3, 1, 4, 7], [1, 5, 9, 2]])
LM = fdt.load(GOLDEN / "llada-gqa", device="cpu")
MASK = LM.config.mask_id


def test_the_signature_is_ml_gsais() -> None:
    assert {name: p.default for name, p in inspect.signature(llada.generate).parameters.items()} == {
        "model": REQUIRED,
        "prompt": REQUIRED,
        "attention_mask": None,
        "steps": 128,
        "gen_length": 128,
        "block_length": 128,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "mask_id": None,
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }


def test_the_signature_is_d1s() -> None:
    assert {name: p.default for name, p in inspect.signature(d1.generate).parameters.items()} == {
        "model": REQUIRED,
        "prompt": REQUIRED,
        "tokenizer": REQUIRED,
        "steps": 64,
        "gen_length": 128,
        "block_length": 32,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "mask_id": None,
    }


def plain(steps: int, prompt: list[int], **options: Any) -> list[int]:
    """What a plain loop makes of one row, blocks of 8."""
    return decode(LM, prompt, [MASK] * 16, 8, fdt.FixedSteps(steps), **options).x


@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
@pytest.mark.parametrize("steps", [6, 32])
@pytest.mark.parametrize("as_module", [False, True])
def test_the_tokens_are_those_of_a_plain_loop(cfg_scale: float, steps: int, as_module: bool) -> None:
    model: Any = LM
    if as_module:
        model = load_module(GOLDEN / "llada-gqa")
        fdt.accelerate(model)
    x = llada.generate(model, PROMPT, None, steps, 16, 8, 0.0, cfg_scale, "low_confidence", MASK)
    assert x.tolist() == [plain(steps, row, cfg_scale=cfg_scale) for row in PROMPT.tolist()]
    y = d1.generate(model, PROMPT, None, steps + 1, 16, 8, 0.0, cfg_scale, "low_confidence", MASK)
    assert y.tolist() == x.tolist()  # Steps that do not divide are those of each block, rounded down.


def test_d1_takes_fewer_steps_than_blocks() -> None:
    x = d1.generate(LM, PROMPT, None, steps=1, gen_length=16, block_length=8)
    assert x.tolist() == [plain(2, row) for row in PROMPT.tolist()]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_padding_is_kept_and_not_seen(cfg_scale: float) -> None:
    prompt = torch.tensor([[9, 9, 3, 1], [1, 5, 9, 2], [200, 200, 200, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    x = llada.generate(LM, prompt, mask, 8, 16, 8, 0.0, cfg_scale)
    assert torch.equal(x[:, :4], prompt)
    for row, padding in zip(range(3), (2, 0, 3), strict=True):
        assert x[row, padding:].tolist() == plain(8, prompt[row, padding:].tolist(), cfg_scale=cfg_scale)


@pytest.mark.parametrize("never", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_end_tokens_never_or_last(monkeypatch: pytest.MonkeyPatch, never: bool, last: bool) -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    free = llada.generate(lm, PROMPT, None, 16, 16, 8)[:, 4:]
    common = free.unique(return_counts=True)
    eos, turn = common[0][common[1].argsort(descending=True)[:2]].tolist()  # The second stands for <|eot_id|>.
    object.__setattr__(lm.config, "eos_ids", (eos,))
    monkeypatch.setattr(llada, "_END_OF_TURN", turn)
    options = {"never": (eos,) if never else (), "last": (eos, turn) if last else ()}
    want = [decode(lm, row, [MASK] * 16, 8, fdt.FixedSteps(16), **options) for row in PROMPT.tolist()]
    x = llada.generate(lm, PROMPT, None, 16, 16, 8, logits_eos_inf=never, confidence_eos_eot_inf=last)
    assert x.tolist() == [row.x for row in want]
    assert torch.equal(x[:, 4:], free) is not (never or last)
    assert not (never and eos in x[:, 4:])


def test_random_remasking_knows_no_last_tokens() -> None:
    draws = []
    for flag in (False, True):
        torch.manual_seed(3)
        draws.append(llada.generate(LM, PROMPT, None, 8, 16, 8, remasking="random", confidence_eos_eot_inf=flag).tolist())
    assert draws[0] == draws[1]


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"temperature": 2.0, "cfg_scale": 0.5}, {"remasking": "random"}])
def test_draws_follow_the_global_seed(options: dict[str, Any]) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return llada.generate(LM, PROMPT, None, 8, 16, 8, **options).tolist()

    assert draw(0) == draw(0) != draw(1)


def test_guidance_below_zero_is_none() -> None:
    x, y = (llada.generate(LM, PROMPT, None, 8, 16, 8, cfg_scale=scale) for scale in (-1.0, 0.0))
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "steps must be a multiple"),
        ({"gen_length": 20}, "gen_length must be a multiple"),
        ({"cfg_scale": "x"}, "cfg_scale must be 0 or more, got 'x'"),
        ({"temperature": "x"}, "temperature must be 0 or more, got 'x'"),
        ({"remasking": "high"}, "remasking must be one of low_confidence, random, got 'high'"),
        ({"prompt": [[1, 2]]}, "prompt must be a tensor of integers"),
        ({"prompt": torch.tensor([[320]])}, "prompt holds token id 320"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have the shape of prompt, \[2, 4\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1]] * 2)}, "attention_mask: row 0 has padding after a token"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": LM, "prompt": PROMPT, "steps": 16, "gen_length": 16, "block_length": 8, **options}
    with pytest.raises(ValueError, match=message):
        llada.generate(**arguments)


def test_flags_of_the_end_token_need_one() -> None:
    lm = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    object.__setattr__(lm.config, "eos_ids", ())
    with pytest.raises(ValueError, match="logits_eos_inf needs an end token"):
        llada.generate(lm, PROMPT, None, 16, 16, 8, logits_eos_inf=True)


@pytest.mark.parametrize("options", [{"block_length": 0}, {"block_length": 0.5}, {"steps": None}, {"block_length": 32}])
def test_d1_names_what_is_no_length(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}|gen_length must be a multiple of block_length"):
        d1.generate(LM, PROMPT, None, **{"gen_length": 16, "block_length": 8, **options})
