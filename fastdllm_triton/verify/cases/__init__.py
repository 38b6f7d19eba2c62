"""One description of each op, read by the tests, ``verify``, the benches, the tuner and the reports.

``cases/<op>.py`` holds an :class:`OpCases`: the shapes in which the kernel must be right, each with a word on why it is there,
the shapes that are timed, and bytes and FLOPs; ``compile_cases(arch)``: what the compile report compiles, every configuration
that the op's config function can return; and ``launches(shape_class, arch)``: what a forward of a model launches.
"""

from __future__ import annotations

from ._base import Case, CompileCase, Inputs, OpCases, Outputs, Random, ShapeClass
from .commit_tokens import COMMIT_TOKENS
from .head_statistics import HEAD_STATISTICS
from .linear import LINEAR
from .rms_norm import RMS_NORM
from .rope_kv_write import ROPE_KV_WRITE
from .swiglu import SWIGLU
from .token_statistics import TOKEN_STATISTICS
from .window_attention import WINDOW_ATTENTION
from .window_inputs import WINDOW_INPUTS

__all__ = ["OPS", "Case", "CompileCase", "Inputs", "OpCases", "Outputs", "Random", "ShapeClass"]

#: In the order of a forward.
OPS = {
    cases.op: cases
    for cases in (
        WINDOW_INPUTS,
        RMS_NORM,
        LINEAR,
        ROPE_KV_WRITE,
        WINDOW_ATTENTION,
        SWIGLU,
        TOKEN_STATISTICS,
        HEAD_STATISTICS,
        COMMIT_TOKENS,
    )
}
