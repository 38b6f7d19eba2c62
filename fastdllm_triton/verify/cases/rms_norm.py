"""The cases of rms_norm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ...kernels import rms_norm as kernels
from ...kernels._arch import Arch
from ...kernels._pdl import has_dependent_launch
from ._base import MODELS, Case, CompileCase, Inputs, Launches, OpCases, Random, ShapeClass, compile_case, labelled

_LLADA, _DREAM = (model.width for model in MODELS.values())


def _make(
    random: Random, rows: int, width: int, residual: bool, leading: tuple[int, ...] = (), gather: Sequence[int] | None = None
) -> Inputs:
    inputs: Inputs = {"x": random(*leading, rows, width), "weight": random(width), "eps": 1e-5}
    inputs |= {} if gather is None else {"rows": torch.tensor(gather, device=random.device)}
    return inputs | ({"residual": random(*leading, rows, width)} if residual else {})


RMS_NORM = OpCases(
    "rms_norm",
    [
        Case("one element", {"rows": 1, "width": 1, "residual": False}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7, "residual": True}, "quick"),
        Case("the built-in model", {"rows": 5, "width": 128, "residual": True}, "quick"),
        Case("gathered rows, some of them none", {"rows": 4, "width": 24, "residual": True, "gather": (3, -1, 0)}, "quick"),
        Case("leading dimensions", {"leading": (2,), "rows": 5, "width": 64, "residual": False}),
        Case("Dream's width, no power of two", {"rows": 2, "width": _DREAM, "residual": True}),
        Case("LLaDA's width", {"rows": 4, "width": _LLADA, "residual": False}),
        Case("a step of LLaDA", {"rows": 32, "width": _LLADA, "residual": True}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": _DREAM, "residual": True}, "key"),
    ],
    _make,
    shapes=[
        {"rows": rows, "width": width, "residual": residual}
        for width in (_DREAM, _LLADA)
        for residual in (False, True)
        for rows in (32, 128, 512, 2048, 8192)
    ],
    key=[{"rows": rows, "width": width, "residual": True} for width in (_DREAM, _LLADA) for rows in (32, 2048)],
    small={"rows": 3, "width": 64, "residual": True},
    axis="rows",
    # x in and y out, with a residual also that in and the sum out; the weight once.
    bytes=lambda shape: 2 * shape["width"] * (shape["rows"] * (4 if shape["residual"] else 2) + 1),
    outs=["out", "residual_out"],
)


def compile_cases(arch: Arch) -> list[CompileCase]:
    """The widths of Dream and LLaDA, with and without a residual; gathers of embeddings, and of sums."""
    types = {"x_ptr residual_ptr weight_ptr out_ptr residual_out_ptr": "*bf16", "rows_ptr": "*i64", "eps": "fp32"}
    cases = []
    for width, residual, gather in itertools.product((_DREAM, _LLADA), (False, True), (False, True)):
        config = kernels.select_config(arch, width)
        constexprs: dict[str, Any] = {"E": width, "HAS_RESIDUAL": residual, "BLOCK_E": config.block_e}
        constexprs |= {"PDL": has_dependent_launch(arch)} | ({} if gather else {"rows_ptr": None})
        label = f"bf16 E={width}{' residual' if residual else ''}{' rows' if gather else ''}"
        cases.append(compile_case("rms_norm", kernels._rms_norm_kernel, label, types, constexprs, num_warps=config.num_warps))
    return cases


def launches(shape_class: ShapeClass, arch: Arch) -> Launches:
    """The launch of a layer's norm."""
    return labelled(compile_cases(arch), f"bf16 E={MODELS[shape_class.model].width} residual", shape_class.rows)
