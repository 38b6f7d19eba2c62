"""Swap-in: the same tokens as ``load``, no second copy of anything, changes of the weights seen, everything undone on request."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _modules import LoRA, Wrapper, load_module
from conftest import GOLDEN, GOLDEN_DREAM, GOLDEN_MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import profile, record_function

import fastdllm_triton as fdt
from fastdllm_triton import compat, tiny
from fastdllm_triton.integrations.transformers import fuse, runtime_of
from fastdllm_triton.ops import NAMES as OPS
from fastdllm_triton.ops import PARTS

ALL = (*GOLDEN_MODELS, GOLDEN_DREAM)
IDS = torch.tensor([[3, 1, 4, 1, 5, 318, 318, 318], [2, 7, 1, 8, 2, 8, 318, 318]])
SHORT: dict[str, Any] = {"gen_length": 16, "block_length": 8}


@pytest.fixture(params=ALL)
def module(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the recorded checkpoints as a module."""
    return load_module(GOLDEN / request.param)


@pytest.fixture
def llada_module() -> nn.Module:
    return load_module(GOLDEN / "llada-gqa")


def projections(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first layer's q and v projections."""
    if hasattr(module.model, "layers"):
        attention = module.model.layers[0].self_attn
        return attention.q_proj, attention.v_proj
    block = module.model.transformer["blocks"][0]
    return block.q_proj, block.v_proj


@torch.no_grad()
def own(module: nn.Module) -> Tensor:
    return module(IDS).logits


def storages(module: nn.Module) -> dict[int, int]:
    """The memory behind a module's parameters: address and bytes."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}


def snapshot(module: object) -> Any:
    """Everything that must not change when a module is refused."""
    if not isinstance(module, nn.Module):
        return None
    attributes = [(name, sorted(vars(m))) for name, m in module.named_modules()]
    return attributes, [(name, p.data_ptr(), id(p), p.shape, p._version) for name, p in module.state_dict(keep_vars=True).items()]


# ----------------------------------------------------------------------------------------------------------------------
# The same tokens.


def _cases(model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / model / "cases.jsonl").read_text().splitlines()]


def _selection(model: str, key: Callable[[dict[str, Any]], tuple[str, str]], each: int) -> list[dict[str, Any]]:
    """Some cases of every kind."""
    groups = (list(cases) for _, cases in groupby(sorted(_cases(model), key=key), key=key))
    return [case for cases in groups for case in cases[:: max(len(cases) // each, 1)]]


@pytest.mark.parametrize("model", GOLDEN_MODELS)
def test_the_official_functions_give_a_module_the_recorded_trajectories(model: str) -> None:
    module = load_module(GOLDEN / model)
    fdt.accelerate(module)
    functions = {"none": compat.generate, "prefix": compat.generate_with_prefix_cache, "dual": compat.generate_with_dual_cache}
    for case in _selection(model, lambda case: (case["cache"], case["strategy"]), 4):
        kind, value, gen, block = (case[name] for name in ("strategy", "value", "gen_length", "block_length"))
        steps = value if kind == "fixed" else gen
        threshold, factor = (value if kind == name else None for name in ("threshold", "factor"))
        arguments = (torch.tensor(case["prompt"]), steps, gen, block, 0.0, "low_confidence", 318, threshold, factor)
        x, nfe = functions[case["cache"]](module, *arguments)
        assert x.tolist() == [row + tokens for row, tokens in zip(case["prompt"], case["tokens"], strict=True)], case
        assert nfe == case["nfe"], case


def test_diffusion_generate_gives_a_module_the_recorded_trajectories() -> None:
    module = load_module(GOLDEN / GOLDEN_DREAM)
    fdt.accelerate(module)
    for case in _selection(GOLDEN_DREAM, lambda case: (case["cache"], case["alg"]), 2):
        options = {name: case[name] for name in ("max_new_tokens", "steps", "alg", "cache")}
        options |= {name: case[name] for name in ("threshold", "block_length") if case[name] is not None}
        options |= {"temperature": 0.0, "top_k": None}
        out = module.diffusion_generate(torch.tensor([case["prompt"]]), return_dict_in_generate=True, **options)
        assert out.sequences.tolist() == [case["prompt"] + case["tokens"]], case
        assert out.nfe == case["nfe"], case
        assert torch.equal(compat.diffusion_generate(module, torch.tensor([case["prompt"]]), **options), out.sequences)


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none", "strategy": fdt.FixedSteps(8)},
        {"cache": "prefix", "strategy": fdt.Factor(1.0)},
        {"cache": "dual", "strategy": fdt.Threshold(0.5), "temperature": 1.0, "seed": 3},
    ],
    ids=lambda options: options["cache"],
)
def test_generate_is_that_of_a_loaded_model(model: str, options: dict[str, Any]) -> None:
    module = load_module(GOLDEN / model)
    fdt.accelerate(module)
    got, expected = (
        m.generate([[3, 1, 4], [1, 5]], **SHORT, **options) for m in (module, fdt.load(GOLDEN / model, device="cpu"))
    )
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.step_map, expected.step_map)
    assert (got.refreshes, got.steps) == (expected.refreshes, expected.steps)


@pytest.mark.parametrize("model", ALL)
def test_fast_forward_gives_the_recorded_logits(model: str) -> None:
    module = load_module(GOLDEN / model)
    fdt.accelerate(module)
    data = load_file(GOLDEN / model / "logits.safetensors")
    logits = module.fast_forward(data["input_ids"])
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-5)
    assert not logits.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# One copy of everything.


def test_parameters_become_views_of_the_fused_tensors(module: nn.Module) -> None:
    bytes_before, before = sum(storages(module).values()), {name: p.clone() for name, p in module.state_dict().items()}
    identities = {name: id(p) for name, p in module.named_parameters()}
    report = fdt.accelerate(module)
    layer = runtime_of(module).network.weights.layers[0]
    for projection, first_row in zip(
        projections(module), (0, len(layer.qkv.weight) - len(projections(module)[1].weight)), strict=True
    ):
        assert projection.weight.data_ptr() == layer.qkv.weight[first_row].data_ptr()
        assert projection.bias is None or projection.bias.data_ptr() == layer.qkv_bias[first_row:].data_ptr()
    held = storages(module) | {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(module)}
    assert held == storages(module)  # The runtime holds nothing that the module does not.
    assert sum(held.values()) == bytes_before
    assert report.fused_bytes == sum(t.nbytes for layer in runtime_of(module).network.weights.layers for t in _fused(layer))
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].is_contiguous() for name in before)
    assert {name: id(p) for name, p in module.named_parameters()} == identities


def _fused(layer: Any) -> list[Tensor]:
    return [t for t in (layer.qkv.weight, layer.gate_up.weight, layer.qkv_bias) if t is not None]


def _tensors(module: nn.Module) -> list[Tensor]:
    weights = runtime_of(module).network.weights
    singles = [t for layer in weights.layers for t in (layer.attn_norm, layer.mlp_norm, layer.attn_out.weight, layer.down.weight)]
    fused = [t for layer in weights.layers for t in _fused(layer)]
    return [weights.embedding, weights.head, weights.final_norm, *singles, *fused]


@pytest.mark.parametrize("model", ALL)
def test_the_most_that_is_ever_held_besides_is_one_fused_tensor(model: str) -> None:
    with profile(profile_memory=True) as profiled:
        module = load_module(GOLDEN / model)
        with record_function("accelerate"):
            report = fdt.accelerate(module)
        with record_function("restore"):
            fdt.restore(module)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for mark in ("accelerate", "restore"):
        ((start, seconds),) = [(event.start_ns(), event.duration_ns()) for event in events if event.name() == mark]
        held = [sum(size for time, size in memory if time < until) for until, _ in memory if start <= until <= start + seconds]
        end = sum(size for time, size in memory if time <= start + seconds)
        assert end == held[0]
        largest = 2 * 160 * 64 * 4  # gate and up
        assert max(held) - held[0] == largest < report.fused_bytes / 4


def test_its_own_forward_and_gradients_stay_the_same_to_the_bit(module: nn.Module) -> None:
    def run() -> list[Tensor]:
        module.zero_grad()
        logits = module(IDS).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in module.parameters())]

    before = run()
    fdt.accelerate(module)
    during = run()
    fdt.restore(module)
    for other in (during, run()):
        assert all(torch.equal(x, y) for x, y in zip(before, other, strict=True))


def test_accelerating_twice_moves_nothing(module: nn.Module) -> None:
    first = fdt.accelerate(module)
    places = [p.data_ptr() for p in module.parameters()]
    assert fdt.accelerate(module) == first
    assert [p.data_ptr() for p in module.parameters()] == places
    fdt.restore(module)
    assert "generate" not in vars(module)


def test_restore_leaves_nothing_behind(module: nn.Module) -> None:
    attributes, logits, sizes = sorted(vars(module)), own(module), sorted(storages(module).values())
    module.generate = "the user's"
    fdt.accelerate(module)
    assert module.generate([[1, 2]], **SHORT).sequences.shape == (1, 18)
    fdt.restore(module)
    assert vars(module).pop("generate") == "the user's"
    assert sorted(vars(module)) == attributes
    assert sorted(storages(module).values()) == sizes
    assert torch.equal(own(module), logits)
    fdt.restore(module)  # nothing to undo


def test_a_dropped_module_frees_its_memory_at_once(llada_module: nn.Module) -> None:
    fdt.accelerate(llada_module)
    module = copy.deepcopy(llada_module)
    module.generate([[1, 2]], **SHORT)
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_no_memory_for_a_fused_tensor_leaves_the_module_as_it_was(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, attributes, sizes = own(module), sorted(vars(module)), sorted(storages(module).values())
    cat, calls = torch.cat, iter(range(100))

    def exhausted(tensors: list[Tensor]) -> Tensor:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return cat(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(fuse.torch, "cat", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            fdt.accelerate(module)
    assert sorted(vars(module)) == attributes
    assert sorted(storages(module).values()) == sizes
    assert torch.equal(own(module), logits)


# ----------------------------------------------------------------------------------------------------------------------
# What happens to the module afterwards.


def test_a_training_step_is_seen(module: nn.Module) -> None:
    fdt.accelerate(module)
    before = module.fast_forward(IDS)
    places = [p.data_ptr() for p in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(IDS).logits.square().mean().backward()
    optimizer.step()
    after = module.fast_forward(IDS)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, own(module), rtol=1e-4, atol=1e-3)
    assert [p.data_ptr() for p in module.parameters()] == places


def test_a_change_of_the_runtimes_weights_is_seen_by_the_module(module: nn.Module) -> None:
    fdt.accelerate(module)
    before = own(module)
    for layer in runtime_of(module).network.weights.layers:
        layer.qkv.weight.mul_(0.5)
        layer.gate_up.weight.add_(0.01)
    after = own(module)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(module.fast_forward(IDS), after, rtol=1e-4, atol=1e-3)


def test_a_loaded_state_dict_is_seen(module: nn.Module) -> None:
    fdt.accelerate(module)
    other = {name: p * 0.9 for name, p in module.state_dict().items()}
    module.load_state_dict(other)
    torch.testing.assert_close(module.fast_forward(IDS), own(module), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.double(),
        lambda module: module.load_state_dict({name: p * 0.9 for name, p in module.state_dict().items()}, assign=True),
        lambda module: setattr(projections(module)[1].weight, "data", projections(module)[1].weight.data * 2),
    ],
    ids=["dtype", "assign", "one"],
)
def test_parameters_that_moved_are_fused_again(module: nn.Module, move: Callable[[nn.Module], Any]) -> None:
    fdt.accelerate(module)
    move(module)
    total = sum(storages(module).values())
    torch.testing.assert_close(module.fast_forward(IDS), own(module), rtol=1e-4, atol=1e-3)
    assert projections(module)[0].weight.untyped_storage().nbytes() > projections(module)[0].weight.nbytes
    assert sum(storages(module).values()) <= total


def test_half_a_move_is_refused_until_it_is_complete(llada_module: nn.Module) -> None:
    fdt.accelerate(llada_module)
    llada_module.model.transformer["blocks"][1].double()
    with pytest.raises(ValueError, match=r"blocks.1.attn_norm.weight is torch.float64, .* module.to\(dtype\)"):
        llada_module.generate([[1, 2]], **SHORT)
    llada_module.float()
    llada_module.generate([[1, 2]], **SHORT)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_is_merged_first(llada_module: nn.Module, wrapped: bool) -> None:
    block = llada_module.model.transformer["blocks"][0]
    lora = block.q_proj = LoRA(block.q_proj)
    module = Wrapper(llada_module) if wrapped else llada_module
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"blocks.0.q_proj has an adapter that is not merged .*merge_and_unload"):
        fdt.accelerate(module)
    assert snapshot(module) == before
    lora.merge()
    fdt.accelerate(module)
    torch.testing.assert_close(module.fast_forward(IDS), own(module), rtol=1e-4, atol=1e-3)


def test_an_adapter_that_comes_later_is_noticed_and_its_merge_seen(module: nn.Module) -> None:
    fdt.accelerate(module)
    before = module.fast_forward(IDS)
    parent = module.model.layers[0].self_attn if hasattr(module.model, "layers") else module.model.transformer["blocks"][0]
    lora = parent.q_proj = LoRA(parent.q_proj)
    with pytest.raises(ValueError, match=r"q_proj has an adapter that is not merged"):
        module.generate([[1, 2]], **SHORT)
    lora.disable_adapters = True
    assert torch.equal(module.fast_forward(IDS), before)
    lora.disable_adapters = False
    place = lora.base_layer.weight.data_ptr()
    lora.merge()
    assert lora.base_layer.weight.data_ptr() == place
    after = module.fast_forward(IDS)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, own(module), rtol=1e-4, atol=1e-3)


def test_a_wrapper_and_the_module_inside_share_one_copy(llada_module: nn.Module) -> None:
    wrapper = Wrapper(llada_module)
    fdt.accelerate(llada_module)
    held = storages(llada_module)
    fdt.accelerate(wrapper)
    assert storages(llada_module) == held
    fdt.restore(llada_module)
    x, _ = compat.generate(wrapper, torch.tensor([[1, 2]]), 8, 16, 8)
    assert x.shape == (1, 18)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_generates_with_its_own_weights(module: nn.Module, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    fdt.accelerate(module)
    other = duplicate(module)
    with torch.no_grad():
        projections(other)[0].weight.mul_(3)
    torch.testing.assert_close(other.fast_forward(IDS), own(other), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.fast_forward(IDS), own(module), rtol=1e-4, atol=1e-3)
    assert not storages(module).keys() & storages(other).keys()
    fdt.restore(other)
    assert "generate" not in vars(other)
    assert "generate" in vars(module)


def test_a_state_dict_is_saved_as_before(module: nn.Module, tmp_path: Any) -> None:
    before = {name: p.clone() for name, p in module.state_dict().items()}
    fdt.accelerate(module)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    torch.save(module.state_dict(), tmp_path / "model.pt")
    for read in (load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt")):
        assert read.keys() == before.keys()
        assert all(torch.equal(read[name], before[name]) for name in before)
    size = sum(p.nbytes for p in before.values())
    assert (tmp_path / "model.pt").stat().st_size < 1.1 * size + 20_000


def test_prompts_are_strings_where_the_folder_of_the_tokenizer_is_known() -> None:
    module = load_module(tiny.PATH, _name_or_path=str(tiny.PATH))
    fdt.accelerate(module)
    prompt = "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?"
    assert module.generate(prompt).texts == fdt.load("tiny", device="cpu").generate(prompt).texts
    module.config._name_or_path = "no/such-model"
    fdt.accelerate(module)
    with pytest.raises(ValueError, match=r"prompts: the module has no tokenizer files; give token ids"):
        module.generate(prompt)


def test_the_tokenizer_of_a_module_from_the_hub_is_looked_for_in_its_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or str(tiny.PATH))
    module = load_module(tiny.PATH, _name_or_path="some/model", _commit_hash="abc")
    fdt.accelerate(module)
    assert runtime_of(module).folder == tiny.PATH
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("some/model", "abc", True)


def test_official_arguments_by_position_are_pointed_to_their_function(llada_module: nn.Module) -> None:
    fdt.accelerate(llada_module)
    with pytest.raises(TypeError, match=r"config must be a GenerationConfig, got int; fastdllm_triton.compat has the functions"):
        llada_module.generate([[1, 2]], 128)


def test_diffusion_generate_is_dreams_alone() -> None:
    modules = {name: load_module(GOLDEN / name) for name in ALL}
    for module in modules.values():
        fdt.accelerate(module)
    assert [name for name, module in modules.items() if hasattr(module, "diffusion_generate")] == [GOLDEN_DREAM]


def test_a_tied_head_stays_tied() -> None:
    module = load_module(GOLDEN / GOLDEN_DREAM, tie_word_embeddings=True)
    fdt.accelerate(module)
    torch.testing.assert_close(module.fast_forward(IDS), own(module), rtol=1e-4, atol=1e-3)
    assert module.lm_head.weight is module.model.embed_tokens.weight


# ----------------------------------------------------------------------------------------------------------------------
# Options and report.


def test_the_report_says_what_runs_and_why(module: nn.Module) -> None:
    report = fdt.accelerate(module, norms=False)
    assert report.replaced[:3] == ("attention", "norms", "head")
    assert {"qkv", "gate_up"} <= set(report.replaced)
    assert report.kept == ("forward",)
    plain = report.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    reasons = {entry["part"]: (entry["runs"], entry["reason"]) for entry in plain["entries"]}
    assert reasons["norms"] == ("cpu", "norms=False")
    assert reasons["attention"][0] == "cpu" and "the device is cpu" in reasons["attention"][1]
    table = str(report)
    assert "3 layers, float32 on cpu" in table
    assert all(part in table for part in (*report.replaced, *report.kept))


def test_every_op_belongs_to_a_part() -> None:
    assert sorted(op for names in PARTS.values() for op in names) == sorted(OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels do not take the CPU's tensors")
def test_each_part_can_do_without_its_kernels(llada_module: nn.Module) -> None:
    for off in PARTS:
        report = fdt.accelerate(llada_module, backend="triton", **{off: False})
        ops = runtime_of(llada_module).network.ops
        assert ops.name == "mixed"
        for part, names in PARTS.items():
            room = "reference" if part == off else "kernels"
            assert all(getattr(ops, name).__module__ == f"fastdllm_triton.{room}.{name}" for name in names)
            entry = report.as_dict()["entries"][list(PARTS).index(part)]
            expected = ("reference", f"{off}=False") if part == off else ("triton", "asked for")
            assert (entry["runs"], entry["reason"]) == expected
    fdt.accelerate(llada_module, backend="triton", attention=False, norms=False, head=False)
    assert runtime_of(llada_module).network.ops.name == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels do not take the CPU's tensors")
def test_kernels_and_plain_ops_work_together(llada_module: nn.Module) -> None:
    fdt.accelerate(llada_module)
    expected = llada_module.generate([[1, 2, 3]], gen_length=8, block_length=8, strategy=fdt.Threshold(0.2))
    fdt.accelerate(llada_module, backend="triton", attention=False)
    got = llada_module.generate([[1, 2, 3]], gen_length=8, block_length=8, strategy=fdt.Threshold(0.2))
    assert torch.equal(got.sequences, expected.sequences)


def test_strict_refuses_to_fall_back(llada_module: nn.Module) -> None:
    before = snapshot(llada_module)
    with pytest.raises(RuntimeError, match=r"strict: the kernels cannot run on this module: the device is cpu"):
        fdt.accelerate(llada_module, strict=True)
    llada_module.model.transformer["blocks"][1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"strict: forward hooks would not be run by generate: model.transformer.blocks.1"):
        fdt.accelerate(llada_module, backend="reference", strict=True)
    assert snapshot(llada_module) == before
    report = fdt.accelerate(llada_module)
    assert report.kept == ("forward", "hooks")
    assert "forward hooks of model.transformer.blocks.1" in report.as_dict()["entries"][-1]["what"]


def test_strict_goes_on_looking(llada_module: nn.Module) -> None:
    fdt.accelerate(llada_module, backend="reference", strict=True)
    hook = llada_module.model.transformer["ln_f"].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"strict: forward hooks would not be run by generate: model.transformer.ln_f"):
        llada_module.generate([[1, 2]], **SHORT)
    hook.remove()
    llada_module.generate([[1, 2]], **SHORT)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: an error that says what to do, and a module that is exactly what it was.


def _config(**fields: Any) -> Callable[[nn.Module], None]:
    return lambda module: vars(module.config).update(fields)


def _replace(make: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    """Puts something else in the place of a layer's k projection."""

    def edit(module: nn.Module) -> None:
        block = module.model.transformer["blocks"][1]
        block.k_proj.weight = make(block.k_proj.weight)

    return edit


def _linear4bit(module: nn.Module) -> None:
    class Linear4bit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
            self.weight.quant_state = object()

    module.model.transformer["blocks"][2].attn_out = Linear4bit()


def _train_with_dropout(module: nn.Module) -> None:
    module.config.residual_dropout = 0.1
    module.train()


def _modules_to_save(module: nn.Module) -> None:
    module.model.transformer["ff_out"].modules_to_save = nn.ModuleDict({"default": nn.Linear(64, 320)})


def _share(module: nn.Module) -> None:
    blocks = module.model.transformer["blocks"]
    blocks[1].ff_proj.weight = blocks[0].ff_proj.weight


REFUSED = [
    (_config(model_type="qwen2"), r"module.config: model_type 'qwen2' is not known; supported: llada, dream"),
    (_config(alibi=True), r"module.config: alibi = True is not supported, only False; use the code"),
    (_config(attention_layer_norm=True), r"module.config: attention_layer_norm = True is not supported"),
    (_config(rope_scaling={"rope_type": "yarn"}), r"rope_scaling of type 'yarn' is not supported.*set it to null"),
    (_config(quantization_config={"load_in_4bit": True}), r"quantization_config is set.*dequantize"),
    (_config(n_layers=4), r"the parameter model.transformer.blocks.3.attn_norm.weight is missing"),
    (_config(n_layers=2), r"parameters that the model has no place for, such as model.transformer.blocks.2"),
    (_config(mlp_hidden_size=128), r"ff_proj.weight has shape \(160, 64\), module.config asks for \(128, 64\)"),
    (_config(weight_tying=True), r"ff_out.weight is a tensor of its own, which module.config ties to the embedding; untie"),
    (lambda module: delattr(module, "config"), r"module.config is missing"),
    (
        lambda module: module.model.transformer.pop("wte"),
        r"must be one model of a known family with its head, .* got LLaDA without",
    ),
    (lambda module: module.to(torch.float16), r"float16 is not supported on cpu; .*module.to\(dtype\) changes it"),
    (_replace(lambda p: nn.Parameter(p.bfloat16())), r"k_proj.weight is torch.bfloat16, .*wte.weight torch.float32; give all"),
    (_replace(lambda p: nn.Parameter(p.data.to("meta"))), r"k_proj.weight is on the meta device; load the module whole"),
    (_replace(lambda p: nn.Parameter(p.char(), requires_grad=False)), r"blocks.1.k_proj is quantised .*torch.int8.*dequantize"),
    (_replace(lambda p: nn.Parameter(p.data.T.contiguous().T)), r"k_proj.weight is not contiguous"),
    (_linear4bit, r"blocks.2.attn_out is quantised or not a plain tensor \(Linear4bit\), which is not supported; .*bfloat16"),
    (_train_with_dropout, r"module.config: residual_dropout = 0.1 is at work in training mode; call module.eval\(\) first"),
    (_modules_to_save, r"ff_out is replaced by an adapter's copy of it; merge it first"),
    (_share, r"blocks.1.ff_proj.weight and model.transformer.blocks.0.ff_proj.weight share their memory"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_supported_is_named_and_left_alone(llada_module: nn.Module, edit: Any, message: str) -> None:
    edit(llada_module)
    before = snapshot(llada_module)
    with pytest.raises(ValueError, match=message):
        fdt.accelerate(llada_module)
    assert snapshot(llada_module) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_sliding_window": True}, r"module.config: use_sliding_window = True is not supported, only False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"module.config: rope_scaling of type 'linear' is not supported"),
        ({"attention_dropout": 0.1}, r"module.config: attention_dropout = 0.1 is at work in training mode"),
    ],
)
def test_dreams_options(fields: dict[str, Any], message: str) -> None:
    module = load_module(GOLDEN / GOLDEN_DREAM).train()
    vars(module.config).update(fields)
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fdt.accelerate(module)
    assert snapshot(module) == before


