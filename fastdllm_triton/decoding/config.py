"""The options of a generation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ..models.config import ModelConfig
from ..utils.checks import check_temperature, is_bool, is_int, require, to_int, to_ints, to_number
from .cache_policy import CACHE_OPTIONS, CACHE_POLICIES, BlockCausal, CacheName, CachePolicy, NoBlockCausalCache, cache_policy
from .strategies import FixedSteps, Strategy, Threshold, strategy_names

if TYPE_CHECKING:
    import torch  # What is imported without it is quick: the roofline needs no tensors.


def official_logits_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that logits of a model are rounded to: the official code decides on logits in the model's."""
    import torch

    return None if dtype in (torch.float32, torch.float64) else dtype


@cache
def _warn_of_block_length(architecture: str, trained: int, given: int) -> None:
    """Warns, once."""
    warnings.warn(
        f"block_length = {given}: the weights of this {architecture} were trained with blocks of {trained}; "
        "attention is between other blocks than in training, which may cost accuracy",
        stacklevel=4,
    )


@dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation.

    Attributes:
        gen_length: tokens to generate, a multiple of ``block_length`` but for block-causal models.
        block_length: slots decoded together; blocks are finished left to right. Those of block-causal models are counted from the
            row's first token, so that the prompt's end stands in the first of them.
        cache: the window a step recomputes: ``none`` all slots, ``prefix`` from the block's start on, ``dual`` the block;
            ``block_causal``, of block-causal models, the block, whose past is final.
        strategy: which tokens a forward commits.
        temperature: 0 takes the likeliest token; above, tokens are sampled by Gumbel-max.
        tempered: whether tokens are ranked by ``softmax(logits / temperature)``, as in Dream's official code, instead of by the
            model's own distribution, as in LLaDA's.
        seed: row ``b`` draws with ``seed + b``; or one seed a row. A row's draws depend on its seed alone, not on its batch.
        stop_at_eos: do not decode the blocks of a row after one that holds an end token, but fill them with it. What comes
            before the end token is the same either way.
        eos_ids: end tokens; the model's if not given.
        forbidden: token ids that are never committed. ``[MASK]`` never is.
        commit_last: token ids whose confidence counts as 0, so that they are committed once nothing else in the block is left.
            All other confidences are those without these tokens (LLaDA, arXiv 2502.09992, appendix B.4: the end tokens).
        cfg_scale: above 0, classifier-free guidance: every sequence is decoded beside a copy in which all that was given, prompt
            and fixed tokens, is masked, and tokens are chosen by the logits ``u + (cfg_scale + 1) (c - u)``, of the sequence
            ``c`` and its copy ``u`` (unsupervised guidance, arXiv 2410.18514). Twice the rows, and logits are materialised.
        mask_id: the token that marks what is to be generated; the model's if not given.
        refresh_every: forwards from one refresh of the cache to the next within a block; only at its start if not given.
        prompt_refresh: blocks from one refresh of the prompt's part of the cache to the next; refreshes in between recompute
            the generated part alone (cf. dLLM-Cache, arXiv 2506.06295). At every block if not given.
        suffix_window: masked slots after the block that are computed and attended (cf. DPad, arXiv 2508.14148); all if not
            given.
        look_back: slots before the block that a step over a cache recomputes with it (vicinity refresh, dInfer,
            arXiv 2510.08666, section 3).
        look_ahead: slots after the block that a step over the dual cache recomputes with it.
        sub_block_length: slots of a block that are decoded together, where that is not the whole block: sub-blocks are finished
            left to right as well (Fast-dLLM v2, arXiv 2509.26328). Divides ``block_length``; block-causal models only.
        sub_block_cache: a step recomputes its sub-block alone once the first token of that is known; the rest of the block is
            stale meanwhile (Fast-dLLM v2's ``use_block_cache``).
        separate_store: a finished block is stored by a forward of its own, as in SDAR's official code, and not together with the
            first step of the next one. Decides no token, only the number of forwards. Fast-dLLM v2 always does.
        refresh_commits: ``rule``: a refresh commits what the strategy says. ``first``: it commits the block's first token alone,
            whatever its confidence, as Dream's official code does, and steps do not recompute the slot that predicts it. For
            models with shifted predictions, a cache, and any strategy but :class:`FixedSteps`.
        lockstep: the rows of a batch begin each block together, as in the official code, instead of each when it can. Decides
            no token, only the number of forwards.
        logits_dtype: rounds logits before anything is decided, to agree with code that materialises them in it.
    """

    gen_length: int = 128
    block_length: int = 32
    cache: CacheName = "dual"
    strategy: Strategy = Threshold(0.9)  # noqa: RUF009 (it is frozen)
    temperature: float = 0.0
    tempered: bool = False
    seed: int | Sequence[int] = 0
    stop_at_eos: bool = True
    eos_ids: Sequence[int] | None = None
    forbidden: Sequence[int] = ()
    commit_last: Sequence[int] = ()
    cfg_scale: float = 0.0
    mask_id: int | None = None
    refresh_every: int | None = None
    prompt_refresh: int | None = None
    suffix_window: int | None = None
    look_back: int = 0
    look_ahead: int = 0
    sub_block_length: int | None = None
    sub_block_cache: bool = False
    separate_store: bool = False
    refresh_commits: Literal["rule", "first"] = "rule"
    lockstep: bool = False
    logits_dtype: torch.dtype | None = None

    @classmethod
    def of_model(cls, model: ModelConfig, **options: Any) -> GenerationConfig:
        """The options of a model where the caller gives none.

        Block-causal models are decoded over their exact cache in blocks of the length that they were trained with; those whose
        predictions are shifted (Fast-dLLM v2) in sub-blocks of 8, as by their authors.

        Args:
            model: the model's shape.
            options: fields that are given.
        """
        if not model.block_causal:
            return cls(**options)
        length = options.get("block_length") or model.block_length or 1
        of_model: dict[str, Any] = {"cache": "block_causal", "block_length": length}
        if model.shift and length % 8 == 0:
            of_model |= {"sub_block_length": 8, "strategy": Threshold(0.9, strict=True)}
        return cls(**(of_model | options))

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length"):
            value = getattr(self, name)
            require(name, value, "an integer of 1 or more", is_int(value) and value >= 1)
            object.__setattr__(self, name, to_int(value))
        require("cache", self.cache, f"one of {', '.join(CACHE_POLICIES)}", self.cache in tuple(CACHE_POLICIES))
        # Without a cache the model decides.
        if self.cache not in ("none", "block_causal"):
            self._check_multiple()
        self._check_sub_blocks()
        if not isinstance(self.strategy, Strategy):
            raise ValueError(f"strategy must be {strategy_names()}, got {self.strategy!r}")
        if self.cache != "none" or not self.gen_length % self.block_length:
            self.strategy.steps_per_block(self.blocks)
        for name in ("temperature", "cfg_scale"):
            check_temperature(getattr(self, name), name)
            object.__setattr__(self, name, to_number(getattr(self, name)))
        for name in ("stop_at_eos", "lockstep", "tempered", "sub_block_cache", "separate_store"):
            value = getattr(self, name)
            require(name, value, "True or False", is_bool(value))
            object.__setattr__(self, name, bool(value))
        for name, optional in (("eos_ids", True), ("forbidden", False), ("commit_last", False)):
            value = getattr(self, name)
            if not (optional and value is None):
                allowed = f"{'None or ' if optional else ''}a sequence of token ids"
                object.__setattr__(self, name, to_ints(name, value, allowed))
        seed = to_int(self.seed) if is_int(self.seed) else to_ints("seed", self.seed, "an integer, or a sequence of one a row")
        object.__setattr__(self, "seed", seed)
        if self.commit_last and self.strategy.score != "confidence":
            raise ValueError(f"commit_last goes with score = 'confidence' only, got score = {self.strategy.score!r}")
        for name, least, optional in (
            ("refresh_every", 1, True),
            ("prompt_refresh", 1, True),
            ("suffix_window", 0, True),
            ("mask_id", 0, True),
            ("look_back", 0, False),
            ("look_ahead", 0, False),
        ):
            value = getattr(self, name)
            ok = (optional and value is None) or (is_int(value) and value >= least)
            require(name, value, f"{'None or ' if optional else ''}an integer of {least} or more", ok)
            object.__setattr__(self, name, None if value is None else to_int(value))
        if self.refresh_commits not in ("rule", "first"):
            raise ValueError(f"refresh_commits must be rule or first, got {self.refresh_commits!r}")
        if self.refresh_commits == "first":
            for name, clash in (
                ("cache", self.cache in ("none", "block_causal")),
                ("strategy", isinstance(self.strategy, FixedSteps)),
                ("refresh_every", self.refresh_every is not None),
            ):
                if clash:
                    raise ValueError(f"refresh_commits = 'first' does not go with {name} = {getattr(self, name)!r}")
        for name in {name: None for options in CACHE_OPTIONS.values() for name in options}:
            caches = [cache for cache, options in CACHE_OPTIONS.items() if name in options]
            if getattr(self, name) and self.cache not in caches:
                raise ValueError(f"{name} means something for cache = {' or '.join(caches)} only, got cache = {self.cache!r}")
        require("logits_dtype", self.logits_dtype, "None or a floating-point dtype", _is_none_or_float(self.logits_dtype))

    def _check_multiple(self) -> None:
        if self.gen_length % self.block_length:
            raise ValueError(f"gen_length must be a multiple of block_length = {self.block_length}, got {self.gen_length}")

    def _check_sub_blocks(self) -> None:
        length = self.sub_block_length
        if length is None:
            if self.sub_block_cache:
                raise ValueError("sub_block_cache needs sub_block_length, got None")
            return
        ok = is_int(length) and length >= 1 and self.block_length % length == 0
        require("sub_block_length", length, f"None or a divisor of block_length = {self.block_length}", ok)
        object.__setattr__(self, "sub_block_length", to_int(length))

    @property
    def blocks(self) -> int:
        """Number of blocks, or of sub-blocks; one more may be decoded where a block-causal model begins or ends inside of one."""
        return -(-self.gen_length // self.decoded_length)

    @property
    def decoded_length(self) -> int:
        """Slots that are decoded together: a block, or a sub-block where blocks have some."""
        return self.sub_block_length or self.block_length

    @property
    def commits_first_alone(self) -> bool:
        """Whether a refresh commits the first token of its block alone."""
        return self.refresh_commits == "first" and self.block_length > 1

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of its masked tokens that each forward of a block commits; of the rule ``schedule`` only."""
        return self.strategy.shares(self.blocks, after_first=self.refresh_commits == "first")

    @property
    def rows_per_sequence(self) -> int:
        """Rows of the network that decode one sequence: two with guidance."""
        return 2 if self.cfg_scale else 1

    def cache_policy(self, *, shift: bool = False, block_causal: bool = False) -> CachePolicy:
        """What the cache recomputes.

        Args:
            shift: whether the model's predictions are shifted: a step then recomputes the slot that predicts the block's first,
                unless the refresh has committed that one.
            block_causal: whether positions attend their own block and those before it alone.
        """
        options = {name: getattr(self, name) for name in CACHE_OPTIONS[self.cache]}
        if block_causal:
            kind = NoBlockCausalCache if self.cache == "none" else BlockCausal
            return kind(first_from_store=shift, **(options if self.cache == "block_causal" else {}))
        if shift and self.refresh_commits == "rule" and "look_back" in options:
            options["look_back"] = max(options["look_back"], 1)
        return cache_policy(self.cache, **options)

    def check_fits(self, model: ModelConfig) -> None:
        """Checks what only a model can tell.

        Raises:
            ValueError: an option is for models whose attention is of another kind.
        """
        kind = "block-causal" if model.block_causal else "bidirectional"
        caches = ("none", "block_causal") if model.block_causal else ("none", "prefix", "dual")
        allowed = f"{' or '.join(caches)} for {model.architecture}, whose attention is {kind}"
        require("cache", self.cache, allowed, self.cache in caches)
        if not model.block_causal:
            self._check_multiple()
            require("sub_block_length", self.sub_block_length, f"None for {model.architecture}", self.sub_block_length is None)
            return
        for name, value, unused in (
            ("refresh_commits", self.refresh_commits, "rule"),
            ("cfg_scale", self.cfg_scale, 0.0),
            *((name, getattr(self, name), None) for name in CACHE_OPTIONS["none"]),
        ):
            require(name, value, f"{unused} for {model.architecture}, whose attention is {kind}", value == unused)
        self.strategy.steps_per_block(self.blocks)

    def resolve(self, model: ModelConfig, rows: int) -> ResolvedIds:
        """Fills in what the model decides, and checks token ids against its vocabulary.

        Args:
            model: the model's shape.
            rows: sequences in the batch.

        Raises:
            ValueError: an id is outside the vocabulary, nothing is left to commit, or the seeds do not match the rows.

        Warns:
            UserWarning: the weights of a block-causal model were trained with blocks of another length; once.
        """
        mask_id = model.mask_id if self.mask_id is None else self.mask_id
        eos_ids = tuple(model.eos_ids if self.eos_ids is None else self.eos_ids)
        self.check_fits(model)
        named = {"mask_id": (mask_id,), "eos_ids": eos_ids, "forbidden": self.forbidden, "commit_last": self.commit_last}
        for name, ids in named.items():
            for token in ids:
                require(name, token, f"in the vocabulary [0, {model.vocab_size})", 0 <= token < model.vocab_size)
        if self.refresh_commits == "first" and not model.shift:
            raise ValueError(
                f"refresh_commits = 'first' is for models with shifted predictions, and {model.architecture} has none"
            )
        if self.stop_at_eos and not eos_ids:
            raise ValueError("eos_ids must name at least one token, or stop_at_eos be False")
        forbidden = tuple(sorted({mask_id, *self.forbidden}))
        if len(forbidden) == model.vocab_size:
            raise ValueError("forbidden leaves no token that could be committed")
        seeds = tuple(self.seed + b for b in range(rows)) if isinstance(self.seed, int) else tuple(self.seed)
        if len(seeds) != rows:
            raise ValueError(f"seed must be an integer or one for each of {rows} rows, got {len(seeds)}")
        for seed in seeds:
            require("seed", seed, "in [-2^63, 2^63)", -(2**63) <= seed < 2**63)
        if model.block_length not in (None, self.block_length):
            _warn_of_block_length(model.architecture, model.block_length, self.block_length)
        return ResolvedIds(mask_id, eos_ids, forbidden, tuple(sorted({*self.commit_last})), seeds)


def _is_none_or_float(dtype: object) -> bool:
    if dtype is None:
        return True
    import torch

    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


@dataclass(frozen=True)
class ResolvedIds:
    """Options that depend on the model and the batch: token ids and one seed a row."""

    mask_id: int
    eos_ids: tuple[int, ...]
    forbidden: tuple[int, ...]
    commit_last: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def never_or_last(self) -> tuple[int, ...]:
        """The tokens that take no part in the confidences of others."""
        return tuple(sorted({*self.forbidden, *self.commit_last}))

    @property
    def filler(self) -> int:
        """A token that is not ``[MASK]``, for slots that hold nothing."""
        return next(token for token in (*self.eos_ids, 0, 1) if token != self.mask_id)
