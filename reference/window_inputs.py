"""What a forward needs to know before its first layer: which tokens it recomputes, and which rows of them predict what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import WindowInputs


def window_inputs(
    x: Tensor,
    base: Tensor,
    block_start: Tensor,
    remaining: Tensor,
    kv_start: Tensor,
    *,
    back: int = 0,
    window: int,
    block: int,
    predicted: int,
    shift: bool = False,
    mask_id: int,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> WindowInputs:
    """Tokens of each row's window, and where the masked slots of its block are predicted.

    The masked slots of all blocks are packed into one list of ``P``. Each row has as many places as it has masked slots left by
    ``remaining`` (``N`` at most), in the order of rows and slots; places that no slot takes hold -1. A slot beyond its row's
    places or the list's end has none.

    Args:
        x: ``[B, L]`` int64, the sequences.
        base: ``[B]`` int32, or one for all: a window begins at ``max(base - back, 0)``; that of a row with nothing left begins
            at ``L``, so that nothing of it is written.
        block_start: ``[B]`` int32, first slot of each row's block.
        remaining: ``[B]`` int32, masked slots left in the block, or more.
        kv_start: ``[B]`` int32, the slot of position 0.
        back: slots by which a window begins ahead of ``base``.
        window: ``W``, slots of a window.
        block: ``N``, slots of a block; they lie in the window.
        predicted: ``P``.
        shift: whether the hidden state of the slot before a token predicts it; that of position 0 is predicted by its own.
        mask_id: the token of a masked slot.
        seed: ``[B]`` int64; with it and ``step`` the keys of the noise are packed as well.
        step: ``[B]`` int32.

    Returns:
        :class:`WindowInputs`.
    """
    rows, slots = x.shape
    start = torch.where(remaining == 0, slots, (base - back).clamp(min=0)).int()
    at = start[:, None].long() + torch.arange(window, device=x.device)
    ids = x.gather(1, at.clamp(max=slots - 1))

    slot = block_start[:, None].long() + torch.arange(block, device=x.device)  # [B, N]
    masked = x.gather(1, slot.clamp(max=slots - 1)) == mask_id
    places = remaining.clamp(0, block).long()
    rank = masked.long().cumsum(1) - 1
    place = (places.cumsum(0) - places)[:, None] + rank
    taken = masked & (rank < places[:, None]) & (place < predicted)
    source = torch.maximum(slot - 1, kv_start[:, None]) if shift else slot
    source = (source - start[:, None]).clamp(0, window - 1) + window * torch.arange(rows, device=x.device)[:, None]

    def packed(values: Tensor, empty: int) -> Tensor:
        return values.new_full((predicted,), empty).index_copy(0, place[taken], values.expand(rows, block)[taken])

    keys: tuple[Tensor, ...] = ()
    if seed is not None and step is not None:
        keys = (packed(seed[:, None], 0), packed(slot - kv_start[:, None], 0), packed(step[:, None].long(), 0))
    return WindowInputs(
        ids=ids,
        start=start,
        rows=packed(source, -1),
        place=torch.where(taken, place, -1).int(),
        keys=torch.stack(keys) if keys else slot.new_empty((3, 0)),
        batch_row=packed(torch.arange(rows, device=x.device)[:, None], 0),
    )
