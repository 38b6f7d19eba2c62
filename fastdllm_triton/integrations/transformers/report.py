"""What ``accelerate`` did to a module, as a table to read and a dict to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any, Literal, cast

from rich.console import Console
from rich.table import Table

from ...models.config import ModelConfig
from ...ops import PARTS, Ops
from .recognise import RecognisedModule

#: What each part of :data:`fastdllm_triton.ops.PARTS` is, in a reader's words.
_WHAT = {
    "attention": "rotation, cache in place, attention",
    "norms": "norms with residual, gate of the MLP, products fused with them",
    "head": "head, statistics and commit of the masked rows",
}

#: The functions of ``fastdllm_triton.compat`` that decode a family as its authors' code does.
_FUNCTIONS = {
    "llada": ("generate", "generate_with_prefix_cache", "generate_with_dual_cache"),
    "dream": ("diffusion_generate",),
    "fast_dllm_qwen": ("fast_dllm_v2_generate", "batch_sample"),
    "sdar": ("block_diffusion_generate",),
}

Runs = Literal["triton", "cpu", "reference", "fused", "module"]


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes:
        part: of the model.
        runs: ``triton``, ``cpu`` or ``reference`` (ops of this library, the last two plain PyTorch) where the part was replaced,
            ``fused`` where parameters are views of one tensor, ``module`` where the module's own code stays.
        what: what runs.
        reason: why so.
    """

    part: str
    runs: Runs
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was replaced in a module and what not, with reasons. Printing it shows a table.

    Attributes:
        architecture: ``llada``, ``dream``, ``fast_dllm_qwen`` or ``sdar``.
        layers: how many.
        device, dtype: of the parameters.
        entries: the lines.
        fused_bytes: memory of the fused tensors, which the module's parameters are views of.
    """

    architecture: str
    layers: int
    device: str
    dtype: str
    entries: tuple[Entry, ...]
    fused_bytes: int

    @property
    def replaced(self) -> tuple[str, ...]:
        """Parts that this library runs."""
        return tuple(entry.part for entry in self.entries if entry.runs != "module")

    @property
    def kept(self) -> tuple[str, ...]:
        """Parts that the module's own code still runs, or that are not run by ``generate``."""
        return tuple(entry.part for entry in self.entries if entry.runs == "module")

    @property
    def summary(self) -> str:
        """What runs on what, in a few words."""
        entries = [entry for entry in self.entries if entry.part in PARTS]
        runs = {entry.runs: entry.reason for entry in entries}
        parts = {name: ", ".join(entry.part for entry in entries if entry.runs == name) for name in runs}
        return "; ".join(f"{parts[name]} on {name}: {reason}" for name, reason in runs.items())

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"entries": [asdict(entry) for entry in self.entries]}

    def __rich__(self) -> Table:
        title = f"{self.architecture}, {self.layers} layers, {self.dtype} on {self.device}"
        table = Table("part", "runs", "what", "why", title=title, title_justify="left")
        for entry in self.entries:
            table.add_row(entry.part, entry.runs, entry.what, entry.reason)
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()


def functions_of(config: ModelConfig) -> tuple[str, ...]:
    """The functions of ``fastdllm_triton.compat`` for a family."""
    return _FUNCTIONS[config.architecture]


def report_of(recognised: RecognisedModule, ops: Ops, plain: Sequence[str], fused_bytes: int) -> Report:
    """The report on a module.

    Args:
        recognised: what it is.
        ops: what its parts run on,
        plain: but for these, which do without kernels.
        fused_bytes: memory of its fused tensors.
    """
    layers = recognised.config.layers
    entries = []
    for part in PARTS:
        reason = f"{part}=False" if part in plain else ops.reason
        runs = cast("Runs", "reference" if part in plain and ops.name == "triton" else ops.name)
        entries.append(Entry(part, runs, _WHAT[part], reason))
    for field, parts in recognised.architecture.NAMES.layer.items():
        if len(parts) > 1:
            names = ", ".join(part.split(".")[-2] for part in parts)
            entries.append(Entry(field, "fused", f"{layers} x ({names})", "the parameters are views of one tensor a layer"))
    functions = ", ".join(f"compat.{name}" for name in functions_of(recognised.config))
    reason = "fuses at its first call what has moved since"
    entries.append(Entry("generate", cast("Runs", ops.name), f"generate; {functions}", reason))
    entries.append(Entry("forward", "module", "its own code", "kept for training; fast_forward gives its logits"))
    if recognised.hooked:
        where = ", ".join(recognised.hooked[:3]) + (", ..." if len(recognised.hooked) > 3 else "")
        entries.append(Entry("hooks", "module", f"forward hooks of {where}", "only its own forward runs them"))
    return Report(
        architecture=recognised.config.architecture,
        layers=layers,
        device=str(recognised.device),
        dtype=str(recognised.dtype).removeprefix("torch."),
        entries=tuple(entries),
        fused_bytes=fused_bytes,
    )
