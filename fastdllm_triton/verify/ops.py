"""Every kernel on its grid: against float64, against PyTorch's own error, and against itself a second time."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import _check
from .grids import GRIDS, Case, Function, Grid, Inputs, Outputs, Random
from .records import CaseRecord, Record
from .tolerance import Judgement, as_close_as_torch, bitwise, identical


def dtypes_of(op: str) -> list[str]:
    """The dtypes that an op is tried in here."""
    # The interpreter's numpy computes with the bits of a bfloat16.
    dtypes = [dtype for dtype in GRIDS[op].dtypes if not (_check.INTERPRETED and dtype == torch.bfloat16)]
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def verify_op(op: str, device: torch.device, *, quick: bool = False, dtypes: Sequence[str] = ()) -> Iterator[Record]:
    """A record for each dtype.

    Args:
        op: a name in :data:`GRIDS`.
        device: a GPU, or the CPU where Triton's interpreter runs.
        quick: only the quick cases, and on a GPU the key ones.
        dtypes: of :func:`dtypes_of`; all if not given.
    """
    grid = GRIDS[op]
    for dtype in dtypes or dtypes_of(op):
        began = time.perf_counter()
        cases = [_case_record(grid, case, device, getattr(torch, dtype)) for case in wanted(grid, device, quick)]
        yield Record(op, dtype, cases, time.perf_counter() - began)


def wanted(grid: Grid, device: torch.device, quick: bool) -> list[Case]:
    """The cases of a run."""
    where = {"quick"} if quick else {"quick", "full"}
    if device.type == "cuda":
        where |= {"key"} if quick else {"key", "gpu"}
    return [case for case in grid.cases if case.where in where]


def _case_record(grid: Grid, case: Case, device: torch.device, dtype: torch.dtype) -> CaseRecord:
    try:
        found, unequal, same = try_case(grid, case, device, dtype)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        reason = f"too little GPU memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        return CaseRecord(case.why, 0.0, 0.0, ok=True, skipped=reason)
    except Exception as error:  # a kernel that does not compile or launch is a finding, and the others are still tried
        return CaseRecord(case.why, math.inf, 0.0, ok=False, note=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    notes = [f"wrong: {', '.join(unequal)}"] if unequal else []
    notes += [] if same else ["a second run gives other bits"]
    return CaseRecord(case.why, found.error, found.bound, ok=not notes, note="; ".join(notes))


def try_case(grid: Grid, case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Judgement, list[str], bool]:
    """Runs a case.

    Returns:
        The judgement of the output that is worst, the names of outputs that are wrong, and whether a second run is bitwise
        the first.
    """
    kernel = _function("kernels", grid.op)
    reference = _function("reference", grid.op)
    inputs = grid.inputs(Random(device, dtype), **case.sizes)
    got, again = grid.outputs(kernel, inputs), grid.outputs(kernel, inputs)
    plain = grid.outputs(reference, inputs)
    exact = grid.outputs(reference, _in_float64(inputs)) if grid.float64 else plain
    baseline = plain if grid.twin is None else grid.twin(inputs)
    judged = {name: _judge(got[name], exact[name], plain[name], baseline.get(name)) for name in plain}
    worst = max(judged.values(), key=lambda judgement: judgement.severity)
    return worst, [name for name, judgement in judged.items() if not judgement.ok], _same(got, again)


def _judge(got: Tensor, exact: Tensor, plain: Tensor, baseline: Tensor | None) -> Judgement:
    if not plain.is_floating_point():
        return identical(got, plain)
    return as_close_as_torch(got, exact.double(), plain if baseline is None else baseline)


def _same(got: Outputs, again: Outputs) -> bool:
    return all(bitwise(got[name], again[name]) for name in got)


def _in_float64(inputs: Inputs) -> Inputs:
    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in inputs.items()}


def _function(room: str, op: str) -> Function:
    """Looked up anew each time, so that a test can put a wrong kernel in its place."""
    module = importlib.import_module(f"{__package__.rsplit('.', 1)[0]}.{room}.{op}")
    function: Function = getattr(module, op)
    return function
