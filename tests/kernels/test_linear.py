"""linear: the reference against the formula in float64, the kernel and the library's path against the reference."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from _support import DEVICE, KERNEL_DTYPES, assert_as_close_as_torch, assert_case_holds, randn, small_cases
from torch import Tensor

from fastdllm_triton.bench.tune import linear_candidates
from fastdllm_triton.kernels import _tuned
from fastdllm_triton.kernels import linear as module
from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels.linear import Config, select_config
from fastdllm_triton.kernels.linear import linear as kernel
from fastdllm_triton.reference.linear import linear as reference
from fastdllm_triton.verify.cases.linear import PROJECTIONS

EPS = 1e-5
#: Small tiles, so that small shapes have several of them; split columns; both operand orders.
PLAIN = Config(block_m=16, block_n=16, block_k=32, swap_ab=False, splits=1, num_warps=4, num_stages=2)
SWAPPED = Config(block_m=16, block_n=32, block_k=16, swap_ab=True, splits=1, num_warps=4, num_stages=2)
SPLIT = Config(block_m=16, block_n=32, block_k=16, swap_ab=True, splits=3, num_warps=4, num_stages=2)
CONFIGS = {"plain": PLAIN, "swapped": SWAPPED, "split": SPLIT}
#: Every combination of norm, gated unit and residual.
FUSIONS = list(itertools.product((False, True), (None, "swiglu"), (False, True)))


def formula(x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """The whole in float64, without a rounding between."""
    x, weight = x.double(), weight.double()
    if norm_weight is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    y = x @ weight.T
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = gate / (1 + (-gate).exp()) * up
    return y if residual is None else residual.double() + y


def operands(
    shape: tuple[int, ...], n: int, norm: bool, activation: str | None, residual: bool, dtype: torch.dtype
) -> dict[str, object]:
    """Arguments of a call; the product's elements have the size of x's."""
    k, outputs = shape[-1], n // 2 if activation else n
    found: dict[str, object] = {
        "x": randn(*shape, dtype=dtype, device=DEVICE, seed=1),
        "weight": (randn(n, k, seed=2) / k**0.5).to(DEVICE, dtype),
        "activation": activation,
    }
    if norm:
        found |= {"norm_weight": (1 + randn(k, seed=3) / 4).to(DEVICE, dtype), "eps": EPS}
    if residual:
        found["residual"] = randn(*shape[:-1], outputs, dtype=dtype, device=DEVICE, seed=4)
    return found


def check(call: dict[str, object], config: Config | None) -> None:
    exact = formula(*(call.get(name) for name in ("x", "weight", "norm_weight", "residual", "activation")))  # type: ignore[arg-type]
    assert_as_close_as_torch(kernel(**call, config=config), exact, reference(**call))


# The reference.


@pytest.mark.parametrize(("norm", "activation", "residual"), FUSIONS)
def test_reference_is_the_formula(norm, activation, residual):
    call = operands((2, 3, 24), 10, norm, activation, residual, torch.float64)
    exact = formula(*(call.get(name) for name in ("x", "weight", "norm_weight", "residual", "activation")))
    torch.testing.assert_close(reference(**call), exact)


def test_reference_rounds_the_product_before_the_residual():
    call = operands((8, 32), 16, False, None, True, torch.bfloat16)
    product = (call["x"].double() @ call["weight"].double().T).bfloat16()
    assert (reference(**call) == (product.float() + call["residual"].float()).bfloat16()).double().mean() > 0.95


def test_reference_writes_into_out_which_may_be_the_residual():
    call = operands((4, 8), 6, True, None, True, torch.float32)
    want, x = reference(**call), call["residual"]
    assert reference(**call, out=x) is x
    assert torch.equal(x, want)


# The kernel.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("norm", "activation", "residual"), FUSIONS)
def test_every_fusion_is_as_close_as_the_reference(norm, activation, residual, config, dtype):
    # Tails of rows, outputs and columns.
    check(operands((19, 88), 2 * 37, norm, activation, residual, dtype), CONFIGS[config])


@pytest.mark.parametrize("case", small_cases("linear"), ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_form_is_as_close_as_torch(case, config):
    assert_case_holds("linear", case, torch.float16, config=CONFIGS[config])


def test_the_product_is_rounded_before_the_residual():
    call = operands((16, 64), 32, False, None, True, torch.float16)
    assert (kernel(**call, config=SWAPPED) == reference(**call)).double().mean() > 0.98
    fused = torch.addmm(call["residual"].double(), call["x"].double(), call["weight"].double().T).half()
    assert (reference(**call) == fused).double().mean() < 0.95  # a single rounding would be seen


@pytest.mark.parametrize("config", CONFIGS)
def test_strided_rows_and_out_and_nothing_else_is_written(config):
    call = operands((8, 2, 40), 24, True, None, True, torch.float32)
    wide = torch.full((4, 2, 40), 7.0, device=DEVICE)
    call |= {"x": call["x"][::2], "residual": call["residual"][1::2], "weight": call["weight"].repeat(1, 2)[:, :40]}
    assert kernel(**call, out=wide[..., 8:32], config=CONFIGS[config]).data_ptr() == wide[..., 8:].data_ptr()
    torch.testing.assert_close(wide[..., 8:32], reference(**call))
    assert (wide[..., :8] == 7).all()
    assert (wide[..., 32:] == 7).all()


@pytest.mark.parametrize("config", [None, SWAPPED, SPLIT])
def test_the_residual_is_updated_in_place(config):
    call = operands((5, 48), 20, False, None, True, torch.float32)
    want, x = reference(**call), call["residual"]
    assert kernel(**call, out=x, config=config) is x
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_is_the_same_whatever_rows_are_with_it(config):
    call = operands((21, 96), 48, True, "swiglu", True, torch.float16)
    together = kernel(**call, config=CONFIGS[config])
    for i in (0, 15, 16, 20):
        alone = call | {"x": call["x"][i : i + 1], "residual": call["residual"][i : i + 1]}
        assert torch.equal(kernel(**alone, config=CONFIGS[config]), together[i : i + 1])


def test_splits_are_added_in_float32_in_order_and_each_is_overwritten():
    call = operands((3, 48), 8, False, None, False, torch.float32)
    scratch = torch.full((SPLIT.workspace_elements(3, 8) + 5,), torch.nan, device=DEVICE)
    got = kernel(**call, workspace=scratch, config=SPLIT)
    partial = scratch[:-5].view(3, 3, 8)
    assert torch.equal(partial[0] + partial[1] + partial[2], got)
    assert scratch[-5:].isnan().all()


def test_no_rows_give_no_rows():
    call = operands((0, 3, 32), 8, True, "swiglu", True, torch.float32)
    for config in (None, *CONFIGS.values()):
        assert kernel(**call, config=config).shape == (0, 3, 4)


# The library's path, which runs where no measurement speaks for the kernel.


@pytest.mark.parametrize(("norm", "activation", "residual"), FUSIONS)
def test_the_library_path_is_as_close_as_the_reference(norm, activation, residual):
    check(operands((5, 40), 24, norm, activation, residual, torch.float16), None)


@pytest.mark.parametrize(("norm", "activation", "residual"), FUSIONS)
def test_the_library_path_writes_into_out(norm, activation, residual):
    call = operands((5, 40), 24, norm, activation, residual, torch.float32)
    want = kernel(**call)
    out = torch.full_like(want, torch.nan)
    assert kernel(**call, out=out) is out
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8, 4)}, "x must be of the last dimension of weight, 4, at least 1, got one of 16"),
        ({"weight": torch.ones(8)}, "weight must be .*, got shape"),
        ({"weight": torch.ones(7, 16), "activation": "swiglu"}, "weight must be .*, got 7 rows"),
        ({"weight": torch.ones(8, 32)[:, ::2]}, "weight must be .*, got strides"),
        ({"weight": torch.ones(8, 16, dtype=torch.float16)}, "weight must be .*, got torch.float16"),
        ({"activation": "gelu"}, "activation must be .*, got 'gelu'"),
        ({"norm_weight": torch.ones(15), "eps": EPS}, "norm_weight must be .*, got shape"),
        ({"norm_weight": torch.ones(16)}, "eps must be .*, got nothing"),
        ({"eps": EPS}, "eps must be .*, got 1e-05"),
        ({"residual": torch.ones(2, 7)}, "residual must be .*, got shape"),
        ({"out": torch.ones(3, 8)}, "out must be .*, got shape"),
        ({"config": SPLIT, "workspace": torch.ones(7)}, "workspace must be of at least 48, got 7 elements"),
        ({"config": SPLIT, "workspace": torch.ones(48, dtype=torch.float16)}, "workspace must be .*, got torch.float16"),
    ],
)
def test_kernel_names_what_is_wrong(change, message):
    call = {"x": torch.ones(2, 16), "weight": torch.ones(8, 16)} | change
    call = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
    with pytest.raises(ValueError, match=message):
        kernel(**call)


# The configs.


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_configs_cover_the_shapes_and_fit(arch):
    for (n, k, _, activation, _), rows, itemsize in itertools.product(PROJECTIONS.values(), (1, 16, 33, 64, 200, 512), (2, 4)):
        config = select_config(arch, rows, n, k, itemsize, activation)
        gated = activation is not None
        stage = itemsize * config.block_k * (config.block_m + config.block_n * (1 + gated))
        assert config.num_stages >= 2
        assert stage * config.num_stages <= arch.shared_bytes or arch.backend == "hip"
        # All columns, and no empty split.
        assert config.part(k) % config.block_k == 0
        assert config.part(k) * (config.splits - 1) < k <= config.part(k) * config.splits
        # The tile of few rows is not wider than they need.
        assert config.block_m < 2 * max(rows, 16)
        if config.swap_ab:
            assert config.block_n >= 64


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_candidates_are_few_and_begin_with_the_choice(arch):
    for (n, k, _, activation, _), rows in itertools.product(PROJECTIONS.values(), (16, 32, 128)):
        found = linear_candidates(arch, rows, n, k, 2, activation)
        assert found[0] == select_config(arch, rows, n, k, 2, activation)
        assert 2 <= len(found) == len(set(found)) <= 40
        assert all(config.part(k) * config.splits == k for config in found[1:])


def test_a_layer_of_the_models_has_one_launch_a_projection_on_hopper():
    for n, k, _, activation, _ in PROJECTIONS.values():
        config = select_config(ARCHS["sm_90"], 32, n, k, 2, activation)
        assert config.launches == 1


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_the_invariant_config_knows_no_rows_and_is_one_that_is_compiled(arch):
    for n, k, _, activation, _ in PROJECTIONS.values():
        config = module.invariant_config(arch, n, k, 2, activation)
        assert config == select_config(arch, 64, n, k, 2, activation)


def test_a_committed_measurement_chooses_the_kernel_and_nothing_else_does(monkeypatch, tmp_path):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    module.measured_config.cache_clear()
    shape = {"rows": 32, "n": 4096, "k": 64, "dtype": "bfloat16", "norm": False, "activation": None, "residual": True}
    measured = {"gpu": "NVIDIA Test 9", "entries": [{"op": "linear", "shape": shape, "config": asdict(SWAPPED)}]}
    _tuned.path_of("NVIDIA Test 9").write_text(json.dumps(measured))
    asked = ("NVIDIA Test 9", 32, 4096, 64, "bfloat16", False, None, True)
    assert module.measured_config(*asked) == SWAPPED
    assert module.measured_config(asked[0], 17, *asked[2:]) == SWAPPED  # what 32 rows are best at
    for i, other in enumerate(("NVIDIA Test 8", 33, 4095, 65, "float16", True, "swiglu", False)):
        assert module.measured_config(*asked[:i], other, *asked[i + 1 :]) is None
    assert module.measured_config(asked[0], 16, *asked[2:]) is None

    monkeypatch.setattr(module, "gpu_name", lambda device: "NVIDIA Test 9")
    x, weight = torch.empty(4, 8, 64, dtype=torch.bfloat16), torch.empty(4096, 64, dtype=torch.bfloat16)
    assert module.fuses_residual(x, weight)
    assert not module.fuses_residual(x[:, :2], weight)  # 8 rows
    assert not module.fuses_residual(x.float(), weight)
    module.measured_config.cache_clear()


def test_every_committed_measurement_names_a_config_that_exists():
    for path in _tuned.FOLDER.glob("*.json"):
        for entry in json.loads(path.read_text())["entries"]:
            assert entry["op"] != "linear" or Config(**entry["config"]).splits > 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 32, 48, 128, 512])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_of_the_models_in_bfloat16(name, rows):
    n, k, norm, activation, residual = PROJECTIONS[name]
    call = operands((rows, k), n, norm, activation, residual, torch.bfloat16)
    check(call, select_config(module.arch_of(DEVICE), rows, n, k, 2, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llada qkv", "llada gate_up", "llada down"])
def test_with_the_invariant_config_a_row_is_the_same_in_any_number_of_rows(name):
    n, k, norm, activation, residual = PROJECTIONS[name]
    call = operands((1000, k), n, norm, activation, residual, torch.bfloat16)
    config = module.invariant_config(module.arch_of(DEVICE), n, k, 2, activation)
    whole = kernel(**call, config=config)
    for rows in (1, 32, 100, 512):
        part = call | {key: call[key][-rows:] for key in ("x", "residual") if key in call}
        assert torch.equal(kernel(**part, config=config), whole[-rows:])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_repeated_launches_agree_to_the_last_bit(config):
    call = operands((32, 4096), 1024, True, "swiglu", True, torch.bfloat16)
    first = kernel(**call, config=CONFIGS[config])
    assert all(torch.equal(kernel(**call, config=CONFIGS[config]), first) for _ in range(20))
