"""The cases of linear."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

from ...kernels import linear as kernels
from ...kernels._arch import Arch, arch_of
from ...kernels._pdl import has_dependent_launch
from ...types import Activation
from ._base import MODELS, Case, CompileCase, Inputs, Launches, OpCases, Random, ShapeClass, Sizes, compile_case


class Projection(NamedTuple):
    """A product of a layer, fused as a layer needs it: the weight's ``N`` and ``K``, and what stands around it."""

    n: int
    k: int
    norm: bool
    activation: Activation | None
    residual: bool

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.n if self.activation is None else self.n // 2


#: The four of LLaDA-8B and of Dream-7B, as ``<model> <part>``.
PROJECTIONS = {
    f"{model} {part}": projection
    for model, c in MODELS.items()
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
    return kernels.select_config(arch_of(x.device), x.shape[:-1].numel(), n, k, x.element_size(), inputs["activation"])


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
)


def compile_cases(arch: Arch) -> list[CompileCase]:
    """LLaDA's projections over the rows of windows of 16 to 128 for 1 to 16 sequences and some of Dream's, each distinct
    program once; weights so small that the columns are split, as in a shard of a model; other dtypes.
    """
    llada = [projection for name, projection in PROJECTIONS.items() if name.startswith("llada")]
    dream = [projection for name, projection in PROJECTIONS.items() if name.startswith("dream")]
    shards = [Projection(1024, 4096, False, None, True), Projection(1024, 4096, True, "swiglu", False)]
    grid = [("bf16", 2, rows, projection) for projection in llada for rows in (16, 32, 64, 128, 512)]
    grid += [("bf16", 2, rows, projection) for projection in dream for rows in (32, 128)]
    grid += [("bf16", 2, 32, projection) for projection in shards]
    grid += [("fp16", 2, 64, PROJECTIONS["llada gate_up"]), ("fp32", 4, 64, PROJECTIONS["llada gate_up"])]
    cases: dict[str, CompileCase] = {}
    for dtype, itemsize, rows, projection in grid:
        for case in _kernels_of(arch, dtype, itemsize, rows, projection):
            cases.setdefault(case.config, case)
    return list(cases.values())


def _kernels_of(arch: Arch, dtype: str, itemsize: int, rows: int, projection: Projection) -> list[CompileCase]:
    """The kernels that a product launches, each under a label of what the compiler sees."""
    _, k, norm, activation, residual = projection
    config = kernels.select_config(arch, rows, projection.n, k, itemsize, activation)
    pdl, gated, split = has_dependent_launch(arch), activation == "swiglu", config.splits > 1
    types = {
        "x_ptr weight_ptr norm_ptr residual_ptr out_ptr": f"*{dtype}",
        "partial_ptr": "*fp32",
        "M N part splits": "i32",
        "eps": "fp32",
    }
    epilogue = {"SWIGLU": gated, "RESIDUAL": residual, "PDL": pdl} | ({} if residual else {"residual_ptr": None})
    main = kernels._constexprs(arch, config, k, norm, gated, pdl) | epilogue | ({} if norm else {"norm_ptr": None})
    main["out_ptr" if split else "partial_ptr"] = None
    words = [word for word, on in {"norm": norm, "swiglu": gated, "residual": residual}.items() if on]
    form = [word for word, on in {"swapped": config.swap, "split": split}.items() if on]
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    label = " ".join([dtype, f"K={k}", tile, *form, *words, f"stages={config.num_stages}"])
    warps = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    cases = [compile_case("linear", kernels._linear_kernel, label, types, main, ("M", "splits"), **warps)]
    if split:
        label, finish = " ".join([dtype, "finish", *words[norm:]]), epilogue | {"BLOCK_N": kernels.FINISH_COLUMNS}
        cases.append(compile_case("linear", kernels._finish_kernel, label, types, finish, ("M", "splits")))
    return cases


def launches(shape_class: ShapeClass, arch: Arch) -> Launches:
    """The launches of a layer's projections, where a measurement puts this kernel in the library's place."""
    if shape_class.rows > kernels.MAX_ROWS:
        return
    for name, projection in PROJECTIONS.items():
        if name.startswith(shape_class.model):
            config = kernels.select_config(arch, shape_class.rows, projection.n, projection.k, 2, projection.activation)
            tiles = math.ceil(shape_class.rows / config.block_m) * math.ceil(projection.outputs / config.block_n)
            yield _kernels_of(arch, "bf16", 2, shape_class.rows, projection)[0], tiles * config.splits
