"""Runs the grid of an evaluation and keeps what is finished on disk, so that it can be interrupted at any time.

A folder holds ``run.json`` (what the results depend on: a later run in the folder must match it) and a JSONL file for each
variant in ``requests/``. Batches are the same in every run: requests ``i * batch_size`` and on, in order. A batch is appended
when it is finished, times included, and everything that is reported is computed from these files, so an interrupted and resumed
evaluation reports, byte for byte, what its files say.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..decoding.config import GenerationConfig
from ..engine.limits import check_prompts
from ..engine.outputs import GenerationOutput
from ..model import MaskedDiffusionLM
from ..tools.environment import commit, device_name
from ..utils.files import locked, naming, write_atomically, write_json
from .cost import Meter
from .grid import Variant
from .scoring import Request, Scorer, digest


@dataclass(frozen=True)
class Result:
    """One request decoded by one variant: a line of a variant's file.

    Attributes:
        index: of the request.
        prompt, answer: the request.
        text: what was generated, up to its first end token.
        tokens: committed by forwards; not what was filled in after the end token.
        forwards: in which the row still had something to decode.
        bytes, flops: what these cost on their own by the roofline model (:mod:`~fastdllm_triton.evaluation.cost`).
        seconds: the request's share of the time of its batch.
        step_map: for each generated slot the forward of the batch that committed it, ``-1`` where none did.
        scores: by name; None as long as the variant is not complete.
        begun: tokens of the prompt in the first block, or sub-block.
    """

    index: int
    prompt: str
    answer: str
    text: str
    tokens: int
    forwards: int
    bytes: float
    flops: float
    seconds: float
    step_map: list[int]
    scores: dict[str, float] | None = None
    begun: int = 0


class Evaluation:
    """A grid over requests, in a folder that is this evaluation's alone while it is entered: ``with Evaluation(...) as run``.

    Args:
        model: what decodes.
        requests: in order.
        scorer: of their answers. Scores are computed anew from the texts on disk, so it may change between runs.
        folder: made if it is not there.
        gen_length: tokens to generate.
        batch_size: requests decoded together.
        chat: wrap prompts in the checkpoint's chat template.

    Raises:
        ValueError: an argument is not valid, or a prompt does not fit the model; and on entering, the folder belongs to another
            run.
        OSError: on entering: the folder cannot be written, or another run is writing to it.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        requests: Sequence[Request],
        scorer: Scorer,
        folder: Path,
        *,
        gen_length: int,
        batch_size: int,
        chat: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch-size must be 1 or more, got {batch_size}")
        self.model, self.requests, self.scorer, self.folder = model, requests, scorer, folder
        self.gen_length, self.batch_size = gen_length, batch_size
        self.prompts = [model.encode(request.prompt, chat=chat) for request in requests]
        config = GenerationConfig(gen_length, gen_length)
        for request, prompt in zip(requests, self.prompts, strict=True):
            try:
                check_prompts([prompt], config, model.network)
            except ValueError as error:
                raise ValueError(f"{request.source}: {error}") from None
        self.identity = {
            "model": checkpoint_digest(model.folder),
            "requests": f"{len(requests)} requests, {digest(requests)}",
            "chat": chat,
            "gen_length": gen_length,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "backend": model.network.ops.name,
            "device": device_name(model.device),
            "threads": model.threads,
            "fastdllm_triton": __version__,
            "torch": torch.__version__,
        }
        self._lock = ExitStack()

    def __enter__(self) -> Evaluation:
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder, "--out"))
            self._claim()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _claim(self) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            with naming("--out", self.folder):
                (self.folder / "requests").mkdir(exist_ok=True)
                # The commit is written down, but may change: not every change of the code changes a result.
                write_json(path, {**self.identity, "commit": commit()})
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--out: {path} is not JSON ({error}); give another folder") from None
        for key, value in self.identity.items():
            if there.get(key) != value:
                difference = f"{key} = {there.get(key)!r}, this one has {value!r}"
                raise ValueError(f"--out: {self.folder} holds a run with {difference}; give another folder")

    def finished(self, variant: Variant) -> list[Result]:
        """The results of a variant that are on disk: whole batches from the first on, up to one that was cut off."""
        results: list[Result] = []
        try:
            lines = self._path(variant).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        for line, request in zip(lines, self.requests, strict=False):
            try:
                result = Result(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                break
            if result.index != len(results) or result.prompt != request.prompt:
                break
            results.append(result)
        if len(results) < len(self.requests):
            del results[len(results) // self.batch_size * self.batch_size :]
        return results

    def run(self, variant: Variant, progress: Callable[[int], None] = lambda done: None) -> list[Result]:
        """Decodes what is missing of a variant, and scores it.

        Args:
            variant: how to decode.
            progress: called with the number of requests that are done: those on disk first, then after each batch.

        Raises:
            RuntimeError: the scorer raised; the texts are on disk.
            OSError: a file cannot be written; the batches before are on disk.
        """
        results = self.finished(variant)
        progress(len(results))
        config = variant.config(self.gen_length)
        if len(results) < len(self.requests):
            self._write(variant, results)  # Less what was cut off.
            if self.model.device.type == "cuda":
                # The first generation of a shape compiles and allocates.
                self.model.generate(self.prompts[len(results) : len(results) + self.batch_size], config)
        for start in range(len(results), len(self.requests), self.batch_size):
            batch = list(self.requests[start : start + self.batch_size])
            prompts = self.prompts[start : start + self.batch_size]
            meter = Meter(self.model.config, config)
            output = self.model.generate(prompts, config, callback=meter)
            fresh = []
            for row, (request, prompt, steps) in enumerate(zip(batch, prompts, output.step_map.tolist(), strict=True)):
                cost = meter.cost(row, len(prompt), steps)
                begun = len(prompt) % config.decoded_length if self.model.config.block_causal else 0
                figures = row_figures(output, row) | {"bytes": cost.bytes, "flops": cost.flops, "step_map": steps, "begun": begun}
                fresh.append(Result(index=start + row, prompt=request.prompt, answer=request.answer, **figures))
            with naming("--out", self.folder), self._path(variant).open("a", encoding="utf-8") as file:
                file.write(_lines(fresh))
                file.flush()
                os.fsync(file.fileno())
            results += fresh
            progress(len(results))

        scored = [
            Result(**vars(result) | {"scores": self.scorer(request, result.text)})
            for request, result in zip(self.requests, results, strict=True)
        ]
        for result in scored:
            if (result.scores or {}).keys() != (scored[0].scores or {}).keys():
                names = " and ".join(", ".join(sorted(r.scores or {})) for r in (scored[0], result))
                raise RuntimeError(f"scorer {self.scorer.name} must give the same scores for every request, got {names}")
        if self._path(variant).read_bytes() != _lines(scored).encode():
            self._write(variant, scored)
        return scored

    def _path(self, variant: Variant) -> Path:
        return self.folder / "requests" / f"{variant.name}.jsonl"

    def _write(self, variant: Variant, results: Sequence[Result]) -> None:
        with naming("--out", self.folder):
            write_atomically(self._path(variant), _lines(results))


def row_figures(output: GenerationOutput, row: int) -> dict[str, Any]:
    """What a generation made of a row, and the seconds that it took: the row's share of the batch's time."""
    return {
        "text": output.texts[row],
        "tokens": int((output.step_map[row] >= 0).sum()),
        "forwards": int(output.row_forwards[row]),
        "seconds": round(output.seconds / len(output.sequences), 9),
    }


def checkpoint_digest(folder: Path) -> str:
    """A hash that tells checkpoints apart without reading all of a large one: the config, and size and ends of the weights."""
    seen = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=12)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            seen.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            seen.update(file.read())
    return f"{folder.resolve().name}, {seen.hexdigest()}"


def _lines(results: Sequence[Result]) -> str:
    return "".join(json.dumps(vars(result)) + "\n" for result in results)