def test_devices_that_differ_are_refused(llada_module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    key = llada_module.model.transformer["blocks"][2].k_proj.weight
    monkeypatch.setattr(
        nn.Parameter, "device", property(lambda p: torch.device("cuda:1") if p is key else Tensor.device.__get__(p))
    )
    with pytest.raises(ValueError, match=r"blocks.2.k_proj.weight is on cuda:1, .*wte.weight on cpu; put all parameters on one"):
        fdt.accelerate(llada_module)


def test_parameters_beside_the_model_are_refused(llada_module: nn.Module) -> None:
    wrapper = Wrapper(llada_module)
    wrapper.prompt_encoder = nn.Embedding(4, 64)
    with pytest.raises(ValueError, match=r"prompt_encoder.weight lies outside the model and would not be used"):
        fdt.accelerate(wrapper)
    two = nn.ModuleList([llada_module, load_module(GOLDEN / "llada-mha")])
    with pytest.raises(ValueError, match=r"must be one model of a known family .* got 2 models"):
        fdt.accelerate(two)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": "GSAI-ML/LLaDA-8B-Instruct"}, TypeError, r"module must be a torch.nn.Module, got str"),
        (
            {"module": nn.Linear(2, 2)},
            ValueError,
            r"module must be one model of a known family .* got Linear without a parameter",
        ),
        ({"backend": "cuda"}, ValueError, r"backend must be one of auto, triton, cpu, reference, got 'cuda'"),
        ({"weights": "int8"}, ValueError, r"weights must be None, got 'int8'"),
        ({"attention": "no"}, TypeError, r"attention must be True or False, got 'no'"),
        ({"strict": 1}, TypeError, r"strict must be True or False, got 1"),
    ],
)
def test_bad_arguments(llada_module: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"module": llada_module, **arguments}
    before = snapshot(given["module"])
    with pytest.raises(error, match=message):
        fdt.accelerate(**given)
    assert snapshot(given["module"]) == before


def test_restore_takes_modules_alone() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got SimpleNamespace"):
        fdt.restore(SimpleNamespace())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2]), r"input_ids must be integers of shape \[B, T\], got torch.int64 \[2\]"),
        (torch.ones(1, 2), r"input_ids must be integers"),
        (torch.tensor([[1, 320]]), r"input_ids holds token id 320, outside the vocabulary \[0, 320\)"),
    ],
)
def test_bad_ids_for_fast_forward(llada_module: nn.Module, ids: Tensor, message: str) -> None:
    fdt.accelerate(llada_module)
    with pytest.raises(ValueError, match=message):
        llada_module.fast_forward(ids)
