"""Every kernel on its cases: against float64, against PyTorch's own error, and against itself a second time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import _check
from .cases import OPS, Case, Inputs, OpCases, Outputs
from .records import CaseRecord, Record
from .tolerance import Judgement, as_close_as_torch, bitwise, identical


def dtypes_of(op: str) -> list[str]:
    # The interpreter's numpy computes with the bits of a bfloat16.
    dtypes = [dtype for dtype in OPS[op].dtypes if not (_check.INTERPRETED and dtype == torch.bfloat16)]
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def verify_op(op: str, dtype: str, device: torch.device, *, quick: bool = False) -> Record:
    """Tries an op.

    Args:
        op: a name in :data:`OPS`.
        dtype: of :func:`dtypes_of`.
        device: a GPU, or the CPU where Triton's interpreter runs.
        quick: only the quick cases, and on a GPU the key ones.
    """
    began = time.perf_counter()
    cases = [_case_record(OPS[op], case, device, getattr(torch, dtype)) for case in wanted(OPS[op], device, quick)]
    return Record(op, dtype, cases, time.perf_counter() - began)


def wanted(op: OpCases, device: torch.device, quick: bool) -> list[Case]:
    where = {"quick"} if quick else {"quick", "full"}
    if device.type == "cuda":
        where |= {"key"} if quick else {"key", "gpu"}
    return [case for case in op.cases if case.where in where]


def _case_record(op: OpCases, case: Case, device: torch.device, dtype: torch.dtype) -> CaseRecord:
    try:
        worst, unequal, same = try_case(op, case, device, dtype)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        reason = f"too little GPU memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        return CaseRecord(case.why, 0.0, 0.0, ok=True, skipped=reason)
    except Exception as error:  # a kernel that does not compile or launch is a finding, and the others are still tried
        return CaseRecord(case.why, math.inf, 0.0, ok=False, note=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    notes = [f"wrong: {', '.join(unequal)}"] if unequal else []
    notes += [] if same else ["a second run gives other bits"]
    return CaseRecord(case.why, worst.error, worst.bound, ok=not notes, note="; ".join(notes))


def try_case(
    op: OpCases, case: Case, device: torch.device, dtype: torch.dtype, **options: Any
) -> tuple[Judgement, list[str], bool]:
    """Runs a case.

    Args:
        op, case: what is tried.
        device, dtype: of the inputs.
        options: further arguments of the kernel, in the place of the op's own variants.

    Returns:
        The judgement of the output that is worst, the names of outputs that are wrong, and whether a second run, which is given
        memory for its results, is bitwise the first.
    """
    inputs = op.inputs(case.sizes, device, dtype)
    expected = Expected.of(op, inputs)
    memory = op.result_memory(expected.plain)
    judged: dict[str, Judgement] = {}
    same = True
    for variant, more in ({"": options} if options else op.variants(inputs)).items():
        got = op.outputs(op.kernel, inputs, **op.common, **more)
        again = op.outputs(op.kernel, inputs | memory, **op.common, **more)
        judged |= {f"{name} {variant}".strip(): judgement for name, judgement in expected.judge(got).items()}
        same &= all(bitwise(got[name], again[name]) for name in got)
    worst = max(judged.values(), key=lambda judgement: judgement.severity)
    return worst, wrong(judged), same


def wrong(judged: Mapping[str, Judgement]) -> list[str]:
    return [name for name, judgement in judged.items() if not judgement.ok]


@dataclass(frozen=True)
class Expected:
    """What a call must give.

    Attributes:
        plain: the reference's result in the inputs' dtype.
        exact: its result in float64.
        torch: PyTorch's own, whose error sets the bound.
    """

    plain: Outputs
    exact: Outputs
    torch: Outputs

    @classmethod
    def of(cls, op: OpCases, inputs: Inputs) -> Expected:
        """What an op must give for these inputs; exact in float32 where there is no room for float64."""
        plain = op.outputs(op.reference, inputs, **op.common)
        exact = plain
        if op.float64:
            try:
                exact = op.outputs(op.reference, _in(torch.float64, inputs), **op.common)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                exact = op.outputs(op.reference, _in(torch.float32, inputs), **op.common)
        return cls(plain, exact, plain if op.twin is None else op.twin(inputs))

    def judge(self, got: Outputs) -> dict[str, Judgement]:
        """Judges each of a kernel's outputs by the rule of :mod:`fastdllm_triton.verify.tolerance`."""
        judged = {}
        for name, tensor in got.items():
            plain = self.plain[name]
            if plain.is_floating_point():
                judged[name] = as_close_as_torch(tensor, self.exact[name].double(), self.torch.get(name, plain))
            else:
                judged[name] = identical(tensor, plain)
        return judged


def _in(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    numbers = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return inputs | {name: value.to(dtype) for name, value in numbers.items()}
