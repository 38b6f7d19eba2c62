"""The model class of lm-evaluation-harness: ``--model fastdllm``.

The harness finds a model class once its module is imported, and imports none but its own. So the command line goes through

    fastdllm-triton lm-eval --model fastdllm --model_args pretrained=PATH,cache=dual,threshold=0.9 --tasks gsm8k

which imports this module and hands everything over to ``lm_eval``; in Python, importing it before ``lm_eval.simple_evaluate`` is
all it takes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..decoding.config import GenerationConfig
from ..decoding.options import changed
from ..decoding.strategies import STRATEGIES
from ..loading import load
from ..models.tokenizer import apply_template
from .finished import Finished
from .likelihood import MonteCarlo
from .runner import checkpoint_digest, row_figures

log = logging.getLogger(__name__)


@register_model("fastdllm")
class FastDLLM(TemplateLM):  # type: ignore[misc]
    """Fast-dLLM decoding and Monte-Carlo likelihoods for the harness.

    Args:
        pretrained: a checkpoint folder, a hub id, or ``tiny``.
        cache: ``none``, ``prefix``, ``dual`` or ``block_causal``; the model's default if not given.
        gen_length: tokens to generate; without it a task's ``max_gen_toks``, rounded up to whole blocks.
        block_length: slots of a block; the checkpoint's default, or 32.
        temperature: without it a task's, where it asks for samples; else 0.
        seed: request ``i`` draws with ``seed + i``.
        batch_size: requests decoded together; of any lengths.
        mc_num, mc_batch, cfg: of the likelihood, see :class:`~fastdllm_triton.evaluation.likelihood.MonteCarlo`.
        is_check_greedy: also say whether a continuation is what greedy decoding gives (a forward a token). Few tasks ask.
        save_dir: keep each finished request in this folder; the same run goes on from there.
        device, dtype, backend, threads: as :func:`fastdllm_triton.load`.
        options: ``strategy``, as in ``strategy=fixed:4``, or a strategy's parameter, as in ``threshold=0.9`` (the default), with
            ``score``, what ranks the tokens; and other fields of :class:`~fastdllm_triton.GenerationConfig`, such as
            ``refresh_every``.

    Raises:
        ValueError: an argument is not valid.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        cache: str | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        mc_num: int = 128,
        mc_batch: int | None = None,
        cfg: float = 0.0,
        is_check_greedy: bool = False,
        save_dir: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str = "auto",
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer of 1 or more, got {batch_size!r}")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            log.warning("torch sees no GPU: %s, which the harness asks for by default, becomes cpu", device)
            device = "cpu"
        self.lm = load(pretrained, device=device, dtype=None if dtype == "auto" else dtype, backend=backend, threads=threads)
        if self.lm.tokenizer is None:
            raise ValueError(f"pretrained: {pretrained} has no tokenizer files")
        self.tokenizer = self.lm.tokenizer
        self.batch_size, self.gen_length, self.temperature, self.seed = int(batch_size), gen_length, temperature, seed
        names = ("strategy", "score", *(kind.option for kind in STRATEGIES.values()))
        strategy = {name: options.pop(name) for name in names if name in options}
        self.strategy = {name: value for name, value in strategy.items() if value not in (None, "")}
        try:
            block = self.lm.defaults.block_length if block_length is None else block_length
            given = {} if cache is None else {"cache": cache}
            self.options: dict[str, Any] = {"block_length": block, **given, **options}
            self._config(gen_length or block, 0.0).check_fits(self.lm.config)
        except TypeError as error:
            raise ValueError(f"model_args: {error}") from None
        self.monte_carlo = MonteCarlo(mc_num, min(mc_num, 32) if mc_batch is None else mc_batch, cfg, seed)
        self.monte_carlo.check_fits(self.lm.config)
        self.is_check_greedy = is_check_greedy
        identity = [checkpoint_digest(self.lm.folder), str(self.lm.dtype), self.lm.network.ops.name]
        self.finished = Finished(None if save_dir is None else Path(save_dir), identity)
        self.totals = dict.fromkeys(("requests", "tokens", "answer_tokens", "forwards", "seconds"), 0.0)

    def _config(self, gen_length: int, temperature: float) -> GenerationConfig:
        options = {"gen_length": gen_length, "temperature": temperature, **self.options, **self.strategy}
        return changed(self.lm.defaults, options)

    # What the harness asks of a tokenizer.

    @property
    def eot_token_id(self) -> int:
        return int(self.lm.config.eos_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context: the token that texts begin with, or the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return int(self.lm.config.max_length)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness caches prepared requests."""
        return str(self.lm.folder.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are not added twice to text that a chat template has made."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the checkpoint was trained on."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"--apply_chat_template: the tokenizer of {self.lm.folder} has no chat template")
        return apply_template(self.tokenizer, self.lm.folder, chat_history, add_generation_prompt)

    # Requests.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates, and cuts each text at the first of its own stop strings."""
        jobs = [self._job(index, *request.args) for index, request in enumerate(requests)]
        seen: Counter[str] = Counter()
        for job in jobs:  # A request that is asked for twice is answered twice.
            text = json.dumps(job.identity)
            job.key = self.finished.key("generate", text, seen[text])
            seen[text] += 1
        waiting = [job for job in jobs if job.key not in self.finished]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="generate_until", disable=disable_tqdm)
        for batch in _batches(waiting, self.batch_size):
            self._generate(batch)
            bar.update(len(batch))
        bar.close()
        texts = []
        for request, job in zip(requests, jobs, strict=True):
            entry = self.finished[job.key]
            self.totals["requests"] += 1
            for name in ("tokens", "answer_tokens", "forwards", "seconds"):
                self.totals[name] += entry[name]
            texts.append(cut(entry["text"], job.until))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        log.info("fastdllm: %s", json.dumps(self.get_model_info()["fastdllm"]))
        return texts

    def _job(self, index: int, context: str, wishes: dict[str, Any]) -> _Job:
        wishes = dict(wishes)
        until = wishes.get("until") or []
        if isinstance(until, str):
            until = [until]
        block = self.options["block_length"]
        length = self.gen_length
        if length is None:
            asked = int(wishes.get("max_gen_toks") or wishes.get("max_new_tokens") or 256)
            length = -(-asked // block) * block
        temperature = self.temperature
        if temperature is None:
            temperature = float(wishes.get("temperature") or 0.0) if wishes.get("do_sample") else 0.0
        tokens = self.tok_encode(context)
        room = self.max_length - length
        if room < 1:
            raise ValueError(f"gen_length must leave room for a prompt: {length} of the {self.max_length} tokens the model takes")
        if len(tokens) > room:
            log.warning("request %d has %d tokens; with gen_length = %d the last %d are kept", index, len(tokens), length, room)
            tokens = tokens[-room:]
        return _Job(tokens, until, self._config(length, temperature), self.seed + index)

    def _generate(self, batch: Sequence[_Job]) -> None:
        config = batch[0].config
        output = self.lm.generate([job.tokens for job in batch], config, seed=[job.seed for job in batch])
        rows = ({**row_figures(output, row), "answer_tokens": len(output.ids(row))} for row in range(len(batch)))
        self.finished.add({job.key: figures for job, figures in zip(batch, rows, strict=True)})

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for texts, context, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            value = self._score(context[-(self.max_length - len(continuation)) :] if context else [], continuation)
            results.append(value)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, value)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's length."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        key = self.finished.key("likelihood", vars(self.monte_carlo), self.is_check_greedy, context, continuation)
        if key not in self.finished:
            value = self.monte_carlo.log_likelihood(self.lm, context, continuation)
            greedy = self.is_check_greedy and self.monte_carlo.is_greedy(self.lm, context, continuation)
            self.finished.add({key: {"log_likelihood": value, "is_greedy": greedy}})
        entry = self.finished[key]
        return entry["log_likelihood"], entry["is_greedy"]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to ``config`` in its results: speed beside accuracy.

        ``tokens`` are those that forwards committed, ``answer_tokens`` those before the end token, which is what the paper
        divides by the time; ``nfe`` is forwards a request.
        """
        totals = {name: round(value, 6) for name, value in self.totals.items()}
        if not totals["requests"]:
            return {"fastdllm": totals}
        rates = {
            "nfe": totals["forwards"] / totals["requests"],
            "tokens_per_forward": totals["tokens"] / max(totals["forwards"], 1),
            "tokens_per_second": totals["tokens"] / max(totals["seconds"], 1e-9),
            "answer_tokens_per_second": totals["answer_tokens"] / max(totals["seconds"], 1e-9),
        }
        return {"fastdllm": totals | {name: round(value, 6) for name, value in rates.items()}}


@dataclass
class _Job:
    """A request ready to be decoded."""

    tokens: list[int]
    until: list[str]
    config: GenerationConfig
    seed: int
    key: str = ""

    @property
    def identity(self) -> list[Any]:
        """What the text depends on. Stop strings are not part of it: they cut what is stored."""
        return [self.tokens, repr(self.config), self.seed if self.config.temperature > 0 else None]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    """Jobs of one configuration, the longest prompts first: memory runs out early or not at all."""
    for config in dict.fromkeys(job.config for job in jobs):
        members = sorted((job for job in jobs if job.config == config), key=lambda job: -len(job.tokens))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def main(arguments: Sequence[str]) -> None:
    """Runs the command line of ``lm_eval`` with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
