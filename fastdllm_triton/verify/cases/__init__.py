"""One description of each op, read by the tests, ``verify``, the benches, the tuner and the reports.

``cases/<op>.py`` holds an :class:`OpCases`: the shapes in which the kernel must be right, each with a word on why it is there,
the shapes that are timed, bytes and FLOPs, what is compiled ahead of time, and what a forward of a model calls.
"""

from __future__ import annotations

from ._base import Case, Inputs, OpCases, Outputs, Random, ShapeClass, Sizes
from .commit_tokens import COMMIT_TOKENS
from .head_statistics import HEAD_STATISTICS
from .linear import LINEAR
from .prefetch import PREFETCH
from .rms_norm import RMS_NORM
from .rope_kv_write import ROPE_KV_WRITE
from .swiglu import SWIGLU
from .token_statistics import TOKEN_STATISTICS
from .window_attention import WINDOW_ATTENTION
from .window_inputs import WINDOW_INPUTS

__all__ = ["LAUNCHED", "OPS", "Case", "Inputs", "OpCases", "Outputs", "Random", "ShapeClass", "Sizes"]

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
#: And what computes nothing: the kernels that are compiled.
LAUNCHED = {**OPS, PREFETCH.op: PREFETCH}
