"""Confidence intervals: Wilson's for proportions, Agresti and Min's for their paired differences, the bootstrap over requests
for everything else.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Resamples of a bootstrap.
RESAMPLES = 2000
#: The normal quantile of a two-sided 95 % interval.
_Z = 1.959963984540054

Floats = NDArray[np.float64]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): never outside [0, 1], sane at 0 and at ``n``.

    Raises:
        ValueError: ``n`` is not positive, or ``successes`` not in ``[0, n]``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n] with n of 1 or more, got {successes} of {n}")
    share, z2 = successes / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(gained: float, lost: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions over the same ``n`` requests (Agresti and Min 2005).

    Args:
        gained, lost: requests that only the one, only the other got right. A half is added to each of the four cells, so that
            no differing request at all does not count as evidence that there is none.
        n: requests.
    """
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    middle = (b - c) / total
    half = _Z * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return middle - half, middle + half


def resample(n: int) -> Floats:
    """``[RESAMPLES, n]``: how often each of ``n`` requests is drawn. The same in every run, so differences are paired."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts.astype(np.float64)


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(numerators: Floats, denominators: Floats) -> tuple[float, float]:
    """Bootstrap interval of ``sum(numerators) / sum(denominators)`` over requests, ``[n]`` each."""
    weights = resample(len(numerators))
    return interval((weights @ numerators) / (weights @ denominators))
