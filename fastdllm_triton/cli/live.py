"""Shows a generation in the terminal while it happens: masks fill in, block by block."""

from __future__ import annotations

from itertools import groupby
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..engine.generation import Forward
from ..model import MaskedDiffusionLM
from .console import can_show, visible


class TokenRenderer:
    """Turns the slots of a generation into text.

    Attributes:
        mask, end: the signs of a masked slot and of an end token.

    Args:
        model: decodes the tokens.
        mask_id: the token of a masked slot.
        encoding: of the terminal; where it lacks the signs, ASCII takes their place.
    """

    def __init__(self, model: MaskedDiffusionLM, mask_id: int, encoding: str = "utf-8") -> None:
        self._tokenizer, self._end_ids, self._mask_id = model.tokenizer, model.config.eos_ids, mask_id
        self.mask, self.end = ("░", "¶") if can_show("░¶", encoding) else ("_", "|")

    def render(self, ids: list[int], fresh: list[bool] | None = None, underlined: range = range(0)) -> Text:
        """Committed tokens as they read, masked slots as shades, end tokens as a sign that takes little room.

        Args:
            ids: the slots.
            fresh: which of them stand out.
            underlined: the block.
        """
        slots = zip(ids, fresh or [False] * len(ids), range(len(ids)), strict=True)
        styled = [(token, self._style(token, new, i in underlined)) for token, new, i in slots]
        text = Text()
        # Tokens of one style are decoded together: a character may be spread over several.
        for (style, sign), run in groupby(styled, key=lambda slot: (slot[1], self._sign(slot[0]))):
            tokens = [token for token, _ in run]
            text.append(self._text(tokens) if sign is None else sign * len(tokens), style=style or None)
        return text

    def _style(self, token: int, fresh: bool, underlined: bool) -> str:
        kind = "dim" if token == self._mask_id else "bold green" if fresh else ""
        return f"{kind} underline".strip() if underlined else kind

    def _sign(self, token: int) -> str | None:
        return self.mask if token == self._mask_id else self.end if token in self._end_ids else None

    def _text(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return "".join(f"<{token}>" for token in tokens)
        return visible(str(self._tokenizer.decode(tokens)))


class LiveView:
    """A context manager whose instance is the callback of a generation: one panel per row.

    Args:
        model: decodes the tokens.
        gen_length: how many of the last slots are the generation.
        console: where to draw.
        transient: leave nothing behind.
    """

    def __init__(self, model: MaskedDiffusionLM, gen_length: int, console: Console, *, transient: bool = False) -> None:
        self._model, self._gen_length, self._console = model, gen_length, console
        self._live = Live(console=console, auto_refresh=False, transient=transient)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, forward: Forward) -> None:
        self._live.update(self.render(forward), refresh=True)

    def render(self, forward: Forward) -> RenderableType:
        """What this forward committed stands out, what is still masked is shaded, the block is underlined."""
        head, rows = self.rows(forward)
        return Group(head, *(Panel(text, title=f"row {i}", title_align="left") for i, text in enumerate(rows)))

    def rows(self, forward: Forward) -> tuple[Text, list[Text]]:
        """A line on how far the generation is, and the slots of each row."""
        renderer = TokenRenderer(self._model, forward.mask_id, self._console.encoding)
        spans = dict(zip(forward.rows, forward.spans, strict=True))
        ids = forward.x[:, -self._gen_length :].tolist()
        fresh = (forward.step_map[:, -self._gen_length :] == forward.index).tolist()
        rows, shown = [], self.shown(forward)
        for row, (tokens, new) in enumerate(zip(ids, fresh, strict=True)):
            rows.append(renderer.render(tokens[:shown], new[:shown], range(*spans.get(row, (0, 0)))))
        left = sum(tokens.count(forward.mask_id) for tokens in ids)
        numbers = sorted({block + 1 for block in forward.blocks})
        standing = f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        kind = "refresh" if forward.refresh else "step"
        return Text(f"forward {forward.index + 1} ({kind})   {standing}   {left} masks left", style="cyan"), rows

    def shown(self, forward: Forward) -> int:
        """How many slots are drawn: all of them."""
        return self._gen_length


class AnswerView(LiveView):
    """One row without a frame, up to the end of its block; the last lines of it, if it is higher than the terminal."""

    def render(self, forward: Forward) -> RenderableType:
        head, (text,) = self.rows(forward)
        lines = text.wrap(self._console, self._console.width)
        return Group(head, *lines[-max(self._console.height - 2, 1) :])

    def shown(self, forward: Forward) -> int:
        """The finished blocks and the one that is being decoded."""
        return min(max(last for _, last in forward.spans), self._gen_length)
