"""window_attention: the reference against PyTorch's attention in float64, its own claims of the kernel."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _support import CPU, DEVICE, assert_as_close_as_torch, assert_case_holds, ints, small_cases
from hypothesis import given, settings, strategies
from torch import Tensor

from fastdllm_triton.kernels import _library, head_statistics, token_statistics
from fastdllm_triton.kernels import window_attention as module
from fastdllm_triton.kernels._arch import ARCHS, arch_of
from fastdllm_triton.kernels.window_attention import Config, select_config
from fastdllm_triton.kernels.window_attention import window_attention as kernel
from fastdllm_triton.reference.window_attention import window_attention as reference
from fastdllm_triton.types import LaunchOptions
from fastdllm_triton.verify.cases.window_attention import HEADS, WINDOW_ATTENTION, attended, by_torch

CASES = small_cases("window_attention")
STEP, ONE_QUERY = CASES[0], next(case for case in CASES if case.why == "one query")


def inputs(sizes: Any, dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Tensor]:
    """The arguments. Unattended slots of the caches hold NaN: nobody may read them."""
    return WINDOW_ATTENTION.inputs(sizes, device, dtype)


def sizes(window: int, start: tuple[int, ...], end: tuple[int, ...], *heads: int, **more: Any) -> dict[str, Any]:
    return {"window": window, "start": start, "end": end, **({"heads": heads} if heads else {}), **more}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_attention_over_the_attended_slots(case):
    args = inputs(case.sizes, torch.float64)
    out, lse = reference(**args, return_lse=True)
    want = by_torch(args)
    torch.testing.assert_close(out, want["out"])
    torch.testing.assert_close(lse, want["lse"])
    assert torch.equal(reference(**args), out)


def test_the_attended_slots_are_those_of_the_ranges_slot_by_slot():
    for case in CASES:
        args = inputs(case.sizes, torch.float32)
        ranges = [
            args[name].tolist() for name in ("kv_start", "kv_end", *(("skip_start", "skip_end") if "skip_start" in args else ()))
        ]
        windows, length = args.get("block_causal", (torch.zeros(len(args["q"])), 10**9))
        batch, window = args["q"].shape[:2]
        want = torch.zeros(batch, window, args["k_cache"].shape[2], dtype=torch.bool)
        for b, (start, end, *skip) in enumerate(zip(*ranges, strict=True)):
            for query, slot in itertools.product(range(window), range(start, end)):
                position = int(windows[b]) + query - start
                allowed = "block_causal" not in args or (position >= 0 and slot < start + (position // length + 1) * length)
                want[b, query, slot] = allowed and (not skip or not skip[0] <= slot < skip[1])
        assert torch.equal(attended(args).expand_as(want), want)
        assert torch.equal(args["k_cache"][:, 0, :, 0].isnan(), ~want.any(1))


def test_reference_scales_as_asked_and_writes_into_out():
    args = inputs(STEP.sizes, torch.float64)
    out = torch.empty_like(args["q"])
    assert reference(**args, scale=0.7, out=out) is out
    torch.testing.assert_close(out, by_torch(args, scale=0.7)["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_in_low_precision_is_as_close_as_torch(dtype):
    args = inputs(sizes(8, (0, 7), (80, 80), 14, 2, 64), dtype)
    assert_as_close_as_torch(reference(**args), exact(args), by_torch(args)["out"])


def test_reference_survives_scores_that_overflow_exp():
    args = inputs(sizes(4, (0,), (80,)), torch.float32)
    args["q"] *= 1e3
    torch.testing.assert_close(reference(**args).double(), exact(args), rtol=0, atol=1e-3)


#: Chunks far shorter than any that are chosen, so that small inputs have several.
PLAIN = Config(block_m=16, block_n=32, num_warps=4, num_stages=2, swap_ab=False, splits=1, chunk=4096)
SWAPPED = replace(PLAIN, swap_ab=True)
SPLIT = replace(PLAIN, splits=3, chunk=32)
SPLIT_SWAPPED = replace(SPLIT, swap_ab=True, splits=4, chunk=24)
#: From 128 rows on, what fills no tile has a loop of its own.
MANY_ROWS = replace(PLAIN, block_m=128, block_n=16)
MANY_ROWS_SPLIT = replace(MANY_ROWS, splits=3, chunk=32)


#: The rest differ in nothing that the operand order or the chunks have to do with.
FORM_CASES = [
    case
    for case in CASES
    if case.sizes["window"] < 31 and "slots" not in case.sizes
    and case.sizes.get("heads", (1, 1, 16)) in ((1, 1, 16), (1, 1, 80), (7, 1, 16), (14, 2, 16))
]  # fmt: skip
FORMS = {"swapped": SWAPPED, "split": SPLIT, "split-swapped": SPLIT_SWAPPED, "many": MANY_ROWS, "many-split": MANY_ROWS_SPLIT}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_kernel_in_every_form_is_as_close_as_torch(case, config):
    assert_case_holds("window_attention", case, torch.float32, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [case for case in CASES if "slots" not in case.sizes], ids=str)
def test_kernel_in_every_form_on_a_gpu(case, dtype):
    q_heads, kv_heads, dim = case.sizes.get("heads", (1, 1, 16))
    case = replace(case, sizes={**case.sizes, "heads": (q_heads, kv_heads, max(dim, 64))})
    block_m = 16 if dtype == torch.float32 or case.sizes["window"] * q_heads // kv_heads <= 16 else 32
    for splits, swap in itertools.product((1, 2, 5), (False, True)):
        config = Config(block_m, 32, 4, 2, swap and dtype != torch.float32, splits, 80 // splits)
        assert_case_holds("window_attention", case, dtype, config=config)


def exact(args: dict[str, Tensor], scale: float | None = None) -> Tensor:
    """PyTorch's attention in float64."""
    tensors = {name: value.double() for name, value in args.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return by_torch(args | tensors, scale)["out"]


def check_kernel(sizes: Any, dtype: torch.dtype, config: Config | None = None, scale: float | None = None) -> None:
    args = inputs(sizes, dtype, DEVICE)
    assert_as_close_as_torch(kernel(**args, config=config, scale=scale), exact(args, scale), by_torch(args, scale)["out"])


def test_kernel_scales_as_asked_and_survives_scores_that_overflow_exp():
    check_kernel(STEP.sizes, torch.float32, PLAIN, scale=0.7)
    check_kernel(STEP.sizes, torch.float32, PLAIN, scale=-0.7)
    check_kernel(STEP.sizes, torch.float32, SPLIT, scale=100.0)


@pytest.mark.parametrize("config", [PLAIN, SPLIT, SPLIT_SWAPPED], ids=["plain", "split", "split-swapped"])
def test_kernel_reads_strided_tensors_and_writes_into_out_and_nowhere_else(config):
    args = inputs(sizes(5, (0, 2), (80, 60), 7, 1, 16), torch.float32, DEVICE)
    want = reference(**args)
    # Layers interleaved by slot, [B, L, layers, 2, Hkv, D], and q as part of a fused projection.
    stacked = torch.full((2, 80, 3, 2, 1, 16), torch.nan, device=DEVICE)
    stacked[:, :, 1, 0], stacked[:, :, 1, 1] = args["k_cache"].transpose(1, 2), args["v_cache"].transpose(1, 2)
    args["k_cache"], args["v_cache"] = stacked[:, :, 1, 0].transpose(1, 2), stacked[:, :, 1, 1].transpose(1, 2)
    fused = torch.full((2, 5, 9, 2, 16), torch.nan, device=DEVICE)
    fused[:, :, :7, 1] = args["q"]
    args["q"] = fused[:, :, :7, 1]
    wide = torch.full((2, 5, 10, 3, 16), 7.0, device=DEVICE)
    # A workspace that others have used, longer than needed: what lies beyond stays.
    needed = config.workspace_elements(2, 5, 7, 16)
    workspace = torch.full((needed + 8,), torch.nan, device=DEVICE)
    out = kernel(**args, out=wide[:, :, :7, 0], workspace=workspace, config=config)
    assert out.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(out, want)
    assert (wide[:, :, 7:] == 7).all()
    assert (wide[:, :, :, 1:] == 7).all()
    assert workspace[needed:].isnan().all()


@given(data=strategies.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_kernel_attends_exactly_the_range_less_the_skip_for_any_chunks(data):
    slot = strategies.integers(0, 40)
    start, end, skip_start, skip_end = (data.draw(slot) for _ in range(4))
    chunk = data.draw(strategies.integers(1, 50))
    form = data.draw(strategies.sampled_from([PLAIN, SWAPPED, MANY_ROWS]))
    config = replace(form, block_n=16, chunk=chunk, splits=-(-40 // chunk))
    check_kernel(sizes(1, (start,), (end,), skip=((skip_start, skip_end),), slots=40), torch.float32, config)


@given(data=strategies.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_block_causal_query_attends_its_block_and_those_before_it_for_any_chunks(data):
    start, end, first = (
        data.draw(strategies.integers(0, 12)),
        data.draw(strategies.integers(0, 40)),
        data.draw(strategies.integers(0, 30)),
    )
    chunk, block = data.draw(strategies.integers(1, 50)), data.draw(strategies.integers(1, 11))
    form = data.draw(strategies.sampled_from([PLAIN, SWAPPED, MANY_ROWS]))
    config = replace(form, block_n=16, chunk=chunk, splits=-(-40 // chunk))
    check_kernel(sizes(10, (start,), (end,), 4, 2, 16, block=block, first=(first,), slots=40), torch.float32, config)


BLOCK_CAUSAL_FORMS = {"reference": None, "plain": PLAIN, **FORMS}


@pytest.mark.parametrize("config", BLOCK_CAUSAL_FORMS.values(), ids=BLOCK_CAUSAL_FORMS)
@pytest.mark.parametrize("block", [1, 4, 7, 32])
def test_a_later_token_changes_nothing_in_an_earlier_block(block, config):
    run = reference if config is None else partial(kernel, config=config)
    args = inputs(sizes(60, (3,), (63,), 2, 1, 16, block=block, first=(3,)), torch.float32, DEVICE)
    want = run(**args)
    for position in (0, 5, 31, 32, 58):
        edge = position // block * block  # of the block of the changed token
        changed = args | {name: args[name].clone() for name in ("k_cache", "v_cache", "q")}
        changed["q"][:, position] += 1
        for name in ("k_cache", "v_cache"):
            changed[name][:, :, 3 + position] += 1
        got = run(**changed)
        assert torch.equal(got[:, :edge], want[:, :edge])
        assert (got[:, edge : edge + block] != want[:, edge : edge + block]).any(-1).all()


@pytest.mark.parametrize("config", [None, PLAIN, MANY_ROWS, SPLIT_SWAPPED], ids=["reference", "plain", "many", "split-swapped"])
def test_a_prefill_in_one_forward_is_that_of_its_blocks_one_by_one(config):
    run = reference if config is None else partial(kernel, config=config)
    args = inputs(sizes(40, (2, 5), (42, 45), 7, 1, 16, block=8, first=(2, 5), slots=48), torch.float32, DEVICE)
    at_once = run(**args)
    for first in range(0, 40, 8):
        ends = {"kv_end": torch.minimum(args["kv_start"] + first + 8, args["kv_end"])}
        block = {name: args[name] for name in ("k_cache", "v_cache", "kv_start")} | {"q": args["q"][:, first : first + 8]}
        torch.testing.assert_close(at_once[:, first : first + 8], run(**block, **ends))


def test_a_block_without_an_end_is_bidirectional():
    args = inputs(sizes(9, (0, 4), (80, 60), 4, 2, 16), torch.float32, DEVICE)
    whole = ints([20, 30], DEVICE), 1000
    for run in (reference, partial(kernel, config=PLAIN), partial(kernel, config=SPLIT)):
        assert torch.equal(run(**args, block_causal=whole), run(**args))


def test_kernel_twice_is_bitwise_the_same_and_a_row_does_not_depend_on_its_batch():
    args = inputs(sizes(5, (0, 7), (80, 60), 4, 2, 16), torch.float32, DEVICE)
    out = kernel(**args, config=SPLIT)
    assert torch.equal(out, kernel(**args, config=SPLIT))
    assert torch.equal(out[1:], kernel(**{name: tensor[1:] for name, tensor in args.items()}, config=SPLIT))


def test_kernel_cuts_ranges_at_the_cache():
    # The cache is the front of a longer one, whose end nobody may read.
    args = inputs(sizes(3, (0,), (80,), slots=96), torch.float32, DEVICE)
    want = reference(**args)
    args["k_cache"], args["v_cache"] = args["k_cache"][:, :, :80], args["v_cache"][:, :, :80]
    args["kv_start"] -= 9
    torch.testing.assert_close(kernel(**args, config=PLAIN), want)
    args["kv_end"] += 9
    out, layout = torch.empty_like(want), module._layout(*args.values(), None, None, None, None, None)
    module._launch(module.arch_of(DEVICE), PLAIN, layout, *args.values(), *[None] * 4, 0.25, out, None, None, LaunchOptions())
    torch.testing.assert_close(out, want)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the host does not read a GPU's ranges")
def test_kernel_names_a_range_beyond_the_cache_where_that_costs_nothing():
    args = inputs(ONE_QUERY.sizes, torch.float32, DEVICE)
    args["kv_end"] += 9
    with pytest.raises(ValueError, match=r"kv_end must be .*, got 89"):
        kernel(**args)


@pytest.mark.parametrize("distance", ["sequences", "slots"])
def test_kernel_reaches_caches_of_more_than_2_to_the_31_elements(distance):
    # In memory that is reserved and, but for a few pages, never touched.
    # Each stride fits 32 bits; the product with the last index does not.
    batch, slots = (3, 3) if distance == "sequences" else (1, 193)
    strides = (2**30, 48, 16, 1) if distance == "sequences" else (2**30, 16, 2**24 - 16, 1)
    args = inputs(sizes(2, (0,) * batch, (slots,) * batch, slots=slots), torch.float16, DEVICE)
    want = reference(**args)
    length = sum((size - 1) * stride for size, stride in zip(args["k_cache"].shape, strides, strict=True)) + 1
    assert length > 2**31
    for name in ("k_cache", "v_cache"):
        storage = torch.UntypedStorage(2 * length, device=DEVICE)
        far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, args[name].shape, strides)
        args[name] = far.copy_(args[name])
    torch.testing.assert_close(kernel(**args, config=PLAIN), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(5, 4, 16)}, "q must be .*, got shape"),
        ({"q": torch.ones(1, 5, 3, 16)}, "q must be .*, got 3 heads"),
        ({"q": torch.ones(1, 5, 4, 256)}, "q must be .*, got one of 256"),
        ({"q": torch.ones(1, 5, 4, 16, dtype=torch.float16)}, "k_cache must be .*, got torch.float32"),
        ({"q": torch.ones(1, 5, 4, 32)[..., ::2]}, "q must be .*, got strides"),
        ({"k_cache": torch.ones(2, 8, 16)}, "k_cache must be .*, got shape"),
        ({"k_cache": torch.ones(1, 2, 16, 8).transpose(2, 3)}, "k_cache must be .*, got strides"),
        ({"v_cache": torch.ones(1, 2, 9, 16)}, "v_cache must be .*, got shape"),
        ({"v_cache": torch.ones(1, 2, 8, 16, dtype=torch.float64)}, "v_cache must be .*, got torch.float64"),
        ({"kv_start": torch.zeros(1, dtype=torch.int64)}, "kv_start must be .*, got torch.int64"),
        ({"kv_end": torch.zeros(2, dtype=torch.int32)}, "kv_end must be .*, got shape"),
        ({"skip_start": torch.zeros(1, dtype=torch.int32)}, "skip_end must be .*, got nothing"),
        ({"skip_end": torch.zeros(1, dtype=torch.int32)}, "skip_start must be .*, got nothing"),
        ({"block_causal": (torch.zeros(2, dtype=torch.int32), 4)}, r"block_causal\[0\] must be .*, got shape"),
        ({"block_causal": (torch.zeros(1), 4)}, r"block_causal\[0\] must be .*, got torch.float32"),
        (
            {"block_causal": (torch.zeros(1, dtype=torch.int32), 0)},
            r"block_causal\[1\] must be an integer in \[1, 2\^30\], got 0",
        ),
        (
            {"block_causal": (ints([0]), 4), "skip_start": ints([0]), "skip_end": ints([1])},
            "skip_start must be None with block_causal, got a tensor",
        ),
        ({"out": torch.ones(1, 5, 4, 8)}, "out must be .*, got shape"),
        ({"workspace": torch.ones(7), "config": SPLIT}, "workspace must be .*, got 7 elements"),
        ({"workspace": torch.ones(10_000, dtype=torch.float16)}, "workspace must be .*, got torch.float16"),
    ],
)
def test_kernel_names_what_is_wrong(change, message):
    args = {"q": torch.ones(1, 5, 4, 16), "k_cache": torch.ones(1, 2, 8, 16), "v_cache": torch.ones(1, 2, 8, 16)}
    args |= {"kv_start": ints([0]), "kv_end": ints([8])} | change
    with pytest.raises(ValueError, match=message):
        kernel(**{name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in args.items()})


def test_kernel_asks_for_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("fastdllm_triton.kernels._check.INTERPRETED", False)
    monkeypatch.setattr("fastdllm_triton.kernels._check.is_emulated", lambda: False)
    with pytest.raises(ValueError, match=r"q must be .*, got a tensor on cpu"):
        kernel(**inputs(sizes(3, (0,), (83,), slots=83), torch.float32))  # a layout that has not been checked before


def test_nothing_to_do_is_done():
    assert kernel(**inputs(sizes(0, (0,), (80,)), torch.float32, DEVICE)).shape == (1, 0, 1, 16)
    assert kernel(**inputs({"window": 3, "batch": 0}, torch.float32, DEVICE)).shape == (0, 3, 1, 16)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_fit_shared_memory_and_cover_the_cache(arch):
    heads = [*HEADS.values(), (2, 2, 16), (4, 2, 64), (32, 32, 80), (32, 32, 96)]
    for (q_heads, kv_heads, dim), batch, slots in itertools.product(
        heads, (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
    ):
        for window, itemsize in itertools.product((1, 16, 32, 64, 128, slots), (2, 4)):
            config = select_config(arch, batch, window, q_heads, kv_heads, dim, slots, itemsize)
            assert module.shared_bytes(arch, config, dim, itemsize) <= arch.shared_bytes
            assert config.splits * config.chunk >= slots > (config.splits - 1) * config.chunk
            assert config.splits == 1 or config.chunk >= module.MIN_CHUNK
            assert config.chunk % config.block_n == 0


def test_keys_are_split_where_shorter_chains_of_tiles_save_more_than_the_merge_costs():
    arch = ARCHS["sm_90"]
    # LLaDA, one sequence, 32 heads: 8 chunks put two programs on each of 132 SMs.
    assert select_config(arch, 1, 32, 32, 32, 128, 4096, 2).splits == 8
    assert select_config(arch, 1, 32, 32, 32, 128, 512, 2).chunk == module.MIN_CHUNK
    assert select_config(arch, 1, 32, 32, 32, 128, 320, 2).splits == 1  # five tiles take less time than a second launch
    assert select_config(arch, 16, 32, 32, 32, 128, 4096, 2).splits == 1
    assert select_config(arch, 1, 4096, 32, 32, 128, 4096, 2).splits == 1
    # Dream: 224 rows a KV head. At eight sequences twice the chunks would be twice the partial sums, for no shorter chain.
    programs = [batch * 4 * 4 * select_config(arch, batch, 32, 28, 4, 128, 1024, 2).splits for batch in (1, 2, 4, 8, 16)]
    assert all(count <= 2 * arch.sms for count in programs)


def test_chunks_are_whole_tiles_and_equally_long_but_for_the_last():
    config = select_config(ARCHS["sm_90"], 1, 32, 32, 32, 128, 1280, 2)
    assert config.chunk % config.block_n == 0
    assert config.chunk % 128 != 0 or config.splits * config.chunk == 1280


@pytest.mark.parametrize("sms", [78, 114])
def test_the_sms_of_the_device_decide_not_those_of_its_architecture(sms, monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=sms)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    arch = arch_of.__wrapped__(torch.device("cuda"))
    assert arch == replace(ARCHS["sm_90"], sms=sms)
    assert head_statistics.select_config(arch, 32, 126_464, 4096, 2, False).parts <= 2 * sms
    assert token_statistics.select_config(arch, 1, 126_464, 2).splits <= 4 * sms


@pytest.mark.parametrize("op", ["window_attention", "rope_kv_write", "commit_tokens"])
def test_the_rows_of_a_batch_that_a_launch_takes_do_not_compile_it_again(op):
    # They are slices of int32 and bool tensors from any row on, which need not be aligned.
    kernel = getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), f"_{op}_kernel")
    options = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)  # of the interpreter, of the compiler
    sliced = {"start_ptr", "end_ptr", "skip_start_ptr", "skip_end_ptr", "window_start_ptr", "kv_start_ptr", "seed_ptr"}
    sliced |= {"step_ptr", "masked_ptr", "remaining_ptr", "invalid_ptr", "ended_ptr", "value_ptr", "steps_ptr", "shares_ptr"}
    sliced |= {"eos_ptr", "forward_ptr", "prompt_end_ptr"}
    assert set(options["do_not_specialize_on_alignment"]) == sliced & set(kernel.arg_names)
    assert set(options["do_not_specialize"] or ()) >= {"W", "L"} & set(kernel.arg_names)


def test_cudnn_runs_where_it_was_measured_and_all_rows_attend_the_same_slots(monkeypatch):
    asked = []
    args = inputs(sizes(5, (8, 8), (70, 70), 6, 2, 16), torch.float32, DEVICE)
    want = kernel(**args)
    measured = {"batch": 2, "window": 5, "slots": 80}
    monkeypatch.setattr(module, "gpu_name", lambda device: "NVIDIA Test 7")

    def nearest(gpu, op, sizes, **shape):
        asked.append(op)
        return {"library": "cudnn"} if op == "cudnn_attention" and sizes == measured else None

    for file in (module, _library):
        monkeypatch.setattr(file, "nearest", nearest)
    module.cudnn_wins.cache_clear()
    torch.testing.assert_close(kernel(**args, span=(8, 70)), want)
    assert asked == ["cudnn_attention"]  # the kernel has not been asked for its config
    out = torch.empty_like(want)
    assert kernel(**args, span=(8, 70), out=out) is out
    torch.testing.assert_close(out, want)
    asked.clear()
    module.select_config.cache_clear()
    _, lse = kernel(**args, span=(8, 70), return_lse=True)  # which cuDNN does not give
    assert lse.isfinite().all() and asked == ["window_attention"]
    asked.clear()
    module.select_config.cache_clear()
    kernel(**args, span=(8, 70), block_causal=(ints([8, 8], DEVICE), 4))  # nor has it such a mask
    assert asked == ["window_attention"]
    module.select_config.cache_clear()
    module.cudnn_wins.cache_clear()


def test_without_a_measurement_a_span_changes_nothing():
    args = inputs(sizes(5, (8, 8), (70, 70)), torch.float32, DEVICE)
    assert torch.equal(kernel(**args, span=(8, 70)), kernel(**args))
