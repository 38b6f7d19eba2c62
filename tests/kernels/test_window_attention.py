"""window_attention: the reference against PyTorch's attention in float64, the kernel against both."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from _support import DEVICE, assert_as_close_as_torch, ints, randn
from hypothesis import given, settings, strategies
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastdllm_triton.kernels import window_attention as module
from fastdllm_triton.kernels._arch import ARCHS, arch_of
from fastdllm_triton.kernels.head_statistics import head_statistics_config
from fastdllm_triton.kernels.token_statistics import token_statistics_config
from fastdllm_triton.kernels.window_attention import Config, select_config
from fastdllm_triton.kernels.window_attention import window_attention as kernel
from fastdllm_triton.reference.window_attention import window_attention as reference


@dataclass(frozen=True)
class Case:
    """Ranges are per sequence: attended slots are ``start <= j < end`` without ``skip[0] <= j < skip[1]``."""

    why: str
    window: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    skip: tuple[tuple[int, int], ...] | None = None
    q_heads: int = 1
    kv_heads: int = 1
    dim: int = 16
    slots: int = 80

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def attended(self) -> Tensor:
        """``[B, L]``, written out slot by slot."""
        mask = torch.zeros(len(self.start), self.slots, dtype=torch.bool)
        for b, (start, end) in enumerate(zip(self.start, self.end, strict=True)):
            for j in range(start, end):
                mask[b, j] = self.skip is None or not self.skip[b][0] <= j < self.skip[b][1]
        return mask


CASES = [
    Case("a step over everything", 8, (0,), (80,), q_heads=2, kv_heads=2),
    Case("one query", 1, (0,), (80,)),
    Case("a refresh", 80, (0,), (80,)),
    Case("odd window", 7, (0, 0), (80, 77)),
    Case("window of 31", 31, (0,), (80,)),
    Case("window of 33", 33, (3,), (80,)),
    Case("window of 64", 64, (3,), (71,)),
    Case("window of 128", 128, (0,), (80,)),
    Case("ragged left padding", 8, (0, 5, 79), (80, 80, 80)),
    Case("around a tile of 32", 4, (0, 0, 0, 0), (31, 32, 33, 1)),
    Case("around a tile of 64", 4, (0, 0, 0, 7), (63, 64, 65, 71)),
    Case("an empty row between others", 4, (0, 40, 80, 0), (80, 40, 80, 0)),
    Case("start behind the end", 4, (50,), (20,)),
    Case("gqa of ratio 4", 5, (0, 2), (80, 60), q_heads=8, kv_heads=2),
    Case("gqa of ratio 7", 5, (0, 2), (80, 60), q_heads=14, kv_heads=2),
    Case("gqa of ratio 8 in one head", 3, (1,), (79,), q_heads=8, kv_heads=1),
    Case("head dim 32", 4, (1,), (79,), dim=32),
    Case("head dim 64", 4, (1,), (79,), dim=64),
    Case("head dim 80", 4, (1,), (79,), dim=80),
    Case("head dim 96", 4, (1,), (79,), dim=96),
    Case("head dim 128", 4, (1,), (79,), dim=128),
    Case("a skip inside a tile", 4, (0, 3), (80, 80), ((5, 9), (40, 41))),
    Case("a skip of whole tiles", 4, (0, 0), (80, 80), ((32, 64), (16, 80))),
    Case("a skip that begins inside a tile", 4, (0,), (80,), ((50, 80),)),
    Case("a skip that ends inside a tile", 4, (0,), (80,), ((0, 50),)),
    Case("a skip of everything", 4, (0, 4), (80, 60), ((0, 80), (4, 60))),
    Case("a skip wider than the range", 4, (10, 10), (20, 20), ((0, 15), (15, 80))),
    Case("a skip outside the range", 4, (10, 10), (20, 20), ((0, 5), (30, 60))),
    Case("an empty skip", 4, (0, 0), (80, 80), ((40, 40), (60, 20))),
    Case("a skip with gqa of ratio 7", 9, (0, 7), (80, 80), ((30, 47), (48, 80)), q_heads=7, kv_heads=1),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", poison: bool = True) -> dict[str, Tensor]:
    """The arguments. Unattended slots of the caches hold NaN: nobody may read them."""
    batch = len(case.start)
    shape = (batch, case.kv_heads, case.slots, case.dim)
    k, v = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    if poison:
        unattended = ~case.attended()[:, None, :, None]
        k, v = k.masked_fill(unattended, torch.nan), v.masked_fill(unattended, torch.nan)
    found = {
        "q": randn(batch, case.window, case.q_heads, case.dim, dtype=dtype),
        "k_cache": k,
        "v_cache": v,
        "kv_start": ints(list(case.start)),
        "kv_end": ints(list(case.end)),
    }
    if case.skip is not None:
        found["skip_start"] = ints([first for first, _ in case.skip])
        found["skip_end"] = ints([last for _, last in case.skip])
    return {name: tensor.to(device) for name, tensor in found.items()}


def sdpa(case: Case, args: dict[str, Tensor], dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """PyTorch's attention, one sequence at a time over its attended slots alone; nothing attended gives 0."""
    out = torch.zeros(args["q"].shape, dtype=dtype)
    for b, slots in enumerate(case.attended()):
        if slots.any():
            q, k, v = (args[name][b].cpu().to(dtype) for name in ("q", "k_cache", "v_cache"))
            y = scaled_dot_product_attention(q.transpose(0, 1), k[:, slots], v[:, slots], scale=scale, enable_gqa=True)
            out[b] = y.transpose(0, 1)
    return out


