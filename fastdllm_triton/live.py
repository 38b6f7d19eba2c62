"""Shows a generation in the terminal while it happens: masks fill in, block by block."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from .engine import Forward
from .model import MaskedDiffusionLM

_MASK = "░"


class LiveView:
    """A context manager whose instance is the callback of a generation.

    Args:
        model: decodes the tokens.
        gen_length: how many of the last slots are the generation.
        block_length: slots of a block.
        console: where to draw.
    """

    def __init__(self, model: MaskedDiffusionLM, gen_length: int, block_length: int, console: Console) -> None:
        self._model, self._gen_length, self._block_length = model, gen_length, block_length
        self._live = Live(console=console, refresh_per_second=20)
        self._words: dict[int, str] = {}

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, forward: Forward) -> None:
        """Draws the state after a forward."""
        self._live.update(self.render(forward))
        self._live.refresh()

    def render(self, forward: Forward) -> Group:
        """One panel a row: what this forward committed stands out, what is still masked is shaded, the block is underlined."""
        kind = "refresh" if forward.refresh else "step"
        panels = []
        ids = forward.x[:, -self._gen_length :].tolist()
        when = forward.step_map[:, -self._gen_length :].tolist()
        blocks = dict(zip(forward.rows, forward.blocks, strict=True))
        for row, (tokens, steps) in enumerate(zip(ids, when, strict=True)):
            text = Text()
            for i, (token, step) in enumerate(zip(tokens, steps, strict=True)):
                masked = token == forward.mask_id
                style = "dim" if masked else "bold green" if step == forward.index else ""
                if i // self._block_length == blocks.get(row):
                    style += " underline"
                text.append(_MASK if masked else self._word(token), style=style.strip() or None)
            panels.append(Panel(text, title=f"row {row}", title_align="left"))
        left = sum(tokens.count(forward.mask_id) for tokens in ids)
        numbers = sorted({block + 1 for block in forward.blocks})
        standing = f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        head = Text(f"forward {forward.index + 1} ({kind})   {standing}   {left} masks left", style="cyan")
        return Group(head, *panels)

    def _word(self, token: int) -> str:
        """A token as text; end tokens as a sign that takes little room."""
        if token not in self._words:
            tokenizer = self._model.tokenizer
            if token in self._model.config.eos_ids:
                self._words[token] = "¶"
            else:
                self._words[token] = f"<{token}>" if tokenizer is None else str(tokenizer.decode([token]))
        return self._words[token]
