"""The official functions under their names, so that switching is one import line.

Tokens and number of forwards are those of the official code wherever it finishes its blocks; where it leaves masks behind or
never ends, these functions finish the block, and ``[MASK]`` is never committed. Masks in the prompt stay masks, but for
``diffusion_generate`` without a cache, which fills them as the official one does.

The functions of this package are Fast-dLLM's, version 2 among them, and SDAR's. :mod:`fastdllm_triton.compat.llada` has the
``generate`` of ML-GSAI's LLaDA and :mod:`fastdllm_triton.compat.d1` that of d1.
"""

from .block_diffusion import batch_sample, block_diffusion_generate, fast_dllm_v2_generate
from .dream import diffusion_generate
from .fast_dllm import generate, generate_with_dual_cache, generate_with_prefix_cache

__all__ = [
    "batch_sample",
    "block_diffusion_generate",
    "diffusion_generate",
    "fast_dllm_v2_generate",
    "generate",
    "generate_with_dual_cache",
    "generate_with_prefix_cache",
]
