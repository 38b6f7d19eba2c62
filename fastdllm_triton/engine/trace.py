"""Records a generation forward by forward, as a page that replays it or as the data of that page.

The page is one file without a network. It plays when it is opened: the slots of each row fill in, coloured by confidence; the
window that a forward recomputed is underlined; a bar a forward shows how many tokens it committed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..decoding.cache_policy import decoded_blocks
from ..decoding.config import GenerationConfig
from ..utils.checks import to_path
from ..utils.files import check_writable, naming, write_atomically
from .engine import LanguageModel
from .generation import Forward, Generation
from .outputs import GenerationOutput

#: Of the data; raised when a reader of the old one would go wrong.
FORMAT = 1


class Trace:
    """The callback of a generation that records it. :meth:`write` at its end, or after an interrupt, writes the file;
    :meth:`run` does both.

    The data, also ``TRACE`` in the page's script: ``format``, ``model``, ``options``; ``gen_length`` and ``block_length``;
    ``pieces``, the text of each token id that occurs; ``rows``, a ``prompt`` and the ``generated`` ids each (what has not been
    decoded is ``mask_id``), ``blocks``, the first slot of each block or sub-block, and ``fixed``, the slots that are not
    decoded: tokens that were given, and in an infilled text shorter than ``gen_length`` what is before its beginning; and
    ``forwards``, in order: ``refresh``, and for each row that it decoded ``row``, ``block``, ``window``, the slots
    ``[first, last)`` that it recomputed, counted from the first generated one (so those of the prompt are negative), and
    ``committed``, a list of ``[slot, confidence]``.

    Args:
        path: ends in ``.html`` for the page, in ``.json`` for the data.
        model: whose generation it is.
        prompts: token ids of each row.
        config: the options.
        answers: as of :class:`~fastdllm_triton.engine.Generation`.

    Raises:
        TypeError, ValueError, OSError: it is no path, or as :func:`check_target`; before any work.
    """

    def __init__(
        self,
        path: str | Path,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.path = to_path("trace", path)
        check_target("trace", self.path)
        self._model, self._prompts, self._config = model, [list(prompt) for prompt in prompts], config
        self._mask_id = model.config.mask_id if config.mask_id is None else config.mask_id
        self._answers = answers or [[self._mask_id] * config.gen_length for _ in prompts]
        self._forwards: list[dict[str, Any]] = []
        self._last: Forward | None = None

    def __call__(self, forward: Forward) -> None:
        """Records a forward."""
        first = forward.x.shape[1] - self._config.gen_length
        committed: dict[int, list[list[float]]] = {}
        for token in forward.committed:
            confidence = None if math.isnan(token.confidence) else round(token.confidence, 6)
            committed.setdefault(token.row, []).append([token.position, confidence])  # type: ignore[list-item]
        rows = [
            {
                "row": row,
                "block": block,
                "window": [max(start - first, -len(self._prompts[row])), end - first],
                "committed": committed.get(row, []),
            }
            for row, block, (start, end) in zip(forward.rows, forward.blocks, forward.windows, strict=True)
        ]
        self._forwards.append({"refresh": forward.refresh, "rows": rows})
        self._last = forward

    def run(self, generation: Generation, callback: Callable[[Forward], None] | None = None) -> GenerationOutput:
        """Runs a generation to its end, records it, and writes the file, also if something stops it.

        Args:
            generation: as it was made.
            callback: called after each forward.

        Raises:
            OSError: the file cannot be written. The output is its attribute ``output``.
            BaseException: as :func:`fastdllm_triton.engine.Generation.run`; with a note if the file could not be written either.
        """

        def both(forward: Forward) -> None:
            self(forward)
            if callback is not None:
                callback(forward)

        try:
            output = generation.run(both)
        except BaseException as error:
            try:
                self.write()
            except BaseException as failure:  # What stopped the generation is what to tell, with its output so far.
                error.add_note(f"{type(failure).__name__}: {failure}")
            raise
        try:
            self.write()
        except BaseException as failure:
            failure.output = output  # type: ignore[attr-defined]
            raise
        return output

    @property
    def data(self) -> dict[str, Any]:
        """What has been recorded so far."""
        config, model, mask = self._config, self._model, self._mask_id
        missing = [config.gen_length - len(answer) for answer in self._answers]
        fixed = [
            [*range(before), *(before + i for i, token in enumerate(answer) if token != mask)]
            for before, answer in zip(missing, self._answers, strict=True)
        ]
        if self._last is None:
            generated = [[mask] * before + list(answer) for before, answer in zip(missing, self._answers, strict=True)]
        else:
            generated = self._last.x[:, -config.gen_length :].tolist()
        ids = sorted({mask, *(token for row in (*self._prompts, *generated) for token in row)})
        return {
            "format": FORMAT,
            "model": repr(model),
            "options": _options(config),
            "gen_length": config.gen_length,
            "block_length": config.block_length,
            "mask_id": mask,
            "eos_ids": list(model.config.eos_ids if config.eos_ids is None else config.eos_ids),
            "pieces": {token: f"<{token}>" if model.tokenizer is None else str(model.tokenizer.decode([token])) for token in ids},
            "rows": [
                {"prompt": prompt, "generated": answer, "fixed": slots, "blocks": self._blocks(len(prompt))}
                for prompt, answer, slots in zip(self._prompts, generated, fixed, strict=True)
            ],
            "forwards": self._forwards,
        }

    def _blocks(self, prompt_length: int) -> list[int]:
        """The first slots of a row's blocks, counted from the first generated one: negative where one begins in the prompt."""
        config = self._config
        causal = config.block_length if self._model.config.block_causal else 0
        blocks = decoded_blocks(prompt_length, config.gen_length, config.decoded_length, causal)
        return [start - prompt_length for start, _ in blocks]

    def write(self) -> None:
        """Writes the file.

        Raises:
            OSError: ``trace: PATH cannot be written: REASON``.
        """
        data = json.dumps(self.data)
        with naming("trace", self.path):
            write_atomically(self.path, page(data) if self.path.suffix == ".html" else data + "\n")


def check_target(option: str, path: Path) -> None:
    """Raises before any work if a trace cannot be written there.

    Args:
        option: as the user typed it, ``--trace`` or ``trace``.
        path: its value.

    Raises:
        ValueError: it ends in neither ``.html`` nor ``.json``.
        OSError: as :func:`fastdllm_triton.utils.files.check_writable`.
    """
    if path.suffix not in (".html", ".json"):
        raise ValueError(f"{option} must end in .html or .json, got {str(path)!r}")
    check_writable(option, path)


def page(data: str) -> str:
    """The page that replays recorded data, JSON text."""
    template = resources.files(__package__).joinpath("trace.html").read_text(encoding="utf-8")
    # Nothing in a token's text may end the script that holds it.
    return template.replace("/* the recording */ null", data.replace("<", "\\u003c"))


def _options(config: GenerationConfig) -> dict[str, str]:
    """The options that differ from the defaults, and those that say what a generation was."""
    plain, shown = GenerationConfig(), ("gen_length", "block_length")
    changed = {name: value for name, value in vars(config).items() if name not in shown and value != getattr(plain, name)}
    return {name: str(value) for name, value in {"cache": config.cache, "strategy": config.strategy, **changed}.items()}
