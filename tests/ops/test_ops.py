"""The choice of a backend, and the ops as PyTorch's compiler sees them."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from _support import DEVICE, ints, randn
from torch import Tensor, nn

from fastdllm_triton import ops as module
from fastdllm_triton import reference
from fastdllm_triton.kernels._arch import emulated
from fastdllm_triton.ops import NAMES, Ops, backends, registry, resolve, without_kernels
from fastdllm_triton.ops.backends import _resolved
from fastdllm_triton.types import LaunchOptions, PolicyState, TokenStatistics

CPU = torch.device("cpu")
KERNELS = [op for op in NAMES if importlib.util.find_spec(f"fastdllm_triton.kernels.{op}")]


# What is chosen.


def test_reference_is_plain_pytorch_and_says_that_it_was_asked_for():
    ops = resolve("reference", CPU)
    assert (ops.name, ops.reason) == ("reference", "asked for")
    x = randn(3, 8)
    assert torch.equal(ops.swiglu(x), reference.swiglu(x))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU runs the kernels")
def test_auto_takes_the_ops_of_a_cpu_there_and_says_why_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops = resolve("auto", CPU)
    assert ops.name == "cpu"
    assert ops.reason


def test_the_ops_of_a_cpu_are_for_a_cpu():
    assert (resolve("cpu", CPU).name, resolve("cpu", CPU).reason) == ("cpu", "asked for")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: the device is cuda"):
        resolve("cpu", torch.device("cuda", 0))


@pytest.mark.parametrize("obstacle", ["triton is not installed", "device cuda:0 is sm_70"])
def test_auto_falls_back_on_a_gpu_with_a_warning_that_says_why_and_triton_raises(monkeypatch, obstacle):
    monkeypatch.setattr(backends, "_obstacle", lambda device, on_cpu: obstacle)
    _resolved.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=obstacle):
        assert resolve("auto", device).name == "reference"
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run here: {obstacle}"):
        resolve("triton", device)
    _resolved.cache_clear()


@pytest.mark.skipif(not KERNELS, reason="no kernels")
def test_launch_options_are_values_that_the_kernels_alone_are_given():
    ops = resolve("triton", DEVICE)
    serial = ops.with_options(pdl=False)
    assert (ops.options.pdl, serial.options.pdl) == (True, False)
    assert {name for name in NAMES if getattr(serial, name) is not getattr(ops, name)} == {
        "head_statistics", "linear", "rms_norm", "rope_kv_write", "swiglu", "window_attention",
    }  # fmt: skip
    assert serial.with_options(fuse_linear=True).options == LaunchOptions(pdl=False, fuse_linear=True)
    x, weight = randn(3, 64, dtype=torch.float32, device=DEVICE), randn(64, 64, dtype=torch.float32, device=DEVICE)
    assert not serial.fuses_residual(x, weight)
    assert serial.with_options(fuse_linear=True).fuses_residual(x, weight)
    mixed = without_kernels(ops, ["norms"]).with_options(pdl=False)
    assert mixed.rms_norm is reference.rms_norm and mixed.rope_kv_write is not ops.rope_kv_write
    plain = resolve("reference", DEVICE)
    assert plain.with_options(pdl=False).linear is plain.linear


def test_a_missing_kernel_is_an_obstacle(monkeypatch):
    find_spec = importlib.util.find_spec
    hidden = lambda name, *args: None if name.endswith("kernels.swiglu") else find_spec(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    obstacle = backends._obstacle(torch.device("cuda"), on_cpu=False)
    assert obstacle is not None
    assert "no Triton kernel for" in obstacle
    assert "swiglu" in obstacle
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find_spec(name, *args))
    assert backends._obstacle(torch.device("cuda"), on_cpu=False) == "triton is not installed"


def test_triton_runs_on_a_cpu_in_the_interpreter_or_emulated(monkeypatch):
    monkeypatch.setattr(module, "NAMES", tuple(KERNELS))
    monkeypatch.setattr("fastdllm_triton.kernels._check.INTERPRETED", False)
    assert "the device is cpu" in str(backends._obstacle(CPU, on_cpu=True))
    with emulated("sm_90"):
        assert backends._obstacle(CPU, on_cpu=True) is None
    monkeypatch.setattr("fastdllm_triton.kernels._check.INTERPRETED", True)
    assert backends._obstacle(CPU, on_cpu=True) is None
    assert "the device is cpu" in str(backends._obstacle(CPU, on_cpu=False))


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="got 'cuda'"):
        resolve("cuda", CPU)


@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_takes_what_its_reference_takes(op):
    wanted = inspect.signature(getattr(reference, op)).parameters
    found = inspect.signature(getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), op)).parameters
    assert list(found)[: len(wanted)] == list(wanted)
    for name, parameter in wanted.items():
        assert (found[name].kind, found[name].default) == (parameter.kind, parameter.default)
    # More parameters are optional.
    assert all(found[name].default is not inspect.Parameter.empty for name in list(found)[len(wanted) :])


# What PyTorch is told.


def caches(device: torch.device | str = CPU) -> tuple[Tensor, Tensor]:
    return randn(2, 2, 12, 16, dtype=torch.float32, seed=1, device=device), randn(
        2, 2, 12, 16, dtype=torch.float32, seed=2, device=device
    )


def statistics(batch: int, block: int) -> TokenStatistics:
    found = reference.token_statistics(randn(batch * block, 11, dtype=torch.float32))
    return found.view(batch, block)


def state(rule: str) -> PolicyState:
    seed = torch.tensor([3, 4])
    return PolicyState.create(
        "confidence", rule, value=0.2, steps=2, mask_id=10, kv_start=torch.zeros(2, dtype=torch.int32), seed=seed, slots=12
    )


def registered_calls() -> dict[str, tuple]:
    """Arguments for each registered op, several where it has optional ones."""
    x, weight, start = randn(2, 3, 8, dtype=torch.float32), randn(8, dtype=torch.float32), torch.zeros(2, dtype=torch.int32)
    qkv, q, step = randn(2, 3, 8 * 16, dtype=torch.float32), randn(2, 3, 4, 16, dtype=torch.float32), torch.tensor(0)
    attention = (q, *caches(), start, start + 9)
    policy = state("threshold")
    held = tuple(getattr(policy, field.name) for field in fields(policy))
    tokens, place = torch.full((2, 12), 10), torch.arange(8, dtype=torch.int32).view(2, 4)
    return {
        "rms_norm": (x, weight, 1e-5, None, None),
        "rms_norm residual": (x, weight, 1e-5, x, None),
        "rms_norm rows": (x, weight, 1e-5, None, torch.tensor([[5, -1], [0, 5]])),
        "swiglu": (x,),
        "linear": (x, randn(6, 8, dtype=torch.float32), None, None, None, None),
        "linear fused": (x, randn(6, 8, dtype=torch.float32), weight, 1e-5, x[..., :3].contiguous(), "swiglu"),
        "rope_kv_write": (qkv, *caches(), start + 2, start, 1e4, None, None, None, None, "qwen3", "llada"),
        "rope_kv_write bias": (
            qkv, *caches(), start + 2, start, 1e4, randn(8 * 16, dtype=torch.float32), None, None, None, "qwen3", "dream"
        ),
        "rope_kv_write norms": (
            qkv, *caches(), start + 2, start, 1e4, None, qkv[0, 0, :16].clone(), qkv[0, 1, :16].clone(), 1e-6, "flash_attn",
            "dream",
        ),
        "window_attention": (*attention, None, None, None, None, None, False),
        "window_attention skip": (*attention, None, None, start + 3, start + 5, 0.3, False),
        "window_attention lse": (*attention, None, None, None, None, None, True),
        "window_attention block-causal": (*attention, start + 2, 2, None, None, None, False),
        "token_statistics": (randn(5, 11, dtype=torch.float32), 0.0, None, None, None, step, None),
        "token_statistics sampled": (
            randn(5, 11, dtype=torch.float32), 1.0, None, torch.arange(5), torch.arange(5), step, torch.tensor([3])
        ),
        "token_statistics by row": (
            randn(5, 11, dtype=torch.float32), 0.0, torch.rand(5), torch.arange(5), None, step, torch.tensor([[3, -1]] * 5)
        ),
        "head_statistics": (randn(5, 8), randn(11, 8), None, None, 0.0, None, None, None, step, None, None),
        "head_statistics rows": (
            randn(5, 8), randn(11, 8), torch.tensor([4, 0]), randn(11), 0.0, torch.rand(2), torch.arange(2), None, step,
            torch.tensor([[3, -1]] * 2), torch.bfloat16,
        ),
        "commit_tokens": (tokens, *vars(statistics(2, 4)).values(), start + 4, *held, None),
        "commit_tokens place": (tokens, *vars(statistics(2, 4).view(8)).values(), start + 4, *held, place),
        "window_inputs": (tokens, start, start + 4, start + 3, start, 1, 6, 4, 7, True, 10, None, None),
        "window_inputs sampled": (tokens, start, start + 4, start + 3, start, 0, 6, 4, 7, False, 10, torch.tensor([1, 2]), start),
    }  # fmt: skip


CALLS = registered_calls()


@pytest.mark.parametrize("call", CALLS)
def test_what_is_declared_holds(call):
    # Mutations, aliases, shapes, dtypes and strides, and that the op survives tracing.
    torch.library.opcheck(getattr(torch.ops.fastdllm, call.split()[0]).default, CALLS[call])


def test_registered_ops_are_those_that_the_table_tests():
    assert {call.split()[0] for call in CALLS} == {name.split("::")[1].split(".")[0] for name in registry.LIBRARY._op_defs}


def test_what_is_written_is_declared():
    def written(name: str) -> list[str]:
        arguments = getattr(torch.ops.fastdllm, name).default._schema.arguments
        return [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]

    assert written("rope_kv_write") == ["k_cache", "v_cache"]
    assert written("commit_tokens")[0] == "x"
    assert "state_step_map" in written("commit_tokens") and "state_seed" not in written("commit_tokens")
    assert written("window_attention") == []


class Layer(nn.Module):
    """The ops of a transformer layer, with matrices between them."""

    def __init__(self, ops: Ops, device: torch.device | str) -> None:
        super().__init__()
        self.ops = ops
        width, heads = 32, 4 + 2 * 2
        for name, shape in (("norm", (width,)), ("qkv", (heads * 16, width)), ("back", (width, 64)), ("up", (48, width))):
            self.register_buffer(name, randn(*shape, dtype=torch.float32, device=device, seed=len(name)) / 6)
        self.register_buffer("down", randn(width, 24, dtype=torch.float32, device=device) / 5)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        h = self.ops.rms_norm(x, self.norm, 1e-5)
        norms = {"q_norm": self.norm[:16], "k_norm": self.norm[16:], "eps": 1e-6}
        q = self.ops.rope_kv_write(h @ self.qkv.T, k, v, start + 2, start, 1e4, **norms)
        y, lse = self.ops.window_attention(q, k, v, start, end, return_lse=True)
        h, x = self.ops.rms_norm(y.flatten(2) @ self.back.T, self.norm, 1e-5, residual=x)
        y = self.ops.window_attention(q, k, v, start, end, block_causal=(start + 2, 2))
        return x + self.ops.swiglu(h @ self.up.T) @ self.down.T + y.sum() + lse.mean()


def check_compiled_layer(ops: Ops, device: torch.device, backend: str) -> None:
    layer = Layer(ops, device)
    x, start, end = randn(2, 5, 32, dtype=torch.float32, device=device), ints([0, 1], device), ints([12, 9], device)
    eager_caches, compiled_caches = caches(device), caches(device)
    want = layer(x, *eager_caches, start, end)
    got = torch.compile(layer, fullgraph=True, backend=backend)(x, *compiled_caches, start, end)
    torch.testing.assert_close(got, want)
    for eager, compiled, before in zip(eager_caches, compiled_caches, caches(device), strict=True):
        torch.testing.assert_close(compiled, eager)
        assert not torch.equal(compiled, before)


def test_a_layer_compiles_to_one_graph():
    check_compiled_layer(resolve("cpu", CPU), CPU, "aot_eager")


@pytest.mark.gpu
def test_a_layer_of_kernels_compiles_to_one_graph():
    check_compiled_layer(backends._ops("triton", "test", torch.device("cuda")), torch.device("cuda"), "inductor")


def test_selection_compiles_to_one_graph():
    ops = resolve("cpu", CPU)
    hidden, weight = randn(8, 16, dtype=torch.float32), randn(11, 16, dtype=torch.float32)

    def select(tokens: Tensor, policy: PolicyState) -> Tensor:
        found = ops.head_statistics(hidden, weight, temperature=1.0, seed=7, step=policy.step[0], forbidden=[10])
        again = ops.token_statistics(hidden @ weight.T, forbidden=[10])
        ops.commit_tokens(tokens, found.view(2, 4), torch.tensor([4, 0], dtype=torch.int32), policy)
        return again.logsumexp

    eager, compiled = (torch.full((2, 12), 10), state("quota")), (torch.full((2, 12), 10), state("quota"))
    want = select(*eager)
    torch.testing.assert_close(torch.compile(select, fullgraph=True, backend="aot_eager")(*compiled), want)
    assert torch.equal(compiled[0], eager[0])
    assert (eager[0] != 10).sum() == 4
    assert torch.equal(compiled[1].step_map, eager[1].step_map)


def test_a_call_with_out_is_not_replaced():
    ops = resolve("cpu", CPU)
    x, out = randn(3, 8, dtype=torch.float32), torch.zeros(3, 4)
    assert torch.compile(lambda: ops.swiglu(x, out=out), backend="eager")().data_ptr() == out.data_ptr()
    assert torch.equal(out, reference.swiglu(x))


# What callers with tensors of their own are told.

LOGITS, HIDDEN, HEAD = randn(5, 11, dtype=torch.float32), randn(5, 8, dtype=torch.float32), randn(11, 8, dtype=torch.float32)
X, NORM = randn(2, 3, 8, dtype=torch.float32), randn(8, dtype=torch.float32)
QKV, Q = randn(2, 3, 8 * 16, dtype=torch.float32), randn(2, 3, 4, 16, dtype=torch.float32)
K, V = caches()
START = torch.zeros(2, dtype=torch.int32)
TOKENS = torch.full((2, 12), 10)


def changed(**changes: object) -> PolicyState:
    return replace(state("threshold"), **changes)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        ("token_statistics", (LOGITS[0],), {}, r"logits must be floating point of shape \[R, V\], got torch.float32 \[11\]"),
        ("token_statistics", (LOGITS[None],), {}, r"logits must be floating point of shape \[R, V\], got .* \[1, 5, 11\]"),
        ("token_statistics", (LOGITS[:, :0],), {}, r"logits must have V = 1 or more, got V = 0"),
        ("token_statistics", (LOGITS.long(),), {}, r"logits must be floating point .*, got torch.int64"),
        ("token_statistics", ([[1.0]],), {}, r"logits must be a tensor, got \[\[1.0\]\] of type list"),
        ("token_statistics", (LOGITS,), {"forbidden": [11]}, r"forbidden must be in the vocabulary \[0, 11\), got 11"),
        ("token_statistics", (LOGITS,), {"forbidden": [-1]}, r"forbidden must be in the vocabulary \[0, 11\), got -1"),
        ("token_statistics", (LOGITS,), {"forbidden": torch.tensor([11])}, r"forbidden must be in \[0, 10\], got 11"),
        ("token_statistics", (LOGITS,), {"forbidden": torch.tensor([-1])}, r"forbidden must be in \[0, 10\], got -1"),
        ("token_statistics", (LOGITS,), {"forbidden": 5}, r"forbidden must be None, a sequence of token ids, .*, got 5"),
        ("token_statistics", (LOGITS,), {"temperature": 1.0}, r"temperature > 0 needs a seed"),
        ("token_statistics", (LOGITS,), {"temperature": 1e300, "seed": 0}, r"temperature must be at most 1,000,000, got 1e\+300"),
        ("token_statistics", (LOGITS,), {"temperature": 1.0, "seed": 1.5}, r"seed must be an integer in .*, got 1.5"),
        ("token_statistics", (LOGITS,), {"seed": torch.arange(4)}, r"seed must be integers of shape \[5\], got .* \[4\]"),
        ("token_statistics", (LOGITS,), {"position": torch.arange(4)}, r"position must be integers of shape \[5\]"),
        ("token_statistics", (LOGITS,), {"step": "a"}, r"step must be an integer in .*, got 'a'"),
        ("token_statistics", (LOGITS,), {"out": statistics(1, 4)}, r"out.token must be of shape \[5\], got torch.int64 \[1, 4\]"),
        ("head_statistics", (HIDDEN, HEAD[:, :4]), {}, r"weight must be torch.float32 of shape \[V, 8\], got .* \[11, 4\]"),
        ("head_statistics", (HIDDEN, HEAD.double()), {}, r"weight must be torch.float32 of shape \[V, 8\], got torch.float64"),
        ("head_statistics", (HIDDEN, HEAD), {"rows": torch.tensor([5])}, r"rows must be in \[-1, 4\], got 5"),
        ("head_statistics", (HIDDEN, HEAD), {"rows": torch.tensor([-2])}, r"rows must be in \[-1, 4\], got -2"),
        ("head_statistics", (HIDDEN, HEAD), {"bias": NORM}, r"bias must be floating point of shape \[11\]"),
        ("head_statistics", (HIDDEN, HEAD), {"logits_dtype": torch.int8}, r"logits_dtype must be None or a floating-point dtype"),
        ("rms_norm", (X, NORM[:7], 1e-5), {}, r"weight must be torch.float32 of shape \[8\], got torch.float32 \[7\]"),
        ("rms_norm", (X, NORM, -1), {}, r"eps must be a number of 0 or more, got -1"),
        ("rms_norm", (X, NORM, 1e-5), {"residual": X[0]}, r"residual must be torch.float32 of shape \[2, 3, 8\]"),
        ("rms_norm", (X, NORM, 1e-5), {"residual_out": X}, r"residual_out needs a residual"),
        ("swiglu", (X[..., :7],), {}, r"gate_up must be of an even last dimension, gate and up, got \[2, 3, 7\]"),
        ("linear", (X, HEAD[:, :4]), {}, r"weight must be torch.float32 of shape \[N, 8\], got torch.float32 \[11, 4\]"),
        ("linear", (X, HEAD), {"norm_weight": NORM}, r"eps must be a number of 0 or more, .*, got None"),
        ("linear", (X, HEAD), {"eps": 1e-5}, r"eps must be None without a norm_weight"),
        ("linear", (X, HEAD), {"activation": "gelu"}, r"activation must be swiglu or None, got 'gelu'"),
        ("linear", (X, HEAD), {"activation": "swiglu"}, r"weight must be of an even number of rows"),
        ("linear", (X, HEAD), {"residual": X}, r"residual must be torch.float32 of shape \[2, 3, 11\]"),
        ("rope_kv_write", (QKV[..., :70], K, V, START, START, 1e4), {}, r"qkv must be of shape \[B, W, \(Hq \+ 2 \* 2\) \* 16\]"),
        ("rope_kv_write", (QKV, K, V[:, :1], START, START, 1e4), {}, r"v_cache must be torch.float32 of shape \[2, 2, 12, 16\]"),
        ("rope_kv_write", (QKV, K, V, START[:1], START, 1e4), {}, r"window_start must be integers of shape \[2\]"),
        ("rope_kv_write", (QKV, K, V, START, START, 0), {}, r"theta must be a number above 0, got 0"),
        ("rope_kv_write", (QKV, K, V, START, START, 1e4), {"rounding": "x"}, r"rounding must be one of llada, dream, got 'x'"),
        ("window_attention", (Q[0], K, V, START, START), {}, r"q must be floating point of shape \[B, W, Hq, D\]"),
        ("window_attention", (Q[:, :, :3], K, V, START, START), {}, r"q must be of a number of heads that is a multiple"),
        ("window_attention", (Q, K, V, START, START + 13), {}, r"kv_end must be at most 12, got 13"),
        ("window_attention", (Q, K, V, START, START), {"skip_start": START}, r"skip_end must be given with skip_start"),
        ("commit_tokens", (TOKENS[0], statistics(2, 4), START, changed()), {}, r"x must be integers of shape \[B, L\]"),
        ("commit_tokens", (TOKENS, statistics(4, 2), START, changed()), {}, r"statistics.token must be .* of shape \[2, N\]"),
        ("commit_tokens", (TOKENS, statistics(2, 4), START + 9, changed()), {}, r"window_start must be in \[0, 8\], got 9"),
        ("commit_tokens", (TOKENS, statistics(2, 4), START, changed(rule="all")), {}, r"state.rule must be one of quota, "),
        ("commit_tokens", (TOKENS, statistics(2, 4), START, changed(step=START[:1])), {}, r"state.step must be of shape \[2\]"),
        ("commit_tokens", (TOKENS, None, START, changed()), {}, r"statistics must be a TokenStatistics, got None"),
        ("statistics_merge", (statistics(2, 4), statistics(4, 2)), {}, r"b.token must be of shape \[2, 4\]"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(op, arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        getattr(module, op)(*arguments, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "best"}, r"score must be one of confidence, margin, neg_entropy, random, leftmost, got 'best'"),
        ({"rule": "all"}, r"rule must be one of quota, threshold, capped_threshold, floored_threshold, .*, schedule, got 'all'"),
        ({"ends": "row"}, r"ends must be one of block, token, got 'row'"),
        ({"prompt_end": 1.5}, r"prompt_end must be an integer, or one a row, got 1.5"),
        ({"value": "0.9"}, r"value must be a number or inf, or one a row, got '0.9'"),
        ({"steps": 0}, r"steps must be an integer of 1 or more, or one a row, got 0"),
        ({"mask_id": None}, r"mask_id must be an integer of 0 or more, got None"),
        ({"value": [0.5, "0.9"]}, r"value must be a number or inf, or one a row, got \[0.5, '0.9'\]"),
        ({"value": [0.5] * 3}, r"value must be one for all rows, or one for each of the 2, got \[3\]"),
        ({"steps": torch.ones(2, 1)}, r"steps must be one for all rows, or one for each of the 2, got \[2, 1\]"),
        ({"eos_ids": 5}, r"eos_ids must be a sequence of token ids, or a tensor \[B, E\], got 5"),
        ({"eos_ids": torch.ones(3, 1)}, r"eos_ids must be one for all rows, or one for each of the 2, got \[3, 1\]"),
        ({"rule": "schedule"}, r"shares must be there for the rule 'schedule', and for no other, got None"),
        ({"shares": [0.5]}, r"shares must be there for the rule 'schedule', and for no other, got \[0.5\]"),
        ({"rule": "schedule", "shares": []}, r"shares must be of shape \[S\] or \[B, S\], S of 1 or more, got \[0\]"),
        ({"seed": torch.arange(3)}, r"kv_start and seed must be of shape \[B\], got \[2\] and \[3\]"),
    ],
)
def test_a_bad_policy_is_refused_when_it_is_made(changes, message):
    arguments = {"score": "confidence", "rule": "quota", "mask_id": 10, "kv_start": START, "seed": torch.arange(2), "slots": 12}
    assert PolicyState.create(**arguments | {"steps": np.int64(2), "eos_ids": np.array([3])}).eos_ids.tolist() == [[3], [3]]
    with pytest.raises(ValueError, match=message):
        PolicyState.create(**arguments | changes)


def test_every_op_takes_what_its_reference_takes():
    for op in (*NAMES, "statistics_merge"):
        wanted, checked = (inspect.signature(getattr(place, op)).parameters for place in (reference, module.arguments))
        assert {n: (p.kind, p.default) for n, p in checked.items()} == {n: (p.kind, p.default) for n, p in wanted.items()}
    assert torch.equal(module.token_statistics(logits=LOGITS).token, reference.token_statistics(LOGITS).token)


def test_a_row_that_is_asked_for_nothing_and_no_rows_at_all_are_sound():
    assert module.token_statistics(LOGITS[:0]).token.shape == (0,)
    found = module.head_statistics(HIDDEN, HEAD, rows=torch.tensor([-1, 4]), forbidden=torch.tensor([], dtype=torch.int64))
    assert found.token.tolist()[0] == -1


def test_the_engine_pays_for_none_of_these_checks(tiny, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("checked")

    monkeypatch.setattr(module.arguments._Shapes, "__call__", fail)
    with pytest.raises(AssertionError, match="checked"):
        module.token_statistics(LOGITS)
    assert tiny.generate([[1, 2, 3]], gen_length=8, block_length=8).nfe
