"""How many kernels a call launches, and that neighbours may overlap without a change of results."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from _support import DEVICE, ints, randn

from fastdllm_triton import ops, reference
from fastdllm_triton.kernels import _attention, _pdl, _statistics
from fastdllm_triton.kernels._arch import ARCHS, arch_of
from fastdllm_triton.kernels.linear import Config, select_config
from fastdllm_triton.tools.recorder import META, recorded
from fastdllm_triton.types import DEFAULT_LAUNCH, LaunchOptions, PolicyState
from fastdllm_triton.verify.cases import OPS
from fastdllm_triton.verify.cases.linear import PROJECTIONS


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launched: list[str]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far."""
    names: list[str] = []
    for module in (_attention, _statistics, *(importlib.import_module(f"fastdllm_triton.kernels.{op}") for op in ops.NAMES)):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and hasattr(kernel, "arg_names"):
                monkeypatch.setattr(module, name, Counted(kernel, names))
    return names


def call(op: str, *args: Any, **kwargs: Any) -> None:
    getattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), op)(*args, **kwargs)


def test_ops_of_one_kernel_launch_one(launched):
    x, weight = randn(2, 3, 64, dtype=torch.float32, device=DEVICE), randn(64, dtype=torch.float32, device=DEVICE)
    call("rms_norm", x, weight, 1e-5, residual=x)
    call("swiglu", x)
    cache, start = torch.zeros(2, 1, 8, 16, device=DEVICE), ints([0, 0], DEVICE)
    call("rope_kv_write", x, cache, cache.clone(), start, start, 1e4)
    assert launched == ["_rms_norm_kernel", "_swiglu_kernel", "_rope_kv_write_kernel"]


@pytest.mark.parametrize(("slots", "count"), [(64, 1), (600, 2)])
def test_window_attention_launches_a_merge_where_the_keys_are_split(slots, count, launched):
    q, cache = randn(1, 2, 2, 16, dtype=torch.float32, device=DEVICE), torch.zeros(1, 1, slots, 16, device=DEVICE)
    call("window_attention", q, cache, cache, ints([0], DEVICE), ints([slots], DEVICE))
    assert len(launched) == count


@pytest.mark.parametrize(("rows", "vocabulary", "count"), [(2, 100, 1), (1, 20_000, 2)])
def test_token_statistics_launches_a_merge_where_rows_are_split(rows, vocabulary, count, launched):
    call("token_statistics", torch.zeros(rows, vocabulary, device=DEVICE))
    assert len(launched) == count


def test_what_is_recorded_is_what_was_measured_on_a_gpu(monkeypatch):
    splits = {"NVIDIA Test 5": 1, "NVIDIA Test 6": 4}
    tiles: dict[str, dict[str, Any]] = {
        "window_attention": {"block_m": 32, "block_n": 64, "swap_ab": False},
        "token_statistics": {},
    }

    def nearest(gpu: str | None, op: str, *_: Any, **__: Any) -> dict[str, Any] | None:
        return tiles[op] | {"num_warps": 4, "num_stages": 2, "splits": splits[gpu]} if gpu and op in tiles else None

    for op in tiles:
        monkeypatch.setattr(importlib.import_module(f"fastdllm_triton.kernels.{op}"), "nearest", nearest)
    sizes = {
        "window_attention": {"model": "llada", "window": 32, "slots": 3072},
        "token_statistics": {"rows": 32, "vocabulary": 126_464, "bits": 32},
        # 128 rows of logits go through cuBLAS and one pass.
        "head_statistics": {"rows": 128, "vocabulary": 126_464, "width": 4096},
    }
    for gpu, count in (("NVIDIA Test 5", 1), ("NVIDIA Test 6", 2)):
        for op, shape in sizes.items():
            inputs = OPS[op].inputs(shape, META, torch.bfloat16)
            with recorded(ARCHS["sm_90"], gpu) as launches:
                OPS[op].kernel(**inputs)
            assert len(launches) == count, op


def test_what_is_recorded_is_what_a_launch_is_given():
    x = torch.zeros(3, 5, 40, dtype=torch.bfloat16, device=META)[:, :, :32]
    with recorded(ARCHS["sm_90"]) as launches:
        call("rms_norm", x, x[0, 0], 1e-5)
    (launch,) = launches
    assert (launch.file, launch.dtype, launch.programs) == ("rms_norm", "bf16", 15)
    assert launch.signature["x_ptr"] == "*bf16" and launch.signature["eps"] == "fp32" and launch.signature["stride_x"] == "i32"
    assert launch.constants["E"] == 32 and launch.constants["PDL"] is True and launch.constants["rows_ptr"] is None
    assert "x_ptr" in launch.divisible and "stride_x" not in launch.divisible  # rows are 40 apart
    assert launch.options["num_warps"] >= 1
    assert launch.signature.keys() | launch.constants.keys() == set(launch.kernel.arg_names)
    call("rms_norm", torch.ones(2, 32, device=DEVICE), torch.ones(32, device=DEVICE), 1e-5)  # the kernels are back
    assert len(launches) == 1


@pytest.mark.parametrize("rows", [3, 65])
def test_head_statistics_launches_two_or_the_library_and_a_pass(rows, launched):
    hidden, weight = randn(rows, 16, dtype=torch.float32, device=DEVICE), randn(40, 16, dtype=torch.float32, device=DEVICE)
    call("head_statistics", hidden, weight)
    by_library = int(rows > 64)
    assert len(launched) + by_library == 2


