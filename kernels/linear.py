"""A product of few rows with a weight and what stands around it: ``y = residual + swiglu(rms_norm(x) W^T)``, parts optional.

At 16 to 200 rows such a product takes as long as reading its weight, and what stands around it in a layer (a norm, a gated
unit, a residual) is launches of its own that wait on each other. Here they are prologue and epilogue of the one kernel.

Operand order: SWAP_AB computes ``W x^T``, which puts the weight on the side of the MMA that Hopper's wgmma and Blackwell's
tcgen05 want 64 or 128 wide, and the few rows on the other. Without it the tile is ``x W^T``.

Norm: the rounding of the normalised row (below) needs its root mean square before the product, so each program first reads
all of its rows: ``BLOCK_M K`` elements out of the L2 cache against the ``BLOCK_N K`` of weight that it streams from memory.
Handing over sums of squares from the kernel before would save these reads and tie the two kernels together; instead the
first tiles of the weight are fetched into the cache meanwhile, so that memory does not idle.

Split K: where a weight has too few tiles to occupy a GPU, programs share its columns, write float32 partial products, and a
second kernel adds them in order of the columns. No atomics: a result depends on nothing but its operands and the config.
A row's result does not depend on the other rows of its launch, nor on their number in a given config.

Rounding points, those of the LLaDA and Dream modules: the normalised row, its product with the norm's weight, the product
with W, silu(gate), its product with up, and the sum with the residual are each rounded to the tensors' dtype.

| pointer      | shape                     | strides        | written            |
|--------------|---------------------------|----------------|--------------------|
| x_ptr        | [M, K]                    | (stride_x, 1)  |                    |
| weight_ptr   | [N, K], SWIGLU: [2N, K]   | (stride_w, 1)  |                    |
| norm_ptr     | [K]                       | (1,)           |                    |
| residual_ptr | [M, N]                    | (stride_r, 1)  |                    |
| out_ptr      | [M, N]                    | (stride_o, 1)  | one split, finish  |
| partial_ptr  | [splits, P, M, N] float32 | contiguous     | several splits     |

P is 2 with SWIGLU (gate, then up), otherwise 1. ``residual_ptr`` may be ``out_ptr``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import DEFAULT_LAUNCH, Activation, LaunchOptions
from ._arch import Arch, arch_of
from ._check import INTERPRETED, check_floats, check_shape, collapsed, once, require, row_stride_of, scratch
from ._library import by_cublas
from ._pdl import dependent_launch, prefetch, wait_for_predecessor
from ._tuned import gpu_name, tuned

#: Most rows that the kernel is tuned for. It takes any number, but beyond this a product is bound by arithmetic.
MAX_ROWS = 512


@triton.jit
def _multiply(x, w, y, SWAP_AB: tl.constexpr, PRECISION: tl.constexpr):
    """``y + x w^T``; SWAP_AB: the same transposed, y and result too."""
    if SWAP_AB:
        return tl.dot(w, tl.trans(x), y, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(w), y, input_precision=PRECISION)


@triton.jit
def _finish(
    y, up, residual_ptr, out_ptr, stride_r, stride_o, row, column, mask,
    SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Rounds a float32 tile of the product, applies the epilogue and writes it."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    y = y.to(dtype)
    if SWIGLU:
        gate = y.to(tl.float32)
        # exp may be inf, and g / inf is the limit.
        silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
        y = (silu * up.to(dtype).to(tl.float32)).to(dtype)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_r + column, mask=mask, other=0.0)
        y = (y.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row * stride_o + column, y, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, weight_ptr, norm_ptr, residual_ptr, out_ptr, partial_ptr,
    stride_x, stride_w, stride_r, stride_o, M, N, part, eps,
    K: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_NORM: tl.constexpr, SWAP_AB: tl.constexpr,
    PREFETCH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Tiles of rows are neighbours, so that they share a tile of the weight in the cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N], of the output
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * part  # of the columns of x and W, a multiple of BLOCK_K
    end = tl.minimum(begin + part, K)

    in_m, in_n = row < M, column < N
    p_w = weight_ptr + column.to(tl.int64)[:, None] * stride_w + k[None, :]  # [BLOCK_N, BLOCK_K]
    p_up = p_w + tl.cast(N, tl.int64) * stride_w
    if PREFETCH > 0:
        # A line of the L2 cache has 128 bytes.
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        line = begin + tl.arange(0, PREFETCH) * LINE
        p_line = weight_ptr + column.to(tl.int64)[:, None] * stride_w + line[None, :]  # [BLOCK_N, PREFETCH]
        ahead = in_n[:, None] & (line < end)[None, :]
        prefetch(p_line, ahead)
        if SWIGLU:
            prefetch(p_line + tl.cast(N, tl.int64) * stride_w, ahead)
    wait_for_predecessor(PDL)

    x_ptr += row.to(tl.int64)[:, None] * stride_x  # [BLOCK_M, 1]
    if NORM:
        squares = tl.zeros([BLOCK_M], tl.float32)
        o_norm = tl.arange(0, BLOCK_NORM)
        for start in tl.range(0, K, BLOCK_NORM, num_stages=3):
            mask = in_m[:, None]
            if K % BLOCK_NORM != 0:
                mask = mask & (start + o_norm < K)[None, :]
            x = tl.load(x_ptr + (start + o_norm)[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_NORM]
            squares += tl.sum(x * x, axis=1)
        # Compilers that pass Python floats as float64 would drag everything after into float64.
        inverse_rms = tl.rsqrt(squares / K + tl.cast(eps, tl.float32))  # [BLOCK_M]

    y = tl.zeros([BLOCK_N, BLOCK_M] if SWAP_AB else [BLOCK_M, BLOCK_N], tl.float32)
    up = y
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        mask_w, mask_x = in_n[:, None], in_m[:, None]
        if K % BLOCK_K != 0:
            mask_w, mask_x = mask_w & (start + k < K)[None, :], mask_x & (start + k < K)[None, :]
        w = tl.load(p_w + start, mask=mask_w, other=0.0)
        x = tl.load(x_ptr + (start + k)[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        if NORM:
            if K % BLOCK_K != 0:
                scale = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0)
            else:
                scale = tl.load(norm_ptr + start + k)
            unit = (x.to(tl.float32) * inverse_rms[:, None]).to(x.dtype)
            x = (unit.to(tl.float32) * scale.to(tl.float32)[None, :]).to(x.dtype)
        y = _multiply(x, w, y, SWAP_AB, PRECISION)
        if SWIGLU:
            w = tl.load(p_up + start, mask=mask_w, other=0.0)
            up = _multiply(x, w, up, SWAP_AB, PRECISION)
    if SWAP_AB:
        y, up = tl.trans(y), tl.trans(up)

    row = row.to(tl.int64)[:, None]
    mask = in_m[:, None] & in_n[None, :]  # [BLOCK_M, BLOCK_N]
    if SPLIT:
        P: tl.constexpr = 2 if SWIGLU else 1
        at = (tl.program_id(1).to(tl.int64) * P * M + row) * N + column[None, :]
        tl.store(partial_ptr + at, y, mask=mask)
        if SWIGLU:
            tl.store(partial_ptr + tl.cast(M, tl.int64) * N + at, up, mask=mask)
    else:
        _finish(y, up, residual_ptr, out_ptr, stride_r, stride_o, row, column[None, :], mask, SWIGLU, RESIDUAL)


@triton.jit(do_not_specialize=["M", "splits"])
def _finish_kernel(
    partial_ptr, residual_ptr, out_ptr, stride_r, stride_o, M, N, splits,
    SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = column < N
    P: tl.constexpr = 2 if SWIGLU else 1
    matrix = tl.cast(M, tl.int64) * N
    y = tl.zeros([BLOCK_N], tl.float32)
    up = y
    for split in range(splits):
        p_y = partial_ptr + split * P * matrix + row * N + column
        y += tl.load(p_y, mask=mask, other=0.0)
        if SWIGLU:
            up += tl.load(p_y + matrix, mask=mask, other=0.0)
    _finish(y, up, residual_ptr, out_ptr, stride_r, stride_o, row, column, mask, SWIGLU, RESIDUAL)


@dataclass(frozen=True)
class Config:
    """Launch parameters.

    Attributes:
        block_m, block_n, block_k: rows, output columns and summed columns of a tile.
        swap_ab: compute ``W x^T`` instead of ``x W^T``.
        splits: programs that share the columns of an output tile.
        num_warps, num_stages: launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    swap_ab: bool
    splits: int
    num_warps: int
    num_stages: int

    @property
    def launches(self) -> int:
        """The kernel, and the sum of its splits."""
        return 1 if self.splits == 1 else 2

    def part(self, k: int) -> int:
        """Columns of a program."""
        return triton.cdiv(triton.cdiv(k, self.splits), self.block_k) * self.block_k

    def workspace_elements(self, rows: int, n: int) -> int:
        """float32 elements of scratch for ``n`` rows of the weight: nothing for one split."""
        return 0 if self.splits == 1 else self.splits * rows * n