def base2_lse(case: Case, args: dict[str, Tensor]) -> Tensor:
    """``log2(sum(2^(s log2 e)))`` by head in float64; -inf without keys. ``[B, Hq, W]``."""
    lse = torch.full((len(case.start), case.q_heads, case.window), -torch.inf, dtype=torch.float64)
    for b, slots in enumerate(case.attended()):
        for h in range(case.q_heads if slots.any() else 0):
            k = args["k_cache"][b, h * case.kv_heads // case.q_heads].cpu().double()[slots]
            scores = args["q"][b, :, h].cpu().double() @ k.T / math.sqrt(case.dim)
            lse[b, h] = torch.logsumexp(scores, dim=1) * math.log2(math.e)
    return lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_attention_over_the_attended_slots(case):
    args = inputs(case, torch.float64)
    out, lse = reference(**args, return_lse=True)
    torch.testing.assert_close(out, sdpa(case, args, torch.float64))
    torch.testing.assert_close(lse, base2_lse(case, args))
    assert torch.equal(reference(**args), out)


def test_reference_scales_as_asked_and_writes_into_out():
    case = CASES[0]
    args = inputs(case, torch.float64)
    out = torch.empty_like(args["q"])
    assert reference(**args, scale=0.7, out=out) is out
    torch.testing.assert_close(out, sdpa(case, args, torch.float64, scale=0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_in_low_precision_is_as_close_as_torch(dtype):
    case = Case("", 8, (0, 7), (80, 80), dim=64, q_heads=14, kv_heads=2)
    args = inputs(case, dtype)
    assert_as_close_as_torch(reference(**args), sdpa(case, args, torch.float64), sdpa(case, args, dtype))


def test_reference_survives_scores_that_overflow_exp():
    case = Case("", 4, (0,), (80,))
    args = inputs(case, torch.float32)
    args["q"] *= 1e3
    torch.testing.assert_close(reference(**args).double(), sdpa(case, args, torch.float64), rtol=0, atol=1e-3)


#: Chunks far shorter than any that are chosen, so that small inputs have several.
PLAIN = Config(block_m=16, block_n=32, num_warps=4, num_stages=2, swap=False, splits=1, chunk=4096)
SWAPPED = replace(PLAIN, swap=True)
SPLIT = replace(PLAIN, splits=3, chunk=32)
SPLIT_SWAPPED = replace(SPLIT, swap=True, splits=4, chunk=24)
#: From 128 rows on, what fills no tile has a loop of its own.
MANY_ROWS = replace(PLAIN, block_m=128, block_n=16)
MANY_ROWS_SPLIT = replace(MANY_ROWS, splits=3, chunk=32)


def check_kernel(case: Case, dtype: torch.dtype, config: Config | None = None, scale: float | None = None) -> None:
    args = inputs(case, dtype, DEVICE)
    out, lse = kernel(**args, return_lse=True, config=config, scale=scale)
    assert_as_close_as_torch(out.cpu(), sdpa(case, args, torch.float64, scale), sdpa(case, args, dtype, scale))
    if scale is None:
        torch.testing.assert_close(lse.cpu().double(), base2_lse(case, args), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_close_as_torch(case):
    check_kernel(case, torch.float16)


#: The rest differ in nothing that the operand order or the chunks have to do with.
FORM_CASES = [case for case in CASES if case.window < 31 and case.dim in (16, 80) and case.q_heads in (1, 7)]


FORMS = {"swapped": SWAPPED, "split": SPLIT, "split-swapped": SPLIT_SWAPPED, "many": MANY_ROWS, "many-split": MANY_ROWS_SPLIT}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", FORM_CASES, ids=str)
def test_kernel_in_every_form_is_as_close_as_torch(case, config):
    check_kernel(case, torch.float32, config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [replace(case, dim=max(case.dim, 64)) for case in CASES], ids=str)
def test_kernel_in_every_form_on_a_gpu(case, dtype):
    block_m = 16 if dtype == torch.float32 or case.window * case.q_heads // case.kv_heads <= 16 else 32
    for splits, swap in itertools.product((1, 2, 5), (False, True)):
        check_kernel(case, dtype, Config(block_m, 32, 4, 2, swap and dtype != torch.float32, splits, 80 // splits))


@pytest.mark.gpu
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), module.MODELS.values(), ids=module.MODELS)
@pytest.mark.parametrize("window", [32, 1024])
def test_kernel_with_chosen_configs_on_a_gpu(q_heads, kv_heads, dim, window):
    case = Case("", window, (0, 100), (1024, 1000), q_heads=q_heads, kv_heads=kv_heads, dim=dim, slots=1024)
    check_kernel(case, torch.bfloat16)


def test_kernel_scales_as_asked_and_survives_scores_that_overflow_exp():
    check_kernel(CASES[0], torch.float32, PLAIN, scale=0.7)
    check_kernel(CASES[0], torch.float32, PLAIN, scale=-0.7)
    check_kernel(CASES[0], torch.float32, SPLIT, scale=100.0)


@pytest.mark.parametrize("config", [PLAIN, SPLIT, SPLIT_SWAPPED], ids=["plain", "split", "split-swapped"])
def test_kernel_reads_strided_tensors_and_writes_into_out_and_nowhere_else(config):
    case = Case("", 5, (0, 2), (80, 60), q_heads=7, kv_heads=1)
    args = inputs(case, torch.float32, DEVICE)
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
    case = Case("", 1, (start,), (end,), ((skip_start, skip_end),), slots=40)
    check_kernel(case, torch.float32, config)


def test_kernel_twice_is_bitwise_the_same_and_a_row_does_not_depend_on_its_batch():
    case = Case("", 5, (0, 7), (80, 60), q_heads=4, kv_heads=2)
    args = inputs(case, torch.float32, DEVICE)
    out = kernel(**args, config=SPLIT)
    assert torch.equal(out, kernel(**args, config=SPLIT))
    assert torch.equal(out[1:], kernel(**{name: tensor[1:] for name, tensor in args.items()}, config=SPLIT))


def test_kernel_cuts_ranges_at_the_cache():
    # The cache is the front of a longer one, whose end nobody may read.
    case = Case("", 3, (0,), (80,), slots=96)
    args = inputs(case, torch.float32, DEVICE)
    want = reference(**args)
    args["k_cache"], args["v_cache"] = args["k_cache"][:, :, :80], args["v_cache"][:, :, :80]
    args["kv_start"] -= 9
    torch.testing.assert_close(kernel(**args, config=PLAIN), want)
    args["kv_end"] += 9
    out, layout = torch.empty_like(want), module._layout(*args.values(), None, None, None)
    module._launch(module.arch_of(DEVICE), PLAIN, layout, *args.values(), None, None, 0.25, out, None, None)
    torch.testing.assert_close(out, want)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the host does not read a GPU's ranges")
def test_kernel_names_a_range_beyond_the_cache_where_that_costs_nothing():
    args = inputs(CASES[1], torch.float32, DEVICE)
    args["kv_end"] += 9
    with pytest.raises(ValueError, match="kv_end must be .*, got 89"):
        kernel(**args)


@pytest.mark.parametrize("distance", ["sequences", "slots"])
def test_kernel_reaches_caches_of_more_than_2_to_the_31_elements(distance):
    # In memory that is reserved and, but for a few pages, never touched.
    # Each stride fits 32 bits; the product with the last index does not.
    batch, slots = (3, 3) if distance == "sequences" else (1, 193)
    strides = (2**30, 48, 16, 1) if distance == "sequences" else (2**30, 16, 2**24 - 16, 1)
    case = Case("", 2, (0,) * batch, (slots,) * batch, q_heads=1, kv_heads=1, slots=slots)
    args = inputs(case, torch.float16, DEVICE)
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
    with pytest.raises(ValueError, match="q must be .*, got a tensor on cpu"):
        kernel(**inputs(Case("", 3, (0,), (83,), slots=83), torch.float32))  # a layout that has not been checked before


def test_nothing_to_do_is_done():
    case = Case("", 0, (0,), (80,))
    assert kernel(**inputs(case, torch.float32, DEVICE)).shape == (1, 0, 1, 16)
    assert kernel(**inputs(Case("", 3, (), ()), torch.float32, DEVICE)).shape == (0, 3, 1, 16)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_fit_shared_memory_and_cover_the_cache(arch):
    heads = [*module.MODELS.values(), (2, 2, 16), (4, 2, 64), (32, 32, 80), (32, 32, 96)]
    for (q_heads, kv_heads, dim), batch, slots in itertools.product(heads, module.BATCHES, module.SLOTS):
        for window, itemsize in itertools.product((1, *module.WINDOWS, slots), (2, 4)):
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
    assert head_statistics_config(arch, 32, 126_464, 4096, 2, False).parts <= 2 * sms
    assert token_statistics_config(arch, 1, 126_464, 2).splits <= 4 * sms


@pytest.mark.parametrize("op", ["window_attention", "rope_kv_write", "commit_tokens"])
def test_the_rows_of_a_batch_that_a_launch_takes_do_not_compile_it_again(op):
    # They are slices of int32 and bool tensors from any row on, which need not be aligned.
    kernel = getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), f"_{op}_kernel")
    options = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)  # of the interpreter, of the compiler
    sliced = {"start_ptr", "end_ptr", "skip_start_ptr", "skip_end_ptr", "window_start_ptr", "kv_start_ptr", "seed_ptr"}
    sliced |= {"step_ptr", "masked_ptr", "remaining_ptr", "invalid_ptr", "ended_ptr"}
    assert set(options["do_not_specialize_on_alignment"]) == sliced & set(kernel.arg_names)
    assert set(options["do_not_specialize"] or ()) >= {"W", "L"} & set(kernel.arg_names)


def test_cudnn_runs_where_it_was_measured_and_all_rows_attend_the_same_slots(monkeypatch):
    asked = []
    case = Case("", 5, (8, 8), (70, 70), q_heads=6, kv_heads=2)
    args = inputs(case, torch.float32, DEVICE)
    want = kernel(**args)
    measured = {"batch": 2, "window": 5, "slots": 80}
    monkeypatch.setattr(module, "gpu_name", lambda device: "NVIDIA Test 7")

    def nearest(gpu, op, sizes, **shape):
        asked.append(op)
        return {"library": "cudnn"} if op == "cudnn_attention" and sizes == measured else None

    monkeypatch.setattr(module, "nearest", nearest)
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
    module.select_config.cache_clear()
    module.cudnn_wins.cache_clear()


def test_without_a_measurement_a_span_changes_nothing():
    args = inputs(Case("", 5, (8, 8), (70, 70)), torch.float32, DEVICE)
    assert torch.equal(kernel(**args, span=(8, 70)), kernel(**args))
