"""Official scripts after their switch: the modules they hold, patched as they patch them, and the calls they make."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _modules import GENERATION_FIELDS, Wrapper, load_module, mixin, put_mixin
from conftest import GOLDEN, GOLDEN_DREAM
from torch import Tensor, nn

import fastdllm_triton as fdt
from fastdllm_triton import compat
from fastdllm_triton.engine.dream.config import DiffusionOutput

MASK = 318
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
CALLS = [json.loads(line) for line in (GOLDEN / GOLDEN_DREAM / "calls.jsonl").read_text().splitlines()]
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "steps": 8, "alg": "entropy", "temperature": 0.0}

PLAIN, BLOCK = mixin("generation_utils"), mixin("generation_utils_block")


def dream_module(**config: Any) -> Any:
    """A Dream of the official class's shape, with its plain mixin; fields of its config that decide a generation replaced."""
    module = load_module(GOLDEN / GOLDEN_DREAM)
    for name in GENERATION_FIELDS:
        vars(module.config).pop(name, None)
    vars(module.config).update(config)
    module.__class__ = type("DreamModel", (PLAIN, type(module)), {})
    return module


def loaded(tmp_path: Path, **config: Any) -> fdt.MaskedDiffusionLM:
    """The same Dream from a folder, as the hub has it: without what transformers adds to a config."""
    raw = json.loads((GOLDEN / GOLDEN_DREAM / "config.json").read_text())
    raw = {name: value for name, value in raw.items() if name not in GENERATION_FIELDS} | config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / GOLDEN_DREAM / "model.safetensors").read_bytes())
    return fdt.load(tmp_path, device="cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Recorded calls.


def _hooks(name: str, calls: list[Any]) -> dict[str, Callable[..., Tensor]]:
    """The hooks of the recording: one that looks, one that pins tokens, one that masks again, one that bans tokens."""

    def tokens(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        if name in ("pin", "both"):
            x[0, -2:] = torch.tensor([7, 9])
        if name == "remask" and step == 2:
            x = x.clone()
            x[0, -3] = MASK
        calls.append([step, x.tolist(), None if logits is None else logits.argmax(-1).tolist()])
        return x

    def logits(step: int, x: Tensor, logits: Tensor) -> Tensor:
        if name == "both":
            logits[..., 100:] = -1e30
            return logits
        logits = logits.clone()
        logits[..., :200] = torch.finfo(logits.dtype).min
        return logits

    hooks: dict[str, Callable[..., Tensor]] = {}
    if name != "ban":
        hooks["generation_tokens_hook_func"] = tokens
    if name in ("ban", "both"):
        hooks["generation_logits_hook_func"] = logits
    return hooks


def _dream_config(fields: dict[str, Any]) -> object:
    """A ``DreamGenerationConfig`` with some fields set: the others have that class's defaults."""
    names = ("top_p", "top_k", "max_new_tokens", "alg_temp", "mask_token_id", "eos_token_id")
    defaults = {"temperature": 0.0, "max_length": 20, "eps": 1e-3, "steps": 512, "alg": "origin", "num_return_sequences": 1}
    return SimpleNamespace(**{**dict.fromkeys(names), **defaults, **fields})


def _replay(model: Any, case: dict[str, Any], **options: Any) -> None:
    calls: list[Any] = []
    arguments = {**case["kwargs"], **(_hooks(case["hook"], calls) if "hook" in case else {}), **options}
    if "attention_mask" in case:
        arguments["attention_mask"] = torch.tensor(case["attention_mask"])
    config = _dream_config(case["generation_config"]) if "generation_config" in case else None
    arguments |= {"return_dict_in_generate": True, "output_history": True}
    out = compat.diffusion_generate(model, torch.tensor(case["inputs"]), config, **arguments)
    assert isinstance(out, DiffusionOutput)
    assert out.history is not None
    assert out.sequences.tolist() == case["sequences"], case
    assert out.nfe == case["nfe"] == len(out.history), case
    assert calls == case.get("calls", []), case


@pytest.mark.parametrize("case", CALLS, ids=lambda case: f"{case['mixin']}-{case.get('hook')}-{case['kwargs']}")
def test_a_module_gives_what_the_official_code_gave_for_the_same_call(case: dict[str, Any]) -> None:
    module = dream_module(**case.get("config", {}))
    if case["mixin"] == "generation_utils_block":
        put_mixin(module, BLOCK)
    _replay(module, case)


@pytest.mark.parametrize("case", [c for c in CALLS if "dual_cache" not in c["kwargs"]], ids=lambda case: str(case["kwargs"]))
def test_a_loaded_model_has_the_same_defaults(case: dict[str, Any], tmp_path: Path) -> None:
    block = case["mixin"] == "generation_utils_block"
    _replay(loaded(tmp_path, **case.get("config", {})), case, **({"use_cache": True} if block else {}))


# ----------------------------------------------------------------------------------------------------------------------
# One line: a module that nobody accelerated.


def test_the_functions_accelerate_a_module_on_first_use_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module, expected = load_module(GOLDEN / "llada-gqa"), fdt.load(GOLDEN / "llada-gqa", device="cpu")
    arguments: dict[str, Any] = {"steps": 8, "gen_length": 16, "block_length": 8, "threshold": 0.5}
    for call in (compat.generate_with_dual_cache, compat.generate_with_prefix_cache, compat.generate):
        x, nfe = call(module, PROMPT, **arguments)
        y, expected_nfe = call(expected, PROMPT, **arguments)
        assert torch.equal(x, y)
        assert nfe == expected_nfe
    assert [(record.name, record.levelname) for record in caplog.records] == [("fastdllm_triton", "WARNING")]
    message = caplog.messages[0]
    assert message.startswith("LLaDA is accelerated on first use (attention, norms, head on cpu: ")
    assert "restore(model) undoes it" in message
    assert "\n" not in message
    fdt.restore(module)
    assert not hasattr(module, "fast_forward")


def test_a_module_that_was_accelerated_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module = dream_module()
    fdt.accelerate(module, backend="reference", head=False)
    compat.diffusion_generate(module, PROMPT, **GREEDY)
    assert not caplog.records
    assert fdt.integrations.transformers.accelerated_of(module).options.plain == ("head",)


def test_threads_that_begin_together_accelerate_once(caplog: pytest.LogCaptureFixture) -> None:
    module, results = dream_module(), []
    expected = compat.diffusion_generate(fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu"), PROMPT, top_k=50, **GREEDY)
    threads = [Thread(target=lambda: results.append(compat.diffusion_generate(module, PROMPT, **GREEDY))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(x, expected) for x in results)
    assert len(caplog.records) == 1


def test_a_first_use_in_inference_mode_leaves_parameters_that_can_be_trained() -> None:
    """As ``llada/generate.py`` calls it."""
    module = load_module(GOLDEN / "llada-gqa")
    with torch.inference_mode():
        x, _ = compat.generate_with_dual_cache(module, PROMPT, steps=8, gen_length=8, block_length=8)
    for _ in range(2):  # accelerated, then restored
        module(x.clone()).logits.square().mean().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        with torch.inference_mode():
            fdt.restore(module)


def _wrong_config(module: nn.Module) -> None:
    module.config.rope_scaling = {"rope_type": "yarn"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_wrong_config, r"rope_scaling of type 'yarn' is not supported"),
        (lambda module: module.to(torch.float16), r"float16 is not supported on cpu"),
        (lambda module: delattr(module, "config"), r"module.config is missing"),
    ],
)
def test_what_accelerate_refuses_the_functions_refuse_likewise(edit: Any, message: str) -> None:
    for name, call in (("llada-gqa", compat.generate), (GOLDEN_DREAM, compat.diffusion_generate)):
        module = load_module(GOLDEN / name)
        edit(module)
        before = sorted(vars(module))
        with pytest.raises(ValueError, match=message) as refused:
            fdt.accelerate(module)
        with pytest.raises(ValueError, match=message) as told:
            call(module, PROMPT)
        assert str(told.value) == str(refused.value)
        assert sorted(vars(module)) == before


@pytest.mark.parametrize("model", ["GSAI-ML/LLaDA-8B-Instruct", None, SimpleNamespace()])
def test_what_is_no_module_is_no_model(model: Any) -> None:
    for call in (compat.generate, compat.diffusion_generate):
        with pytest.raises(
            TypeError,
            match=r"model must come from fastdllm_triton.load, or be a loaded LLaDA, Dream, Fast-dLLM v2 or SDAR module",
        ):
            call(model, PROMPT)


def test_a_llada_module_is_no_dream() -> None:
    with pytest.raises(TypeError, match=r"model must be a Dream for diffusion_generate, got a llada"):
        compat.diffusion_generate(load_module(GOLDEN / "llada-gqa"), PROMPT)


# ----------------------------------------------------------------------------------------------------------------------
# The mixin decides the cache.


def _decode(model: Any, **options: Any) -> list[list[int]]:
    arguments = {**GREEDY, "max_new_tokens": 32, "steps": 16, "return_dict_in_generate": True, "output_history": True}
    out = compat.diffusion_generate(model, PROMPT, **{**arguments, "block_length": 16, **options})
    assert isinstance(out, DiffusionOutput)
    assert out.history is not None
    return [x[0].tolist() for x in out.history]


@pytest.fixture(scope="module")
def by_cache() -> dict[str, list[list[int]]]:
    """What each cache makes of one call."""
    model = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")
    histories = {cache: _decode(model, cache=cache) for cache in ("none", "prefix", "dual")}
    assert len({str(history) for history in histories.values()}) == 3
    return histories


def _in_the_class(module: Any) -> None:
    module.__class__ = type("DreamModel", (BLOCK, type(module)), {})


@pytest.mark.parametrize("place", [lambda module: put_mixin(module, BLOCK), _in_the_class])
@pytest.mark.parametrize("wrap", [lambda module: module, Wrapper])
def test_the_block_mixin_is_the_prefix_cache_and_with_dual_cache_the_dual_one(place: Any, wrap: Any, by_cache: Any) -> None:
    module = dream_module()
    assert _decode(wrap(module)) == by_cache["none"]
    fdt.restore(module)
    place(module)
    model = wrap(module)
    assert _decode(model) == _decode(model, dual_cache=False) == _decode(model, use_cache=True) == by_cache["prefix"]
    assert _decode(model, dual_cache=True) == by_cache["dual"]
    assert _decode(model, cache="none") == by_cache["none"]


def test_a_mixin_that_comes_after_accelerate_decides_too(by_cache: Any) -> None:
    module = dream_module()
    fdt.accelerate(module)
    for source, cache in ((BLOCK, "prefix"), (PLAIN, "none"), (BLOCK, "prefix")):
        put_mixin(module, source)
        assert _decode(module) == by_cache[cache]
        fdt.accelerate(module)
        assert _decode(module) == by_cache[cache]


def test_a_replaced_diffusion_generate_says_once_that_the_official_code_runs() -> None:
    module = dream_module()
    fdt.accelerate(module)
    put_mixin(module, BLOCK)
    with pytest.warns(
        UserWarning, match=r"diffusion_generate of this DreamModel was replaced after accelerate: .*_block runs, not"
    ):
        assert module.diffusion_generate(PROMPT) == "prepared by generation_utils, decoded by generation_utils_block"
    with warnings.catch_warnings(action="error"):
        module.diffusion_generate(PROMPT)
        fdt.accelerate(module)
        assert isinstance(module.diffusion_generate(PROMPT, block_length=16, **GREEDY), Tensor)
        type(module).diffusion_generate(module, PROMPT)  # called by its name, it is what was meant


def test_restore_gives_back_what_stood_there_last() -> None:
    module = dream_module()
    before = sorted(vars(module))
    fdt.accelerate(module)
    put_mixin(module, BLOCK)
    fdt.accelerate(module)
    fdt.restore(module)
    assert module.diffusion_generate(PROMPT) == "prepared by generation_utils, decoded by generation_utils_block"
    fdt.accelerate(module)
    put_mixin(module, PLAIN)
    fdt.restore(module)
    assert module.diffusion_generate(PROMPT) == "prepared by generation_utils, decoded by generation_utils"
    del module.diffusion_generate, module._sample
    assert sorted(vars(module)) == before


# ----------------------------------------------------------------------------------------------------------------------
# Calls of the scripts, each on a module as the script holds it, against the same call on a module that nobody patched.


def test_dreams_eval_py_accelerated_after_its_patch(by_cache: Any) -> None:
    """``dream/eval.py``: made with the block mixin, patched again before the requests."""
    for use_cache, dual_cache, cache in ((False, False, "none"), (True, False, "prefix"), (True, True, "dual")):
        module = dream_module()
        put_mixin(module, BLOCK)
        put_mixin(module, BLOCK if use_cache else PLAIN)
        fdt.accelerate(module)  # the line that is added
        inputs = torch.tensor([[316, 316, *PROMPT[0].tolist()]])
        out = module.diffusion_generate(
            inputs,
            attention_mask=inputs.ne(316),
            max_new_tokens=32,
            output_history=False,
            return_dict_in_generate=True,
            steps=16,
            temperature=0.0,
            top_p=None,
            top_k=None,
            alg="entropy",
            alg_temp=0.0,
            threshold=0.9,
            dual_cache=dual_cache,
        )
        expected = compat.diffusion_generate(
            fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu"), PROMPT, max_new_tokens=32, steps=16, alg="entropy", **_all(cache)
        )
        assert out.sequences[:, 2:].tolist() == expected.tolist()
        assert out.history is None


def _all(cache: str) -> dict[str, Any]:
    return {"temperature": 0.0, "top_k": None, "cache": cache}


@pytest.mark.parametrize("answer", ["y", "n"])
def test_dreams_multiturn_demo(answer: str) -> None:
    module = dream_module()
    if answer == "y":
        put_mixin(module, BLOCK)
    fdt.accelerate(module)  # the line that is added
    for turn in (PROMPT, torch.cat((PROMPT, PROMPT), dim=1)):
        options: dict[str, Any] = {"max_new_tokens": 16, "steps": 16, "alg": "entropy", "block_length": 8}
        greedy: dict[str, Any] = {"temperature": 0.0, "top_p": None, "top_k": None}
        torch.manual_seed(0)
        out = module.diffusion_generate(
            turn,
            attention_mask=torch.ones_like(turn),
            output_history=True,
            return_dict_in_generate=True,
            alg_temp=0.1,
            **options,
            **greedy,
        )
        torch.manual_seed(0)
        model = fdt.load(GOLDEN / GOLDEN_DREAM, device="cpu")
        expected = compat.diffusion_generate(
            model, turn, alg_temp=0.1, cache="prefix" if answer == "y" else "none", **options, **greedy
        )
        assert out.sequences.tolist() == expected.tolist()


def test_the_demos_of_dreams_authors_sample_from_fifty_tokens() -> None:
    """``demo_completion.py``, ``demo_batch_completion.py``, DiffuCoder's ``inference_demo.py``: no ``top_k``, left padding."""
    module = dream_module()
    fdt.accelerate(module)  # the line that is added
    inputs, mask = torch.tensor([[316, 316, 3, 1], [4, 1, 5, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 16,
        "output_history": True,
        "return_dict_in_generate": True,
        "steps": 16,
        "temperature": 0.2,
        "top_p": 0.95,
        "alg": "entropy",
        "alg_temp": 0.0,
    }
    torch.manual_seed(3)
    out = module.diffusion_generate(inputs, **call)
    assert len(out.history) == 16
    torch.manual_seed(3)
    assert torch.equal(out.sequences, module.diffusion_generate(inputs, top_k=50, **call).sequences)


def test_the_token_control_demo_and_the_app_see_every_step() -> None:
    module, end, states = dream_module(), torch.tensor([7, 9, 11]), []
    fdt.accelerate(module)  # the line that is added

    def generation_tokens_hook_func(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        x[0, -len(end) :] = end
        states.append(x[0].clone().cpu())
        return x

    torch.manual_seed(0)
    out = module.diffusion_generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=16,
        output_history=True,
        return_dict_in_generate=True,
        steps=16,
        temperature=0.6,
        top_p=0.95,
        alg="origin",
        generation_tokens_hook_func=generation_tokens_hook_func,
    )
    assert len(states) == 17
    assert len(out.history) == 16
    assert all(torch.equal(state[-3:], end) for state in (*states, *(x[0] for x in out.history)))
    assert (out.sequences != MASK).all()


def test_fast_dllms_llada_scripts_need_no_accelerate() -> None:
    """``llada/generate.py``, ``chat.py`` and ``eval_llada.py``: the import is the one line."""
    module, options = load_module(GOLDEN / "llada-gqa"), {"mask_id": MASK, "threshold": 0.5}
    prompts = torch.tensor([[316, 316, 3, 1], [4, 1, 5, 9]])  # pads are attended, as by the official code
    x, nfe = compat.generate_with_dual_cache(
        module, prompts, steps=16, gen_length=16, block_length=8, temperature=0.0, remasking="low_confidence", **options
    )
    y, again = compat.generate_with_dual_cache(fdt.load(GOLDEN / "llada-gqa", device="cpu"), prompts, 16, 16, 8, **options)
    assert torch.equal(x, y)
    assert nfe == again
