"""What an evaluation reports: a record for each variant, and how every strategy stands against fixed steps at its own speed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..decoding.strategies import FixedSteps
from .grid import CacheSpec, Variant
from .runner import Result
from .statistics import Floats, interval, paired_interval, ratio_interval, resample, wilson

Record = dict[str, Any]


def rounded(value: Any) -> Any:
    """Numbers for JSON, None for NaN. Six digits are more than figures carry, and the same on every machine."""
    if isinstance(value, (tuple, list, np.ndarray)):
        return [rounded(entry) for entry in value]
    return None if np.isnan(value) else round(float(value), 6)


def summarize(results: Mapping[Variant, Sequence[Result]]) -> list[Record]:
    """One record a variant, in the order given.

    ``exact_match`` and ``whole`` (None where the task has no such score) with Wilson intervals; ``other_scores`` of a scorer of
    the user's, each a mean and the ends of its interval; ``tokens_per_forward``, committed tokens over forwards, and ``nfe``,
    forwards a request, with bootstrap intervals over requests; ``seconds`` of all requests; ``bytes`` and ``flops`` of a
    request by the roofline model. All intervals are of 95 %.

    ``tokens_by_forward[i]``: tokens that forward ``i`` of a block commits, over the blocks that have one;
    ``tokens_by_position[p]``: tokens committed by the forward that commits slot ``p`` of a block. Where blocks have sub-blocks,
    these take their place.
    """
    return [_record(variant, rows) for variant, rows in results.items()]


def _record(variant: Variant, results: Sequence[Result]) -> Record:
    n = len(results)
    tokens, forwards = _column(results, "tokens"), _column(results, "forwards")
    seconds = sum(result.seconds for result in results)
    names = sorted({name for result in results for name in result.scores or {}})
    record: Record = {
        **_names(variant),
        "gen_length": len(results[0].step_map),
        "n": n,
        "exact_match": None,
        "exact_match_ci": None,
        "whole": None,
        "whole_ci": None,
    }
    others: dict[str, list[float]] = {}
    for name in names:
        values = _scores(results, name)
        binary = bool(np.isin(values, (0, 1)).all())
        ci = wilson(values.sum(), n) if binary else interval(resample(n) @ values / n)
        if name in ("exact_match", "whole"):
            record |= {name: rounded(values.mean()), f"{name}_ci": rounded(ci)}
        else:
            others[name] = rounded([values.mean(), *ci])
    if others:
        record["other_scores"] = others
    by_forward, by_position = _profile(results, variant.base.sub_block_length or variant.block_length)
    return record | {
        "tokens_per_forward": rounded(tokens.sum() / forwards.sum()),
        "tokens_per_forward_ci": rounded(ratio_interval(tokens, forwards)),
        "nfe": rounded(forwards.mean()),
        "nfe_ci": rounded(ratio_interval(forwards, np.ones(n))),
        "tokens": rounded(tokens.mean()),
        "bytes": rounded(_column(results, "bytes").mean()),
        "flops": rounded(_column(results, "flops").mean()),
        "seconds": rounded(seconds),
        "tokens_per_second": rounded(tokens.sum() / seconds) if seconds else None,
        "tokens_by_forward": rounded(by_forward),
        "tokens_by_position": rounded(by_position),
    }


def compare(results: Mapping[Variant, Sequence[Result]], score: str = "exact_match") -> list[Record]:
    """Each strategy against fixed steps at equal tokens per forward, over the same cache and blocks.

    The score of fixed steps at a strategy's speed is read off the line through the fixed ones in the grid. ``gain`` is what the
    strategy scores above it, with the 95 % interval of a bootstrap that resamples requests for all variants at once: the
    requests are the same, so the differences are paired. Strategies faster or slower than every fixed one are left out.
    """
    groups: dict[tuple[str, int], list[Variant]] = defaultdict(list)
    for variant in results:
        groups[str(variant.cache), variant.block_length].append(variant)
    records: list[Record] = []
    for variants in groups.values():
        fixed = [variant for variant in variants if variant.strategy.kind is FixedSteps and variant.strategy.score is None]
        if len(fixed) < 2 or any(score not in (result.scores or {}) for variant in variants for result in results[variant]):
            continue
        n = len(results[fixed[0]])
        weights = np.vstack((np.ones(n), resample(n)))  # Line 0 is the sample itself.
        speeds, means = _curve(results, fixed, score, weights)
        for variant in variants:
            if variant in fixed:
                continue
            (speed,), (mean,) = _curve(results, [variant], score, weights)
            if not speeds[:, 0].min() <= speed[0] <= speeds[:, 0].max():
                continue
            order = np.argsort(speeds, axis=0)
            lines = zip(speed, np.take_along_axis(speeds, order, 0).T, np.take_along_axis(means, order, 0).T, strict=True)
            baseline = np.array([np.interp(*line) for line in lines])
            gain = mean - baseline
            record = {
                **_names(variant),
                "n": n,
                "score": score,
                "tokens_per_forward": rounded(speed[0]),
                "value": rounded(mean[0]),
                "fixed_at_equal_speed": rounded(baseline[0]),
                "gain": rounded(gain[0]),
                "gain_ci": rounded(interval(gain[1:])),
            }
            records.append(record)
    return records


def compare_caches(results: Mapping[Variant, Sequence[Result]]) -> list[Record]:
    """Each cache with options against the same cache without them: accuracy, agreement, and what a request costs.

    ``exact_match_gain`` and ``whole_gain`` are paired differences with their 95 % intervals, ``same`` the share of
    requests that are answered with the same text, with its Wilson interval, ``bytes_ratio`` and ``flops_ratio`` what a request
    costs by the roofline model as a share of what it costs without the options. Caches whose plain form is not in the grid are
    left out.
    """
    records: list[Record] = []
    for variant, rows in results.items():
        base = replace(variant, cache=CacheSpec(variant.cache.name))
        if not variant.cache.options or base not in results:
            continue
        plain, n = results[base], len(rows)
        same = sum(one.text == other.text for one, other in zip(rows, plain, strict=True))
        record: Record = {
            **_names(variant),
            "base": str(base.cache),
            "n": n,
            "same": rounded(same / n),
            "same_ci": rounded(wilson(same, n)),
        }
        for name in ("exact_match", "whole"):
            if name not in (rows[0].scores or {}):
                continue
            gain = _scores(rows, name) - _scores(plain, name)
            counted = paired_interval(float((gain == 1).sum()), float((gain == -1).sum()), n)
            ci = counted if np.isin(gain, (-1, 0, 1)).all() else interval(resample(n) @ gain / n)
            record |= {f"{name}_gain": rounded(gain.mean()), f"{name}_gain_ci": rounded(ci)}
        for name in ("bytes", "flops", "forwards"):
            record[f"{name}_ratio"] = rounded(_column(rows, name).sum() / _column(plain, name).sum())
        records.append(record)
    return records


def _names(variant: Variant) -> Record:
    return {"strategy": str(variant.strategy), "cache": str(variant.cache), "block_length": variant.block_length}


def _curve(
    results: Mapping[Variant, Sequence[Result]], variants: Sequence[Variant], score: str, weights: Floats
) -> tuple[Floats, Floats]:
    """``[variants, draws]`` tokens per forward and mean score under each line of weights."""
    tokens, forwards = (np.array([_column(results[variant], name) for variant in variants]) for name in ("tokens", "forwards"))
    scores = np.array([_scores(results[variant], score) for variant in variants])
    return (tokens @ weights.T) / (forwards @ weights.T), (scores @ weights.T) / weights.sum(1)


def _profile(results: Sequence[Result], block_length: int) -> tuple[Floats, Floats]:
    """Tokens by forward of a block, and by slot of a block: how parallel decoding gets as a block fills."""
    by_forward: dict[int, list[int]] = defaultdict(list)
    by_position: dict[int, list[int]] = defaultdict(list)
    for result in results:
        step_map = [-1] * result.begun + result.step_map
        for start in range(0, len(step_map), block_length):
            slots = {i: forward for i, forward in enumerate(step_map[start : start + block_length]) if forward >= 0}
            counts = Counter(slots.values())
            for order, forward in enumerate(sorted(counts)):
                by_forward[order].append(counts[forward])
            for slot, forward in slots.items():
                by_position[slot].append(counts[forward])
    positions = [np.mean(by_position.get(slot, np.nan)) for slot in range(block_length)]
    return np.array([np.mean(by_forward[order]) for order in sorted(by_forward)]), np.array(positions)


def _column(results: Sequence[Result], name: str) -> Floats:
    return np.array([getattr(result, name) for result in results], dtype=np.float64)


def _scores(results: Sequence[Result], name: str) -> Floats:
    return np.array([(result.scores or {})[name] for result in results], dtype=np.float64)
