"""The cases of linear."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch

from ...kernels import _arch
from ...kernels import linear as kernels
from ...kernels._arch import Arch
from ...types import Activation
from ._base import CASE_MODELS, Case, Compiled, Inputs, OpCases, Random, ShapeClass, Sizes


class Projection(NamedTuple):
    """A product of a layer, fused as a layer needs it: the weight's ``N`` and ``K``, and what stands around it."""

    n: int
    k: int
    norm: bool
    activation: Activation | None
    residual: bool

    @property
    def outputs(self) -> int:
        return self.n if self.activation is None else self.n // 2


#: The four of LLaDA-8B and of Dream-7B, as ``<model> <part>``.
PROJECTIONS = {
    f"{model} {part}": projection
    for model, c in CASE_MODELS.items()
    for part, projection in {
        "qkv": Projection((c.heads + 2 * c.kv_heads) * c.head_dim, c.width, True, None, False),
        "out": Projection(c.width, c.heads * c.head_dim, False, None, True),
        "gate_up": Projection(2 * c.mlp, c.width, True, "swiglu", False),
        "down": Projection(c.width, c.mlp, False, None, True),
    }.items()
}


def _make(
    random: Random,
    rows: int,
    n: int,
    k: int,
    norm: bool = False,
    activation: Activation | None = None,
    residual: bool = False,
    leading: tuple[int, ...] = (),
    name: str = "",
) -> Inputs:
    """The weight's numbers have the size that keeps the product's."""
    inputs: Inputs = {"x": random(*leading, rows, k), "weight": random(n, k, scale=k**-0.5), "activation": activation}
    inputs |= {"norm_weight": random(k), "eps": 1e-5} if norm else {}
    return inputs | ({"residual": random(*leading, rows, n // 2 if activation else n)} if residual else {})


def chosen_config(inputs: Inputs) -> kernels.Config:
    """The configuration that the pure function chooses for a call, whatever was measured."""
    x, (n, k) = inputs["x"], inputs["weight"].shape
    return kernels.select_config(_arch.arch_of(x.device), x.shape[:-1].numel(), n, k, x.element_size(), inputs["activation"])


def _bytes(shape: Sizes) -> int:
    """The weight, x, the residual and the norm's weight in, the result out."""
    outputs = shape["n"] // 2 if shape["activation"] == "swiglu" else shape["n"]
    rows = shape["rows"] * (shape["k"] + outputs * (2 if shape["residual"] else 1))
    return 2 * (shape["n"] * shape["k"] + rows + (shape["k"] if shape["norm"] else 0))


def _projection(name: str, rows: int, where: Any = "key") -> Case:
    model, part = name.split()
    return Case(f"{rows} rows of {model}'s {part}", {"rows": rows, **PROJECTIONS[name]._asdict()}, where)


_SHAPES = [
    {"name": name, "rows": rows, **projection._asdict()}
    for (name, projection), rows in product(PROJECTIONS.items(), (16, 32, 64, 128, 256, 512))
]
_FUSED: dict[str, Any] = {"norm": True, "activation": "swiglu"}


def _compiled(arch: Arch) -> list[Compiled]:
    """LLaDA's projections over the rows of windows of 16 to 128 for 1 to 16 sequences, and some of Dream's; weights so small that
    the columns are split, as in a shard of a model; other dtypes.
    """
    shards = [Projection(1024, 4096, False, None, True), Projection(1024, 4096, True, "swiglu", False)]
    gate_up = PROJECTIONS["llada gate_up"]
    grid = [
        (torch.bfloat16, rows, projection)
        for model, listed in (("llada", (16, 32, 64, 128, 512)), ("dream", (32, 128)))
        for name, projection in PROJECTIONS.items()
        if name.startswith(model)
        for rows in listed
    ]
    grid += [(torch.bfloat16, 32, projection) for projection in shards]
    grid += [(torch.float16, 64, gate_up), (torch.float32, 64, gate_up)]
    return [(dtype, {"rows": rows, **projection._asdict()}, None) for dtype, rows, projection in grid]


def _label(kernel: str, dtype: str, c: Mapping[str, Any]) -> str:
    words = [word for word in ("swiglu", "residual") if c[word.upper()]]
    if kernel == "_finish_kernel":
        return " ".join([dtype, "finish", *words])
    form = [word for word, name in (("swapped", "SWAP_AB"), ("split", "SPLIT"), ("norm", "NORM")) if c[name]]
    tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']}"
    return " ".join([dtype, f"K={c['K']}", tile, *form, *words, f"stages={c['STAGES']}"])


def _forward(c: ShapeClass) -> list[Sizes]:
    """The projections of a layer, where a measurement puts this kernel in the library's place."""
    projections = [projection for name, projection in PROJECTIONS.items() if name.startswith(c.model)]
    return [{"rows": c.rows, **projection._asdict()} for projection in projections if c.rows <= kernels.MAX_ROWS]


LINEAR = OpCases(
    "linear",
    [
        Case("one row, a tile mostly empty", {"rows": 1, "n": 2, "k": 16}, "quick"),
        Case("tails of rows, outputs and columns", {"rows": 19, "n": 74, "k": 88, "residual": True}, "quick"),
        Case("a norm and a gated unit", {"rows": 5, "n": 70, "k": 130, **_FUSED, "residual": True}, "quick"),
        Case("leading dimensions", {"leading": (2,), "rows": 3, "n": 34, "k": 130, **_FUSED, "residual": True}),
        Case("whole tiles", {"rows": 16, "n": 64, "k": 96, **_FUSED, "residual": True}),
        Case("fewer columns than a tile", {"rows": 33, "n": 70, "k": 7, **_FUSED, "residual": True}),
        Case("split columns", {"rows": 3, "n": 64, "k": 2048, **_FUSED}),
        _projection("llada qkv", 32),
        _projection("llada gate_up", 64),
        _projection("llada down", 128),
        _projection("dream gate_up", 32),
        _projection("dream down", 512, "gpu"),
    ],
    _make,
    shapes=_SHAPES,
    key=[shape for shape in _SHAPES if shape["rows"] == 32],
    small={"name": "small", "rows": 3, "n": 64, "k": 128, "norm": True, "activation": "swiglu", "residual": False},
    axis="rows",
    bytes=_bytes,
    flops=lambda shape: 2 * shape["rows"] * shape["n"] * shape["k"],
    outs=["out"],
    variants=lambda inputs: {"library": {}, "kernel": {"config": chosen_config(inputs)}},
    compiled=_compiled,
    label=_label,
    forward=_forward,
)
