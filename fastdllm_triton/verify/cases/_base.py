"""What describes an op to all that try, time, compile or tune it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...kernels._arch import Arch
from ...models.published import DREAM_7B, LLADA_8B

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Sizes = Mapping[str, Any]
Function = Callable[..., Any]
Compiled = tuple[torch.dtype, Sizes, Inputs | None]
Where = Literal["quick", "full", "key", "gpu"]

#: The models whose sizes the large cases have, as the shapes of benches name them.
CASE_MODELS = {"llada": LLADA_8B, "dream": DREAM_7B}
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Random:
    """Normal numbers of one seed, drawn on a device in a dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        # The meta device has no generator, and no numbers.
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """``size`` numbers, ``scale`` wide."""
        return torch.randn(size, generator=self.generator, device=self.device).mul_(scale).to(dtype or self.dtype)

    def slots(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Case:
    """A shape in which the kernel is held against the reference.

    Attributes:
        why: the reason that it is there, which is also its name.
        sizes: what ``OpCases.make`` takes.
        where: ``quick``: in every run, small; ``full``: small, in runs that are not quick; ``key``: on a GPU, the sizes of a
            step and of a refresh of LLaDA-8B or Dream-7B; ``gpu``: on a GPU, in runs that are not quick.
    """

    why: str
    sizes: Sizes
    where: Where = "full"

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


@dataclass(frozen=True)
class ShapeClass:
    """A forward whose launches the performance report looks at.

    Attributes:
        name: for people.
        model: a name in :data:`CASE_MODELS`.
        batch, window, slots: of the forward.
    """

    name: str
    model: str
    batch: int
    window: int
    slots: int

    @property
    def rows(self) -> int:
        return self.batch * self.window

    @property
    def head_rows(self) -> int:
        """Rows of the blocks, which are those that reach the head."""
        return self.batch * 32


def _results(result: Any, inputs: Inputs) -> Outputs:
    results = result if isinstance(result, tuple) else (result,)
    return {"y" if i == 0 else f"y{i}": tensor for i, tensor in enumerate(results)}


@dataclass(frozen=True)
class OpCases:
    """How to try and time an op.

    Attributes:
        op: its name, which its modules and functions in ``kernels`` and ``reference`` have too.
        cases: in which it must be right.
        make: the keyword arguments of a call from :class:`Random` and the sizes of a case or of a timed shape.
        shapes: that are timed.
        key: of these the ones that matter most: a step and a refresh of one row.
        small: a shape for which the interpreter takes no time.
        axis: the size along which times are plotted.
        bytes: of memory traffic that a shape cannot do without, at two bytes a number unless the shape says otherwise.
        flops: of the matrix products of a shape.
        named: the tensors to compare, from the result of a call and its arguments, those written in place included.
        called: how a function is called where it is compared.
        writes: arguments that a call changes; each call that is compared gets copies of its own.
        outs: arguments that receive results, in the order of ``named``, which begins with them.
        common: further arguments of each call in a case, which one that is timed does without.
        variants: further arguments of the kernel alone, by a word for each of its ways to the same result.
        twin: PyTorch's own result in the inputs' dtype, whose error sets the bound; the reference's if not given.
        dtypes: that the inputs come in.
        float64: whether the reference takes the inputs in float64.
        compiled: what is compiled ahead of time, so that every configuration that the config function can return for the
            models' sizes is: dtype, sizes, and further arguments of the kernel in the place of its variants.
        label: of a compiled kernel, from its name, its dtype and its constants: short, and another one for other code.
        forward: the sizes of the calls in a forward, one for each that differs; empty for what forwards do without.
    """

    op: str
    cases: Sequence[Case]
    make: Callable[..., Inputs]
    shapes: Sequence[Sizes]
    key: Sequence[Sizes]
    small: Sizes
    axis: str
    bytes: Callable[[Sizes], int]
    flops: Callable[[Sizes], int] = lambda shape: 0
    named: Callable[[Any, Inputs], Outputs] = _results
    called: Callable[[Function], Function] = lambda function: function
    writes: Sequence[str] = ()
    outs: Sequence[str] = ()
    common: Mapping[str, Any] = field(default_factory=dict)
    variants: Callable[[Inputs], Mapping[str, Inputs]] = lambda inputs: {"": {}}
    twin: Callable[[Inputs], Outputs] | None = None
    dtypes: Sequence[torch.dtype] = ALL_DTYPES
    float64: bool = True
    compiled: Callable[[Arch], Iterable[Compiled]] = lambda arch: ()
    label: Callable[[str, str, Mapping[str, Any]], str] = lambda kernel, dtype, constants: dtype
    forward: Callable[[ShapeClass], Iterable[Sizes]] = lambda shape_class: ()

    def inputs(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The arguments of a call, without those that receive results."""
        return self.make(Random(device, dtype, seed), **sizes)

    @property
    def kernel(self) -> Function:
        """Looked up anew each time, so that a test can put another one in its place."""
        return self._function("kernels")

    @property
    def launched(self) -> Function:
        """What launches the op's kernels."""
        return self.kernel

    @property
    def reference(self) -> Function:
        return self._function("reference")

    def _function(self, folder: str) -> Function:
        package = __package__.split(".")[0]
        function: Function = getattr(importlib.import_module(f"{package}.{folder}.{self.op}"), self.op)
        return function

    def result_memory(self, outputs: Outputs) -> Inputs:
        """Arguments that receive results, of the shapes of these, full of NaN."""
        return {name: torch.full_like(result, torch.nan) for name, result in zip(self.outs, outputs.values(), strict=False)}

    def outputs(self, function: Function, inputs: Inputs, **options: Any) -> Outputs:
        """Calls the kernel or the reference; the inputs stay as they are."""
        inputs = _copied(inputs, self.writes)
        return self.named(self.called(function)(**inputs, **options), inputs)


def _copied(inputs: Inputs, names: Iterable[str]) -> Inputs:
    return inputs | {name: copy(inputs[name]) for name in names}


def copy(value: Any) -> Any:
    """A tensor, or a dataclass with all tensors in it, in memory of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    tensors = {name: field.clone() for name, field in vars(value).items() if isinstance(field, Tensor)}
    return type(value)(**vars(value) | tensors)