def test_commit_tokens_launches_one_for_all_rows(launched):
    state = PolicyState.create(
        "confidence", "threshold", value=0.9, steps=1, mask_id=10, kv_start=torch.zeros(3, dtype=torch.int32, device=DEVICE),
        seed=torch.zeros(3, dtype=torch.int64, device=DEVICE), slots=8,
    )  # fmt: skip
    statistics = reference.token_statistics(randn(12, 11, dtype=torch.float32, device=DEVICE)).view(3, 4)
    call("commit_tokens", torch.full((3, 8), 10, device=DEVICE), statistics, ints([0, 0, 0], DEVICE), state)
    assert launched == ["_commit_tokens_kernel"]


@pytest.mark.parametrize("splits", [1, 2])
def test_linear_launches_one_and_the_sum_of_its_splits(splits, launched):
    x, weight = randn(3, 64, dtype=torch.float32, device=DEVICE), randn(16, 64, dtype=torch.float32, device=DEVICE)
    config = Config(16, 16, 32, False, splits, 4, 2)
    call("linear", x, weight, residual=x[:, :16], config=config)
    assert len(launched) == config.launches == splits


def test_linear_of_the_library_launches_a_kernel_for_each_part_around_the_product(launched):
    x, weight = randn(3, 64, dtype=torch.float32, device=DEVICE), randn(32, 64, dtype=torch.float32, device=DEVICE)
    call("linear", x, weight, norm_weight=weight[0], eps=1e-5, activation="swiglu", residual=x[:, :16])
    assert launched == ["_rms_norm_kernel", "_swiglu_kernel"]  # around the library's product, and its sum behind them


# Programmatic dependent launch.


def test_launches_overlap_from_hopper_on_and_never_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(_pdl, "INTERPRETED", False)
    assert [name for name, arch in ARCHS.items() if _pdl.has_dependent_launch(arch)] == ["sm_90", "sm_100", "sm_120"]
    assert _pdl.dependent_launch(ARCHS["sm_90"], DEFAULT_LAUNCH) == {"PDL": True, "launch_pdl": True}
    assert _pdl.dependent_launch(ARCHS["sm_90"], LaunchOptions(pdl=False)) == {"PDL": False}
    # Other backends and the interpreter do not know the launch option.
    for arch in ("sm_89", "gfx942"):
        assert _pdl.dependent_launch(ARCHS[arch], DEFAULT_LAUNCH) == {"PDL": False}
    monkeypatch.setattr(_pdl, "INTERPRETED", True)
    assert _pdl.dependent_launch(ARCHS["sm_90"], DEFAULT_LAUNCH) == {"PDL": False}


def layers(
    x: torch.Tensor, weights: dict[str, torch.Tensor], start: torch.Tensor, end: torch.Tensor, **options: bool
) -> torch.Tensor:
    """A chain of eight small layers over the same buffers, each kernel reading what the one before it wrote."""
    k, v = torch.zeros(1, 4, 256, 32, device=x.device, dtype=x.dtype), torch.zeros(1, 4, 256, 32, device=x.device, dtype=x.dtype)
    run = ops.resolve("triton", x.device).with_options(**options)

    def project(x: torch.Tensor, name: str, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = run.linear(x, weights[name], **kwargs)
        return y

    for _ in range(8):
        q = run.rope_kv_write(project(x, "qkv", norm_weight=weights["norm"], eps=1e-5), k, v, start, start, 1e4)
        y = run.window_attention(q, k, v, start, end).flatten(2)
        x = project(y, "out", residual=x)
        x = project(project(x, "gate_up", norm_weight=weights["norm"], eps=1e-5, activation="swiglu"), "down", residual=x)
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_chain_of_overlapping_kernels_gives_what_it_gives_one_by_one(fused):
    def normal(*size: int, seed: int) -> torch.Tensor:
        return (randn(*size, seed=seed) / size[-1] ** 0.5).to(DEVICE, torch.bfloat16)

    shapes = {"qkv": (384, 128), "out": (128, 128), "gate_up": (1024, 128), "down": (128, 512)}
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    weights["norm"] = torch.ones(128, device=DEVICE, dtype=torch.bfloat16)
    x, start, end = normal(1, 32, 128, seed=9), ints([0], DEVICE), ints([256], DEVICE)
    want = layers(x, weights, start, end, pdl=False, fuse_linear=fused)
    torch.cuda.synchronize()
    assert torch.equal(layers(x, weights, start, end, fuse_linear=fused), want)  # also compiles what is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layers(x, weights, start, end, fuse_linear=fused)
    for _ in range(200):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_launched_early_reads_what_the_launch_before_it_wrote(name):
    # The producer is a product too, with more programs than fit at once, so that its last tiles are late.
    n, k, norm, activation, residual = PROJECTIONS[name]
    arch = arch_of(DEVICE)
    first, second = randn(k, 512, seed=1).to(DEVICE, torch.bfloat16) / 16, randn(n, k, seed=2).to(DEVICE, torch.bfloat16) / 64
    around: dict[str, Any] = {"activation": activation}
    around |= {"norm_weight": torch.ones(k, device=DEVICE, dtype=torch.bfloat16), "eps": 1e-5} if norm else {}
    around |= {"residual": torch.zeros(32, n, device=DEVICE, dtype=torch.bfloat16)} if residual else {}
    middle = torch.empty(32, k, device=DEVICE, dtype=torch.bfloat16)
    run = ops.resolve("triton", DEVICE).linear
    for seed in range(20):
        x = randn(32, 512, seed=seed).to(DEVICE, torch.bfloat16)
        middle.fill_(torch.nan)
        run(x, first, out=middle, config=select_config(arch, 32, k, 512, 2))
        got = run(middle, second, config=select_config(arch, 32, n, k, 2, activation), **around)
        torch.cuda.synchronize()
        assert torch.equal(run(middle, second, config=select_config(arch, 32, n, k, 2, activation), **around), got)
        assert got.isfinite().all()
