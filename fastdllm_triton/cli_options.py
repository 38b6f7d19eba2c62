"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="'tiny' (built in), a checkpoint folder, or a hub id.")]
DeviceOption = Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; the GPU if there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64; the checkpoint's own if not given.")
]


class BackendChoice(StrEnum):
    """Backends."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


BackendOption = Annotated[BackendChoice, typer.Option(help="Who runs the ops.")]
