"""How a kernel file tells the compile report what to compile ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration that its config function can return.

    Every ``kernels/<op>.py`` has a function ``compile_cases(arch: Arch) -> list[CompileCase]`` over its shape grid.

    Attributes:
        op: the op's name.
        kernel: the ``@triton.jit`` function.
        config: short unique label of the configuration within the kernel.
        signature: Triton type of every runtime argument (``"*bf16"``, ``"i32"``, ``"fp32"``).
        constexprs: value of every constexpr argument.
        divisible: runtime arguments known to be divisible by 16, as a launch would find them.
        num_warps, num_stages: launch options.
        fp_fusion: whether products and sums may become one fused multiply-add.
    """

    op: str
    kernel: Any
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = field(default=())
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
