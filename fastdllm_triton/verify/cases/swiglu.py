"""The cases of swiglu."""

from __future__ import annotations

import math

from ...kernels import swiglu as kernels
from ...kernels._arch import Arch
from ...kernels._pdl import has_dependent_launch
from ._base import MODELS, Case, CompileCase, Inputs, Launches, OpCases, Random, ShapeClass, compile_case, labelled

_LLADA, _DREAM = (model.mlp for model in MODELS.values())


def _make(random: Random, rows: int, width: int, leading: tuple[int, ...] = ()) -> Inputs:
    return {"gate_up": random(*leading, rows, 2 * width, scale=4)}


SWIGLU = OpCases(
    "swiglu",
    [
        Case("one product", {"rows": 1, "width": 1}, "quick"),
        Case("an odd width", {"rows": 3, "width": 7}, "quick"),
        Case("leading dimensions and a tail", {"leading": (2,), "rows": 3, "width": 130}, "quick"),
        Case("LLaDA's width", {"rows": 2, "width": _LLADA}),
        Case("Dream's width", {"rows": 2, "width": _DREAM}),
        Case("a step of LLaDA", {"rows": 32, "width": _LLADA}, "key"),
        Case("a refresh of Dream", {"rows": 4096, "width": _DREAM}, "key"),
    ],
    _make,
    shapes=[{"rows": rows, "width": width} for width in (_LLADA, _DREAM) for rows in (32, 128, 512, 2048, 8192)],
    key=[{"rows": rows, "width": width} for width in (_LLADA, _DREAM) for rows in (32, 2048)],
    small={"rows": 3, "width": 64},
    axis="rows",
    bytes=lambda shape: 2 * 3 * shape["rows"] * shape["width"],  # gate and up in, their product out
    outs=["out"],
)


def compile_cases(arch: Arch) -> list[CompileCase]:
    """The MLPs of LLaDA and Dream share one configuration."""
    config = kernels.select_config(arch, _LLADA)
    types = {"gate_up_ptr out_ptr": "*bf16", "F": "i32"}
    constexprs = {"BLOCK_F": config.block_f, "PDL": has_dependent_launch(arch)}
    label = f"bf16 block={config.block_f}"
    return [compile_case("swiglu", kernels._swiglu_kernel, label, types, constexprs, num_warps=config.num_warps)]


def launches(shape_class: ShapeClass, arch: Arch) -> Launches:
    """The launch of a layer."""
    width = MODELS[shape_class.model].mlp
    config = kernels.select_config(arch, width)
    programs = shape_class.rows * math.ceil(width / config.block_f)
    return labelled(compile_cases(arch), f"bf16 block={config.block_f}", programs)