@cache
def select_config(arch: Arch, rows: int, n: int, k: int, itemsize: int, activation: Activation | None = None) -> Config:
    """A tiling that compiles without spills and keeps memory busy.

    What matters is bytes in flight, some 30 KB an SM, and that the rows, which every tile reads again out of the L2 cache,
    are few against the tile's part of the weight. So a tile is wider than the rows wherever that leaves half of the SMs with
    work; columns are split only below a third, since adding up the splits is another launch.

    Args:
        arch: the architecture.
        rows: of x.
        n: rows of the weight (with ``activation="swiglu"`` 2F).
        k: columns of the weight.
        itemsize: bytes an element.
        activation: the epilogue; a gated unit has two tiles of the weight and two sums.
    """
    gated = activation == "swiglu"
    outputs = n // 2 if gated else n
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    # Two sums of 128 rows, float32 products (three of tf32 each) and mma.sync have no room for wider tiles.
    if itemsize == 4:
        block_m = min(block_m, 32)
    elif gated or arch.name not in ("sm_90", "sm_100"):
        block_m = min(block_m, 64)
    tiles_m = triton.cdiv(rows, block_m)
    block_n = 128 if not gated and itemsize == 2 and tiles_m * triton.cdiv(outputs, 128) * 2 >= arch.sms else 64
    if itemsize == 4:
        block_n = 32
    block_k = 64 if itemsize == 2 else 32
    # On sm_90 always: rows that a norm computes in the loop would be the operand of wgmma that comes from registers, and
    # ptxas lets every wgmma wait for the one before (bench/findings/001). On sm_100 64 rows reach tcgen05 either way round, and
    # two products with a shared operand that is computed in the loop end the compiler (002).
    swap_ab = itemsize == 2 and (arch.name == "sm_90" or (arch.name == "sm_100" and block_m < 64 and not gated))
    programs = tiles_m * triton.cdiv(outputs, block_n)
    splits = max(min(arch.sms // (3 * programs), k // (8 * block_k)), 1)
    splits = triton.cdiv(k, triton.cdiv(triton.cdiv(k, splits), block_k) * block_k)  # none of them empty
    sums = block_m * block_n * (2 if gated else 1)
    # Two sums beside the normalised rows need the registers of more threads where mma.sync keeps operands in them, too.
    num_warps = 8 if sums > 4096 or (sums == 4096 and gated and not swap_ab and arch.backend == "cuda") else 4
    stage = itemsize * block_k * (block_m + block_n * (2 if gated else 1))
    resident = 2 if programs * splits > arch.sms and (num_warps == 4 or gated) else 1
    # What is not stages: rows on their way into the MMA, and the result on its way out.
    beside = max(itemsize * block_m * block_k, 4 * sums)
    room = min(arch.shared_bytes, arch.shared_bytes_per_sm // resident - 1024) - beside
    num_stages = 2 if arch.backend == "hip" else max(min(room // stage, 4 if gated else 6), 2)
    return Config(block_m, block_n, block_k, swap_ab, splits, num_warps, num_stages)


def invariant_config(arch: Arch, n: int, k: int, itemsize: int, activation: Activation | None = None) -> Config:
    """One tiling for any number of rows: with it a row's result depends on that row alone, in any batch."""
    return select_config(arch, 64, n, k, itemsize, activation)


@cache
def measured_config(
    gpu: str | None, rows: int, n: int, k: int, dtype: str, norm: bool, activation: Activation | None, residual: bool
) -> Config | None:
    """The launch parameters with which this kernel was measured to beat the library, or None: then the library runs.

    Args:
        gpu: as :func:`fastdllm_triton.kernels._tuned.gpu_name` gives it.
        rows: of x; what was measured for a power of two holds down to the next.
        n: rows of the weight (with ``activation="swiglu"`` 2F).
        k: columns of the weight.
        dtype: ``"bfloat16"``.
        norm: whether a norm comes first.
        activation: the epilogue.
        residual: whether one is added.
    """
    if not 0 < rows <= MAX_ROWS:
        return None
    bucket = max(triton.next_power_of_2(rows), 16)
    shape = {"rows": bucket, "n": n, "k": k, "dtype": dtype, "norm": norm, "activation": activation, "residual": residual}
    measured = tuned(gpu, "linear", **shape)
    return None if measured is None else Config(**measured)


def chosen_config(
    arch: Arch, gpu: str | None, rows: int, n: int, k: int, dtype: str, norm: bool, activation: Activation | None,
    residual: bool, options: LaunchOptions,
) -> Config | None:  # fmt: skip
    """What a call without a config runs: this kernel with launch parameters, or None, the library."""
    if options.batch_invariant:
        return invariant_config(arch, n, k, getattr(torch, dtype).itemsize, activation)
    if options.fuse_linear and rows <= MAX_ROWS:
        return select_config(arch, rows, n, k, getattr(torch, dtype).itemsize, activation)
    return measured_config(gpu, rows, n, k, dtype, norm, activation, residual)


def fuses_residual(x: Tensor, weight: Tensor, options: LaunchOptions = DEFAULT_LAUNCH) -> bool:
    """Whether ``linear(x, weight, residual=...)`` is one kernel here; if not, the norm behind it adds at no extra launch."""
    product = _product(x, weight)
    return chosen_config(arch_of(x.device), gpu_name(x.device), *product, False, None, True, options) is not None


@once
def _product(x: Tensor, weight: Tensor) -> tuple[int, int, int, str]:
    """Rows of x, N, K and the dtype's name."""
    return x.shape[:-1].numel(), *weight.shape, str(x.dtype).removeprefix("torch.")


#: Bytes of its weight that a program asks for before it waits or reads its rows.
PREFETCHED = 2**16
#: Columns of a program of the second kernel.
FINISH_COLUMNS = 512


def _prefetched_lines(arch: Arch, config: Config, gated: bool, early: bool) -> int:
    """Lines of the L2 cache, of each row of a tile: as many as there is time for, if there is any."""
    if INTERPRETED or arch.backend != "cuda" or not early:
        return 0
    return max(PREFETCHED // (128 * config.block_n * (2 if gated else 1)), 1)


def _precision(arch: Arch) -> str:
    """How float32 operands are multiplied so that the product is one of float32; 16-bit operands are not affected."""
    return "tf32x3" if arch.backend == "cuda" else "ieee"


@once
def _layout(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None, residual: Tensor | None,
    activation: Activation | None, out: Tensor | None,
) -> tuple[int, ...]:  # fmt: skip
    """Checks the arguments of :func:`linear`; the shape of the result."""
    check_floats(x=x, weight=weight, norm_weight=norm_weight, residual=residual, out=out)
    require("x", "no dimension", "[..., K]", x.ndim > 0)
    require("weight", f"shape {list(weight.shape)}", "of two dimensions, [N, K]", weight.ndim == 2)
    (n, k), gated = weight.shape, activation == "swiglu"
    require("x", f"one of {x.shape[-1]}", f"of the last dimension of weight, {k}, at least 1", k > 0 and x.shape[-1] == k)
    require("activation", repr(activation), "'swiglu' or None", activation in (None, "swiglu"))
    require("weight", f"{n} rows", "of an even number of rows, gate and up", not gated or n % 2 == 0)
    check_shape("norm_weight", norm_weight, k)
    actual = "nothing" if eps is None else eps
    require("eps", actual, "a number with norm_weight, and nothing without", (eps is None) == (norm_weight is None))
    shape = (*x.shape[:-1], n // 2 if gated else n)
    check_shape("residual", residual, *shape)
    check_shape("out", out, *shape)
    return shape


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    config: Config | None = None,
    options: LaunchOptions = DEFAULT_LAUNCH,
) -> Tensor:
    """``residual + activation(rms_norm(x) @ weight.T)``, each part optional.

    The library (cuBLAS) multiplies, between kernels for the other parts, except where a committed measurement says that this
    kernel wins (:func:`measured_config`), or a ``config`` asks for it. This kernel adds up in float32 to the end. Where the
    library splits the columns, it may add the parts in bfloat16: PyTorch allows it, as for the official modules, unless
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`` is False.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``; with ``activation="swiglu"`` the fused gate and up projections, ``[2F, K]``.
        norm_weight: ``[K]``: normalise ``x`` by its root mean square first.
        eps: added to the mean square; needed with ``norm_weight`` and only then.
        residual: ``[..., N]`` (``[..., F]``), added last.
        activation: ``"swiglu"`` or nothing.
        out: receives the result; may be ``residual`` itself.
        workspace: float32 scratch of at least :meth:`Config.workspace_elements`; allocated if not given.
        config: run this kernel with these launch parameters, measured or not; :func:`chosen_config` chooses if not given.
        options: how to launch.

    Returns:
        ``[..., N]``, with ``activation="swiglu"`` ``[..., F]``.

    Raises:
        ValueError: an argument's dtype, shape, strides or device.
    """
    shape = _layout(x, weight, norm_weight, eps, residual, activation, out)
    gated = activation == "swiglu"
    if config is None:
        around = (norm_weight is not None, activation, residual is not None)
        config = chosen_config(arch_of(x.device), gpu_name(x.device), *_product(x, weight), *around, options)
    if config is None:
        return by_cublas(x, weight, norm_weight, eps, residual, gated, out, options)

    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    if out.numel():
        needed = config.workspace_elements(math.prod(shape[:-1]), weight.shape[0])
        workspace = scratch(workspace, needed, x.device)
        with torch.cuda.device_of(x):
            _launch(config, x, weight, norm_weight, eps, residual, gated, out, workspace, options)
    return out


def _launch(
    config: Config, x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None, residual: Tensor | None,
    gated: bool, out: Tensor, workspace: Tensor | None, options: LaunchOptions,
) -> None:  # fmt: skip
    """One launch, and the sum of the splits if there are several."""
    arch, k, outputs = arch_of(x.device), x.shape[-1], out.shape[-1]
    x, stride_x = collapsed(x)
    residual, stride_r = (None, 0) if residual is None else collapsed(residual)
    count, split = out.shape[:-1].numel(), config.splits > 1
    stride_o = row_stride_of("out", out)
    launch = dependent_launch(arch, options)
    epilogue = {"SWIGLU": gated, "RESIDUAL": residual is not None, "enable_fp_fusion": True, **launch}
    tiles = triton.cdiv(count, config.block_m) * triton.cdiv(outputs, config.block_n)
    _linear_kernel[(tiles, config.splits)](
        x, weight, norm_weight, residual, None if split else out, workspace,
        stride_x, weight.stride(0), stride_r, stride_o, count, outputs, config.part(k), eps or 0.0,
        **_constexprs(arch, config, k, norm_weight is not None, gated, launch["PDL"]), **epilogue,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        _finish_kernel[(count, triton.cdiv(outputs, FINISH_COLUMNS))](
            workspace, residual, out, stride_r, stride_o, count, outputs, config.splits,
            BLOCK_N=FINISH_COLUMNS, num_warps=4, **epilogue,
        )  # fmt: skip


def _constexprs(arch: Arch, config: Config, k: int, norm: bool, gated: bool, pdl: bool) -> dict[str, object]:
    """What the compiler sees of a config, but for the epilogue."""
    return {
        "K": k,
        "NORM": norm,
        "SPLIT": config.splits > 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_NORM": min(triton.next_power_of_2(k), 64 * arch.warp_size * config.num_warps // config.block_m),
        "SWAP_AB": config.swap_ab,
        "PREFETCH": _prefetched_lines(arch, config, gated, norm or pdl),
        "STAGES": config.num_stages,
        "PRECISION": _precision(arch),
    }
