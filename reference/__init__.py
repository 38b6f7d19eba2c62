"""Every op in plain PyTorch: the oracle of the kernels and of the ops of a CPU.

One file an op, one function of the same name, the same signature as the kernel's launcher. Written to be read: no
cleverness, float64, float32 and bfloat16 on any device, float32 accumulation (float64 for float64).
"""

from .commit_tokens import commit_tokens
from .head_statistics import head_statistics
from .linear import linear
from .rms_norm import rms_norm
from .rope_kv_write import rope_kv_write
from .swiglu import swiglu
from .token_statistics import statistics_merge, token_statistics
from .window_attention import window_attention
from .window_inputs import window_inputs

__all__ = [
    "commit_tokens",
    "head_statistics",
    "linear",
    "rms_norm",
    "rope_kv_write",
    "statistics_merge",
    "swiglu",
    "token_statistics",
    "window_attention",
    "window_inputs",
]
