"""The training scripts: they train the architectures that the runtime runs, on what its caches will show them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdllm_triton as fdt
from fastdllm_triton.models.llada import NAMES
from fastdllm_triton.tiny.problems import is_test_prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import _common as common
import train_tiny
import train_tiny_block

MASK = 1
SMALL = common.Recipe(width=64, layers=2, mlp=128, heads=2, kv_heads=2, steps=80, batch=32, warmup=20, lr=2.5e-3, muon_lr=5e-3)
GROUPED = replace(SMALL, heads=4, kv_heads=2, head_norms=True, eps=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, common.Transformer, list[float]]:
    out = tmp_path_factory.mktemp("trained")

    def save(state: dict[str, Tensor]) -> None:
        common.write(out, train_tiny.config(SMALL), NAMES, state, SMALL)

    model, losses = common.train(SMALL, train_tiny.loss_of, compiled=False, save=save)
    return out, model, losses


@dataclass
class Seen:
    """What a loss asked the model."""

    x: Tensor
    position: Tensor
    seen: Tensor | None


def ask(loss_of: common.Loss, ids: Tensor, prompt: int, seed: int, model: Callable[[Seen], Tensor]) -> tuple[float, Seen]:
    """The loss, and what it asked."""
    asked: list[Seen] = []

    def logits(x: Tensor, position: Tensor, seen: Tensor | None) -> Tensor:
        asked.append(Seen(x, position, seen))
        return model(asked[-1])

    loss = loss_of(logits, ids, prompt, MASK, torch.Generator().manual_seed(seed))
    (only,) = asked
    return loss.item(), only


def uniform(asked: Seen) -> Tensor:
    return torch.zeros(*asked.x.shape, 137)


def test_the_loss_falls(trained: tuple[Path, common.Transformer, list[float]]) -> None:
    losses = trained[2]
    assert len(losses) == 80
    assert sum(losses[:10]) / 10 > 3
    assert sum(losses[-10:]) / 10 < 2


def test_the_loss_of_the_block_diffusion_model_falls() -> None:
    _, losses = common.train(GROUPED, train_tiny_block.loss_of, compiled=False)
    assert sum(losses[:10]) / 10 > 3
    assert sum(losses[-10:]) / 10 < 2


def test_the_runtime_computes_what_was_trained(trained: tuple[Path, common.Transformer, list[float]]) -> None:
    out, model, _ = trained
    lm = fdt.load(out, device="cpu")
    ids = torch.randint(0, lm.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, *common.angles(torch.arange(20).expand(3, 20), SMALL))
    torch.testing.assert_close(lm.logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_a_checkpoint_also_in_the_other_architecture(
    trained: tuple[Path, common.Transformer, list[float]],
) -> None:
    out, model, losses = trained
    start = common.read(out, NAMES, SMALL)
    state = model.state_dict()
    assert start.keys() == state.keys() and all(torch.equal(start[name], state[name]) for name in start)
    _, more = common.train(replace(SMALL, steps=1), train_tiny.plain_loss, compiled=False, start=start)
    assert more[0] < 1.5 < losses[0]
    r = replace(SMALL, head_norms=True, steps=10)
    model, more = common.train(r, train_tiny_block.loss_of, compiled=False, start=common.read(out, NAMES, r))
    assert more[-1] < 2.5
    assert model.layers[0].q_norm.ne(1).any()


def test_a_block_is_trained_on_what_the_dual_cache_shows_it(trained: tuple[Path, common.Transformer, list[float]]) -> None:
    out, model, _ = trained
    network = fdt.load(out, device="cpu").network
    ids, prompt = next(common.batches(SMALL))
    total = ids.shape[1]
    sizes = set()
    with torch.no_grad():
        _, asked = ask(
            train_tiny.cached_loss,
            ids,
            prompt,
            0,
            lambda asked: model(asked.x, *common.angles(asked.position, SMALL), asked.seen),
        )
        expected = model(asked.x, *common.angles(asked.position, SMALL), asked.seen)
        for row in range(len(ids)):
            stale, slots = asked.x[row, :total], asked.position[row, total:]
            first, last = int(slots.min()), int(slots.max()) + 1
            sizes.add(last - first)
            # The refresh: what is done, then masks.
            assert torch.equal(stale[:first], ids[row, :first]) and (stale[first:] == MASK).all()
            assert (first - prompt) % (last - first) == 0 and last <= total
            zero = torch.zeros(1, dtype=torch.int32)
            cache = network.new_cache(zero, total)
            for copy in range(total, total + 48, last - first):
                network.forward(stale[None], zero, cache)
                hidden = network.forward(asked.x[row, None, copy : copy + last - first], zero + first, cache)
                step = network.final_norm(hidden) @ network.head.T
                torch.testing.assert_close(step[0], expected[row, copy : copy + last - first], rtol=1e-4, atol=1e-4)
    assert sizes == {8, 16, 24, 48}


def test_a_noised_block_sees_itself_and_the_finished_blocks_before_it() -> None:
    torch.manual_seed(0)
    model = common.Transformer(GROUPED, 137)
    ids, prompt = next(common.batches(GROUPED))
    size, first = train_tiny_block.BLOCK, prompt // train_tiny_block.BLOCK * train_tiny_block.BLOCK

    def run(asked: Seen) -> Tensor:
        return model(asked.x, *common.angles(asked.position, GROUPED), asked.seen)

    with torch.no_grad():
        _, asked = ask(train_tiny_block.loss_of, ids, prompt, 0, run)
        total = asked.x.shape[1] - (asked.x.shape[1] - first) // 2
        clean, expected = asked.x[:, :total], run(asked)
        assert torch.equal(clean[:, : ids.shape[1]], ids) and total % size == 0
        assert torch.equal(asked.x[:, total : total + prompt - first], ids[:, first:prompt])
        block = torch.arange(total) // size
        causal = (block[None] <= block[:, None])[None]
        for start in range(first, total, size):
            # What decoding computes: the finished blocks, then this one, each block seeing those up to its own.
            noised = asked.x[:, total + start - first :][:, :size]
            x = torch.cat((clean[:, :start], noised), dim=1)
            seen = causal[:, : start + size, : start + size].expand(len(x), -1, -1)
            decoded = run(Seen(x, torch.arange(start + size).expand(len(x), -1), seen))[:, start:]
            torch.testing.assert_close(decoded, expected[:, total + start - first :][:, :size], rtol=1e-4, atol=1e-4)


def test_batches_hold_training_problems_only() -> None:
    tokenizer = common.build_tokenizer()
    stream = common.batches(SMALL)
    for _ in range(4):
        ids, prompt = next(stream)
        assert ids.shape == (32, prompt + 48)
        for row in ids.tolist():
            text = tokenizer.decode(row[:prompt])
            assert text.endswith("How many?") and not is_test_prompt(text)
            assert row[-1] == tokenizer.eos_token_id


def test_the_prompt_is_never_masked() -> None:
    ids, prompt = next(common.batches(SMALL))
    for seed in range(20):
        _, asked = ask(train_tiny.plain_loss, ids, prompt, seed, uniform)
        assert torch.equal(asked.x[:, :prompt], ids[:, :prompt])


@pytest.mark.parametrize("loss_of", [train_tiny.plain_loss, train_tiny.cached_loss, train_tiny_block.loss_of])
def test_the_losses_count_masked_tokens_only_and_are_unbiased(loss_of: common.Loss) -> None:
    ids, prompt = next(common.batches(SMALL))

    def known_but_masked(asked: Seen) -> Tensor:
        """Certain of every token that it sees to be another; uniform where it sees a mask."""
        wrong = torch.nn.functional.one_hot((asked.x + 1) % 137, 137) * 1e4
        return wrong * (asked.x != MASK)[..., None]

    # Every masked token costs log(137), and the weights 1/t give each token of the answer one on average.
    losses = [ask(loss_of, ids, prompt, seed, known_but_masked)[0] for seed in range(300)]
    assert sum(losses) / len(losses) == pytest.approx(math.log(137), rel=0.05)
