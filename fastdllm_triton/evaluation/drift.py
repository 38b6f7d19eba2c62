"""How stale a cache gets: its keys and values against those of a fresh forward over everything, layer by layer.

Figure 3 of Fast-dLLM (arXiv 2505.22618) shows why reusing keys and values of one step in the next is nearly right: their
cosine similarity is close to one within a block. Here the same is measured for the cache as it is used, in every forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.config import GenerationConfig
from ..decoding.strategies import FixedSteps
from ..model import MaskedDiffusionLM
from .summary import Record, rounded

#: Parts of a sequence, seen from the block that is decoded: the prompt, the blocks before it, itself, the masks after it.
REGIONS = ("prompt", "before", "block", "after")


@torch.no_grad()
def drift(
    model: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Cosine similarity of cached keys and values with fresh ones, while each prompt is decoded.

    In every forward the cache that its attention read is compared with a forward of the whole sequence, as it was before the
    forward committed anything. Slots that are not attended (a dropped suffix) are not compared.

    Args:
        model: the model.
        prompts: token ids; decoded one at a time.
        config: the options.
        progress: called after each prompt.

    Returns:
        ``forwards``, how many there were ``i`` forwards after a refresh (0 is the refresh); ``k`` and ``v``, ``[i][layer]``,
        means over all attended slots and heads; ``regions``, for each of :data:`REGIONS` that occurs the same as ``k`` and
        ``v``, with None where there was no such slot.
    """
    layers = model.config.layers
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, len(REGIONS), layers, dtype=torch.float64))
    slots: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(REGIONS), dtype=torch.float64))
    forwards: dict[int, int] = defaultdict(int)
    for prompt in prompts:
        generation = model.stream([prompt], config)
        batch = generation.batch
        x, since = batch.x[:1].clone(), 0
        for forward in generation:
            since = 0 if forward.refresh else since + 1
            first, end = int(batch.cache.kv_start[0]), int(batch.cache.kv_end[0])
            start = int(batch.block_start[0])
            if forward.refresh:  # A store ends before the block that its row begins.
                end = min(end, first + forward.windows[0][1])
            fresh = _fresh(model, x, first, config)
            # A block-causal model's block may begin in the prompt.
            cuts = (first, first + len(prompt), start, start + config.decoded_length, end)
            bounds = [min(cut, end) for cut in accumulate(cuts, max)]
            cached = (batch.cache.k[:, 0, :, first:end], batch.cache.v[:, 0, :, first:end])
            pairs = zip(cached, (tensor[:, :, : end - first] for tensor in fresh), strict=True)
            # Over the head dimension, then the mean over heads: [2, layers, slots].
            alike = torch.stack([F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1) for a, b in pairs])
            for region in range(len(REGIONS)):
                part = alike[:, :, bounds[region] - first : bounds[region + 1] - first].cpu()
                sums[since][:, region] += part.sum(-1)
                slots[since][region] += part.shape[-1]
            forwards[since] += 1
            x = batch.x[:1].clone()
        progress()
    order = range(max(forwards) + 1)
    whole = torch.stack([sums[i].sum(1) / slots[i].sum() for i in order])  # [i, 2, layers]
    parts = torch.stack([sums[i] / slots[i][None, :, None] for i in order])  # [i, 2, regions, layers]
    return {
        "forwards": [forwards[i] for i in order],
        "k": rounded(whole[:, 0].numpy()),
        "v": rounded(whole[:, 1].numpy()),
        "regions": {
            name: {"k": rounded(parts[:, 0, r].numpy()), "v": rounded(parts[:, 1, r].numpy())}
            for r, name in enumerate(REGIONS)
            if any(slots[i][r] for i in order)
        },
    }


@torch.no_grad()
def similarity(model: MaskedDiffusionLM, prompt: Sequence[int], config: GenerationConfig, block: int) -> Record:
    """The paper's figure 3: keys and values of each forward of a block against those of each other one, without a cache.

    One token a forward. Layers are at most four, spread over the depth, and averaged.

    Args:
        model: the model.
        prompt: token ids.
        config: the lengths.
        block: which block.

    Raises:
        ValueError: the model is block-causal: what is before a block does not depend on it.

    Returns:
        ``block``, ``layers``, and for ``prompt`` and ``last``, the last block, ``k`` and ``v``: ``[forwards][forwards]``.
    """
    if model.config.block_causal:
        raise ValueError(f"model: keys and values before a block do not depend on it in {model.config.architecture}")
    chosen = sorted({round(i * (model.config.layers - 1) / 3) for i in range(4)})
    length, size = config.gen_length, config.block_length
    plain = GenerationConfig(
        gen_length=length, block_length=size, cache="none", strategy=FixedSteps(length), mask_id=config.mask_id, stop_at_eos=False
    )
    generation = model.stream([prompt], plain)
    cache = generation.batch.cache
    parts = {"prompt": slice(len(prompt)), "last": slice(-size, None)}
    vectors: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for forward in generation:
        if forward.blocks[0] > block:
            break
        if forward.blocks[0] == block:
            for kind, tensor in (("k", cache.k), ("v", cache.v)):
                unit = F.normalize(tensor[chosen, 0, :, -len(prompt) - length :].float(), dim=-1)  # [layers, H, slots, D]
                for part, slots in parts.items():
                    vectors[part, kind].append(unit[:, :, slots].to("cpu", model.dtype))
    record: Record = {"block": block, "layers": chosen, "prompt": {}, "last": {}}
    for (part, kind), units in vectors.items():
        flat = torch.stack(units).flatten(1).float()  # [forwards, layers * H * slots * D]
        record[part][kind] = rounded((flat @ flat.T / units[0][..., 0].numel()).double().numpy())
    return record


def _fresh(model: MaskedDiffusionLM, x: Tensor, first: int, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Keys and values, ``[layers, H, slots, D]`` from the first slot on, of a forward over everything."""
    start = torch.zeros(1, dtype=torch.int32, device=x.device)
    ids = x[:, first:]
    cache = model.network.new_cache(start, ids.shape[1])
    model.network.forward(ids, start, cache, block_length=config.block_length if model.config.block_causal else None)
    return cache.k[:, 0], cache.v[:, 0]
