"""Another order of the programs of a launch in Triton's interpreter, which runs them one after the other from the first on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Environment variable that says in which order all tests run programs.
VARIABLE = "PROGRAM_ORDER"
ORDERS = ("reversed", "random")


@contextmanager
def programs_in_order(order: str) -> Iterator[None]:
    """Runs the programs of every launch from the last one back, or shuffled, each launch in an order of its own."""
    from triton.runtime.interpreter import interpreter_builder as builder

    shuffler, state = random.Random(0), {}
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def dim(x: int, y: int, z: int) -> None:
        programs = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        if order == "reversed":
            programs.reverse()
        else:
            shuffler.shuffle(programs)
        state["programs"], state["sizes"] = programs, (y, z)
        set_grid_dim(x, y, z)

    def idx(x: int, y: int, z: int) -> Any:
        rows, columns = state["sizes"]
        set_grid_idx(*state["programs"][(x * rows + y) * columns + z])

    builder.set_grid_dim, builder.set_grid_idx = dim, idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
