"""Monte-Carlo likelihoods of a masked-diffusion model, against enumeration; and finished requests on disk."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

import fastdllm_triton as fdt
from fastdllm_triton.evaluation.finished import Finished
from fastdllm_triton.evaluation.likelihood import MonteCarlo, sample_masks

CONTEXT, PAIR, TRIPLE = [5, 9, 3, 11], [7, 20], [7, 20, 31]


def _log_softmax(
    lm: fdt.MaskedDiffusionLM, tokens: list[int], masked: list[int], cfg: float = 0.0, start: int = 4
) -> torch.Tensor:
    """Log-probabilities of the true tokens at the masked places, by one plain forward."""
    x = torch.tensor([tokens])
    x[0, masked] = lm.config.mask_id
    logits = lm.logits(x)[0].double()
    if cfg:
        x[0, :4] = lm.config.mask_id
        without = lm.logits(x)[0].double()
        logits = without + (1 + cfg) * (logits - without)
    places = torch.tensor(masked)
    return logits.log_softmax(-1)[places, torch.tensor(tokens)[places]]


@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_one_token_is_the_plain_log_softmax(llada: fdt.MaskedDiffusionLM, cfg: float) -> None:
    expected = float(_log_softmax(llada, [*CONTEXT, 7], [4], cfg))
    assert MonteCarlo(mc_num=128, cfg=cfg).log_likelihood(llada, CONTEXT, [7]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("continuation", "cfg"), [(PAIR, 0.0), (TRIPLE, 0.0), (TRIPLE, 0.5)])
def test_the_estimate_is_the_mean_over_all_masks(llada: fdt.MaskedDiffusionLM, continuation: list[int], cfg: float) -> None:
    n, tokens = len(continuation), [*CONTEXT, *continuation]
    means, squares = [], []
    for masked in range(1, n + 1):
        sets = list(combinations(range(4, 4 + n), masked))
        values = torch.stack([_log_softmax(llada, tokens, list(places), cfg).sum() * n / masked for places in sets])
        means.append(values.mean())
        squares.append((values**2).mean())
    exact = float(torch.stack(means).mean())
    spread = float((torch.stack(squares).mean() - exact**2).sqrt())
    estimate = MonteCarlo(mc_num=1024, mc_batch=64, cfg=cfg).log_likelihood(llada, CONTEXT, continuation)
    assert estimate == pytest.approx(exact, abs=4 * spread / 1024**0.5)
    # Not only within the noise of what it should be, but nearer than any neighbouring formula would be.
    assert abs(estimate - exact) < 0.1 * abs(estimate - exact * n)


def test_masks_are_spread_evenly_and_every_token_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(5)
    for _ in range(400):
        masked, share = sample_masks(10, 5, generator)
        assert torch.equal(share, masked.sum(1).double() / 5)
        row = masked.sum(1).bincount(minlength=6)
        assert row[0] == 0
        assert row[1:].tolist() == [2] * 5  # Ten rows, five sizes: as many of each in every batch.
        tokens += masked.sum(0)
    assert (tokens / 4000).tolist() == pytest.approx([0.6] * 5, abs=0.02)  # (1 + ... + 5) / 5 / 5


@pytest.mark.parametrize(("batch", "n"), [(4, 3), (3, 8), (8, 12), (5, 1)])
def test_every_number_of_masks_is_as_likely_in_every_row(batch: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([sample_masks(batch, n, generator)[0].sum(1) for _ in range(3000)])
    for row in range(batch):
        share = counts[:, row].bincount(minlength=n + 1)[1:] / 3000
        assert share.tolist() == pytest.approx([1 / n] * n, abs=4.5 * (1 / n / 3000) ** 0.5)


def test_an_estimate_depends_on_its_tokens_and_seed_alone(llada: fdt.MaskedDiffusionLM) -> None:
    estimate = MonteCarlo(mc_num=8, mc_batch=8)
    first = estimate.log_likelihood(llada, CONTEXT, TRIPLE)
    torch.manual_seed(1)
    estimate.log_likelihood(llada, CONTEXT, PAIR)
    assert estimate.log_likelihood(llada, CONTEXT, TRIPLE) == first
    assert MonteCarlo(mc_num=8, mc_batch=8, seed=1).log_likelihood(llada, CONTEXT, TRIPLE) != first


def test_greedy_is_what_one_token_a_forward_decodes(llada: fdt.MaskedDiffusionLM) -> None:
    lengths = {"gen_length": 6, "block_length": 6, "cache": "none", "stop_at_eos": False}
    decoded = llada.generate([CONTEXT], strategy=fdt.FixedSteps(6), **lengths).generated[0].tolist()
    estimate = MonteCarlo()
    assert estimate.is_greedy(llada, CONTEXT, decoded)
    assert not estimate.is_greedy(llada, CONTEXT, [*decoded[:-1], decoded[-1] ^ 1])


def test_the_built_in_model_finds_the_right_answer_likelier(tiny: fdt.MaskedDiffusionLM) -> None:
    context = tiny.encode("Tom has 51 coins. Tom finds 27. Tom sells 19. How many?")
    right, wrong = (tiny.encode(f" Tom now has 51+27=78. That makes it 78-19=59. #### {n}") for n in (59, 42))
    estimate = MonteCarlo(mc_num=32)
    assert estimate.log_likelihood(tiny, context, right) > estimate.log_likelihood(tiny, context, wrong) + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mc_num": 0}, "mc_num must be an integer of 1 or more, got 0"),
        ({"mc_num": 10, "mc_batch": 4}, "mc_num must be a multiple of mc_batch = 4, got 10"),
        ({"cfg": -1.0}, "cfg must be 0 or more, got -1.0"),
    ],
)
def test_bad_parameters(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        MonteCarlo(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_bad_continuations(llada: fdt.MaskedDiffusionLM) -> None:
    for continuation, message in (
        ([], "at least one token"),
        ([llada.config.mask_id], "must not hold the mask"),
        ([1] * llada.config.max_length, "tokens, the model takes"),
    ):
        with pytest.raises(ValueError, match=message):
            MonteCarlo().log_likelihood(llada, CONTEXT, continuation)


def test_finished_requests_survive_and_a_cut_off_line_does_not_hurt(tmp_path: Path) -> None:
    store = Finished(tmp_path, ["model"])
    key = store.key("a", 1)
    store.add({key: {"text": "ü\n"}})
    with (tmp_path / "finished.jsonl").open("a") as file:
        file.write('{"key": "half')
    with pytest.raises(BlockingIOError, match=f"save_dir: another run is writing to {tmp_path}"):
        Finished(tmp_path, ["model"])
    del store  # The folder was its own as long as it lived.
    again = Finished(tmp_path, ["model"])
    assert again[key] == {"text": "ü\n"}
    other = again.key("a", 2)
    assert other not in again
    again.add({other: {"text": "b"}})
    del again
    assert Finished(tmp_path, ["model"]).entries == {key: {"text": "ü\n"}, other: {"text": "b"}}
    another = Finished(tmp_path, ["another model"])
    assert another.key("a", 1) not in another


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "finished.jsonl").write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"finished.jsonl, line 2, is not a finished request"):
        Finished(tmp_path, [])
