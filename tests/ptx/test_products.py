"""tl.dot as Triton compiles it, executed: types and layouts that reach mma.sync and wgmma, against products of whole matrices."""

import re
from functools import cache

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdllm_triton.ptx.findings import Findings, Kind
from fastdllm_triton.ptx.machine import Machine
from fastdllm_triton.ptx.memory import GlobalMemory
from fastdllm_triton.ptx.parser import parse

TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "i8": torch.int8,
    "i32": torch.int32,
}


def product_kernel(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr,
    DOUBLE_A: tl.constexpr, DOUBLE_B: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.full((M, N), 0, c.dtype.element_ty)
    for at in tl.range(0, K, BLOCK, num_stages=3):
        x = tl.load(a + ((k[None, :] + at) * M + m[:, None] if TRANS_A else m[:, None] * K + k[None, :] + at))
        y = tl.load(b + (n[None, :] * K + k[:, None] + at if TRANS_B else (k[:, None] + at) * N + n[None, :]))
        x = x + x if DOUBLE_A else x  # so that it comes from registers
        y = y + y if DOUBLE_B else y  # so that it is stored, not copied
        total = tl.dot(x, y, total, out_dtype=c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], total)


@cache
def compiled(arch, kind, out, warps=4, **constants):
    """The PTX and the bytes of shared memory."""
    signature = {"a": f"*{kind}", "b": f"*{kind}", "c": f"*{out}"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(JITFunction(product_kernel), signature, constants, {(n,): [["tt.divisibility", 16]] for n in range(3)})
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return made.asm["ptx"], made.metadata.shared


def matrix(kind, shape, seed):
    """Numbers of which sums of products are exact in float16 as well."""
    random = np.random.default_rng(seed)
    numbers = random.integers(-128, 128, shape) if kind == "i8" else random.integers(-3, 4, shape) * 0.5
    return torch.from_numpy(numbers).to(TYPES[kind])


def execute(ptx, shared, kind, out, M, N, K, trans_a, trans_b, **options):
    """The product, what it has to be, and what was found."""
    kernel, findings = parse(ptx), Findings()
    a, b = matrix(kind, (M, K), 0), matrix(kind, (K, N), 1)
    c = torch.empty(M, N, dtype=TYPES[out])
    given = (a.T.contiguous() if trans_a else a, b.T.contiguous() if trans_b else b, c)
    names = list(kernel.parameters)
    parameters = {name: np.zeros(1, np.uint64) for name in names}
    parameters |= {name: np.array([tensor.data_ptr()], np.uint64) for name, tensor in zip(names, given, strict=False)}
    memory = GlobalMemory(dict(zip(names, given, strict=False)))
    Machine(kernel, memory, parameters, (1, 1, 1), shared, findings, **options).run()
    return c, (a.double() @ b.double()).to(TYPES[out]), findings


SHAPE = {"M": 64, "N": 32, "K": 256, "BLOCK": 64, "TRANS_A": False, "TRANS_B": True, "DOUBLE_A": False, "DOUBLE_B": False}
WGMMA = {
    "128-byte swizzling": ("bf16", "fp32", "m64n32k16", {}),
    "64-byte swizzling": ("bf16", "fp32", "m64n32k16", {"BLOCK": 32}),
    "32-byte swizzling": ("bf16", "fp32", "m64n32k16", {"BLOCK": 16}),
    "several patterns along K": ("fp16", "fp32", "m64n32k16", {"BLOCK": 128}),
    "MN-major": ("bf16", "fp32", "m64n128k16", {"TRANS_A": True, "TRANS_B": False, "N": 128}),
    "MN-major, narrow": ("fp16", "fp32", "m64n16k16", {"TRANS_A": True, "TRANS_B": False, "N": 16}),
    "A in registers": ("bf16", "fp32", "m64n64k16", {"DOUBLE_A": True, "TRANS_B": False, "N": 64}),
    "B stored": ("bf16", "fp32", "m64n64k16", {"DOUBLE_B": True, "N": 64}),
    "two warpgroups along M": ("bf16", "fp32", "m64n64k16", {"M": 128, "N": 64, "warps": 8}),
    "two warpgroups along N": ("bf16", "fp32", "m64n128k16", {"N": 256, "K": 128, "TRANS_B": False, "warps": 8}),
    "tf32": ("fp32", "fp32", "m64n32k8", {"BLOCK": 32}),
    "tf32, transposed before": ("fp32", "fp32", "m64n32k8", {"TRANS_A": True, "BLOCK": 32}),
    "e4m3": ("fp8e4nv", "fp32", "m64n32k32", {}),
    "e5m2": ("fp8e5", "fp32", "m64n32k32", {"BLOCK": 32}),
    "int8": ("i8", "i32", "m64n32k32", {"BLOCK": 128}),
}


def shape_of(more):
    shape = SHAPE | {name: value for name, value in more.items() if name != "warps"}
    sizes = {name: shape[name] for name in "MNK"} | {"trans_a": shape["TRANS_A"], "trans_b": shape["TRANS_B"]}
    return more.get("warps", 4), shape, sizes


@pytest.mark.parametrize("case", WGMMA)
def test_wgmma(case):
    kind, out, instruction, more = WGMMA[case]
    warps, shape, sizes = shape_of(more)
    ptx, shared = compiled(90, kind, out, warps, **shape)
    assert set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(\w+)", ptx)) == {instruction}
    for seed in (None, 0):
        found, wanted, findings = execute(ptx, shared, kind, out, **sizes, seed=seed)
        doubled = shape["DOUBLE_A"] + shape["DOUBLE_B"]
        assert torch.equal(found, wanted * 2**doubled)
        if shape["DOUBLE_A"]:
            # Triton 3.6 computes parts of A for a loop's next round while the last products of this one are in flight. The manual
            # forbids it; ptxas, which gives registers their places, sees it.
            assert {(finding.kind, finding.detail) for finding in findings} == {(Kind.EARLY_ACCUMULATOR, "a part of A")}
        else:
            assert not len(findings), [str(finding) for finding in findings]


MMA = {
    "bf16": (80, "bf16", "fp32", "m16n8k16", {}),
    "float16 accumulators": (80, "fp16", "fp16", "m16n8k16", {"TRANS_A": True, "TRANS_B": False}),
    "tf32": (80, "fp32", "fp32", "m16n8k8", {"TRANS_B": False, "BLOCK": 32}),
    "int8": (80, "i8", "i32", "m16n8k32", {}),
    "float64": (80, "fp64", "fp64", "m8n8k4", {"BLOCK": 16}),
    "e4m3": (89, "fp8e4nv", "fp32", "m16n8k32", {}),
    "e5m2, float16 accumulators": (89, "fp8e5", "fp16", "m16n8k32", {}),
    "float64 of sm_90": (90, "fp64", "fp64", "m16n8k16", {"M": 32, "BLOCK": 16}),
}


@pytest.mark.parametrize("case", MMA)
def test_mma(case):
    arch, kind, out, instruction, more = MMA[case]
    warps, shape, sizes = shape_of(more | {"K": 128})
    ptx, shared = compiled(arch, kind, out, warps, **shape)
    assert set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(\w+)", ptx)) == {instruction}
    found, wanted, findings = execute(ptx, shared, kind, out, **sizes)
    assert torch.equal(found, wanted)
    assert not len(findings), [str(finding) for finding in findings]


#: What is found without one of the instructions that order things: by case of the kernel, name, and which of those of that name.
NEEDED = [
    ("128-byte swizzling", "wgmma.fence", 0, Kind.WGMMA),
    ("128-byte swizzling", "wgmma.commit_group", 0, Kind.EARLY_ACCUMULATOR),
    ("128-byte swizzling", "wgmma.wait_group", -1, Kind.EARLY_ACCUMULATOR),
    ("128-byte swizzling", "cp.async.wait_group", 0, Kind.NOT_AWAITED),
    ("two warpgroups along M", "wgmma.wait_group", 0, Kind.SHARED_RACE),
    ("A in registers", "wgmma.wait_group", -1, Kind.EARLY_ACCUMULATOR),
    ("B stored", "fence.proxy.async", -1, Kind.UNFENCED),
    ("B stored", "bar.sync", 2, Kind.SHARED_RACE),
]


@pytest.mark.parametrize(("case", "name", "which", "kind"), NEEDED)
def test_what_is_left_out_is_found(case, name, which, kind):
    type_, out, _, more = WGMMA[case]
    warps, shape, sizes = shape_of(more)
    ptx, shared = compiled(90, type_, out, warps, **shape)
    lines = ptx.split("\n")
    places = [n for n, line in enumerate(lines) if line.strip().startswith(name)]
    lines[places[which]] = ""
    _, _, findings = execute("\n".join(lines), shared, type_, out, **sizes)
    assert kind in {finding.kind for finding in findings if finding.detail != "a part of A"}
